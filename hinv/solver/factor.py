"""The fast exact solver: a symmetric factorization of H + eps I, stage by stage from the loss backwards.

Write y_l for the movement of the activations and lambda_l = V_l y_l - r_l for that of the backward signal. Start with the
loss, V_L = its Hessian in the outputs, r_L = 0; for l = L .. 1

    S_l     = E_l + eps I + J_l^T V_l J_l                         (p x p)
    N_l     = F_l + J_l^T V_l A_l                                 (p x B a_in)
    V_{l-1} = G_l + A_l^T V_l A_l - N_l^T S_l^-1 N_l              (B a_in x B a_in)
    h_l     = S_l^-1 (g_l + J_l^T r_l),    r_{l-1} = A_l^T r_l - N_l^T h_l

and forwards, y_0 = 0:  x_l = h_l - S_l^-1 N_l y_{l-1},  y_l = A_l y_{l-1} + J_l x_l. This is the Riccati recursion of a
linear-quadratic control problem (state y, control x, costate lambda). V, S, N do not depend on g. By congruence the inertia of H + eps I is the sum of
the inertias of the S_l, and log|det| the sum of theirs.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hinv.errors import AccuracyWarning, SingularShiftError, warn
from hinv.html import table
from hinv.modes import threads
from hinv.shapes import Float, Inexact
from hinv.vectors import normal, seeded

from .inverse import Inverse
from .kept import stored
from .memory import Holes
from .parts import Eliminated, Spread, Structure
from .parts.linear import Repeated
from .symmetric import SingularPivotError

PROBES = 8  # random vectors by which rounding errors are measured
UNITS = 16  # entries of the inverse's diagonal that are computed once more
UNCERTAIN = 0.1  # of the uncertainty at which a count would be wrong: where counts are refused


def check_right_hand_side(b: Any, P: int) -> None:
    if not isinstance(b, Tensor) or not b.is_floating_point():
        found = b.dtype if isinstance(b, Tensor) else type(b).__name__
        raise TypeError(f"the right-hand side must be a floating point tensor, not {found}")
    if b.ndim not in (1, 2) or b.shape[0] != P:
        raise ValueError(f"the right-hand side has shape {tuple(b.shape)}; expected ({P},) or ({P}, k)")


class Elimination:
    """The recursion from V_L to the first stage, or over some of the stages from a V kept on the way (`hinv.solver.kept`)."""

    def __init__(self, structure: Structure, damping: complex, scarce: bool, lean: bool):
        """lean: whether the stages' parts forget after it what is soon made again."""
        self.stages, self.V = structure[0][::-1], structure[1]
        self.damping, self.holes, self.lean = damping, Holes(scarce), lean

    def run(
        self, start: int, end: int, V: Tensor | None, definite: bool
    ) -> Iterator[tuple[Eliminated, Tensor | None, bool]]:
        """Each stage eliminated, V before it (overwritten by the next), and whether all pivots were positive so far."""
        V = None if V is None else V.clone()
        for stage, part in self.stages[start:end]:
            try:
                # once an S_l was not definite, the next mostly are not either, and a Cholesky that fails is lost time
                pivot, V = part.eliminate(V, self.damping, definite)
            except SingularPivotError as error:
                raise SingularShiftError(
                    f"no factorization of H + ({self.damping:g}) I: at {stage}, {error}. The damping is minus an eigenvalue, or next to one of a "
                    "later part of the network; change it a little, or use solve(method='sparse'), which pivots across stages"
                ) from error
            if self.lean and isinstance(part, Repeated):
                part.release()
            definite = definite and pivot.negative == 0
            yield pivot, V, definite
            self.holes(0 if V is None else 4 * V.nbytes)


class Factor(Inverse):
    """(H + damping I) or (GGN + damping I), factored: solve, inertia, logdet, parts of the inverse and samples.

    There is no pivoting across stages, so a shift next to an eigenvalue of a trailing part of the network (the last stages alone) makes V grow and
    digits go. So `uncertainty` measures what is left of them before the inertia and determinant of an indefinite matrix are believed.
    """

    def __init__(
        self,
        structure: Structure,
        damping: complex,
        product: Callable[[Tensor], Tensor],
        scarce: bool = False,
        keep: str = "all",
    ):
        """structure: of `parts`; product: v -> H v, independent of it; scarce: whether memory is (`memory.Holes`); keep: see `hinv.solver.kept`.

        A damping off the real axis, with a complex structure, is `resolvent`'s.
        """
        stages, V = structure
        self.damping, self.product = damping, product
        self.rows = None if V is None else len(V)  # None where a `Head` knows V
        self.largest = max(stage.outputs.numel() for stage, _ in stages)
        with threads(self.largest):
            self.pivots = stored(Elimination(structure, damping, scarce, lean=keep != "all"), keep)
        self.shares = self.pivots.shares  # of each pivot, what inertia, determinant and samples ask of it
        self.sizes, self.batch = [part.p for _, part in stages], len(stages[0][0].inputs)
        self.owners = [number for number, (stage, _) in enumerate(stages) if stage.parameters]
        self.names = [stages[number][0].name for number in self.owners]
        self.like = stages[0][0].inputs[:0]
        self.dtype, self.device = self.like.dtype, self.like.device

    @property
    def negative(self) -> int:
        """Negative pivots, whatever they are worth (`uncertainty`)."""
        return sum(share.negative for share in self.shares)

    def __repr__(self) -> str:
        P, negative = sum(self.sizes), self.negative
        certain = f" (uncertainty {self.uncertainty:.0e})" if negative else ""
        return f"Factor({P} x {P}, damping {self.damping:g}, {len(self.pivots)} stages, {negative} negative pivots{certain}, {self.dtype})"

    def _repr_html_(self) -> str:
        P, negative = sum(self.sizes), self.negative
        rows = {
            "damping": f"{self.damping:g}",
            "stages": len(self.pivots),
            "negative pivots": f"{negative:,}",
            "uncertainty of their number": f"{self.uncertainty:.0e} (wrong from 1 on)",
            "arithmetic": f"{self.dtype} on {self.device}",
        }
        return table(f"Factor, {P:,} x {P:,}", rows)

    @cached_property
    def uncertainty(self) -> float:
        """Estimate of |E (H + damping I)^-1| (Frobenius), E the rounding errors of the factorization; 0 where all pivots are positive.

        Where it is below one the inertia is right: det(H + damping I - t E) = det(H + damping I) det(I - t (H + damping I)^-1 E) is not zero for any t in
        [0, 1], so no eigenvalue crosses zero on the way from the matrix to the one whose pivots were counted. The log-determinant is off by the trace of
        E (H + damping I)^-1, to first order: by about as much where the errors lie in a few directions, and by sqrt(P) as much at most.
        One solve and one product of eight columns: for a normal vector b, b - (H + damping I) x = E x has about that norm, and the largest of eight is
        less than a tenth of it once in 10^9 times even where E has rank one. (A single vector is once in twelve times.)
        """
        if not self.negative:  # a definite matrix only shrinks V: Cholesky is stable
            return 0.0
        P = sum(self.sizes)
        b = normal((P, PROBES), self.like, seeded(0))
        x = self.solve(b)
        errors = torch.linalg.vector_norm(self.product(x) + self.damping * x - b, dim=0)
        return (errors / torch.linalg.vector_norm(b, dim=0)).max().item() * P**0.5

    @property
    def inertia(self) -> tuple[int, int, int]:
        """(positive, negative, zero) eigenvalues of H + damping I, exact: the pivots' (Sylvester). Zero ones are refused when factoring.

        Raises:
            SingularShiftError: rounding errors may have moved an eigenvalue across zero.
        """
        if not self.uncertainty < UNCERTAIN:
            raise SingularShiftError(
                f"the inertia of H + ({self.damping:g}) I is not certain: the damping is next to minus an eigenvalue of H, or of a later part of "
                f"the network (rounding errors are {self.uncertainty:.1g} of what it takes). Change it a little, or factor in float64"
            )
        return sum(self.sizes) - self.negative, self.negative, 0

    @property
    def logdet(self) -> tuple[float, float]:
        """(sign, log |det(H + damping I)|), as torch.linalg.slogdet.

        Warns:
            AccuracyWarning: rounding errors leave it fewer than eight digits. Raises: as `inertia`.
        """
        sign, value = (-1.0) ** self.inertia[1], sum(share.log_abs_det for share in self.shares)
        if self.uncertainty > 1e-8 * max(1.0, abs(value)):
            warn(
                f"the log-determinant is certain to {self.uncertainty:.1g} only: the damping {self.damping:g} is close to minus an eigenvalue of a "
                "later part of the network; another damping, or float64, is better",
                AccuracyWarning,
            )
        return sign, value

    def solve(self, b: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        """(H + damping I)^-1 b for b (P,) or (P, k): one sweep back and one forth, without refinement.

        Cost: two products with every Y_l (n x B a_in) and two triangular solves with every S_l; for one column it is the memory that bounds it.

        Raises:
            ValueError, TypeError: b of another length or not floating point.
        """
        check_right_hand_side(b, sum(self.sizes))
        if not b.numel():
            return b.clone()
        with threads(self.largest):
            return self._sweeps(b.reshape(len(b), -1).to(self.dtype)).reshape(b.shape).to(b.dtype)

    def _sweeps(self, b: Inexact[Tensor, "P k"]) -> Inexact[Tensor, "P k"]:
        kept, pieces = [], b.split(self.sizes)
        r = None if self.rows is None else b.new_zeros(self.rows, b.shape[1])
        for pivot, g in zip(self.pivots, reversed(pieces), strict=True):
            h, r = pivot.backward(r, g)
            kept.append(h)
        return self._forwards(kept[::-1])

    def _forwards(
        self, kept: Sequence[Any], ready: Callable[[Eliminated, Any], Any] = lambda pivot, h: h
    ) -> Inexact[Tensor, "P k"]:
        """x from what the sweep back left of each stage, or from what `ready` makes of it."""
        y, x = None, []
        for pivot, h in zip(reversed(self.pivots), kept, strict=True):
            step, y = pivot.forward(ready(pivot, h), y)
            x.append(step)
        return torch.cat(x)

    # -- the inverse (`hinv.solver.inverse`) ----------------------------------------------------------------------------

    def _spreads(self) -> Iterator[Spread]:
        """Selected inversion, from the first stage to the last; one of them alive at a time."""
        spread = None
        for pivot in reversed(self.pivots):
            spread = pivot.spread(None if spread is None else spread.moved())
            yield spread

    def _diagonal(self) -> Float[Tensor, " P"]:
        return self._variances.clone()

    @cached_property
    def _variances(self) -> Float[Tensor, " P"]:
        with threads(self.largest):
            return torch.cat([spread.diagonal() for spread in self._spreads()])

    def _block(self, number: int) -> Float[Tensor, "p p"]:
        with threads(self.largest):
            return next(itertools.islice(self._spreads(), self.owners[number], None)).block()

    def _of_outputs(self) -> Float[Tensor, "B C C"]:
        with threads(self.largest):
            (last,) = deque(self._spreads(), maxlen=1)
            return last.of_samples(self.batch)

    @cached_property
    def inverse_error(self) -> float:
        """Estimate of the relative error of `inverse_diagonal` (norms; small entries may be off by more), by refined solves for some of its entries. Half of
        them are spread over the stages, half are in the last one: an eigenvalue of a later part spoils what lies behind it. 0 where all pivots are
        positive, as `uncertainty`: then the error is rounding times the condition number, as a solve's.
        """
        if not self.negative:
            return 0.0
        P, ends = sum(self.sizes), [0, *itertools.accumulate(self.sizes)]
        owners = [self.owners[i] for i in spaced(len(self.owners), UNITS // 2)]
        units = [(i, UNITS // 2 // len(owners)) for i in owners] + [(owners[-1], UNITS // 2)]
        where = sorted({ends[i] + j for i, count in units for j in spaced(self.sizes[i], count)})
        b = self.like.new_zeros(P, len(where))
        b[where, range(len(where))] = 1.0
        x = self.solve(b)
        x += self.solve(b - self.product(x) - self.damping * x)
        entries = x[where].diagonal()
        return ((self._variances[where] - entries).norm() / entries.norm()).item()

    @property
    def noises(self) -> int:
        return sum(share.noises for share in self.shares)

    def colored(self, noise: Float[Tensor, "noises n"]) -> Float[Tensor, "P n"]:
        with threads(self.largest):
            pieces = noise.split([share.noises for share in reversed(self.shares)])
            return self._forwards(pieces, lambda pivot, piece: pivot.color(piece))


def spaced(n: int, count: int) -> list[int]:
    """At most `count` of the numbers 0 .. n - 1, evenly spaced, the last among them."""
    count = min(n, count)
    return [(i + 1) * n // count - 1 for i in range(count)]
