"""What a factorization keeps of its stages: every eliminated stage, there or in another memory, or V at every sqrt(L)-th of them.

V_l before a segment of stages is all that the segment's elimination takes: it is made again where a sweep meets it, to the bit, and one segment is alive at a
time. A sweep then costs a factorization, and memory is that of 2 sqrt(L) stages instead of L.
"""

import copy
import math
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hinv.shapes import Array

from .parts import Eliminated
from .symmetric import Symmetric

if TYPE_CHECKING:
    from .factor import Elimination

# by the names that `Estimate` has for what stays on the device
KEEP = {"all": "factor", "checkpoints": "checkpoints", "host": "stage", "disk": "stage"}


def segment(stages: int) -> int:
    """How many stages a segment has: the square root, rounded up."""
    return math.isqrt(max(stages - 1, 0)) + 1


@dataclass(frozen=True)
class Share:
    """Of a stage eliminated: its part of inertia and determinant, and the noise that a sample takes there."""

    negative: int
    log_abs_det: float
    noises: int


@runtime_checkable
class Pivots(Protocol):
    """The eliminated stages: from the loss backwards, or reversed from the first stage on; and the share of each."""

    @property
    def shares(self) -> Sequence[Eliminated | Share]: ...

    def __iter__(self) -> Iterator[Eliminated]: ...

    def __reversed__(self) -> Iterator[Eliminated]: ...

    def __len__(self) -> int: ...


class All(list[Eliminated]):
    """Every stage, on the device."""

    @property
    def shares(self) -> Sequence[Eliminated]:
        return self


def stored(elimination: "Elimination", keep: str) -> Pivots:
    if keep == "all":
        return All(pivot for pivot, _, _ in elimination.run(0, len(elimination.stages), elimination.V, True))
    return Checkpoints(elimination) if keep == "checkpoints" else Elsewhere(elimination, keep)


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


class Elsewhere:
    """The eliminated stages in the host's memory ("host") or in a file that is mapped ("disk"); a sweep brings one at a time to the device.

    Their arrays are moved, bit by bit as they are; what the derivatives hold (`part`) stays.
    """

    def __init__(self, elimination: "Elimination", keep: str):
        self.place = File() if keep == "disk" else Host()
        self.device = elimination.stages[0][0].inputs.device
        self.packed: list[Eliminated] = []
        self.shares: list[Share] = []
        for pivot, _, _ in elimination.run(0, len(elimination.stages), elimination.V, True):
            self.shares.append(Share(pivot.negative, pivot.log_abs_det, pivot.noises))
            self.packed.append(mapped(pivot, self.place.put))
        self.place.close()

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[Eliminated]:
        return map(self._fetched, self.packed)

    def __reversed__(self) -> Iterator[Eliminated]:
        return map(self._fetched, reversed(self.packed))

    def _fetched(self, pivot: Eliminated) -> Eliminated:
        return mapped(pivot, lambda slot: self.place.get(slot, self.device))


def mapped(thing: Any, move: Callable[[Any], Any]) -> Any:
    """A copy of an eliminated stage with each array that elimination made replaced by move(array)."""
    if isinstance(thing, Tensor | np.ndarray | Slot):
        return move(thing)
    if isinstance(thing, Symmetric) or (isinstance(thing, Eliminated) and hasattr(thing, "part")):
        thing = copy.copy(thing)
        vars(thing).update({name: mapped(value, move) for name, value in vars(thing).items() if name != "part"})
    return thing


@dataclass(frozen=True)
class Slot:
    """Where an array lies in the file, and how: LAPACK's triangles are kept by columns."""

    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    columns: bool
    tensor: bool


class Host:
    def put(self, array: Array) -> Array:
        return array.cpu() if isinstance(array, Tensor) else array

    def get(self, array: Array, device: torch.device) -> Array:
        return array.to(device) if isinstance(array, Tensor) else array

    def close(self) -> None:
        """Everything is put."""


class File:
    """A temporary file without a name, gone with the last who holds it; in the folder of `tempfile` (TMPDIR)."""

    def __init__(self) -> None:
        self.file, self.size = tempfile.TemporaryFile(prefix="hinv-"), 0  # noqa: SIM115 (until `close`)
        self.map: mmap.mmap | bytes = b""

    def put(self, array: Array) -> Slot:
        values = array.cpu().numpy() if isinstance(array, Tensor) else array
        columns = values.ndim > 1 and not values.flags.c_contiguous and values.mT.flags.c_contiguous
        values = np.ascontiguousarray(values.mT if columns else values)
        start = self.size
        self.file.write(values.data)
        self.size += values.nbytes
        self.size += self.file.write(bytes(-self.size % 64))  # aligned
        return Slot(start, values.dtype, values.shape, columns, isinstance(array, Tensor))

    def get(self, slot: Slot, device: torch.device) -> Array:
        count = math.prod(slot.shape)
        values = np.frombuffer(self.map, slot.dtype, count, slot.start).reshape(slot.shape) if count else None
        values = np.empty(slot.shape, slot.dtype) if values is None else values
        values = values.mT if slot.columns else values
        return torch.from_numpy(values).to(device) if slot.tensor else values

    def close(self) -> None:
        with self.file:
            self.file.flush()
            if self.size:  # copies on write, so that nothing changes the file
                self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a factor kept on disk lives in a temporary file of this process and cannot be copied or pickled: factor again there"
        )
