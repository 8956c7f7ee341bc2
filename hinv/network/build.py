"""The networks of the notebooks and tests: tall, skinny, and with a signal that survives the depth."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from hinv.vectors import seeded


def tall_skinny(
    sizes: Sequence[int],
    activation: Callable[[], nn.Module] = nn.Tanh,
    bias: bool = True,
    gain: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Linear(sizes[0], sizes[1]), activation, ..., Linear(sizes[-2], sizes[-1]) with orthogonal weights and small biases.

    Torch's default initialization shrinks the signal of a deep tanh network to nothing; H is then close to 0 and
    (H + eps I)^-1 g = g / eps proves nothing. Orthogonal weights with gain 1 keep ||H|| of order one at hundreds of layers.

    Args:
        sizes: numbers of units, input first, for example (64, *[16] * 20, 10).
        gain: singular value of every weight matrix.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes={tuple(sizes)}: name at least an input and an output size")
    generator = seeded(seed)
    modules: list[nn.Module] = []
    for a_in, a_out in pairwise(sizes):
        linear = nn.Linear(a_in, a_out, bias=bias, dtype=dtype, device="cpu")
        nn.init.orthogonal_(linear.weight, gain, generator=generator)
        if bias:
            nn.init.normal_(linear.bias, std=0.1, generator=generator)
        modules += [linear, activation()]
    return nn.Sequential(*modules[:-1]).to(torch.get_default_device())  # drawn on the CPU: the same on every device
