"""The factorization's parts, one for each stage, and their pivots: what `factor` eliminates. Symbols are those of `factor`.

They exploit what a layer is. Shapes: V is (B a, B a), rows numbered as the flattened activations of the whole batch; r and y
are (B a, k).

`Linear`. A batch excites only the span of its inputs. With Zt = [Z, 1] (B x d) and the thin QR Zt^T = Q R, m = min(B, d), the rotated weights
W Q (a_out x m) are the only ones V sees; S is m a_out square, whatever a_in. The rest of the weights sees eps and F alone:
its pivots are all eps, a_out (d - m) of them, and it is eliminated in closed form.
`Conv2d`. The same map of patches to channels at every position, its weights shared: J^T V J by two products with the patches.
`Head`. The last linear stage under a loss whose Hessian is diag(w_n) - u_n u_n^T for each sample (cross-entropy, squared error, binary cross-entropy):
S is C blocks of m x m minus a term of rank B, factored as such; nothing of size (C m)^2 or (B C)^2 exists.
`Diagonal`. An elementwise stage. `Dense`. Anything else, with the blocks of `stages.derivatives`.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hinv.network import losses
from hinv.network.chain import Chain, Stage
from hinv.network.stages import derivatives, elementwise
from hinv.symmetric import SMALL, SingularPivotError, Small, Symmetric, factored

CHUNK = 2**18  # numbers formed at once in a Head
RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)  # identity on flattened samples


def _each(M: Tensor, X: Tensor) -> Tensor:
    """M X_n for every matrix of the stack X (N, r, c); torch.matmul would copy M for each, and bmm does for columns."""
    if X.shape[2] == 1:
        return (X[:, :, 0] @ M.T)[:, :, None]
    if isinstance(X, np.ndarray):
        return M @ X
    return torch.bmm(M.expand(X.shape[0], *M.shape), X)


def _cat(arrays: list, dim: int = 0):
    return np.concatenate(arrays, dim) if isinstance(arrays[0], np.ndarray) else torch.cat(arrays, dim)


# -- parts: what does not depend on the damping, computed once ---------------------------------------------------------


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


class Part:
    """A stage with parameters. Subclasses give its blocks at a given V and its products with vectors."""

    p: int  # parameters
    perp = 0  # how many of them the batch does not excite

    def eliminate(self, V: Tensor, damping: float, try_cholesky: bool) -> tuple["Pivot", Tensor | None]:
        S, N, V = self.blocks(V)
        S.diagonal().add_(damping)
        self.eliminate_perp(V, damping)
        S = factored(S, try_cholesky)
        return Pivot(self, S, None if N is None else S.couple(N, V), damping), V

    def eliminate_perp(self, V: Tensor | None, damping: float) -> None:
        if not self.perp:
            return
        if damping == 0:
            raise SingularPivotError(
                "the weights that the batch does not excite have no curvature of their own, and the damping is 0"
            )
        if V is not None:
            self.add_perp(V, -1.0 / damping)

    def blocks(self, V: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """J^T V J + E, J^T V A + F and A^T V A + G, new arrays; the last two None for the first stage."""
        raise NotImplementedError

    def pull(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        """J^T r and A^T r."""
        raise NotImplementedError

    def push(self, x: Tensor, y: Tensor | None) -> Tensor:
        """J x + A y."""
        raise NotImplementedError

    def take_apart(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """A vector in the order of the parameters (p, k) -> in the order of S, and its part beyond the span of the batch."""
        return g, None

    def put_together(self, x: Tensor, rest: Tensor | None) -> Tensor:
        return x


class Dense(Part):
    """Any stage: per-sample blocks A, J, F, G and E as `stages.derivatives` gives them."""

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        D = derivatives(stage, wrt_input)
        self.J, self.A = D.J.flatten(0, 1), D.A
        self.E, self.F, self.G = (None, None, None) if gauss_newton else (D.E, D.F, D.G)
        self.p = self.J.shape[1]

    def blocks(self, V: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
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
        if self.G is not None:
            N += self.F.transpose(0, 1)
            V.view(batch, a_in, batch, a_in).diagonal(dim1=0, dim2=2).add_(self.G.permute(1, 2, 0))
        return S, N.reshape(self.p, batch * a_in), V

    def pull(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        A = self.A
        return self.J.T @ r, None if A is None else (A.mT @ r.view(*A.shape[:2], -1)).flatten(0, 1)

    def push(self, x: Tensor, y: Tensor | None) -> Tensor:
        moved = self.J @ x
        if y is not None:
            moved += (self.A @ y.view(self.A.shape[0], self.A.shape[2], -1)).flatten(0, 1)
        return moved


class Linear(Part):
    """s = W z + bias with rotated weights; see the module's description. Rows of V: (sample, unit); of S: (j, unit), j numbering the columns of Q.

    The rotation also sorts S by size: without it, or with any other basis of the same span, small dampings cost two digits.
    """

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        self._set(stage, stage.inputs, gauss_newton, wrt_input)
        n, k = self.m * self.a_out, self.batch * self.fan_in
        self.F = self.outer = None
        if self.curved and max(n, k) <= SMALL:  # kept whole where a broadcast costs more than the numbers
            self.F = torch.einsum("no,kj->jonk", self.e, self.Q_in).reshape(n, k)
            self.outer = torch.kron(self.e @ self.e.T, self.beyond()) if self.perp else None

    def _set(self, stage: Stage, rows: Tensor, gauss_newton: bool, wrt_input: bool) -> None:
        """rows: (B, a_in) inputs, or the patches of a convolution."""
        self.wrt_input, self.curved = wrt_input, wrt_input and not gauss_newton  # curved: whether F counts
        self.W, self.bias = stage.module.weight.detach().flatten(1), stage.module.bias is not None
        self.e = torch.zeros_like(stage.b) if gauss_newton else stage.b
        (self.a_out, self.fan_in), self.batch = self.W.shape, len(stage.inputs)
        Zt = torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if self.bias else rows
        self.Q, self.R = torch.linalg.qr(Zt.T)  # (d, m), (m, B)
        (self.d, self.m), self.Q_in = self.Q.shape, self.Q[: self.fan_in]  # Q_in: without the bias's row
        self.p, self.perp = self.a_out * self.d, self.a_out * (self.d - self.m)

    def blocks(self, V: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        JV, n = self.J_T(V), self.m * self.a_out
        S = _each(self.R, self.middle(JV)).reshape(n, n)
        if not self.wrt_input:
            return S, None, None
        N = self.plus_F(JV)
        del JV
        return S, N, self.A_T(self.times_A(V))

    def plus_F(self, JV: Tensor) -> Tensor:
        """J^T V A + F; in rotated weights F ((j, o), (n, k)) = e_n[o] Q[k, j]."""
        N = self.times_A(JV)
        if self.F is not None:
            N += self.F
        elif self.curved:
            rows = N.reshape(self.m, self.a_out, self.batch, self.fan_in)
            rows.addcmul_(self.e.T[None, :, :, None], self.Q_in.T[:, None, None, :])
        return N

    # rows of V, and the order (sample, position; unit) in which R meets them: the same here, not for a convolution

    def first(self, r: Tensor) -> Tensor:
        """(B a_out, k) -> (B, a_out k)."""
        return r.reshape(self.batch, -1)

    def middle(self, X: Tensor) -> Tensor:
        """(n, B a_out) -> (n, B, a_out)."""
        return X.reshape(-1, self.batch, self.a_out)

    def flat(self, X: Tensor, k: int) -> Tensor:
        """(B, a_out k) -> (B a_out, k)."""
        return X.reshape(-1, k)

    def J_T(self, r: Tensor) -> Tensor:
        return (self.R @ self.first(r)).reshape(self.m * self.a_out, -1)

    def A_T(self, r: Tensor) -> Tensor:
        return _each(self.W.T, r.reshape(self.batch, self.a_out, -1)).reshape(self.batch * self.fan_in, -1)

    def A(self, y: Tensor) -> Tensor:
        return _each(self.W, y.reshape(self.batch, self.fan_in, -1)).reshape(self.batch * self.a_out, -1)

    def times_A(self, X: Tensor) -> Tensor:
        """X A for X (r, B a_out)."""
        return (X.reshape(-1, self.a_out) @ self.W).reshape(X.shape[0], -1)

    def pull(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.J_T(r), self.A_T(r) if self.wrt_input else None

    def push(self, x: Tensor, y: Tensor | None) -> Tensor:
        k = x.shape[1]
        moved = self.flat(self.R.T @ x.reshape(self.m, -1), k)
        return moved if y is None else moved + self.A(y)

    # vectors: g (p, k) in the order of the parameters <-> rotated (m a_out, k) and the perpendicular rest (a_out, d, k)

    def take_apart(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        k, weights = g.shape[1], self.a_out * self.fan_in
        full = g[:weights].reshape(self.a_out, self.fan_in, k)
        if self.bias:
            full = _cat([full, g[weights:].reshape(self.a_out, 1, k)], 1)
        par = _each(self.Q.T, full)
        rest = full - _each(self.Q, par) if self.perp else None
        return par.swapaxes(0, 1).reshape(self.m * self.a_out, k), rest

    def put_together(self, x: Tensor, rest: Tensor | None) -> Tensor:
        k = x.shape[1]
        full = _each(self.Q, x.reshape(self.m, self.a_out, k).swapaxes(0, 1))
        if rest is not None:
            full += rest
        weights = full[:, : self.fan_in].reshape(self.a_out * self.fan_in, k)
        return _cat([weights, full[:, self.fan_in]]) if self.bias else weights

    # the weights beyond the span of the batch see F alone, (sum_n e_n y_n^T) (I - Q Q^T)

    def F_rest(self, y: Tensor) -> Tensor:
        """(a_out, d, k): the perpendicular part of F y."""
        moved = (self.e.T @ y.reshape(self.batch, -1)).reshape(self.a_out, self.fan_in, -1)
        if self.bias:
            moved = _cat([moved, 0.0 * moved[:, :1]], 1)
        return moved - _each(self.Q, _each(self.Q.T, moved))

    def F_rest_T(self, rest: Tensor) -> Tensor:
        """(B a_in, k): its transpose, applied to a vector that is perpendicular already."""
        k = rest.shape[2]
        return (self.e @ rest[:, : self.fan_in].reshape(self.a_out, -1)).reshape(self.batch * self.fan_in, k)

    def beyond(self) -> Tensor:
        """I - Q Q^T on the weights of one unit."""
        return torch.eye(self.fan_in).to(self.Q) - self.Q_in @ self.Q_in.T

    def add_perp(self, V: Tensor, factor: float) -> None:
        """V += factor (e e^T) kron (I - Q Q^T): with -1 / damping, what eliminating those weights does to V."""
        if self.outer is not None:
            V.add_(self.outer, alpha=factor)
        elif self.curved:
            blocks = V.reshape(self.batch, self.fan_in, self.batch, self.fan_in)
            blocks.addcmul_((self.e @ self.e.T)[:, None, :, None], self.beyond()[None, :, None, :], value=factor)


class SmallLinear(Linear):
    """The same on the CPU in NumPy, whose calls cost a third of torch's: its arrays are views of the tensors."""

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        super().__init__(stage, gauss_newton, wrt_input)
        for name in ("Q", "Q_in", "R", "W", "e", "F", "outer"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.numpy())

    def eliminate(self, V: Tensor, damping: float, try_cholesky: bool) -> tuple["SmallPivot", Tensor | None]:
        V, n, k = V.numpy(), self.m * self.a_out, self.batch * self.fan_in
        JV = self.J_T(V)
        S = (self.R @ JV.T.reshape(self.batch, -1)).reshape(n, n)
        S.reshape(-1)[:: n + 1] += damping
        if not self.wrt_input:
            self.eliminate_perp(None, damping)
            return SmallPivot(self, Small(S, try_cholesky), None, damping), None
        N = self.plus_F(JV)
        V = self.times_A(self.times_A(V).T).reshape(k, k)
        self.eliminate_perp(V, damping)
        S = Small(S, try_cholesky)
        return SmallPivot(self, S, S.couple(N, V), damping), torch.from_numpy(V)

    def add_perp(self, V: np.ndarray, factor: float) -> None:
        if self.outer is not None:
            V += factor * self.outer


class Conv2d(Linear):
    """The same map of patches to channels at every position; patches take the place of samples. Rows of V: (sample, channel, position).

    Only for B L >= d (L positions): a batch of images excites all weights.
    """

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        module = stage.module
        self.weight, self.shape_in, self.shape_out = module.weight.detach(), stage.inputs.shape, stage.outputs.shape
        self.options = {"stride": module.stride, "padding": _padding(module), "dilation": module.dilation}
        self.positions = self.shape_out[2:].numel()
        patches = functional.unfold(stage.inputs, module.kernel_size, **self.options)  # (B, d, L)
        self._set(stage, patches.mT.flatten(0, 1), gauss_newton, wrt_input)

    def first(self, r: Tensor) -> Tensor:
        r = r.reshape(self.batch, self.a_out, self.positions, -1).transpose(1, 2)
        return r.reshape(self.batch * self.positions, -1)

    def middle(self, X: Tensor) -> Tensor:
        X = X.view(-1, self.a_out, self.positions).mT
        return X.reshape(-1, self.batch * self.positions, self.a_out)

    def flat(self, X: Tensor, k: int) -> Tensor:
        return X.view(self.batch, self.positions, self.a_out, k).transpose(1, 2).reshape(-1, k)

    def A_T(self, r: Tensor) -> Tensor:
        return self.times_A(r.T).T.contiguous()

    def A(self, y: Tensor) -> Tensor:
        images = y.T.reshape(-1, *self.shape_in[1:])
        return functional.conv2d(images, self.weight, **self.options).view(y.shape[1], -1).T

    def times_A(self, X: Tensor) -> Tensor:
        return self._transposed(X.reshape(-1, *self.shape_out[1:]), self.weight).view(X.shape[0], -1)

    def _transposed(self, images: Tensor, kernels: Tensor) -> Tensor:
        """The transpose of the convolution with these kernels, on (N, channels out, height, width)."""
        shape = (len(images), kernels.shape[1], *self.shape_in[2:])
        return nn.grad.conv2d_input(shape, kernels, images, **self.options)

    def plus_F(self, JV: Tensor) -> Tensor:
        """dW meets dz where b is: F[(j, o), n] is the transposed convolution of channel o of the backward signal b_n with column j of Q."""
        N = self.times_A(JV)
        if self.curved:
            kernels = self.Q_in.T.reshape(self.m, *self.weight.shape[1:])
            signals = self.e.transpose(0, 1).reshape(-1, 1, *self.shape_out[2:])  # (a_out B, 1, height, width)
            for kernel, rows in zip(kernels, N.view(self.m, -1), strict=True):
                rows += self._transposed(signals, kernel.unsqueeze(0)).flatten()
        return N


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

    def eliminate(self, V: None, damping: float, try_cholesky: bool) -> tuple["HeadPivot", Tensor | None]:
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
        half = torch.empty(batch * a, batch, a).to(P)
        for n in torch.arange(batch).split(max(1, CHUNK // self.M.numel())):
            n = slice(int(n[0]), int(n[-1]) + 1)
            left = (M_c * (0.5 * RR_c[n].unsqueeze(2))).addcmul_(e.unsqueeze(1), QR_c[n].unsqueeze(1))  # (n, B, a, C)
            half[:, n] = (left.view(-1, batch * a, classes) @ self.M[n]).transpose(0, 1)
        half = half.reshape(batch * a, batch * a)
        V = -(P + half + half.T)
        V.view(batch, a, batch, a).diagonal(dim1=0, dim2=2).add_((self.W.T @ self.M).permute(1, 2, 0))
        if K is not None:
            ue = self.u.unsqueeze(1) * e  # (B, B, C)
            Y = ue @ QR_c.mT + ((self.u.unsqueeze(1) * RR_c).transpose(0, 1) @ self.M).transpose(0, 1)
            K.couple(Y.reshape(batch, batch * a), V)
        self.eliminate_perp(V, damping)
        return HeadPivot(self, T, K, U, damping), V


# -- pivots: one stage eliminated at one damping -----------------------------------------------------------------------


@dataclass
class Pivot:
    part: Part
    S: Symmetric
    Y: Tensor | None
    damping: float

    @property
    def negative(self) -> int:
        return self.S.negative + self.part.perp * (self.damping < 0)

    @property
    def log_abs_det(self) -> float:
        return self.S.log_abs_det + (self.part.perp * math.log(abs(self.damping)) if self.part.perp else 0.0)

    def backward(self, r: Tensor, g: Tensor) -> tuple[tuple, Tensor | None]:
        g, rest = self.part.take_apart(g)
        if rest is not None:
            rest = rest / self.damping
        Jr, r = self.part.pull(r)
        u, w = self.S.start(g + Jr)
        if self.Y is not None:
            r = r - self.Y.T @ u
            if rest is not None:
                r -= self.part.F_rest_T(rest)
        return (w, rest), r

    def forward(self, h: tuple, y: Tensor | None) -> tuple[Tensor, Tensor]:
        w, rest = h
        if y is not None:
            w = w - self.Y @ y
            if rest is not None:
                rest = rest - self.part.F_rest(y) / self.damping
        x = self.S.back(w)
        return self.part.put_together(x, rest), self.part.push(x, y)


class SmallPivot(Pivot):
    """Tensors outside, arrays inside."""

    def backward(self, r: Tensor, g: Tensor) -> tuple[tuple, Tensor | None]:
        kept, r = super().backward(r.numpy(), g.numpy())
        return kept, None if r is None else torch.from_numpy(r)

    def forward(self, h: tuple, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = super().forward(h, None if y is None else y.numpy())
        return torch.from_numpy(x), torch.from_numpy(y)


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
            t = t + (U @ self.K.solve(U.T @ self.T.over_D(t).flatten(0, 1))).reshape(t.shape)
        return self.T.back(self.T.over_D(t))

    def backward(self, r: None, g: Tensor) -> tuple[tuple, Tensor | None]:
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

    def forward(self, h: tuple, y: Tensor | None) -> tuple[Tensor, None]:
        (x, rest), part = h, self.part
        if y is not None:
            y_n, k = y.view(part.batch, part.fan_in, -1), y.shape[1]
            curved = (part.e.T @ y_n.flatten(1)).view(part.a_out, part.fan_in, k)  # sum_n e_nc y_n
            linear = (part.R @ (part.M @ y_n).flatten(1)).view(part.m, part.a_out, k)  # sum_n R_n (V_n W y_n)_c
            x = x - self._solve(_each(part.Q_in.T, curved) + linear.transpose(0, 1))
            if rest is not None:
                rest = rest - part.F_rest(y) / self.damping
        return part.put_together(x.transpose(0, 1).reshape(part.m * part.a_out, -1), rest), None


# -- the whole ---------------------------------------------------------------------------------------------------------


def parts(chain: Chain, gauss_newton: bool = False) -> tuple[list[tuple[Stage, object]], Tensor | None]:
    """The structure of every stage from the first with parameters on, and V_L (None where a `Head` knows it). Computed once for all dampings."""
    live = [stage for stage in chain.live if not isinstance(stage.module, RESHAPES)]
    known = losses.diagonal_minus_rank_one(chain.loss, chain.outputs, chain.targets)
    out: list[tuple[Stage, object]] = []
    for number, stage in enumerate(live):
        if stage.kind == "linear" and stage is live[-1] and known is not None:
            return [*out, (stage, Head(stage, gauss_newton, number > 0, *known))], None
        out.append((stage, kind(stage, number > 0)(stage, gauss_newton, number > 0)))
    return out, torch.block_diag(*losses.curvature(chain.loss, chain.outputs, chain.targets))


def kind(stage: Stage, wrt_input: bool) -> type:
    """Which part a stage becomes (a `Head`, where the loss allows it, is for `parts` to say)."""
    if stage.kind == "elementwise":
        return Diagonal
    if stage.kind == "linear":
        batch, a_in = stage.inputs.shape
        n = stage.outputs.shape[1] * min(batch, a_in + (stage.module.bias is not None))
        small = stage.inputs.device.type == "cpu" and max(n, wrt_input * batch * a_in, stage.outputs.numel()) <= SMALL
        return SmallLinear if small else Linear
    module = stage.module
    if type(module) is not nn.Conv2d or stage.inputs.ndim != 4 or module.groups > 1 or module.padding_mode != "zeros":
        return Dense
    whole = len(stage.parameters) == len(list(module.parameters()))
    rows, d = len(stage.inputs) * stage.outputs[0, 0].numel(), module.weight[0].numel() + (module.bias is not None)
    return Conv2d if whole and rows >= d and _padding(module) is not None else Dense


def _padding(module: nn.Conv2d) -> tuple[int, int] | None:
    """Its padding in numbers; None where "same" pads one side more than the other."""
    if module.padding == "valid":
        return (0, 0)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return module.padding
