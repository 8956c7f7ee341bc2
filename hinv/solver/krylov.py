"""What one would do without the structure: dense factorization and Krylov iterations, behind one signature.

Each function takes (H, damping, rtol) and returns a function b -> approximate (H + damping I)^-1 b, with b (P,) or (P, k).
The iterations are SciPy's; the products they use are exact (autograd).
"""

import numpy as np
import torch
from torch import Tensor

from hinv.errors import SingularShiftError
from hinv.shapes import Float

from .products import Products, operator
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

    def solve(b: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        return torch.linalg.lu_solve(lu, pivots, b.reshape(len(b), -1)).reshape(b.shape)

    return solve


class Iteration:
    """b -> x by SciPy's "cg" or "minres". One Hessian-vector product an iteration; how many there are depends on the spectrum."""

    def __init__(self, H: Products, damping: float, rtol: float, method: str):
        from scipy.sparse import linalg

        self._iterate = {"cg": linalg.cg, "minres": linalg.minres}[method]
        self._method, self._rtol = method, rtol
        dtype, device = H.dtype, H.device
        self._curvature: list[float] = []  # v^T (H + damping I) v met on the way

        def matvec(v: np.ndarray) -> np.ndarray:
            product = H.multiply(
                torch.from_numpy(v).to(device, dtype)
            )  # unchecked: after a breakdown v is NaN, and so is what comes out
            out = product.cpu().numpy() + damping * v
            self._curvature.append(float(v @ out))
            return out

        self._operator = operator(H.shape, H.gradient.cpu().numpy().dtype, matvec=matvec)

    def __call__(self, b: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        columns = b.reshape(len(b), -1).cpu().numpy()
        # a tenth of rtol: minres stops on an estimate relative to ||A|| ||x|| + ||b||, not on the residual itself
        found = [self._iterate(self._operator, column, rtol=0.1 * self._rtol)[0] for column in columns.T]
        return torch.from_numpy(np.stack(found, axis=1)).to(b).reshape(b.shape)

    def remark(self) -> str:
        if self._method == "cg" and min(self._curvature, default=1.0) < 0:
            return "H + damping I is indefinite (a search direction of negative curvature was met), where CG is not defined"
        return ""
