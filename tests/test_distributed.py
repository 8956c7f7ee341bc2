"""Two processes with unequal shares of the data against one with all of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import relative
from torch import nn

import hinv
from hinv import ranks, spectrum, tall_skinny
from hinv.companion import training

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")

START = """
import copy, os, sys
from datetime import timedelta
import torch
from torch import distributed, nn
import hinv
from hinv import ranks, spectrum
torch.set_num_threads(1)
rank, folder = int(os.environ["RANK"]), sys.argv[1]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=int(os.environ["SIZE"]), timeout=timedelta(seconds=60))
found = {}
for name, (code, model, loss, shares) in torch.load(f"{folder}/cases.pt", weights_only=False).items():
    space = dict(model=copy.deepcopy(model), loss=loss, mine=shares[rank], rank=rank, folder=folder, os=os, torch=torch, nn=nn, hinv=hinv, spectrum=spectrum)
    exec(code, space)
    found[name] = space["out"]
torch.save(found, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What every case leaves in `out`, in each of two processes, which end within two minutes: one start of them serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, errors = run_together(folder, cases())
    assert codes == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def run_together(folder: Path, cases: dict[str, tuple], count: int = 2) -> tuple[list[int], list[str]]:
    """Exit status and standard error of each process; they end within two minutes."""
    torch.save(cases, folder / "cases.pt")
    path = str(Path(spectrum.__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", START, str(folder)],
            env=os.environ
            | {
                "RANK": str(rank),
                "SIZE": str(count),
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "HINV_RUNS": str(folder / "runs"),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def alone(name: str):
    """The same case in this process with all of the data."""
    code, model, loss, shares = cases()[name]
    space = {
        "model": model,
        "loss": loss,
        "mine": shares[0] + shares[1],
        "torch": torch,
        "hinv": hinv,
        "spectrum": spectrum,
    }
    exec(code, space)
    return space["out"]


def cases() -> dict[str, tuple]:
    """name -> code, model, loss, and the batches of each process."""
    model, weighted, x, _, shares = problem()
    goals = torch.rand(len(x), 3, generator=torch.Generator().manual_seed(2)).double()
    other = [[(x[:17], goals[:17])], [(x[17:], goals[17:])]]
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 3)).double()
    return {
        "Hessian": (HESSIAN, model, weighted, shares),
        "GGN": (GAUSS_NEWTON, model, weighted, shares),
        "dual": (DUAL, normed, weighted, shares),
        "steps, weighted": (STEPS, model, weighted, shares),
        "steps, squared": (STEPS, model, nn.MSELoss(), other),
        "steps, summed": (STEPS, model, nn.MSELoss(reduction="sum"), other),
        "steps, searched": (STEPS.replace("every=2", "search=True, momentum=0.5"), model, nn.MSELoss(), other),
        "fails": (FAILS, model, weighted, shares),
        "runs": (RUNS, model, weighted, shares),
    }


def problem(n=23):
    model = tall_skinny((5, 6, 6, 3), nn.Tanh, gain=1.2, seed=0).double()
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0)).double()
    y = torch.where(torch.arange(n) % 7 == 3, -100, torch.arange(n) % 3)
    # two batches for the one, the last of them odd, and one for the other
    first = list(zip(x[:17].split(9), y[:17].split(9), strict=True))
    return model, nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]).double()), x, y, [first, [(x[17:], y[17:])]]


HESSIAN = """
A = spectrum.DataHessian(model, loss, mine)
b = (torch.linspace(-1, 1, A.shape[0]).double()[:, None] ** torch.arange(1, 3)).contiguous()
F = A.factor(0.5)
out = dict(
    product=A @ b, dense=A.dense(), diagonal=A.diagonal(), values=A.eigvalsh(), logdet=F.logdet, inertia=A.inertia(0.05), factor=F.solve(b),
    solve=A.solve(b, 9.0), report=A.last_solve,
)
"""
GAUSS_NEWTON = """
A = spectrum.DataGGN(model, loss, mine)
b = torch.linspace(-1, 1, A.shape[0]).double()
out = dict(
    product=A @ b, dense=A.dense(), diagonal=A.diagonal(), solve=A.solve(b, 0.5), report=A.last_solve, values=A.eigsh(2).values,
    trace=A.trace("hutchinson", 4).value, grid=A.density(3, repeats=1)[0],
)
"""


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
def test_two_processes_are_one(together, kind):
    a, c = (found[kind] for found in together)
    for key, value in alone(kind).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(a[key], c[key]), key  # to the bit on both
            exactly = key in ("product", "dense", "diagonal", "factor")
            assert relative(a[key], value) < (1e-11 if exactly else 1e-7), key
        elif key == "report":
            assert a[key] == c[key] and a[key].method == value.method and a[key].residual < 1e-8
        else:
            assert a[key] == c[key] == pytest.approx(value, rel=1e-9), key


def test_three_processes_are_one(tmp_path):
    """One of them with two batches, one with a single sample."""
    _, _, x, y, shares = problem()
    thirds = [shares[0], [(x[17:22], y[17:22])], [(x[22:], y[22:])]]
    names = ("Hessian", "GGN", "steps, weighted")
    codes, errors = run_together(tmp_path, {n: (*cases()[n][:3], thirds) for n in names}, 3)
    assert codes == [0, 0, 0], "\n".join(errors)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    for name in ("product", "dense", "diagonal", "factor", "solve"):
        one = alone("Hessian")[name]
        assert all(relative(f["Hessian"][name], one) < (1e-7 if name == "solve" else 1e-11) for f in found), name
    assert all(relative(f["GGN"]["dense"], alone("GGN")["dense"]) < 1e-11 for f in found)
    for *theirs, one in zip(*(f["steps, weighted"] for f in found), alone("steps, weighted"), strict=True):
        assert all(a[:4] == theirs[0][:4] == pytest.approx(one[:4], rel=1e-8) for a in theirs)
        assert all(relative(a[4], one[4]) < 1e-12 for a in theirs)


STEPS = """
x, y = (torch.cat(tensors) for tensors in zip(*mine))
method = hinv.optim.GaussNewton(model, loss, damping=0.3, every=2)
out = []
for _ in range(6):
    report = method.step(x, y)
    out.append((report.loss, report.loss_after, report.ratio, report.damping, torch.nn.utils.parameters_to_vector(model.parameters()).detach()))
"""


@pytest.mark.parametrize("loss", ["weighted", "squared", "summed", "searched"])
def test_gauss_newton_of_two_processes_takes_the_steps_of_one(together, loss):
    single = alone(f"steps, {loss}")
    for a, c, one in zip(*(found[f"steps, {loss}"] for found in together), single, strict=True):
        assert a[:4] == c[:4] == pytest.approx(one[:4], rel=1e-8) and torch.equal(a[4], c[4])
        assert relative(a[4], one[4]) < 1e-12
    assert single[-1][0] < 0.9 * single[0][0]  # they lead somewhere


DUAL = """
A = spectrum.DataGGN(model, loss, mine)
F = A.factor(0.01)
out = dict(kind=type(F).__name__, L=F.L, solve=F.solve(torch.eye(A.shape[0]).double()), diagonal=F.inverse_diagonal(), outputs=F.output_covariance())
"""


def test_the_dual_with_samples_in_run_together(together):
    """A stage that is not linear among them: its factor is gathered whole."""
    (a, c), single = (found["dual"] for found in together), alone("dual")
    assert a["kind"] == c["kind"] == single["kind"] == "Dual"
    for key in ("L", "solve", "diagonal"):
        assert torch.equal(a[key], c[key]) and relative(a[key], single[key]) < 1e-12
    assert relative(torch.cat([a["outputs"], c["outputs"]]), single["outputs"]) < 1e-11  # each has its own


FAILS = """
def message(make):
    try:
        make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
out = []
bad = [(x.clone(), y) for x, y in mine]
if rank == 1:
    bad[0][0][2] = torch.nan
out.append(message(lambda: spectrum.DataGGN(model, loss, bad)))
out.append(message(lambda: spectrum.DataGGN(model, loss, mine if rank else [])))
if rank == 1:
    with torch.no_grad():
        model[0].weight.add_(1.0)
out.append(message(lambda: spectrum.DataGGN(model, loss, mine)))
if rank == 1:
    with torch.no_grad():
        model[0].weight.sub_(1.0)
batches = [(x.clone(), y) for x, y in mine]
A = spectrum.DataGGN(model, loss, batches)
b = torch.ones(A.shape[0]).double()
if rank == 1:
    batches[0][0][2] = torch.nan
out += [message(lambda: A @ b), message(lambda: A.solve(b)), message(lambda: A.eigsh()), message(A.trace), message(lambda: A.factor(0.1))]
if rank == 1:
    batches[0] = mine[0]
out.append(float((A @ b).norm()))
method = hinv.optim.GaussNewton(model, loss)
x, y = mine[0]
out.append(message(lambda: method.step(x if rank == 0 else x * torch.nan, y)))
out.append(method.step(x, y).loss)
out.append(message(lambda: hinv.optim.GaussNewton(model, loss, sample=4)))
"""


def test_what_fails_in_one_process_is_said_in_both_and_none_waits(together):
    first, second = (found["fails"] for found in together)
    assert "another process could not take" in first[0] and "batch 0 of the loader contains NaN" in second[0]
    assert "the loader is empty" in first[1] and "another process could not take" in second[1]
    assert "different weights" in first[2] and "different weights" in second[2]
    for a, c in zip(first[3:8], second[3:8], strict=True):
        assert "not finite" in a and "batch 0 of the loader contains NaN" in c
    assert first[8] == second[8] > 0  # and what comes next is in step again
    assert "another process failed here" in first[9] and "NaN" in second[9] and first[10] == second[10]
    assert "leave sample at None" in first[11]


# a batch that two do not share evenly, over several epochs; with a schedule, a clock and the files
CONFIGS = {
    "GaussNewton": {
        "method": "GaussNewton",
        "batch": 33,
        "images": 100,
        "widths": (8, 8),
        "steps": 12,
        "probe": 40,
        "seconds": 100.0,
        "options": {"every": 3},
    },
    "SGD": {
        "method": "SGD",
        "rate": 0.1,
        "momentum": 0.9,
        "batch": 33,
        "images": 100,
        "widths": (8, 8),
        "steps": 12,
        "schedule": "ReduceLROnPlateau",
    },
    "LBFGS": {"method": "LBFGS", "batch": 33, "images": 100, "widths": (8, 8), "steps": 4, "options": {"max_iter": 5}},
}
RUNS = f"""
import warnings
from hinv.companion import training
out, configs = {{}}, {CONFIGS!r}
for name, how in configs.items():
    run = training.run(training.Config(**how), progress=False)
    again = training.run(training.Config(**how), progress=False)
    assert again.records == run.records
    out[name] = run.curve()[1], run.validations[-1], run.status, torch.nn.utils.parameters_to_vector(run.model.parameters()).detach()
def message(make):
    try:
        make()
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
out["refused"] = [message(lambda: training.run(training.Config(**how), progress=False)) for how in (dict(method="DampedNewton"), dict(batch=1))]

# in one process alone: images that are not finite, and a disk that is full
session, broken = training.session.Session, []
advance, write = session._advance, training.folder.Folder.append
session._advance = lambda self, batch: advance(self, (batch[0] * (torch.inf if rank == 1 and self.step == 3 else 1.0), batch[1]))
for name in ("SGD", "GaussNewton"):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out[f"{{name}}, not finite"] = training.run(training.Config(**configs[name] | dict(seed=1)), progress=False).status
    except Exception as error:
        out[f"{{name}}, not finite"] = f"{{type(error).__name__}}: {{error}}"
session._advance = advance
def full(self, file, record):
    if record.get("step") == 2 and not broken:
        broken.append(1)
        raise OSError(28, "No space left on device")
    write(self, file, record)
training.folder.Folder.append = full
how = training.Config(**configs["SGD"] | dict(seed=2))
out["full disk"] = message(lambda: training.run(how, progress=False))
out["afterwards"] = training.run(how, progress=False).curve()[1]
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_two_processes_is_that_of_one(together, name, tmp_path):
    one = training.run(training.Config(**CONFIGS[name]), tmp_path / "run", progress=False)
    weights = nn.utils.parameters_to_vector(one.model.parameters()).detach()
    first, second = (found["runs"][name] for found in together)
    for a in (first, second):
        assert a[0] == pytest.approx(one.curve()[1], rel=1e-9) and len(a[0]) == CONFIGS[name]["steps"]
        assert a[1]["probe_loss"] == pytest.approx(one.validations[-1]["probe_loss"], rel=1e-9) and a[2] == "done"
        assert relative(a[3], weights) < 1e-10
    assert first[0] == second[0] and torch.equal(first[3], second[3])


def test_what_does_not_sum_over_processes_is_refused(together):
    for found in together:
        damped, small = found["runs"]["refused"]
        assert (
            "DampedNewton takes a batch for the whole of it, and here each of 2 processes has its own samples" in damped
        )
        assert "a batch of 1 images for 2 processes" in small


def test_what_goes_wrong_in_one_process_ends_the_run_in_both(together, tmp_path):
    first, second = (found["runs"] for found in together)
    assert first["SGD, not finite"].startswith("stopped at step 3") and second["SGD, not finite"].startswith(
        "stopped at step 3"
    )
    assert first["GaussNewton, not finite"] == "ValueError: another process failed here: its own error says why"
    assert second["GaussNewton, not finite"] == "ValueError: inputs contain NaN or infinite values"
    assert "No space left" in first["full disk"] and "another process failed here" in second["full disk"]
    whole = training.run(training.Config(**CONFIGS["SGD"] | {"seed": 2}), tmp_path / "run", progress=False)
    assert first["afterwards"] == second["afterwards"] == pytest.approx(whole.curve()[1], rel=1e-9)


DIES = f"""
from hinv.companion import training
how = training.Config(**{CONFIGS["GaussNewton"]!r} | dict(checkpoint_every=5))
if rank == 1:
    plain, calls = hinv.optim.GaussNewton.step, []
    def step(self, x, y):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), 9)
        return plain(self, x, y)
    hinv.optim.GaussNewton.step = step
training.run(how, folder + "/run", progress=False)
"""
RESUMED = DIES.replace("if rank == 1", "if False")


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    model, weighted, _, _, shares = problem()
    codes, errors = run_together(tmp_path, {"dies": (DIES, model, weighted, shares)})
    assert codes[1] == -9 and codes[0] != 0
    assert (
        "ConnectionError: step 7: another process has ended" in errors[0]
        and "goes on from its last checkpoint" in errors[0]
    )
    how = training.Config(**CONFIGS["GaussNewton"] | {"checkpoint_every": 5})
    assert (
        len(list((tmp_path / "run").glob("step-00000005-*.pt"))) == 1 and not (tmp_path / "run" / "done.json").exists()
    )
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again / "run")
    codes, errors = run_together(again, {"goes on": (RESUMED + "out = None", model, weighted, shares)})
    assert codes == [0, 0], "\n".join(errors)
    both = training.run(how, again / "run", progress=False)  # read
    rest = training.run(how, tmp_path / "run", progress=False)  # in one process
    whole = training.run(how, tmp_path / "whole", progress=False)
    for found in (both, rest):
        assert found.curve()[1] == pytest.approx(whole.curve()[1], rel=1e-9) and len(found.records) == 12


def test_one_process_alone_is_not_several():
    assert not ranks.several() and ranks.first() and ranks.size() == 1
    assert ranks.from_first(lambda: 3) == 3
    one = torch.ones(2)
    assert ranks.summed(lambda: one, one) is one
