"""What the machine, the disk and the user do in the middle of things: nothing is lost, nothing half-written, and the message says what to do."""

import ast
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import pytest
import torch
from faults import TABLE, small_disk, survived
from test_training import SCRIPT, config, same

from hinv.companion import checks, data, reproduce
from hinv.companion.training import run

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None), "it never came so far"
        time.sleep(0.01)


# -- a run -------------------------------------------------------------------------------------------------------------


def started(*command, **options):
    """A process that Ctrl-C ends: what a shell starts in the background, these tests too, inherits that SIGINT is ignored."""
    return subprocess.Popen(*command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def start_run(c, folder):
    import dataclasses

    return started(
        [sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(c)), folder, "-1"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_run_is_interrupted(tmp_path, kind):
    c = config("Adam", steps=400, checkpoint_every=7, validate_every=50)
    process = start_run(c, tmp_path / "run")
    wait_for(lambda: lines(tmp_path / "run") > 60, process)
    process.send_signal(kind)
    process.wait()
    assert not (tmp_path / "run" / "done.json").exists()
    same(run(c, tmp_path / "whole", progress=False), run(c, tmp_path / "run", progress=False))
    survived(
        f"training run: {kind.name}",
        "it ends; the same call goes on from the last checkpoint and ends with the same bits",
        "every step up to the last checkpoint; the lock went with the process",
    )


def test_one_run_started_twice_at_once(tmp_path):
    c = config("Adam", steps=300, checkpoint_every=50, validate_every=50)
    first = start_run(c, tmp_path / "run")
    wait_for(lambda: lines(tmp_path / "run") > 5, first)
    with pytest.warns(UserWarning, match="another process is training this run .*: waiting until it is done"):
        second = run(c, tmp_path / "run", progress=False)
    assert first.wait() == 0
    assert [r["step"] for r in second.records] == list(range(300))
    same(run(c, tmp_path / "whole", progress=False), second)
    survived(
        "training run: started twice at once",
        "the second process says that it waits, and reads what the first one made",
        "one record a step",
    )


DAMAGE = {
    "metrics.jsonl cut in half": lambda f: f.joinpath("metrics.jsonl").write_bytes(
        f.joinpath("metrics.jsonl").read_bytes()[:700]
    ),
    "metrics.jsonl padded with NULs": lambda f: f.joinpath("metrics.jsonl").write_bytes(
        f.joinpath("metrics.jsonl").read_bytes()[:700] + b"\0" * 900
    ),
    "metrics.jsonl with a line of something else": lambda f: f.joinpath("metrics.jsonl").write_bytes(
        b"not json\n" + f.joinpath("metrics.jsonl").read_bytes()
    ),
    "metrics.jsonl lost": lambda f: f.joinpath("metrics.jsonl").unlink(),
    "done.json empty": lambda f: f.joinpath("done.json").write_text(""),
    "done.json of another kind": lambda f: f.joinpath("done.json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_files_are_damaged(tmp_path, what, finished):
    c = config(checkpoint_every=4)
    whole = run(c, tmp_path / "whole", progress=False)
    run(c, tmp_path / "run", progress=False)
    DAMAGE[what](tmp_path / "run")
    if not finished:
        (tmp_path / "run" / "done.json").unlink()
    same(whole, run(c, tmp_path / "run", progress=False))
    same(whole, run(c, tmp_path / "run", progress=False))  # and it is whole again
    survived(
        f"training run: {what}",
        "a warning names the file; the steps from the last checkpoint that fits, or all, are made again",
        "the checkpoints; the same numbers as an undisturbed run",
    )


def test_a_config_that_is_damaged(tmp_path, monkeypatch):
    c = config()
    run(c, tmp_path / "mine", progress=False)
    (tmp_path / "mine" / "config.json").write_text("")
    with (
        pytest.warns(UserWarning, match="config.json is damaged"),
        pytest.raises(ValueError, match=r"whose run .* is not known: remove the folder"),
    ):
        run(c, tmp_path / "mine", progress=False)
    monkeypatch.setenv("HINV_RUNS", str(tmp_path / "runs"))
    first = run(c, progress=False)
    (first.folder / "config.json").write_text('{"half')
    with pytest.warns(UserWarning, match="config.json is damaged"):
        same(first, run(c, progress=False))
    assert json.loads((first.folder / "config.json").read_text())["key"] == first.folder.name
    survived(
        "training run: config.json damaged",
        "in a folder named by its key it is written anew; in a folder of the user's own the run is refused, and says why",
        "the run",
    )


def test_a_checkpoint_that_would_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    c = config(checkpoint_every=4)
    whole = run(c, tmp_path / "run", progress=False)
    (tmp_path / "run" / "done.json").unlink()
    buffer = io.BytesIO()
    torch.save({"offset": 0, "step": Payload()}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    (tmp_path / "run" / f"step-{99:08d}-{digest}.pt").write_bytes(buffer.getvalue())
    with pytest.warns(UserWarning, match="holds more than numbers and names"):
        same(whole, run(c, tmp_path / "run", progress=False))
    assert not (tmp_path / "ran").exists()
    survived(
        "training run: a checkpoint that would run code",
        "it is named and passed over; nothing of it runs",
        "the checkpoint before it",
    )


def test_a_disk_that_may_not_be_written(tmp_path):
    with small_disk(tmp_path, "8m") as disk:
        whole = run(config(), disk / "run", progress=False)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        same(whole, run(config(), disk / "run", progress=False))
        with pytest.raises(OSError, match="Read-only"):
            run(config("Adam"), disk / "other", progress=False)
        with pytest.raises(OSError, match="Read-only"):
            checks.write_atomically(disk / "run" / "config.json", "{}")
        same(whole, run(config(), disk / "run", progress=False))
    survived("read-only disk", "finished runs are read; a new one ends with the system's message", "all that was there")


def test_results_on_a_full_disk(tmp_path):
    with small_disk(tmp_path, "64k") as disk:
        checks.write_atomically(disk / "bench.json", "old\n")
        (disk / "filler").write_bytes(b"x" * 56_000)
        with pytest.raises(OSError, match="No space"):
            checks.write_atomically(disk / "bench.json", "new" * 20_000)
        assert (disk / "bench.json").read_text() == "old\n" and sorted(p.name for p in disk.iterdir()) == [
            "bench.json",
            "filler",
        ]
    survived(
        "full disk: results, figures of the benchmark",
        "the system's message; no temporary file stays",
        "the results of before",
    )


# -- locks -------------------------------------------------------------------------------------------------------------

HOLD = "import sys, time; from pathlib import Path; from hinv.companion.checks import alone\nwith alone(Path(sys.argv[1]), 'testing'): print('in', flush=True); time.sleep(60)"


def test_a_lock_goes_with_its_process(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "in\n"
    process.kill()
    process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with checks.alone(tmp_path / "lock", "testing") as waited:
            assert not waited
    survived("any lock: its process is killed", "the next one takes it at once", "nothing is left to remove by hand")


# -- make bench --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_benchmark_is_interrupted(tmp_path, kind):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "bench.json").write_text("of before")
    environment = ENVIRONMENT | {"HINV_OUTPUT": str(tmp_path)}
    process = started(
        [sys.executable, "-m", "hinv.companion.bench"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert "threads" in process.stdout.readline()
    process.send_signal(kind)
    process.wait(60)
    assert process.returncode != 0 and (tmp_path / "results" / "bench.json").read_text() == "of before"
    survived(f"make bench: {kind.name}", "it ends", "results/bench.json of before")


# -- make reproduce ----------------------------------------------------------------------------------------------------

REPRODUCE = """
import sys
from pathlib import Path
from hinv.companion import reproduce
reproduce.ROOT = Path(sys.argv[1]); reproduce.NOTEBOOKS, reproduce.BUILD = reproduce.ROOT / "notebooks", reproduce.ROOT / "build"
sys.exit(reproduce.main(["run", str(reproduce.NOTEBOOKS / "01_slow.ipynb")]))
"""
SLOW = "import time\nopen('ran', 'a').write('x')\ntime.sleep(seconds)"
CLAIM = "from hinv.companion import checks\nclaims = checks.Claims('01', 'slow', 0, 'quick')\nclaims.check('below', 0.5, '<=', 1.0, '(1)')\nclaims.write()"


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "spaces and ünïcode ✓"
    (root / "notebooks").mkdir(parents=True)
    write_notebook(root / "notebooks" / "01_slow.ipynb", "seconds = 0\nprofile = 'quick'", SLOW, CLAIM)
    monkeypatch.setenv("HINV_OUTPUT", str(root))
    for name, value in {"ROOT": root, "NOTEBOOKS": root / "notebooks", "BUILD": root / "build"}.items():
        monkeypatch.setattr(reproduce, name, value)
    return root


def write_notebook(path, parameters, *cells):
    made = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), path)


def start_reproduce(root, seconds):
    (root / "build").mkdir(exist_ok=True)
    (root / "build" / "parameters.json").write_text(json.dumps({"seconds": seconds}))
    environment = ENVIRONMENT | {"HINV_OUTPUT": str(root)}
    return started(
        [sys.executable, "-c", REPRODUCE, root], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_reproduce_is_interrupted(project, kind):
    process = start_reproduce(project, 60)
    wait_for(lambda: (project / "notebooks" / "ran").exists(), process)
    time.sleep(0.3)
    process.send_signal(kind)
    process.wait()
    folder = project / "build" / "notebooks"
    assert (
        process.returncode != 0
        and not (folder / "01_slow.ipynb").exists()
        and not (project / "results" / "01.json").exists()
    )
    assert reproduce.report() is False
    assert reproduce.run(project / "notebooks" / "01_slow.ipynb") == folder / "01_slow.ipynb"
    assert (
        reproduce.report() is True
        and not list(folder.glob("*.running.ipynb"))
        and not list(folder.glob("*.failed.ipynb"))
    )
    survived(
        f"make reproduce: {kind.name}",
        "the report names the notebook as not finished; the next call runs it, and only what is missing",
        "every notebook that was done",
    )


def test_reproduce_twice_at_once(project):
    first = start_reproduce(project, 3)
    wait_for(lambda: (project / "notebooks" / "ran").exists(), first)
    with pytest.warns(UserWarning, match="another process is running 01_slow.ipynb"):
        done = reproduce.run(project / "notebooks" / "01_slow.ipynb")
    assert first.wait() == 0 and done.exists() and (project / "notebooks" / "ran").read_text() == "x"
    survived(
        "make reproduce: twice at once",
        "a notebook runs once: the second process waits and says so",
        "the notebook and its claims",
    )


def test_a_kernel_that_is_killed(project, capfd):
    write_notebook(
        project / "notebooks" / "01_slow.ipynb",
        "profile = 'quick'",
        "x = 1",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "y = 2",
    )
    assert reproduce.main(["run", str(project / "notebooks" / "01_slow.ipynb")]) == 1
    assert reproduce.report() is False
    out = capfd.readouterr().out
    assert (
        "01_slow.ipynb failed (its kernel ended in cell 3 of 4: was it killed for memory? PROFILE=quick needs least"
        in out
    )
    survived(
        "make reproduce: a kernel is killed (as for memory)",
        "the report names notebook and cell, and what needs less memory",
        "the cells up to it, with their outputs",
    )


def test_results_that_are_damaged(project, capsys):
    done = reproduce.run(project / "notebooks" / "01_slow.ipynb")
    executed = done.read_bytes()
    for content in ("", "{", '{"claims": 3}', "[]", "\0\0\0"):
        done.write_bytes(executed)
        (project / "results" / "01.json").write_text(content)
        assert reproduce.report() is False
        assert "left no claims in results/, or damaged ones" in capsys.readouterr().out
        reproduce.write_parameters([])  # what make does first
        assert not done.exists()
    (project / "build" / "parameters.json").write_text("{")
    assert reproduce.main(["run", str(project / "notebooks" / "01_slow.ipynb")]) == 2
    assert "parameters.json is damaged" in capsys.readouterr().err
    survived("results or parameters damaged", "the report says so, and the notebook runs again", "the other notebooks")


# -- places and languages ----------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys, time
from pathlib import Path
from hinv.companion import checks, training
import hinv, torch
folder = Path(sys.argv[1])
c = training.Config(images=100, probe=20, widths=(6,), batch=10, steps=4, fallback="digits", dataset="gibt es nicht ü")
found = training.run(c, folder / "lauf ü ✓", progress=False)
claims = checks.Claims("01", "digits", 0, "quick")
claims.check("größer ≥ null", 1.0, ">=", 0.0, "(1)")
claims.write()
print(json.dumps([found.data, found.records[-1]["loss"]]))
"""


@pytest.mark.parametrize("language", ["C", "de_DE.ISO-8859-1"])
def test_another_locale_time_zone_and_encoding(tmp_path, language):
    """With the warning on for every file that is opened without saying its encoding: all of ours say it."""
    environment = ENVIRONMENT | {
        "LC_ALL": language,
        "LANG": language,
        "TZ": "Pacific/Chatham",
        "PYTHONIOENCODING": "utf-8",
    }
    environment |= {"HINV_OUTPUT": str(tmp_path / "aus gabe"), "HINV_DATA": str(tmp_path / "nichts")}
    flags = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning:hinv"]
    (tmp_path / "script.py").write_text(ELSEWHERE, encoding="utf-8")
    (tmp_path / "aus gabe").mkdir()
    out = subprocess.run(
        [sys.executable, *flags, tmp_path / "script.py", tmp_path], env=environment, capture_output=True
    )
    assert out.returncode == 0, out.stderr.decode()
    found, loss = json.loads(out.stdout.splitlines()[-1])
    assert found == "digits (stand-in: gibt es nicht ü not found)" and loss > 0
    assert (
        "größer"
        in json.loads((tmp_path / "aus gabe" / "results" / "01.json").read_text("utf-8"))["claims"][0]["statement"]
    )
    survived(
        "another locale, time zone and encoding; spaces and non-ASCII in paths", "nothing", "the same files as anywhere"
    )


def test_a_data_folder_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("HINV_DATA", str(tmp_path / "loop"))
    with pytest.raises(
        data.DataNotFound, match=r"cannot be searched for 'zoo'.*Point HINV_DATA to|no train images of 'zoo'"
    ):
        data.load("zoo")
    assert data.load("zoo", fallback="digits").name == "digits (stand-in: zoo not found)"
    survived(
        "HINV_DATA cannot be read",
        "the message names it and the ways to get data",
        "a fallback, if one is given, under its own name",
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_tests():
    """Every row was written by a test that is still there, and every test has its row."""
    rows = [row["fault"] for row in json.loads(TABLE.read_text("utf-8"))]
    calls = [
        node.args[0]
        for path in sorted(TESTS.glob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "survived"
    ]
    plain = {arg.value for arg in calls if isinstance(arg, ast.Constant)}
    begins = tuple(arg.values[0].value for arg in calls if isinstance(arg, ast.JoinedStr))
    assert plain <= set(rows) and all(row in plain or row.startswith(begins) for row in rows)
    assert all(any(row.startswith(begin) for row in rows) for begin in begins)
    assert len(rows) >= 25
