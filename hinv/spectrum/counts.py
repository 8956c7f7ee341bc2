"""Exact counts: by Sylvester's law H - s I has as many negative eigenvalues as its factorization has negative pivots."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from hinv.errors import CertificateWarning, SingularShiftError, warn
from hinv.shapes import Float, Int
from hinv.solver.matrix import Matrix, counting


def count_below(H: Matrix, shift: float) -> int:
    shift = float(shift)
    if shift not in H.counted:
        F = counting(H, 0.0 - shift)  # not -shift: messages would say H + (-0) I
        H.counted[shift], H.uncertain[shift] = F.inertia[1], getattr(F, "uncertainty", 0.0)
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
            below.append(_below_edge(H, edge, last=edge == edges[-1]))
    except KeyboardInterrupt as stop:
        stop.add_note(f"{len(below)} of {len(edges)} edges are counted and kept: the same call goes on from there")
        raise
    return torch.tensor(below, device="cpu").diff()


DENSE = 3000  # parameters up to which the eigenvalues of the dense matrix settle what no factorization does


def _dense(H: Matrix) -> Float[Tensor, " P"]:
    return torch.linalg.eigvalsh(H.double().dense())


BESIDE = (1e-12, 1e-11, 1e-10, 1e-9, 1e-8)  # of the norm of H: how far beside an edge that is an eigenvalue is counted


def _below_edge(H: Matrix, edge: float, last: bool) -> int:
    """How many eigenvalues lie below an edge; where one lies on it, by a count just beside, so that it belongs to the bin on its right (to the last bin at
    the last edge), as numpy.histogram has it."""
    try:
        return count_below(H, edge)
    except SingularShiftError:
        scale = max(size(H), abs(edge)) or 1.0
        beside = [edge + (share if last else -share) * scale for share in BESIDE]
        for shift in beside:
            try:
                found = count_below(H, shift)
                break
            except SingularShiftError as refused:
                error = refused
        else:
            if H.shape[0] > DENSE:
                raise error
            shift = beside[0]
            found = int((_dense(H) < shift).sum())
        warn(
            f"the edge {edge:g} is an eigenvalue, or next to one: counted at {shift:.17g}, so that what lies between counts as "
            f"{'below' if last else 'above'} it",
            CertificateWarning,
        )
        return found


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
                    if P > DENSE:
                        raise
                    return _dense(H)[i].item()
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
