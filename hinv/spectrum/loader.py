"""What a whole data set must be, so that its batches add up: repeatable, finite, and weighed alike."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler


@runtime_checkable
class Loader(Protocol):
    """What gives batches (inputs, targets), again and again: a DataLoader, a list."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class Batches:
    """A loader whose batches are checked as they come; `by_weight`: a loss whose mean counts the labels that are not ignored."""

    def __init__(self, loader: Loader, by_weight: torch.nn.CrossEntropyLoss | torch.nn.NLLLoss | None):
        self.loader, self.by_weight = loader, by_weight

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (x, y) in enumerate(self.loader):
            if not (x.isfinite().all() and (not y.is_floating_point() or y.isfinite().all())):
                raise ValueError(f"batch {number} of the loader contains NaN or infinite values")
            if self.by_weight is not None and not y.is_floating_point() and (y == self.by_weight.ignore_index).any():
                raise ValueError(
                    f"batch {number} has ignored labels, and the loss divides by the number of the others, so its batches do not add up: use "
                    "reduction='sum'"
                )
            yield x, y


def check_loader(loader: Any) -> None:
    if not hasattr(loader, "__iter__") or iter(loader) is loader:
        raise TypeError(
            "the loader is gone after one pass, and every product needs one: give a DataLoader or a list of batches"
        )
    if isinstance(loader, DataLoader) and not isinstance(loader.sampler, SequentialSampler):
        raise ValueError(
            f"the loader draws samples with {type(loader.sampler).__name__}: batches in another order at every pass make products that differ by "
            "rounding (or, with drop_last, by samples), and Lanczos takes that for a different matrix: use shuffle=False"
        )
    if next(iter(loader), None) is None:
        raise ValueError("the loader is empty")
