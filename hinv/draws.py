"""Seeded normal numbers, the same ones on every device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(shape: int | Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers with the dtype and device of `like`, drawn on the CPU whatever the default device; from seed 0 if no generator is given."""
    generator = generator or seeded(0)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
