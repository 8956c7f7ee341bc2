"""hinv: exact curvature of deep, narrow networks in time linear in depth.

    H = hinv.Hessian(model, loss, x, y)      or hinv.GGN: the Gauss-Newton matrix
    H.solve(g, damping)                      (H + damping I)^-1 g, exact, with its residual in H.last_solve
    H.factor(damping)                        once, for many right-hand sides; inertia, log-determinant; the inverse's diagonal, blocks, trace; samples
    H.counts(edges), H.eigsh(k)              exact spectra, certified
    hinv.influence(H, x, y, damping)         of each training sample on the loss of others; hinv.leave_one_out
    hinv.laplace(model, loss, x, y)          evidence and its maximum, predictive variances, samples
    hinv.optim, hinv.CurvatureMonitor        steps, and curvature during training
    hinv.jets                                networks that carry derivatives, for differential equations
    hinv.paper                               every matrix of the paper

The rooms, each above all that it uses: optim and posterior, curvature, spectrum, solver and paper, network. `hinv.companion` is for the notebooks and is not imported here.
"""

from hinv import optim, paper, spectrum
from hinv.curvature import GGN, Hessian
from hinv.errors import AccuracyWarning, CertificateWarning, NotFiniteError, SingularShiftError
from hinv.network import Residual, SharedLinear, jets, tall_skinny
from hinv.optim import CurvatureMonitor
from hinv.paper import BlockMatrix
from hinv.posterior import influence, laplace, leave_one_out
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
    "NotFiniteError",
    "Residual",
    "SharedLinear",
    "SingularShiftError",
    "SolveReport",
    "influence",
    "jets",
    "laplace",
    "leave_one_out",
    "optim",
    "paper",
    "spectrum",
    "tall_skinny",
]
__version__ = "0.1.0"
