"""Elementwise stages: activations, with a diagonal Jacobian and diagonal second derivatives."""

from torch import Tensor

from hinv.network import Stage
from hinv.network.stages import elementwise


class Diagonal:
    """An elementwise stage: A = diag(slope), G = diag(bend)."""

    p = 0

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        first, bend = (stage.slope, None) if gauss_newton else elementwise(stage)
        self.slope, self.row = first.reshape(-1, 1), first.reshape(1, -1)
        self.bend = None if gauss_newton else bend.flatten()

    def eliminate(self, V: Tensor, damping: float, try_cholesky: bool) -> tuple["Diagonal", Tensor]:
        V = V.mul_(self.slope).mul_(self.row)
        if self.bend is not None:
            V.diagonal().add_(self.bend)
        return self, V

    negative, log_abs_det = 0, 0.0

    def backward(self, r: Tensor, g: Tensor) -> tuple[None, Tensor]:
        return None, self.slope * r

    def forward(self, h: None, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[:0], self.slope * y
