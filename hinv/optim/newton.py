"""(C + eps I)^-1 g, with the Hessian or the Gauss-Newton matrix."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from hinv import ranks
from hinv.curvature import GGN, Curvature, Hessian
from hinv.network import losses
from hinv.shapes import Float
from hinv.solver.dual import Dual

from .descent import Direction
from .preconditioned import Preconditioned
from .shared import SharedGGN

SHORTEST = 2.0**-30  # length of a step that a search tries


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

    On a fixed batch the damping adapts and a step that fails is taken back; search=True there, without which networks of ReLU hardly converge (notebook 09a).
    On minibatches, where rho sees only the batch that made the step, a fixed damping (adapt=1, accept=False), no search and a rate below one are better. For
    least squares that can be met almost exactly, as a differential equation's residuals can, a small fixed damping (adapt=1, 1e-8) with search=True and
    momentum=0.95 (notebook 12): there the direction is right long before its length is.

    Where torch.distributed is initialized, the batch of a step is what all processes give together, each some samples of it, and all take the same step: inputs
    and backpropagated deltas are gathered, each process forms its strips of the dual's Gram matrix, and all factor it. The loss must be a sum, or a mean of
    torch.nn, and convex in the outputs; sample= stays None.

    Args:
        momentum: mu of SPRING (Goldshlager, Abrahamsen & Lin, arXiv:2401.10190): d minimizes |J d - r|^2 + eps |d - mu d_previous|^2, that is
            (G + eps I)^-1 (g + eps mu d_previous), d_previous the direction before (forgotten when a step is taken back). Between 0 and 1.
        search: whether d is halved until the loss of the batch falls, and on as long as it falls further, down to 2^-30; each length costs a forward pass. The
            optimizer stays at its default, SGD(lr=1).
    """

    kind, _shares = GGN, True

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
        momentum: float = 0.0,
        search: bool = False,
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie between 0 and 1 (excluded), not {momentum}")
        inner = self.optimizer.param_groups[0]
        if search and (type(self.optimizer) is not torch.optim.SGD or inner["lr"] != 1 or inner["momentum"] or clip):
            raise ValueError(
                "search=True finds the length of the step itself, which another rate, momentum or clip would change afterwards: leave the optimizer at its "
                "default, SGD(lr=1), and use momentum= of this class"
            )
        self.momentum, self.search = float(momentum), bool(search)
        self._previous: Float[Tensor, " P"] | None = None
        if ranks.several():
            if sample is not None:
                raise ValueError(
                    "with several processes the matrix is made from all of the batch: leave sample at None"
                )
            self.kind = SharedGGN

    def _prior(self) -> Float[Tensor, " P"] | None:
        """mu d_previous."""
        return None if self._previous is None else self.momentum * self._previous

    def _direct(self, C: Curvature, /, g: Float[Tensor, " P"]) -> Direction:
        self._keep(C)
        F = self._factor
        # the gradient of the same batch, whose residuals the dual knows
        d = F.least_squares(self._prior()) if isinstance(F, Dual) and g is C.gradient else None
        return replace(self._again(g) if d is None else Direction(d.to(g.dtype), F.inertia), factorizations=1)

    def _again(self, g: Float[Tensor, " P"]) -> Direction:
        prior = self._prior()
        return super()._again(g if prior is None else g + self._used * prior)

    def _length(self, d: Float[Tensor, " P"], loss: float, inputs: Tensor, targets: Tensor) -> float:
        if not self.search:
            return 1.0
        before, length, best, lowest = self._position(), 1.0, 1.0, loss
        while length >= SHORTEST:
            vector_to_parameters(before - length * d, self.parameters)
            value = self._value(inputs, targets)
            if value < lowest:
                best, lowest = length, value
            elif lowest < loss:
                break
            length /= 2.0
        vector_to_parameters(before, self.parameters)
        return best

    def _move(self, d: Float[Tensor, " P"]) -> None:
        self._previous = d if self.momentum else None
        super()._move(d)

    def _refused(self) -> None:
        super()._refused()
        self._previous = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._previous = state.get("previous")
