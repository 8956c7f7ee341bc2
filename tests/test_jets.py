"""Jets against double backward of the plain network; the curvature, the step and the training of a network that solves an equation."""

import math

import pytest
import torch
from conftest import DEVICE, reference_loss, relative
from torch import nn
from torch.nn.utils import parameters_to_vector

import hinv
from hinv import GGN, Hessian, SharedLinear, jets, optim, tall_skinny
from hinv.solver.dual import Dual

D = torch.float64


class Cube(nn.Module):
    """Not one of torch's: the general way through an activation."""

    def forward(self, z):
        return z + z**3 / 10


def points(batch, d, seed=0):
    return torch.rand(batch, d, generator=torch.Generator(DEVICE).manual_seed(seed), dtype=D)


def by_backward(model, x, second):
    """(B, d + 2, outputs) of a plain network by autograd alone, entry by entry."""
    x = x.clone().requires_grad_()
    columns = []
    for out in model(x).unbind(1):
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        L = torch.zeros_like(out)
        for i, c in enumerate(second):
            (row,) = torch.autograd.grad(first[:, i].sum(), x, retain_graph=True)
            L = L + c * row[:, i]
        columns.append(torch.cat([out[:, None], first, L[:, None]], 1))
    return torch.stack(columns, 2).detach()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.SiLU, nn.GELU])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_jets_are_the_derivatives(d, activation):
    u, x = tall_skinny([d, 7, 6, 2], activation, gain=1.5), points(8, d)
    jet = jets.network(u)(jets.lift(x))
    assert jet.shape == (8, d + 2, 2)
    torch.testing.assert_close(jet[:, 0], u(x), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(jet, by_backward(u, x, [1.0] * d), rtol=1e-10, atol=1e-12)


def test_second_derivatives_are_weighted():
    u, x, second = tall_skinny([3, 6, 6, 1], nn.Softplus), points(7, 3), (0.0, 2.0, -0.5)
    torch.testing.assert_close(jets.network(u, second)(jets.lift(x)), by_backward(u, x, second), rtol=1e-10, atol=1e-12)


def test_of_a_function_known_in_closed_form():
    """tanh(2 x + 3 y): no autograd at all."""
    u = nn.Sequential(nn.Linear(2, 1), nn.Tanh()).double()
    with torch.no_grad():
        u[0].weight.copy_(torch.tensor([[2.0, 3.0]]))
        u[0].bias.fill_(0.25)
    x = points(5, 2)
    t = torch.tanh(x @ torch.tensor([2.0, 3.0], dtype=D) + 0.25)
    slope, bend = 1 - t**2, -2 * t * (1 - t**2)
    expected = torch.stack([t, 2 * slope, 3 * slope, 13 * bend], 1)[..., None]
    torch.testing.assert_close(jets.network(u)(jets.lift(x)), expected, rtol=1e-13, atol=1e-14)


def test_parameters_are_shared_and_layers_without_bias_have_none():
    u = tall_skinny([2, 5, 1], bias=False)
    net = jets.network(nn.Sequential(u))
    assert [id(p) for p in net.parameters()] == [id(p) for p in u.parameters()]
    assert [type(m) for m in net] == [SharedLinear, jets.Jet, SharedLinear]
    x = points(4, 2)
    torch.testing.assert_close(net(jets.lift(x)), by_backward(u, x, [1.0, 1.0]), rtol=1e-10, atol=1e-12)


def test_what_jets_do_not_go_through_is_named():
    with pytest.raises(TypeError, match=r"'1' \(LayerNorm\): jets go through nn.Linear"):
        jets.network(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    with pytest.raises(TypeError, match="has none"):
        jets.network(nn.Sequential(nn.Tanh()))
    with pytest.raises(ValueError, match="second has 1 entries, and the network takes 2 coordinates"):
        jets.network(tall_skinny([2, 3, 1]), (1.0,))


# -- an equation ---------------------------------------------------------------------------------------------------------


class Poisson(nn.Module):
    """(-Laplacian u, u) of a jet."""

    def forward(self, jet):
        return torch.cat([-jet[:, -1], jet[:, 0]], 1)


def squares(outputs, targets):
    """Half the weighted squares; targets (B, 2, 2): what each output should be, and its weight."""
    return 0.5 * (targets[..., 1] * (outputs - targets[..., 0]) ** 2).sum()


def poisson(d=2, sizes=(6, 5), inside=8, side=5, activation=nn.Tanh, seed=0):
    """-Laplacian u = f on the unit cube, u = prod sin(pi x_i); (u's network, that of the residuals, jets, targets)."""
    u = tall_skinny([d, *sizes, 1], activation, seed=seed)
    x, edge = points(inside, d, seed), points(side, d, seed + 1)
    number = torch.arange(side)
    edge[number, number % d] = (number // d % 2).to(D)
    exact = lambda x: torch.sin(math.pi * x).prod(1)
    at = torch.cat([x, edge])
    weights = torch.zeros(inside + side, 2, dtype=D)
    weights[:inside, 0], weights[inside:, 1] = 1.0 / inside, 10.0 / side
    values = torch.stack([d * math.pi**2 * exact(at), exact(at)], 1)
    return u, nn.Sequential(*jets.network(u), Poisson()), jets.lift(at), torch.stack([values, weights], 2), exact


def residuals_jacobian(model, x, y):
    """J (B, P) of the weighted residuals and r (B,), by torch.func on the model as a whole."""

    def function(vector):
        names = [n for n, _ in model.named_parameters()]
        shapes = [p.shape for p in model.parameters()]
        pieces = vector.split([s.numel() for s in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, pieces, shapes, strict=True)}
        out = torch.func.functional_call(model, values, (x,))
        return (y[..., 1].sqrt() * (out - y[..., 0])).sum(1)

    vector = parameters_to_vector(model.parameters()).detach()
    return torch.func.jacrev(function)(vector), function(vector)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU])
@pytest.mark.parametrize(("sizes", "fewer"), [((6, 5), False), ((3,), True)])
def test_gauss_newton_of_an_equation(sizes, fewer, activation):
    """Through the dual, with more and with fewer parameters than residuals, against J^T J; gradients and solves with a small damping."""
    inside = 40 if fewer else 8
    _, model, x, y, _ = poisson(sizes=sizes, inside=inside, activation=activation)
    J, r = residuals_jacobian(model, x, y)
    assert (J.shape[1] < J.shape[0]) == fewer
    G = GGN(model, squares, x, y)
    torch.testing.assert_close(G.dense(), J.T @ J, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(G.gradient, J.T @ r, rtol=1e-9, atol=1e-10)
    for damping in (1.0, 1e-3):
        F = G.factor(damping)
        assert isinstance(F, Dual) and (f"{min(J.shape)} x {min(J.shape)}" in repr(F))
        M = J.T @ J + damping * torch.eye(J.shape[1], dtype=D)
        assert relative(F.solve(G.gradient), torch.linalg.solve(M, J.T @ r)) < 1e-9
        assert F.logdet[1] == pytest.approx(torch.linalg.slogdet(M)[1].item(), rel=1e-10)
        assert F.inverse_trace() == pytest.approx(torch.linalg.inv(M).trace().item(), rel=1e-9)
        assert relative(F.inverse_diagonal(), torch.linalg.inv(M).diagonal()) < 1e-8


def test_hessian_of_an_equation():
    _, model, x, y, _ = poisson(sizes=(4, 3))
    function, vector = reference_loss(model, squares, x, y)
    H = Hessian(model, squares, x, y)
    dense = torch.func.hessian(function)(vector)
    assert relative(H.dense(), dense) < 1e-9
    M = dense + 0.5 * torch.eye(len(dense), dtype=D)
    assert relative(H.solve(H.gradient, 0.5), torch.linalg.solve(M, H.gradient)) < 1e-7


# -- the step ------------------------------------------------------------------------------------------------------------


def definition(J, r, damping, previous):
    """argmin |J d - r|^2 + damping |d - previous|^2, as one dense least-squares problem."""
    A = torch.cat([J, damping**0.5 * torch.eye(J.shape[1], dtype=D)])
    b = torch.cat([r, damping**0.5 * previous])
    return torch.linalg.lstsq(A.cpu(), b[:, None].cpu(), driver="gelsd").solution[:, 0].to(A.device)


@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("damping", [1e-1, 1e-8])
def test_springs_step_is_its_least_squares_problem(damping, fewer):
    _, model, x, y, _ = poisson(sizes=(3,) if fewer else (6, 5), inside=40 if fewer else 8)
    descent = optim.GaussNewton(model, squares, damping=damping, adapt=1, accept=False, momentum=0.7)
    previous = None
    for _ in range(3):
        J, r = residuals_jacobian(model, x, y)
        before = parameters_to_vector(model.parameters()).detach()
        expected = definition(J, r, damping, torch.zeros_like(before) if previous is None else 0.7 * previous)
        descent.step(x, y)
        previous = before - parameters_to_vector(model.parameters()).detach()
        assert relative(previous, expected) < (1e-9 if damping == 1e-1 else 1e-4)
        with torch.no_grad():  # a tenth of the step, so that the next one starts somewhere sensible
            nn.utils.vector_to_parameters(before - 0.1 * previous, list(model.parameters()))


def test_momentum_where_the_matrix_is_kept_or_stagewise(monkeypatch):
    """(G + eps I)^-1 (g + eps mu d) with a kept matrix, without the dual's own formula."""
    _, model, x, y, _ = poisson()
    descent = optim.GaussNewton(model, squares, damping=0.5, adapt=1, accept=False, every=2, momentum=0.6)
    J, _ = residuals_jacobian(model, x, y)
    M = J.T @ J + 0.5 * torch.eye(J.shape[1], dtype=D)
    positions = [parameters_to_vector(model.parameters()).detach()]
    for k in range(2):
        _, r = residuals_jacobian(model, x, y)
        Jk, _ = residuals_jacobian(model, x, y)
        prior = torch.zeros_like(positions[0]) if k == 0 else 0.6 * (positions[-2] - positions[-1])
        expected = torch.linalg.solve(M, Jk.T @ r + 0.5 * prior)
        descent.step(x, y)
        positions.append(parameters_to_vector(model.parameters()).detach())
        assert relative(positions[-2] - positions[-1], expected) < 1e-9


def test_a_step_from_the_residuals_keeps_its_digits():
    """At a damping of 1e-11 the difference of `solve` has lost five digits more than the residuals' own formula."""
    _, model, x, y, _ = poisson()
    J, r = residuals_jacobian(model, x, y)
    F = GGN(model, squares, x, y).factor(1e-11)
    U, S, Vh = torch.linalg.svd(J, full_matrices=False)
    exact = Vh.T @ ((S / (S**2 + 1e-11)) * (U.T @ r))
    assert relative(F.least_squares(), exact) < 1e-2 * relative(F.solve(J.T @ r), exact)


def test_least_squares_needs_a_gradient_in_the_range():
    """Huber's loss is linear far away: no curvature, but a gradient."""
    model, x = tall_skinny([2, 4, 1]), points(6, 2)
    y = model(x).detach() + 5e-4
    near = GGN(model, nn.HuberLoss(delta=1e-3), x, y).factor(0.1)
    y[3:] += 9.0
    far = GGN(model, nn.HuberLoss(delta=1e-3), x, y).factor(0.1)
    assert isinstance(near, Dual) and isinstance(far, Dual)
    assert near.least_squares() is not None and far.least_squares() is None


def test_search_finds_a_length_that_descends():
    _, model, x, y, _ = poisson(sizes=(8, 8), inside=30, side=12)
    descent = optim.GaussNewton(model, squares, damping=1e-8, adapt=1, search=True)
    lengths = []
    for _ in range(15):
        before, value = parameters_to_vector(model.parameters()).detach(), squares(model(x), y).item()
        d = GGN(model, squares, x, y).factor(1e-8).least_squares()
        report = descent.step(x, y)
        assert report.accepted and report.loss_after < value
        length = (before - parameters_to_vector(model.parameters()).detach()).norm().item() / d.norm().item()
        assert math.log2(length) == pytest.approx(round(math.log2(length)), abs=1e-6)
        lengths.append(length)
    assert min(lengths) < 1


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, 0.5), lambda p: torch.optim.SGD(p, 1.0, 0.9), lambda p: torch.optim.Adam(p, 1.0)],
)
def test_a_search_wants_the_step_as_it_is(make):
    model = tall_skinny([2, 4, 1])
    with pytest.raises(ValueError, match="SGD\\(lr=1\\)"):
        optim.GaussNewton(model, nn.MSELoss(), make(model.parameters()), search=True)


def test_momentum_is_checked_and_goes_with_the_state(tmp_path):
    with pytest.raises(ValueError, match="momentum must lie between 0 and 1"):
        optim.GaussNewton(tall_skinny([2, 3, 1]), nn.MSELoss(), momentum=1.0)
    runs = []
    for resumed in (False, True):
        _, model, x, y, _ = poisson()
        make = lambda model=model: optim.GaussNewton(model, squares, damping=1e-2, momentum=0.5, search=True)
        descent = make()
        for k in range(4):
            if resumed and k == 2:
                torch.save(descent.state_dict(), tmp_path / "state.pt")
                descent = make()
                descent.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            descent.step(x, y)
        runs.append(parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*runs)


def test_a_step_taken_back_forgets_its_momentum():
    _, model, x, y, _ = poisson()
    descent = optim.GaussNewton(model, squares, torch.optim.SGD(model.parameters(), lr=1e4), damping=1e-3, momentum=0.5)
    assert not descent.step(x, y).accepted and descent._previous is None


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_a_small_equation_is_solved(momentum):
    u, model, x, y, exact = poisson(sizes=(12, 12), inside=120, side=60, seed=1)
    descent = optim.GaussNewton(model, squares, damping=1e-9, adapt=1, momentum=momentum, search=True)
    for _ in range(60):
        report = descent.step(x, y)
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 31, dtype=D)] * 2)
    assert report.loss < 1e-5 and relative(u(grid)[:, 0], exact(grid)) < 2e-3


def test_public_names():
    assert hinv.jets is jets and set(jets.__all__) == {"Jet", "lift", "network"}
