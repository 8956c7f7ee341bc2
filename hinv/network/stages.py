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

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parameters_to_vector

from hinv.draws import normal, seeded
from hinv.shapes import Float

# An activation applied entry by entry, or a change of shape: with flattened samples its Jacobian is diagonal.
ELEMENTWISE = (
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.ReLU, nn.LeakyReLU, nn.Softsign),
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout),
)


NOT_YET = torch.empty(0, device="cpu")  # b and slope of a stage before the walk backwards


@dataclass(repr=False)
class Stage:
    """One module of the pipeline with its input z_{l-1}, its output z_l, the backward signal b_l and, if elementwise, its slope (B, a)."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]  # the trainable ones
    inputs: Tensor
    outputs: Tensor
    b: Tensor = NOT_YET
    slope: Float[Tensor, "..."] = NOT_YET

    @property
    def kind(self) -> str:
        """How the derivatives are found: "linear", "elementwise", or "general" (torch.func)."""
        if (
            type(self.module) is nn.Linear
            and self.inputs.ndim == 2
            and len(self.parameters) == len(list(self.module.parameters()))
        ):
            return "linear"
        return "elementwise" if type(self.module) in ELEMENTWISE else "general"

    @property
    def weight(self) -> Float[Tensor, "a_out ..."]:
        """Of a linear stage or a convolution, detached."""
        return cast(Tensor, self.module.weight).detach()

    @property
    def has_bias(self) -> bool:
        """Whether a linear stage or a convolution has one."""
        return self.module.bias is not None

    @property
    def x(self) -> Float[Tensor, " p"]:
        """(p_l,) the parameters, detached."""
        if not self.parameters:
            return self.inputs.new_zeros(0)
        return parameters_to_vector(self.parameters.values()).detach()

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


def derivatives(stage: Stage, wrt_input: bool = True) -> Derivatives:
    """First and contracted second derivatives of a stage; those in its input only if `wrt_input`.

    Linear and elementwise stages in closed form, anything else by torch.func at B (a_out + p + a_in) backward passes,
    vectorized over samples.
    """
    return {"linear": _linear, "elementwise": _elementwise, "general": _general}[stage.kind](stage, wrt_input)


def check(stage: Stage) -> None:
    """Refuse a general stage that cannot be differentiated twice, by trying on its first two samples.

    Raises:
        ValueError: naming the stage, with torch's reason.
    """
    if stage.kind != "general":
        return
    few = dataclasses.replace(stage, inputs=stage.inputs[:2], outputs=stage.outputs[:2], b=stage.b[:2])
    try:
        _general(few, wrt_input=True)
    except Exception as error:
        raise ValueError(
            f"{stage} cannot be differentiated twice, one sample at a time; write it with elementary operations "
            f"(attention: under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)). torch says: {error}"
        ) from error


def _linear(stage: Stage, wrt_input: bool) -> Derivatives:
    """s_o = sum_i W_oi z_i + bias_o:  A = W,  J dW = dW z,  F couples dW_oi with dz_i through b_o,  E = G = 0."""
    W, z, b = stage.weight, stage.inputs, stage.b
    (batch, a_in), a_out = z.shape, W.shape[0]
    eye_out, eye_in = (torch.eye(n, dtype=W.dtype, device=W.device) for n in (a_out, a_in))
    J = torch.einsum("op,ni->nopi", eye_out, z).reshape(batch, a_out, a_out * a_in)
    if stage.has_bias:
        J = torch.cat([J, eye_out.expand(batch, a_out, a_out)], dim=2)
    p = J.shape[2]
    if not wrt_input:
        return Derivatives(J, W.new_zeros(p, p))
    F = W.new_zeros(batch, p, a_in)
    F[:, : a_out * a_in] = torch.einsum("no,ij->noij", b, eye_in).reshape(batch, a_out * a_in, a_in)
    return Derivatives(J, W.new_zeros(p, p), W.expand(batch, a_out, a_in), F, W.new_zeros(batch, a_in, a_in))


def elementwise(stage: Stage) -> tuple[Float[Tensor, "B a"], Float[Tensor, "B a"]]:
    """z = sigma(s) entry by entry: sigma'(s) and b sigma''(s), each (B, a), by differentiating the sum of all entries twice."""
    z = stage.inputs.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(stage.module(z.clone()).sum(), z, create_graph=True)
        bend = torch.zeros_like(z)
        if slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), z, materialize_grads=True)
    return slope.detach().flatten(1), stage.b.flatten(1) * bend.flatten(1)


def _elementwise(stage: Stage, wrt_input: bool) -> Derivatives:
    slope, bend = elementwise(stage)
    batch, a = slope.shape
    J, E = slope.new_zeros(batch, a, 0), slope.new_zeros(0, 0)
    if not wrt_input:
        return Derivatives(J, E)
    return Derivatives(J, E, A=slope, F=slope.new_zeros(batch, 0, a), G=bend)


def _general(stage: Stage, wrt_input: bool) -> Derivatives:
    f, x, z, b = stage.per_sample, stage.x, stage.inputs, stage.b.flatten(1)
    batch, p, a_in = len(z), len(x), z[0].numel()

    def phi(x: Tensor, z: Tensor, b: Tensor) -> Tensor:
        return f(x, z) @ b

    def total(x: Tensor) -> Tensor:
        return vmap(phi, in_dims=(None, 0, 0))(x, z, b).sum()

    def over_samples(function: Callable[..., Tensor]) -> Tensor:
        return vmap(function, in_dims=(None, 0, 0))(x, z, b)

    has_parameters = p > 0  # torch.func differentiates nothing with respect to an empty tensor
    J = vmap(jacrev(f), in_dims=(None, 0))(x, z) if has_parameters else z.new_zeros(batch, b.shape[1], 0)
    E = jacrev(grad(total))(x) if has_parameters else z.new_zeros(0, 0)
    if wrt_input:
        F = over_samples(jacrev(grad(phi), argnums=1)) if has_parameters else z.new_zeros(batch, 0, a_in)
        A = vmap(jacrev(f, argnums=1), in_dims=(None, 0))(x, z).reshape(batch, -1, a_in)
        G = over_samples(jacrev(grad(phi, argnums=1), argnums=1)).reshape(batch, a_in, a_in)
        result = Derivatives(J, E, A, F.reshape(batch, p, a_in), G)
    else:
        result = Derivatives(J, E)
    _check_against_autograd(stage, result)
    return result


def _check_against_autograd(stage: Stage, D: Derivatives) -> None:
    """One random second-order product of the blocks against plain double backward.

    Not idle: in torch 2.14 torch.func.hessian of a LayerNorm is wrong in the first digit (its weight against its input), while
    double backward is right. A wrong block must not pass for a curvature.

    Raises:
        RuntimeError: naming the stage.
    """
    generator = seeded(0)
    z = stage.inputs.detach().requires_grad_()
    leaves = [*stage.parameters.values(), z]
    with torch.enable_grad():
        phi = (stage.module(z.clone()) * stage.b).sum()
        first = torch.autograd.grad(phi, leaves, create_graph=True, materialize_grads=True)
    moves = [normal(t.shape, t, generator) for t in leaves]
    if D.A is None:
        moves[-1].zero_()
    live = [(g, v) for g, v in zip(first, moves, strict=True) if g.requires_grad]
    if live:
        *second, second_z = torch.autograd.grad(
            [g for g, _ in live], leaves, [v for _, v in live], materialize_grads=True
        )
    else:
        *second, second_z = (torch.zeros_like(t) for t in leaves)
    v_x, v_z = _flat(moves[:-1], z), moves[-1].flatten(1)
    pairs = [(D.J.flatten(0, 1).T @ stage.b.flatten(), _flat(first[:-1], z))]
    if D.A is None:
        pairs.append((D.E @ v_x, _flat(second, z)))
    else:
        assert D.F is not None and D.G is not None
        pairs.append((torch.einsum("noi,no->ni", D.A, stage.b.flatten(1)), first[-1].flatten(1)))
        pairs.append((D.E @ v_x + torch.einsum("npi,ni->p", D.F, v_z), _flat(second, z)))
        pairs.append((torch.einsum("npi,p->ni", D.F, v_x) + torch.einsum("nij,nj->ni", D.G, v_z), second_z.flatten(1)))
    scale = max(reference.abs().max().item() if reference.numel() else 0.0 for _, reference in pairs)
    tolerance = torch.finfo(z.dtype).eps ** 0.5 * scale
    for ours, reference in pairs:
        if ours.numel() and not (ours - reference).abs().max().item() <= tolerance:
            raise RuntimeError(
                f"{stage}: torch.func and autograd disagree about its derivatives, so one of them is wrong for this module "
                f"(torch {torch.__version__}); write the module with elementary operations"
            )


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Float[Tensor, " n"]:
    return torch.cat([t.detach().flatten() for t in tensors]) if tensors else like.new_zeros(0)


def fuse(inner: Derivatives, outer: Derivatives) -> Derivatives:
    """Derivatives of outer(inner(z; x)): the chain rule to second order. `outer` has no parameters, `inner` has some.

    A = A2 A1,  J = A2 J1,  E = E1 + J1^T G2 J1,  F = F1 + J1^T G2 A1,  G = G1 + A1^T G2 A1.
    """
    assert outer.A is not None and outer.G is not None  # it has an input: the inner stage
    GJ = _times(outer.G, inner.J)  # (B, a, p)
    E = inner.E + inner.J.flatten(0, 1).T @ GJ.flatten(0, 1)
    J = _times(outer.A, inner.J)
    if inner.A is None:
        return Derivatives(J, E)
    assert inner.F is not None and inner.G is not None
    G = inner.G + inner.A.mT @ _times(outer.G, inner.A)
    return Derivatives(J, E, _times(outer.A, inner.A), inner.F + GJ.mT @ inner.A, G)


def _times(matrix: Float[Tensor, "B ..."], other: Float[Tensor, "B a n"]) -> Float[Tensor, "B m n"]:
    """matrix @ other per sample, where matrix is (B, m, a) or the diagonal (B, a)."""
    return matrix.unsqueeze(2) * other if matrix.ndim == 2 else matrix @ other
