"""Factorization of one symmetric matrix S, definite or not, in the form the elimination needs.

    S = C D C^T,    so that    X^T S^-1 Y = half(X)^T D^-1 half(Y),    half(X) = C^-1 X

Cholesky (D = I) where S is positive definite; otherwise LDL^T with Bunch-Kaufman pivoting, D of 1 x 1 and 2 x 2 blocks; eigenvalues for
stacks of small matrices and on devices without LAPACK. Inertia and determinant are those of D (Sylvester's law of inertia).

Measured on two cores in float64, seconds for n = 64 / 576 / 2048: Cholesky 2e-5 / 2e-3 / 6e-2, one that fails 6e-6 / 8e-4 / 4e-2, torch's
ldl_factor 3e-5 / 3e-3 / 8e-2 (SciPy's sytrf the same), eigh 2e-4 / 2e-2 for the first two. ldl_factor leaves L packed, its row swaps not
carried through; LAPACK's syconv unpacks it, and a triangular solve with it (n = 576, 768 columns) took a ninth of torch.linalg.ldl_solve.
"""

import numpy as np
import torch
from scipy.linalg.lapack import dsyconv, ssyconv
from torch import Tensor


class SingularPivotError(torch.linalg.LinAlgError):
    """S is singular to working precision, so neither its inverse nor its inertia is known."""


class Symmetric:
    """A factored symmetric matrix, or a stack of them (..., n, n).

    Args:
        S: (..., n, n) symmetric; only its lower triangle is read.

    Raises:
        SingularPivotError: a pivot within rounding of zero, or S not finite.
    """

    def __init__(self, S: Tensor):
        L, info = torch.linalg.cholesky_ex(S)
        if not info.any():
            self.kind, self.L, self.eigenvalues = "cholesky", L, None
            return
        del L
        if S.ndim > 2 or S.device.type != "cpu":
            self._eigenvalues(S)
        else:
            self._bunch_kaufman(S)

    def _eigenvalues(self, S: Tensor) -> None:
        if not S.isfinite().all():
            raise SingularPivotError("it is not finite: the curvature overflows")
        self.kind = "eigh"
        self.eigenvalues, self.L = torch.linalg.eigh(S)
        self._refuse_zero(S.shape[-1])
        self.inverse = self.eigenvalues.reciprocal().unsqueeze(-1)

    def _bunch_kaufman(self, S: Tensor) -> None:
        """L, the row order, and D^-1 as its diagonal and (for 2 x 2 pivots) what lies beside it. In NumPy: these are short vectors."""
        self.kind = "ldl"
        packed, pivots, _ = torch.linalg.ldl_factor_ex(S)
        L, off, _ = (dsyconv if S.dtype == torch.float64 else ssyconv)(
            packed.numpy(), pivots.numpy(), lower=1, overwrite_a=1
        )
        d, n = L.diagonal().copy(), len(L)
        if not (np.isfinite(d).all() and np.isfinite(off).all()):
            raise SingularPivotError("it is not finite: the curvature overflows")
        target = np.abs(pivots.numpy()) - 1  # LAPACK counts from one and marks 2 x 2 pivots by a sign
        first = np.flatnonzero(pivots.numpy() < 0)[::2]
        target[first] = first  # of a 2 x 2 pivot only the second row was swapped
        order = list(range(n))
        for row in np.flatnonzero(target != np.arange(n)).tolist():
            order[row], order[target[row]] = order[target[row]], order[row]
        self.L, self.order = torch.from_numpy(L), torch.tensor(order)
        inverse, values, self.partner = 1.0 / np.where(d == 0, 1.0, d), d.copy(), None
        if len(first):
            second, (a, b, c) = first + 1, (d[first], d[first + 1], off[first])
            det, middle = a * b - c * c, (a + b) / 2
            large = middle + np.copysign(np.hypot((a - b) / 2, c), middle)
            values[first], values[second] = large, det / large
            inverse[first], inverse[second] = b / det, a / det
            partner, beside = np.arange(n), np.zeros_like(d)
            partner[first], partner[second] = second, first
            beside[first] = beside[second] = -c / det
            self.partner, self.beside = torch.from_numpy(partner), torch.from_numpy(beside).unsqueeze(1)
        self.eigenvalues, self.inverse = torch.from_numpy(values), torch.from_numpy(inverse).unsqueeze(1)
        self._refuse_zero(n)

    def _refuse_zero(self, n: int) -> None:
        smallest, largest = torch.aminmax(self.eigenvalues.abs())
        if smallest <= 4 * n * torch.finfo(smallest.dtype).eps * largest:
            raise SingularPivotError("its smallest pivot is zero to working precision")

    def half(self, X: Tensor) -> Tensor:
        """C^-1 X for X (..., n, k)."""
        if self.kind == "cholesky":
            return torch.linalg.solve_triangular(self.L, X, upper=False)
        if self.kind == "eigh":
            return self.L.mT @ X
        return torch.linalg.solve_triangular(self.L, X[self.order], upper=False, unitriangular=True)

    def over_D(self, Z: Tensor) -> Tensor:
        """D^-1 Z."""
        if self.kind == "cholesky":
            return Z
        out = Z * self.inverse
        if self.kind == "ldl" and self.partner is not None:
            out.addcmul_(Z[self.partner], self.beside)
        return out

    def back(self, Z: Tensor) -> Tensor:
        """C^-T D^-1 Z, so that back(half(X)) = S^-1 X."""
        if self.kind == "cholesky":
            return torch.linalg.solve_triangular(self.L.mT, Z, upper=True)
        Z = self.over_D(Z)
        if self.kind == "eigh":
            return self.L @ Z
        out = torch.empty_like(Z)
        out[self.order] = torch.linalg.solve_triangular(self.L.mT, Z, upper=True, unitriangular=True)
        return out

    @property
    def negative(self) -> int:
        """Number of negative eigenvalues of S (of the whole stack)."""
        return 0 if self.eigenvalues is None else int((self.eigenvalues < 0).sum())

    @property
    def log_abs_det(self) -> float:
        """log |det S|, summed over the stack."""
        if self.eigenvalues is None:
            return 2.0 * self.L.diagonal(dim1=-2, dim2=-1).log().sum().item()
        return self.eigenvalues.abs().log().sum().item()
