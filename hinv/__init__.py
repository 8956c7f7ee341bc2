"""hinv: exact curvature of deep, narrow networks in time linear in depth."""

from . import checks, data, optim, paper, spectrum, training
from .blocks import BlockMatrix
from .estimate import Estimate
from .factor import SingularShiftError
from .hessian import GGN, AccuracyWarning, Hessian, SolveReport
from .monitor import CurvatureMonitor
from .networks import tall_skinny
from .spectrum import CertificateWarning, Eigenpairs

__all__ = [
    "GGN",
    "AccuracyWarning",
    "BlockMatrix",
    "CertificateWarning",
    "CurvatureMonitor",
    "Eigenpairs",
    "Estimate",
    "Hessian",
    "SingularShiftError",
    "SolveReport",
    "checks",
    "data",
    "optim",
    "paper",
    "spectrum",
    "tall_skinny",
    "training",
]
__version__ = "0.1.0"
