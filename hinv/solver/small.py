"""One small pivot block by NumPy and SciPy, whose calls cost a third of torch's; `symmetric` is the same for all others."""

from functools import cached_property

import numpy as np
import torch

from hinv.shapes import Array, Float

from .symmetric import Symmetric, lapack, unpacked

SMALL = 96  # rows up to which NumPy is faster than torch


class Small(Symmetric):
    """Cholesky or LDL^T of and with NumPy arrays, as NumPy's and SciPy's calls cost a third of torch's.

    Triangular solves are torch's: SciPy's start threads that wait for the others.
    """

    def __init__(self, S: Float[np.ndarray, "n n"], try_cholesky: bool):
        n, letter = len(S), "d" if S.dtype == np.float64 else "s"
        if try_cholesky:
            L, info = getattr(lapack, letter + "potrf")(S.T, lower=1, clean=0)
            if info == 0 and np.isfinite(L.diagonal()).all():
                self.L, self.d = torch.from_numpy(L), L.diagonal() ** 2
                self.negative, self.inverse, self.unit = 0, None, False
                return
        packed, pivots, _ = getattr(lapack, letter + "sytrf")(S.T, lower=1, lwork=64 * n, overwrite_a=1)
        L, self.d, inverse, beside, self.order = unpacked(packed, pivots)
        self.L, self.unit, self.negative = torch.from_numpy(L), True, int(np.count_nonzero(self.d < 0))
        self.inverse, self.beside = inverse[:, None], None if beside is None else beside[:-1, None]

    @cached_property
    def log_abs_det(self) -> float:
        return float(np.log(np.abs(self.d)).sum())

    def half(self, X: Float[Array, "n k"], overwrite: bool = False) -> Float[Array, "n k"]:
        X = torch.from_numpy(X.copy("C") if self.inverse is None else X.take(self.order, 0))
        return torch.linalg.solve_triangular(self.L, X, upper=False, unitriangular=self.unit, out=X).numpy()

    def over_D(self, Z: Float[Array, "n k"], out: Float[Array, "n k"] | None = None) -> Float[Array, "n k"]:
        if self.inverse is None:
            return Z
        if self.beside is None:
            return Z * self.inverse
        out, n = Z * self.inverse, len(Z)
        if Z.shape[1] < n // 4:
            out[:-1] += self.beside * Z[1:]
            out[1:] += self.beside * Z[:-1]
            return out
        D_inverse = np.zeros((n, n), Z.dtype)  # tridiagonal: a product with all of it is faster than four strided ones
        for offset, values in ((0, self.inverse), (1, self.beside), (n, self.beside)):
            D_inverse.reshape(-1)[offset :: n + 1] = values[:, 0]
        return D_inverse @ Z

    def couple(self, N: Float[Array, "n k"], V: Float[Array, "k k"]) -> Float[Array, "n k"]:
        X = self.half(N)
        Y = self.over_D(X)
        V -= X.T @ Y
        return Y

    def back(self, Z: Float[Array, "n k"]) -> Float[Array, "n k"]:
        Z = torch.linalg.solve_triangular(self.L.T, torch.from_numpy(Z), upper=True, unitriangular=self.unit).numpy()
        if self.inverse is None:
            return Z
        x = np.empty(Z.shape, Z.dtype)
        x[self.order] = Z
        return x

    def spread(
        self, Y: Float[Array, "n k"], Sigma: Float[Array, "k k"]
    ) -> tuple[Float[Array, "n n"], Float[Array, "n k"]]:
        YSigma = Y @ Sigma
        return self.back(self.back(self.over_D(self.eye()) + YSigma @ Y.T).T), -self.back(YSigma)

    def eye(self) -> Float[Array, "n n"]:
        return np.eye(len(self.d), dtype=self.d.dtype)

    def color(self, noise: Float[Array, "n k"]) -> Float[Array, "n k"]:
        return noise if self.inverse is None else noise * self.inverse**0.5
