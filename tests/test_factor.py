"""The stagewise factorization, the Gauss-Newton matrix, its dual, and the sparse peer, against dense references."""

import gc
import math
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import DEVICE, NAMES, ElementaryLayerNorm, Residual, build, reference_hessian, relative
from faults import survived
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hinv
from hinv import (
    GGN,
    AccuracyWarning,
    Hessian,
    SingularShiftError,
    solve,
    tall_skinny,
)
from hinv.network import losses
from hinv.solver import estimate, factor, matrix, memory, parts, sparse
from hinv.solver.dual import Dual
from hinv.solver.small import Small
from hinv.solver.symmetric import Cholesky

DAMPINGS = (1.0, 0.1, 0.01, -0.05, -0.3)


def shifted(D, damping):
    return D + damping * torch.eye(len(D), dtype=D.dtype)


def reference_ggn(model, loss, x, y):
    """J^T Lambda J from torch.func.jacrev of the whole model and the dense Hessian of the loss."""
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = ElementaryLayerNorm
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def outputs(vector):
        pieces = vector.split([p.numel() for p in named.values()])
        values = {n: v.view_as(p) for (n, p), v in zip(named.items(), pieces, strict=True)}
        return torch.func.functional_call(model, values, (x.clone(),))

    vector = torch.cat([p.detach().flatten() for p in named.values()])
    J = torch.func.jacrev(lambda v: outputs(v).flatten())(vector)
    out = outputs(vector).detach()
    Lambda = torch.func.hessian(lambda o: loss(o.view_as(out), y))(out.flatten())
    return J.T @ Lambda @ J


def check(F, D, damping):
    """Solution, inertia and determinant of a factorization against the dense matrix."""
    A = shifted(D, damping)
    b = torch.randn(len(D), 2, generator=torch.Generator(DEVICE).manual_seed(4), dtype=D.dtype)
    x = F.solve(b)
    x = x + F.solve(b - A @ x)  # one refinement
    assert relative(A @ x, b) < 1e-10
    assert relative(F.solve(b[:, 1]), F.solve(b)[:, 1]) < 1e-9
    values = torch.linalg.eigvalsh(A)
    assert F.inertia == (int((values > 0).sum()), int((values < 0).sum()), 0)
    sign, log = torch.linalg.slogdet(A)
    assert F.logdet[0] == sign
    assert F.logdet[1] == pytest.approx(log.item(), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("name", NAMES)
def test_hessian_factor(name, damping):
    check(Hessian(*build(name)).factor(damping), reference_hessian(*build(name)), damping)


@pytest.mark.parametrize("damping", (1.0, 0.01, -0.05))
@pytest.mark.parametrize("name", NAMES)
def test_gauss_newton_factor_dual_and_products(name, damping):
    G, D = GGN(*build(name)), reference_ggn(*build(name))
    assert relative(G.dense(), D) < 1e-10
    recursion = factor.Factor(parts.parts(G.chain, gauss_newton=True), damping, G.__matmul__)
    check(recursion, D, damping)
    if damping > 0:
        check(Dual(G.chain, damping), D, damping)
        assert recursion.inertia == (len(D), 0, 0)
        assert all(
            isinstance(p.S, Cholesky) or (isinstance(p.S, Small) and p.S.inverse is None)
            for p in recursion.pivots
            if hasattr(p, "S")
        )
        b = torch.randn(len(D), generator=torch.Generator(DEVICE).manual_seed(1), dtype=D.dtype)
        for method in ("auto", "factor", "dense", "sparse"):
            assert relative(G.solve(b, damping, method), torch.linalg.solve(shifted(D, damping), b)) < 1e-7
    assert relative(G.gradient, Hessian(*build(name)).gradient) < 1e-14


@pytest.mark.parametrize("damping", (1.0, 0.01, -0.05))
@pytest.mark.parametrize("name", NAMES)
def test_sparse_peer(name, damping):
    D = reference_hessian(*build(name))
    b = torch.randn(len(D), 2, generator=torch.Generator(DEVICE).manual_seed(4), dtype=D.dtype)
    x = sparse.factor(Hessian(*build(name)).chain, damping)(b)
    assert relative(shifted(D, damping) @ x, b) < 1e-9


def test_sparse_at_damping_zero_where_the_hessian_is_regular():
    """Few weights, many samples: H itself is regular, and no damping is needed."""
    torch.manual_seed(0)
    model = tall_skinny((3, 2, 2), bias=False, gain=1.3)
    problem = model, nn.MSELoss(), torch.randn(20, 3).double(), torch.randn(20, 2).double()
    D = reference_hessian(*problem)
    assert torch.linalg.cond(D) < 1e6
    H = Hessian(*problem)
    assert relative(H.solve(H.gradient, damping=0.0, method="sparse"), torch.linalg.solve(D, H.gradient)) < 1e-8
    assert relative(H.solve(H.gradient, damping=0.0), torch.linalg.solve(D, H.gradient)) < 1e-8


def right_or_refused(H, damping, seed):
    """Inertia equal to eigvalsh's count, log-determinant to 1e-8, residual below 1e-10 after at most two refinements."""
    A = shifted(H.dense(), damping)
    values = torch.linalg.eigvalsh(A)
    assume(
        values.abs().min() > 1e-9 * max(1.0, values.abs().max().item())
    )  # away from eigenvalues by more than rounding
    try:
        F = H.factor(damping)
    except SingularShiftError:
        assume(False)  # an unlucky pivot inside: refused, not wrong
    assert F.inertia == (int((values > 0).sum()), int((values < 0).sum()), 0)
    with warnings.catch_warnings():  # it may warn of fewer digits than there are, the bound stays
        warnings.simplefilter("ignore", AccuracyWarning)
        assert F.logdet[1] == pytest.approx(torch.linalg.slogdet(A)[1].item(), rel=1e-8, abs=1e-7)
    b = torch.randn(len(A), generator=torch.Generator(DEVICE).manual_seed(seed), dtype=A.dtype)
    z = F.solve(b)
    for _ in range(2):
        z = z + F.solve(b - A @ z)
    # as float64 allows: of an ill-conditioned matrix the exact solution, rounded, has a residual of eps |A| |z| (LAPACK's is no smaller)
    floor = torch.finfo(z.dtype).eps * (values.abs().max() * z.norm() / b.norm()).item()
    assert relative(A @ z, b) < max(1e-10, floor)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=7),
    batch=st.integers(1, 9),
    bias=st.booleans(),
    activation=st.sampled_from([nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ReLU, nn.SiLU]),
    loss=st.sampled_from(
        [
            nn.CrossEntropyLoss(),
            nn.MSELoss(reduction="sum"),
            nn.BCEWithLogitsLoss(),
            nn.CrossEntropyLoss(label_smoothing=0.2),
        ]
    ),
    damping=st.sampled_from([1.0, 0.1, 0.01, 1e-3, 1e-4, -1e-3, -0.1, -1.0]),
    gain=st.sampled_from([0.7, 1.0, 1.5]),
    seed=st.integers(0, 999),
)
def test_random_architectures(sizes, batch, bias, activation, loss, damping, gain, seed):
    torch.manual_seed(seed)
    model = tall_skinny(sizes, activation, bias=bias, gain=gain, seed=seed)
    x = torch.randn(batch, sizes[0]).double()
    y = (
        torch.rand(batch, sizes[-1]).double()
        if not isinstance(loss, nn.CrossEntropyLoss)
        else torch.randint(0, sizes[-1], (batch,))
    )
    right_or_refused(Hessian(model, loss, x, y), damping, seed)


def tokens(width):
    return nn.Sequential(nn.Linear(width, 3), nn.LayerNorm(3), hinv.Residual(nn.Linear(3, 3)), nn.Flatten())


MIXED = {  # width -> (module, width after it); all of them on (B, width)
    "linear": lambda a: (nn.Linear(a, 4), 4),
    "no bias": lambda a: (nn.Linear(a, 3, bias=False), 3),
    "tanh": lambda a: (nn.Tanh(), a),
    "softplus": lambda a: (nn.Softplus(), a),
    "layernorm": lambda a: (nn.LayerNorm(a), a),
    "block of one's own": lambda a: (Residual(a, 2), a),
    "residual": lambda a: (hinv.Residual(nn.Sequential(nn.Linear(a, 5), nn.Tanh(), nn.Linear(5, a))), a),
    "projected": lambda a: (hinv.Residual(nn.Sequential(nn.GELU(), nn.Linear(a, 2)), nn.Linear(a, 2, bias=False)), 2),
    "nested": lambda a: (hinv.Residual(nn.Sequential(hinv.Residual(nn.Linear(a, a)), nn.Sigmoid())), a),
    "tokens": lambda a: (
        (nn.Sequential(nn.Unflatten(1, (2, a // 2)), tokens(a // 2)), 6) if a % 2 == 0 else (nn.SiLU(), a)
    ),
    "shared": lambda a: (
        nn.Sequential(
            nn.Unflatten(1, (a, 1)), hinv.SharedLinear(1, 2, [1.0] + [0.0] * (a - 1)), nn.Tanh(), nn.Flatten()
        ),
        2 * a,
    ),
    "one dimension": lambda a: (
        nn.Sequential(nn.Unflatten(1, (1, a)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten()),
        2 * a,
    ),
}


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(list(MIXED)), min_size=1, max_size=5),
    batch=st.integers(1, 6),
    kind=st.sampled_from([Hessian, GGN]),
    damping=st.sampled_from([1.0, 0.1, 0.01, 1e-3, -1e-3, -0.1]),
    seed=st.integers(0, 999),
)
def test_random_mixtures_of_all_kinds_of_stages(names, batch, kind, damping, seed):
    torch.manual_seed(seed)
    modules, width = [], 4
    for name in names:
        module, width = MIXED[name](width)
        modules.append(module)
    assume(width <= 16)
    model = nn.Sequential(*modules, nn.Linear(width, 3)).double()
    right_or_refused(
        kind(model, nn.CrossEntropyLoss(), torch.randn(batch, 4).double(), torch.arange(batch) % 3), damping, seed
    )


def test_loss_as_diagonal_minus_rank_one():
    """The closed forms the Head uses, for every option of the three losses, against C Hessian-vector products."""
    torch.manual_seed(0)
    out, labels, weight = (
        torch.randn(6, 4).double(),
        torch.tensor([0, 1, 2, 3, 1, 2]),
        torch.tensor([0.5, 1, 2, 3]).double(),
    )
    probabilities, binary = torch.randn(6, 4).double().softmax(1), (torch.randn(6, 4) > 0).double()
    cases = [(nn.MSELoss(reduction=r), binary) for r in ("mean", "sum")]
    cases += [
        (nn.BCEWithLogitsLoss(weight=w, pos_weight=p, reduction=r), binary)
        for w in (None, weight)
        for p in (None, weight)
        for r in ("mean", "sum")
    ]
    for r in ("mean", "sum"):
        for w in (None, weight):
            for s in (0.0, 0.3):
                cases += [
                    (nn.CrossEntropyLoss(weight=w, label_smoothing=s, reduction=r), t) for t in (labels, probabilities)
                ]
                cases += [(nn.CrossEntropyLoss(weight=w, label_smoothing=s, reduction=r, ignore_index=2), labels)]
    cases += [(nn.CrossEntropyLoss(), torch.tensor([0, 1, -100, 3, -100, 2]))]
    for loss, y in cases:
        w, u = losses.diagonal_minus_rank_one(loss, out, y)
        V = torch.diag_embed(w) - (0 if u is None else u[:, :, None] * u[:, None, :])
        torch.testing.assert_close(V, losses.curvature(loss, out, y), msg=lambda m, loss=loss: f"{loss}: {m}")
        R = losses.root(loss, out, y)
        torch.testing.assert_close(R @ R.mT, V, msg=lambda m, loss=loss: f"root of {loss}: {m}")
        assert R.shape[2] == (4 if u is None else 3)
    assert losses.diagonal_minus_rank_one(nn.L1Loss(), out, out) is None
    assert losses.diagonal_minus_rank_one(nn.MSELoss(), out[None], out[None]) is None


PEAK = """
def peak(function):
    # growth of the peak resident size over the call: Linux resets the mark (VmHWM) on request
    def status(key):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before
"""


def measured(code):
    """The numbers that a process of its own prints: memory must not depend on what other tests allocated, nor on what was freed."""
    command = [sys.executable, "-W", "ignore", "-c", PEAK + code]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [float(word) for word in out.split()]


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")


@needs_linux
def test_many_classes_stay_small():
    """500 classes, batch 16: peak memory far below one array of (C m)^2 or (B C)^2 numbers (512 MB each)."""
    grown, residual = measured("""
import torch, hinv
torch.set_num_threads(1)
x, y = torch.randn(16, 40).double(), torch.arange(16)
H = hinv.Hessian(hinv.tall_skinny([40, 8, 8, 8, 500], bias=False), torch.nn.CrossEntropyLoss(), x, y)
print(peak(lambda: H.factor(0.1).solve(H.gradient)))
step = H.factor(0.1).solve(H.gradient)
print(((H @ step + 0.1 * step - H.gradient).norm() / H.gradient.norm()).item())
""")
    assert grown < (500 * 16) ** 2 * 8 / 4
    assert residual < 1e-10


@needs_linux
def test_few_weights_on_wide_activations_stay_small():
    """A convolutional network of 898 parameters on images of 32 x 32: nothing of the size of its derivative blocks (gigabytes) when it is checked, solved
    with, or asked for its trace; and what the estimate says is what is used."""
    built, solved, predicted, traced, residual, in_double = measured("""
import torch, hinv
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
def network(c): return nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU(), nn.Conv2d(c, c, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))
loss, y, kept = nn.CrossEntropyLoss(), torch.arange(4), []
small = hinv.Hessian(network(2), loss, torch.randn(4, 3, 8, 8), y)
small.solve(small.gradient, 0.1), small.trace()
net, x = network(8), torch.randn(4, 3, 32, 32)
print(peak(lambda: kept.append(hinv.Hessian(net, loss, x, y))))
H = kept[0]
print(peak(lambda: H.solve(H.gradient, 0.1)), H.estimate().bytes["dense"], peak(H.trace), H.last_solve.residual)
print(H.double().estimate().bytes["dense"])  # in which the trace is taken
""")
    assert built < 1e8 and solved < 1.3 * predicted < 1.3e8 and traced < 1.3 * in_double and residual < 1e-4


def test_residual_networks_are_factored():
    """`auto` counts the blocks of residual stages for what they are: ten times less than the dense route takes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), *[Residual(24, 24) for _ in range(10)], nn.Linear(24, 10)).double()
    H = Hessian(model, nn.CrossEntropyLoss(), torch.randn(32, 64).double(), torch.arange(32) % 10, check=False)
    prediction = H.estimate()
    assert H.shape[0] == 13_810 and prediction.method == "factor"
    assert prediction.flops["factor"] < prediction.flops["dense"] / 5 and prediction.bytes["factor"] < 2**30


@pytest.mark.parametrize("kind", (Hessian, GGN))
@pytest.mark.usefixtures("unenforced")
def test_right_hand_sides_are_checked(kind):
    H = kind(*build("one layer"))
    for F in (H.factor(0.1), factor.Factor(H.structure(H.dtype), 0.1, H.__matmul__)):
        P = H.shape[0]
        with pytest.raises(ValueError, match=rf"shape \({P + 1},\); expected \({P},\) or \({P}, k\)"):
            F.solve(torch.ones(P + 1).double())
        with pytest.raises(ValueError, match="right-hand side has shape"):
            F.solve(torch.ones(P, 1, 1).double())
        with pytest.raises(TypeError, match=r"floating point tensor, not torch\.int64"):
            F.solve(torch.ones(P).long())
        with pytest.raises(TypeError, match="not ndarray"):
            F.solve(np.ones(P))
        assert F.solve(torch.ones(P, 0).double()).shape == (P, 0)


def test_each_damping_costs_only_a_factorization(monkeypatch):
    H = Hessian(*build("residual blocks"))
    H.factor(1.0)
    monkeypatch.setattr(
        "hinv.solver.parts.dense.derivatives", lambda *_: pytest.fail("derivatives were computed again")
    )
    H.factor(0.1)


@pytest.mark.parametrize("gauss_newton", (False, True))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "stride": 2},
        {"padding": (1, 2), "dilation": (2, 1)},
        {"padding": "same"},
        {"kernel_size": (2, 3), "padding": "valid", "stride": (2, 1)},
    ],
    ids=str,
)
def test_convolution_with_its_weights_shared(options, gauss_newton):
    """Blocks and products of the structured part against the per-sample ones of torch.func, for the second layer of a network."""
    torch.manual_seed(0)
    second = nn.Conv2d(2, 3, **({"kernel_size": 3} | options))
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), second, nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(5, 1, 7, 6).double(), torch.tensor([0, 1, 2, 0, 1])
    net(x)
    stage = Hessian(net, nn.CrossEntropyLoss(), x, y).chain.stages[2]
    assert parts.kind(stage, True) is parts.Convolution
    shared, dense = parts.Convolution(stage, gauss_newton, True), parts.Dense(stage, gauss_newton, True)
    assert shared.p == dense.p
    V = torch.randn(len(dense.J), len(dense.J), dtype=torch.float64)
    V = V + V.T
    rotation = torch.stack([shared.take_apart(e.unsqueeze(1))[0][:, 0] for e in torch.eye(shared.p).to(V)], 1)
    (S, N, after), (S_dense, N_dense, after_dense) = shared.blocks(V), dense.blocks(V)
    assert relative(S, rotation @ S_dense @ rotation.T) < 1e-13
    assert relative(N, rotation @ N_dense) < 1e-13
    assert relative(after, after_dense) < 1e-13
    r, v, y = V[:, :3].contiguous(), torch.randn(shared.p, 3).double(), torch.randn(len(after), 3).double()
    assert relative(shared.pull(r)[0], rotation @ dense.pull(r)[0]) < 1e-13
    assert relative(shared.pull(r)[1], dense.pull(r)[1]) < 1e-13
    assert relative(shared.push(rotation @ v, y), dense.push(v, y)) < 1e-13
    assert relative(shared.put_together(rotation @ v, None), v) < 1e-13


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"padding_mode": "circular", "padding": 1},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 6},
    ],
    ids=str,
)
def test_other_convolutions_by_their_dense_blocks(options):
    torch.manual_seed(0)
    second = nn.Conv2d(2, 2, **({"kernel_size": 3} | options))
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), second, nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(3, 1, 7, 7).double(), torch.tensor([0, 1, 2])
    net(x)
    H = Hessian(net, nn.CrossEntropyLoss(), x, y)
    assert parts.kind(H.chain.stages[2], True) is parts.Dense
    check(H.factor(0.1), H.dense(), 0.1)


def test_first_layer_width_does_not_enter():
    """Thousands of inputs: the pivot block has a_out * min(B, a_in + 1) rows, the other pivots equal the damping."""
    H = Hessian(tall_skinny((900, 4, 3)), nn.CrossEntropyLoss(), torch.randn(3, 900).double(), torch.tensor([0, 1, 2]))
    F = H.factor(0.1)
    assert len(F.pivots[-1].S.L) == 4 * 3
    assert relative(H @ F.solve(H.gradient) + 0.1 * F.solve(H.gradient), H.gradient) < 1e-10
    assert sum(F.inertia) == H.shape[0]
    negative = Hessian(
        tall_skinny((900, 4, 3)), nn.CrossEntropyLoss(), torch.randn(3, 900).double(), torch.tensor([0, 1, 2])
    ).factor(-5.0)
    assert negative.inertia[1] >= 4 * (901 - 3)


def test_shift_on_an_eigenvalue_is_named():
    """H = 2 exactly (one weight, squared error): damping -2. And a generic network at minus a computed eigenvalue."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(SingularShiftError, match=r"at stage '0' \(Linear\).*minus an eigenvalue.*method='sparse'"):
        Hessian(model, nn.MSELoss(), one, one).factor(-2.0)
    H = Hessian(*build("tanh, cross-entropy"))
    value = torch.linalg.eigvalsh(H.dense())[-1].item()
    if DEVICE == "cpu":
        with pytest.raises(SingularShiftError, match="at stage"):
            H.factor(-value)
    with pytest.raises(SingularShiftError, match=r"at stage|not certain"):  # rounding says which, on another device
        _ = H.factor(-value).inertia
    with pytest.raises(SingularShiftError):
        Hessian(model, nn.MSELoss(), one, one).solve(one[0], damping=-2.0)
    with pytest.raises(SingularShiftError, match="at stage"):
        Hessian(*build("tanh without bias, B < C")).factor(0.0)  # weights the batch does not excite have no curvature


def test_overflowing_curvature_is_named():
    """Ten layers that grow by 1e20 each, on inputs of 1e-100: the loss is finite, the curvature in the activations is not."""
    model = tall_skinny((4, *[4] * 9, 3), nn.Identity, gain=1e20, bias=False)
    H = Hessian(model, nn.MSELoss(), torch.full((2, 4), 1e-100).double(), torch.zeros(2, 3).double())
    with pytest.raises(SingularShiftError, match="not finite"):
        H.factor(1.0)


def test_auto_falls_back_and_says_so(monkeypatch):
    """A factorization spoilt on purpose: first GMRES, with a worse one SuperLU on K; the report names them."""
    H = Hessian(*build("tanh, cross-entropy"))
    monkeypatch.setattr(H, "estimate", lambda: SimpleNamespace(method="factor"))
    exact = torch.linalg.inv(shifted(H.dense(), 0.1))
    u = torch.randn(len(exact), 2, generator=torch.Generator(DEVICE).manual_seed(0), dtype=exact.dtype)
    spoilt = exact + u @ u.T  # wrong in two directions: refinement diverges, GMRES needs a few steps
    monkeypatch.setitem(solve.METHODS, "factor", lambda *_: lambda b: spoilt @ b)
    H.solve(H.gradient, damping=0.1)
    assert H.last_solve.method == "factor+gmres" and H.last_solve.residual < 1e-8
    monkeypatch.setitem(solve.METHODS, "factor", lambda *_: lambda b: 0 * b)
    H.solve(H.gradient, damping=0.1)
    assert H.last_solve.method == "factor+sparse" and H.last_solve.residual < 1e-8
    monkeypatch.setitem(solve.METHODS, "sparse", lambda *_: lambda b: 0 * b)
    with pytest.warns(AccuracyWarning, match="relative residual 1.0e.00 .* not reached"):
        H.solve(H.gradient, damping=0.1)

    def singular(*_):
        raise SingularShiftError("at stage 'x'")

    monkeypatch.undo()
    monkeypatch.setattr(H, "estimate", lambda: SimpleNamespace(method="factor"))
    monkeypatch.setitem(solve.METHODS, "factor", singular)
    H.solve(H.gradient, damping=0.1)
    assert H.last_solve.method == "factor+sparse"


def test_estimate_is_a_sentence_and_chooses():
    small = Hessian(*build("one layer"))
    assert small.estimate().method == "dense"
    deep = Hessian(
        tall_skinny((16, *[16] * 60, 10)), nn.CrossEntropyLoss(), torch.randn(4, 16).double(), torch.arange(4)
    )
    assert deep.estimate().method == "factor"
    assert str(deep.estimate()).startswith("16,490 parameters, batch 4: method 'factor', about ")
    few = GGN(
        tall_skinny((64, *[24] * 6, 10)), nn.CrossEntropyLoss(), torch.randn(16, 64).double(), torch.arange(16) % 10
    )
    assert few.estimate().method == "dual" and isinstance(few.factor(0.1), Dual)
    many = GGN(tall_skinny((64, *[8] * 6, 1000)), nn.CrossEntropyLoss(), torch.randn(16, 64).double(), torch.arange(16))
    assert many.estimate().method == "factor"


@needs_linux
@pytest.mark.parametrize("damping", [0.1, 30.0])
@pytest.mark.parametrize(
    ("sizes", "batch"), [((64, *[48] * 8, 10), 32), ((64, *[32] * 4, 1000), 32), ((64, *[24] * 40, 10), 32)]
)
def test_estimate_of_memory(sizes, batch, damping):
    """Predicted against measured peak in a process of its own whose allocator returns what is freed: within 20 percent."""
    grown, predicted = measured(f"""
import torch, hinv
torch.set_num_threads(1)
x, y = torch.randn({batch}, 64).double(), torch.arange({batch}) % 10
H = hinv.Hessian(hinv.tall_skinny({sizes}), torch.nn.CrossEntropyLoss(), x, y)
print(peak(lambda: H.factor({damping})), H.estimate().bytes["factor"])
""")
    assert abs(grown - predicted) < 0.2 * predicted


def test_memory_is_refused_before_allocating(monkeypatch):
    H = Hessian(
        tall_skinny((64, *[24] * 8, 10)), nn.CrossEntropyLoss(), torch.randn(32, 64).double(), torch.arange(32) % 10
    )
    monkeypatch.setattr(memory, "available", lambda device: 10**6)
    monkeypatch.setattr("hinv.solver.matrix.parts", lambda *_: pytest.fail("allocated"))
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        MemoryError,
        match=r"method 'factor' on 6,\d+ parameters and a batch of 32 needs about [\d,]+ bytes; 1,000,000 are free on (cpu|cuda:0). Reduce",
    ):
        H.factor(0.1)
    with pytest.raises(MemoryError):
        H.solve(H.gradient, method="factor")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_float32_models():
    """factor() computes in the model's dtype or in float64 on request; solve() in float64."""
    model = tall_skinny((16, *[8] * 20, 5), dtype=torch.float32)
    x, y = torch.randn(8, 16, generator=torch.Generator(DEVICE).manual_seed(0)), torch.arange(8) % 5
    H = Hessian(model, nn.CrossEntropyLoss(), x, y)
    step = H.solve(H.gradient, damping=0.1, method="factor")
    assert step.dtype == torch.float32 and H.last_solve.residual <= 1e-4
    single, double = H.factor(1.0), H.factor(1.0, dtype=torch.float64)
    exact = Hessian(tall_skinny((16, *[8] * 20, 5), dtype=torch.float32).double(), nn.CrossEntropyLoss(), x.double(), y)
    assert double.inertia == exact.factor(1.0).inertia == single.inertia
    assert double.logdet[1] == pytest.approx(exact.factor(1.0).logdet[1], rel=1e-12)
    assert single.solve(H.gradient).dtype == torch.float32
    assert relative(single.solve(H.gradient).double(), exact.solve(exact.gradient, 1.0)) < 1e-2


def test_float32_gauss_newton_in_float64():
    """The dtype reaches the dual and the recursion, the estimate counts it, and right-hand sides keep their own."""
    x, y = torch.randn(8, 16, generator=torch.Generator(DEVICE).manual_seed(0)), torch.arange(8) % 5
    G = GGN(tall_skinny((16, *[8] * 6, 5), dtype=torch.float32), nn.CrossEntropyLoss(), x, y)
    exact = GGN(tall_skinny((16, *[8] * 6, 5), dtype=torch.float32).double(), nn.CrossEntropyLoss(), x.double(), y)
    reference = torch.linalg.solve(shifted(exact.dense(), 1e-3), exact.gradient)
    for F in (
        Dual(matrix.converted(G.chain, torch.float64), 1e-3),
        factor.Factor(G.structure(torch.float64), 1e-3, G.double().__matmul__),
    ):
        assert relative(F.solve(exact.gradient), reference) < 1e-9
        assert F.solve(G.gradient).dtype == torch.float32
    double = G.factor(1e-3, dtype=torch.float64)
    assert relative(double.solve(exact.gradient), reference) < 1e-9
    single = estimate.estimate(G.chain, True, torch.float32).bytes
    assert all(estimate.estimate(G.chain, True, torch.float64).bytes[name] == 2 * single[name] for name in single)


def test_methods_of_the_paper_are_for_the_hessian():
    G = GGN(*build("tanh, cross-entropy"))
    with pytest.raises(ValueError, match="method 'tridiagonal' is the paper's, for the Hessian"):
        G.solve(G.gradient, method="tridiagonal")
    with pytest.raises(ValueError, match="dual form needs damping > 0"):
        Dual(G.chain, -1.0)
    assert repr(G).startswith("GGN(89 x 89")


def test_two_thousand_layers():
    """Nothing dense, nothing recursive: depth is no limit."""
    H = Hessian(
        tall_skinny((4, *[4] * 2000, 3)), nn.CrossEntropyLoss(), torch.randn(2, 4).double(), torch.tensor([0, 1])
    )
    step = H.solve(H.gradient, damping=0.1)
    assert H.last_solve.method == "factor" and H.last_solve.residual < 1e-8
    assert step.shape == H.gradient.shape
    assert hinv.Estimate is type(H.estimate())


# What the table of docs/models.md promises: rows of (layer or loss, the problems of conftest.py that hold it)
SUPPORTED = {
    "`Linear`, with or without bias": ("tanh, cross-entropy", "tanh without bias, B < C"),
    "`Tanh`, `Sigmoid`, `Softplus`, `GELU`, `SiLU`, `ELU`, `ReLU`": (
        *("tanh, cross-entropy", "sigmoid, MSE", "softplus, BCE", "gelu, weighted sum", "silu, label smoothing"),
        *("elu, custom loss", "relu"),
    ),
    "`LayerNorm`": ("layernorm",),
    "`Conv1d`, `Conv2d`, `AvgPool2d`, `MaxPool2d`, `Flatten`": (
        *("convolution", "convolution in one dimension"),
        "max pooling",
    ),
    "`BatchNorm1d`, `Dropout` in eval mode, nested `Sequential`": ("nested, eval batchnorm and dropout",),
    "`hinv.Residual`: nested, with a projection, over images": (
        *("skip connections", "skip connections, nested, first and last"),
        "skip connections over images",
    ),
    "`Linear` and `LayerNorm` on tokens, `hinv.SharedLinear`": ("tokens", "outputs on positions", "jets"),
    "a block of one's own, or any per-sample module": ("residual blocks",),
    "frozen layers or parameters, in-place modules": ("frozen layers", "frozen bias, in-place relu"),
    "`CrossEntropyLoss`: mean, sum, weights, label smoothing": (
        "tanh, cross-entropy",
        "gelu, weighted sum",
        "silu, label smoothing",
    ),
    "`MSELoss`, `BCEWithLogitsLoss`": ("sigmoid, MSE", "softplus, BCE"),
    "any sum or mean over samples": ("elu, custom loss",),
}


def test_table_of_layers_is_what_was_checked():
    """Every row through factor, solve, inertia and determinant against dense; docs/models.md holds exactly the rows that passed."""
    lines = ["| layer or loss | residual after one refinement | inertia | log-determinant |", "|---|---|---|---|"]
    for row, names in SUPPORTED.items():
        for name in names:
            for damping in (0.1, -0.05):
                check(Hessian(*build(name)).factor(damping), reference_hessian(*build(name)), damping)
        lines.append(f"| {row} | below 1e-10 | exact | to 1e-8 |")
    page = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text()
    assert "\n".join(lines) in page, "replace the table of docs/models.md by:\n" + "\n".join(lines)


# -- shifts next to an eigenvalue of a trailing part, where V grows and digits go ---------------------------------------


def test_sparse_survives_singular_matrices():
    """Integers cancel exactly, which SuperLU by itself does not survive (the process dies, now and then): rows and columns twice, or none at all."""
    singular, refused = 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        K = np.where(rng.random((40, 40)) < 0.1, rng.integers(1, 4, (40, 40)), 0).astype(float)
        K += K.T + np.diag(rng.integers(0, 2, 40))
        first, second = rng.choice(40, (2, 3), replace=False)
        if seed % 2:
            K[:, first], K[first] = K[:, second], K[second]
        lu = sparse._factored(scipy.sparse.csc_array(K))
        if np.linalg.matrix_rank(K) < 40:  # a smallest pivot need not say so: the residual does
            singular, refused = singular + 1, refused + (lu is None)
        else:
            assert np.linalg.norm(K @ lu.solve(np.ones(40)) - 1.0) < 1e-12 * np.linalg.cond(K)
    assert singular > 50 and refused > 0.95 * singular


@pytest.mark.parametrize(("sizes", "batch", "seed"), [((6, 6, 6, 6, 3), 20, 0), ((12,) * 6 + (4,), 30, 2)])
def test_inertia_is_right_or_refused_and_logdet_says_what_it_lost(sizes, batch, seed):
    x = torch.randn(batch, sizes[0], generator=torch.Generator(DEVICE).manual_seed(seed)).double()
    H = Hessian(tall_skinny(sizes, seed=seed), nn.CrossEntropyLoss(), x, torch.arange(batch) % sizes[-1])
    values = torch.linalg.eigvalsh(H.dense())
    trailing = torch.linalg.eigvalsh(H.block(-1))
    refused = warned = 0
    for shift in (trailing[trailing > 1e-6, None] * (1 + 10.0 ** torch.arange(-16, -6).double())).flatten().tolist():
        if (values - shift).abs().min() < 1e-9:
            continue
        try:
            F = H.factor(-shift)
            assert F.inertia[1] == int((values < shift).sum())
        except SingularShiftError:
            refused += 1
            continue
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            value = F.logdet[1]
        error = abs(value - (values - shift).abs().log().sum().item())
        warned += len(seen)
        assert error < (2 * F.uncertainty if seen else 1e-8 * max(1.0, abs(value)))
    assert refused and warned


@pytest.mark.parametrize("seed", range(20))
def test_uncertainty_is_not_below_the_norm_it_estimates(seed):
    """Rounding errors of a tiny damping under two softmaxes lie in some three directions: one random vector can all but miss them, as the fuzz found."""
    torch.manual_seed(seed)
    first = [nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 6, bias=False), nn.Softmax(1)]
    model = nn.Sequential(*first, nn.Linear(6, 3), nn.Softmax(1), nn.Linear(3, 4)).double()
    H = Hessian(model, nn.CrossEntropyLoss(), torch.randn(2, 2).double(), torch.randint(4, (2,)))
    D, eye = H.dense(), torch.eye(H.shape[0]).double()
    damping = 1e-7 * torch.linalg.matrix_norm(D, 2).item()
    F = H.factor(damping)
    errors = (D + damping * eye) @ F.solve(eye) - eye
    assert F.uncertainty > 0.5 * errors.norm().item()


def test_a_loss_that_is_not_convex_is_not_given_to_the_dual():
    def loss(outputs, targets):
        return torch.log1p((outputs - targets) ** 2).sum()

    x = torch.randn(6, 20, generator=torch.Generator(DEVICE).manual_seed(0)).double()
    G = GGN(tall_skinny((20, *[24] * 8, 1)), loss, x, 3.0 * torch.ones(6, 1).double())
    assert G.estimate().method == "dual" and isinstance(G.factor(0.1), factor.Factor)
    values = torch.linalg.eigvalsh(G.dense())
    assert values[0] < -0.1 and G.count_below(-0.1) == int((values < -0.1).sum())
    assert G.logdet(0.1)[1] == pytest.approx((values + 0.1).abs().log().sum().item(), rel=1e-9)
    with pytest.raises(ValueError, match="convex"):
        Dual(G.chain, 0.1)


def test_ignored_labels_beyond_the_classes():
    x, y = torch.randn(8, 4, generator=torch.Generator(DEVICE).manual_seed(0)).double(), torch.arange(8) % 3
    y[:2] = 255
    H = Hessian(tall_skinny((4, 5, 3)), nn.CrossEntropyLoss(ignore_index=255), x, y)
    values = torch.linalg.eigvalsh(H.dense())
    assert H.count_below(0.01) == int((values < 0.01).sum())


@pytest.mark.parametrize("t", [-700.0, -40.0, -3.0, 0.0, 3.0, 40.0, 700.0])
def test_the_root_of_two_classes_is_exact_however_certain_they_are(t):
    """V = p (1 - p) [[1, -1], [-1, 1]] / B, p the logistic function of the difference; p (1 - p) is 1 / (4 cosh(t / 2)^2)."""
    R = losses.root(nn.CrossEntropyLoss(), torch.tensor([[t, 0.0]]).double(), torch.tensor([0]))
    expected = 0.25 / math.cosh(t / 2) ** 2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()
    torch.testing.assert_close((R @ R.mT)[0], expected, rtol=1e-7, atol=0)


def test_the_root_of_a_loss_that_is_not_convex_is_refused():
    out, y = torch.randn(3, 2, generator=torch.Generator(DEVICE).manual_seed(0)).double(), torch.ones(3, 2).double()
    for loss in (
        nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, -1.0]).double()),
        lambda o, t: (o.square() - t).square().mean() - o.square().sum(),
    ):
        with pytest.raises(ValueError, match="not convex in the outputs here"):
            losses.root(loss, out, y)


def test_the_dual_of_outputs_that_are_all_but_certain():
    """Where softmax is 1 to rounding, its Hessian's entries cancel; the dual must not take them for negative curvature."""
    x, y = torch.randn(8, 20, generator=torch.Generator(DEVICE).manual_seed(0)).double(), torch.arange(8) % 4
    model = tall_skinny((20, *[24] * 3, 4))
    with torch.no_grad():
        model[-1].weight.mul_(1000.0)
    y = model(x).argmax(1)
    G = GGN(model, nn.CrossEntropyLoss(), x, y)
    assert model(x).softmax(1).max(1).values.min() > 1 - 1e-6
    damping = 1e-4 * torch.linalg.eigvalsh(G.dense())[-1].item()
    F, b = Dual(G.chain, damping), G.gradient / G.gradient.norm()
    assert relative(G @ F.solve(b) + damping * F.solve(b), b) < 1e-6  # 1 - p has ten digits here, in any product too


class Largest(TorchDispatchMode):
    """The most numbers that any one operation put out."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_what_goes_back_to_a_wide_input_is_not_formed():
    """Neither the dual's deltas of the input, (B, inputs, C), nor its curvature, (B, inputs, inputs)."""
    wide, batch = 3000, 8
    x, y = (
        torch.randn(batch, wide, generator=torch.Generator(DEVICE).manual_seed(0), dtype=torch.float64),
        torch.arange(8) % 5,
    )
    G = GGN(tall_skinny((wide, 4, 5), gain=0.1), nn.CrossEntropyLoss(), x, y)
    with Largest() as seen:
        Dual(G.chain, 0.1)
    assert seen.numbers <= batch * wide
    with Largest() as seen:
        G.diagonal()
    assert seen.numbers <= max(batch * wide, G.shape[0])


@pytest.mark.parametrize("scarce", [True, False])
def test_memory_is_given_back_between_stages_where_it_is_scarce(monkeypatch, scarce):
    H = Hessian(
        tall_skinny((6, *[24] * 4, 3)),
        nn.CrossEntropyLoss(),
        torch.randn(40, 6, generator=torch.Generator(DEVICE).manual_seed(0), dtype=torch.float64),
        torch.arange(40) % 3,
    )
    need, calls = H.estimate().bytes["factor"], []
    assert need > memory.SMALL_NEED
    monkeypatch.setattr(memory, "available", lambda device: 2.0 * need if scarce else 4.0 * need)
    monkeypatch.setattr(memory, "_trim", lambda: calls.append)
    F = H.factor(0.1)
    assert bool(calls) == (scarce and DEVICE == "cpu")
    # without pivoting, on a GPU, refined
    x = F.solve(H.gradient) if DEVICE == "cpu" else H.solve(H.gradient, 0.1, method="factor")
    assert relative(H @ x + 0.1 * x, H.gradient) < 1e-9


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        (
            "0::/a/b\n",
            {"a/b/memory.max": "1000", "a/b/memory.current": "400", "a/b/memory.stat": "anon 1\ninactive_file 50\n"},
            650,
        ),
        (
            "0::/a/b\n",
            {"a/memory.max": "900", "a/memory.current": "400", "a/memory.stat": "inactive_file 0\n"},
            500,
        ),  # of the group above
        ("0::/\n", {"memory.max": "max", "memory.current": "1", "memory.stat": "inactive_file 0\n"}, math.inf),
        (
            "5:cpu:/x\n4:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": "800",
                "memory/a/memory.usage_in_bytes": "100",
                "memory/a/memory.stat": "total_inactive_file 30\n",
            },
            730,
        ),
        (
            "4:memory:/not/mounted\n",
            {
                "memory/memory.limit_in_bytes": "800",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": "inactive_file 0",
            },
            0,
        ),
        ("", {}, math.inf),
    ],
    ids=["v2", "v2, parent", "v2, no limit", "v1", "v1 in a container", "none"],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, own, files, left):
    (tmp_path / "self").write_text(own)
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert memory.left_to_the_container(tmp_path / "groups", tmp_path / "self") == left
    monkeypatch.setattr(memory, "left_to_the_container", lambda: left)
    assert memory.available(torch.device("cpu")) <= left
    survived(
        "memory limit of a container (control groups, versions 1 and 2)",
        "a factorization over it is refused by its estimate",
        "the process",
    )
