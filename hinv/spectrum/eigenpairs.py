"""Eigenpairs with a certificate: ARPACK finds them, two exact counts prove that none was skipped."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hinv.errors import CertificateWarning, SingularShiftError, warn
from hinv.html import table
from hinv.shapes import Float
from hinv.solver.matrix import Matrix
from hinv.solver.products import operator

from .counts import count_below, size

ROUNDS = 6  # searches for eigenvalues that the count says are missing
ACCURATE = 1e-7  # of the norm of H: the largest residual |H v - lambda v| of a certified pair


@dataclass(frozen=True, repr=False)
class Eigenpairs:
    """k eigenvalues (loss / parameter^2) in ascending order with their vectors (P, k) and residuals |H v - lambda v| (k,).

    `certified`: inertia counts prove that these are the k wanted ones, none skipped and none twice (of a cluster at the edge of what was wanted, within
    rounding of the last value, as many as there was room for), with residuals below 1e-7 |H|; `note` says what was counted, or what is missing.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "P k"]
    residuals: Float[Tensor, " k"]
    certified: bool
    note: str

    def __repr__(self) -> str:
        shown = ", ".join(f"{v:.6g}" for v in self.values[:6].tolist()) + (", ..." if len(self.values) > 6 else "")
        return f"Eigenpairs([{shown}], certified={self.certified})"

    def _repr_html_(self) -> str:
        rows = {
            f"{v:.10g}": f"residual {r:.1e}" for v, r in zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        }
        return table(
            "Eigenpairs, certified" if self.certified else "Eigenpairs, not certified", rows | {"note": self.note}
        )


def find(H: Matrix, k: int, which: str = "LA", sigma: float | None = None) -> Eigenpairs:
    """`Curvature.eigsh`."""
    P, H = H.shape[0], H.double()
    if sigma is None and which not in ("LA", "SA", "LM"):
        raise ValueError(f"which must be 'LA' (largest), 'SA' (smallest) or 'LM' (largest magnitude), not {which!r}")
    if not 1 <= k < P:
        raise ValueError(
            f"k must be from 1 to {P - 1} (P - 1), not {k}; for all eigenvalues use torch.linalg.eigvalsh(H.dense())"
        )
    region = _Region(H, which, sigma)
    values, vectors = H.gradient.new_zeros(0), H.gradient.new_zeros(P, 0)
    residuals, certified, note, missing = values, False, "", k
    for _ in range(ROUNDS):
        new = region.search(min(missing, k, P - len(values)), vectors)
        if new.shape[1] == 0:
            break
        values, vectors = _rayleigh_ritz(H, torch.cat([vectors, new], 1))
        rank = region.measure(values).argsort(descending=True)
        values, vectors = values[rank], vectors[:, rank]
        if len(values) < k:
            missing = k - len(values)
            continue
        values, vectors = values[:k], vectors[:, :k]
        residuals = torch.linalg.vector_norm(H @ vectors - vectors * values, dim=0)
        try:
            missing, note = region.missing(values, residuals)
        except (SingularShiftError, MemoryError) as error:
            note = f"not certified: {error}"
            break
        certified = missing == 0
        if missing <= 0:
            break
    if len(values) < k:
        raise ArithmeticError(
            f"ARPACK found {len(values)} of {k} eigenvalues; try fewer, or sigma next to the ones you want"
        )
    worst, scale = residuals.max().item(), max(values.abs().max().item(), abs(sigma or 0.0))
    if certified and worst > ACCURATE * max(scale, region.norm):
        certified, note = False, f"{note}, but the largest residual is {worst:.1e}"
    if not certified:
        warn(note, CertificateWarning)
    values, order = values.sort()
    return Eigenpairs(values, vectors[:, order], residuals[order], certified, note)


class _Region:
    """What is wanted, as a measure whose k largest values they are, with a search by ARPACK and an exact count of what exceeds a threshold."""

    def __init__(self, H: Matrix, which: str, sigma: float | None):
        self.H, self.which, self.sigma = H, which, sigma
        self.inverse = None if sigma is None else H.factor(-sigma, dtype=torch.float64)
        self.norm = size(H)  # for margins

    def measure(self, values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        if self.sigma is not None:
            return -(values - self.sigma).abs()
        return {"LA": values, "SA": -values, "LM": values.abs()}[self.which]

    def solve(self, v: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """(H - sigma I)^-1 v, refined once: next to a cluster the factorization alone loses the pairs further away."""
        assert self.inverse is not None and self.sigma is not None
        x = self.inverse.solve(v)
        return x + self.inverse.solve(v - (self.H @ x - self.sigma * x))

    def here(self, array: Float[np.ndarray, "..."]) -> Float[Tensor, "..."]:
        """An array of SciPy's on the device of the matrix."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.H.device)

    def search(self, k: int, known: Float[Tensor, "P n"]) -> Float[Tensor, "P m"]:
        """Up to k vectors (P, k) orthogonal to the known ones."""
        from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh

        known, P = known.cpu().numpy(), len(known)
        apply: Callable[[Tensor], Tensor] = (lambda v: self.H @ v) if self.inverse is None else self.solve
        # where the known ones go: out of the way of what is wanted
        far = 0.0
        if self.inverse is None and known.shape[1]:
            far = {"LA": -1.0, "SA": 1.0, "LM": 0.0}[self.which] * 10.0 * (self.H @ self.here(known)).norm().item()

        def matvec(v: Float[np.ndarray, "..."]) -> Float[np.ndarray, " P"]:
            v = v.reshape(-1)
            inside = known.T @ v
            image = apply(self.here(v - known @ inside)).cpu().numpy()
            return image - known @ (known.T @ image) + known @ (far * inside)

        deflated = operator((P, P), np.float64, matvec=matvec)
        generator = np.random.default_rng(known.shape[1])
        start = generator.standard_normal(P)
        start -= known @ (known.T @ start)
        room = P - known.shape[1]
        if k >= room:  # all that is left
            vectors = np.linalg.svd(known, full_matrices=True)[0][:, known.shape[1] :]
            return self.here(vectors)
        which, ncv = self.which if self.inverse is None else "LM", max(2 * k + 1, 40)
        for width in (ncv, 3 * ncv, 9 * ncv):
            try:
                vectors = eigsh(deflated, k, which=which, v0=start, ncv=min(P, width), tol=1e-10)[1]
                break
            except ArpackNoConvergence as error:
                vectors = error.eigenvectors
                break
            except ArpackError as error:
                vectors = np.zeros((P, 0))
                if "-9:" in str(
                    error
                ):  # the start is mapped to zero: so is all that is left, and any vectors there are eigenvectors
                    vectors = np.linalg.qr(generator.standard_normal((P, k)))[0]
                    break
                # "no shifts could be applied", in a cluster: more room helps
        return self.here(vectors - known @ (known.T @ vectors))

    def missing(self, values: Float[Tensor, " k"], residuals: Float[Tensor, " k"]) -> tuple[int, str]:
        """How many of the wanted eigenvalues are not among these k, and the counts that say so.

        At least k lie up to just beyond the last one, and before it as many as were found: the last may be one of many that are equal.
        """
        scale = max(values.abs().max().item(), abs(self.sigma or 0.0), self.norm)
        margin = max(10.0 * residuals.max().item(), 1e-10 * scale) or 1e-10
        worst = self.measure(values).min().item()
        outer, enough = self._beyond(worst, -margin)
        if enough == len(values):
            return 0, f"{enough} eigenvalues {self.describe(outer)} by inertia, {len(values)} found{self.certain()}"
        inner, exact = self._beyond(worst, margin)
        found = int((self.measure(values) > inner).sum())
        note = f"{exact} eigenvalues {self.describe(inner)} by inertia, {found} found; {enough} {self.describe(outer)}{self.certain()}"
        return max(exact - found, len(values) - enough, 0) or -int(exact < found), note

    def _beyond(self, worst: float, margin: float) -> tuple[float, int]:
        """A threshold beside the last value where H can be factored, and how many eigenvalues exceed it."""
        for attempt in range(4):
            threshold = worst + margin * 3.0**attempt
            try:
                return threshold, self._exceeding(threshold)
            except SingularShiftError as error:
                last = error
        raise last

    def _exceeding(self, t: float) -> int:
        H, P = self.H, self.H.shape[0]
        if self.sigma is not None:
            return 0 if t >= 0 else count_below(H, self.sigma - t) - count_below(H, self.sigma + t)
        if self.which == "LA":
            return P - count_below(H, t)
        if self.which == "SA":
            return count_below(H, -t)
        return P if t <= 0 else P - count_below(H, t) + count_below(H, -t)

    def certain(self) -> str:
        """How far the counts are from being wrong: the inequality of `Factor.uncertainty`, |E (H - s I)^-1| < 1, at the worst shift counted so far."""
        return f"; rounding errors at most {max(self.H.uncertain.values(), default=0.0):.0e} of what would move a count"

    def describe(self, t: float) -> str:
        if self.sigma is not None:
            return f"within {-t:.6g} of {self.sigma:g}"
        return {"LA": f"above {t:.6g}", "SA": f"below {-t:.6g}", "LM": f"of magnitude above {t:.6g}"}[self.which]


def _rayleigh_ritz(H: Matrix, basis: Float[Tensor, "P k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "P k"]]:
    """The best eigenpairs of H in the span of a basis (P, k)."""
    basis = torch.linalg.qr(basis)[0]
    values, inner = torch.linalg.eigh(basis.T @ (H @ basis))
    return values, basis @ inner
