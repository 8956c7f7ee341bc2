"""A linear layer shared over the positions of a sample whose bias acts on some of them, as it does on the jets of a function."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hinv.shapes import Float


class SharedLinear(nn.Linear):
    """s_t = W z_t + biased_t bias on inputs (B, T, a_in): `nn.Linear` on positions, but the bias only where it belongs.

    A jet (u, du/dx_1, ..., du/dx_d, Laplacian of u) goes through a linear layer position by position, and the derivatives of a constant are zero:
    there biased = (1, 0, ..., 0).

    Args:
        in_features, out_features: a_in, a_out.
        biased: (T,) what the bias is multiplied with at each position.
    """

    biased: Tensor

    def __init__(self, in_features: int, out_features: int, biased: Sequence[float], dtype: torch.dtype | None = None):
        super().__init__(in_features, out_features, dtype=dtype)
        self.register_buffer("biased", torch.tensor(biased, dtype=self.weight.dtype))

    def forward(self, input: Float[Tensor, "B T a_in"]) -> Float[Tensor, "B T a_out"]:
        out = nn.functional.linear(input, self.weight)
        return out if self.bias is None else out + self.biased.unsqueeze(1) * self.bias
