"""A linear stage in rotated weights, by torch for large stages and by NumPy for small ones."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hinv.network import Stage
from hinv.shapes import (
    Array,
    Inexact,  # floats, or complex numbers at a complex shift
)

from ..small import SMALL, Small
from .part import Eliminated, Kept, Part, Pivot
from .spread import Joint, SmallJoint

CHUNK = 2**20  # numbers formed at once


def each(M: Inexact[Array, "m r"], X: Inexact[Array, "N r c"]) -> Inexact[Array, "N m c"]:
    """M X_n for every matrix of the stack X (N, r, c); torch.matmul would copy M for each, and bmm does for columns."""
    if X.shape[2] == 1:
        return (X[:, :, 0] @ M.T)[:, :, None]
    if isinstance(X, np.ndarray):
        return M @ X
    return torch.bmm(M.expand(X.shape[0], *M.shape), X)


def cat(arrays: list[Array], dim: int = 0) -> Array:
    return np.concatenate(arrays, dim) if isinstance(arrays[0], np.ndarray) else torch.cat(arrays, dim)


class Repeated(Part):
    """Blocks of a small stage that each elimination needs, kept where a broadcast costs more than their numbers."""

    whole = False  # whether they are
    m: int
    a_out: int
    fan_in: int
    batch: int
    e: Array
    Q_in: Array

    def beyond(self) -> Array:
        raise NotImplementedError

    @cached_property
    def F(self) -> Inexact[Array, "n k"] | None:
        if not self.whole:
            return None
        blocks = self.e.T[None, :, :, None] * self.Q_in.T[:, None, None, :]
        return blocks.reshape(self.m * self.a_out, self.batch * self.fan_in)

    @cached_property
    def outer(self) -> Inexact[Array, "k k"] | None:
        """What `add_perp` adds."""
        if not (self.whole and self.perp):
            return None
        blocks = (self.e @ self.e.T)[:, None, :, None] * self.beyond()[None, :, None, :]
        return blocks.reshape(self.batch * self.fan_in, self.batch * self.fan_in)

    def release(self) -> None:
        """Forget them until the next elimination."""
        for name in ("F", "outer"):
            self.__dict__.pop(name, None)


class Linear(Repeated):
    """s = W z + bias with rotated weights; see the module's description. Rows of V: (sample, unit); of S: (j, unit), j numbering the columns of Q.

    The rotation also sorts S by size: without it, or with any other basis of the same span, small dampings cost two digits.
    """

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        self._set(
            stage,
            torch.cat([stage.rows, stage.ones], 1) if stage.has_bias else stage.rows,
            stage.signal,
            gauss_newton,
            wrt_input,
        )
        n, k = self.m * self.a_out, self.batch * self.fan_in
        self.whole = self.curved and max(n, k) <= SMALL

    def _set(
        self,
        stage: Stage,
        rows: Inexact[Tensor, "BT d"],
        signal: Inexact[Tensor, "B ..."],
        gauss_newton: bool,
        wrt_input: bool,
    ) -> None:
        """rows: what weights and bias are multiplied with at every position of every sample; signal: b as F meets it."""
        self.wrt_input, self.curved = wrt_input, wrt_input and not gauss_newton  # curved: whether F counts
        self.W, self.bias = stage.weight.flatten(1), stage.has_bias
        self.e = torch.zeros_like(signal) if gauss_newton else signal
        (self.a_out, self.fan_in), self.batch = self.W.shape, len(self.e)
        self.Q, self.R = torch.linalg.qr(rows.T)  # (d, m), (m, BT)
        (self.d, self.m), self.Q_in = self.Q.shape, self.Q[: self.fan_in]  # Q_in: without the bias's row
        self.p, self.perp = self.a_out * self.d, self.a_out * (self.d - self.m)

    def blocks(self, V: Inexact[Tensor, "rows rows"]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        JV, n = self.J_T(V), self.m * self.a_out
        S = each(self.R, self.middle(JV)).reshape(n, n)
        if not self.wrt_input:
            return S, None, None
        N = self.plus_F(JV)
        del JV
        return S, N, self.A_T(self.times_A(V))

    def plus_F(self, JV: Inexact[Array, "n rows"]) -> Inexact[Array, "n k"]:
        """J^T V A + F; in rotated weights F ((j, o), (n, k)) = e_n[o] Q[k, j]."""
        N = self.times_A(JV)
        if self.F is not None:
            N += self.F
        elif self.curved:
            rows = N.reshape(self.m, self.a_out, self.batch, self.fan_in)
            rows.addcmul_(self.e.T[None, :, :, None], self.Q_in.T[:, None, None, :])
        return N

    # rows of V, and the order (sample, position; unit) in which R meets them: the same here, not for a convolution

    def first(self, r: Array) -> Inexact[Array, "B ak"]:
        """(B a_out, k) -> (B, a_out k)."""
        return r.reshape(self.batch, -1)

    def middle(self, X: Array) -> Inexact[Array, "n B a_out"]:
        """(n, B a_out) -> (n, B, a_out)."""
        return X.reshape(-1, self.batch, self.a_out)

    def flat(self, X: Array, k: int) -> Inexact[Array, "rows k"]:
        """(B, a_out k) -> (B a_out, k)."""
        return X.reshape(-1, k)

    def J_T(self, r: Inexact[Array, "rows k"]) -> Inexact[Array, "n k"]:
        return (self.R @ self.first(r)).reshape(self.m * self.a_out, -1)

    def A_T(self, r: Inexact[Array, "rows k"]) -> Inexact[Array, "columns k"]:
        return each(self.W.T, r.reshape(self.batch, self.a_out, -1)).reshape(self.batch * self.fan_in, -1)

    def A(self, y: Inexact[Array, "columns k"]) -> Inexact[Array, "rows k"]:
        return each(self.W, y.reshape(self.batch, self.fan_in, -1)).reshape(self.batch * self.a_out, -1)

    def times_A(self, X: Inexact[Array, "r rows"]) -> Inexact[Array, "r columns"]:
        """X A for X (r, B a_out)."""
        return (X.reshape(-1, self.a_out) @ self.W).reshape(X.shape[0], -1)

    def pull(self, r: Array) -> tuple[Array, Array | None]:
        return self.J_T(r), self.A_T(r) if self.wrt_input else None

    def push(self, x: Inexact[Array, "n k"], y: Inexact[Array, "columns k"] | None) -> Inexact[Array, "rows k"]:
        k = x.shape[1]
        moved = self.flat(self.R.T @ x.reshape(self.m, -1), k)
        return moved if y is None else moved + self.A(y)

    # vectors: g (p, k) in the order of the parameters <-> rotated (m a_out, k) and the perpendicular rest (a_out, d, k)

    def take_apart(self, g: Inexact[Array, "p k"]) -> tuple[Inexact[Array, "n k"], Inexact[Array, "a_out d k"] | None]:
        k, weights = g.shape[1], self.a_out * self.fan_in
        full = g[:weights].reshape(self.a_out, self.fan_in, k)
        if self.bias:
            full = cat([full, g[weights:].reshape(self.a_out, 1, k)], 1)
        par = each(self.Q.T, full)
        rest = full - each(self.Q, par) if self.perp else None
        return par.swapaxes(0, 1).reshape(self.m * self.a_out, k), rest

    def put_together(self, x: Inexact[Array, "n k"], rest: Inexact[Array, "a_out d k"] | None) -> Inexact[Array, "p k"]:
        k = x.shape[1]
        full = each(self.Q, x.reshape(self.m, self.a_out, k).swapaxes(0, 1))
        return self.in_order(full if rest is None else full + rest)

    def in_order(self, full: Inexact[Array, "a_out d k"]) -> Inexact[Array, "p k"]:
        """Unit by unit, the bias last -> all weights, then all biases."""
        weights = full[:, : self.fan_in].reshape(self.a_out * self.fan_in, -1)
        return cat([weights, full[:, self.fan_in]]) if self.bias else weights

    # the weights beyond the span of the batch see F alone, (sum_n e_n y_n^T) (I - Q Q^T)

    def F_rest(self, y: Inexact[Array, "columns k"]) -> Inexact[Array, "a_out d k"]:
        """(a_out, d, k): the perpendicular part of F y."""
        moved = self.e_times(y)
        if self.bias:
            moved = cat([moved, 0.0 * moved[:, :1]], 1)
        return moved - each(self.Q, each(self.Q.T, moved))

    def F_rest_T(self, rest: Inexact[Array, "a_out d k"]) -> Inexact[Array, "columns k"]:
        """(B a_in, k): its transpose, applied to a vector that is perpendicular already."""
        k = rest.shape[2]
        return (self.e @ rest[:, : self.fan_in].reshape(self.a_out, -1)).reshape(self.batch * self.fan_in, k)

    # the inverse's diagonal, unit by unit: of unit o the weights are Q x_o + rest_o, and rest_o sees y by e_o alone

    def variances(self, joint: Joint) -> Inexact[Array, " p"]:
        m, (C, X, Sigma) = self.m, (joint.C, joint.X, joint.Sigma)
        C = C.reshape(m, self.a_out, m, self.a_out).diagonal(0, 1, 3).swapaxes(0, 2)  # (a_out, m, m)
        out = []
        for units in self.units():
            E = T = None
            if self.curved and self.perp and X is not None and Sigma is not None:
                c = self.carry
                own = X[:, c:].reshape(m, self.a_out, -1)[:, units].swapaxes(0, 1)
                E, T = self.times_e(own, units), self.times_e(self.e_times(Sigma[c:, c:], units), units)
            out.append(self.of_units(C[units], E, T, joint.pivot.damping))
        return self.in_order(cat(out)[:, :, None])[:, 0]

    def units(self) -> Iterator[slice]:
        """Some at a time."""
        numbers = self.d * max(self.m, self.batch * self.fan_in * self.curved)
        step = max(1, CHUNK // numbers)
        return (slice(at, at + step) for at in range(0, self.a_out, step))

    def e_times(self, y: Inexact[Array, "columns k"], units: slice = slice(None)) -> Inexact[Array, "units a_in k"]:
        """sum_n e_no y_n for these units."""
        return (self.e.T[units] @ y.reshape(self.batch, -1)).reshape(-1, self.fan_in, y.shape[1])

    def times_e(self, X: Inexact[Array, "units r columns"], units: slice) -> Inexact[Array, "units r a_in"]:
        """sum_n e_no X_on, for X_o (r, B a_in) of each of these units."""
        return (self.e.T[units, None, None] @ X.reshape(*X.shape[:2], self.batch, self.fan_in))[:, :, 0]

    def of_units(
        self,
        C: Inexact[Array, "units m m"],
        E: Inexact[Array, "units m a_in"] | None,
        T: Inexact[Array, "units a_in a_in"] | None,
        damping: complex,
    ) -> Inexact[Array, "units d"]:
        """Variances from C of x_o, E = sum_n e_no X_on and T = sum_nn' e_no e_n'o Sigma_nn'.

        With P = I - Q Q^T: the diagonals of Q C Q^T - 2 Q E P / damping + P / damping + P T P / damping^2.
        """
        Q, half = self.Q, each(self.Q, C)
        if E is None or T is None:
            own = (half * Q).sum(2)
            return own + (1.0 - (Q * Q).sum(1)) / damping if self.perp else own
        P = self.beyond(self.d)
        half = half - each(P, E.swapaxes(1, 2)) * (2.0 / damping)
        return (half * Q).sum(2) + (1.0 - (Q * Q).sum(1)) / damping + (each(P, T) * P).sum(2) / damping**2

    def beyond(self, rows: int | None = None) -> Inexact[Array, "rows a_in"]:
        """I - Q Q^T of one unit, its first rows (those of the weights, all with the bias's: d); columns of the weights, as no input moves the bias."""
        rows, a_in = self.fan_in if rows is None else rows, self.fan_in
        P = self.Q[:rows] @ -self.Q_in.T
        P.reshape(-1)[: a_in * a_in : a_in + 1] += 1.0
        return P

    def add_perp(self, V: Inexact[Array, "k k"], factor: complex) -> None:
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
        for name in ("Q", "Q_in", "R", "W", "e"):
            setattr(self, name, getattr(self, name).numpy())

    def eliminate(self, V: Tensor | None, damping: complex, try_cholesky: bool) -> tuple[Eliminated, Tensor | None]:
        assert V is not None  # the last stage under such a loss is a Head
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

    def add_perp(self, V: Inexact[Array, "k k"], factor: complex) -> None:
        if self.outer is not None:
            V += factor * self.outer


class SmallPivot(Pivot):
    """Tensors outside, arrays inside."""

    def backward(self, r: Tensor | None, g: Inexact[Tensor, "p k"]) -> tuple[Kept, Tensor | None]:
        assert r is not None  # a small stage is not a Head
        kept, back = super().backward(r.numpy(), g.numpy())
        return kept, None if back is None else torch.from_numpy(back)

    def forward(self, h: Kept, y: Tensor | None) -> tuple[Inexact[Tensor, "p k"], Tensor]:
        x, moved = super().forward(h, None if y is None else y.numpy())
        return torch.from_numpy(x), torch.from_numpy(moved)

    def spread(self, Sigma: Inexact[Tensor, "columns columns"] | None) -> SmallJoint:
        joint = super().spread(None if Sigma is None else Sigma.numpy())
        return SmallJoint(self, joint.C, joint.X, joint.Sigma)

    def color(self, noise: Inexact[Tensor, "p k"]) -> Kept:
        return super().color(noise.numpy())
