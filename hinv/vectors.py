"""Flat vectors: tensors laid end to end, and seeded normal numbers that are the same on every device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hinv.shapes import Float


def flat(tensors: Iterable[Tensor], like: Tensor | None = None) -> Float[Tensor, " n"]:
    """(n,) all entries in order, detached, however each tensor lies in memory; of none, an empty one like `like`."""
    pieces = [t.detach().reshape(-1) for t in tensors]
    if not pieces:
        assert like is not None
        return like.new_zeros(0)
    return torch.cat(pieces)


def normal(shape: int | Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers with the dtype and device of `like`, drawn on the CPU whatever the default device; from seed 0 if no generator is given."""
    generator = generator or seeded(0)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def not_finite(tensors: Sequence[Tensor]) -> int | None:
    """Which is the first of these tensors that holds NaN or infinite values, if one does. Sums first, as they take a third of the calls; they may overflow
    where no entry does."""
    if tensors and torch.stack([t.detach().sum() for t in tensors]).isfinite().all():
        return None
    return next((i for i, t in enumerate(tensors) if not t.isfinite().all()), None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
