"""The minimizer of the quadratic model in a ball, by exact factorizations (More and Sorensen)."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hinv.curvature import Curvature, Hessian
from hinv.errors import SingularShiftError
from hinv.network import losses
from hinv.shapes import Float
from hinv.solver.dual import Dual
from hinv.solver.factor import Factor
from hinv.vectors import normal

from .descent import Direction
from .preconditioned import Preconditioned

MOST = 15  # factorizations in one trust-region step


class TrustRegionNewton(Preconditioned):
    """The minimizer of the quadratic model with the exact Hessian in the ball |s| <= radius.

    It is s = -(H + lambda I)^-1 g with H + lambda I positive semidefinite, known from the inertia of each factorization, and |s| = radius; lambda by
    Newton's method on 1/|s| = 1/radius, safeguarded by a bracket. In the hard case (|s| < radius however close lambda comes to -lambda_min) an
    eigenvector of the lowest eigenvalue, found by inverse iteration with the same factorization, fills up to the boundary.

    Args:
        radius: first radius, in the norm of the parameters; it halves where rho < 1/4, quarters where the loss rose, and doubles where rho > 3/4 at
            the boundary.
        rtol: of |s| = radius.

    Cost: usually one to three factorizations of H a step, and some dozens of products with it for a lower bound of lambda.
    """

    kind = Hessian

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
        radius: float = 0.3,
        rtol: float = 0.1,
        every: int = 1,
        accept: bool = True,
        sample: int | None = None,
    ):
        if not radius > 0:
            raise ValueError(f"radius must be a positive number, not {radius}")
        super().__init__(
            model, loss, optimizer, clip, damping=1.0, adapt=1.0, every=every, accept=accept, sample=sample
        )
        least = torch.finfo(self.parameters[0].dtype).eps ** 0.5
        if not least <= rtol < 1:
            raise ValueError(f"rtol must lie between {least:.1g}, what rounding leaves of |s|, and 1, not {rtol}")
        self.radius, self.rtol, self.damping = float(radius), rtol, None
        # an eigenvector, and how far lambda was above minus its eigenvalue
        self._lowest: Float[Tensor, " P"] | None = None
        self._excess: float | None = None

    def _direct(self, H: Curvature, g: Float[Tensor, " P"]) -> Direction:
        norm, finite = g.norm().item(), torch.finfo(g.dtype)
        if norm < finite.tiny**0.5:  # what would be computed from its square is zero
            self._age = -1  # no factorization to use again
            z, curvature = _lowest_pair(H, self._lowest)
            if z is None or curvature < finite.eps**0.5:
                return Direction(g)
            return Direction(self.radius * z, note="no gradient: along the lowest eigenvector")
        excess = norm / self.radius if self._excess is None else self._excess
        found = more_sorensen(H, g, self.radius, excess, finite.eps**0.5, self.rtol, self._lowest)
        self.damping = self._used = found.shift
        self._factor, self._lowest, self._excess = found.factor, found.lowest, found.excess
        return Direction(-found.s, self._factor.inertia, found.factorizations, found.note)

    def _again(self, g: Float[Tensor, " P"]) -> Direction:
        found = super()._again(g)
        return replace(found, d=found.d * min(1.0, self.radius / found.d.norm().item()))

    def _adjust(self, ratio: float, length: float) -> None:
        before = self.radius
        if not ratio >= 0.25:
            self.radius = (0.5 if ratio > 0.0 else 0.25) * min(self.radius, length)
        elif ratio > 0.75 and length > (1 - 2 * self.rtol) * self.radius:
            self.radius *= 2.0
        self.radius = max(self.radius, torch.finfo(self.parameters[0].dtype).eps)  # shorter steps are lost in rounding
        if self._excess is not None:
            self._excess *= before / self.radius  # at the boundary lambda + lambda_min goes about as 1 / radius

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"radius": self.radius, "lowest": self._lowest, "excess": self._excess}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.radius, self._lowest, self._excess = state["radius"], state["lowest"], state["excess"]
        super().load_state_dict(state)


@dataclass
class Ball:
    """What More and Sorensen's method returns: the step, lambda, its excess over the lower bound, the factorization there, an approximate eigenvector of
    the lowest eigenvalue."""

    s: Float[Tensor, " P"]
    shift: float
    excess: float
    factor: Factor | Dual
    lowest: Float[Tensor, " P"] | None
    factorizations: int
    note: str = ""


def more_sorensen(
    H: Curvature,
    g: Float[Tensor, " P"],
    radius: float,
    excess: float,
    floor: float,
    rtol: float,
    lowest: Float[Tensor, " P"] | None = None,
) -> Ball:
    """min g.s + s.Hs / 2 in the ball |s| <= radius, to a share rtol of the radius or of the decrease.

    Source: J. J. More, D. C. Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983), section 3; positive definiteness is read off the inertia. Lanczos finds the
    lowest eigenvalue roughly, at the price of a few dozen products: it bounds lambda from below, as -lambda_min >= -z.Hz for every unit vector z.

    Args:
        excess: of the first lambda over that bound. floor: the smallest lambda (loss / parameter^2).
        lowest: a guess of the lowest eigenvector.

    Raises:
        SingularShiftError: no positive definite H + lambda I was met.
    """
    z, bound = _lowest_pair(H, lowest)
    bound = low = max(floor, bound)
    high, best = math.inf, None
    shift = max(1.1 * low, low + excess)
    for count in range(1, MOST + 1):
        try:
            F = H.factor(shift)
            definite = F.inertia[1] == 0
        except SingularShiftError:  # lambda is minus an eigenvalue
            definite = False
        if not definite:
            low = max(low, shift)
            shift = 2.0 * shift if high == math.inf else math.sqrt(low * high)
            continue
        s = -F.solve(g)
        length = s.norm().item()
        u = s / length
        newton = shift + (length - radius) / radius / (u @ F.solve(u)).item()
        found = Ball(s, shift, shift - bound, F, z, count)
        if length > (1 + rtol) * radius:
            low = max(low, shift)
        elif length >= (1 - rtol) * radius:
            return found
        else:
            z, quotient = _inverse_iteration(H, F, s, z)
            tau = _to_the_boundary(s, z, radius)
            # adding tau z costs the model tau^2 z.(H + lambda I)z, of a decrease of at least half of s.(H + lambda I)s + lambda radius^2
            if tau**2 * (quotient + shift) <= rtol * (2 - rtol) * (shift * radius**2 - (s @ g).item()):
                return replace(found, s=s + tau * z, lowest=z, note="hard case: lowest eigenvector added")
            if shift <= 1.1 * floor:
                return found
            best, high, low = replace(found, lowest=z), shift, max(low, -quotient)
            if high <= low * (1 + 1e-3):
                break
        least = 1.1 * low if high == math.inf else low + 0.05 * (high - low)
        shift = min(max(newton, least), high)
    if best is None:
        raise SingularShiftError(f"no positive definite H + lambda I in {MOST} factorizations, lambda up to {low:.2g}")
    note = f"inside the radius {radius:.2g} after {count} factorizations"
    return replace(best, factorizations=count, note=note)


def _lowest_pair(H: Curvature, guess: Float[Tensor, " P"] | None) -> tuple[Float[Tensor, " P"] | None, float]:
    """An approximate eigenvector of the lowest eigenvalue of H by Lanczos, and minus its Rayleigh quotient."""
    if H.shape[0] < 3:
        return None, -math.inf
    if guess is None:
        guess = normal(H.shape[0], H.gradient)
    from scipy.sparse.linalg import ArpackError, eigsh

    try:
        _, vectors = eigsh(H.to_scipy(), 1, which="SA", tol=0.01, v0=guess.cpu().double().numpy())
    except ArpackError:  # no convergence, or H is zero
        return None, -math.inf
    z = torch.from_numpy(vectors[:, 0].copy()).to(H.gradient)
    z = z / z.norm()
    return z, -(z @ (H @ z)).item()


def _inverse_iteration(
    H: Curvature, F: Factor | Dual, s: Float[Tensor, " P"], z: Float[Tensor, " P"] | None
) -> tuple[Float[Tensor, " P"], float]:
    """An approximate eigenvector of the lowest eigenvalue of H, and its Rayleigh quotient, by the factorization of H + lambda I."""
    if z is None:
        z = normal(len(s), s)
    for _ in range(2):
        z = F.solve(z)
        z = z / z.norm()
    return z, (z @ (H @ z)).item()


def _to_the_boundary(s: Float[Tensor, " P"], z: Float[Tensor, " P"], radius: float) -> float:
    """The tau of smaller magnitude with |s + tau z| = radius."""
    sz, rest = (s @ z).item(), radius**2 - (s @ s).item()
    return rest / (sz + math.copysign(math.sqrt(sz**2 + rest), sz)) if rest > 0 else 0.0
