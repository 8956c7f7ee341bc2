"""From an approximate inverse to a solution: iterative refinement, and GMRES with the factorization as preconditioner.

Both take residuals with products, which know nothing of the factorization.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hinv.shapes import Float

from .products import Operator, operator

ENOUGH = 0.5  # of the residual before: a refinement that leaves more of it is the last one
KRYLOV = 60  # iterations of GMRES with the factorization as preconditioner, before the next fallback

RTOL = {torch.float64: 1e-8, torch.float32: 1e-4}  # of a residual, by default

Apply = Callable[[Tensor], Tensor]  # b (P,) or (P, k) -> approximately (H + damping I)^-1 b


@dataclass(frozen=True)
class SolveReport:
    """What a solve did: `method` (the fallbacks it needed behind a plus), `damping`, `residual` ||(H + damping I)x - b|| / ||b|| (the
    worst column, by an independent product), `refinements`."""

    method: str
    damping: float
    residual: float
    refinements: int


def refined(
    H: Operator,
    apply: Apply,
    b: Float[Tensor, "P *k"],
    damping: float,
    rtol: float,
    start: Float[Tensor, "P *k"] | None = None,
) -> tuple[Float[Tensor, "P *k"], float, int]:
    """x += apply(b - (H + damping I) x) while that halves the residual; the best x seen, its relative residual (worst column), and how many steps it took."""
    x = apply(b) if start is None else start
    r, size = residual_of(H, x, b, damping)
    steps = 0
    left = 0.0
    while rtol < size < float("inf") and left <= ENOUGH:
        candidate = x + apply(r)
        r_new, size_new = residual_of(H, candidate, b, damping)
        steps, left = steps + 1, size_new / size
        if size_new < size:
            x, r, size = candidate, r_new, size_new
    return x, size, steps


def residual_of(
    H: Operator, x: Float[Tensor, "P *k"], b: Float[Tensor, "P *k"], damping: float
) -> tuple[Float[Tensor, "P *k"], float]:
    """b - (H + damping I) x, and its size relative to b (the worst column); infinite where x is not finite."""
    if not x.isfinite().all():
        return x, float("inf")
    scale = torch.linalg.vector_norm(b, dim=0)
    r = b - H @ x - damping * x
    return r, (torch.linalg.vector_norm(r, dim=0) / torch.where(scale > 0, scale, torch.ones_like(scale))).amax().item()


def preconditioned_gmres(
    H: Operator, apply: Apply, b: Float[Tensor, "P *k"], damping: float, rtol: float
) -> Float[Tensor, "P *k"]:
    """GMRES on H + damping I preconditioned by a factorization that lost digits, column by column."""
    from scipy.sparse.linalg import gmres

    columns = b.reshape(len(b), -1)

    def shifted(v: np.ndarray) -> np.ndarray:
        return H.multiply(torch.from_numpy(v).to(b)).cpu().numpy() + damping * v

    def precondition(v: np.ndarray) -> np.ndarray:
        return apply(torch.from_numpy(v).to(b)).cpu().numpy()

    dtype = columns.cpu().numpy().dtype
    A = operator(H.shape, dtype, matvec=shifted)
    M = operator(H.shape, dtype, matvec=precondition)
    solved = [
        gmres(A, column.cpu().numpy(), M=M, rtol=0.1 * rtol, restart=KRYLOV, maxiter=1)[0] for column in columns.T
    ]
    return torch.stack([torch.from_numpy(x).to(b) for x in solved], dim=1).reshape(b.shape)


def power_of_two(size: Float[Tensor, "*k"]) -> Float[Tensor, "*k"]:
    """The largest that is no larger than this positive size: scaling by it rounds nothing, so that the residual which is reported is that of what is given back.

    By NumPy: torch 2.14's frexp of float64 is right up to 2^127 only.
    """
    array = size.cpu().numpy()
    return torch.from_numpy(np.asarray(np.ldexp(np.ones_like(array), np.frexp(array)[1] - 1))).to(size)
