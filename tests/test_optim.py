"""Steps against their definitions, written with dense matrices."""

import copy
import math

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import nn
from torch.nn.utils import parameters_to_vector

from hinv import GGN, Hessian, SingularShiftError, optim, tall_skinny
from hinv.errors import NotFiniteError
from hinv.optim import trust_region

LOSS = nn.CrossEntropyLoss()


def problem(sizes=(6, 5, 5, 4), batch=12, seed=0, gain=1.2):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(batch, sizes[0], generator=generator, dtype=torch.float64)
    return tall_skinny(sizes, gain=gain, seed=seed), x, torch.arange(batch) % sizes[-1]


def position(model):
    return parameters_to_vector(model.parameters()).detach()


def shifted(C, damping):
    return C.dense() + damping * torch.eye(C.shape[0], dtype=C.dtype)


# -- the baseline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ],
    ids=["SGD", "momentum", "Adam"],
)
def test_gradient_descent_is_the_plain_loop(make, clip):
    model, x, y = problem()
    plain = copy.deepcopy(model)
    descent, theirs = optim.GradientDescent(model, LOSS, make(model.parameters()), clip), make(plain.parameters())
    for _ in range(5):
        report = descent.step(x, y)
        theirs.zero_grad()
        value = LOSS(plain(x), y)
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        theirs.step()
        assert report.loss == value.item() and report.loss_after is None
    assert torch.equal(position(model), position(plain))


# -- Newton and Gauss-Newton -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "kind"), [(optim.DampedNewton, Hessian), (optim.GaussNewton, GGN)])
def test_one_step_is_the_dense_solve(cls, kind):
    model, x, y = problem()
    C, before = kind(model, LOSS, x, y), position(model)
    report = cls(model, LOSS, damping=0.7, accept=False).step(x, y)
    d = torch.linalg.solve(shifted(C, 0.7), C.gradient)
    s = position(model) - before
    torch.testing.assert_close(s, -d, rtol=1e-9, atol=1e-12)
    assert report.loss == C.loss and report.loss_after == LOSS(model(x), y).item()
    assert report.decrease == pytest.approx(-(C.gradient @ s + 0.5 * s @ C.dense() @ s).item(), rel=1e-9)
    assert report.ratio == pytest.approx((report.loss - report.loss_after) / report.decrease)
    assert report.step_norm == pytest.approx(s.norm().item()) and report.factorizations == 1
    negative = int((torch.linalg.eigvalsh(shifted(C, 0.7)) < 0).sum())
    assert report.inertia == (len(s) - negative, negative, 0) and report.damping == 0.7


def test_momentum_rate_clip_and_schedule_are_those_of_torch():
    model, x, y = problem()
    plain = copy.deepcopy(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 2, gamma=0.1)
    descent = optim.GaussNewton(model, LOSS, inner, clip=0.3, damping=0.5, adapt=1, accept=False)
    velocity, at = 0.0, position(plain)
    for k in range(4):
        G = GGN(plain, LOSS, x, y)
        d = torch.linalg.solve(shifted(G, 0.5), G.gradient)
        velocity = 0.9 * velocity + d * min(1.0, 0.3 / (d.norm().item() + 1e-6))
        at = at - 0.5 * 0.1 ** (k // 2) * velocity
        nn.utils.vector_to_parameters(at, plain.parameters())
        descent.step(x, y)
        schedule.step()
    torch.testing.assert_close(position(model), at, rtol=1e-9, atol=1e-12)


def test_the_damping_follows_rho():
    model, x, y = problem()
    descent, seen = optim.GaussNewton(model, LOSS, damping=1.0, adapt=2.0), set()
    for _ in range(25):
        before = descent.damping
        report = descent.step(x, y)
        assert report.damping == before
        good = report.accepted and report.ratio >= 0.25
        expected = before / 2 if report.ratio > 0.75 and report.accepted else before if good else before * 2
        assert descent.damping == expected
        seen.add(descent.damping / before)
    assert 0.5 in seen
    assert report.loss_after < 1e-4


def test_a_step_that_fails_is_taken_back_and_momentum_starts_anew():
    model, x, y = problem(gain=2.0)
    inner = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    descent = optim.GaussNewton(model, LOSS, inner, damping=0.5)
    descent.step(x, y)
    assert any(inner.state[p] for p in model.parameters())
    descent.damping = 1e-9
    inner.param_groups[0]["lr"] = 50.0
    before = position(model)
    report = descent.step(x, y)
    assert not report.accepted and report.step_norm == 0.0 and "taken back" in report.note
    assert torch.equal(position(model), before)
    assert not any(inner.state[p] for p in model.parameters())
    assert descent.damping > 1e-9


@pytest.mark.parametrize("cls", [optim.GaussNewton, optim.TrustRegionNewton])
def test_a_velocity_that_leads_uphill_does_not_stop_the_descent(cls):
    """The step added to it shrinks with every refusal; kept, the velocity alone would be refused for ever."""
    model, x, y = problem()
    inner = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    descent = cls(model, LOSS, inner)
    for p, g in zip(
        model.parameters(), GGN(model, LOSS, x, y).gradient.split([p.numel() for p in model.parameters()]), strict=True
    ):
        inner.state[p]["momentum_buffer"] = -10.0 * g.view_as(p)
    assert not descent.step(x, y).accepted
    assert any(descent.step(x, y).accepted for _ in range(3))


def test_a_factorization_serves_several_steps():
    model, x, y = problem()
    descent = optim.GaussNewton(model, LOSS, damping=0.5, adapt=1, every=3)
    first = GGN(model, LOSS, x, y)
    for k in range(6):
        g, before = Hessian(model, LOSS, x, y).gradient, position(model)
        report = descent.step(x, y)
        assert report.factorizations == (k % 3 == 0) and report.accepted
        if k < 3:
            d = torch.linalg.solve(shifted(first, 0.5), g)
            torch.testing.assert_close(before - position(model), d, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("cls", "kind"), [(optim.DampedNewton, Hessian), (optim.GaussNewton, GGN)])
def test_a_few_images_make_the_matrix_and_all_the_gradient(cls, kind):
    model, x, y = problem()
    whole, few, before = kind(model, LOSS, x, y), kind(model, LOSS, x[:5], y[:5]), position(model)
    report = cls(model, LOSS, damping=0.7, accept=False, sample=5).step(x, y)
    s = position(model) - before
    torch.testing.assert_close(s, -torch.linalg.solve(shifted(few, 0.7), whole.gradient), rtol=1e-9, atol=1e-12)
    assert report.loss == pytest.approx(whole.loss) and report.loss_after == LOSS(model(x), y).item()
    assert report.decrease == pytest.approx(-(whole.gradient @ s + 0.5 * s @ few.dense() @ s).item(), rel=1e-9)


def test_without_acceptance_rho_is_measured_where_the_matrix_is_new():
    model, x, y = problem()
    descent = optim.GaussNewton(model, LOSS, damping=1.0, adapt=2.0, accept=False, every=3)
    for k in range(9):
        before, report = descent.damping, descent.step(x, y)
        assert (report.ratio is None) == (report.loss_after is None) == (report.decrease is None) == (k % 3 != 0)
        assert (descent.damping == before) or k % 3 == 0


def test_after_a_refused_step_the_matrix_is_factored_anew():
    model, x, y = problem()
    descent = optim.DampedNewton(
        model, LOSS, torch.optim.SGD(model.parameters(), lr=1e3), damping=1.0, every=5, accept=True
    )
    assert not descent.step(x, y).accepted
    assert descent.step(x, y).factorizations == 1


def test_what_cannot_be_factored_becomes_a_gradient_step_and_says_why(monkeypatch):
    model, x, y = problem()
    H, before = Hessian(model, LOSS, x, y), position(model)

    def singular(self, *a, **k):
        raise SingularShiftError("a pivot is zero")

    monkeypatch.setattr(Hessian, "factor", singular)
    report = optim.DampedNewton(model, LOSS, damping=0.5).step(x, y)
    g = H.gradient
    length = (g @ g / (g @ (shifted(H, 0.5) @ g)).abs()).item()
    torch.testing.assert_close(before - position(model), length * g)
    assert report.note == "gradient step: a pivot is zero" and report.inertia is None


# -- trust region ------------------------------------------------------------------------------------------------------


def dense_ball(H, g, radius):
    """The exact minimum of the model in the ball, by the eigenvalues."""
    values, vectors = torch.linalg.eigh(H)
    c = vectors.T @ g
    edge = max(0.0, -values[0].item())
    bottom = values + edge < 1e-9 * max(1.0, values.abs().max().item())  # what H + edge I does not see

    def length(shift):
        return (c / (values + shift)).norm().item()

    if c[bottom].norm() < 1e-9 * g.norm():
        s = torch.where(bottom, 0.0, -c / (values + edge))
        if s.norm() <= radius:  # inside, or the hard case: up to the boundary along the lowest eigenvector
            s[0] += math.sqrt(radius**2 - s.norm().item() ** 2) if edge else 0.0
            return (c @ s + 0.5 * values @ s.square()).item()
    high = edge + g.norm().item() / radius + 1.0
    low = edge + 1e-14 * max(1.0, edge)
    s = -c / (values + (brentq(lambda t: length(t) - radius, low, high, xtol=1e-15) if length(low) > radius else edge))
    return (c @ s + 0.5 * values @ s.square()).item()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=2, max_size=5),
    batch=st.integers(1, 10),
    radius=st.floats(-3, 2).map(lambda e: 10.0**e),
    first=st.floats(-4, 2).map(lambda e: 10.0**e),
    hard=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_ball_is_solved_to_its_tolerance(sizes, batch, radius, first, hard, seed):
    model, x, y = problem(sizes, batch, seed)
    H = Hessian(model, LOSS, x, y)
    D, g = H.dense(), H.gradient
    if hard:
        lowest = torch.linalg.eigh(D)[1][:, 0]
        g = g - lowest * (lowest @ g)
    found = optim.more_sorensen(H, g, radius, first, 1e-8, 0.1)
    s = found.s
    best, ours = dense_ball(D, g, radius), (g @ s + 0.5 * s @ (D @ s)).item()
    assert s.norm() <= 1.1 * radius * (1 + 1e-9)
    assert ours <= 0.75 * best + 1e-12  # |s| within 10 percent of the radius may lose that much
    assert found.factorizations <= trust_region.MOST


def test_trust_region_descends_with_few_factorizations():
    model, x, y = problem((6, 8, 8, 8, 4), 16)
    descent, loss, count = optim.TrustRegionNewton(model, LOSS), math.inf, 0
    for _ in range(40):
        report = descent.step(x, y)
        assert report.loss <= loss and (report.loss_after <= report.loss or not report.accepted)
        assert report.inertia[1] == 0
        loss, count = report.loss, count + report.factorizations
    assert report.loss < 1e-3 and count <= 40 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_can_be_gained_the_radius_stays_above_rounding(dtype):
    """At the minimum of a convex loss every step is refused or idle, however often."""
    x, y = torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype)[:, :2]
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).to(dtype)
    nn.init.constant_(model[0].weight, 0.1)
    descent = optim.TrustRegionNewton(model, nn.MSELoss(), radius=0.5)
    for _ in range(150):
        report = descent.step(x, y)
        assert math.isfinite(report.loss) and descent.radius >= torch.finfo(dtype).eps
    assert report.loss < 1e-9
    torch.testing.assert_close(model[0].weight, y.T, rtol=0, atol=1e-4)


def test_the_lowest_eigenvalue_is_met_from_above_at_once(monkeypatch):
    """Lanczos bounds lambda from below, so that hardly a factorization is indefinite."""
    model, x, y = problem((6, 8, 8, 8, 4), 16, gain=1.5)
    seen, factor = [], Hessian.factor
    monkeypatch.setattr(Hessian, "factor", lambda self, *a, **k: seen.append(factor(self, *a, **k)) or seen[-1])
    descent = optim.TrustRegionNewton(model, LOSS)
    for _ in range(20):
        descent.step(x, y)
    assert sum(F.inertia[1] > 0 for F in seen) <= 2 and len(seen) <= 20 * 3


@pytest.mark.parametrize(
    "start", [torch.zeros(12), torch.full((12,), 1e-9), torch.linspace(1e-9, 2e-9, 12)], ids=["zero", "equal", "small"]
)
@pytest.mark.parametrize("every", [1, 2])
def test_a_saddle_is_left(start, every):
    """At a point where the gradient vanishes, exactly or all but, and H does not: the lowest eigenvector alone leads away."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    x, y = torch.eye(3).double(), torch.arange(3)
    assert Hessian(model, LOSS, x, y).gradient.norm() == 0
    with torch.no_grad():
        model[0].weight.copy_(start.view(4, 3))
    descent = optim.TrustRegionNewton(model, LOSS, radius=0.5, every=every)
    before = LOSS(model(x), y).item()
    assert "lowest eigenvector" in descent.step(x, y).note
    for _ in range(5):
        descent.step(x, y)
    assert LOSS(model(x), y).item() < before - 0.05


# -- saddle-free -------------------------------------------------------------------------------------------------------


def test_saddle_free_is_the_absolute_value():
    model, x, y = problem()
    H, before = Hessian(model, LOSS, x, y), position(model)
    values, vectors = torch.linalg.eigh(H.dense())
    report = optim.SaddleFreeNewton(model, LOSS, damping=0.3, pairs=None, accept=False).step(x, y)
    d = vectors @ ((vectors.T @ H.gradient) / (values.abs() + 0.3))
    torch.testing.assert_close(before - position(model), d, rtol=1e-8, atol=1e-12)
    assert report.inertia[1] == int((values < 0).sum())


def test_saddle_free_by_lanczos():
    model, x, y = problem((6, 8, 8, 4), 16)
    H, before = Hessian(model, LOSS, x, y), position(model)
    values = torch.linalg.eigvalsh(H.dense())
    descent = optim.SaddleFreeNewton(model, LOSS, damping=0.3, pairs=12, accept=False)
    descent.step(x, y)
    V, g = descent._vectors, H.gradient
    torch.testing.assert_close(V.T @ V, torch.eye(12).double(), rtol=0, atol=1e-8)
    found = (V.T @ H.dense() @ V).diagonal().abs().sort().values
    torch.testing.assert_close(found, values.abs().sort().values[-12:], rtol=0.1, atol=0)
    rest = g - V @ (V.T @ g)
    scale = (rest @ H.dense() @ rest / (rest @ rest)).abs()
    expected = V @ ((V.T @ g) / ((V.T @ H.dense() @ V).diagonal().abs() + 0.3)) + rest / (scale + 0.3)
    torch.testing.assert_close(before - position(model), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cls", [optim.TrustRegionNewton, optim.SaddleFreeNewton])
def test_a_loss_without_curvature_is_descended_all_the_same(cls):
    """H = 0, where Lanczos has nothing to start from."""
    model, x, y = problem((3, 2), 5)
    options = {"pairs": 3} if cls is optim.SaddleFreeNewton else {}
    descent = cls(model, lambda outputs, targets: outputs.mean(), **options)
    first, second = descent.step(x, y), descent.step(x, y)
    assert second.loss < first.loss and first.accepted
    assert ("gradient step: ARPACK" in first.note) == (cls is optim.SaddleFreeNewton)


# -- state -------------------------------------------------------------------------------------------------------------

MAKERS = {
    "Adam": lambda m: optim.GradientDescent(m, LOSS, torch.optim.Adam(m.parameters(), 0.01)),
    "GaussNewton": lambda m: optim.GaussNewton(m, LOSS, torch.optim.SGD(m.parameters(), 0.5, momentum=0.5), every=3),
    "GaussNewton, few": lambda m: optim.GaussNewton(m, LOSS, damping=0.5, sample=3, every=2),
    "DampedNewton": lambda m: optim.DampedNewton(m, LOSS, damping=3.0, every=2),
    "TrustRegionNewton": lambda m: optim.TrustRegionNewton(m, LOSS, radius=0.5),
    "TrustRegionNewton, reused": lambda m: optim.TrustRegionNewton(m, LOSS, radius=0.5, every=2),
    "SaddleFreeNewton": lambda m: optim.SaddleFreeNewton(m, LOSS, pairs=8, every=2),
    "SaddleFreeNewton, poles": lambda m: optim.SaddleFreeNewton(m, LOSS, every=2, method="poles"),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_state_goes_on_bit_for_bit(name, steps, tmp_path):
    model, x, y = problem()
    descent = MAKERS[name](model)
    for _ in range(steps):
        descent.step(x, y)
    torch.save({"model": model.state_dict(), "descent": descent.state_dict()}, tmp_path / "state.pt")
    other = problem(seed=5)[0]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["model"])
    resumed = MAKERS[name](other)
    resumed.load_state_dict(state["descent"])
    for k in range(4):
        a, b = descent.step(x[k:], y[k:]), resumed.step(x[k:], y[k:])
        assert (a.loss, a.loss_after, a.accepted, a.inertia) == (b.loss, b.loss_after, b.accepted, b.inertia)
    assert torch.equal(position(model), position(other))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_nan_is_named_and_the_weights_stay(name):
    model, x, y = problem()
    descent = MAKERS[name](model)
    before = position(model)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"NaN|nan"):
        descent.step(x, y)
    assert torch.equal(position(model)[1:], before[1:])


def test_a_gradient_that_is_not_finite_is_named_between_factorizations_too():
    class Steep(nn.CrossEntropyLoss):
        steep = False

        def forward(self, outputs, targets):  # the root's slope at zero is infinite, its value is not
            return super().forward(outputs, targets) + ((0.0 * outputs).abs().sqrt().sum() if self.steep else 0.0)

    (model, x, y), loss = problem(), Steep()
    descent = optim.DampedNewton(model, loss, damping=5.0, every=3)
    descent.step(x, y)
    before, loss.steep = position(model), True
    with pytest.raises(NotFiniteError, match="the gradient contains NaN"):
        descent.step(x, y)
    assert torch.equal(position(model), before)


def test_bad_options_are_refused():
    model = problem()[0]
    for cls, options, match in (
        (optim.GaussNewton, {"damping": 0.0}, "damping must be a positive number"),
        (optim.DampedNewton, {"adapt": 0.5}, "adapt must be at least 1"),
        (optim.DampedNewton, {"every": 0}, "every must be at least 1 step"),
        (optim.GaussNewton, {"clip": -1.0}, "clip must be a positive number"),
        (optim.GaussNewton, {"sample": 0}, "sample must be at least 1 image"),
        (optim.TrustRegionNewton, {"radius": -1.0}, "radius must be a positive number"),
        (optim.TrustRegionNewton, {"rtol": 2.0}, "rtol must lie between 1e-08.* and 1, not 2"),
        (optim.TrustRegionNewton, {"rtol": 1e-12}, "rtol must lie between 1e-08.* and 1"),
        (optim.SaddleFreeNewton, {"pairs": 10**6}, "pairs must lie between 1 and"),
    ):
        with pytest.raises(ValueError, match=match):
            cls(model, LOSS, **options)
    with pytest.raises(ValueError, match="sample= needs a loss with reduction 'mean'"):
        optim.GaussNewton(model, nn.CrossEntropyLoss(reduction="sum"), sample=4)
    with pytest.raises(ValueError, match="exactly the model's trainable parameters"):
        optim.GaussNewton(model, LOSS, torch.optim.SGD(model[0].parameters(), lr=1.0))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        optim.GaussNewton(model, LOSS)


def test_lbfgs_is_torchs_own():
    """A step of GradientDescent with LBFGS, which calls its closure several times, is torch's step; the other methods refuse it by name."""
    after = []
    for ours in (True, False):
        model, x, y = problem()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
        if ours:
            losses = [optim.GradientDescent(model, LOSS, optimizer).step(x, y).loss for _ in range(3)]
        else:

            def closure(model=model, optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                value = LOSS(model(x), y)
                value.backward()
                return value

            assert [optimizer.step(closure).item() for _ in range(3)] == losses
        after.append(parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*after) and losses[2] < losses[1] < losses[0]
    with pytest.raises(TypeError, match=r"LBFGS finds its own direction .* GradientDescent with LBFGS"):
        optim.GaussNewton(model, LOSS, torch.optim.LBFGS(model.parameters()))
