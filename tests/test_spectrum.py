"""Counts, certified eigenvalues, trace, diagonal and blocks against the dense matrix."""

import numpy as np
import pytest
import torch
from conftest import DEVICE, NAMES, build, reference_hessian, relative
from faults import survived
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import hinv
from hinv import GGN, CertificateWarning, Hessian, SingularShiftError, errors, spectrum, tall_skinny
from hinv.spectrum import eigenpairs


def network(sizes=(8, *[6] * 5, 4), batch=12, kind=Hessian, gain=1.0, bias=True, seed=0):
    x = torch.randn(batch, sizes[0], generator=torch.Generator(DEVICE).manual_seed(seed), dtype=torch.float64)
    return kind(
        tall_skinny(sizes, gain=gain, bias=bias, seed=seed), nn.CrossEntropyLoss(), x, torch.arange(batch) % sizes[-1]
    )


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_eigvalsh(name):
    H = Hessian(*build(name))
    values = torch.linalg.eigvalsh(reference_hessian(*build(name)))
    edges = torch.linspace(values[0] * 1.05 - 1e-3, values[-1] * 1.05 + 1e-3, 8).double()
    edges = edges[torch.stack([(values - e).abs().min() > 1e-9 for e in edges])]
    assert H.counts(edges).tolist() == torch.histogram(values.cpu(), edges.cpu()).hist.int().tolist()
    assert H.count_below(edges[0].item()) == 0 and H.count_below(edges[-1].item()) == len(values)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    batch=st.integers(1, 8),
    kind=st.sampled_from([Hessian, GGN]),
    share=st.floats(-1.2, 1.2),
    seed=st.integers(0, 99),
)
def test_count_below(sizes, batch, kind, share, seed):
    H = network(sizes, batch, kind, seed=seed)
    values = torch.linalg.eigvalsh(H.dense())
    shift = share * values.abs().max().item()
    assume((values - shift).abs().min() > 1e-9 * max(1.0, values.abs().max().item()))
    try:
        assert H.count_below(shift) == int((values < shift).sum())
    except SingularShiftError:
        assume(False)  # an unlucky pivot inside: refused, not wrong


def test_counts_are_kept_and_survive_an_interruption(monkeypatch):
    H, calls = network(), []
    factor = H.factor

    def interrupted(damping, *how):
        calls.append(damping)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return factor(damping, *how)

    monkeypatch.setattr(H, "factor", interrupted)
    edges = [-9.0, -0.1, 0.1, 9.0]
    with pytest.raises(KeyboardInterrupt) as stop:
        H.counts(edges)
    assert "2 of 4 edges are counted and kept" in stop.value.__notes__[0]
    assert int(H.counts(edges).sum()) == H.shape[0]
    assert calls == [9.0, 0.1, -0.1, -0.1, -9.0]
    survived(
        "counts of eigenvalues: Ctrl-C",
        "a note says how many edges are counted; the same call goes on from there",
        "the edges counted so far",
    )


def test_bad_edges_and_shifts_on_eigenvalues():
    two = nn.Sequential(nn.Linear(2, 1, bias=False)).double()  # squared error of two weights: H = 2 I
    H = Hessian(two, nn.MSELoss(reduction="sum"), torch.eye(2).double(), torch.zeros(2, 1).double())
    for edges in ([0.1], [0.2, 0.1], [0.1, 0.1], [0.0, float("nan")]):
        with pytest.raises(ValueError, match="edges must be at least two increasing numbers"):
            H.counts(edges)
    for call in (H.count_below, lambda s: H.eigsh(1, sigma=s)):
        with pytest.raises(SingularShiftError, match="minus an eigenvalue"):
            call(2.0)
    assert (H.count_below(1.99), H.count_below(2.01)) == (0, 2)
    with pytest.raises(ValueError, match="finite number"):
        H.count_below(float("nan"))


@pytest.mark.parametrize("edges", [[-1.0, 2.0, 3.0], [1.0, 2.0], [2.0, 2.5], [0.0, 1.0, 2.0, 4.0]])
def test_an_eigenvalue_on_an_edge_belongs_to_the_bin_on_its_right(edges):
    """And on the last edge to the last bin, as numpy.histogram has it: H = 2 I."""
    two = nn.Sequential(nn.Linear(2, 1, bias=False)).double()
    H = Hessian(two, nn.MSELoss(reduction="sum"), torch.eye(2).double(), torch.zeros(2, 1).double())
    with pytest.warns(CertificateWarning, match="the edge 2 is an eigenvalue, or next to one: counted at"):
        found = H.counts(edges)
    assert found.tolist() == np.histogram([2.0, 2.0], edges)[0].tolist()


def test_zero_as_an_edge():
    """Where the batch leaves weights without curvature, zero is an eigenvalue many times over."""
    torch.manual_seed(0)
    H = Hessian(tall_skinny((5, 4, 4, 3)), nn.CrossEntropyLoss(), torch.randn(3, 5).double(), torch.arange(3))
    values = torch.linalg.eigvalsh(H.dense())
    values = torch.where(values.abs() < 1e-12, 0.0, values)
    assert (values == 0).sum() > 3
    edges = torch.linspace(-1, 1, 65).double()
    with pytest.warns(CertificateWarning, match="the edge 0 is an eigenvalue"):
        found = H.counts(edges)
    assert found.tolist() == np.histogram(values.cpu(), edges.cpu())[0].tolist()


# -- eigenvalues -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (Hessian, GGN))
def test_both_ends_and_the_interior_are_certified(kind):
    H = network(kind=kind)
    values = torch.linalg.eigvalsh(H.dense())
    inside = [values[5].item() + 1e-4, values[-12].item() * 0.99, 0.1 * values[-1].item()]
    wanted = {("LA", None): values[-5:], ("SA", None): values[:5]}
    wanted[("LM", None)] = values[values.abs().argsort()[-5:]].sort().values
    for sigma in inside if kind is Hessian else inside[1:]:  # the GGN has zeros at values[5]
        wanted[("LM", sigma)] = values[(values - sigma).abs().argsort()[:5]].sort().values
    for (which, sigma), expected in wanted.items():
        found = H.eigsh(5, which, sigma)
        assert found.certified and "by inertia" in found.note
        assert (found.values - expected).abs().max() < 1e-10
        assert found.residuals.max() < 1e-8
        assert (H @ found.vectors - found.vectors * found.values).abs().max() < 1e-8
        torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(5).double(), rtol=0, atol=1e-10)


def repeated():
    """Two equal halves that never meet: a GGN with every eigenvalue at least twice."""
    torch.manual_seed(0)
    small, x = tall_skinny((3, 4, 2)), torch.randn(6, 3).double()
    big = tall_skinny((6, 8, 4))
    with torch.no_grad():
        for p, q in zip(big.parameters(), small.parameters(), strict=True):
            p.copy_(torch.block_diag(q, q) if q.ndim == 2 else torch.cat([q, q]))
    return big, nn.MSELoss(reduction="sum"), torch.cat([x, x], 1), torch.zeros(6, 4).double()


def test_multiplicities_are_neither_skipped_nor_repeated():
    G = GGN(*repeated())
    values = torch.linalg.eigvalsh(G.dense())
    assert (values[-1] - values[-2]).abs() < 1e-12 * values[-1]
    for k in (1, 3, 4):
        found = G.eigsh(k)
        assert found.certified
        torch.testing.assert_close(found.values, values[-k:])
    found = G.eigsh(4, sigma=values[-3].item() + 0.01)
    assert found.certified
    nearest = values[(values - values[-3] - 0.01).abs().argsort()[:4]].sort().values
    torch.testing.assert_close(found.values, nearest)


def test_what_arpack_skips_is_found(monkeypatch):
    """ARPACK made to miss the largest eigenvalue: the count says so, and the second search finds it."""
    H, searches = network(), []
    search = eigenpairs._Region.search

    def forgetful(self, k, known):
        searches.append(k)
        if len(searches) > 1:
            return search(self, k, known)
        top = search(self, k + 1, known)
        return top[:, :-1]  # ascending: the last is the largest

    monkeypatch.setattr(eigenpairs._Region, "search", forgetful)
    found = H.eigsh(3)
    assert found.certified and searches == [3, 1]
    assert (found.values - torch.linalg.eigvalsh(H.dense())[-3:]).abs().max() < 1e-10
    monkeypatch.setattr(
        eigenpairs._Region,
        "search",
        lambda self, k, known: search(self, 5, known)[:, :-1][:, -3:] if not known.shape[1] else known[:, :0],
    )
    with pytest.warns(CertificateWarning, match="3 eigenvalues above .* by inertia, 2 found; 4 above"):
        assert not H.eigsh(3).certified


def test_of_a_large_cluster_only_what_was_asked_is_found(monkeypatch):
    """The zeros of a Gauss-Newton matrix, and of the weights that a small batch does not excite: certified without finding all of them."""
    widest, search = [], eigenpairs._Region.search

    def watched(self, k, known):
        widest.append(k)
        return search(self, k, known)

    monkeypatch.setattr(eigenpairs._Region, "search", watched)
    for H in (network(kind=GGN, batch=3), network((40, 10), 4), network((16,) * 5 + (4,), 4)):
        values = torch.linalg.eigvalsh(H.dense())
        found = H.eigsh(2, "SA")
        assert found.certified and max(widest) == 2
        assert (found.values - values[:2]).abs().max() < 1e-10
        rank = int((values.abs() > 1e-9).sum())
        found = H.eigsh(rank + 2, "LM")
        assert found.certified
        assert (found.values.abs().sort().values - values.abs().sort().values[-rank - 2 :]).abs().max() < 1e-9
        widest.clear()


def test_multiples_of_the_identity_and_zero():
    x = torch.eye(4).double()
    H = Hessian(tall_skinny((4, 1), bias=False), nn.MSELoss(reduction="sum"), x, torch.zeros(4, 1).double())
    for k in (1, 2, 3):
        for which in ("LA", "SA", "LM"):
            found = H.eigsh(k, which)
            assert found.certified and (found.values - 2.0).abs().max() < 1e-12
    assert H.eigval(0) == pytest.approx(2.0) and H.eigval(3) == pytest.approx(2.0)
    dead = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        dead[0].weight.copy_(-dead[0].weight.abs())
    H = Hessian(dead, nn.CrossEntropyLoss(), torch.rand(5, 3).double() + 0.1, torch.zeros(5).long())
    assert torch.count_nonzero(H.dense()) == 0
    assert torch.count_nonzero(H.eigsh(3).values) == 0


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    batch=st.integers(1, 6),
    kind=st.sampled_from([Hessian, GGN]),
    which=st.sampled_from(["LA", "SA", "LM", 0.013, -0.007, 0.11]),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
@pytest.mark.filterwarnings("ignore::hinv.CertificateWarning")
def test_what_is_certified_is_right(sizes, batch, kind, which, share, seed):
    H = network(sizes, batch, kind, gain=1.3, seed=seed)
    values = torch.linalg.eigvalsh(H.dense())
    assume(len(values) > 1)
    k = 1 + int(share * min(len(values) - 2, 30))
    sigma = which if isinstance(which, float) else None
    try:
        found = H.eigsh(k, which if sigma is None else "LM", sigma)
    except SingularShiftError:
        assume(False)
    measure = {"LA": lambda v: -v, "SA": lambda v: v, "LM": lambda v: -v.abs()}.get(which, lambda v: (v - sigma).abs())
    expected = measure(values).sort().values[:k]
    if found.certified:
        assert (measure(found.values).sort().values - expected).abs().max() < 1e-8 * max(1.0, values.abs().max().item())


def test_no_memory_for_the_count_is_said(monkeypatch):
    H = network()
    expected = H.eigsh(2).values
    monkeypatch.setattr(H, "factor", lambda *a, **k: (_ for _ in ()).throw(MemoryError("needs 10 bytes")))
    H.counted.clear()
    with pytest.warns(CertificateWarning, match="not certified: needs 10 bytes"):
        found = H.eigsh(2)
    assert not found.certified
    torch.testing.assert_close(found.values, expected)


def test_eigsh_refuses():
    H = network()
    for k in (0, H.shape[0]):
        with pytest.raises(ValueError, match="k must be from 1 to"):
            H.eigsh(k)
    with pytest.raises(ValueError, match="'LA'"):
        H.eigsh(2, "BE")


@pytest.mark.parametrize("kind", (Hessian, GGN))
def test_eigval_by_bisection(kind):
    H = network(kind=kind)
    values = torch.linalg.eigvalsh(H.dense())
    for i in (0, 3, len(values) // 2, -4, -1):
        assert H.eigval(i) == pytest.approx(values[i].item(), rel=2e-8, abs=1e-10)
    assert H.eigval(0, rtol=1e-2) == pytest.approx(values[0].item(), rel=1e-2, abs=1e-10)
    for i in (len(values), -len(values) - 1):
        with pytest.raises(ValueError, match=f"there are {len(values)} eigenvalues"):
            H.eigval(i)
    with pytest.raises(ValueError, match="rtol"):
        H.eigval(0, rtol=0.0)


def test_every_eigenvalue_can_be_asked_for_where_the_batch_leaves_weights_alone():
    H = network((16,) * 5 + (4,), 4)
    values = torch.linalg.eigvalsh(H.dense())
    assert (values.abs() < 1e-12).sum() > 500
    for i in (0, 60, 235, 581, 927, -1):
        assert H.eigval(i) == pytest.approx(values[i].item(), rel=2e-8, abs=1e-8)


def test_float32_models_are_counted_in_float64():
    H = network()
    single = Hessian(H.chain.model.float(), H.chain.loss, H.chain.inputs.float(), H.chain.targets)
    double = single.double()
    assert double.dtype == torch.float64 and double.double() is double
    values = torch.linalg.eigvalsh(double.dense())
    assert single.count_below(0.01) == int((values < 0.01).sum())
    found = single.eigsh(3)
    assert found.certified and found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, values[-3:])
    assert single.logdet(0.1)[1] == pytest.approx((values + 0.1).abs().log().sum().item(), rel=1e-9)


def test_a_minimum_without_any_gradient_is_certified():
    """Teacher and student alike: the gradient is exactly zero, so it tells nothing of the size of H."""
    model, x = (
        tall_skinny((4, 5, 5, 3), seed=2),
        torch.randn(3, 4, generator=torch.Generator(DEVICE).manual_seed(0)).double(),
    )
    H = Hessian(model, nn.MSELoss(), x, model(x).detach())
    assert H.gradient.norm() == 0
    values = torch.linalg.eigvalsh(H.dense())
    for which, expected in (("SA", values[:2]), ("LA", values[-2:])):
        pairs = H.eigsh(2, which)
        assert pairs.certified and torch.allclose(pairs.values, expected, atol=1e-10)
    assert H.eigval(-1) == pytest.approx(values[-1].item(), rel=1e-7)


# -- trace, diagonal, blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (Hessian, GGN))
@pytest.mark.parametrize("name", NAMES)
def test_diagonal_trace_and_blocks(name, kind):
    H = kind(*build(name))
    D = H.dense()
    if kind is Hessian:
        D = reference_hessian(*build(name))
    scale = D.abs().max().item()
    torch.testing.assert_close(H.diagonal(), D.diagonal(), rtol=1e-10, atol=1e-12 * scale)
    assert H.trace() == pytest.approx(D.trace().item(), rel=1e-10, abs=1e-11 * scale)
    start, stages = 0, [s for s in H.chain.live if s.parameters]
    table = H.by_stage()
    assert list(table) == [s.name for s in stages]
    for number, stage in enumerate(stages):
        p = len(stage.x)
        part = D[start : start + p, start : start + p]
        torch.testing.assert_close(H.block(number), part, rtol=1e-10, atol=1e-12 * scale)
        torch.testing.assert_close(H.block(stage.name), part, rtol=1e-10, atol=1e-12 * scale)
        row = table[stage.name]
        assert row["parameters"] == p
        assert row["trace"] == pytest.approx(part.trace().item(), rel=1e-10, abs=1e-11 * scale)
        assert row["norm"] == pytest.approx(torch.linalg.matrix_norm(part).item(), rel=1e-9, abs=1e-9 * scale)
        start += p


def test_no_such_block():
    H = network()
    for stage in ("nowhere", 99):
        with pytest.raises(ValueError, match=r"no stage .* with parameters: use one of '0', "):
            H.block(stage)


def test_names_are_public():
    assert hinv.Eigenpairs is spectrum.Eigenpairs and hinv.CertificateWarning is errors.CertificateWarning


# -- whole data sets ---------------------------------------------------------------------------------------------------


def problem():
    torch.manual_seed(0)
    return tall_skinny((5, 6, 3)), nn.CrossEntropyLoss(), torch.randn(20, 5).double(), torch.arange(20) % 3


def batches(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")])
def test_data_hessian_adds_batches_of_any_size(loss):
    model, _, x, y = problem()
    D = Hessian(model, loss, x, y).dense()
    data = torch.utils.data.TensorDataset(x, y)
    for loader in (batches(x, y, [16, 4]), torch.utils.data.DataLoader(data, batch_size=7)):
        A = spectrum.DataHessian(model, loss, loader)
        assert relative(A @ torch.eye(len(D)).double(), D) < 1e-12
        assert relative(A @ D[0], D @ D[0]) < 1e-12
    values = torch.linalg.eigvalsh(D)
    found = A.eigsh(2, "SA")
    torch.testing.assert_close(found.values, values[:2])
    assert not found.certified and found.residuals.max() < 1e-8
    for method, products in (("hutchinson", 200), ("hutch++", 150), ("xtrace", 150)):
        t = A.trace(method, products)
        assert abs(t.value - D.trace().item()) < 5 * t.standard_error + 1e-9 < 2 * abs(D.trace().item())
        assert t.products <= products and t.estimates >= 2 and A.trace(method, products) == t
    grid, density = A.density(steps=20)
    assert grid[0] < values[0] and grid[-1] > values[-1]
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=0.05)


WEIGHT = torch.tensor([0.5, 1.0, 2.0]).double()
GOALS = torch.rand(20, 3, generator=torch.Generator(DEVICE).manual_seed(1)).double()
LABELS = torch.arange(20) % 3
MEANS = {
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), LABELS),
    "class weights, smoothed": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), LABELS),
    "ignored labels": (nn.CrossEntropyLoss(), torch.where(torch.arange(20) < 6, -100, LABELS)),
    "ignored labels, summed": (nn.CrossEntropyLoss(reduction="sum"), torch.where(torch.arange(20) < 6, -100, LABELS)),
    "class probabilities": (nn.CrossEntropyLoss(), GOALS.softmax(1)),
    "squared error": (nn.MSELoss(), GOALS),
    "binary, weighted": (nn.BCEWithLogitsLoss(weight=WEIGHT), GOALS),
    "Huber": (nn.HuberLoss(delta=0.3), GOALS),
    "Poisson": (nn.PoissonNLLLoss(), GOALS),
}


@pytest.mark.parametrize("name", MEANS)
def test_mean_over_all_data_and_not_over_batches(name):
    loss, goals = MEANS[name]
    model, _, x, _ = problem()
    D = Hessian(model, loss, x, goals).dense()
    A = spectrum.DataHessian(model, loss, batches(x, goals, [3, 12, 5]))
    assert relative(A @ torch.eye(len(D)).double(), D) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_divergence_over_all_data(reduction):
    model, _, x, _ = problem()
    model, loss, goals = nn.Sequential(model, nn.LogSoftmax(1)), nn.KLDivLoss(reduction=reduction), GOALS.softmax(1)
    D = Hessian(model, loss, x, goals).dense()
    A = spectrum.DataHessian(model, loss, batches(x, goals, [3, 12, 5]))
    assert relative(A @ torch.eye(len(D)).double(), D) < 1e-12


def test_batches_of_other_numbers_of_tokens():
    """(4 sequences of 4), (6 of 2): every token weighs the same, as in the mean over all 28."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss = nn.CrossEntropyLoss()

    class Tokens(nn.Module):
        """Classes second, as the loss wants them."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, z):
            return self.inner(z).mT

    batches = [(torch.randn(n, t, 3).double(), torch.randint(0, 3, (n, t))) for n, t in ((4, 4), (6, 2))]
    flat = [torch.cat([b[i].flatten(0, 1) for b in batches]) for i in (0, 1)]
    D = Hessian(model, loss, *flat).dense()
    A = spectrum.DataHessian(Tokens(), loss, batches)
    assert relative(A @ torch.eye(len(D)).double(), D) < 1e-12


def test_batches_of_any_form_through_an_adapter():
    model, loss, x, y = problem()
    D = Hessian(model, loss, x, y).dense()
    dicts = [{"image": a, "label": b, "name": "a"} for a, b in batches(x, y, 7)]
    with pytest.raises(TypeError, match=r"batch 0 is a mapping with 'image', 'label', 'name', and a pair .*adapt="):
        spectrum.DataHessian(model, loss, dicts)
    with pytest.raises(TypeError, match="batch 0 is a tuple of 3"):
        spectrum.DataHessian(model, loss, [(x, y, y)])
    A = spectrum.DataHessian(model, loss, dicts, adapt=lambda b: (b["image"], b["label"]))
    assert relative(A @ torch.eye(len(D)).double(), D) < 1e-12


def test_data_hessian_refuses():
    model, loss, x, y = problem()
    data = torch.utils.data.TensorDataset(x, y)
    make = spectrum.DataHessian
    with pytest.raises(ValueError, match=r"RandomSampler.*shuffle=False"):
        make(model, loss, torch.utils.data.DataLoader(data, shuffle=True))
    for empty in ([], torch.utils.data.DataLoader([])):
        with pytest.raises(ValueError, match="the loader is empty"):
            make(model, loss, empty)
    bad = x.clone()
    bad[9] = float("nan")
    with pytest.raises(ValueError, match="batch 2 of the loader contains NaN"):
        make(model, loss, batches(bad, y, 4))
    with pytest.raises(TypeError, match="reduction 'mean' or 'sum'"):
        make(model, nn.CrossEntropyLoss(reduction="none"), [(x, y)])
    goals = torch.rand(len(x), 3).double()
    with pytest.raises(ValueError, match=r"by what the mean of MultiMarginLoss.* divides is not known"):
        make(model, nn.MultiMarginLoss(), [(x, y)])
    with pytest.raises(ValueError, match="no label that counts"):
        make(model, loss, [(x, torch.full_like(y, -100))])
    with pytest.raises(ValueError, match="batch 1 of the loader contains NaN"):
        make(model, nn.MSELoss(), batches(x, torch.where(torch.arange(len(x))[:, None] == 5, torch.nan, goals), 4))
    with pytest.raises(ValueError, match="do not repeat themselves"):
        make(nn.Sequential(model, nn.Dropout(0.5)), loss, [(x, y)])
    with pytest.raises(ValueError, match="no trainable parameter"):
        make(nn.Flatten(), loss, [(x, y)])
    A = make(model, loss, [(x, y)])
    with pytest.raises(ValueError, match="the factor has shape"):
        A @ torch.ones(3).double()
    with pytest.raises(ValueError, match="k must be from 1"):
        A.eigsh(A.shape[0])
    with pytest.raises(ValueError, match="method must be one of"):
        A.trace("guess")
    with pytest.raises(ValueError, match="too few"):
        A.trace("xtrace", 3)


@pytest.mark.usefixtures("unenforced")
def test_data_hessian_refuses_other_kinds_of_loaders_and_losses():
    model, loss, x, y = problem()
    for gone in (iter([(x, y)]), ((a, b) for a, b in [(x, y)]), 3):
        with pytest.raises(TypeError, match="gone after one pass"):
            spectrum.DataHessian(model, loss, gone)
    with pytest.raises(TypeError, match="reduction 'mean' or 'sum'"):
        spectrum.DataHessian(model, lambda a, b: a.sum(), [(x, y)])


def test_products_that_overflow_are_named():
    model, loss, x, y = problem()
    A = spectrum.DataHessian(model, loss, [(x, y)])
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="not finite"):
        A @ torch.ones(A.shape[0]).double()
    with pytest.raises(ArithmeticError, match="not finite"):
        A.trace("hutchinson", 3)


def test_an_interrupted_trace_keeps_what_it_had(monkeypatch):
    model, loss, x, y = problem()
    A = spectrum.DataHessian(model, loss, [(x, y)])
    import curvlinops

    calls, plain = [], curvlinops.hutchinson_trace

    def stops(operator, num_matvecs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return plain(operator, num_matvecs=num_matvecs)

    monkeypatch.setattr(curvlinops, "hutchinson_trace", stops)
    with pytest.warns(UserWarning, match="interrupted after 7 of 50 estimates"):
        t = A.trace("hutchinson", 50)
    assert t.estimates == 7
    survived("trace of a data set: Ctrl-C", "a warning says after how many estimates", "their mean and standard error")
    calls[:] = [1] * 6
    with pytest.raises(KeyboardInterrupt):  # one estimate has no error
        A.trace("hutchinson", 50)
