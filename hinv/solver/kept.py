"""What a factorization keeps of its stages: every eliminated stage, or V at every sqrt(L)-th of them.

V_l before a segment of stages is all that the segment's elimination takes: it is made again where a sweep meets it, to the bit, and one segment is alive at a
time. A sweep then costs a factorization, and memory is that of 2 sqrt(L) stages instead of L.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .parts import Eliminated

if TYPE_CHECKING:
    from .factor import Elimination

KEEP = {"all": "factor", "checkpoints": "checkpoints"}  # by the names that `Estimate` has for them


def segment(stages: int) -> int:
    """How many stages a segment has: the square root, rounded up."""
    return math.isqrt(max(stages - 1, 0)) + 1


@dataclass(frozen=True)
class Share:
    """Of a stage eliminated: its part of inertia and determinant, and the noise that a sample takes there."""

    negative: int
    log_abs_det: float
    noises: int


class Pivots(Protocol):
    """The eliminated stages: from the loss backwards, or reversed from the first stage on."""

    def __iter__(self) -> Iterator[Eliminated]: ...

    def __reversed__(self) -> Iterator[Eliminated]: ...

    def __len__(self) -> int: ...


class Checkpoints:
    """The eliminated stages by V at the start of each segment; made again, segment by segment, as one goes over them."""

    def __init__(self, elimination: "Elimination"):
        self.elimination, L = elimination, len(elimination.stages)
        length = segment(L)
        self.ends = [min(start + length, L) for start in range(0, L, length)]
        self.saved: list[tuple[Tensor | None, bool]] = []
        self.shares: list[Share] = []
        V, definite, start = elimination.V, True, 0
        for end in self.ends:
            self.saved.append((V, definite))
            for pivot, V, definite in elimination.run(start, end, V, definite):  # noqa: B020, B007
                self.shares.append(Share(pivot.negative, pivot.log_abs_det, pivot.noises))
            start = end

    def __len__(self) -> int:
        return len(self.shares)

    def _segment(self, number: int) -> list[Eliminated]:
        start = self.ends[number - 1] if number else 0
        return [pivot for pivot, _, _ in self.elimination.run(start, self.ends[number], *self.saved[number])]

    def __iter__(self) -> Iterator[Eliminated]:
        for number in range(len(self.ends)):
            yield from self._segment(number)

    def __reversed__(self) -> Iterator[Eliminated]:
        for number in reversed(range(len(self.ends))):
            yield from self._segment(number)[::-1]
