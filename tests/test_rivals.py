"""The methods that hinv is compared with do what their papers say."""

import copy

import pytest
import torch
from conftest import relative
from torch import nn
from torch.nn.utils import parameters_to_vector

from hinv import GGN, Hessian, optim, tall_skinny
from hinv.companion import rivals, training

LOSS = nn.CrossEntropyLoss()


def problem(sizes=(6, 5, 5, 4), bias=True):
    x = torch.randn(12, sizes[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return tall_skinny(sizes, bias=bias, gain=1.2), x, torch.arange(12) % sizes[-1]


def position(model):
    return parameters_to_vector(model.parameters()).detach()


def test_conjugate_gradients_end_at_the_solution_and_their_model_falls():
    model, x, y = problem()
    G = GGN(model, LOSS, x, y)
    matrix = G.dense() + 0.1 * torch.eye(G.shape[0], dtype=G.dtype)
    iterates = rivals.conjugate_gradients(G, 0.1, G.gradient, torch.zeros_like(G.gradient), 10**4)
    assert relative(iterates[-1], torch.linalg.solve(matrix, G.gradient)) < 1e-2
    models = [(0.5 * d @ matrix @ d - d @ G.gradient).item() for d in iterates]
    assert models == sorted(models, reverse=True) and len(models) > 5
    one = rivals.conjugate_gradients(G, 0.1, G.gradient, torch.zeros_like(G.gradient), 1)[-1]
    g = G.gradient
    torch.testing.assert_close(one, (g @ g) / (g @ matrix @ g) * g)  # the best multiple of the gradient


def test_conjugate_gradients_stop_before_negative_curvature():
    model, x, y = problem()
    H = Hessian(model, LOSS, x, y)
    matrix = H.dense()
    assert torch.linalg.eigvalsh(matrix)[0] < -1e-3
    for d in rivals.conjugate_gradients(H, 1e-4, H.gradient, torch.zeros_like(H.gradient), 250)[1:]:
        assert (d @ H.gradient).item() > 0  # each is a way down


@pytest.mark.parametrize("hessian", [False, True])
def test_hessian_free_falls_to_the_minimum(hessian):
    model, x, y = problem()
    descent = rivals.HessianFree(model, LOSS, damping=0.1, hessian=hessian)
    reports = [descent.step(x, y) for _ in range(40)]
    assert all(r.loss_after <= r.loss for r in reports if r.accepted)
    assert reports[-1].loss < 1e-2 * reports[0].loss


def test_a_step_with_cg_to_the_end_is_a_gauss_newton_step():
    model, x, y = problem()
    other, before = copy.deepcopy(model), position(model)
    rivals.HessianFree(model, LOSS, damping=10.0).step(x, y)
    optim.GaussNewton(other, LOSS, damping=10.0).step(x, y)
    assert relative(position(model) - before, position(other) - before) < 1e-4


def test_kfac_against_its_kronecker_factors():
    model, x, y = problem((3, 4), bias=False)
    before, W = position(model), model[0].weight
    g = torch.autograd.grad(LOSS(model(x), y), W)[0]
    p = model(x).detach().softmax(1)
    left = torch.stack([torch.diag(q) - torch.outer(q, q) for q in p]).mean(0)
    right = x.T @ x / len(x)
    pi = ((right.trace() / 3) / (left.trace() / 4)).sqrt()  # Martens & Grosse, section 6.3
    damping = 0.3
    left += damping**0.5 / pi * torch.eye(4, dtype=left.dtype)
    right += damping**0.5 * pi * torch.eye(3, dtype=left.dtype)
    rivals.KFAC(model, LOSS, damping=damping).step(x, y)
    expected = (torch.linalg.solve(left, g) @ torch.linalg.inv(right)).flatten()
    torch.testing.assert_close(before - position(model), expected)


@pytest.mark.parametrize("method", ["HessianFree", "KFAC", "SOAP", "Muon", "LBFGS"])
def test_runs_take_rivals_by_name(method, tmp_path):
    options = {"weight_decay": 0.0} if method in ("SOAP", "Muon") else {}
    rate = 0.01 if method in ("SOAP", "Muon") else 1.0 if method != "KFAC" else 0.1
    config = training.Config(
        method, rate, options=options, images=64, widths=(8, 8), bias=False, init="kaiming", activation="ReLU", steps=5
    )
    run = training.run(config, tmp_path / "run", progress=False)
    losses = run.curve("loss")[1]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert run.parameters == 64 * 8 + 8 * 8 + 8 * 10
