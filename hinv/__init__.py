"""hinv: exact curvature of deep, narrow networks in time linear in depth."""

from hinv import checks, data, optim, paper, spectrum, training
from hinv.estimate import Estimate
from hinv.factor import SingularShiftError
from hinv.hessian import GGN, AccuracyWarning, Hessian, SolveReport
from hinv.monitor import CurvatureMonitor
from hinv.network.build import tall_skinny
from hinv.paper import BlockMatrix
from hinv.spectrum import CertificateWarning, Eigenpairs

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
