"""Of a matrix known by products alone: ARPACK's eigenpairs, and curvlinops' estimates of trace and density."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hinv.errors import warn
from hinv.shapes import Float
from hinv.solver.products import Operator, operator

from .eigenpairs import Eigenpairs


@dataclass(frozen=True)
class TraceEstimate:
    """Mean of independent estimates of the trace, their standard error, how many there were, and the products with the matrix they cost.

    Of an exact trace: its value, and no error, estimates and products.
    """

    value: float
    standard_error: float
    estimates: int
    products: int


def eigsh(A: Operator, k: int, which: str) -> Eigenpairs:
    from scipy.sparse.linalg import eigsh

    P = A.shape[0]
    if not 1 <= k < P:
        raise ValueError(f"k must be from 1 to {P - 1} (P - 1), not {k}")
    with tqdm(desc="Lanczos", unit="product", delay=3, leave=False, disable=None) as bar:

        def matvec(v: Float[np.ndarray, "..."]) -> Float[np.ndarray, " P"]:
            bar.update()
            return (A @ torch.as_tensor(v.reshape(-1), dtype=A.dtype, device=A.device)).cpu().numpy()

        products = operator(A.shape, torch.empty(0, dtype=A.dtype, device="cpu").numpy().dtype, matvec=matvec)
        values, vectors = eigsh(products, k, which=which, v0=np.random.default_rng(0).standard_normal(P))
    values, vectors = (torch.from_numpy(a.copy()).to(A.device) for a in (values, vectors))
    residuals = torch.linalg.vector_norm(A @ vectors.to(A.dtype) - vectors * values, dim=0)
    return Eigenpairs(
        values, vectors, residuals, False, "by ARPACK on products; a data set has no factorization to certify it"
    )


def trace(linear_operator: Any, method: str, products: int, seed: int) -> TraceEstimate:
    from curvlinops import hutchinson_trace, hutchpp_trace, xtrace

    methods = {
        "hutchinson": (hutchinson_trace, 1),
        "hutch++": (hutchpp_trace, products // 15 * 3),
        "xtrace": (xtrace, products // 10 * 2),
    }
    if method not in methods:
        raise ValueError(f"method must be one of exact, {', '.join(methods)}, not {method!r}")
    function, each = methods[method]
    P = linear_operator.shape[0]
    if each < 1 or products // each < 2 or each >= P:
        raise ValueError(
            f"{products} products are too few for two estimates, or one of them would take all {P} and more: choose products so "
            "that an estimate takes fewer (a fifth of them for 'xtrace' and 'hutch++')"
        )
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            for _ in tqdm(range(products // each), desc="trace", unit="estimate", delay=3, leave=False, disable=None):
                found.append(function(linear_operator, num_matvecs=each).item())
        except KeyboardInterrupt:
            if len(found) < 2:
                raise
            warn(f"interrupted after {len(found)} of {products // each} estimates")
    if not np.isfinite(found).all():
        raise ArithmeticError("the trace is not finite: the loss or its derivatives overflow somewhere in the data")
    error = float(np.std(found, ddof=1) / len(found) ** 0.5)
    return TraceEstimate(float(np.mean(found)), error, len(found), len(found) * each)


def density(
    linear_operator: Any, steps: int, points: int, repeats: int, seed: int
) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
    from curvlinops import lanczos_approximate_spectrum

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return lanczos_approximate_spectrum(
            linear_operator, min(steps, linear_operator.shape[0] - 1), num_points=points, num_repeats=repeats
        )
