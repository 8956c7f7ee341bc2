"""(H + damping I) x = b by a method's name: each method makes an approximate inverse, refinement makes it exact, the report says how exact.

"auto" is the cheaper of the stagewise elimination and the dense route, refined; where that falls short, GMRES preconditioned by it, then SuperLU on K,
which pivots across stages. What was needed stands in the report.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hinv import paper
from hinv.errors import SingularShiftError
from hinv.modes import exact
from hinv.shapes import Float
from hinv.solver import krylov
from hinv.solver.matrix import Matrix
from hinv.solver.refine import RTOL, Apply, SolveReport, power_of_two, preconditioned_gmres, refined, residual_of


def _factor(H: Matrix, damping: float, rtol: float) -> Apply:
    """The stagewise elimination or the dual, in float64 arithmetic whatever the model's dtype."""
    return H.factor(damping, dtype=torch.float64).solve


def _single(H: Matrix, damping: float, rtol: float) -> Apply:
    """The same in float32 arithmetic: half of the memory, and nine digits fewer, which refinement in float64 brings back."""
    try:
        return H.factor(damping, dtype=torch.float32).solve
    except SingularShiftError as error:
        raise SingularShiftError(f"in float32: {error}; method='factor' has nine digits more") from error


def _sparse(H: Matrix, damping: float, rtol: float) -> Apply:
    from hinv.solver import sparse  # SciPy's sparse matrices are loaded where they are used

    return sparse.factor(H.chain, damping, H.gauss_newton)


# name -> (H, damping, rtol) -> (b -> x); the paper's two are for an `hinv.Hessian`
METHODS: dict[str, Callable[[Any, float, float], Apply]] = {
    "factor": _factor,
    "factor32": _single,
    "sparse": _sparse,
    "tridiagonal": lambda H, damping, rtol: paper.tridiagonal(H, damping),
    "woodbury": lambda H, damping, rtol: paper.woodbury(H, damping),
    "dense": krylov.dense,
    "minres": lambda H, damping, rtol: krylov.Iteration(H, damping, rtol, "minres"),
    "cg": lambda H, damping, rtol: krylov.Iteration(H, damping, rtol, "cg"),
}


@exact()
def solve(
    H: Matrix, b: Float[Tensor, "P *k"], damping: float, method: str = "auto", rtol: float | None = None
) -> tuple[Float[Tensor, "P *k"], SolveReport, str]:
    """x like b, the report, and what there is to warn of ("" for nothing). b is checked already; see `hinv.Hessian.solve`."""
    if method != "auto" and method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use 'auto', {', '.join(map(repr, METHODS))}")
    if H.gauss_newton and method in ("tridiagonal", "woodbury"):
        raise ValueError(f"method {method!r} is the paper's, for the Hessian: use 'factor' for the Gauss-Newton matrix")
    rtol = RTOL[H.dtype] if rtol is None else rtol
    if not rtol > 0:
        raise ValueError(f"rtol must be a positive number, not {rtol}")
    # solve for columns of size one: squares of very small or large entries leave the range
    size = b.abs().amax(dim=0)
    size = power_of_two(torch.where(size > 0, size, torch.ones_like(size)))
    scaled = (b / size).double()
    if method == "auto":
        x, report, remarks = _automatic(H, scaled, damping, rtol)
    else:
        apply: Any = METHODS[method](H, damping, rtol)
        x, residual, steps = refined(H.double(), _doubled(H, apply), scaled, damping, rtol)
        report = SolveReport(method, damping, residual, steps)
        remarks = [apply.remark()] if isinstance(apply, krylov.Iteration) else []
    if H.dtype != torch.float64:  # what is given back is rounded
        x = x.to(H.dtype)
        report = replace(report, residual=residual_of(H.double(), x.double(), scaled, damping)[1])
    if not report.residual <= rtol:
        remarks.append(
            f"relative residual {report.residual:.1e} after {report.refinements} refinements, rtol {rtol:.0e} not reached"
        )
    return x * size, report, "; ".join(filter(None, remarks))


def _doubled(H: Matrix, apply: Apply) -> Apply:
    """An approximate inverse, in the model's arithmetic, of float64 vectors: residuals are taken in float64, as a float32 model's own products may have lost
    the digits that a residual is made of."""
    return lambda r: apply(r.to(H.dtype)).to(r.dtype)


def _automatic(
    H: Matrix, b: Float[Tensor, "P *k"], damping: float, rtol: float
) -> tuple[Float[Tensor, "P *k"], SolveReport, list[str]]:
    """The cheapest direct method; then GMRES with it as preconditioner; then SuperLU on K. The report names all that were needed."""
    remarks: list[str] = []
    work = H.double()
    chosen = "dense" if H.estimate().method == "dense" else "factor"
    x, report = None, None
    try:
        apply = _doubled(H, METHODS[chosen](H, damping, rtol))
        x, residual, steps = refined(work, apply, b, damping, rtol)
        report = SolveReport(chosen, damping, residual, steps)
        if residual <= rtol:
            return x, report, remarks
        better, after, _ = refined(
            work, lambda r: preconditioned_gmres(work, apply, r, damping, rtol), b, damping, rtol, start=x
        )
        if after < residual:
            x, report = better, SolveReport(f"{chosen}+gmres", damping, after, steps)
        if report.residual <= rtol:
            return x, report, remarks
    except SingularShiftError as error:
        remarks.append(str(error))
    try:
        better, after, steps = refined(work, METHODS["sparse"](H, damping, rtol), b, damping, rtol)
    except torch.linalg.LinAlgError as error:
        if x is None or report is None:
            raise SingularShiftError("; ".join([*remarks, str(error)])) from error
        return x, report, remarks
    if x is None or report is None or after < report.residual:
        x, report = better, SolveReport(f"{chosen}+sparse", damping, after, steps)
    return x, report, [] if report.residual <= rtol else remarks
