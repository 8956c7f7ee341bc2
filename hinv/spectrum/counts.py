"""Exact counts: by Sylvester's law H - s I has as many negative eigenvalues as its factorization has negative pivots."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from hinv.errors import SingularShiftError
from hinv.shapes import Float, Int
from hinv.solver.matrix import Matrix


def count_below(H: Matrix, shift: float) -> int:
    shift = float(shift)
    if shift not in H.counted:
        H.counted[shift] = H.factor(-shift, dtype=torch.float64).inertia[1]
    return H.counted[shift]


def counts(H: Matrix, edges: Sequence[float] | Float[Tensor, " n"]) -> Int[Tensor, " bins"]:
    edges = torch.as_tensor(edges, dtype=torch.float64, device="cpu").tolist()
    if len(edges) < 2 or not all(a < b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"edges must be at least two increasing numbers, not {edges[:4]}{'...' if len(edges) > 4 else ''}"
        )
    below = []
    try:
        for edge in tqdm(edges, desc="counting eigenvalues", unit="edge", delay=3, leave=False, disable=None):
            below.append(count_below(H, edge))
    except KeyboardInterrupt as stop:
        stop.add_note(f"{len(below)} of {len(edges)} edges are counted and kept: the same call goes on from there")
        raise
    return torch.tensor(below, device="cpu").diff()


def eigval(H: Matrix, i: int, rtol: float = 1e-8) -> float:
    P = H.shape[0]
    if not -P <= i < P:
        raise ValueError(f"there are {P} eigenvalues: i must be from {-P} to {P - 1}, not {i}")
    if not rtol > 0:
        raise ValueError(f"rtol must be a positive number, not {rtol}")
    i %= P
    radius = size(H) or 1.0
    low = high = 0.0
    while not low < high or count_below(H, low) > i or count_below(H, high) <= i:
        radius *= 4.0
        low, high = _countable(H, -1.2 * radius, -0.8 * radius), _countable(H, 0.8 * radius, 1.2 * radius)
    with tqdm(desc=f"bisecting for eigenvalue {i}", unit="count", delay=3, leave=False, disable=None) as bar:
        while high - low > max(rtol * max(abs(low), abs(high)), 1e-12 * radius):
            try:
                middle = _countable(H, low, high)
            except SingularShiftError:
                if high - low > UNRESOLVED * radius:
                    raise
                break  # a cluster, as of the zeros of weights that the batch does not excite, too tight to count inside
            low, high = (middle, high) if count_below(H, middle) <= i else (low, middle)
            bar.update()
    return (low + high) / 2


def size(H: Matrix) -> float:
    """A lower bound of the norm of H, usually of its order: |H g| / |g| for the gradient, or at a stationary point for a vector of ones."""
    g = H.gradient if H.gradient.norm() > 0 else torch.ones_like(H.gradient)
    return ((H @ g).norm() / g.norm()).item()


UNRESOLVED = 1e-8  # of the norm of H: width of a bracket in which no shift could be factored


def _countable(H: Matrix, low: float, high: float) -> float:
    """A point well inside (low, high) where H can be factored: the middle, unless that is an eigenvalue."""
    for share in (0.5, 0.45, 0.55, 0.35, 0.65, 0.2, 0.8):
        point = low + share * (high - low)
        try:
            count_below(H, point)
            return point
        except SingularShiftError as error:
            last = error
    raise last
