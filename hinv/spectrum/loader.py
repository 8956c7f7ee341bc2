"""What a whole data set must be, so that its batches add up: repeatable, finite, pairs of inputs and targets; and by what a mean over it divides."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

# losses whose mean counts every entry of the targets
EACH_ENTRY = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    *(nn.KLDivLoss, nn.PoissonNLLLoss, nn.SoftMarginLoss),
)


@runtime_checkable
class Loader(Protocol):
    """What gives batches (inputs, targets), again and again: a DataLoader, a list."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


class Batches:
    """A loader whose batches are taken apart by `adapt` and checked as they come."""

    def __init__(self, loader: Loader, adapt: Callable[[Any], tuple[Tensor, Tensor]] | None):
        self.loader, self.adapt = loader, adapt

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self.loader):
            x, y = self._pair(batch if self.adapt is None else self.adapt(batch), number)
            if not (x.isfinite().all() and (not y.is_floating_point() or y.isfinite().all())):
                raise ValueError(f"batch {number} of the loader contains NaN or infinite values")
            yield x, y

    @staticmethod
    def _pair(batch: Any, number: int) -> tuple[Tensor, Tensor]:
        if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch):
            return batch[0], batch[1]
        found = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        if isinstance(batch, Mapping):
            found = f"mapping with {', '.join(map(repr, batch))}"
        raise TypeError(
            f"batch {number} is a {found}, and a pair of tensors (inputs, targets) is needed: say how to make one with "
            "adapt=lambda batch: (batch['inputs'], batch['targets']); several inputs of a sample go into one tensor that the model takes apart"
        )


def terms(loss: nn.Module, targets: Tensor) -> float:
    """What the mean of this loss over these targets divides by, so that sums over batches make the mean over all of them.

    Raises:
        ValueError: the loss is none that is known; it can be summed.
    """
    if isinstance(loss, nn.KLDivLoss) and loss.reduction == "batchmean":
        return float(len(targets))
    if isinstance(loss, EACH_ENTRY):
        return float(targets.numel())
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        if targets.is_floating_point():  # class probabilities, (B, C, ...)
            return targets.numel() / targets.shape[1]
        counted = targets != loss.ignore_index
        if loss.weight is None:
            return float(counted.sum().item())
        return loss.weight[targets.where(counted, 0)].where(counted, 0.0).sum().item()
    raise ValueError(
        f"by what the mean of {loss} divides is not known, so its batches cannot be added up: use reduction='sum'"
    )


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
