"""Functions of the whole spectrum without the spectrum: (|H| + eps I)^-1 b, sign(H) b, smoothed counts, by factorizations at complex shifts.

With y_k = (H - i t_k I)^-1 b:  (H^2 + t_k^2 I)^-1 b = Im y_k / t_k  and  H (H^2 + t_k^2 I)^-1 b = Re y_k. So a sum of poles, weights over lambda^2 + t_k^2, is a
sum over the y_k, one factorization each (`solver.resolvent`), none of which is ever refused. Poles and their errors are those of `spectrum.poles`, on the
interval |lambda| <= norm: that |H| is at most this norm is proved by two counts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hinv.errors import SingularShiftError
from hinv.modes import exact
from hinv.shapes import Complex, Float
from hinv.solver.matrix import Matrix
from hinv.solver.resolvent import Resolvent
from hinv.vectors import normal, seeded

from . import poles
from .counts import count_below

REFINEMENTS = 3
SHARE = 0.98  # of rtol that is for the poles, a hundredth for the solves
SINGLE = 3e-3  # of |H|: shifts from which a factorization is tried in single precision
LANCZOS = 20  # products for an estimate of |H|, before it is proved


@dataclass(frozen=True)
class PoleReport:
    """What a sum over poles did: `poles`, how many, a complex factorization each; `norm`, which two counts prove |H| to be below (loss / parameter^2);
    `bound` of the error relative to the exact result (the worst column), that of the poles on [-norm, norm] and what the residuals may add;
    `residual` |b - (H - i t I) y| / |b|, the largest over the poles, by independent products."""

    poles: int
    norm: float
    bound: float
    residual: float


def norm_bound(H: Matrix) -> float:
    """A number that |H| is below, usually by a twentieth: from Lanczos, proved by counts (all eigenvalues below it, none below its negative). Kept.

    Raises:
        SingularShiftError: no count could be made.
    """
    if H.bounded is not None:
        return H.bounded
    bound, problem = 1.05 * _lanczos(H) or 1.0, None
    for _ in range(20):
        try:
            if count_below(H, bound) == H.shape[0] and count_below(H, -bound) == 0:
                H.bounded = bound
                return bound
        except SingularShiftError as error:
            problem = error
        bound *= 1.2
    raise SingularShiftError(f"no upper bound of |H| up to {bound:.3g} could be proved by counts") from problem


def _lanczos(H: Matrix) -> float:
    """A lower bound of |H|, close to it: the largest Ritz value."""
    v = (
        H.gradient / (H.gradient.norm() or 1.0)
        + normal(len(H.gradient), H.gradient, seeded(0)) / len(H.gradient) ** 0.5
    )
    v, before, beta = v / v.norm(), torch.zeros_like(v), 0.0
    T = torch.zeros(LANCZOS, LANCZOS, dtype=torch.float64, device="cpu")
    for j in range(min(LANCZOS, len(v))):
        w = H @ v - beta * before
        T[j, j] = alpha = (w @ v).item()
        w = w - alpha * v
        beta = w.norm().item()
        if not beta > 1e-12 * T.abs().max().item() or j + 1 == LANCZOS:
            break
        T[j, j + 1] = T[j + 1, j] = beta
        before, v = v, w / beta
    return torch.linalg.eigvalsh(T).abs().max().item()


class Absolute:
    """(|H| + damping I)^-1 as a sum over poles, for vectors: `solve` factors pole by pole, or once for all where the factorizations are `kept`.

    damping > 0; see `hinv.Hessian.absolute_solve`.
    """

    least = poles.RATIOS[-1]  # of |H|: the smallest damping there are poles for

    def __init__(self, H: Matrix, damping: float, rtol: float, kept: bool = False):
        if not 0 < damping < math.inf:
            raise ValueError(f"the damping must be a positive number, not {damping}")
        _check_rtol(rtol)
        self.H, self.damping, self.rtol = H.double(), damping, rtol
        self.norm = max(norm_bound(self.H), damping)
        if damping < self.least * self.norm:
            raise ValueError(
                f"the damping {damping:g} is less than {self.least:g} of |H|, which is about {self.norm:.3g}: there are no poles for that; use more"
            )
        self.poles = poles.chosen(damping / self.norm, SHARE * rtol)
        self.scale = damping / self.poles.ratio  # at least the norm
        self._kept = list(self._factors()) if kept else None

    def _factors(self) -> Iterable[Resolvent]:
        return (_resolvent(self.H, tau * self.scale, self.norm) for tau in self.poles.tau.tolist())

    @exact()
    def solve(self, b: Float[Tensor, "P *k"]) -> tuple[Float[Tensor, "P *k"], PoleReport]:
        """x, float64, and the report."""
        b, p = b.double(), self.poles
        x, lost, worst = torch.zeros_like(b), 0.0, 0.0
        # the weights c / tau^2 sum up to 1 / ratio, so this loses a hundredth of rtol
        enough = 0.01 * self.rtol * self.damping / (self.norm + self.damping)
        for F, tau, c in zip(self._kept or self._factors(), p.tau.tolist(), p.c.tolist(), strict=True):
            y, r = _solved(self.H, F, b, enough)
            x += c / tau * y.imag
            lost = lost + c / tau**2 / self.scale * r
            worst = max(worst, _share(r, _sizes(b)))
        # |x - exact| <= error |exact| + lost, and so |exact| >= (|x| - lost) / (1 + error)
        size = (_sizes(x) - lost) / (1.0 + p.error)
        bound = p.error + _share(lost, size)
        return x, PoleReport(len(p.tau), self.norm, bound, worst)


@exact()
def sign(H: Matrix, b: Float[Tensor, "P *k"], gap: float, rtol: float) -> tuple[Float[Tensor, "P *k"], PoleReport]:
    H, b = H.double(), b.double()
    _check_rtol(rtol)
    if not 0 < gap < math.inf:
        raise ValueError(f"the gap must be a positive number, not {gap}")
    norm = max(norm_bound(H), 2.0 * gap)
    p = poles.zolotarev(gap / norm, SHARE * rtol)
    x, lost, worst = torch.zeros_like(b), 0.0, 0.0
    for tau, c in zip(p.tau.tolist(), p.c.tolist(), strict=True):
        y, r = _solved(H, _resolvent(H, tau * norm, norm), b, 0.01 * rtol * gap / norm)
        x += c * norm * y.real
        lost = lost + c / tau * r
        worst = max(worst, _share(r, _sizes(b)))
    return x, PoleReport(len(p.tau), norm, p.error + _share(lost, _sizes(b)), worst)


def smoothed_count(H: Matrix, shift: float, width: float) -> float:
    return -_beside(H, shift, width).log.imag / math.pi


def smoothed_density(H: Matrix, shift: float, width: float) -> float:
    return _beside(H, shift, width).trace.imag / math.pi


def _beside(H: Matrix, shift: float, width: float) -> Resolvent:
    if not 0 < width < math.inf:
        raise ValueError(f"the width must be a positive number, not {width}: count_below and counts count sharply")
    return Resolvent(H.double(), complex(shift, width))


def _resolvent(H: Matrix, t: float, norm: float) -> Resolvent:
    """H - i t I, in single precision where refinement will give the digits back: errors grow with (norm / t)^2."""
    return Resolvent(H, 1j * t, torch.complex64 if t > SINGLE * norm else torch.complex128)


def _solved(
    H: Matrix, F: Resolvent, b: Float[Tensor, "P *k"], enough: float
) -> tuple[Complex[Tensor, "P *k"], Float[Tensor, "*k"]]:
    """`_refined`, by another factorization in double precision where single does not serve."""
    y, r = _refined(H, F, b, enough)
    if F.dtype == torch.complex64 and not _share(r, _sizes(b)) <= enough:
        y, r = _refined(H, Resolvent(H, F.z), b, enough)
    return y, r


def _refined(
    H: Matrix, F: Resolvent, b: Float[Tensor, "P *k"], enough: float
) -> tuple[Complex[Tensor, "P *k"], Float[Tensor, "*k"]]:
    """(H - z I)^-1 b, refined while it helps until |b - (H - z I) y| is `enough` of |b|; and that residual, column by column."""
    y = F.solve(b)
    r = _residual(H, F.z, y, b)
    for _ in range(REFINEMENTS):
        if _share(_sizes(r), _sizes(b)) <= enough:
            break
        better = y + F.solve(r)
        left = _residual(H, F.z, better, b)
        if not _sizes(left).max() < _sizes(r).max():
            break
        y, r = better, left
    return y, _sizes(r)


def _residual(H: Matrix, z: complex, y: Complex[Tensor, "P *k"], b: Float[Tensor, "P *k"]) -> Complex[Tensor, "P *k"]:
    parts = torch.view_as_real(y).flatten(1)  # real and imaginary parts side by side: one product
    return b - torch.view_as_complex((H @ parts).reshape(*y.shape, 2)) + z * y


def _sizes(v: Tensor) -> Float[Tensor, "*k"]:
    return torch.linalg.vector_norm(v, dim=0)


def _share(part: Tensor | float, whole: Tensor) -> float:
    """The largest of these quotients; of nothing nothing."""
    part = torch.as_tensor(part, dtype=whole.dtype, device=whole.device).expand_as(whole)
    quotients = torch.where(part > 0, part / whole, 0.0)
    return torch.where(quotients >= 0, quotients, math.inf).amax().item() if whole.numel() else 0.0


def _check_rtol(rtol: float) -> None:
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, not {rtol}")
