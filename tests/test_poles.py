"""Functions of |H| by complex shifts: against dense eigenvalues of the definition, every stated error measured again."""

import numpy as np
import pytest
import torch
from conftest import NAMES, build, reference_hessian, relative
from torch import nn

import hinv
from hinv import AccuracyWarning, Hessian, optim
from hinv.solver import symmetric
from hinv.solver.resolvent import Resolvent
from hinv.spectrum import Absolute, poles
from hinv.spectrum import absolute as module
from hinv.spectrum.absolute import norm_bound


def decomposed(name):
    """(H, values, vectors, b): b has the gradient and a vector with components everywhere."""
    problem = build(name)
    H = Hessian(*problem)
    values, vectors = torch.linalg.eigh(reference_hessian(*problem))
    other = torch.randn(len(values), generator=torch.Generator(values.device).manual_seed(1), dtype=torch.float64)
    return H, values, vectors, torch.stack([H.gradient, other], 1)


# -- poles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", poles.load(), ids=lambda p: f"{p.ratio:g}, {len(p.tau)}")
def test_stated_errors_are_the_measured_ones(p):
    """On a grid that is none of the fit's; and that they are minimax: the error is taken, with alternating signs, at 2 N + 1 points."""
    s = np.concatenate([[0.0], np.geomspace(1e-3 * p.tau[0], 1.0, 30_011)])
    e = (s + p.ratio) * sum(c / (s * s + tau * tau) for tau, c in zip(p.tau, p.c, strict=True)) - 1
    assert 0.998 * p.error < np.abs(e).max() <= p.error
    runs = np.split(e, np.flatnonzero(np.diff(np.sign(e))) + 1)
    assert len(runs) == 2 * len(p.tau) + 1
    assert min(np.abs(run).max() for run in runs) > 0.99 * p.error
    assert (p.tau > 0).all() and (p.c > 0).all() and (np.diff(p.tau) > 0).all()


def test_the_fit_is_where_the_file_comes_from():
    for ratio, n in ((1.0, 3), (0.01, 8), (1e-6, 5)):
        (kept,) = [p for p in poles.load() if p.ratio == ratio and len(p.tau) == n]
        again = poles.fit(ratio, n)
        np.testing.assert_allclose(again.tau, kept.tau, rtol=1e-4)
        assert again.error == pytest.approx(kept.error, rel=2e-3)


def test_the_fewest_poles_that_serve():
    assert [len(poles.chosen(ratio, 1e-3).tau) for ratio in (1.0, 0.1, 0.01, 1e-3, 1e-4)] == [5, 8, 8, 10, 12]
    assert poles.chosen(0.05, 1e-3).ratio == 0.01 and poles.chosen(7.0, 0.5).ratio == 1.0
    assert len(poles.chosen(1e-6, 1e-12).tau) == 20


@pytest.mark.parametrize("gap", [0.9, 0.3, 1e-2, 1e-5, 1e-8])
def test_zolotarev_is_optimal(gap):
    """2 N + 1 alternations on [gap, 1] (Chebyshev), and inside the gap between -1 and 1."""
    p = poles.zolotarev(gap, 1e-2)
    n = len(p.tau)
    s = np.geomspace(gap, 1.0, 50_021)
    e = s * (p.c / (s[:, None] ** 2 + p.tau**2)).sum(1) - 1
    assert np.abs(e).max() == pytest.approx(p.error, rel=1e-3) and p.error <= 1e-2
    runs = np.split(e, np.flatnonzero(np.diff(np.sign(e))) + 1)
    assert len(runs) == 2 * n + 1 and min(np.abs(run).max() for run in runs) > 0.98 * p.error
    inside = np.linspace(0, gap, 1000)
    r = inside * (p.c / (inside[:, None] ** 2 + p.tau**2)).sum(1)
    assert (r >= 0).all() and (r <= 1 + p.error).all()


# -- complex shifts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 40, 130])
def test_complex_symmetric_factorization(n):
    """C D C^T with transposes, and the argument of the determinant without a multiple of 2 pi, also where 2 x 2 pivots are needed."""
    X = torch.randn(n, n, dtype=torch.float64)
    X = X + X.T
    X.diagonal().zero_()
    for tau in (3.0, 1e-2, 1e-7):
        S = torch.complex(X, -tau * torch.eye(n, dtype=torch.float64))
        F, b = symmetric.factored(S.clone()), torch.randn(n, 3, dtype=torch.complex128)
        assert relative(F.solve(b), torch.linalg.solve(S, b)) < 1e-9
        logs = torch.complex(torch.linalg.eigvalsh(X), torch.full((n,), -tau, dtype=torch.float64)).log()
        assert F.phase == pytest.approx(logs.imag.sum().item(), abs=1e-6)
        assert F.log_abs_det == pytest.approx(logs.real.sum().item(), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_resolvent(name):
    H, values, vectors, b = decomposed(name)
    for z in (0.3 + 0.1j, -0.02 + 1e-3j, values[-1].item() + 1e-2j):
        F = Resolvent(H, z)
        x = vectors.to(F.solve(b)) @ ((vectors.T @ b) / (values - z)[:, None])
        assert relative(F.solve(b), x) < 1e-7
        assert F.log.imag == pytest.approx(torch.log(values - z).imag.sum().item(), abs=1e-7)
        assert F.log.real == pytest.approx(torch.log(values - z).real.sum().item(), abs=1e-7)
    with pytest.raises(ValueError, match="above the real axis"):
        Resolvent(H, 0.1)
    assert repr(F).startswith(f"Resolvent({len(values)} x {len(values)}, shift ")


# -- functions of H ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_absolute_solve_is_as_exact_as_it_says(name):
    H, values, vectors, b = decomposed(name)
    norm = values.abs().max().item()
    for damping, rtol in ((0.1 * norm, 1e-2), (1e-3 * norm, 1e-4)):
        x = H.absolute_solve(b, damping, rtol)
        exact = vectors @ ((vectors.T @ b) / (values.abs() + damping)[:, None])
        report, errors = H.last_poles, (x - exact).norm(dim=0) / exact.norm(dim=0)
        assert errors.max() <= report.bound <= rtol
        assert norm <= report.norm < 1.6 * norm
    assert torch.equal(H.absolute_solve(b[:, 1], damping, rtol).shape and x[:, 1].isfinite(), torch.ones(len(b)).bool())


@pytest.mark.parametrize("name", NAMES)
def test_sign(name):
    H, values, vectors, b = decomposed(name)
    norm = values.abs().max().item()
    inner, gap = vectors.T @ b, 1e-2 * norm
    outside = vectors @ (inner * (values.abs() >= gap)[:, None])
    x = H.sign(outside, gap)
    errors = (x - vectors @ (values.sign()[:, None] * (vectors.T @ outside))).norm(dim=0) / outside.norm(dim=0)
    assert errors.max() <= H.last_poles.bound <= 1e-3
    within = vectors @ (inner * (values.abs() < gap)[:, None])
    assert H.sign(within, gap).norm() <= (1 + 1e-3) * within.norm()


@pytest.mark.parametrize("name", NAMES)
def test_smoothed_count(name):
    H, values, _, _ = decomposed(name)
    for matrix, at in ((H, values), (hinv.GGN(*build(name)), None)):
        at = torch.linalg.eigvalsh(matrix.dense()) if at is None else at
        for shift in (0.0, 0.05, -0.01, at[-1].item(), 1e3):  # on eigenvalues too: nothing is refused
            expected = (0.5 + torch.arctan((shift - at) / 0.02) / torch.pi).sum().item()
            assert matrix.smoothed_count(shift, 0.02) == pytest.approx(expected, abs=1e-7)
        expected = (0.02 / ((0.05 - at) ** 2 + 0.02**2)).sum().item() / torch.pi
        assert matrix.smoothed_density(0.05, 0.02) == pytest.approx(expected, rel=1e-9)


def test_the_norm_is_a_bound():
    """Also where Lanczos starts from next to nothing of the largest eigenvector, and for H = 0."""
    H, values, _, _ = decomposed("tanh, cross-entropy")
    assert values.abs().max() < norm_bound(H) < 1.3 * values.abs().max()
    flat = Hessian(
        nn.Sequential(nn.Linear(3, 2)).double(), lambda out, y: out.mean(), torch.ones(4, 3).double(), torch.zeros(4)
    )
    b = torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(flat.absolute_solve(b, 0.5, 1e-6), 2 * b, rtol=1e-6, atol=0)
    assert not flat.sign(b, 0.1).any()


def test_columns_of_nothing_and_single_precision():
    model, loss, x, y = build("tanh, cross-entropy")
    H = Hessian(model.float(), loss, x.float(), y)
    d = H.absolute_solve(H.gradient, 0.1)
    assert d.dtype == torch.float32
    assert relative(d.double(), H.double().absolute_solve(H.gradient.double(), 0.1, 1e-6)) < 1e-3
    assert not H.absolute_solve(0 * H.gradient, 0.1).any() and H.last_poles.bound < 1e-3
    assert H.absolute_solve(torch.zeros(len(d), 0), 0.1).shape == (len(d), 0)
    assert H.sign(torch.zeros(len(d), 0), 0.1).shape == (len(d), 0)


def test_what_is_refused_and_what_is_warned_of(unenforced):
    H, _, _, b = decomposed("one layer")
    with pytest.raises(ValueError, match="damping must be a positive number"):
        H.absolute_solve(b, -0.1)
    with pytest.raises(ValueError, match=r"less than 1e-06 of \|H\|"):
        H.absolute_solve(b, 1e-9)
    with pytest.raises(ValueError, match="rtol must lie between 0 and 1"):
        H.absolute_solve(b, 0.1, 0.0)
    with pytest.raises(ValueError, match="gap must be a positive number"):
        H.sign(b, 0.0)
    with pytest.raises(ValueError, match="width must be a positive number"):
        H.smoothed_count(0.1, 0.0)
    with pytest.raises(ValueError, match="width must be a positive number"):
        H.smoothed_density(0.1, -1.0)
    with pytest.raises(ValueError, match="expected"):
        H.absolute_solve(b[1:], 0.1)
    with pytest.warns(AccuracyWarning, match="20 poles"):
        H.absolute_solve(b, 1e-5, 1e-10)


def test_single_precision_is_given_up_where_it_does_not_serve(monkeypatch):
    """Down to the smallest shift it is tried first; refinement or double precision gives the digits."""
    H, values, vectors, b = decomposed("elu, custom loss")
    dtypes, norm = [], values.abs().max().item()
    made = Resolvent.__init__
    monkeypatch.setattr(Resolvent, "__init__", lambda F, H, z, *t: (dtypes.append(t), made(F, H, z, *t))[1])
    monkeypatch.setattr(module, "SINGLE", 0.0)
    x = H.absolute_solve(b, 1e-3 * norm, 1e-4)
    exact = vectors @ ((vectors.T @ b) / (values.abs() + 1e-3 * norm)[:, None])
    assert ((x - exact).norm(dim=0) / exact.norm(dim=0)).max() <= H.last_poles.bound <= 1e-4
    assert dtypes.count((torch.complex64,)) == H.last_poles.poles > dtypes.count(()) > 0


def test_kept_factorizations_are_the_same():
    H, _, _, b = decomposed("residual blocks")
    A = Absolute(H, 0.1, 1e-3, kept=True)
    assert torch.equal(A.solve(b)[0], H.absolute_solve(b, 0.1)) and A.solve(b)[1] == H.last_poles


# -- the step ----------------------------------------------------------------------------------------------------------


def position(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize(
    "name", ["tanh, cross-entropy", "frozen bias, in-place relu", "convolution", "skip connections"]
)
def test_the_step_by_poles_is_the_dense_one(name):
    model, loss, x, y = build(name)
    live = [p for p in model.parameters() if p.requires_grad]
    H, before = Hessian(model, loss, x, y), torch.nn.utils.parameters_to_vector(live).detach().clone()
    values, vectors = torch.linalg.eigh(reference_hessian(model, loss, x, y))
    d = vectors @ ((vectors.T @ H.gradient) / (values.abs() + 0.3))
    report = optim.SaddleFreeNewton(model, loss, damping=0.3, method="poles", accept=False).step(x, y)
    step = before - torch.nn.utils.parameters_to_vector(live).detach()
    assert relative(step, d) <= report.error <= 1e-3
    assert report.factorizations >= 4 and report.inertia is None and report.note == ""


def test_factorizations_serve_the_steps_in_between():
    model, loss, x, y = build("tanh, cross-entropy")
    descent = optim.SaddleFreeNewton(model, loss, damping=0.3, method="poles", every=2, accept=False, adapt=1.0)
    values, vectors = torch.linalg.eigh(reference_hessian(model, loss, x, y))
    first = descent.step(x, y)
    before, g = position(model), Hessian(model, loss, x, y).gradient
    second = descent.step(x, y)
    d = vectors @ ((vectors.T @ g) / (values.abs() + 0.3))
    assert relative(before - position(model), d) <= second.error <= 1e-3
    assert first.factorizations >= 4 and second.factorizations == 0


def test_a_damping_without_poles_is_raised_and_said():
    model, loss, x, y = build("tanh, cross-entropy")
    descent = optim.SaddleFreeNewton(model, loss, damping=1e-9, method="poles")
    report = descent.step(x, y)
    assert report.damping == pytest.approx(1e-6 * norm_bound(descent._curvature))
    assert report.error < 1e-3 and "poles" in descent.estimate(descent._curvature)
    with pytest.raises(ValueError, match="unknown method 'exact': use 'lanczos' or 'poles'"):
        optim.SaddleFreeNewton(model, loss, method="exact")
