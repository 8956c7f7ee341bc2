"""(C + eps I)^-1 g, with the Hessian or the Gauss-Newton matrix."""

import torch
from torch import Tensor, nn

from hinv import ranks
from hinv.curvature import GGN, Hessian
from hinv.network import losses
from hinv.shapes import Float

from .preconditioned import Preconditioned
from .shared import SharedGGN, summed, weight


class DampedNewton(Preconditioned):
    """The paper's step (H + eps I)^-1 g. Where H has eigenvalues below -eps it may point uphill: it is the honest article, nothing is flipped.

    Cost: one factorization of H (see `Hessian.factor`) for each `every` steps.
    """

    kind = Hessian

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
        damping: float = 1.0,
        adapt: float = 1.0,
        every: int = 1,
        accept: bool = False,
        sample: int | None = None,
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)


class GaussNewton(DampedNewton):
    """(G + eps I)^-1 g with the exact Gauss-Newton matrix, always downhill; for cross-entropy the exact natural gradient.

    On a fixed batch the damping adapts and a step that fails is taken back. On minibatches, where rho sees only the batch that made the step,
    a fixed damping (adapt=1, accept=False) and a rate below one are better.

    Where torch.distributed is initialized, the batch of a step is what all processes give together, each some samples of it, and all take the same step: inputs
    and backpropagated deltas are gathered, each process forms its strips of the dual's Gram matrix, and all factor it. The loss must be a sum, or a mean of
    torch.nn, and convex in the outputs; sample= stays None.
    """

    kind = GGN

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
        damping: float = 0.1,
        adapt: float = 3.0,
        every: int = 1,
        accept: bool = True,
        sample: int | None = None,
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)
        if ranks.several():
            if sample is not None:
                raise ValueError(
                    "with several processes the matrix is made from all of the batch: leave sample at None"
                )
            self.kind = SharedGGN

    def _gradient(self, inputs: Tensor, targets: Tensor) -> tuple[float, Float[Tensor, " P"]]:
        if not ranks.several():
            return super()._gradient(inputs, targets)
        own = super()._gradient
        return summed(weight(self.loss, targets), lambda: own(inputs, targets), self._position())

    def _value(self, inputs: Tensor, targets: Tensor) -> float:
        if not ranks.several():
            return super()._value(inputs, targets)
        own, none = super()._value, self._position()[:0]
        return summed(weight(self.loss, targets), lambda: (own(inputs, targets), none), none)[0]
