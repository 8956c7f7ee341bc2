"""The paper's layers: each begins with a module that has parameters and takes in the parameter-free ones behind it.

(Linear, then tanh, is one layer.) What comes before the first parameters is folded into the constant z_0; the loss is fused into the last layer, so
z_L is one number. A layer's blocks are those of its stages by the chain rule to second order, the samples of the batch stacked. Inside a residual block a layer's activations
are the whole state, with what passes it by in front.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hinv.modes import exact
from hinv.network import Chain, Derivatives, Stage, losses
from hinv.network.blocks import fuse, on_the_state
from hinv.shapes import Float


@dataclass(frozen=True)
class Layer:
    """One layer of the paper, samples stacked: J (n_out, p), E (p, p), A (n_out, n_in), F (p, n_in), G (n_in, n_in).

    A, F and G are None for the first layer.
    """

    J: Float[Tensor, "n_out p"]
    E: Float[Tensor, "p p"]
    A: Float[Tensor, "n_out n_in"] | None
    F: Float[Tensor, "p n_in"] | None
    G: Float[Tensor, "n_in n_in"] | None

    def double(self) -> "Layer":
        A, F, G = (None if block is None else block.double() for block in (self.A, self.F, self.G))
        return Layer(self.J.double(), self.E.double(), A, F, G)


def split_layers(chain: Chain) -> list[list[Stage]]:
    """The chain's stages grouped into the paper's layers; leading stages without parameters are dropped (constants)."""
    groups: list[list[Stage]] = []
    for stage in chain.stages:
        if stage.parameters:
            groups.append([stage])
        elif groups:
            groups[-1].append(stage)
    return groups


@exact()
def layers(chain: Chain) -> list[Layer]:
    """Derivative blocks of every layer, the loss fused into the last.

    Cost: O(B a p^2 + B a^2 p) flops and p^2 + B a p + (B a)^2 numbers per layer.
    """
    groups = split_layers(chain)
    head = Derivatives(
        J=chain.outputs.new_zeros(0),
        E=chain.outputs.new_zeros(0),
        A=chain.stages[-1].b.flatten(1).unsqueeze(1),  # (B, 1, C): the loss adds up the samples
        G=losses.curvature(chain.loss, chain.outputs, chain.targets),
    )
    out = []
    for number, group in enumerate(groups):
        block = on_the_state(group[0], wrt_input=number > 0)
        for stage in group[1:]:
            block = fuse(block, on_the_state(stage))
        last = number == len(groups) - 1
        out.append(_stack(fuse(block, head) if last else block, last))
    return out


def _stack(block: Derivatives, last: bool) -> Layer:
    """Per-sample blocks -> one layer over the stacked batch (A and G block-diagonal over samples, J and F side by side)."""
    J = block.J.sum(0) if last else block.J.flatten(0, 1)
    if block.A is None:
        return Layer(J, block.E, None, None, None)
    assert block.F is not None and block.G is not None
    A = block.A.transpose(0, 1).flatten(1) if last else torch.block_diag(*block.A)
    return Layer(J, block.E, A, block.F.transpose(0, 1).flatten(1), torch.block_diag(*block.G))


@runtime_checkable
class Layered(Protocol):
    """What the functions of this room ask of their H: an `hinv.Hessian` has both."""

    @property
    def chain(self) -> Chain: ...

    @property
    def layers(self) -> list[Layer]: ...
