"""What a caller has switched on for the whole process does not reach into exact derivatives, and is as it was afterwards."""

import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICE, build, reference_hessian, relative
from torch import nn

from hinv import GGN, CurvatureMonitor, Eigenpairs, Hessian, SingularShiftError, optim, paper, spectrum, tall_skinny
from hinv.solver import parts
from hinv.solver.dual import Dual


@contextmanager
def switched(switch, before):
    switch(not before)
    yield
    switch(before)


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


MODES = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
    "one thread": lambda: one_thread(),
    "default device": lambda: torch.device("meta"),  # a tensor made without saying where would hold no numbers
    "default dtype": lambda: default_dtype(torch.float16),
}
NETWORKS = ["tanh, cross-entropy", "residual blocks", "layernorm"]


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_answer_under_every_mode(mode, name):
    problem = build(name)
    D = reference_hessian(*problem)
    shifted, values = D + 0.1 * torch.eye(len(D), dtype=D.dtype), torch.linalg.eigvalsh(D)
    with mode():
        before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled()
        H = Hessian(*problem)
        assert relative(H.dense(), D) < 1e-10
        for method in ("factor", "sparse", "tridiagonal", "woodbury", "dense", "minres"):
            assert relative(shifted @ H.solve(H.gradient, 0.1, method), H.gradient) < 1e-7, method
        assert H.factor(0.1).inertia[1] == int((values < -0.1).sum())
        assert H.logdet(0.1)[1] == pytest.approx((values + 0.1).abs().log().sum().item(), rel=1e-8, abs=1e-8)
        assert H.trace() == pytest.approx(D.trace().item(), rel=1e-9, abs=1e-9)
        assert relative(H.diagonal(), D.diagonal()) < 1e-10
        assert H.eigsh(2).certified
        m = paper.matrices(H)
        torch.testing.assert_close((m.D_D @ m.D_xx).dense(), m.DDxx.dense(), rtol=1e-10, atol=1e-14)
        assert m.DDxx.dense().norm() > 0
        assert before == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled())


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_float32_answers_are_those_without_the_mode(mode):
    model, loss, x, y = build("tanh, cross-entropy")
    model, x = model.float(), x.float()
    plain = Hessian(model, loss, x, y)
    with mode():
        H = Hessian(model, loss, x, y)
        assert torch.equal(H.gradient, plain.gradient) and torch.equal(H @ H.gradient, plain @ plain.gradient)
        G = GGN(model, loss, x, y)
        G.solve(G.gradient, 0.1)
        assert G.last_solve.residual < 1e-5


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "cls", [optim.GaussNewton, optim.DampedNewton, optim.TrustRegionNewton, optim.SaddleFreeNewton]
)
def test_steps_are_those_without_the_mode(mode, cls):
    after = []
    for inside in (True, False):
        model, loss, x, y = build("tanh, cross-entropy")
        descent = cls(model, loss)
        if inside:
            with mode():
                descent.step(x, y)
                descent.step(x, y)
        else:
            descent.step(x, y)
            descent.step(x, y)
        after.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*after)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", [MODES[m] for m in MODES if m != "default device"])  # curvlinops makes tensors there
def test_monitor_and_data_sets_under_every_mode(mode):
    problem = build("tanh, cross-entropy")
    D, (model, loss, x, y) = reference_hessian(*problem), problem
    with mode():
        record = CurvatureMonitor(*problem, what=("lambda_max", "trace"))()
        assert "errors" not in record and record["trace"] == pytest.approx(D.trace().item(), abs=1e-9)
        A = spectrum.DataHessian(model, loss, [(x[:4], y[:4]), (x[4:], y[4:])])
        assert relative(A @ torch.ones_like(D[0]), D.sum(1)) < 1e-10


# -- what the copy of a model would not follow -------------------------------------------------------------------------

CE = nn.CrossEntropyLoss()


def small():
    return build("tanh, cross-entropy")


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_loss_that_reads_parameters_is_refused(kind):
    """A penalty: the copy of the model would make it a constant, and the answer that of the loss without it."""
    model, _, x, y = small()
    with pytest.raises(ValueError, match=r"6 trainable tensors besides the outputs .* add mu to damping"):
        kind(model, lambda o, t: CE(o, t) + 0.05 * sum((p**2).sum() for p in model.parameters()), x, y)


def test_the_remedy_for_a_penalty_is_right():
    """mu |x|^2 / 2 in the loss is mu more damping, by the matrix of the penalized loss itself."""
    model, _, x, y = small()
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def penalized(vector):
        values = {n: v.view_as(p) for (n, p), v in zip(named.items(), vector.split(sizes), strict=True)}
        return CE(torch.func.functional_call(model, values, (x,)), y) + 0.1 / 2 * vector.square().sum()

    vector = nn.utils.parameters_to_vector(named.values()).detach()
    D = torch.func.hessian(penalized)(vector)
    H, g = Hessian(model, CE, x, y), torch.func.grad(penalized)(vector)
    step = H.solve(g, damping=0.01 + 0.1)
    assert relative(D @ step + 0.01 * step, g) < 1e-8


def test_a_loss_with_parameters_of_its_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), 1.5, dtype=torch.float64))

        def forward(self, outputs, targets):
            return CE(outputs * self.scale, targets)

    model, _, x, y = small()
    with pytest.raises(ValueError, match="1 trainable tensors besides the outputs"):
        Hessian(model, Scaled(), x, y)
    frozen = Scaled().requires_grad_(False)
    assert relative(Hessian(model, frozen, x, y).dense(), reference_hessian(model, frozen, x, y)) < 1e-10


@pytest.mark.parametrize("which", ["model", "layer"])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_replaced_forward_is_refused(kind, which):
    model, loss, x, y = small()
    target = model if which == "model" else model[2]
    plain = target.forward
    target.forward = lambda z: plain(z)
    name = "the model" if which == "model" else "2"
    with pytest.raises(ValueError, match=f"'{name}' .* has a replaced forward"):
        kind(model, loss, x, y)
    del target.forward
    kind(model, loss, x, y)


def test_a_model_whose_copy_has_another_gradient_is_refused():
    """A module that reaches its layer through a closure: the copy's closure still holds the original layer."""

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5).double()
            self.call = lambda z: self.inner(z)

        def forward(self, z):
            return self.call(z)

    x, y = small()[2:]
    model = nn.Sequential(nn.Linear(6, 5).double(), Closure(), nn.Linear(5, 4).double())
    with pytest.raises(ValueError, match=r"gradient in '1\.inner\.weight' is not that of its copy"):
        Hessian(model, CE, x, y)


# -- other processes ---------------------------------------------------------------------------------------------------


def answers(problem):
    H = Hessian(*problem)
    return H.solve(H.gradient, 0.1), H.factor(0.1).inertia, H.eigsh(2).values


def forked(problem, queue):
    queue.put([a.tolist() if isinstance(a, torch.Tensor) else a for a in answers(problem)])


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA cannot be used in a forked process")
def test_in_a_forked_worker():
    """As a data loader's worker, or a pool, has it; after torch's own threads have started in the parent."""
    problem = build("tanh, cross-entropy")
    expected = answers(problem)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=forked, args=(problem, queue))
    worker.start()
    step, inertia, values = queue.get(timeout=120)
    worker.join()
    assert inertia == expected[1]
    D = reference_hessian(*problem)
    step, g = torch.tensor(step, dtype=D.dtype), Hessian(*problem).gradient
    assert relative(D @ step + 0.1 * step, g) < 1e-7
    torch.testing.assert_close(torch.tensor(values, dtype=D.dtype), expected[2])


SAVED = """
import pickle, sys, torch
H, G, F, D, pairs, descent = (pickle.load(open(sys.argv[1], "rb")))
b = torch.linspace(-1, 1, H.shape[0], dtype=torch.float64, device=H.device)
torch.save({"H": H @ b, "G": G @ b, "F": F.solve(b), "D": D.solve(b), "inertia": F.inertia, "logdet": D.logdet, "values": pairs.values,
            "solve": H.solve(b, 0.1), "report": descent.state_dict()["damping"], "repr": repr(pairs)}, sys.argv[2])
"""


def test_pickles_read_by_another_process(tmp_path):
    """Matrices, a factorization, a dual, eigenpairs and an optimizer: the same answers, to the bit; what is made of tensors passes weights_only."""
    problem = build("tanh, cross-entropy")
    H, G = Hessian(*problem), GGN(*problem)
    F, D, pairs, descent = H.factor(0.1), Dual(G.chain, 0.1), H.eigsh(2), optim.GaussNewton(problem[0], problem[1])
    with open(tmp_path / "in.pickle", "wb") as file:
        pickle.dump((H, G, F, D, pairs, descent), file)
    command = [sys.executable, "-W", "ignore", "-c", SAVED, tmp_path / "in.pickle", tmp_path / "out.pt"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    out = torch.load(tmp_path / "out.pt", weights_only=True, map_location="cpu")
    b = torch.linspace(-1, 1, H.shape[0], dtype=torch.float64)
    for name, ours in {
        "H": H @ b,
        "G": G @ b,
        "F": F.solve(b),
        "D": D.solve(b),
        "solve": H.solve(b, 0.1),
        "values": pairs.values,
    }.items():
        torch.testing.assert_close(out[name], ours.cpu(), rtol=1e-10, atol=1e-14)
    assert (
        out["inertia"] == F.inertia
        and out["logdet"][1] == pytest.approx(D.logdet[1])
        and out["report"] == descent.damping
    )
    torch.save(dataclasses.asdict(pairs), tmp_path / "pairs.pt")
    again = Eigenpairs(**torch.load(tmp_path / "pairs.pt", weights_only=True))
    assert torch.equal(again.vectors, pairs.vectors) and again.note == pairs.note
    torch.save(descent.state_dict(), tmp_path / "state.pt")
    descent.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize(
    "cls",
    [optim.GaussNewton, optim.DampedNewton, optim.TrustRegionNewton, optim.SaddleFreeNewton, optim.GradientDescent],
)
def test_an_optimizer_pickled_between_steps_goes_on(cls):
    """With its own model in the pickle, and a factorization in use."""
    model, loss, x, y = small()
    descent = cls(model, loss)
    descent.step(x, y)
    again = pickle.loads(pickle.dumps(descent))
    for _ in range(2):
        assert again.step(x, y).loss == descent.step(x, y).loss


def test_inference_tensors():
    """Weights made under inference_mode can take part in no derivative: named."""
    _, loss, x, y = small()
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 4)).double()
        inside = x.clone()
    with pytest.raises(ValueError, match="inference"):
        Hessian(model, loss, x, y)
    plain = nn.Sequential(nn.Linear(6, 4)).double()
    assert torch.equal(Hessian(plain, loss, inside, y).gradient, Hessian(plain, loss, x, y).gradient)


# -- hooks, which a copy or a stage does not follow --------------------------------------------------------------------


def on_a_parameter(model):
    model[0].weight.register_hook(lambda g: 2 * g)


def backwards_through_a_layer(model):
    model[2].register_full_backward_hook(lambda module, before, after: (3 * before[0],))


def backwards_through_an_activation(model):
    model[1].register_full_backward_hook(lambda module, before, after: (0.5 * before[0],))


def replaced_in_a_subclass(model):
    """A class of its own is a module of its own, and followed: not refused, and right."""

    class Twice(nn.Linear):
        def forward(self, z):
            return 2 * super().forward(z)

    model[2].__class__ = Twice


@pytest.mark.parametrize("hook", [on_a_parameter, backwards_through_a_layer, backwards_through_an_activation])
@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_hooks_that_change_the_gradient_are_found(kind, hook):
    model, loss, x, y = small()
    hook(model)
    with pytest.raises(
        ValueError, match=r"is not that of its copy|differs in|has forward hooks|cannot be differentiated twice"
    ):
        kind(model, loss, x, y)


def test_a_subclass_is_followed():
    model, loss, x, y = small()
    replaced_in_a_subclass(model)
    assert relative(Hessian(model, loss, x, y).dense(), reference_hessian(model, loss, x, y)) < 1e-10


@pytest.mark.parametrize(("width", "inside"), [(4, 1), (80, 2)])
def test_a_narrow_network_takes_one_thread_and_gives_the_others_back(monkeypatch, width, inside):
    """Of two; in a wide one both work."""
    seen, batch = [], 4
    original = parts.Linear.blocks, parts.SmallLinear.eliminate
    monkeypatch.setattr(parts.Linear, "blocks", lambda *a: (seen.append(torch.get_num_threads()), original[0](*a))[1])
    monkeypatch.setattr(
        parts.SmallLinear, "eliminate", lambda *a: (seen.append(torch.get_num_threads()), original[1](*a))[1]
    )
    x = torch.randn(batch, 3, generator=torch.Generator(DEVICE).manual_seed(0)).double()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        H = Hessian(tall_skinny((3, width, width, 2)), nn.CrossEntropyLoss(), x, torch.arange(batch) % 2)
        x = H.solve(H.gradient, 0.1, method="factor")
        assert torch.get_num_threads() == 2
        with pytest.raises(SingularShiftError):
            Hessian(nn.Sequential(nn.Linear(9, 2)), nn.MSELoss(), torch.zeros(2, 9), torch.zeros(2, 2)).factor(0.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {inside} and relative(H @ x + 0.1 * x, H.gradient) < 1e-8
