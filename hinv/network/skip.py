"""Skip connections: a residual block is a pipeline on a longer state, which carries z along.

    Branch  [..., z] -> [..., z, z]        Merge  [..., z, h] -> [..., z + h]        Swap  [..., z, h] -> [..., h, z]

In between, stages act on the last segment of the state and carry the others: A = I (+) A_own, J = [0; J_own], F = [0, F_own], G = 0 (+) G_own. So every
stage inside keeps its own form, and nothing but these three is new.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hinv.shapes import Float, Inexact


class Residual(nn.Module):
    """z -> skip(z) + body(z), whose inside `hinv.Hessian` walks as stages.

    Every linear layer, activation or normalization inside keeps its structure, where a module of one's own would be one general stage. Blocks may be
    nested; what follows the addition, or comes before it, stands in the `nn.Sequential` around it.

    Args:
        body: an nn.Sequential, or any module.
        skip: by default the identity; a linear projection, or any module, where shapes change.
    """

    def __init__(self, body: nn.Module, skip: nn.Module | None = None):
        super().__init__()
        self.skip, self.body = nn.Identity() if skip is None else skip, body

    def forward(self, z: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        return self.skip(z.clone()) + self.body(z.clone())  # cloned for modules that work in place


class Wiring(nn.Module):
    """A stage that moves and adds whole segments of the state; they may be anything that can be added, and None stands for zero."""

    def forth(self, state: Sequence[Any]) -> list[Any]:
        """The segments behind it."""
        raise NotImplementedError

    def back(self, signals: Sequence[Any]) -> list[Any]:
        """The transpose."""
        raise NotImplementedError

    def sizes(self, segments: Sequence[int]) -> list[int]:
        """Of the segments behind it."""
        return self.forth(segments)


class Branch(Wiring):
    def forth(self, state: Sequence[Any]) -> list[Any]:
        return [*state, state[-1]]

    def back(self, signals: Sequence[Any]) -> list[Any]:
        return [*signals[:-2], added(*signals[-2:])]


class Merge(Wiring):
    def forth(self, state: Sequence[Any]) -> list[Any]:
        return [*state[:-2], added(*state[-2:])]

    def back(self, signals: Sequence[Any]) -> list[Any]:
        return [*signals, signals[-1]]

    def sizes(self, segments: Sequence[int]) -> list[int]:
        return list(segments[:-1])


class Swap(Wiring):
    def forth(self, state: Sequence[Any]) -> list[Any]:
        return [*state[:-2], state[-1], state[-2]]

    def back(self, signals: Sequence[Any]) -> list[Any]:
        return self.forth(signals)


def added(first: Any, second: Any) -> Any:
    return second if first is None else first if second is None else first + second


def on_segments(
    wire: Callable[[Sequence[Any]], list[Any]], t: Inexact[Tensor, "..."], sizes: Sequence[int], dim: int = 0
) -> Inexact[Tensor, "..."]:
    """`forth` or `back` of a wiring along a dimension of a tensor, in which the segments lie one behind the other."""
    return torch.cat(wire(t.split(list(sizes), dim)), dim)


def opened(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted name, module) of every stage of a module; nested Sequentials and residual blocks are opened."""
    kind = type(module)
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        prefix = f"{name}." if name else ""
        return [
            stage for key, child in zip(module._modules, module, strict=True) for stage in opened(prefix + key, child)
        ]
    if isinstance(module, Residual) and kind.forward is Residual.forward:
        body = opened(f"{name}.body", module.body)
        if type(module.skip) is not nn.Identity:
            body = [*opened(f"{name}.skip", module.skip), (f"{name}.swap", Swap()), *body]
        return [(f"{name}.branch", Branch()), *body, (f"{name}.merge", Merge())]
    return [(name, module)]
