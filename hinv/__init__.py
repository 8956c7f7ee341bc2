"""hinv: exact curvature of deep, narrow networks in time linear in depth."""

from hinv import checks, data, optim, paper, spectrum, training
from hinv.curvature import GGN, Hessian
from hinv.errors import AccuracyWarning, CertificateWarning, SingularShiftError
from hinv.monitor import CurvatureMonitor
from hinv.network.build import tall_skinny
from hinv.paper import BlockMatrix
from hinv.solve import SolveReport
from hinv.solver.estimate import Estimate
from hinv.spectrum import Eigenpairs

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
