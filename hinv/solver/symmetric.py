"""Factorization of one symmetric matrix S, definite or not, in the form the elimination needs.

    S = C D C^T,    so that    N^T S^-1 N = X^T Y,  X = C^-1 N,  Y = D^-1 X

Cholesky (D = I) where S is positive definite; otherwise LDL^T with Bunch-Kaufman pivoting, D of 1 x 1 and 2 x 2 blocks, on a GPU without pivoting where
its entries do not grow; eigenvalues for stacks of small matrices. Inertia and determinant are those of D (Sylvester's law of inertia).

Measured on two cores in float64, microseconds for n = 64: sytrf 22, its unpacking into L, D and the row order 25, a triangular solve with 64
columns 13, a product 8, a Cholesky that fails 6, eigh 210; torch.linalg.ldl_solve alone 58. S^-1 (sytri, 17) or C^-1 formed once would save a
tenth, and cost two to three digits of the log-determinant on badly scaled problems. Milliseconds for n = 576 / 2048: Cholesky 2 / 58,
ldl_factor 3 / 74, a triangular solve 1.4 / 50, a ninth of ldl_solve; there fresh memory costs as much as arithmetic, so solves are in place.
"""

import itertools
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack as _lapack
from torch import Tensor

from hinv.shapes import Array, Int
from hinv.shapes import Inexact as Float  # a complex shift makes all of them complex

lapack: Any = _lapack  # its types leave out sytrf's companions

# up to which an elimination without pivoting is taken: it costs one to two digits of an unrefined solve and of the uncertainty at any limit from 1e3 on
# (refinement gives those of the solve back), and three where the widest network's was let grow by 1e5; below 1e3 a third of the blocks go to the host
GROWTH = 1e4
STRIPES = 4  # block rows of a symmetric product: 5/8 of the flops of a full one
WIDE = 320  # rows from which that pays


class SingularPivotError(torch.linalg.LinAlgError):
    """S is singular to working precision, so neither its inverse nor its inertia is known."""


def factored(S: Float[Tensor, "... n n"], try_cholesky: bool = True) -> "Symmetric":
    """Factor a symmetric matrix, or a stack of them (..., n, n), the fastest way that serves.

    Args:
        S: (..., n, n) symmetric; overwritten.
        try_cholesky: False where S is known not to be positive definite, or likely not to be.

    Raises:
        SingularPivotError: a pivot within rounding of zero, or S not finite.
    """
    if S.is_complex():
        return ComplexLDL(S) if S.ndim == 2 and S.numel() else ComplexStack(S)
    if try_cholesky or S.ndim > 2 or not S.numel():
        L, info = torch.linalg.cholesky_ex(S)
        if not info.any() and L.diagonal(dim1=-2, dim2=-1).isfinite().all():
            return Cholesky(L)
        del L
    if S.ndim > 2:
        return Eigen(S)
    return (Unpivoted.of(S) if S.device.type == "cuda" else None) or LDL(S)


class Symmetric:
    """S = C D C^T. Subclasses give half and back; in the whole stack, the number of negative eigenvalues and log |det S|."""

    negative: int
    log_abs_det: float
    inverse: Any  # the diagonal of D^-1 as a column, a tensor or an array
    L: Tensor

    def couple(self, N: Float[Array, "n k"], V: Float[Array, "k k"]) -> Float[Array, "n k"]:
        """V -= N^T S^-1 N in place; returns Y, which takes N's place in the sweeps. N (n, k) is overwritten."""
        X = self.half(N, overwrite=True)
        Y = self.over_D(X, out=N)
        subtract_product(V, X, Y)
        return Y

    def start(self, t: Array) -> tuple[Array, Array]:
        """(u, w) with N^T S^-1 t = Y^T u and S^-1 (t - N y) = back(w - Y y), for t (n, k)."""
        u = self.half(t)
        return u, self.over_D(u)

    def solve(self, t: Array) -> Array:
        """S^-1 t."""
        return self.back(self.start(t)[1])

    def formed(self) -> Float[Array, "n n"]:
        """S^-1."""
        return self.back(self.back(self.over_D(self.eye())).T)

    def spread(
        self, Y: Float[Array, "n k"], Sigma: Float[Array, "k k"]
    ) -> tuple[Float[Array, "n n"], Float[Array, "n k"]]:
        """S^-1 + K Sigma K^T and -K Sigma, with K = S^-1 N = C^-T Y."""
        YSigma, middle = Y @ Sigma, self.over_D(self.eye())
        subtract_product(middle, -YSigma.T, Y.T)
        return self.back(self.back(middle).T), -self.back(YSigma)

    def eye(self) -> Float[Array, "n n"]:
        return torch.eye(self.L.shape[-1], dtype=self.L.dtype, device=self.L.device)

    def color(self, noise: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        """D^-1/2 times independent standard normal numbers, for S positive definite: back of it has the covariance S^-1."""
        return noise * self.inverse**0.5

    def half(self, X: Float[Array, "*stack n k"], overwrite: bool = False) -> Float[Array, "*stack n k"]:
        """C^-1 X for X (..., n, k)."""
        raise NotImplementedError

    def over_D(
        self, Z: Float[Array, "*stack n k"], out: Float[Array, "*stack n k"] | None = None
    ) -> Float[Array, "*stack n k"]:
        """D^-1 Z."""
        return torch.mul(Z, self.inverse, out=out)

    def back(self, Z: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        """C^-T Z, so that back(over_D(half(X))) = S^-1 X."""
        raise NotImplementedError


class Cholesky(Symmetric):
    negative = 0

    def __init__(self, L: Float[Tensor, "... n n"]):
        self.L = L

    def half(self, X: Float[Array, "*stack n k"], overwrite: bool = False) -> Float[Array, "*stack n k"]:
        return torch.linalg.solve_triangular(self.L, X, upper=False, out=X if overwrite else None)

    def over_D(
        self, Z: Float[Array, "*stack n k"], out: Float[Array, "*stack n k"] | None = None
    ) -> Float[Array, "*stack n k"]:
        return Z

    def back(self, Z: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        return torch.linalg.solve_triangular(self.L.mT, Z, upper=True)

    def color(self, noise: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        return noise

    @cached_property
    def log_abs_det(self) -> float:
        return 2.0 * self.L.diagonal(dim1=-2, dim2=-1).log().sum().item()


class Eigen(Symmetric):
    def __init__(self, S: Float[Tensor, "... n n"]):
        if not S.isfinite().all():
            raise SingularPivotError(NOT_FINITE)
        values, self.L = torch.linalg.eigh(S)
        smallest, largest = torch.aminmax(values.abs())
        if smallest <= 4 * S.shape[-1] * torch.finfo(S.dtype).eps * largest:
            raise SingularPivotError(ZERO)
        self.negative, self.log_abs_det = int((values < 0).sum()), values.abs().log().sum().item()
        self.inverse = values.reciprocal().unsqueeze(-1)

    def half(self, X: Float[Array, "*stack n k"], overwrite: bool = False) -> Float[Array, "*stack n k"]:
        return self.L.mT @ X

    def back(self, Z: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        return self.L @ Z


class Unpivoted(Symmetric):
    """S = L D L^T without pivoting, the fastest on a GPU: from LU, as U = D L^T. Only where it has not grown."""

    def __init__(self, L: Float[Tensor, "n n"], d: Float[Tensor, " n"], negative: int, log: float):
        self.L, self.inverse, self.negative, self.log_abs_det = L, d.reciprocal().unsqueeze(-1), negative, log

    @classmethod
    def of(cls, S: Float[Tensor, "n n"]) -> "Unpivoted | None":
        """None where too many digits went: by |L| |D| |L^T| 1 against |S| 1, whose ratio bounds what rounding errors are multiplied with."""
        L, d = _unpivoted(S)
        size = L.abs() @ (d.abs() * L.abs().sum(0))
        growth = size.amax() / S.abs().sum(1).amax()
        smallest, largest = torch.aminmax(d.abs())
        values = torch.stack([growth, smallest, largest, (d < 0).sum(), d.abs().log().sum()]).tolist()  # one transfer
        growth, smallest, largest, negative, log = values
        if not (growth < GROWTH and smallest > 4 * len(d) * torch.finfo(d.dtype).eps * largest):
            return None
        return cls(L, d, int(negative), log)

    def half(self, X: Float[Array, "*stack n k"], overwrite: bool = False) -> Float[Array, "*stack n k"]:
        return torch.linalg.solve_triangular(self.L, X, upper=False, unitriangular=True)

    def back(self, Z: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        return torch.linalg.solve_triangular(self.L.mT, Z, upper=True, unitriangular=True)


def _unpivoted(S: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """L (unit lower triangular) and d with S = L diag(d) L^T; NaN or infinite where a pivot is zero."""
    packed = torch.linalg.lu_factor_ex(S, pivot=False)[0]
    d = packed.diagonal().clone()
    L = packed.tril_(-1)
    L.diagonal().fill_(1.0)
    return L, d


class LDL(Symmetric):
    """P S P^T = L D L^T with torch's LAPACK, which shares a thread pool with the products around it; of a GPU's matrix too, by way of the host."""

    def __init__(self, S: Float[Tensor, "n n"]):
        packed, pivots = in_place(S.cpu())
        d = self._set(packed.numpy(), pivots.numpy(), S.device)
        self.negative = int(np.count_nonzero(d < 0))

    def _set(self, packed: np.ndarray, pivots: np.ndarray, device: torch.device) -> np.ndarray:
        """The factors from sytrf's packed form; returns d of `unpacked`."""
        L, d, inverse, beside, order = unpacked(packed, pivots)
        self.negative, self.log_abs_det = 0, float(np.log(np.abs(d)).sum())
        self.L, self.order, self.inverse = (torch.from_numpy(a).to(device) for a in (L, order, inverse[:, None]))
        self.rows = None
        if beside is not None:  # row r of D^-1 Z also has beside[r] times its partner
            first = beside.nonzero()[0]
            pairs = ((first, first + 1), (first + 1, first))
            self.rows, self.partners = (torch.from_numpy(np.concatenate(p)).to(device) for p in pairs)
            self.beside = torch.from_numpy(np.tile(beside[first], 2)[:, None]).to(device)
        return d

    def half(self, X: Float[Array, "*stack n k"], overwrite: bool = False) -> Float[Array, "*stack n k"]:
        X = X.index_select(0, self.order)  # a copy, solved in place: fresh memory costs a tenth of the solve
        return torch.linalg.solve_triangular(self.L, X, upper=False, unitriangular=True, out=X)

    def over_D(
        self, Z: Float[Array, "*stack n k"], out: Float[Array, "*stack n k"] | None = None
    ) -> Float[Array, "*stack n k"]:
        out = super().over_D(Z, out)
        if self.rows is not None:
            out.index_add_(0, self.rows, Z.index_select(0, self.partners).mul_(self.beside))
        return out

    def back(self, Z: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        Z = torch.linalg.solve_triangular(self.L.mT, Z, upper=True, unitriangular=True)
        return torch.empty_like(Z).index_copy_(0, self.order, Z)


class Phased(Symmetric):
    """S complex symmetric with a negative definite imaginary part, as H - z I has for Im z > 0, and with it every S_l: each pivot has one too, so none is zero.

    `phase` is the sum of the arguments of S's eigenvalues, each between -pi and 0: a continuous function on the convex set of such S, as is the sum over
    the pivots, and both are - n pi / 2 at - i I. Closed by its limits: rounding may take an imaginary part across zero.
    """

    phase: float


class ComplexLDL(LDL, Phased):
    """P S P^T = L D L^T, the transpose and not the adjoint."""

    def __init__(self, S: Float[Tensor, "n n"]):
        # torch's, as in LDL: SciPy's takes half of the time alone, and a thousand times as long where its threads wait for a busy core, from 64 rows on
        packed, pivots = in_place(S.cpu())
        pivots = pivots.numpy()
        d = self._set(packed.numpy(), pivots, S.device)
        angle = np.angle(d)
        second = pivots < 0  # of a 2 x 2 pivot d has its determinant, whose argument lies between -2 pi and 0, and 1
        self.phase = float(np.where(second, np.where(angle > 0, angle - 2 * np.pi, angle), -np.abs(angle)).sum())


class ComplexStack(Eigen, Phased):
    """A stack of real symmetric matrices, all shifted by one multiple of i: eigenvectors are the real matrices'."""

    def __init__(self, S: Float[Tensor, "... n n"]):
        if not S.isfinite().all():
            raise SingularPivotError(NOT_FINITE)
        values, vectors = torch.linalg.eigh(S.real)
        values, self.L = torch.complex(values, S.imag.diagonal(dim1=-2, dim2=-1)), vectors.to(S.dtype)
        self.negative, self.log_abs_det = 0, values.abs().log().sum().item()
        self.phase = -values.angle().abs().sum().item()
        self.inverse = values.reciprocal().unsqueeze(-1)


def in_place(S: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Int[Tensor, " n"]]:
    """ldl_factor_ex's packed factor and pivots in the memory of S. LAPACK wants columns, and S^T is S by columns; torch copies where input and output are not
    the same tensor, by strides, which takes up to half as long as the arithmetic."""
    columns, pivots, info = S.mT, S.new_empty(len(S), dtype=torch.int32), S.new_empty((), dtype=torch.int32)
    torch.linalg.ldl_factor_ex(columns, out=(columns, pivots, info))
    return columns, pivots


def unpacked(
    packed: Float[np.ndarray, "n n"], pivots: Int[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """From sytrf's packed form (overwritten): L, d, the diagonal of D^-1, what lies beside it (None without 2 x 2 pivots), the row order.

    d has the determinant and the signs of D: of a 2 x 2 pivot its determinant, always negative, and 1.
    """
    convert = {"d": lapack.dsyconv, "f": lapack.ssyconv, "F": lapack.csyconv, "D": lapack.zsyconv}[packed.dtype.char]
    L, off, _ = convert(packed, pivots, lower=1, overwrite_a=1)
    d, n = L.diagonal().copy(), len(L)
    largest = max(np.abs(d).max(), np.abs(off).max())
    target = np.abs(pivots) - 1  # LAPACK counts from one and marks 2 x 2 pivots by a sign
    first, beside = (pivots < 0).nonzero()[0][::2], None
    with np.errstate(divide="ignore", invalid="ignore"):
        if len(first):
            target[first] = first  # of a 2 x 2 pivot only the second row was swapped
            second = first + 1
            a, b, c = d[first], d[second], off[first]
            det = a * b - c * c
            d[first], d[second] = det, 1.0
            beside = np.zeros(n, d.dtype)
            beside[first] = -c / det
        inverse = 1.0 / d
        if len(first):
            inverse[first], inverse[second] = b / det, a / det
    if not largest < np.inf:
        raise SingularPivotError(NOT_FINITE)
    complex_shift = np.iscomplexobj(packed)  # no pivot is zero then, however far apart they are
    if not (complex_shift or (largest and np.abs(inverse).max() * largest * 4 * n * EPS[d.dtype] < 1.0)):
        raise SingularPivotError(ZERO)
    order = lapack.dlaswp(np.arange(n, dtype=float)[:, None], target)[:, 0].astype(np.int64)
    return L, d, inverse, beside, order


ZERO = "its smallest pivot is zero to working precision"
NOT_FINITE = "it is not finite: the curvature overflows"


EPS = {np.dtype(kind): float(np.finfo(kind).eps) for kind in (np.float64, np.float32)}


def subtract_product(V: Float[Tensor, "k k"], X: Float[Tensor, "n k"], Y: Float[Tensor, "n k"]) -> None:
    """V -= X^T Y for a product known to be symmetric: its lower block triangle, copied to the upper one, where that is faster."""
    k = len(V)
    if k < WIDE:
        V.addmm_(X.T, Y, alpha=-1.0)
        return
    edges = [k * i // STRIPES for i in range(STRIPES + 1)]
    for top, bottom in itertools.pairwise(edges):
        V[top:bottom, :bottom].addmm_(X[:, top:bottom].T, Y[:, :bottom], alpha=-1.0)
        # to the bit: on some processors the two halves of the product differ in the last one
        square = V[top:bottom, top:bottom]
        square.copy_(square.tril() + square.tril(-1).mT)
        V[:top, top:bottom] = V[top:bottom, :top].T
