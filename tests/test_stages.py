"""Derivative blocks of single stages: against the definition, finite differences, and closed forms."""

import dataclasses

import jaxtyping
import pytest
import torch
from conftest import ElementaryLayerNorm, build, relative
from torch import nn

from hinv.network import losses
from hinv.network.blocks import check_against_autograd, check_symmetry, derivatives, fuse
from hinv.network.chain import Chain

CASES = [
    "tanh, cross-entropy",
    "layernorm",
    "convolution",
    "residual blocks",
    "softplus, BCE",
    "gelu, weighted sum",
    "max pooling",
]


def full(matrix):
    return torch.diag_embed(matrix) if matrix.ndim == 2 else matrix


def contracted(stage, n):
    """(x, z) -> b_n . f(z; x) for sample n."""
    b = stage.b.flatten(1)[n]
    if type(stage.module) is nn.LayerNorm:
        stage.module.__class__ = ElementaryLayerNorm
    return lambda x, z: stage.per_sample(x, z.view_as(stage.inputs[n])) @ b


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_their_definition(name):
    """A and J by torch.func.jacrev, E, F and G by torch.func.hessian, sample by sample."""
    chain = Chain(*build(name))
    for stage in chain.stages[1:]:
        D, x = derivatives(stage), stage.x
        E = torch.zeros_like(D.E)
        for n, z in enumerate(stage.inputs):
            z = z.flatten()
            f = lambda x, z, n=n, stage=stage: stage.per_sample(x, z.view_as(stage.inputs[n]))
            torch.testing.assert_close(full(D.A)[n], torch.func.jacfwd(f, argnums=1)(x, z))
            (Exx, Exz), (_, Ezz) = torch.func.hessian(contracted(stage, n), argnums=(0, 1))(x, z)
            torch.testing.assert_close(full(D.G)[n], Ezz)
            if len(x):
                torch.testing.assert_close(D.J[n], torch.func.jacfwd(f, argnums=0)(x, z))
                torch.testing.assert_close(D.F[n], Exz)
                E += Exx
        torch.testing.assert_close(D.E, E)


@pytest.mark.parametrize(
    "activation", [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softsign]
)
def test_elementwise_by_finite_differences(activation):
    """sigma' and sigma'' by central differences: autograd does not judge itself."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), activation()).double()
    chain = Chain(model, lambda out, y: (out * y).sum(), torch.randn(5, 3).double(), torch.randn(5, 4).double())
    stage = chain.stages[1]
    D, sigma, s, h = derivatives(stage), stage.module, stage.inputs, 1e-4
    slope = (sigma(s + h) - sigma(s - h)) / (2 * h)
    bend = (sigma(s + h) - 2 * sigma(s) + sigma(s - h)) / h**2
    torch.testing.assert_close(D.A, slope, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(D.G, stage.b * bend, rtol=1e-5, atol=1e-6)


def test_tanh_and_relu_closed_forms():
    for activation, first, second in (
        (nn.Tanh(), lambda s: 1 - s.tanh() ** 2, lambda s: -2 * s.tanh() * (1 - s.tanh() ** 2)),
        (nn.ReLU(), lambda s: (s > 0).double(), torch.zeros_like),
        (nn.Identity(), torch.ones_like, torch.zeros_like),
    ):
        model = nn.Sequential(nn.Linear(3, 4), activation).double()
        stage = Chain(
            model, lambda out, y: (out * y).sum(), torch.randn(5, 3).double(), torch.ones(5, 4).double()
        ).stages[1]
        D = derivatives(stage)
        torch.testing.assert_close(D.A, first(stage.inputs))
        torch.testing.assert_close(D.G, stage.b * second(stage.inputs))


@pytest.mark.parametrize("name", ["tanh, cross-entropy", "residual blocks", "convolution"])
def test_fused_stage_is_the_derivative_of_the_composition(name):
    chain = Chain(*build(name))
    stages = chain.stages
    k = next(i for i in range(1, len(stages) - 1) if stages[i].parameters and not stages[i + 1].parameters)
    inner, outer = stages[k], stages[k + 1]
    D = fuse(derivatives(inner), derivatives(outer))
    E = torch.zeros_like(D.E)
    for n, z in enumerate(inner.inputs):
        b = outer.b.flatten(1)[n]
        through = lambda x, z, n=n: outer.per_sample(
            outer.x, inner.per_sample(x, z.view_as(inner.inputs[n])).view_as(outer.inputs[n])
        )
        phi = lambda x, z, b=b, through=through: through(x, z) @ b
        torch.testing.assert_close(D.A[n], torch.func.jacfwd(through, argnums=1)(inner.x, z.flatten()))
        torch.testing.assert_close(D.J[n], torch.func.jacfwd(through, argnums=0)(inner.x, z.flatten()))
        (Exx, Exz), (_, Ezz) = torch.func.hessian(phi, argnums=(0, 1))(inner.x, z.flatten())
        torch.testing.assert_close(D.F[n], Exz)
        torch.testing.assert_close(D.G[n], Ezz)
        E += Exx
    torch.testing.assert_close(D.E, E)


def test_loss_curvature_closed_forms():
    torch.manual_seed(2)
    out, y, B, C = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 0]), 5, 4
    p = out.softmax(1)
    softmax = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    cases = [
        (nn.CrossEntropyLoss(), y, softmax / B),
        (nn.CrossEntropyLoss(reduction="sum"), y, softmax),
        (nn.CrossEntropyLoss(label_smoothing=0.2), y, softmax / B),  # smoothing moves the targets, not the curvature
        (nn.MSELoss(), out * 0, torch.eye(C).double().expand(B, C, C) * 2 / (B * C)),
        (nn.BCEWithLogitsLoss(), (out > 0).double(), torch.diag_embed(out.sigmoid() * (1 - out.sigmoid())) / (B * C)),
        (lambda o, t: (o * t).sum(), out, torch.zeros(B, C, C).double()),
    ]
    for loss, targets, expected in cases:
        torch.testing.assert_close(losses.curvature(loss, out, targets), expected)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    weighted = losses.curvature(nn.CrossEntropyLoss(weight=weight), out, y)
    torch.testing.assert_close(weighted, softmax * (weight[y] / weight[y].sum())[:, None, None])
    ignoring = losses.curvature(nn.CrossEntropyLoss(ignore_index=0), out, y)
    torch.testing.assert_close(ignoring, softmax * ((y != 0) / (y != 0).sum())[:, None, None])
    torch.testing.assert_close(losses.gradient(nn.CrossEntropyLoss(), out, y), (p - torch.eye(C)[y]) / B)
    assert relative(losses.gradient(nn.MSELoss(), out, out * 0), 2 * out / (B * C)) < 1e-15


def test_derivatives_that_autograd_denies_are_refused():
    """The check that guards against wrong torch.func rules: a block off by 1 percent is caught and the stage named."""
    chain = Chain(*build("layernorm"))
    stage = next(s for s in chain.stages if s.name == "1")
    D = derivatives(stage)
    for field in ("A", "J", "E", "F", "G"):
        block = getattr(D, field)
        wrong = dataclasses.replace(D, **{field: block * 1.01 + 0.01 * (field == "E")})
        with pytest.raises(RuntimeError, match=r"stage '1' \(LayerNorm\): torch.func and autograd disagree"):
            check_against_autograd(stage, wrong)
    check_against_autograd(stage, D)


@pytest.mark.parametrize("name", ["grad", "jacrev"])
def test_where_torch_func_is_wrong_autograd_takes_its_place(monkeypatch, name):
    """Not only does the check work: it is made. torch.func's answers are falsified by one percent, and the blocks are right all the same."""
    chain = Chain(*build("layernorm"))
    stage = next(s for s in chain.stages if s.name == "1")
    honest = getattr(torch.func, name)

    def scaled(*args, **kwargs):
        function = honest(*args, **kwargs)
        return lambda *x: torch.utils._pytree.tree_map(lambda t: 1.01 * t, function(*x))

    monkeypatch.setattr(f"hinv.network.blocks.{name}", scaled)
    blocks = derivatives(stage)
    monkeypatch.undo()
    for field in ("A", "J", "E", "F", "G"):
        torch.testing.assert_close(getattr(blocks, field), getattr(derivatives(stage), field))


def test_a_derivative_that_is_not_symmetric_is_refused_where_only_autograd_vouches_for_it():
    stage = Chain(*build("layernorm")).stages[1]
    D = derivatives(stage)
    check_symmetry(stage, D)
    with pytest.raises(
        RuntimeError, match=r"stage '1' \(LayerNorm\): its second derivative by autograd is not symmetric"
    ):
        check_symmetry(stage, dataclasses.replace(D, G=D.G.triu()))


def test_types_and_shapes_are_enforced_while_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError, match="semidefinite"):
        losses.semidefinite(torch.ones(2))
