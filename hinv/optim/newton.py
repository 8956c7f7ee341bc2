"""(C + eps I)^-1 g, with the Hessian or the Gauss-Newton matrix."""

from hinv.curvature import GGN, Hessian

from .preconditioned import Preconditioned


class DampedNewton(Preconditioned):
    """The paper's step (H + eps I)^-1 g. Where H has eigenvalues below -eps it may point uphill: it is the honest article, nothing is flipped.

    Cost: one factorization of H (see `Hessian.factor`) for each `every` steps.
    """

    kind = Hessian

    def __init__(
        self, model, loss, optimizer=None, clip=None, damping=1.0, adapt=1.0, every=1, accept=False, sample=None
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)


class GaussNewton(DampedNewton):
    """(G + eps I)^-1 g with the exact Gauss-Newton matrix, always downhill; for cross-entropy the exact natural gradient.

    On a fixed batch the damping adapts and a step that fails is taken back. On minibatches, where rho sees only the batch that made the step,
    a fixed damping (adapt=1, accept=False) and a rate below one are better.
    """

    kind = GGN

    def __init__(
        self, model, loss, optimizer=None, clip=None, damping=0.1, adapt=3.0, every=1, accept=True, sample=None
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)
