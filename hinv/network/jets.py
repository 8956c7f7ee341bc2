"""Jets: a function's value, its first derivatives and one sum of its second ones, carried forward through a network together (the forward Laplacian).

    position   0        1 .. d          d + 1
    holds      u        du/dx_i         L u = sum_i c_i d^2u/dx_i^2        c = (1, ..., 1): the Laplacian

    through s = W z + b             each position by itself; b is a constant, so its derivatives are zero: s_t = W z_t + (t = 0) b
    through z = sigma(s)            z_0 = sigma(s_0),  z_i = sigma'(s_0) s_i,  z_{d+1} = sigma'(s_0) s_{d+1} + sigma''(s_0) sum_i c_i s_i^2

The last is the chain rule twice: d^2 sigma(s)/dx_i^2 = sigma''(s) (ds/dx_i)^2 + sigma'(s) d^2s/dx_i^2, times c_i and summed over i. So derivatives in x cost
d + 2 passes forward and none backward, and the network is a chain of stages again, whose curvature hinv knows.

Source: Li et al., Nature Machine Intelligence 6 (2024), arXiv:2307.08214 (forward Laplacian); here with weights c, so that a heat equation's L leaves time out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import grad

from hinv.shapes import Float

from .shared import SharedLinear
from .stages import ELEMENTWISE, RESHAPES

__all__ = ["Jet", "lift", "network"]


class Jet(nn.Module):
    """An activation on jets (B, d + 2, a), by its first two derivatives.

    Args:
        activation: applied entry by entry and three times differentiable in the weights' neighbourhood (a kink has no second derivative to carry).
        second: (d,) the c_i of L = sum_i c_i d^2/dx_i^2.
    """

    second: Tensor

    def __init__(self, activation: nn.Module, second: Sequence[float], dtype: torch.dtype | None = None):
        super().__init__()
        self.activation = activation
        self.register_buffer("second", torch.tensor(second, dtype=dtype or torch.get_default_dtype()))

    def forward(self, input: Float[Tensor, "B T a"]) -> Float[Tensor, "B T a"]:
        s, first, L = input[:, 0], input[:, 1:-1], input[:, -1]
        value, slope, bend = self._derivatives(s)
        squares = torch.einsum("i,bia->ba", self.second, first.square())
        return torch.cat([value[:, None], slope[:, None] * first, (slope * L + bend * squares)[:, None]], 1)

    def _derivatives(self, s: Float[Tensor, "B a"]) -> tuple[Tensor, Tensor, Tensor]:
        """sigma, sigma' and sigma'' at s, each differentiable again."""
        if (
            type(self.activation) is nn.Tanh
        ):  # what most networks of this kind have, at a third of the general way's time
            t = s.tanh()
            slope = 1.0 - t.square()
            return t, slope, -2.0 * t * slope

        def first(s: Tensor) -> Tensor:
            return grad(lambda s: self.activation(s).sum())(s)

        return self.activation(s), first(s), grad(lambda s: first(s).sum())(s)


def lift(points: Float[Tensor, "B d"]) -> Float[Tensor, "B T d"]:
    """The jets of the coordinates themselves, (B, d + 2, d): the point, the identity (dx_j/dx_i), and no second derivatives."""
    batch, d = points.shape
    eye = torch.eye(d, dtype=points.dtype, device=points.device).expand(batch, d, d)
    return torch.cat([points[:, None], eye, torch.zeros_like(points)[:, None]], 1)


def network(model: nn.Sequential, second: Sequence[float] | None = None) -> nn.Sequential:
    """The network of jets of a plain one, on the same parameters: network(model)(lift(x)) is (B, d + 2, outputs), and position 0 of it is model(x).

    Train the one, evaluate the other. What it puts out goes into a loss directly, or through a last module of yours that makes residuals of it.

    Args:
        model: nn.Sequential of Linear and elementwise activations, x of d coordinates to any number of outputs.
        second: (d,) the c_i of L = sum_i c_i d^2/dx_i^2; all one, the Laplacian, by default. For u_t - u_xx in (t, x): (0, 1).

    Cost: d + 2 times that of the plain network.

    Raises:
        TypeError: a module that jets do not go through, by name. ValueError: second has not one entry a coordinate.

    Example:
        >>> u = hinv.tall_skinny([2, 64, 64, 48, 48, 1])
        >>> jet = hinv.jets.network(u)(hinv.jets.lift(x))  # (B, 4, 1)
        >>> jet[:, 3]  # the Laplacian of u at x
    """
    leaves = [(n, m) for n, m in model.named_modules() if not isinstance(m, nn.Sequential)]
    weight = next((m.weight for _, m in leaves if type(m) is nn.Linear), None)
    if weight is None:
        raise TypeError("jets go through a network that has nn.Linear layers, and this one has none")
    d, dtype = weight.shape[1], weight.dtype
    c = (1.0,) * d if second is None else tuple(map(float, second))
    if len(c) != d:
        raise ValueError(f"second has {len(c)} entries, and the network takes {d} coordinates: give one for each")
    modules: list[nn.Module] = []
    for name, module in leaves:
        if type(module) is nn.Linear:
            modules.append(_shared(module, d))
        elif type(module) in ELEMENTWISE and type(module) not in RESHAPES:
            modules.append(Jet(module, c, dtype).to(weight.device))
        else:
            raise TypeError(
                f"'{name}' ({type(module).__name__}): jets go through nn.Linear and elementwise activations; write the network with these alone"
            )
    return nn.Sequential(*modules)


def _shared(linear: nn.Linear, d: int) -> SharedLinear:
    """The same parameters, with the bias on the value alone."""
    shared = SharedLinear(1, 1, (1.0, *[0.0] * (d + 1)), linear.weight.dtype)
    shared.in_features, shared.out_features = linear.in_features, linear.out_features
    shared.weight, shared.bias = linear.weight, linear.bias
    return shared.to(linear.weight.device)
