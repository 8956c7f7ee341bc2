"""What a factorization keeps: V at some stages instead of all stages, with the same answers."""

import pickle
import weakref

import numpy as np
import pytest
import torch
from conftest import DEVICE, NAMES, build, reference_hessian, relative
from torch import nn

from hinv import GGN, Hessian, SingularShiftError
from hinv.companion.bench import measure
from hinv.solver import memory
from hinv.solver.estimate import by_checkpoints
from hinv.solver.factor import Factor
from hinv.solver.kept import Checkpoints, Elsewhere, segment
from hinv.solver.parts import Dense


def numbers(things) -> int:
    """In all tensors and arrays that these objects hold, each storage once; what a stage's `part` holds belongs to the structure."""
    found = {}

    def walk(thing):
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // thing.element_size()
        elif isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            found[thing.ctypes.data] = thing.size
        elif isinstance(thing, list | tuple):
            for one in thing:
                walk(one)
        elif hasattr(thing, "__dict__") and hasattr(thing, "noises" if hasattr(thing, "part") else "log_abs_det"):
            walk([value for name, value in vars(thing).items() if name != "part"])

    walk(things)
    return sum(found.values())


@pytest.mark.parametrize("damping", [1.0, -0.03])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_answer_as_all_stages_do(name, damping):
    H = Hessian(*build(name))
    make = [Factor(H.structure(torch.float64), damping, H.__matmul__, keep=keep) for keep in ("all", "checkpoints")]
    a, c = make
    b = torch.stack([H.gradient, H.gradient.cos()], 1)
    assert isinstance(c.pivots, Checkpoints) and len(c.pivots) == len(a.pivots) and repr(c) == repr(a)
    assert relative(c.solve(b), a.solve(b)) < 1e-12 and a.negative == c.negative
    assert c.uncertainty == pytest.approx(a.uncertainty, rel=1e-6) and c.noises == a.noises
    if a.uncertainty < 1e-3:
        assert c.inertia == a.inertia and c.logdet == a.logdet
        assert relative(c._diagonal(), a._diagonal()) < 1e-12
    if not a.negative:
        assert relative(c.sample(2), a.sample(2)) < 1e-12
        assert relative(c.inverse_block(0), a.inverse_block(0)) < 1e-12
        assert relative(c.output_covariance(), a.output_covariance()) < 1e-12


AWAY = "host" if DEVICE == "cuda" else "disk"


@pytest.mark.parametrize("damping", [1.0, -0.03])
@pytest.mark.parametrize("name", NAMES)
def test_stages_kept_elsewhere_answer_to_the_bit(name, damping):
    H = Hessian(*build(name))
    a, c, again = (
        Factor(H.structure(torch.float64), damping, H.__matmul__, keep=keep) for keep in ("all", AWAY, "disk")
    )
    b = torch.stack([H.gradient, H.gradient.cos()], 1)
    assert isinstance(c.pivots, Elsewhere) and len(c.pivots) == len(a.pivots) and repr(c) == repr(a)
    for F in (c, again):
        assert torch.equal(F.solve(b), a.solve(b)) and F.negative == a.negative and F.uncertainty == a.uncertainty
        assert torch.equal(F._diagonal(), a._diagonal())
        if not a.negative:
            assert F.inertia == a.inertia and F.logdet == a.logdet and F.noises == a.noises
            assert torch.equal(F.sample(2), a.sample(2)) and torch.equal(F.output_covariance(), a.output_covariance())


def test_nothing_of_a_stage_stays_in_memory():
    H = measure.network((16, *[16] * 99, 10), 4)
    a, c = H.factor(0.01), H.factor(0.01, keep="disk")
    made = [pivot for pivot in c.pivots.packed if hasattr(pivot, "part")]  # the others are of the structure
    assert len(made) == 100 and numbers(made) == 0 < numbers(list(a.pivots))
    size, need = c.pivots.place.size, H.estimate().bytes
    assert 0.5 * need["kept"] < size < 1.5 * need["kept"] and need["stage"] < need["checkpoints"] < need["factor"]
    with pytest.raises(TypeError, match="factor again there"):
        pickle.dumps(c)


def test_what_has_no_room_elsewhere_is_refused(monkeypatch):
    H = measure.network((16, *[16] * 99, 10), 4)
    monkeypatch.setattr(memory, "room", lambda: ("/elsewhere", 1000))
    with pytest.raises(
        MemoryError, match=r"keep='disk' take about [\d,]+ bytes; 1,000 are free in /elsewhere. Set TMPDIR"
    ):
        H.factor(0.1, keep="disk")
    if H.device.type == "cpu":
        with pytest.raises(ValueError, match="is for a model on another device"):
            H.factor(0.1, keep="host")


def test_against_the_dense_matrix():
    problem = build("skip connections")
    H, D = Hessian(*problem), reference_hessian(*problem)
    M = D + 0.05 * torch.eye(len(D)).double()
    F = H.factor(0.05, keep="checkpoints")
    assert relative(F.solve(D), torch.linalg.solve(M, D)) < 1e-9
    assert F.inertia[1] == int((torch.linalg.eigvalsh(M) < 0).sum()) > 0
    assert F.logdet[1] == pytest.approx(torch.linalg.slogdet(M)[1].item(), rel=1e-11)


def test_a_tenth_of_the_numbers_at_a_few_hundred_layers():
    H = measure.network((16, *[16] * 299, 10), 4)
    a, c = H.factor(0.01), H.factor(0.01, keep="checkpoints")
    whole = numbers(a.pivots)
    assert whole > 299 * (2 * 64 * 64)  # the count sees S and Y of every layer
    segments = [numbers(c.pivots._segment(i)) for i in range(len(c.pivots.ends))]
    assert numbers(c.pivots.saved) + max(segments) < whole / 10
    assert segment(len(c.pivots)) ** 2 >= len(c.pivots) and len(segments) <= segment(len(c.pivots))
    assert torch.equal(a.solve(H.gradient), c.solve(H.gradient)) and a.inertia == c.inertia


def test_what_is_alive_at_once(monkeypatch):
    """Over a whole solve, the stages alive are never more than those of a segment and the one before."""
    H = measure.network((6, *[6] * 99, 4), 3)
    F, alive, most = H.factor(0.1, keep="checkpoints"), [], []
    for kind in {type(part) for _, part in F.pivots.elimination.stages}:
        plain = kind.eliminate

        def counted(self, *args, plain=plain):
            pivot, V = plain(self, *args)
            if pivot is not self:
                alive.append(weakref.ref(pivot))
                most.append(sum(ref() is not None for ref in alive))
            return pivot, V

        monkeypatch.setattr(kind, "eliminate", counted)
    F.solve(H.gradient)
    assert len(most) > 190 and max(most) <= segment(len(F.pivots)) + 2


def test_what_the_derivatives_hold_is_counted_and_what_is_soon_made_again_is_not_held():
    narrow = measure.network((16, *[16] * 99, 10), 4)
    stages = narrow.structure(torch.float64)[0]
    for keep in ("checkpoints", AWAY):
        narrow.factor(0.1)
        assert sum("F" in vars(part) for _, part in stages) > 90
        narrow.factor(0.1, keep=keep).solve(narrow.gradient)
        assert not any({"F", "outer"} & set(vars(part)) for _, part in stages)


class Gate(nn.Module):
    """No layer that hinv knows: a stage that holds its derivatives."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(6, 6)

    def forward(self, x):
        return x * self.inside(x).tanh()


def test_the_derivatives_of_all_stages_are_in_every_estimate():
    torch.manual_seed(0)
    model = nn.Sequential(*(Gate() for _ in range(20)), nn.Linear(6, 3)).double()
    H = Hessian(model, nn.CrossEntropyLoss(), torch.randn(5, 6).double(), torch.arange(5) % 3)
    dense = [part for _, part in H.structure(torch.float64)[0] if isinstance(part, Dense)]
    held = sum(t.nbytes for part in dense for t in vars(part).values() if isinstance(t, torch.Tensor))
    need = H.estimate().bytes
    assert len(dense) == 20 and held < need["stage"] <= need["checkpoints"] < need["factor"]
    F = H.factor(0.1, keep="disk")
    assert 0.5 * need["kept"] < F.pivots.place.size < 1.5 * need["kept"]


def test_the_estimate_knows_it():
    shallow, deep = (measure.network((16, *[16] * n, 10), 4).estimate().bytes for n in (99, 399))
    assert deep["factor"] > 3.5 * shallow["factor"] and deep["checkpoints"] < 2.5 * shallow["checkpoints"]
    assert deep["checkpoints"] < deep["factor"] / 5
    stages = [(1, 10, 5)] * 9  # three segments: three V, three stages and what the last of them takes
    assert by_checkpoints(stages) == 3 + 30 + 5


def test_counts_and_determinants_go_on_where_not_all_stages_fit(monkeypatch):
    def fresh():
        return measure.network((16, *[16] * 199, 10), 4)

    H = fresh()
    counted, log, need = H.count_below(-0.02), H.logdet(0.02), H.estimate().bytes
    assert need["factor"] > memory.SMALL_NEED > need["checkpoints"]
    for module in ("memory", "matrix"):
        monkeypatch.setattr(f"hinv.solver.{module}.available", lambda device: need["factor"] - 1)
    H = fresh()
    with pytest.raises(MemoryError, match=r"keep='checkpoints'"):
        H.factor(0.02)
    assert H.count_below(-0.02) == counted and H.logdet(0.02) == log and H.counts([-0.02, 1e9]).sum() > 0
    assert H.factor(0.02, keep="checkpoints").inertia[1] == counted


def test_refusals():
    H = Hessian(*build("tanh, cross-entropy"))
    with pytest.raises(ValueError, match=r"keep must be one of 'all', 'checkpoints', 'host', 'disk', not 'some'"):
        H.factor(0.1, keep="some")
    with pytest.raises(SingularShiftError, match=r"stage '.*Linear"):
        Hessian(*build("tanh, cross-entropy")[:2], torch.zeros(9, 6).double(), torch.arange(9) % 4).factor(
            0.0, keep="checkpoints"
        )
    G = GGN(
        nn.Sequential(nn.Linear(64, 40)).double(), nn.MSELoss(), torch.ones(1, 64).double(), torch.ones(1, 40).double()
    )
    assert G.factor(0.1, keep="checkpoints").inertia[0] == 2600
