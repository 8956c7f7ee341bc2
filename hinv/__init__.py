"""hinv: exact curvature of deep, narrow networks in time linear in depth."""

from . import checks, data, paper
from .blocks import BlockMatrix
from .estimate import Estimate
from .factor import SingularShiftError
from .hessian import GGN, AccuracyWarning, Hessian, SolveReport
from .networks import tall_skinny
from .spectrum import CertificateWarning, Eigenpairs

__all__ = [
    "GGN",
    "AccuracyWarning",
    "BlockMatrix",
    "CertificateWarning",
    "Eigenpairs",
    "Estimate",
    "Hessian",
    "SingularShiftError",
    "SolveReport",
    "checks",
    "data",
    "paper",
    "tall_skinny",
]
__version__ = "0.1.0"
