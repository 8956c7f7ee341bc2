"""Derivatives of one stage z_l = f_l(z_{l-1}; x_l), one set per sample, second derivatives contracted with b_l.

    symbol  shape            meaning
    A       (B, a_out, a_in) grad_z f      (B, a) when diagonal (elementwise stages)
    J       (B, a_out, p)    grad_x f
    E       (p, p)           sum_n b_n . grad_xx f
    F       (B, p, a_in)     b_n . grad_zx f
    G       (B, a_in, a_in)  b_n . grad_zz f    (B, a) when diagonal

The paper keeps grad_xx f and its kin as third-order objects and contracts them with D_D and D_M; here the contraction
with b is already done, which is all that the algorithms ever use. A stage without parameters has p = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hinv.shapes import Float
from hinv.vectors import flat

from .shared import SharedLinear
from .skip import Wiring

# An activation applied entry by entry, or a change of shape: with flattened samples its Jacobian is diagonal.
RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)  # the identity on flattened samples
ELEMENTWISE = (
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.ReLU, nn.LeakyReLU, nn.Softsign),
    *RESHAPES,
)


LINEAR = (nn.Linear, SharedLinear)

NOT_YET = torch.empty(0, device="cpu")  # b, slope and second of a stage before the walk backwards


@dataclass(repr=False)
class Stage:
    """One module of the pipeline with its input z_{l-1}, its output z_l, the backward signal b_l and, if elementwise, its slope and second derivative (B, a)."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]  # the trainable ones
    inputs: Tensor
    outputs: Tensor
    carried: tuple[int, ...] = ()  # entries a sample of the state's segments that pass it by (`network.skip`)
    b: Tensor = NOT_YET
    slope: Float[Tensor, "..."] = NOT_YET
    second: Float[Tensor, "..."] = NOT_YET

    @cached_property
    def kind(self) -> str:
        """How the derivatives are found: "linear", "elementwise", "wiring", or "general" (torch.func)."""
        if isinstance(self.module, Wiring):
            return "wiring"
        if type(self.module) in LINEAR and len(self.parameters) == len(list(self.module.parameters())):
            return "linear"
        return "elementwise" if type(self.module) in ELEMENTWISE else "general"

    @property
    def bend(self) -> Float[Tensor, "B a"]:
        """The diagonal of G of an elementwise stage: b sigma''(s)."""
        return self.b.flatten(1) * self.second

    @property
    def weight(self) -> Float[Tensor, "a_out ..."]:
        """Of a linear stage or a convolution, detached."""
        return cast(Tensor, self.module.weight).detach()

    @property
    def has_bias(self) -> bool:
        """Whether a linear stage or a convolution has one."""
        return self.module.bias is not None

    @property
    def carry(self) -> int:
        """Entries a sample that pass it by; its own input, and its own output, are the rest of the state."""
        return sum(self.carried)

    @property
    def segments(self) -> tuple[int, ...]:
        """Entries a sample of the state's segments before it."""
        return (*self.carried, self.inputs[0].numel())

    @property
    def wiring(self) -> Wiring:
        return cast(Wiring, self.module)

    @property
    def rows(self) -> Float[Tensor, "BT a_in"]:
        """The inputs of a linear stage, which it maps one by one: samples, or positions of samples (the second to last dimension and those before)."""
        return self.inputs.reshape(-1, self.inputs.shape[-1])

    @property
    def signal(self) -> Float[Tensor, "BT a_out"]:
        """b of a linear stage, row by row."""
        return self.b.reshape(-1, self.b.shape[-1])

    @property
    def ones(self) -> Float[Tensor, "BT columns"]:
        """What the bias is multiplied with in each row, in one column; without a bias in none."""
        rows = self.rows
        if not self.has_bias:
            return rows[:, :0]
        if isinstance(self.module, SharedLinear):
            return self.module.biased.repeat(len(self.inputs)).unsqueeze(1)
        return torch.ones_like(rows[:, :1])

    def by_rows(self) -> "Stage":
        """The same stage with positions for samples, where it treats them independently: a normalization over the last dimension."""
        if not (
            type(self.module) in (nn.LayerNorm, nn.RMSNorm)
            and len(cast(nn.LayerNorm, self.module).normalized_shape) == 1
        ):
            return self
        outputs = self.outputs.reshape(-1, self.outputs.shape[-1])
        return replace(self, inputs=self.rows, outputs=outputs, b=self.signal)

    @property
    def x(self) -> Float[Tensor, " p"]:
        """(p_l,) the parameters, detached."""
        return flat(self.parameters.values(), self.inputs)

    def named(self, x: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """A flat parameter vector (p_l,) taken apart under the parameters' names, for functional_call."""
        pieces = x.split([p.numel() for p in self.parameters.values()]) if self.parameters else []
        return {name: v.view_as(p) for (name, p), v in zip(self.parameters.items(), pieces, strict=True)}

    def per_sample(self, x: Float[Tensor, " p"], z: Float[Tensor, "..."]) -> Float[Tensor, " a"]:
        """f_l for one sample: parameters (p_l,) and an input without batch dimension -> flattened output (a_l,)."""
        return functional_call(
            self.module, self.named(x), (z.unsqueeze(0).clone(),)
        ).flatten()  # cloned: it may work in place

    def __repr__(self) -> str:
        a_in, a_out = (tuple(t.shape[1:]) for t in (self.inputs, self.outputs))
        return f"Stage({self.name!r}, {self.module.__class__.__name__}, {self.kind}, {a_in} -> {a_out})"

    def __str__(self) -> str:
        return f"stage '{self.name}' ({self.module.__class__.__name__})"


@dataclass(frozen=True)
class Derivatives:
    """See the module's table. A, F and G are None where the stage's input is a constant (the first one with parameters)."""

    J: Float[Tensor, "..."]
    E: Float[Tensor, "..."]
    A: Float[Tensor, "B ..."] | None = None
    F: Float[Tensor, "B p a_in"] | None = None
    G: Float[Tensor, "B ..."] | None = None


def differentiate(stages: Sequence[Stage]) -> None:
    """slope = sigma'(s) and second = sigma''(s), each (B, a), of elementwise stages: for all of one kind at once, by differentiating the sum of all entries
    twice, as calls cost more than entries where layers are narrow."""
    kinds: dict[str, list[Stage]] = {}
    for stage in stages:
        kinds.setdefault(repr(stage.module), []).append(stage)  # class and settings
    for alike in kinds.values():
        z = flat(stage.inputs for stage in alike)
        if isinstance(alike[0].module, RESHAPES):
            slope, second = torch.ones_like(z), torch.zeros_like(z)
        else:
            slope, second = _differentiated(alike[0].module, z)
        sizes = [stage.inputs.numel() for stage in alike]
        for stage, first, bend in zip(alike, slope.split(sizes), second.split(sizes), strict=True):
            stage.slope, stage.second = (t.view(len(stage.inputs), -1) for t in (first, bend))


def _differentiated(module: nn.Module, z: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    z = z.requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(module(z.clone()).sum(), z, create_graph=True)
        second = torch.zeros_like(z)
        if slope.requires_grad:
            (second,) = torch.autograd.grad(slope.sum(), z, materialize_grads=True)
    return slope.detach(), second
