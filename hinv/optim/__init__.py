"""Descent with exact curvature: one `step(inputs, targets)`, whatever the method.

Every class finds a direction d on the batch and hands it to an ordinary torch optimizer as if it were the gradient: theta -= rate * d for the
default SGD(lr=1). So momentum on the preconditioned step is SGD's momentum, and every schedule of torch.optim.lr_scheduler works on `.optimizer`.

    GradientDescent      d = g                                  the baseline: SGD, momentum, Adam, anything from torch.optim
    DampedNewton         d = (H + eps I)^-1 g                   the paper's
    GaussNewton          d = (G + eps I)^-1 g                   G the Gauss-Newton matrix; eps by Levenberg and Marquardt, or a line search; SPRING
    TrustRegionNewton    d = argmin of the model in a ball      More and Sorensen (1983) on exact factorizations
    SaddleFreeNewton     d = (|H| + eps I)^-1 g                 Dauphin et al. (2014), on the dense or a Lanczos spectrum

With s the step really taken, the model predicts the decrease -(g.s + s.Cs / 2), C = H or G, and rho = decrease of the loss / predicted decrease. A step
that makes the loss of its own batch larger is taken back, and momentum starts anew.

Minibatches: a gradient wants many images and costs little; a matrix is good enough from few, and stays good for many steps. `sample` makes it from the
first images of the batch alone (Byrd et al., SIAM J. Optim. 21, 2011), `every` keeps a factorization for several steps. Both together bring an exact
Gauss-Newton step to less than two gradient steps.

A loop that calls optimizer.step(closure), a trainer's for example, gets its torch.optim.Optimizer from ClosureOptimizer(descent).

Files: `descent` what all share, `preconditioned` the loop, then one file a method; `closure` for loops of others; `monitor` watches anybody's training. Knows `hinv.curvature`.
"""

from .closure import ClosureOptimizer
from .descent import Descent, Direction, GradientDescent, StepReport
from .monitor import CurvatureMonitor
from .newton import DampedNewton, GaussNewton
from .preconditioned import Preconditioned
from .saddle_free import SaddleFreeNewton
from .trust_region import TrustRegionNewton, more_sorensen

__all__ = [
    "ClosureOptimizer",
    "CurvatureMonitor",
    "DampedNewton",
    "Descent",
    "Direction",
    "GaussNewton",
    "GradientDescent",
    "Preconditioned",
    "SaddleFreeNewton",
    "StepReport",
    "TrustRegionNewton",
    "more_sorensen",
]
