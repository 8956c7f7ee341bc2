"""Whole data sets against the mean over all samples, differentiated at once: batches, shares and routes must not show."""

import warnings

import pytest
import torch
from conftest import reference_hessian, relative
from torch import nn

import hinv
from hinv import spectrum, tall_skinny
from hinv.companion import data
from hinv.solver.dual import Dual
from hinv.solver.whole import Formed
from hinv.spectrum import streamed

N, C = 20, 3
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)).double()
GOALS = torch.rand(N, C, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.arange(N) % C
WEIGHT = torch.tensor([0.5, 1.0, 2.0]).double()
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), LABELS),
    "ignored labels": (nn.CrossEntropyLoss(), torch.where(torch.arange(N) < 6, -100, LABELS)),
    "squared error": (nn.MSELoss(), GOALS),
}


def network(sizes=(5, 6, C), gain=1.2):
    return tall_skinny(sizes, nn.Tanh, gain=gain, seed=0).double()


def batches(x, y, sizes=(3, 12, 5)):
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def jacobian(model, x):
    """(N, C, P) sample by sample."""
    named = {n: p.detach() for n, p in model.named_parameters()}

    def of_one(z):
        return torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (z[None],))[0].flatten())(named)

    return torch.cat([j.flatten(2) for j in torch.func.vmap(of_one)(x).values()], 2)


def definition(model, loss, x, y):
    """J^T Lambda J: Lambda the second derivative of the whole loss in all outputs at once."""
    J, outputs = jacobian(model, x).flatten(0, 1), model(x).detach()
    Lambda = torch.func.hessian(lambda f: loss(f.view_as(outputs), y))(outputs.flatten())
    return J.T @ Lambda @ J


def check(F, D, damping, tolerance=1e-11):
    """All that a factor says, against the dense matrix."""
    M = D + damping * torch.eye(len(D)).double()
    inverse, b = torch.linalg.inv(M), torch.linspace(-1, 1, 3 * len(D)).double().sin().view(len(D), 3)
    values = torch.linalg.eigvalsh(M)
    assert relative(F.solve(b), inverse @ b) < tolerance and relative(F.solve(b[:, 0]), inverse @ b[:, 0]) < tolerance
    assert F.inertia == (int((values > 0).sum()), int((values < 0).sum()), 0)
    sign, log = torch.linalg.slogdet(M)
    assert F.logdet[0] == sign and F.logdet[1] == pytest.approx(log.item(), rel=1e-11)
    assert relative(F.inverse_diagonal(), inverse.diagonal()) < tolerance
    assert F.inverse_trace() == pytest.approx(inverse.trace().item(), rel=tolerance)
    if values[0] > 0:
        half = F.colored(torch.eye(F.noises).double())
        assert relative(half @ half.T, inverse) < tolerance


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_of_a_mean_over_all_data(name):
    loss, y = LOSSES[name]
    model = network()
    D = definition(model, loss, X, y)
    G = spectrum.DataGGN(model, loss, batches(X, y))
    assert relative(G @ torch.eye(len(D)).double(), D) < 1e-12 and relative(G.dense(), D) < 1e-12
    assert relative(G.diagonal(), D.diagonal()) < 1e-12
    assert G.trace().value == pytest.approx(D.trace().item(), rel=1e-12) and G.trace().standard_error == 0
    assert relative(G.eigvalsh(), torch.linalg.eigvalsh(D)) < 1e-12
    check(G.factor(0.1), D, 0.1)
    assert G.inertia(0.1) == (len(D), 0, 0) and G.logdet(0.1) == G.factor(0.1).logdet
    b = D[0] + 1
    x = G.solve(b, 0.1, rtol=1e-11)
    assert relative(x, torch.linalg.solve(D + 0.1 * torch.eye(len(D)).double(), b)) < 1e-9
    assert G.last_solve.method == "cg" and G.last_solve.residual <= 1e-11


@pytest.mark.parametrize("name", ["summed", "class weights", "squared error"])
def test_hessian_of_a_mean_over_all_data(name):
    loss, y = LOSSES[name]
    model = network()
    D = reference_hessian(model, loss, X, y)
    H = spectrum.DataHessian(model, loss, batches(X, y))
    assert relative(H.dense(), D) < 1e-12 and relative(H.diagonal(), D.diagonal()) < 1e-12
    assert relative(H.eigvalsh(), torch.linalg.eigvalsh(D)) < 1e-12
    negative = 0.5 * torch.linalg.eigvalsh(D)[:2].sum().abs().item()
    for damping in (3.0 * torch.linalg.matrix_norm(D, 2).item(), negative):
        check(H.factor(damping), D, damping, 1e-9)
    assert H.inertia(negative)[1] == 1  # an indefinite one was among them
    b = torch.stack([D[0], torch.ones(len(D)).double()], 1)
    x = H.solve(b, negative)
    assert relative(x, torch.linalg.solve(D + negative * torch.eye(len(D)).double(), b)) < 1e-5
    residual = ((b - D @ x - negative * x).norm(dim=0) / b.norm(dim=0)).max().item()
    assert H.last_solve.method == "minres" and residual < 1e-8
    assert H.last_solve.residual == pytest.approx(residual, abs=1e-12)


class ClassesSecond(nn.Module):
    def forward(self, z):
        return z.mT


def tokens():
    """4 sequences of 4, 6 of 2: every token weighs the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3), ClassesSecond())
    return model.double(), [(torch.randn(n, t, 3).double(), torch.randint(0, 3, (n, t))) for n, t in ((4, 4), (6, 2))]


@pytest.mark.parametrize("kind", [spectrum.DataGGN, spectrum.DataHessian])
def test_batches_of_other_numbers_of_tokens(kind):
    model, loader = tokens()
    flat = [torch.cat([b[i].flatten(0, 1) for b in loader]) for i in (0, 1)]
    reference = definition if kind is spectrum.DataGGN else reference_hessian
    D = reference(model[:-1], nn.CrossEntropyLoss(), *flat)
    A = kind(model, nn.CrossEntropyLoss(), loader)
    assert relative(A.dense(), D) < 1e-12 and relative(A.diagonal(), D.diagonal()) < 1e-12
    F = A.factor(0.3)
    assert isinstance(F, Dual if A.gauss_newton else Formed)  # 84 outputs, 156 parameters; shorter sequences are padded
    check(F, D, 0.3, 1e-10)


def test_the_dual_and_the_formed_matrix_are_chosen_by_size_and_agree(monkeypatch):
    loss, y = LOSSES["class weights"]
    model = network((5, 8, 8, C))
    D, J = definition(model, loss, X, y), jacobian(model, X)
    G = spectrum.DataGGN(model, loss, batches(X, y))
    F = G.factor(0.01)
    assert isinstance(F, Dual) and len(F.L) == N * (C - 1) < N * C < len(D)
    check(F, D, 0.01)
    inverse = torch.linalg.inv(D + 0.01 * torch.eye(len(D)).double())
    assert relative(F.output_covariance(), J @ inverse @ J.mT) < 1e-10
    own = slice(48, 48 + 72)
    assert relative(F.inverse_block(1), inverse[own, own]) < 1e-10
    one = Dual(hinv.GGN(model, loss, X, y).chain, 0.01)
    assert relative(F.L @ F.L.T, one.L @ one.L.T) < 1e-13  # the order of samples is the loader's
    small = spectrum.DataGGN(network((5, 2, C)), loss, batches(X, y)).factor(0.01)
    assert isinstance(small, Formed)
    with pytest.raises(TypeError, match=r"does not know the outputs.*hinv\.GGN"):
        small.output_covariance()
    assert small.names == ["the whole network"] and "Formed(21 x 21, damping 0.01" in repr(small)
    before = F.output_covariance()
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert torch.equal(F.output_covariance(), before)  # of the weights that were factored
    assert relative(G.dense(), D) > 0.1  # it follows the model


def test_an_eigenvalue_is_refused_as_a_shift():
    loss, y = LOSSES["squared error"]
    model = network()
    H = spectrum.DataHessian(model, loss, batches(X, y))
    values = H.eigvalsh()
    with pytest.raises(hinv.SingularShiftError, match=r"not certain|singular"):
        _ = H.factor(-values[-1].item()).inertia
    with pytest.raises(hinv.SingularShiftError, match="change it a little"):
        spectrum.DataHessian(model, loss, [(X * 0, GOALS * 0)]).factor(0.0)


def test_a_float32_model_is_factored_in_float64():
    loss, y = LOSSES["cross-entropy"]
    model = network().float()
    D = definition(network().float().double(), loss, X.float().double(), y)
    G = spectrum.DataGGN(model, loss, batches(X.float(), y))
    check(G.factor(1e-3), D, 1e-3, 1e-9)
    assert G.dense().dtype == G.diagonal().dtype == torch.float32 and relative(G.dense().double(), D) < 1e-6
    pairs = spectrum.DataGGN(model, loss, [(b,) * 2 for b in batches(X.float(), y)], adapt=lambda b: b[0])
    check(pairs.factor(1e-3), D, 1e-3, 1e-9)


def test_what_an_interrupted_solve_had_is_kept(monkeypatch):
    loss, y = LOSSES["cross-entropy"]
    G = spectrum.DataGGN(network(), loss, batches(X, y))
    b, D = torch.ones(G.shape[0]).double(), G.dense()
    inner, count = G.operator._matmat, []

    def stops(v):
        count.append(1)
        if len(count) == 9:
            raise KeyboardInterrupt
        return inner(v)

    monkeypatch.setattr(G.operator, "_matmat", stops)
    with pytest.warns(hinv.AccuracyWarning, match=r"interrupted after 8 products.*the best so far.*residual"):
        x = G.solve(b, 1e-4)
    residual = ((b - D @ x - 1e-4 * x).norm() / b.norm()).item()
    assert G.last_solve.residual == pytest.approx(residual, rel=1e-9) and residual > 1e-8
    energy = (x @ (D @ x) + 1e-4 * x @ x) / 2 - b @ x
    assert energy < 0 and len(count) < 12  # better than nothing, and no product after it but the residuals'


def test_cg_that_meets_negative_curvature_gives_way():
    """A loss that is not convex: its Gauss-Newton matrix is indefinite."""

    class Wells(nn.Module):
        reduction = "sum"

        def forward(self, out, goals):
            return ((out**2 - 1) ** 2).sum()

    model = network()
    D = definition(model, Wells(), X, GOALS)
    values = torch.linalg.eigvalsh(D)
    damping = -0.5 * values[:2].mean().item()
    assert damping > 0.1
    G = spectrum.DataGGN(model, Wells(), batches(X, GOALS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = G.solve(D[0], damping, rtol=1e-7)
    assert G.last_solve.method == "minres"
    assert relative(D @ x + damping * x, D[0]) < 1e-7
    check(G.factor(damping), D, damping, 1e-7)  # by the formed matrix: no dual of such a loss


def test_what_does_not_fit_or_cannot_be_is_refused(monkeypatch):
    loss, y = LOSSES["cross-entropy"]
    G = spectrum.DataGGN(network(), loss, batches(X, y))
    with pytest.raises(ValueError, match="the right-hand side has shape"):
        G.solve(torch.ones(3).double())
    with pytest.raises(ValueError, match="NaN"):
        G.solve(torch.full((G.shape[0],), torch.nan).double())
    with pytest.raises(ValueError, match="finite number"):
        G.factor(float("inf"))
    with pytest.raises(ValueError, match="rtol must be a positive"):
        G.solve(torch.ones(G.shape[0]).double(), rtol=0.0)
    with pytest.raises(ValueError, match=r"NLLLoss is linear.*CrossEntropyLoss"):
        spectrum.DataGGN(nn.Sequential(network(), nn.LogSoftmax(1)), nn.NLLLoss(), batches(X, y))
    monkeypatch.setattr(streamed, "LARGEST", 50)
    for refused in (G.dense, G.eigvalsh, G.factor, G.logdet):
        with pytest.raises(ValueError, match=r"rows, more than 50: use solve"):
            refused()
    monkeypatch.undo()
    monkeypatch.setattr(streamed, "available", lambda device: 1e3)
    with pytest.raises(MemoryError, match=r"are free on cpu\. Use solve"):
        G.dense()
    monkeypatch.undo()

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, z):
            return self.inner(z)

    other = spectrum.DataGGN(Other(), loss, batches(X, y))
    assert relative(other.dense(), G.dense()) < 1e-13 and isinstance(other.factor(0.1), Formed)
    for refused in (other.diagonal, other.trace):
        with pytest.raises(TypeError, match=r"nn\.Sequential, and the model is a Other: use trace\('xtrace'\)"):
            refused()
    assert other.trace("hutchinson", 100).estimates == 100


def digits(n=None):
    """All 1,797, in batches of 300 and what is left of the two parts of the set."""
    parts = [data.load("digits", split, dtype=torch.float64) for split in ("train", "test")]
    x, y = (torch.cat([getattr(part, name) for part in parts])[:n] for name in ("x", "y"))
    return x.flatten(1), y


def test_all_digits():
    x, y = digits()
    model, loss = tall_skinny((64, 24, 24, 24, 10), nn.Tanh, gain=1.0, seed=0).double(), nn.CrossEntropyLoss()
    assert len(x) == 1797
    J, p = jacobian(model, x), model(x).detach().softmax(1)
    centred = (J - (p.unsqueeze(1) @ J)) * p.sqrt().unsqueeze(2)  # sum_c p_c (J_c - sum_d p_d J_d)^2 over the classes
    D = centred.flatten(0, 1).T @ centred.flatten(0, 1) / len(x)
    G = spectrum.DataGGN(model, loss, list(zip(x.split(600), y.split(600), strict=True)))
    assert G.shape[0] == 3010 and relative(G.diagonal(), D.diagonal()) < 1e-9
    F = G.factor(1e-2)
    M = D + 1e-2 * torch.eye(3010).double()
    L, b = torch.linalg.cholesky(M), torch.linspace(-9, 9, 3010).double().sin()
    exact = torch.cholesky_solve(b[:, None], L)[:, 0]
    assert isinstance(F, Formed) and relative(F.solve(b), exact) < 1e-9
    assert relative(G.solve(b, 1e-2, rtol=1e-11), exact) < 1e-9
    assert F.inertia == (3010, 0, 0) and F.logdet[1] == pytest.approx(2 * L.diagonal().log().sum().item(), rel=1e-9)
    assert G.trace().value == pytest.approx(D.trace().item(), rel=1e-9)
    few = spectrum.DataGGN(model, loss, list(zip(x[:150].split(60), y[:150].split(60), strict=True)))
    dual = few.factor(1e-2)
    assert isinstance(dual, Dual)
    J, p = J[:150], p[:150]
    moved = (J @ exact) * p - p * ((J @ exact) * p).sum(1, keepdim=True)
    product = (moved.flatten() @ J.flatten(0, 1)) / 150 + 1e-2 * exact
    assert relative(dual.solve(product), exact) < 1e-9
