"""The fast exact solver: a symmetric factorization of H + eps I, stage by stage from the loss backwards.

Write y_l for the movement of the activations and lambda_l = V_l y_l - r_l for that of the backward signal. Start with the
loss, V_L = its Hessian in the outputs, r_L = 0; for l = L .. 1

    S_l     = E_l + eps I + J_l^T V_l J_l                         (p x p)
    N_l     = F_l + J_l^T V_l A_l                                 (p x B a_in)
    V_{l-1} = G_l + A_l^T V_l A_l - N_l^T S_l^-1 N_l              (B a_in x B a_in)
    h_l     = S_l^-1 (g_l + J_l^T r_l),    r_{l-1} = A_l^T r_l - N_l^T h_l

and forwards, y_0 = 0:  x_l = h_l - S_l^-1 N_l y_{l-1},  y_l = A_l y_{l-1} + J_l x_l. This is the Riccati recursion of a
linear-quadratic control problem (state y, control x, costate lambda). V, S, N do not depend on g. By congruence the inertia of H + eps I is the sum of
the inertias of the S_l, and log|det| the sum of theirs.

Parts (one for each stage) exploit what a layer is. Shapes: V is (B a, B a), rows numbered (sample, unit); r and y are (B a, k).

`Linear`. A batch excites only the span of its inputs. With Zt = [Z, 1] (B x d) and the thin QR Zt^T = Q R, m = min(B, d), the rotated weights
W Q (a_out x m) are the only ones V sees; S is m a_out square, whatever a_in. The rest of the weights sees eps and F alone:
its pivots are all eps, a_out (d - m) of them, and it is eliminated in closed form.
`Head`. The last linear stage under a loss whose Hessian is diag(w_n) - u_n u_n^T for each sample (cross-entropy, squared error, binary cross-entropy):
S is C blocks of m x m minus a term of rank B, factored as such; nothing of size (C m)^2 or (B C)^2 exists.
`Diagonal`. An elementwise stage. `Dense`. Anything else, with the blocks of `stages.derivatives`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import heads
from .chain import Chain, Stage
from .stages import derivatives, elementwise
from .symmetric import SingularPivotError, Symmetric


class SingularShiftError(torch.linalg.LinAlgError):
    """H + damping I cannot be factored at this damping: a pivot is zero to working precision."""


def _symmetric_flops(n: int, k: int) -> float:
    """Factor S (n x n), half(N) for N (n x k), and V - N^T S^-1 N."""
    return n**3 / 3 + n * n * k + 2 * n * k * k


# -- parts: what does not depend on the damping, computed once ---------------------------------------------------------


class Diagonal:
    """An elementwise stage: A = diag(slope), G = diag(bend)."""

    p = 0

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        slope, bend = elementwise(stage)
        self.slope, self.bend = slope.reshape(-1, 1), None if gauss_newton else bend.flatten()

    def eliminate(self, V: Tensor, damping: float) -> tuple["Diagonal", Tensor]:
        V = V.mul_(self.slope).mul_(self.slope.T)
        if self.bend is not None:
            V.diagonal().add_(self.bend)
        return self, V

    negative, log_abs_det = 0, 0.0

    def backward(self, r: Tensor, g: Tensor) -> tuple[None, Tensor]:
        return None, self.slope * r

    def forward(self, h: None, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[:0], self.slope * y


class Dense:
    """Any stage: per-sample blocks A, J, F, G and E as `stages.derivatives` gives them."""

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        D = derivatives(stage, wrt_input)
        self.J, self.A = D.J, D.A
        self.E, self.F, self.G = (None, None, None) if gauss_newton else (D.E, D.F, D.G)
        self.p = D.J.shape[2]

    def eliminate(self, V: Tensor, damping: float) -> tuple["DensePivot", Tensor | None]:
        J = self.J.flatten(0, 1)
        JV = J.T @ V
        S = JV @ J
        S.diagonal().add_(damping)
        if self.E is not None:
            S += self.E
        S = Symmetric(S)
        if self.A is None:
            return DensePivot(self, S, None), None
        batch, a_out, a_in = self.A.shape
        N = torch.einsum("pno,noi->pni", JV.reshape(self.p, batch, a_out), self.A)
        VA = torch.einsum("vno,noi->vni", V.reshape(-1, batch, a_out), self.A).reshape(batch, a_out, batch * a_in)
        V = (self.A.mT @ VA).reshape(batch * a_in, batch * a_in)
        if self.G is not None:
            N += self.F.transpose(0, 1)
            V.view(batch, a_in, batch, a_in).diagonal(dim1=0, dim2=2).add_(self.G.permute(1, 2, 0))
        X = S.half(N.reshape(self.p, batch * a_in))
        return DensePivot(self, S, X), V.addmm_(X.T, S.over_D(X), alpha=-1.0)


class Linear:
    """s = W z + bias with rotated weights; see the module's description. rows: (sample, unit), parameters (j, unit)."""

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        module, Z = stage.module, stage.inputs
        self.W, self.bias, self.wrt_input = module.weight.detach(), module.bias is not None, wrt_input
        Zt = torch.cat([Z, torch.ones_like(Z[:, :1])], 1) if self.bias else Z
        self.Q, self.R = torch.linalg.qr(Zt.T)  # (d, m), (m, B)
        self.e = torch.zeros_like(stage.b) if gauss_newton else stage.b
        (self.a_out, self.a_in), (self.d, self.m), self.batch = self.W.shape, self.Q.shape, len(Z)
        self.Q_in = self.Q[: self.a_in]  # rows of the weights, without the bias's
        self.perp = self.a_out * (self.d - self.m)
        self.p = self.a_out * self.d
        self.curved = not gauss_newton  # whether F counts

    def eliminate(self, V: Tensor, damping: float) -> tuple["LinearPivot", Tensor | None]:
        rows, (batch, a_out, a_in, m) = len(V), (self.batch, self.a_out, self.a_in, self.m)
        RV = (self.R @ V.reshape(batch, a_out * rows)).reshape(m * a_out, rows)  # J^T V
        S = (self.R @ RV.T.reshape(batch, -1)).reshape(m * a_out, m * a_out)
        S.diagonal().add_(damping)
        S = Symmetric(S)
        if not self.wrt_input:
            return LinearPivot(self, S, None, damping), None
        N = (RV.reshape(-1, a_out) @ self.W).reshape(m * a_out, batch * a_in)
        del RV
        V = (V.reshape(-1, a_out) @ self.W).reshape(batch, a_out, -1)
        V = (self.W.T @ V).reshape(batch * a_in, batch * a_in)
        if self.curved:  # F in rotated weights: ((j, o), (n, k)) = e_n[o] Q[k, j]
            N.view(m, a_out, batch, a_in).addcmul_(self.e.T[None, :, :, None], self.Q_in.T[:, None, None, :])
            self.subtract_perp(V, damping)
        X = S.half(N)
        del N
        return LinearPivot(self, S, X, damping), V.addmm_(X.T, S.over_D(X), alpha=-1.0)

    def subtract_perp(self, V: Tensor, damping: float) -> None:
        """V -= (e e^T) kron (I - Q Q^T) / damping: what eliminating the weights that the batch does not excite does to V."""
        if self.perp:
            if damping == 0:
                raise SingularPivotError(
                    "the weights that the batch does not excite have no curvature of their own, and the damping is 0"
                )
            rest = torch.eye(self.a_in).to(V) - self.Q_in @ self.Q_in.T
            ee = (self.e @ self.e.T)[:, None, :, None]
            V.view(self.batch, self.a_in, self.batch, self.a_in).addcmul_(
                ee, rest[None, :, None, :], value=-1.0 / damping
            )

    # vectors: g (p, k) in the order of the parameters <-> rotated (m a_out, k) and the perpendicular rest (a_out, d, k)

    def take_apart(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        k = g.shape[1]
        full = g[: self.a_out * self.a_in].reshape(self.a_out, self.a_in, k)
        if self.bias:
            full = torch.cat([full, g[self.a_out * self.a_in :].reshape(self.a_out, 1, k)], 1)
        par = torch.einsum("odk,dj->jok", full, self.Q)
        rest = full - torch.einsum("jok,dj->odk", par, self.Q) if self.perp else None
        return par.reshape(self.m * self.a_out, k), rest

    def put_together(self, par: Tensor, rest: Tensor | None) -> Tensor:
        full = torch.einsum("jok,dj->odk", par.reshape(self.m, self.a_out, -1), self.Q)
        if rest is not None:
            full += rest
        weights = full[:, : self.a_in].reshape(self.a_out * self.a_in, -1)
        return torch.cat([weights, full[:, self.a_in]]) if self.bias else weights

    def F_rest(self, y: Tensor) -> Tensor:
        """(a_out, d, k): the perpendicular part of F y, (sum_n e_n y_n^T) (I - Q Q^T)."""
        moved = torch.einsum("no,nik->oik", self.e, y.reshape(self.batch, self.a_in, -1))
        if self.bias:
            moved = torch.cat([moved, torch.zeros_like(moved[:, :1])], 1)
        return moved - torch.einsum("odk,dj,ij->oik", moved, self.Q, self.Q)

    def F_rest_T(self, rest: Tensor) -> Tensor:
        """(B a_in, k): its transpose, applied to a vector that is perpendicular already."""
        return torch.einsum("no,oik->nik", self.e, rest[:, : self.a_in]).reshape(self.batch * self.a_in, -1)


class Head(Linear):
    """The last linear stage under a loss with V_n = diag(w_n) - u_n u_n^T: C class blocks minus a term of rank B.

    T_c = eps I + sum_n w_nc R_n R_n^T (m x m),  U[(c, j), n] = u_nc R_jn,  S = diag(T_c) - U U^T, so S^-1 = T^-1 + T^-1 U K^-1 U^T T^-1 with the
    B x B capacitance matrix K = I - U^T T^-1 U, and In(S) = In(T) + In(K) - (B, 0, 0) (Haynsworth). Parameters are numbered (class, j).
    Flops: about 4 B^2 C a^2 + C m (a + B)^2.
    """

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool, w: Tensor, u: Tensor | None):
        super().__init__(stage, gauss_newton, wrt_input)
        self.w, self.u = w, u
        if wrt_input:
            self.M = w.unsqueeze(2) * self.W  # (B, C, a_in) = V_n W
            if u is not None:
                self.M -= u.unsqueeze(2) * (u @ self.W).unsqueeze(1)

    def eliminate(self, V: None, damping: float) -> tuple["HeadPivot", Tensor | None]:
        R, w, e, m = self.R, self.w, self.e, self.m
        T = (R * w.T.unsqueeze(1)) @ R.T  # (C, m, m)
        T.diagonal(dim1=1, dim2=2).add_(damping)
        T = Symmetric(T)
        K = U = None
        if self.u is not None:
            U = T.half(R * self.u.T.unsqueeze(1))  # (C, m, B)
            K = -(U.flatten(0, 1).T @ T.over_D(U).flatten(0, 1))
            K.diagonal().add_(1.0)
            K = Symmetric(K)
        if not self.wrt_input:
            return HeadPivot(self, T, K, U, damping), None
        batch, classes, a = self.batch, self.a_out, self.a_in
        basis = T.half(torch.cat([self.Q_in.T, R], 1).expand(classes, m, a + batch))
        inner = basis.mT @ T.over_D(basis)  # (C, a + B, a + B)
        QQ, QR, RR = inner[:, :a, :a], inner[:, :a, a:], inner[:, a:, a:]
        # P = N^T T^-1 N with N_c = e_nc Q^T + R_n M_nc: the e e term at once, the others sample by sample, classes last in memory
        ee = (e.unsqueeze(1) * e).reshape(batch**2, classes)
        P = (ee @ QQ.reshape(classes, a * a)).reshape(batch, batch, a, a).transpose(1, 2).reshape(batch * a, batch * a)
        QR_c, RR_c, M_c = QR.permute(2, 1, 0).contiguous(), RR.permute(2, 1, 0).contiguous(), self.M.mT.contiguous()
        half = torch.empty(batch * a, batch, a).to(P)
        for n in range(batch):
            left = torch.mul(M_c, 0.5 * RR_c[n].unsqueeze(1)).addcmul_(e.unsqueeze(1), QR_c[n])  # (B, a, C)
            half[:, n] = left.reshape(batch * a, classes) @ self.M[n]
        half = half.reshape(batch * a, batch * a)
        V = -(P + half + half.T)
        V.view(batch, a, batch, a).diagonal(dim1=0, dim2=2).add_((self.W.T @ self.M).permute(1, 2, 0))
        if K is not None:
            ue = self.u.unsqueeze(1) * e  # (B, B, C)
            Y = ue @ QR_c.mT + ((self.u.unsqueeze(1) * RR_c).transpose(0, 1) @ self.M).transpose(0, 1)
            X = K.half(Y.reshape(batch, batch * a))
            V.addmm_(X.T, K.over_D(X), alpha=-1.0)
        if self.curved:
            self.subtract_perp(V, damping)
        return HeadPivot(self, T, K, U, damping), V


# -- pivots: one stage eliminated at one damping -----------------------------------------------------------------------


@dataclass
class DensePivot:
    part: Dense
    S: Symmetric
    X: Tensor | None

    @property
    def negative(self) -> int:
        return self.S.negative

    @property
    def log_abs_det(self) -> float:
        return self.S.log_abs_det

    def backward(self, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        t = self.S.half(g + self.part.J.flatten(0, 1).T @ r)
        if self.X is None:
            return t, None
        A = self.part.A
        r = torch.einsum("noi,nok->nik", A, r.reshape(*A.shape[:2], -1)).reshape(A.shape[0] * A.shape[2], -1)
        return t, r - self.X.T @ self.S.over_D(t)

    def forward(self, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.S.back(t if y is None else t - self.X @ y)
        moved = self.part.J.flatten(0, 1) @ x
        if y is not None:
            A = self.part.A
            moved = moved + torch.einsum("noi,nik->nok", A, y.reshape(A.shape[0], A.shape[2], -1)).reshape(moved.shape)
        return x, moved


@dataclass
class LinearPivot:
    part: Linear
    S: Symmetric
    X: Tensor | None
    damping: float

    @property
    def negative(self) -> int:
        return self.S.negative + self.part.perp * (self.damping < 0)

    @property
    def log_abs_det(self) -> float:
        return self.S.log_abs_det + (self.part.perp * math.log(abs(self.damping)) if self.part.perp else 0.0)

    def backward(self, r: Tensor, g: Tensor) -> tuple[tuple, Tensor | None]:
        part, k = self.part, g.shape[1]
        g, rest = part.take_apart(g)
        if rest is not None:
            rest = rest / self.damping
        t = self.S.half(g + (part.R @ r.reshape(part.batch, -1)).reshape(-1, k))
        if self.X is None:
            return (t, rest), None
        r = (part.W.T @ r.reshape(part.batch, part.a_out, k)).reshape(-1, k) - self.X.T @ self.S.over_D(t)
        if rest is not None:
            r = r - part.F_rest_T(rest)
        return (t, rest), r

    def forward(self, h: tuple, y: Tensor | None) -> tuple[Tensor, Tensor]:
        (t, rest), part = h, self.part
        k = t.shape[1]
        if y is not None:
            t = t - self.X @ y
            if rest is not None:
                rest = rest - part.F_rest(y) / self.damping
        x = self.S.back(t)
        moved = (part.R.T @ x.reshape(part.m, -1)).reshape(-1, k)
        if y is not None:
            moved = moved + (part.W @ y.reshape(part.batch, part.a_in, k)).reshape(-1, k)
        return part.put_together(x, rest), moved


@dataclass
class HeadPivot:
    part: Head
    T: Symmetric
    K: Symmetric | None
    U: Tensor | None
    damping: float

    @property
    def negative(self) -> int:
        return self.T.negative + (self.K.negative if self.K else 0) + self.part.perp * (self.damping < 0)

    @property
    def log_abs_det(self) -> float:
        rest = self.part.perp * math.log(abs(self.damping)) if self.part.perp else 0.0
        return self.T.log_abs_det + (self.K.log_abs_det if self.K else 0.0) + rest

    def _solve(self, b: Tensor) -> Tensor:
        """S^-1 b for b (C, m, k)."""
        t = self.T.half(b)
        if self.K is not None:
            U = self.U.flatten(0, 1)
            t = t + (U @ self.K.back(self.K.half(U.T @ self.T.over_D(t).flatten(0, 1)))).reshape(t.shape)
        return self.T.back(t)

    def backward(self, r: None, g: Tensor) -> tuple[tuple, Tensor | None]:
        part, k = self.part, g.shape[1]
        g, rest = part.take_apart(g)
        h = self._solve(g.reshape(part.m, part.a_out, k).transpose(0, 1))  # (C, m, k)
        if rest is not None:
            rest = rest / self.damping
        if not part.wrt_input:
            return (h, rest), None
        r = -part.e @ (part.Q_in @ h).reshape(part.a_out, -1)  # (B, a_in k)
        r = r.reshape(part.batch, part.a_in, k) - part.M.mT @ (part.R.T @ h).transpose(0, 1)
        r = r.reshape(-1, k)
        if rest is not None:
            r = r - part.F_rest_T(rest)
        return (h, rest), r

    def forward(self, h: tuple, y: Tensor | None) -> tuple[Tensor, None]:
        (x, rest), part = h, self.part
        if y is not None:
            y_n = y.reshape(part.batch, part.a_in, -1)
            Ny = torch.einsum("nc,ij,nik->cjk", part.e, part.Q_in, y_n) + torch.einsum(
                "jn,nci,nik->cjk", part.R, part.M, y_n
            )
            x = x - self._solve(Ny)
            if rest is not None:
                rest = rest - part.F_rest(y) / self.damping
        return part.put_together(x.transpose(0, 1).reshape(part.m * part.a_out, -1), rest), None


# -- the whole ---------------------------------------------------------------------------------------------------------


def parts(chain: Chain, gauss_newton: bool = False) -> tuple[list[tuple[Stage, object]], Tensor | None]:
    """The structure of every stage from the first with parameters on, and V_L (None where a `Head` knows it). Computed once for all dampings."""
    live = [stage for stage in chain.live if not isinstance(stage.module, RESHAPES)]
    known = heads.diagonal_minus_rank_one(chain.loss, chain.outputs, chain.targets)
    out = []
    for number, stage in enumerate(live):
        wrt_input = number > 0
        if stage.kind == "linear" and stage is live[-1] and known is not None:
            return [*out, (stage, Head(stage, gauss_newton, wrt_input, *known))], None
        kind = {"linear": Linear, "elementwise": Diagonal, "general": Dense}[stage.kind]
        out.append((stage, kind(stage, gauss_newton, wrt_input)))
    return out, torch.block_diag(*heads.curvature(chain.loss, chain.outputs, chain.targets))


RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)  # identity on flattened samples


class Factor:
    """(H + damping I) or (GGN + damping I), factored: solve, inertia, logdet."""

    def __init__(self, structure: tuple[list[tuple[Stage, object]], Tensor | None], damping: float):
        stages, V = structure
        self.damping = damping
        self.pivots = []
        self.rows = 0 if V is None else len(V)
        V = None if V is None else V.clone()
        for stage, part in reversed(stages):
            try:
                pivot, V = part.eliminate(V, damping)
            except SingularPivotError as error:
                raise SingularShiftError(
                    f"no factorization of H + ({damping:g}) I: at {stage}, {error}. The damping is minus an eigenvalue, or next to one of a "
                    "later part of the network; change it a little, or use solve(method='sparse'), which pivots across stages"
                ) from error
            self.pivots.append(pivot)
        self.sizes = [part.p for _, part in stages]
        self.dtype = stages[0][0].inputs.dtype

    @property
    def inertia(self) -> tuple[int, int, int]:
        """(positive, negative, zero) eigenvalues of H + damping I, exact: the pivots' (Sylvester). Zero ones are refused when factoring."""
        negative = sum(pivot.negative for pivot in self.pivots)
        return sum(self.sizes) - negative, negative, 0

    @property
    def logdet(self) -> tuple[float, float]:
        """(sign, log |det(H + damping I)|), as torch.linalg.slogdet."""
        return (-1.0) ** self.inertia[1], sum(pivot.log_abs_det for pivot in self.pivots)

    def solve(self, b: Tensor) -> Tensor:
        """(H + damping I)^-1 b for b (P,) or (P, k): one sweep back and one forth, without refinement."""
        r, kept = None, []
        pieces = b.reshape(len(b), -1).to(self.dtype).split(self.sizes)
        if not isinstance(self.pivots[0], HeadPivot):
            r = pieces[0].new_zeros(self.rows, pieces[0].shape[1])
        for pivot, g in zip(self.pivots, reversed(pieces), strict=True):
            h, r = pivot.backward(r, g)
            kept.append(h)
        y, x = None, []
        for pivot, h in zip(reversed(self.pivots), reversed(kept), strict=True):
            step, y = pivot.forward(h, y)
            x.append(step)
        return torch.cat(x).reshape(b.shape).to(b.dtype)
