"""The inverse's diagonal, blocks and trace, output covariances, samples, effective parameters, influence and leaving one out, against dense references."""

import copy

import pytest
import torch
from conftest import DEVICE, NAMES, ElementaryLayerNorm, build, reference_hessian, reference_loss, relative
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import hinv
from hinv import GGN, AccuracyWarning, Hessian, SingularShiftError, tall_skinny
from hinv.solver.dual import Dual
from hinv.solver.factor import Factor

# without pivoting, on a GPU, up to two digits fewer (`hinv.solver.symmetric.GROWTH`)
INDEFINITE = 1e-9 if DEVICE == "cpu" else 1e-7


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def elementary(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = ElementaryLayerNorm
    return model


def reference(model, loss, x, y):
    """J (B, C, P), b (B, C) and Lambda (B, C, C) of a batch, by torch.func on the whole model and loss."""
    function, vector = reference_loss(elementary(model), lambda out, _: out, x, y)
    J = torch.func.jacrev(function)(vector).reshape(len(x), -1, len(vector))
    out = function(vector)
    b, Lambda = (d(lambda o: loss(o, y))(out) for d in (torch.func.grad, torch.func.hessian))
    C, n = J.shape[1], torch.arange(len(x))
    return J, b.reshape(-1, C), Lambda.reshape(len(x), C, len(x), C)[n, :, n]


def ggn_of(J, Lambda):
    return torch.einsum("ncp,ncd,ndq->pq", J, Lambda, J)


def check(F, M, J, tolerance):
    """Everything that F knows of the inverse against M = (H + damping I)^-1."""
    assert relative(F.inverse_diagonal(), M.diagonal()) < tolerance
    assert F.inverse_trace() == pytest.approx(M.trace().item(), abs=tolerance * M.diagonal().abs().sum().item())
    assert relative(F.output_covariance(), J @ M @ J.mT) < tolerance
    at = 0
    for number, name in enumerate(F.names):
        block = F.inverse_block(number)
        assert torch.equal(block, F.inverse_block(name))
        assert relative(block, M[at : at + len(block), at : at + len(block)]) < tolerance
        at += len(block)
    assert at == len(M)


def check_samples(F, M, tolerance):
    """Samples are a linear map of independent normal numbers; its columns come from unit vectors."""
    L = F.colored(eye(F.noises))
    assert relative(L @ L.T, M) < tolerance
    noise = torch.randn(F.noises, 3, generator=torch.Generator("cpu").manual_seed(5), dtype=torch.float64, device="cpu")
    drawn = F.sample(3, torch.Generator("cpu").manual_seed(5))
    assert relative(drawn, L @ noise.to(DEVICE)) < 1e-12
    assert drawn.shape == (len(M), 3)
    assert torch.equal(F.sample(), F.sample())


@pytest.mark.parametrize("name", NAMES)
def test_inverse_of_the_hessian(name):
    D, J = reference_hessian(*build(name)), reference(*build(name))[0]
    definite = 1.0 - torch.linalg.eigvalsh(D)[0].clamp_max(0.0).item()
    for damping, tolerance in ((definite, 1e-12), (0.01, INDEFINITE), (-0.3, INDEFINITE)):
        F, M = Hessian(*build(name)).factor(damping), torch.linalg.inv(D + damping * eye(len(D)))
        check(F, M, J, tolerance)
        if damping == definite:
            check_samples(F, M, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_inverse_of_the_gauss_newton_matrix_and_its_dual(name):
    J, _, Lambda = reference(*build(name))
    D, G = ggn_of(J, Lambda), GGN(*build(name))
    for damping in (1.0, 0.01):
        M = torch.linalg.inv(D + damping * eye(len(D)))
        for F in (Factor(G.structure(torch.float64), damping, G.__matmul__), Dual(G.chain, damping)):
            check(F, M, J, 1e-11)
            check_samples(F, M, 1e-11)


def test_dual_of_fewer_parameters_than_outputs_loses_nothing():
    """There eps I + D^T D has eigenvalues eps that cancel in (I - D Gram^-1 D^T) / eps."""
    model = tall_skinny((3, 4, 3), seed=1)
    x = torch.randn(40, 3, generator=torch.Generator(DEVICE).manual_seed(0), dtype=torch.float64)
    problem = model, nn.MSELoss(), x, torch.sin(x)
    J, _, Lambda = reference(*problem)
    D, G = ggn_of(J, Lambda), GGN(*problem)
    values = torch.linalg.eigvalsh(D)
    damping = 1e-9
    assert len(D) < J[:, :, 0].numel() and values[-1] / values[0] < 1e5
    check(Dual(G.chain, damping), torch.linalg.inv(D + damping * eye(len(D))), J, 1e-10)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    batch=st.integers(1, 8),
    bias=st.booleans(),
    activation=st.sampled_from([nn.Tanh, nn.Softplus, nn.ReLU]),
    loss=st.sampled_from([nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum"), nn.BCEWithLogitsLoss()]),
    kind=st.sampled_from([Hessian, GGN]),
    damping=st.sampled_from([10.0, 0.1, 0.01, -0.05]),
    seed=st.integers(0, 999),
)
def test_inverse_of_random_shapes(sizes, batch, bias, activation, loss, kind, damping, seed):
    """As right as its own `inverse_error` says, to a factor and 1e-11; with a warning from half of the digits on."""
    torch.manual_seed(seed)
    model = tall_skinny(sizes, activation, bias=bias, gain=1.2, seed=seed)
    x = torch.randn(batch, sizes[0]).double()
    y = torch.rand(batch, sizes[-1]).double()
    H = kind(model, loss, x, y / y.sum(1, keepdim=True), check=False)
    A = H.dense() + damping * eye(H.shape[0])
    values = torch.linalg.eigvalsh(A)
    assume(values.abs().min() > 1e-6 * max(1.0, values.abs().max().item()))
    try:
        F = H.factor(damping)
        d = F.inverse_diagonal()
    except (SingularShiftError, AccuracyWarning):
        assume(False)  # refused or warned of
    M = torch.linalg.inv(A)
    assert relative(d, M.diagonal()) < max(1e-10, 30 * F.inverse_error)
    J = reference(model, loss, x, y)[0]
    assert (F.output_covariance() - J @ M @ J.mT).norm() < max(1e-10, 100 * F.inverse_error) * (
        (J.norm() ** 2 * M.norm()).item() + 1e-12
    )
    if values[0] > 0:
        check_samples(F, M, 1e-9)


@pytest.mark.parametrize("last", (1, 2))
def test_next_to_an_eigenvalue_of_a_later_part_there_is_a_warning(last):
    """At a distance d the inverse loses 1/d^2 where a solve loses 1/d, and the uncertainty of the pivots does not tell."""
    H = Hessian(*build("tanh, cross-entropy"))
    D, cut = H.dense(), H.shape[0] - sum(len(H.block(-1 - i)) for i in range(last))
    trailing = torch.linalg.eigvalsh(D[cut:, cut:])
    shift = trailing[trailing > 0.05].min().item()
    for distance in (1e-6, 1e-7, 1e-8):
        damping = -shift * (1 + distance)
        F, M = H.factor(damping), torch.linalg.inv(D + damping * eye(len(D)))
        for what in (F.inverse_diagonal, F.inverse_trace, F.output_covariance, lambda F=F: F.inverse_block(-1)):
            with pytest.warns(AccuracyWarning, match="right to a relative .* only: the damping is close"):
                found = what()
            if what == F.inverse_diagonal:
                error = relative(found, M.diagonal())
        assert error > 1e-8
        assert error / 10 < F.inverse_error < 10 * error
        assert relative(H.solve(H.gradient, damping), M @ H.gradient) < 1e-7  # solves are refined
    assert H.factor(-shift * 1.1).inverse_error < INDEFINITE
    assert H.factor(10.0).inverse_error == 0.0


def test_samples_have_the_covariance():
    """x^T (H + damping I) x of a sample is chi-square of P degrees of freedom; the samples differ with the generator."""
    model, loss, x, y = build("skip connections")
    for H in (Hessian(model, loss, x, y), GGN(model, loss, x, y)):
        F = H.factor(5.0)
        X, P = F.sample(400, torch.Generator("cpu").manual_seed(1)), H.shape[0]
        squares = (X * (H @ X + 5.0 * X)).sum(0)
        assert abs(squares.mean().item() - P) < 5 * (2 * P / 400) ** 0.5
        assert squares.var().item() == pytest.approx(2 * P, rel=0.5)
        assert abs(X.mean().item()) < 5 * (F.inverse_trace() / P / X.numel()) ** 0.5
        assert not torch.equal(X[:, :1], F.sample(1, torch.Generator("cpu").manual_seed(2)))


def test_indefinite_has_no_samples():
    H = Hessian(*build("tanh, cross-entropy"))
    with pytest.raises(ValueError, match=r"has \d+ negative eigenvalues.*more damping.*hinv.GGN"):
        H.factor(0.01).sample()


def test_a_stage_that_is_not_there_is_named():
    H, G = Hessian(*build("frozen layers")), GGN(*build("frozen layers"))
    for F in (H.factor(2.0), Dual(G.chain, 1.0)):
        assert F.names == ["2", "6"]
        assert torch.equal(F.inverse_block("6"), F.inverse_block(-1))
        for wrong in ("0", 2, -3, "x"):
            with pytest.raises(ValueError, match=r"no stage .* use one of '2', '6', or its number from 0 to 1"):
                F.inverse_block(wrong)
            with pytest.raises(ValueError, match="use one of '2', '6'"):
                H.block(wrong)


@pytest.mark.parametrize("kind", (Hessian, GGN))
def test_wide_layers_and_many_classes(kind):
    """83,000 parameters, of which P x P would be 55 GB: entries of the diagonal by solves, the covariance of an output by a solve with its Jacobian."""
    torch.manual_seed(0)
    model = tall_skinny((3000, 20, 12, 400), gain=1.0)
    x, y = torch.randn(6, 3000).double(), torch.arange(6) * 50
    H = kind(model, nn.CrossEntropyLoss(), x, y, check=False)
    for damping in (20.0, 0.1):
        F = Factor(H.structure(torch.float64), damping, H.__matmul__)
        d, P = F.inverse_diagonal(), H.shape[0]
        where = torch.arange(7, P, P // 16)
        b = torch.zeros(P, len(where)).double()
        b[where, torch.arange(len(where))] = 1.0
        x_ = H.solve(b, damping)
        assert relative(d[where], x_[where].diagonal()) < 1e-9
        function, vector = reference_loss(model, lambda out, _: out, x, y)
        _, vjp = torch.func.vjp(function, vector)
        e = torch.zeros(6, 400).double()
        e[3, 150] = 1.0
        (j,) = vjp(e)
        column = torch.func.jvp(function, (vector,), (H.solve(j, damping),))[1][3]
        assert relative(F.output_covariance()[3, :, 150], column) < 1e-9
        if kind is GGN:
            dual = Dual(H.chain, damping)
            assert relative(dual.inverse_diagonal(), d) < 1e-11
            assert relative(dual.inverse_block("2"), F.inverse_block("2")) < 1e-11


def test_float32():
    model, loss, x, y = build("tanh, cross-entropy")
    for kind in (Hessian, GGN):
        H = kind(model, loss, x, y).cast(torch.float32)
        F, D = H.factor(3.0), H.double().dense()
        M = torch.linalg.inv(D + 3.0 * eye(len(D)))
        found = F.inverse_diagonal(), F.inverse_block(0), F.output_covariance(), F.sample(2)
        assert {t.dtype for t in found} == {torch.float32}
        assert relative(found[0].double(), M.diagonal()) < 1e-6
        assert H.effective_parameters(3.0) == pytest.approx((M @ D).trace().item(), rel=1e-9)


@pytest.mark.parametrize("kind", (Hessian, GGN))
def test_effective_parameters(kind):
    H = kind(*build("residual blocks"))
    values = torch.linalg.eigvalsh(H.dense())
    for damping in (3.0, 0.1, 1e-3):
        expected = (values / (values + damping)).sum().item()
        assert H.effective_parameters(damping) == pytest.approx(expected, rel=1e-8, abs=1e-10)


def problem_and_test(name):
    """Training batch, and three other samples."""
    model, loss, x, y = build(name)
    generator = torch.Generator(DEVICE).manual_seed(8)
    return (model, loss, x, y), (
        x[:3] + 0.3 * torch.randn(x[:3].shape, generator=generator, dtype=torch.float64),
        y[-3:],
    )


def test_gradient_of(model, loss, x, y):
    J, b, _ = reference(model, loss, x, y)
    return torch.einsum("ncp,nc->p", J, b)


test_gradient_of.__test__ = False
WITH_TESTS = [name for name in NAMES if name != "one sample"]


@pytest.mark.parametrize("name", WITH_TESTS)
def test_influence_and_leave_one_out(name):
    """By the explicit gradients and curvatures of single samples and dense inverses."""
    problem, test = problem_and_test(name)
    J, b, Lambda = reference(*problem)
    gradients = torch.einsum("ncp,nc->np", J, b)
    g_test = test_gradient_of(*problem[:2], *test)
    H, G, damping = reference_hessian(*problem), ggn_of(J, Lambda), 0.5
    for kind, D in ((Hessian, H), (GGN, G)):
        M = D + damping * eye(len(D))
        assert (
            relative(hinv.influence(kind(*problem), *test, damping), gradients @ torch.linalg.solve(M, g_test)) < 1e-7
        )
    moved = []
    for n in range(len(J)):
        without = M - J[n].T @ Lambda[n] @ J[n]
        moved.append(g_test @ torch.linalg.solve(without, gradients[n]))
    assert relative(hinv.leave_one_out(GGN(*problem), *test, damping), torch.stack(moved)) < 1e-7


@pytest.mark.parametrize("name", ("tanh, cross-entropy", "gelu, weighted sum", "skip connections", "jets"))
def test_leave_one_out_of_the_hessian(name):
    problem, test = problem_and_test(name)
    model, loss, x, y = problem
    damping, g_test = 0.5, test_gradient_of(model, loss, *test)
    gradients, fixed = torch.einsum("ncp,nc->np", *reference(*problem)[:2]), model(x.clone()).detach()
    D = reference_hessian(*problem)
    moved = []
    for n in range(len(x)):
        others = torch.arange(len(x)) != n

        def rest(out, y, n=n, others=others):
            return loss(torch.where(others.view(-1, *[1] * (out.ndim - 1)), out, fixed), y)

        M = reference_hessian(model, rest, x, y) + damping * eye(len(D))
        moved.append(g_test @ torch.linalg.solve(M, gradients[n]))
    assert relative(hinv.leave_one_out(Hessian(*problem), *test, damping), torch.stack(moved)) < 1e-7


# on a GPU the residual ends just above 1e-8, which is said; the answer is judged all the same
@pytest.mark.filterwarnings(("error" if DEVICE == "cpu" else "ignore") + "::hinv.AccuracyWarning")
def test_leave_one_out_of_samples_that_determine_their_own_prediction():
    """At little damping the leverages are next to one; the network is linear, so that long arithmetic can tell."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 40
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, y = (torch.randn(5, k, generator=generator, dtype=torch.float64) for k in (8, 1))
    model, damping = nn.Sequential(nn.Linear(8, 1)).double(), 1e-8
    test = torch.ones(1, 8).double(), torch.zeros(1, 1).double()
    found = hinv.leave_one_out(GGN(model, nn.MSELoss(), x, y), *test, damping)
    Z = mpmath.matrix(torch.cat([x, torch.ones(5, 1)], 1).tolist())
    residual = Z * mpmath.matrix(
        torch.cat([model[0].weight.flatten(), model[0].bias]).detach().tolist()
    ) - mpmath.matrix(y.tolist())
    z = mpmath.matrix([1.0] * 9)
    g_test = 2 * z * (z.T * mpmath.matrix(torch.cat([model[0].weight.flatten(), model[0].bias]).detach().tolist()))[0]

    def left_out(n):
        rows = mpmath.matrix([[Z[m, j] for j in range(9)] for m in range(5) if m != n])
        M = rows.T * rows * mpmath.mpf(2) / 5 + mpmath.mpf(damping) * mpmath.eye(9)
        return mpmath.lu_solve(M, mpmath.matrix([Z[n, j] for j in range(9)]) * residual[n] * mpmath.mpf(2) / 5)

    expected = [float((g_test.T * left_out(n))[0]) for n in range(5)]
    assert relative(found, torch.tensor(expected).double()) < 1e-6


def test_leave_one_out_where_the_dual_has_no_closed_form():
    """HuberLoss far from its targets is linear: a gradient without curvature. And of one sample nothing is left."""
    (model, _, x, y), test = problem_and_test("sigmoid, MSE")
    loss = nn.HuberLoss(delta=1.01 * (model(x) - y).abs().median().item())
    J, b, Lambda = reference(model, loss, x, y)
    assert ((Lambda.diagonal(0, 1, 2) == 0) & (b != 0)).any() and Lambda.any()
    gradients, g_test = torch.einsum("ncp,nc->np", J, b), test_gradient_of(model, loss, *test)
    M, moved = ggn_of(J, Lambda) + eye(J.shape[2]), []
    for n in range(len(J)):
        without = M - J[n].T @ Lambda[n] @ J[n]
        moved.append(g_test @ torch.linalg.solve(without, gradients[n]))
    assert relative(hinv.leave_one_out(GGN(model, loss, x, y), *test, 1.0), torch.stack(moved)) < 1e-7
    for kind in (Hessian, GGN):
        H = kind(*build("one sample"))
        found = hinv.leave_one_out(H, *build("one sample")[2:], 0.5)  # only the penalty is left
        torch.testing.assert_close(found, 2.0 * (H.gradient @ H.gradient).reshape(1), rtol=1e-8, atol=0.0)


def test_samples_that_the_network_cannot_take_are_refused():
    H = Hessian(*build("tanh, cross-entropy"))
    x, y = build("tanh, cross-entropy")[2:]
    with pytest.raises(ValueError, match="cannot take"):
        hinv.influence(H, x[:, :4], y)
    with pytest.raises(ValueError, match="label 6 is out of range"):
        hinv.leave_one_out(H, x, y + 6)
    with pytest.raises(TypeError, match="convert one to the other"):
        hinv.influence(H, x.float(), y)
