"""What one would do without the structure: dense factorization and Krylov iterations, behind one signature.

Each function takes (H, damping, rtol) and returns a function b -> approximate (H + damping I)^-1 b, with b (P,) or (P, k).
The iterations are SciPy's; the products they use are exact (autograd).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hinv.errors import SingularShiftError

from .products import Products
from .refine import Apply


def dense(H: Products, damping: float, rtol: float) -> Apply:
    """LU of the dense P x P matrix: O(P^3) flops, P^2 numbers. The reference for everything else."""
    matrix = H.dense()
    matrix.diagonal().add_(damping)
    lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    if info.item() != 0:
        raise SingularShiftError(
            f"H + ({damping:g}) I is exactly singular: the damping is minus an eigenvalue of H; change it"
        )

    def solve(b: Tensor) -> Tensor:
        return torch.linalg.lu_solve(lu, pivots, b.reshape(len(b), -1)).reshape(b.shape)

    return solve


def krylov(method: str) -> Callable[[Products, float, float], Apply]:
    """SciPy's "cg" or "minres" as a baseline. One Hessian-vector product an iteration; the count depends on the spectrum."""
    def prepare(H: Products, damping: float, rtol: float) -> Apply:
        from scipy.sparse.linalg import LinearOperator, cg, minres

        iterate = {"cg": cg, "minres": minres}[method]
        operator = H.to_scipy()
        curvature = []  # signs of v^T (H + damping I) v met on the way

        def matvec(v: np.ndarray) -> np.ndarray:
            out = operator.matvec(v) + damping * v
            curvature.append(float(v @ out))
            return out

        shifted = LinearOperator(operator.shape, matvec=matvec, dtype=operator.dtype)

        def solve(b: Tensor) -> Tensor:
            columns = b.reshape(len(b), -1).cpu().numpy()
            # a tenth of rtol: minres stops on an estimate relative to ||A|| ||x|| + ||b||, not on the residual itself
            out = np.stack([iterate(shifted, column, rtol=0.1 * rtol)[0] for column in columns.T], axis=1)
            return torch.from_numpy(out).to(b).reshape(b.shape)

        def remark() -> str:
            if method == "cg" and min(curvature, default=1.0) < 0:
                return "H + damping I is indefinite (a search direction of negative curvature was met), where CG is not defined"
            return ""

        solve.remark = remark
        return solve

    return prepare
