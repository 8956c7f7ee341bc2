"""The last linear stage under a loss whose Hessian is diagonal minus rank one: cost linear in the number of classes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hinv.network import Stage
from hinv.shapes import Inexact as Float  # a complex shift makes all of them complex

from ..symmetric import Symmetric, factored
from .linear import Linear, each
from .part import Eliminated, Kept

CHUNK = 2**18  # numbers formed at once


class Head(Linear):
    """The last linear stage under a loss with V_n = diag(w_n) - u_n u_n^T: C class blocks minus a term of rank B.

    T_c = eps I + sum_n w_nc R_n R_n^T (m x m),  U[(c, j), n] = u_nc R_jn,  S = diag(T_c) - U U^T, so S^-1 = T^-1 + T^-1 U K^-1 U^T T^-1 with the
    B x B capacitance matrix K = I - U^T T^-1 U, and In(S) = In(T) + In(K) - (B, 0, 0) (Haynsworth). Parameters are numbered (class, j).
    Flops: about 4 B^2 C a^2 + C m (a + B)^2.
    """

    def __init__(
        self, stage: Stage, gauss_newton: bool, wrt_input: bool, w: Float[Tensor, "B C"], u: Float[Tensor, "B C"] | None
    ):
        super().__init__(stage, gauss_newton, wrt_input)
        self.w, self.u = w, u
        if wrt_input:
            self.M = w.unsqueeze(2) * self.W  # (B, C, a_in) = V_n W
            if u is not None:
                self.M -= u.unsqueeze(2) * (u @ self.W).unsqueeze(1)

    def eliminate(self, V: Tensor | None, damping: complex, try_cholesky: bool) -> tuple[Eliminated, Tensor | None]:
        R, w, e, m = self.R, self.w, self.e, self.m
        T = (R * w.T.unsqueeze(1)) @ R.T  # (C, m, m)
        T.diagonal(dim1=1, dim2=2).add_(damping)
        T = factored(T)
        K = U = None
        if self.u is not None:
            U = T.half(R * self.u.T.unsqueeze(1))  # (C, m, B)
            K = -(U.flatten(0, 1).T @ T.over_D(U).flatten(0, 1))
            K.diagonal().add_(1.0)
            K = factored(K)
        if not self.wrt_input:
            self.eliminate_perp(None, damping)
            return HeadPivot(self, T, K, U, damping), None
        batch, classes, a = self.batch, self.a_out, self.fan_in
        basis = T.half(torch.cat([self.Q_in.T, R], 1).expand(classes, m, a + batch))
        inner = basis.mT @ T.over_D(basis)  # (C, a + B, a + B)
        QQ, QR, RR = inner[:, :a, :a], inner[:, :a, a:], inner[:, a:, a:]
        # P = N^T T^-1 N with N_c = e_nc Q^T + R_n M_nc: the e e term at once, the others some samples at a time, classes last in memory
        ee = (e.unsqueeze(1) * e).reshape(batch**2, classes)
        P = (ee @ QQ.reshape(classes, a * a)).reshape(batch, batch, a, a).transpose(1, 2).reshape(batch * a, batch * a)
        QR_c, RR_c, M_c = QR.permute(2, 1, 0).contiguous(), RR.permute(2, 1, 0).contiguous(), self.M.mT.contiguous()
        half = P.new_empty(batch * a, batch, a)
        for n in torch.arange(batch, device="cpu").split(max(1, CHUNK // self.M.numel())):
            n = slice(int(n[0]), int(n[-1]) + 1)
            left = (M_c * (0.5 * RR_c[n].unsqueeze(2))).addcmul_(e.unsqueeze(1), QR_c[n].unsqueeze(1))  # (n, B, a, C)
            half[:, n] = (left.view(-1, batch * a, classes) @ self.M[n]).transpose(0, 1)
        half = half.reshape(batch * a, batch * a)
        V = -(P + half + half.T)
        V.view(batch, a, batch, a).diagonal(dim1=0, dim2=2).add_((self.W.T @ self.M).permute(1, 2, 0))
        if K is not None and self.u is not None:
            ue = self.u.unsqueeze(1) * e  # (B, B, C)
            Y = ue @ QR_c.mT + ((self.u.unsqueeze(1) * RR_c).transpose(0, 1) @ self.M).transpose(0, 1)
            K.couple(Y.reshape(batch, batch * a), V)
        self.eliminate_perp(V, damping)
        return HeadPivot(self, T, K, U, damping), V


@dataclass
class HeadPivot(Eliminated):
    part: Head
    T: Symmetric
    K: Symmetric | None
    U: Float[Tensor, "C m B"] | None
    damping: complex

    @property
    def negative(self) -> int:
        return self.T.negative + (self.K.negative if self.K else 0) + self.part.perp * (self.damping.real < 0)

    @property
    def log_abs_det(self) -> float:
        rest = self.part.perp * math.log(abs(self.damping)) if self.part.perp else 0.0
        return self.T.log_abs_det + (self.K.log_abs_det if self.K else 0.0) + rest

    def _solve(self, b: Float[Tensor, "C m k"]) -> Float[Tensor, "C m k"]:
        """S^-1 b for b (C, m, k)."""
        t = self.T.half(b)
        if self.K is not None and self.U is not None:
            U = self.U.flatten(0, 1)
            t = t + (U @ self.K.solve(U.T @ self.T.over_D(t).flatten(0, 1))).reshape(t.shape)
        return self.T.back(self.T.over_D(t))

    def backward(self, r: Tensor | None, g: Float[Tensor, "p k"]) -> tuple[Kept, Tensor | None]:
        part, k = self.part, g.shape[1]
        g, rest = part.take_apart(g)
        h = self._solve(g.reshape(part.m, part.a_out, k).transpose(0, 1))  # (C, m, k)
        if rest is not None:
            rest = rest / self.damping
        if not part.wrt_input:
            return (h, rest), None
        r = -part.e @ (part.Q_in @ h).reshape(part.a_out, -1)  # (B, a_in k)
        r = r.reshape(part.batch, part.fan_in, k) - part.M.mT @ (part.R.T @ h).transpose(0, 1)
        r = r.reshape(-1, k)
        if rest is not None:
            r = r - part.F_rest_T(rest)
        return (h, rest), r

    def forward(self, h: Kept, y: Tensor | None) -> tuple[Float[Tensor, "p k"], None]:
        (x, rest), part = h, self.part
        if y is not None:
            y_n, k = y.view(part.batch, part.fan_in, -1), y.shape[1]
            curved = (part.e.T @ y_n.flatten(1)).view(part.a_out, part.fan_in, k)  # sum_n e_nc y_n
            linear = (part.R @ (part.M @ y_n).flatten(1)).view(part.m, part.a_out, k)  # sum_n R_n (V_n W y_n)_c
            x = x - self._solve(each(part.Q_in.T, curved) + linear.transpose(0, 1))
            if rest is not None:
                rest = rest - part.F_rest(y) / self.damping
        return part.put_together(x.transpose(0, 1).reshape(part.m * part.a_out, -1), rest), None
