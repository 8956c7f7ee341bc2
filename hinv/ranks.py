"""Several processes (torch.distributed), each with samples of its own: sums over all of them, and decisions that the first makes for all.

Every process makes the same calls in the same order; how many batches each has does not matter. Where none is initialized, each function is what it does
alone. A process that ends takes the others with it: they raise ConnectionError at their next sum.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from hinv.errors import NotFiniteError
from hinv.shapes import Float

T = TypeVar("T")


def several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def size() -> int:
    return distributed.get_world_size() if several() else 1


def number() -> int:
    return distributed.get_rank() if several() else 0


def first() -> bool:
    """Whether this process decides."""
    return number() == 0


@contextlib.contextmanager
def _asked() -> Generator[None]:
    """What torch says when another process is gone (gloo: a RuntimeError), as the error that it is."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"another process has ended, or does not answer: its own output says why ({error})"
        ) from error


def _sum(own: Tensor) -> None:
    with _asked():
        distributed.all_reduce(own)


def _tell(what: Tensor, source: int = 0) -> None:
    with _asked():
        distributed.broadcast(what, source)


def summed(make: Callable[[], Float[Tensor, "..."]], like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The sum over the processes of what each of them makes, in one all_reduce, the same to the bit on all; `like` has its shape.

    A process in which that fails takes part with NaN, so that none waits for it, and raises its own error afterwards.
    """
    if not several():
        return make()
    try:
        own = make().contiguous()
    except Exception:
        _sum(torch.full_like(like, torch.nan))
        raise
    _sum(own)
    return own


def agreed(make: Callable[[], T]) -> T:
    """make() on each process; where it fails on one, none goes on: that one raises its own error, the others say so."""
    if not several():
        return make()
    failed, error, found = torch.zeros(2), None, None  # errors, and those of numbers that are not finite
    try:
        found = make()
    except Exception as own:
        error, failed = own, torch.tensor([1.0, float(isinstance(own, NotFiniteError))])
    if distributed.get_backend() == "nccl":
        failed = failed.cuda()
    _sum(failed)
    if error is not None:
        raise error
    if failed.any():
        kind = NotFiniteError if failed[1] == failed[0] else ValueError
        raise kind("another process failed here: its own error says why")
    return cast(T, found)


def gathered(own: Tensor, dim: int) -> Tensor:
    """What all processes have, in the order of their numbers, joined along a dimension in which it may differ; on each of them."""
    if not several():
        return own
    shapes: list[Any] = [None] * size()
    with _asked():
        distributed.all_gather_object(shapes, tuple(own.shape))
    pieces = []
    for at, shape in enumerate(shapes):
        mine = at == number()
        piece = own.contiguous() if mine else own.new_empty(shape)
        _tell(piece, at)
        pieces.append(piece)
    return torch.cat(pieces, dim)


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, or the error it raises, on all of them; the others do nothing."""
    if not several():
        return make()
    found: list[Any] = [None, None]
    if first():
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    with _asked():
        distributed.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise found[1]
    return found[0]


class Led:
    """Products in which all processes take part, asked for by the first alone: it iterates, and its scalars decide how many products there are.

    Were they computed by each process, one that rounds otherwise would stop an iteration earlier, and the others wait for it for ever.
    """

    def __init__(self, multiply: Callable[[Tensor], Tensor], like: Float[Tensor, " P"]):
        self.product, self.like = multiply, like

    def __call__(self, v: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        if not several():
            return self.product(v)
        self._broadcast_size(v.shape[1] if v.ndim > 1 else 1)
        v = v.contiguous()
        _tell(v.reshape(len(v), -1))
        return self.product(v)

    def _broadcast_size(self, columns: int) -> int:
        size = torch.tensor([columns], device=self.like.device)
        _tell(size)
        return int(size.item())

    def run(self, make: Callable[[], T]) -> T:
        """make() on the first process, while the others multiply; its result, or its error, on all."""
        if not several():
            return make()
        error: Exception | None = None
        if not first():
            while columns := self._broadcast_size(0):
                v = self.like.new_empty(len(self.like), columns)
                _tell(v)
                try:
                    self.product(v)
                except Exception as failed:  # the first hears of it by NaN, and says when to stop
                    error = error or failed

        def stopped() -> T:
            try:
                return make()
            finally:
                self._broadcast_size(0)

        try:
            return from_first(stopped)
        finally:
            if error is not None:
                raise error
