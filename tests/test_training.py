"""Runs that are killed, damaged, starved and misused; small networks on the digits."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
import warnings
from itertools import islice

import pytest
import torch
from faults import small_disk, survived
from torch import nn
from torch.nn.utils import parameters_to_vector

from hinv import optim, tall_skinny
from hinv.companion import bench, data, training
from hinv.companion.training import Config, run
from hinv.companion.training.config import descent
from hinv.companion.training.folder import key
from hinv.companion.training.images import Batches, images

SMALL = {"images": 200, "test": 50, "probe": 40, "widths": (8, 8), "batch": 16, "steps": 12, "validate_every": 5}
METHODS = {
    "Adam": {"method": "Adam", "rate": 0.01},
    "SGD": {"method": "SGD", "rate": 0.05, "momentum": 0.9, "schedule": "StepLR", "schedule_options": {"step_size": 5}},
    "GaussNewton": {"rate": 0.5, "momentum": 0.5, "options": {"every": 3, "damping": 1.0}},
    "TrustRegionNewton": {"method": "TrustRegionNewton", "options": {"radius": 0.3}},
    "LBFGS": {"method": "LBFGS", "rate": 0.3, "options": {"max_iter": 3, "history_size": 4}},
    "plateau": {
        "method": "Adam",
        "rate": 0.1,
        "schedule": "ReduceLROnPlateau",
        "schedule_options": {"patience": 1, "factor": 0.3},
    },
}


def config(name="GaussNewton", **options):
    return Config(**(SMALL | METHODS[name] | options))


def position(result):
    return parameters_to_vector(result.model.parameters()).detach()


def without_time(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "elapsed")} for r in records]


def same(a, b):
    assert torch.equal(position(a), position(b))
    assert without_time(a.records) == without_time(b.records) and without_time(a.validations) == without_time(
        b.validations
    )
    assert (a.status, a.estimate) == (b.status, b.estimate)


# -- what a run is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_the_loop_written_out(name, tmp_path):
    c = config(name)
    result = run(c, tmp_path / "run", progress=False)
    digits = data.load("digits", n=200, normalize=True, dtype=torch.float64)
    model, loss = tall_skinny((64, 8, 8, 10), seed=0), nn.CrossEntropyLoss()
    method = descent(c, model)
    makers = {"StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 5)}
    makers["ReduceLROnPlateau"] = lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3)
    schedule = makers[c.schedule](method.optimizer) if c.schedule else None
    for step in range(12):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(hash((0, 0))))
        index = order[16 * step : 16 * step + 16]
        report = method.step(digits.x[index].flatten(1), digits.y[index])
        assert report.loss == result.records[step]["loss"]
        if schedule:
            schedule.step(*([report.loss] if c.schedule == "ReduceLROnPlateau" else []))
    if name == "plateau":
        assert method.optimizer.param_groups[0]["lr"] < c.rate  # it did fall
    assert torch.equal(parameters_to_vector(model.parameters()), position(result))
    assert result.status == "done" and len(result.records) == 12
    assert [v["step"] for v in result.validations] == [0, 5, 10, 12]
    with torch.no_grad():
        outputs = model(digits.x[:40].flatten(1))
    last = result.validations[-1]
    assert last["probe_loss"] == pytest.approx(loss(outputs, digits.y[:40]).item())
    assert last["probe_top1"] == (outputs.argmax(1) == digits.y[:40]).double().mean().item()
    ranks = (outputs > outputs.gather(1, digits.y[:40, None])).sum(1)
    assert last["probe_top5"] == (ranks < 5).double().mean().item()
    assert 0 < last["test_top1"] <= last["test_top5"] <= 1


def test_a_run_that_is_done_is_read_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("HINV_OUTPUT", str(tmp_path))
    first = run(config(), progress=False)
    assert first.folder.parent == tmp_path / "results" / "runs"
    monkeypatch.setattr(optim.Preconditioned, "step", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(optim.Preconditioned, "_keep", lambda *a: pytest.fail("factored again"))
    same(first, run(config(), progress=False))
    for other in (config(seed=1), config(images=150), config(options={"every": 2, "damping": 1.0})):
        assert key(other, images(other)) != first.folder.name
    assert key(config(checkpoint_every=3), images(config())) == first.folder.name
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert key(config(), images(config())) != first.folder.name


def test_budgets_and_target(tmp_path):
    assert len(run(config(steps=None, epochs=2), tmp_path / "epochs", progress=False).records) == 2 * (200 // 16)
    timed = run(config("Adam", steps=None, seconds=0.05), tmp_path / "seconds", progress=False)
    assert timed.records[-1]["elapsed"] >= 0.05 > timed.records[-2]["elapsed"]
    reached = run(config(steps=100, target=1.5), tmp_path / "target", progress=False)
    assert reached.status == "target reached" and len(reached.records) < 100
    assert min(reached.records[-1]["loss"], reached.records[-1]["loss_after"]) < 1.5
    same(reached, run(config(steps=100, target=1.5), tmp_path / "target", progress=False))


def test_what_a_run_tells(tmp_path):
    result = run(config("GaussNewton"), tmp_path / "run", progress=False)
    assert result.curve() == ([r["step"] for r in result.records], [r["loss"] for r in result.records])
    x, y = result.curve("test_top1", "elapsed")
    assert x == [v["elapsed"] for v in result.validations] and y[-1] == result.validations[-1]["test_top1"]
    middle = result.validations[2]
    assert result.reached(middle["probe_loss"], "probe_loss")[0] <= middle["step"]
    assert result.reached(0.0) is None and result.reached(math.inf) == (1, result.records[0]["elapsed"])
    after = result.records[3].get("loss_after", result.records[3]["loss"])
    steps, seconds = result.reached(after)
    assert steps <= 4 and seconds == result.records[steps - 1]["elapsed"]


def test_a_sweep_keeps_the_last_value_and_nan_for_what_diverged(tmp_path, monkeypatch):
    monkeypatch.setenv("HINV_OUTPUT", str(tmp_path))
    relu = {"activation": "ReLU", "schedule": None, "schedule_options": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = training.sweep(
            {r: config("SGD", rate=r, momentum=0.0, **relu) for r in (1e200, 0.1, 1e-6)}, "probe_loss"
        )
    assert math.isnan(found[1e200]) and found[0.1] < found[1e-6] and training.best(found) == 0.1
    again = run(config("SGD", rate=0.1, momentum=0.0, **relu), progress=False)
    assert found[0.1] == again.validations[-1]["probe_loss"] and not again.diverged
    assert training.best({"a": math.nan}) == "a"


def test_nothing_of_the_caller_changes(tmp_path, capsys):
    state = torch.get_rng_state()
    run(config(), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert "GaussNewton on digits: 682 parameters, batch 16: method 'dual', about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("GaussNewton", {"sample": 4}, "batch 4: method 'dual', about"),
        ("TrustRegionNewton", {"sample": 5}, "batch 5: method 'factor', about"),
        ("SaddleFreeNewton", {"pairs": 10}, "batch 16: Lanczos, about"),
        ("SaddleFreeNewton", {"pairs": None}, "batch 16: method 'dense', about"),
    ],
)
def test_what_a_step_needs_is_said_of_the_images_its_matrix_is_made_from(method, options, said, tmp_path):
    assert said in run(config(method=method, options=options, steps=1), tmp_path / "run", progress=False).estimate


def test_metrics_go_to_a_writer(tmp_path):
    seen = []

    class Writer:
        def add_scalar(self, tag, value, step):
            seen.append((tag, step))

    run(config(), tmp_path / "run", Writer(), progress=False)
    assert {("step/loss", 0), ("step/damping", 11), ("validation/test_top1", 12)} <= set(seen)


# -- interruptions -----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import torch
from hinv.companion import training
from hinv.companion.training.session import Session
torch.set_num_threads(1)  # as many as the run that goes on from here
config = training.Config.from_dict(json.loads(sys.argv[1]))
kill_at = int(sys.argv[3])
plain = Session._write
def write(self, file, record, writer):
    plain(self, file, record, writer)
    if record["kind"] == "step" and record["step"] == kill_at:
        file.write(b'{"kind": "step", "half')  # as a kill in the middle of a line would leave it
        file.flush()
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
Session._write = write
training.run(config, sys.argv[2], progress=False)
"""


@pytest.mark.parametrize(
    ("name", "kill_at"),
    [
        ("Adam", 10),
        ("SGD", 7),
        ("GaussNewton", 7),
        ("GaussNewton", 1),
        ("TrustRegionNewton", 5),
        ("LBFGS", 5),
        ("plateau", 9),
    ],
)
def test_killed_and_resumed_is_bit_identical(name, kill_at, tmp_path):
    c = config(name, checkpoint_every=2)
    whole = run(c, tmp_path / "whole", progress=False)
    arguments = [
        sys.executable,
        "-c",
        SCRIPT,
        json.dumps({**SMALL, **METHODS[name], "checkpoint_every": 2}),
        tmp_path / "killed",
        str(kill_at),
    ]
    killed = subprocess.run(arguments, check=False)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "done.json").exists()
    same(whole, run(c, tmp_path / "killed", progress=False))


def test_killed_at_any_moment(tmp_path):
    """Not at a chosen line: a SIGKILL from outside, wherever it hits, several times over."""
    c = config("Adam", steps=400, checkpoint_every=7, validate_every=50)
    whole = run(c, tmp_path / "whole", progress=False)
    options = {**SMALL, **METHODS["Adam"], "steps": 400, "checkpoint_every": 7, "validate_every": 50}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(options), tmp_path / "killed", "-1"]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for lines in (40, 150, 260):
        process = subprocess.Popen(arguments)
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    same(whole, run(c, tmp_path / "killed", progress=False))


@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_checkpoints_are_named_and_passed_over(damaged, tmp_path):
    c = config(checkpoint_every=4)
    whole = run(c, tmp_path / "run", progress=False)
    (tmp_path / "run" / "done.json").unlink()
    checkpoints = sorted((tmp_path / "run").glob("step-*.pt"), reverse=True)
    assert len(checkpoints) == 2
    for path in checkpoints[:damaged]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.warns(
        UserWarning, match=rf"{checkpoints[0].name} is damaged \(its digest differs\): using the one before it"
    ):
        again = run(c, tmp_path / "run", progress=False)
    same(whole, again)
    survived(
        "training run: checkpoint damaged",
        "a warning names it, and the one before it is used",
        "the numbers of an undisturbed run",
    )


def test_a_run_that_is_done_and_lost_its_checkpoints_says_so(tmp_path):
    run(config(), tmp_path / "run", progress=False)
    for path in (tmp_path / "run").glob("step-*.pt"):
        path.write_bytes(b"torn")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="none of its checkpoints is whole"),
    ):
        run(config(), tmp_path / "run", progress=False)


def test_checkpoints_hold_only_what_weights_only_loads(tmp_path):
    result = run(config(), tmp_path / "run", progress=False)
    path = max((tmp_path / "run").glob("step-*.pt"))
    state = torch.load(path, weights_only=True)
    assert state["step"] == 12 and set(state["model"]) == set(result.model.state_dict())
    assert not list((tmp_path / "run").glob("unfinished-*"))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_nan_ends_with_the_last_good_weights(name, tmp_path):
    c = config(name, rate=1e200, steps=50, activation="ReLU", schedule=None, schedule_options={}, momentum=0.0)
    with pytest.warns(UserWarning, match=rf"{name}, rate 1e\+200: stopped at step \d"):
        result = run(c, tmp_path / "run", progress=False)
    assert result.status.startswith("stopped at step") and position(result).isfinite().all()
    assert torch.tensor([r["loss"] for r in result.records]).isfinite().all()
    assert json.loads((tmp_path / "run" / "done.json").read_text())["status"] == result.status


# -- no room -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_what_was_written_stays_valid(tmp_path):
    with small_disk(tmp_path, "120k") as disk:
        c = config(steps=300, checkpoint_every=20)
        with pytest.raises(OSError, match="No space left"):
            run(c, disk / "run", progress=False)
        assert not list((disk / "run").glob("unfinished-*")) and not (disk / "run" / "done.json").exists()
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        same(run(c, tmp_path / "whole", progress=False), run(c, disk / "run", progress=False))
    survived(
        "training run: full disk",
        "the system's message; with room again the same call goes on",
        "metrics and checkpoints written before",
    )


def test_a_file_that_may_not_grow(tmp_path):
    """The same without root: the system refuses to write beyond a size."""
    c = config("Adam", steps=100, checkpoint_every=5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run(c, tmp_path / "run", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    same(run(c, tmp_path / "whole", progress=False), run(c, tmp_path / "run", progress=False))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'bach': a run has method, rate"):
        Config.from_dict({"bach": 3})
    with pytest.raises(ValueError, match="unknown method 'Newton': use DampedNewton, GaussNewton"):
        Config(method="Newton")
    for method, options, match in (
        (
            "GaussNewton",
            {"dampign": 1.0},
            "GaussNewton has no option 'dampign': it has accept, adapt, clip, damping, every",
        ),
        ("Adam", {"damping": 1.0}, "Adam has no option 'damping': it has .*betas"),
    ):
        with pytest.raises(ValueError, match=match):
            run(Config(**(SMALL | {"method": method, "options": options})), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="Adam has no momentum"):
        run(config("Adam", momentum=0.9), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="activation 'Tan'"):
        config(activation="Tan")
    with pytest.raises(ValueError, match="has no 'Step'"):
        config(schedule="Step")
    with pytest.raises(ValueError, match="'float32' or 'float64'"):
        config(dtype="float16")
    with pytest.raises(ValueError, match="needs a budget"):
        config(steps=None)
    for name in ("batch", "probe", "validate_every", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            config(**{name: 0})
    assert not (tmp_path / "run").exists()


def test_data_that_is_missing_or_of_the_wrong_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("HINV_DATA", str(tmp_path))
    with pytest.raises(data.DataNotFound, match="Three ways"):
        run(config(dataset="nowhere"), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="a batch of 300 from 200 images of digits: use a smaller batch"):
        run(config(batch=300), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="random crops need side="):
        run(config(augment=True), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="asked for"):
        run(config(images=10**6), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    stand_in = run(config(dataset="nowhere", fallback="digits"), tmp_path / "run", progress=False)
    assert stand_in.data == "digits (stand-in: nowhere not found)"


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(config(), tmp_path / "run", progress=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=r"holds another run \(rate 0.5 instead of 0.25\): use another folder"):
        run(config(rate=0.25), tmp_path / "run", progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


# -- batches and crops -------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_the_step():
    every = list(islice(Batches(23, 5, 7, 0), 12))
    for start in (1, 3, 4, 9):
        assert list(islice(Batches(23, 5, 7, start), 12 - start)) == every[start:]
    for epoch in range(3):
        numbers = [i for batch in every[4 * epoch : 4 * epoch + 4] for e, i in batch if e == epoch]
        assert len(numbers) == 20 == len(set(numbers))
    assert every[0] != every[4] and every[:4] != list(islice(Batches(23, 5, 8, 0), 4))


def test_crops_depend_on_seed_epoch_and_number_alone():
    source = data.source("digits", n=12)
    make = {"side": 6, "gray": False, "mean": torch.tensor([0.3]), "std": torch.tensor([0.5]), "dtype": torch.float64}
    crops = data.Crops(source, **make, seed=1)
    state = torch.get_rng_state()
    x, y = crops.__getitems__([(0, 3), (0, 5), (1, 3)])
    assert torch.equal(torch.get_rng_state(), state)
    assert x.shape == (3, 1, 6, 6) and x.dtype == torch.float64 and torch.equal(y, source.y[[3, 5, 3]])
    assert not torch.equal(x[0], x[2])  # another epoch, another crop
    z, _ = data.Crops(source, **make, seed=1).__getitems__([(1, 3), (0, 3)])
    assert torch.equal(z[0], x[2]) and torch.equal(z[1], x[0])
    assert not torch.equal(data.Crops(source, **make, seed=2).__getitems__([(0, 3)])[0][0], x[0])
    assert ((x * 0.5 + 0.3) > -1e-6).all() and ((x * 0.5 + 0.3) < 1 + 1e-6).all()


def test_crops_are_kept_within_bounds_and_the_same_when_kept(monkeypatch):
    make = {"side": 6, "gray": False, "mean": torch.zeros(1), "std": torch.ones(1), "dtype": torch.float64, "seed": 1}
    crops, keys = data.Crops(data.source("digits", n=12), **make), [(0, 3), (0, 5), (1, 3)]
    first, _ = crops.__getitems__(keys)
    monkeypatch.setattr(data.RandomResizedCrop, "get_params", lambda *a, **k: pytest.fail("cut again"))
    assert torch.equal(crops.__getitems__(keys)[0], first)
    monkeypatch.undo()
    monkeypatch.setattr(data, "KEPT", 2 * 6 * 6 * 4)  # room for two
    small = data.Crops(data.source("digits", n=12), **make)
    assert torch.equal(small.__getitems__(keys)[0], first) and torch.equal(
        small.__getitems__(keys[::-1])[0].flip(0), first
    )
    assert len(small._cut) == 2


def test_augmented_runs_do_not_depend_on_the_workers(tmp_path):
    options = {"augment": True, "side": 8, "steps": 6}
    plain = run(config(**options), tmp_path / "plain", progress=False)
    same(plain, run(config(**options, workers=2), tmp_path / "workers", progress=False))


# -- a thousand classes ------------------------------------------------------------------------------------------------


def test_a_thousand_classes_need_what_was_predicted():
    """20 layers, 1,000 classes: nothing of size (classes x width)^2 = 4.6 GB, and the peak of a step as stated before it."""
    m = bench.memory_of_a_step(1000)
    assert m["method"] == "factor"
    assert m["measured"] == pytest.approx(m["predicted"], rel=0.2)
    assert m["measured"] < 8 * (1000 * 24) ** 2 / 4
