"""The Hessian as a matrix: products, gradient, solves and their reports, against references on other channels."""

import dataclasses
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg as sparse
import torch
from conftest import DEVICE, NAMES, build, reference_hessian, reference_loss, relative
from torch import nn

from hinv import AccuracyWarning, Hessian, SingularShiftError, solve, tall_skinny

METHODS = ("factor", "sparse", "tridiagonal", "woodbury", "dense")


def test_dense_and_products_agree_with_functional_hessian(problem):
    H, reference = Hessian(*problem), reference_hessian(*problem)
    assert H.shape == reference.shape
    assert relative(H.dense(), reference) < 1e-10
    V = torch.randn(H.shape[0], 3, dtype=H.dtype)
    assert relative(H @ V, reference @ V) < 1e-10
    assert relative(H @ V[:, 0], reference @ V[:, 0]) < 1e-10


def test_gradient_and_loss(problem):
    H = Hessian(*problem)
    function, vector = reference_loss(*problem)
    assert H.loss == pytest.approx(function(vector).item(), rel=1e-12)
    assert relative(H.gradient, torch.func.grad(function)(vector)) < 1e-12


@pytest.mark.parametrize("name", ["tanh, cross-entropy", "layernorm", "convolution", "elu, custom loss"])
def test_finite_differences(name):
    """The loss itself, three times: central differences along random directions know nothing of autograd."""
    problem = build(name)
    H = Hessian(*problem)
    function, x = reference_loss(*problem)
    generator = torch.Generator(DEVICE).manual_seed(5)
    for _ in range(3):
        v = torch.randn(H.shape[0], generator=generator, dtype=H.dtype)
        v, h = v / v.norm(), 1e-3
        up, middle, down = function(x + h * v), function(x), function(x - h * v)
        assert (H.gradient @ v).item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-4, abs=1e-7)
        assert (v @ (H @ v)).item() == pytest.approx(((up - 2 * middle + down) / h**2).item(), rel=1e-3, abs=1e-5)


def test_linear_regression_closed_form():
    """Mean squared error of a linear model: H = (2 / (B C)) I_C kron X^T X, whatever the targets."""
    torch.manual_seed(0)
    x, y, C = torch.randn(7, 4).double(), torch.randn(7, 3).double(), 3
    H = Hessian(nn.Sequential(nn.Linear(4, C, bias=False)).double(), nn.MSELoss(), x, y)
    assert relative(H.dense(), 2 / (7 * C) * torch.kron(torch.eye(C).double(), x.T @ x)) < 1e-14


def test_softmax_regression_closed_form():
    """Cross-entropy of a linear model: H = (1/B) sum_n (diag(p_n) - p_n p_n^T) kron x_n x_n^T."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 4).double(), torch.arange(7) % 3
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    p = model(x).softmax(1).detach()
    expected = (
        sum(torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(v, v)) for q, v in zip(p, x, strict=True)) / 7
    )
    assert relative(Hessian(model, nn.CrossEntropyLoss(), x, y).dense(), expected) < 1e-14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("damping", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("name", NAMES)
def test_solve_agrees_with_dense(name, damping, method):
    H = Hessian(*build(name))
    b = torch.randn(H.shape[0], 2, generator=torch.Generator(DEVICE).manual_seed(1), dtype=H.dtype)
    reference = torch.linalg.solve(reference_hessian(*build(name)) + damping * torch.eye(H.shape[0], dtype=H.dtype), b)
    x = H.solve(b, damping, method)
    assert relative(x, reference) < 1e-8
    assert H.last_solve.method == method and H.last_solve.residual <= 1e-8
    assert relative(H.solve(b[:, 0], damping, method), reference[:, 0]) < 1e-8


def test_the_problems_hold_indefinite_and_large_batch_cases():
    """What the test above rests on: some H + damping I are indefinite, and some batches exceed the classes."""
    indefinite = [n for n in NAMES if torch.linalg.eigvalsh(reference_hessian(*build(n)))[0] < -0.1]
    large = [n for n in NAMES if len(build(n)[2]) > build(n)[0](build(n)[2]).shape[1]]
    assert len(indefinite) >= 6 and len(set(indefinite) & set(large)) >= 6


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_krylov_baselines(method):
    H = Hessian(*build("tanh, cross-entropy"))
    x = H.solve(H.gradient, damping=2.0, method=method)
    assert H.last_solve.residual <= 1e-8
    assert relative(x, H.solve(H.gradient, damping=2.0, method="dense")) < 1e-6


def test_cg_says_when_the_matrix_is_indefinite():
    H = Hessian(*build("tanh, cross-entropy"))
    b = torch.linalg.eigh(H.dense())[1][:, 0]  # the direction of most negative curvature
    with pytest.warns(AccuracyWarning, match=r"method 'cg'.* indefinite .* CG is not defined"):
        H.solve(b, damping=1e-3, method="cg")


def test_auto_takes_the_estimated_method_and_reports():
    H = Hessian(*build("tanh, cross-entropy"))
    H.solve(H.gradient)
    report = H.last_solve
    assert (report.method, report.damping) == (H.estimate().method, 1e-2)
    assert 0 <= report.residual <= 1e-8 and report.refinements <= 3


def test_residual_is_measured_not_assumed():
    H = Hessian(*build("tanh, cross-entropy"))
    x = H.solve(H.gradient, damping=0.1)
    D = reference_hessian(*build("tanh, cross-entropy")) + 0.1 * torch.eye(H.shape[0], dtype=H.dtype)
    measured = relative(D @ x, H.gradient)
    assert H.last_solve.residual < 1e-12 and measured < 1e-12


def test_residual_is_independent_of_the_solver():
    """Blocks that are wrong: the algorithm solves another system, and the residual must say so; of one that is close refinement still makes the right one."""
    H = Hessian(*build("tanh, cross-entropy"))
    right, M = H.layers, H.dense() + 0.1 * torch.eye(H.shape[0], dtype=H.dtype)
    H.__dict__["layers"] = [dataclasses.replace(layer, E=3.0 * layer.E, J=3.0 * layer.J) for layer in right]
    with pytest.warns(AccuracyWarning, match="not reached"):
        H.solve(H.gradient, damping=0.1, method="tridiagonal", rtol=1e-10)
    assert H.last_solve.residual > 1e-7
    H.__dict__["layers"] = [dataclasses.replace(layer, E=1.01 * layer.E, J=1.01 * layer.J) for layer in right]
    x = H.solve(H.gradient, damping=0.1, method="tridiagonal", rtol=1e-10)
    assert H.last_solve.refinements > 3 and relative(M @ x, H.gradient) < 1e-10


def test_the_best_of_the_refinements_is_kept(monkeypatch):
    H = Hessian(*build("tanh, cross-entropy"))
    exact, calls = torch.linalg.inv(H.dense() + torch.eye(H.shape[0], dtype=H.dtype)), []

    def first_good_then_harmful(b):
        calls.append(1)
        return 0.999 * exact @ b if len(calls) == 1 else -5.0 * exact @ b

    monkeypatch.setitem(solve.METHODS, "dense", lambda *_: first_good_then_harmful)
    with pytest.warns(AccuracyWarning):
        x = H.solve(H.gradient, damping=1.0, method="dense")
    assert relative(x, exact @ H.gradient) < 2e-3


def test_residual_is_the_worst_column(monkeypatch):
    """One column right, one wrong and tiny: the tiny one counts."""
    H = Hessian(*build("tanh, cross-entropy"))
    exact = torch.linalg.inv(H.dense() + torch.eye(H.shape[0], dtype=H.dtype))
    right = torch.tensor([1.0, 0.0], dtype=H.dtype)
    monkeypatch.setitem(solve.METHODS, "dense", lambda *_: lambda b: (exact @ b) * right)
    b = torch.stack([H.gradient, 1e-9 * H.gradient], 1)
    with pytest.warns(AccuracyWarning):
        H.solve(b, damping=1.0, method="dense")
    assert H.last_solve.residual == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["factor", "tridiagonal", "dense", "cg", "minres"])
@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_of_the_right_hand_side_does_not_matter(method, scale):
    H = Hessian(*build("softplus, BCE"))
    x = H.solve(H.gradient, damping=2.0, method=method)
    assert relative(H.solve(scale * H.gradient, damping=2.0, method=method) / scale, x) < 1e-12
    assert 0 < H.last_solve.residual <= 1e-8


def test_unreached_rtol_warns_with_the_residual():
    H = Hessian(*build("tanh, cross-entropy"))
    with pytest.warns(AccuracyWarning, match=r"relative residual .* rtol 1e-30 not reached; try"):
        x = H.solve(H.gradient, damping=0.1, rtol=1e-30)
    assert x.isfinite().all() and H.last_solve.residual < 1e-12


def test_wrong_answers_are_not_silent(monkeypatch):
    """A solver that returns nonsense, or NaN, is found out by the residual."""
    H = Hessian(*build("tanh, cross-entropy"))
    for nonsense in (lambda b: 1e3 * b, lambda b: b * float("nan")):
        monkeypatch.setitem(solve.METHODS, "dense", lambda *a, f=nonsense: f)
        with pytest.warns(AccuracyWarning, match="not reached"):
            H.solve(H.gradient, damping=0.1, method="dense")


def test_refinement_improves_a_poor_factorization(monkeypatch):
    """One percent wrong each time: three refinements leave 1e-8 of the error, and the best x is kept."""
    H = Hessian(*build("tanh, cross-entropy"))
    exact = torch.linalg.inv(H.dense() + torch.eye(H.shape[0], dtype=H.dtype))
    monkeypatch.setitem(solve.METHODS, "dense", lambda *a: lambda b: 0.99 * exact @ b)
    H.solve(H.gradient, damping=1.0, method="dense", rtol=2e-8)
    assert H.last_solve.refinements == 3 and H.last_solve.residual < 2e-8


def test_refinement_stops_where_a_step_does_not_halve_the_residual(monkeypatch):
    H = Hessian(*build("tanh, cross-entropy"))
    exact = torch.linalg.inv(H.dense() + torch.eye(H.shape[0], dtype=H.dtype))
    monkeypatch.setitem(solve.METHODS, "dense", lambda *a: lambda b: 0.4 * exact @ b)  # leaves 0.6
    with pytest.warns(AccuracyWarning):
        H.solve(H.gradient, damping=1.0, method="dense")
    assert H.last_solve.refinements == 1 and H.last_solve.residual == pytest.approx(0.36, rel=1e-6)


@pytest.mark.parametrize("share", [0.1, 1e-3, -0.05])
@pytest.mark.parametrize("name", NAMES)
def test_float32_refined_has_the_digits_of_float64(name, share):
    """Or says that it has not: a pivot that is zero in float32 is refused by its stage, a residual that stays is warned of."""
    H, D = Hessian(*build(name)), reference_hessian(*build(name))
    damping = share * torch.linalg.matrix_norm(D, 2).item()
    M, b = D + damping * torch.eye(len(D)).to(D), torch.stack([H.gradient, H.gradient.cos()], 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AccuracyWarning)
        try:
            x = H.solve(b, damping, "factor32", rtol=1e-11)
        except SingularShiftError as error:
            assert share < 0.01 and str(error).startswith("in float32") and "nine digits more" in str(error)
            return
    if share > 0.01:
        assert not caught
    if not caught:
        assert ((M @ x - b).norm(dim=0) / b.norm(dim=0)).max() < 1e-10 and H.last_solve.method == "factor32"
    else:
        assert H.last_solve.residual > 1e-11


@pytest.mark.parametrize("method", METHODS)
def test_exactly_singular_matrix_is_named(method):
    """One identity weight, squared error on x = 1: H = 2, so damping -2 is singular."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    one = torch.ones(1, 1, dtype=torch.float64)
    H = Hessian(model, nn.MSELoss(), one, one)
    with pytest.raises(torch.linalg.LinAlgError, match=r"(singular|pivot is zero)"):
        H.solve(H.gradient, damping=-2.0, method=method)


@pytest.mark.parametrize("method", ["auto", "factor", "tridiagonal", "cg"])
def test_no_columns(method):
    H = Hessian(*build("tanh, cross-entropy"))
    assert H.solve(H.gradient[:, None][:, :0], method=method).shape == (H.shape[0], 0)


def test_zero_right_hand_side_and_no_columns():
    H = Hessian(*build("tanh, cross-entropy"))
    assert torch.equal(H.solve(torch.zeros_like(H.gradient)), torch.zeros_like(H.gradient))
    assert (H @ torch.zeros(H.shape[0], 0, dtype=H.dtype)).shape == (H.shape[0], 0)


def test_float32_follows_the_model():
    model = tall_skinny((8, *[6] * 6, 3), dtype=torch.float32)
    x, y = torch.randn(5, 8, generator=torch.Generator(DEVICE).manual_seed(0)), torch.arange(5) % 3
    H = Hessian(model, nn.CrossEntropyLoss(), x, y)
    for method in ("tridiagonal", "woodbury", "dense", "cg", "minres"):
        step = H.solve(H.gradient, damping=4.0, method=method)
        assert step.dtype == torch.float32
        assert H.last_solve.residual <= 1e-4
    assert H.loss == pytest.approx(nn.CrossEntropyLoss()(model(x), y).item())


@pytest.mark.parametrize(
    ("b", "kind", "message"),
    [
        (lambda H: H.gradient[:-1], ValueError, r"right-hand side has shape \(88,\); expected \(89,\) or \(89, k\)"),
        (lambda H: H.gradient[None], ValueError, "right-hand side has shape"),
        (lambda H: H.gradient.float(), TypeError, "right-hand side is torch.float32"),
        (lambda H: H.gradient.cpu().numpy(), TypeError, "must be a torch tensor, not ndarray"),
        (lambda H: H.gradient * float("nan"), ValueError, "right-hand side contains NaN"),
    ],
)
@pytest.mark.usefixtures("unenforced")
def test_bad_right_hand_sides(b, kind, message):
    H = Hessian(*build("tanh, cross-entropy"))
    with pytest.raises(kind, match=message):
        H.solve(b(H))


def test_bad_options():
    H = Hessian(*build("tanh, cross-entropy"))
    with pytest.raises(
        ValueError, match="unknown method 'newton': use 'auto', 'factor', 'factor32', 'sparse', 'tridiagonal'"
    ):
        H.solve(H.gradient, method="newton")
    with pytest.raises(ValueError, match="damping must be a finite number"):
        H.solve(H.gradient, damping=float("nan"))
    for rtol in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rtol must be a positive number"):
            H.solve(H.gradient, rtol=rtol)
    with pytest.raises(ValueError, match="the factor has shape"):
        H @ torch.ones(3, dtype=H.dtype)


def test_scipy_operator():
    H = Hessian(*build("tanh, cross-entropy"))
    operator, D = H.to_scipy(), H.dense().cpu().numpy()
    v = np.random.default_rng(0).standard_normal((H.shape[0], 3))
    np.testing.assert_allclose(operator @ v, D @ v, atol=1e-12)
    np.testing.assert_allclose(operator.T @ v[:, 0], D @ v[:, 0], atol=1e-12)
    top = sparse.eigsh(operator, k=1, which="LA", return_eigenvectors=False)[0]
    assert top == pytest.approx(np.linalg.eigvalsh(D)[-1], rel=1e-9)
    assert operator.dtype == np.float64
    np.testing.assert_allclose(operator @ (v[:, 0] + 1j * v[:, 1]), D @ v[:, 0] + 1j * D @ v[:, 1], atol=1e-12)


def test_repr_and_loss_of_a_loss_linear_in_the_parameters():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x = torch.randn(4, 3).double()
    H = Hessian(model, lambda out, y: (out * y).sum(), x, torch.ones(4, 2).double())
    assert torch.equal(H.dense(), torch.zeros(8, 8).double())
    assert repr(H) == "Hessian(8 x 8, 1 stages, batch 4, torch.float64)"
    assert relative(H.solve(H.gradient, damping=0.5), H.gradient / 0.5) < 1e-14


def test_no_warning_on_a_healthy_solve():
    H = Hessian(*build("softplus, BCE"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        H.solve(H.gradient, damping=0.1)


def test_a_loss_with_a_wrong_derivative_rule_is_refused():
    class Wrong(torch.autograd.Function):
        """o -> |o|^2 / 2, whose derivative is said to be R o with a matrix R that is not symmetric."""

        @staticmethod
        def forward(ctx, o):
            ctx.save_for_backward(o)
            return o.square().sum() / 2

        @staticmethod
        def backward(ctx, grad):
            (o,) = ctx.saved_tensors
            return grad * (o + 0.1 * torch.cat([o[:, 1:], 0 * o[:, :1]], 1))

    model, _, x, y = build("layernorm")
    with pytest.raises(ValueError, match=r"second derivative of the loss .* is not symmetric"):
        Hessian(model, lambda o, t: Wrong.apply(o), x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 0.7, 1.0, 3e20])
def test_the_reported_residual_is_that_of_the_returned_vector(dtype, scale):
    """Of float32 solutions, which are rounded as they are given back, too: nothing is rounded after the residual was taken."""
    model, loss, x, y = build("tanh, cross-entropy")
    H = Hessian(model.to(dtype), loss, x.to(dtype), y)
    b = scale * torch.randn(H.shape[0], 2, generator=torch.Generator(DEVICE).manual_seed(0), dtype=dtype)
    solution = H.solve(b, 0.1, method="factor").double() / scale
    right = b.double() / scale
    residual = (H.double() @ solution + 0.1 * solution - right).norm(dim=0) / right.norm(dim=0)
    assert residual.max().item() == pytest.approx(H.last_solve.residual, rel=1e-3, abs=1e-14)


def test_powers_of_two():
    size = torch.tensor([1e-320, 1e-300, 0.25, 0.3, 1.0, 1.5, 7.0, 1.7e308]).double()
    for dtype in (torch.float64, torch.float32):
        given = size.to(dtype)[(size.to(dtype) > 0) & size.to(dtype).isfinite()]
        power, given = (a.double().cpu().numpy() for a in (solve.power_of_two(given), given))
        assert (np.frexp(power)[0] == 0.5).all()
        assert (power <= given).all() and (2 * power > given).all()
    assert solve.power_of_two(torch.tensor(3.0)).item() == 2.0
