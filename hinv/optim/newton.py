"""(C + eps I)^-1 g, with the Hessian or the Gauss-Newton matrix."""

import torch
from torch import nn

from hinv.curvature import GGN, Hessian
from hinv.network import losses

from .preconditioned import Preconditioned


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
