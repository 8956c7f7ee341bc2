"""What one would do without the structure: dense factorization and Krylov iterations, behind one signature.

Each function takes (H, damping, rtol) and returns a function b -> approximate (H + damping I)^-1 b, with b (P,) or (P, k).
The iterations are SciPy's; the products they use are exact (autograd). `iterated` is what a matrix without a factorization is solved by.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hinv.errors import SingularShiftError
from hinv.shapes import Float

from .products import Operator, Products, operator
from .refine import RTOL, Apply, SolveReport, power_of_two, refined


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


class _NegativeCurvature(Exception):
    pass


class Iteration:
    """b -> x by SciPy's "cg" or "minres". One product an iteration; how many there are depends on the spectrum.

    After Ctrl-C what was reached is given back, and `remark` says so: the products made so far may have taken hours.
    """

    def __init__(self, H: Operator, damping: float, rtol: float, method: str):
        from scipy.sparse import linalg

        self._iterate = {"cg": linalg.cg, "minres": linalg.minres}[method]
        self._method, self._rtol, self.products, self.interrupted = method, rtol, 0, False
        self.indefinite = False  # whether CG met a direction of negative curvature, where it is not defined
        self._bar: Any = None
        dtype, device = H.dtype, H.device
        multiply = H.multiply

        def matvec(v: np.ndarray) -> np.ndarray:
            # unchecked: after a breakdown v is NaN, and so is what comes out
            out = multiply(torch.from_numpy(v).to(device, dtype)).cpu().numpy() + damping * v
            self.products += 1
            self._bar.update()
            if method == "cg" and float(v @ out) < 0:
                raise _NegativeCurvature
            return out

        self._operator = operator(H.shape, torch.empty(0, dtype=dtype, device="cpu").numpy().dtype, matvec=matvec)

    def __call__(self, b: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        columns = b.reshape(len(b), -1).cpu().numpy()
        with tqdm(desc=self._method, unit="product", delay=3, leave=False, disable=None) as self._bar:
            found = [self._column(column) for column in columns.T]
        return torch.from_numpy(np.stack(found, axis=1)).to(b).reshape(b.shape)

    def _column(self, b: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        """The last iterate, which in either method is the best: of the error's energy norm, or of the residual."""
        last = np.zeros_like(b)
        if self.interrupted or self.indefinite:
            return last

        def keep(x: Float[np.ndarray, " P"]) -> None:
            last[:] = x

        try:
            # a tenth of rtol: minres stops on an estimate relative to ||A|| ||x|| + ||b||, not on the residual itself
            return self._iterate(self._operator, b, rtol=0.1 * self._rtol, callback=keep)[0]
        except KeyboardInterrupt:
            self.interrupted = True
        except _NegativeCurvature:
            self.indefinite = True
        return last

    def remark(self) -> str:
        remarks = []
        if self.interrupted:
            remarks.append(f"interrupted after {self.products} products, and the best so far is given back")
        if self.indefinite:
            remarks.append(
                "H + damping I is indefinite (a search direction of negative curvature was met), where CG is not defined"
            )
        return "; ".join(remarks)


def iterated(
    H: Operator, b: Float[Tensor, "P *k"], damping: float, methods: Sequence[str], rtol: float | None = None
) -> tuple[Float[Tensor, "P *k"], SolveReport, str]:
    """x like b, the report, and what there is to warn of ("" for nothing), by the first of these methods that is defined for the matrix met."""
    rtol = RTOL[H.dtype] if rtol is None else rtol
    if not rtol > 0:
        raise ValueError(f"rtol must be a positive number, not {rtol}")
    # solve for columns of size one: squares of very small or large entries leave the range
    size = b.abs().amax(dim=0)
    size = power_of_two(torch.where(size > 0, size, torch.ones_like(size)))
    remarks: list[str] = []
    for method in methods:
        apply = Iteration(H, damping, rtol, method)
        x, residual, steps = refined(H, apply, b / size, damping, rtol)
        remarks = [apply.remark()]
        if apply.interrupted or not apply.indefinite:
            break
    if not residual <= rtol:
        remarks.append(f"relative residual {residual:.1e} after {steps} restarts, rtol {rtol:.0e} not reached")
    return x * size, SolveReport(method, damping, residual, steps), "; ".join(filter(None, remarks))
