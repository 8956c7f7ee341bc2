"""Elementwise stages: activations, with a diagonal Jacobian and diagonal second derivatives."""

import torch
from torch import Tensor

from hinv.network import Stage
from hinv.shapes import Inexact  # floats, or complex numbers at a complex shift

from .part import Eliminated
from .spread import Spread


class Diagonal(Eliminated):
    """An elementwise stage: A = diag(slope), G = diag(bend)."""

    p = 0

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        self.slope, self.row = stage.slope.reshape(-1, 1), stage.slope.reshape(1, -1)
        self.carry = len(stage.inputs) * stage.carry
        self.bend = None if gauss_newton else stage.bend.flatten()

    def eliminate(
        self, V: Inexact[Tensor, "k k"] | None, damping: complex, try_cholesky: bool
    ) -> tuple[Eliminated, Inexact[Tensor, "k k"]]:
        assert V is not None  # only a Head knows V by itself
        c = self.carry
        V[c:].mul_(self.slope)
        V[:, c:].mul_(self.row)
        if self.bend is not None:
            V.diagonal()[c:].add_(self.bend)
        return self, V

    def spread(self, Sigma: Inexact[Tensor, "k k"] | None) -> Spread:
        assert Sigma is not None  # a stage with parameters comes before it
        Sigma[self.carry :].mul_(self.slope)
        Sigma[:, self.carry :].mul_(self.row)
        return Spread(Sigma)

    @property
    def negative(self) -> int:
        return 0

    @property
    def log_abs_det(self) -> float:
        return 0.0

    def backward(self, r: Inexact[Tensor, "rows k"] | None, g: Tensor) -> tuple[None, Inexact[Tensor, "rows k"]]:
        assert r is not None
        return None, self._scaled(r)

    def forward(
        self, h: None, y: Inexact[Tensor, "rows k"] | None
    ) -> tuple[Inexact[Tensor, "0 k"], Inexact[Tensor, "rows k"]]:
        assert y is not None  # a stage with parameters comes before it
        return y[:0], self._scaled(y)

    def _scaled(self, r: Inexact[Tensor, "rows k"]) -> Inexact[Tensor, "rows k"]:
        c = self.carry
        return torch.cat([r[:c], self.slope * r[c:]]) if c else self.slope * r
