"""The last linear stage under a loss whose Hessian is diagonal minus rank one: cost linear in the number of classes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hinv.network import Stage
from hinv.shapes import Inexact  # floats, or complex numbers at a complex shift

from ..symmetric import Symmetric, factored
from .linear import Linear, each
from .part import Eliminated, Kept
from .spread import Spread, block, eye

CHUNK = 2**18  # numbers formed at once


class Head(Linear):
    """The last linear stage under a loss with V_n = diag(w_n) - u_n u_n^T: C class blocks minus a term of rank B.

    T_c = eps I + sum_n w_nc R_n R_n^T (m x m),  U[(c, j), n] = u_nc R_jn,  S = diag(T_c) - U U^T, so S^-1 = T^-1 + T^-1 U K^-1 U^T T^-1 with the
    B x B capacitance matrix K = I - U^T T^-1 U, and In(S) = In(T) + In(K) - (B, 0, 0) (Haynsworth). Parameters are numbered (class, j).
    Flops: about 4 B^2 C a^2 + C m (a + B)^2.
    """

    def __init__(
        self,
        stage: Stage,
        gauss_newton: bool,
        wrt_input: bool,
        w: Inexact[Tensor, "B C"],
        u: Inexact[Tensor, "B C"] | None,
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
            return HeadPivot(self, T, K, U, None, damping), None
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
        Y = None
        if K is not None and self.u is not None:
            ue = self.u.unsqueeze(1) * e  # (B, B, C)
            Y = ue @ QR_c.mT + ((self.u.unsqueeze(1) * RR_c).transpose(0, 1) @ self.M).transpose(0, 1)
            Y = K.couple(Y.reshape(batch, batch * a), V)
        self.eliminate_perp(V, damping)
        return HeadPivot(self, T, K, U, Y, damping), V


@dataclass
class HeadPivot(Eliminated):
    part: Head
    T: Symmetric
    K: Symmetric | None
    U: Inexact[Tensor, "C m B"] | None  # the half of it that T.half is
    Y: Inexact[Tensor, "B k"] | None  # what K couples: K.back(Y) = K^-1 U^T T^-1 N
    damping: complex

    @property
    def negative(self) -> int:
        return self.T.negative + (self.K.negative if self.K else 0) + self.part.perp * (self.damping.real < 0)

    @property
    def log_abs_det(self) -> float:
        rest = self.part.perp * math.log(abs(self.damping)) if self.part.perp else 0.0
        return self.T.log_abs_det + (self.K.log_abs_det if self.K else 0.0) + rest

    def _solve(self, b: Inexact[Tensor, "C m k"]) -> Inexact[Tensor, "C m k"]:
        """S^-1 b for b (C, m, k)."""
        t = self.T.half(b)
        if self.K is not None and self.U is not None:
            U = self.U.flatten(0, 1)
            t = t + (U @ self.K.solve(U.T @ self.T.over_D(t).flatten(0, 1))).reshape(t.shape)
        return self.T.back(self.T.over_D(t))

    def backward(self, r: Tensor | None, g: Inexact[Tensor, "p k"]) -> tuple[Kept, Tensor | None]:
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

    def forward(self, h: Kept, y: Tensor | None) -> tuple[Inexact[Tensor, "p k"], None]:
        (x, rest), part = h, self.part
        if y is not None:
            x = x - self._solve(self.N(y))
            if rest is not None:
                rest = rest - part.F_rest(y) / self.damping
        return part.put_together(x.transpose(0, 1).reshape(part.m * part.a_out, -1), rest), None

    def N(self, y: Inexact[Tensor, "columns k"]) -> Inexact[Tensor, "C m k"]:
        """N_c y = Q^T sum_n e_nc y_n + sum_n R_n (V_n W y_n)_c."""
        return each(self.part.Q_in.T, self.part.e_times(y)) + self.linear(y)

    def linear(self, y: Inexact[Tensor, "columns k"], units: slice = slice(None)) -> Inexact[Tensor, "units m k"]:
        """The second term, of these classes."""
        part, y_n = self.part, y.view(self.part.batch, self.part.fan_in, -1)
        return (part.R @ (part.M[:, units] @ y_n).flatten(1)).view(part.m, -1, y.shape[1]).transpose(0, 1)

    def spread(self, Sigma: Inexact[Tensor, "k k"] | None) -> Spread:
        return HeadJoint(self, Sigma)

    @property
    def noises(self) -> int:
        return self.part.p + (self.part.batch if self.K else 0)

    def color(self, noise: Inexact[Tensor, "noises k"]) -> Kept:
        """S^-1 = T^-1 + T^-1 U K^-1 U^T T^-1 is the covariance of a sum of two independent terms."""
        part, k = self.part, noise.shape[1]
        noise, second = noise.split([part.p, self.noises - part.p])
        first, rest = part.take_apart(noise)
        h = self.T.color(first.reshape(part.m, part.a_out, k).transpose(0, 1))
        if self.K is not None and self.U is not None:
            h = h + self.T.over_D(self.U) @ self.K.back(self.K.color(second))
        return (self.T.back(h), None if rest is None else rest / self.damping**0.5)


class HeadJoint(Spread):
    """Class by class: x_c = u_c - K_c y with K_c = T_c^-1 (N_c + U_c Z), Z = K^-1 U^T T^-1 N, N_c = Q^T (e_c^T kron I) + R M_c and U_c = R diag(u_c).

    Flops: about 4 C k^2 (k = B a), as the elimination; nothing of size (C m)^2 or C m k unless the whole block is asked for.
    """

    def __init__(self, pivot: HeadPivot, Sigma: Inexact[Tensor, "k k"] | None):
        self.pivot, self.part, self.Sigma, part = pivot, pivot.part, Sigma, pivot.part
        self.T_inverse = pivot.T.solve(eye(part.m, part.R).expand(part.a_out, -1, -1))  # (C, m, m)
        self.K_inverse = pivot.K.formed() if pivot.K else None
        self.Z = pivot.K.back(pivot.Y) if pivot.K and pivot.Y is not None else None  # (B, k)

    def diagonal(self) -> Inexact[Tensor, " p"]:
        part, out = self.part, []
        for units in part.units():
            T_inverse, C = self.T_inverse[units], self.T_inverse[units]
            U = None if part.u is None else part.R * part.u.T[units, None]
            if self.K_inverse is not None and U is not None:
                C = C + T_inverse @ (U @ self.K_inverse @ U.mT) @ T_inverse
            E = signals = None
            if self.Sigma is not None:
                e_Sigma = part.e_times(self.Sigma, units)
                G = each(part.Q_in.T, e_Sigma) + self.pivot.linear(self.Sigma, units)
                if self.Z is not None and U is not None:
                    G = G + U @ (self.Z @ self.Sigma)
                G = T_inverse @ G  # K_c Sigma
                at, E = G.view(*G.shape[:2], part.batch, part.fan_in), part.times_e(G, units)
                N = E @ part.Q_in + torch.einsum("cjna,nca->cjn", at, part.M[:, units]) @ part.R.T
                if self.Z is not None and U is not None:
                    N = N + G @ self.Z.T @ U.mT
                C, E, signals = C + N @ T_inverse, -E, part.times_e(e_Sigma, units)
            if not (part.perp and part.curved):
                E = signals = None
            out.append(part.of_units(C, E, signals, self.pivot.damping))
        return part.in_order(torch.cat(out).unsqueeze(2))[:, 0]

    def block(self) -> Inexact[Tensor, "p p"]:
        """As any other stage's."""
        part, pivot = self.part, self.pivot

        def solve(b: Inexact[Tensor, "C m k"]) -> Inexact[Tensor, "n k"]:
            return pivot._solve(b).transpose(0, 1).reshape(part.m * part.a_out, -1)

        n = part.m * part.a_out
        C = solve(eye(n, part.R).view(part.m, part.a_out, n).transpose(0, 1))
        if self.Sigma is None:
            return block(part, pivot.damping, C, None, None)
        K = solve(pivot.N(eye(len(self.Sigma), part.R)))
        X = -K @ self.Sigma
        return block(part, pivot.damping, C - X @ K.T, X, self.Sigma)

    def of_samples(self, batch: int) -> Inexact[Tensor, "B C C"]:
        """Of the outputs J_n x + W y_n = J_n u + L_n y, sample by sample."""
        part, u = self.part, self.part.u
        RT = part.R.T @ self.T_inverse
        RTR, RTQ, out = RT @ part.R, RT @ part.Q_in.T, []  # (C, B, B) and (C, B, a)
        for n in range(batch):
            at = RTR[:, n]  # of this sample with all: (C, B)
            covariance = at[:, n].diag()
            if self.K_inverse is not None and u is not None:
                covariance += (at * u.T) @ self.K_inverse @ (at * u.T).T
            if self.Sigma is not None:
                L = part.e.T.unsqueeze(2) * -RTQ[:, n, None] - at.unsqueeze(2) * part.M.transpose(0, 1)  # (C, B, a)
                L[:, n] += part.W
                L = L.flatten(1)
                if self.Z is not None and u is not None:
                    L -= (at * u.T) @ self.Z
                covariance += L @ self.Sigma @ L.T
            out.append(covariance)
        return torch.stack(out)
