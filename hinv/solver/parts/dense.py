"""Any other stage, by the dense blocks of each sample."""

import torch
from torch import Tensor

from hinv.network import Stage, derivatives
from hinv.shapes import Inexact  # floats, or complex numbers at a complex shift

from .part import Part


class Dense(Part):
    """Any stage: per-sample blocks A, J, F, G and E as `stages.derivatives` gives them."""

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        D = derivatives(stage.by_rows(), wrt_input)
        self.J, self.A = D.J.flatten(0, 1), D.A
        self.E, self.F, self.G = (None, None, None) if gauss_newton else (D.E, D.F, D.G)
        self.p = self.J.shape[1]

    def blocks(self, V: Inexact[Tensor, "rows rows"]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        JV = self.J.T @ V
        S = JV @ self.J
        if self.E is not None:
            S += self.E
        if self.A is None:
            return S, None, None
        batch, a_out, a_in = self.A.shape
        N = torch.einsum("pno,noi->pni", JV.view(self.p, batch, a_out), self.A)
        VA = torch.einsum("vno,noi->vni", V.reshape(-1, batch, a_out), self.A).reshape(batch, a_out, batch * a_in)
        V = (self.A.mT @ VA).view(batch * a_in, batch * a_in)
        if self.F is not None and self.G is not None:
            N += self.F.transpose(0, 1)
            V.view(batch, a_in, batch, a_in).diagonal(dim1=0, dim2=2).add_(self.G.permute(1, 2, 0))
        return S, N.reshape(self.p, batch * a_in), V

    def pull(self, r: Inexact[Tensor, "rows k"]) -> tuple[Inexact[Tensor, "p k"], Inexact[Tensor, "columns k"] | None]:
        A = self.A
        return self.J.T @ r, None if A is None else (A.mT @ r.view(*A.shape[:2], -1)).flatten(0, 1)

    def push(self, x: Inexact[Tensor, "p k"], y: Inexact[Tensor, "columns k"] | None) -> Inexact[Tensor, "rows k"]:
        moved = self.J @ x
        if y is not None and self.A is not None:
            moved += (self.A @ y.view(self.A.shape[0], self.A.shape[2], -1)).flatten(0, 1)
        return moved
