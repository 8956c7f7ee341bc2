"""The Gauss-Newton matrix of a batch whose samples lie in several processes (torch.distributed), as `GaussNewton` asks for it."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from hinv import ranks
from hinv.curvature import GGN
from hinv.network import losses
from hinv.shapes import Float
from hinv.solver.dual import Dual
from hinv.solver.matrix import checked_damping, converted
from hinv.solver.root import Root
from hinv.spectrum.loader import terms


def weight(loss: losses.Loss, targets: Tensor) -> float:
    """What this process's share of the batch weighs in the loss of all: 1 in a sum, its part of the terms in a mean.

    Raises:
        ValueError: by what the mean of the loss divides is not known.
    """
    if getattr(loss, "reduction", None) == "sum":
        return 1.0
    own = torch.tensor(
        [ranks.agreed(lambda: terms(cast(nn.Module, loss), targets))], dtype=torch.float64, device=targets.device
    )
    return (own / ranks.summed(lambda: own.clone(), own)).item()


def summed(share: float, make: Callable[[], tuple[float, Float[Tensor, " P"]]], like: Tensor) -> tuple[float, Tensor]:
    """(value, gradient) of the loss of all samples from those of each process, in one all_reduce."""

    def flat() -> Float[Tensor, " n"]:
        value, gradient = make()
        return share * torch.cat([gradient, gradient.new_tensor([value])])

    out = ranks.summed(flat, like.new_empty(len(like) + 1))
    return out[-1].item(), out[:-1]


class SharedGGN(GGN):
    """GGN of the samples of all processes, each with some of them: loss, gradient and products are sums over the processes, the factor is the dual of all."""

    share: float | None = None  # None while the process checks its own samples alone

    def __init__(self, model: nn.Sequential, loss: losses.Loss, inputs: Tensor, targets: Tensor, check: bool = True):
        ranks.agreed(lambda: GGN.__init__(self, model, loss, inputs, targets, check))
        self.share = weight(loss, targets)
        self.loss, self.gradient = summed(self.share, lambda: (self.loss, self.gradient), self.gradient)

    def __matmul__(self, v: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        share = self.share
        if share is None:
            return super().__matmul__(v)
        return ranks.summed(lambda: share * GGN.__matmul__(self, v), v)

    def factor(self, damping: float = 1e-2, dtype: torch.dtype | None = None, keep: str = "all") -> Dual:
        chain, share, damping = converted(self.chain, dtype or self.dtype), self.share, checked_damping(damping)
        assert share is not None
        return Dual(ranks.agreed(lambda: Root([chain], share)).gathered(), damping)
