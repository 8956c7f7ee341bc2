"""hinv: exact curvature of deep, narrow networks in time linear in depth."""

from . import checks, data, paper
from .blocks import BlockMatrix
from .hessian import AccuracyWarning, Hessian, SolveReport
from .networks import tall_skinny

__all__ = ["AccuracyWarning", "BlockMatrix", "Hessian", "SolveReport", "checks", "data", "paper", "tall_skinny"]
__version__ = "0.1.0"
