"""Warnings are of the line that called hinv, wherever inside of it they are noticed."""

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "hinv"

SCRIPT = """
import warnings

import torch
from torch import nn

import hinv
from hinv.companion import training

x, y = torch.randn(8, 3).double(), torch.arange(8) % 2
model, loss = hinv.tall_skinny([3, 4, 2]), nn.CrossEntropyLoss()
H = hinv.Hessian(model, loss, x, y)
config = training.Config(steps=4, checkpoint_every=2, dataset="digits", images=64, batch=32, probe=32)
run = training.run(config, progress=False)
for file in run.folder.glob("*.pt"):
    file.write_bytes(b"")
(run.folder / "done.json").write_text("{")


def said(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return {(w.filename, w.lineno - call.__code__.co_firstlineno) for w in found if "torch.jit" not in str(w.message)}


def shallow():
    H.solve(H.gradient, 1e-3, "cg", rtol=1e-300)


def in_a_constructor():
    hinv.GGN(model, lambda outputs, targets: outputs.sum() / 8, x, y)


def of_poles():
    H.sign(H.gradient, gap=1e-3, rtol=1e-300)


def deep():
    training.run(config, progress=False)


print(said(shallow) == {(__file__, 1)})
print(said(in_a_constructor) == {(__file__, 1)})
print(said(of_poles) == {(__file__, 1)})
print(said(deep) == {(__file__, 1)})
"""


def test_warnings_are_of_the_line_that_called(tmp_path):
    """In a process of its own, as the types that the tests enforce stand between caller and called."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"HINV_RUNS": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 4, done.stdout + done.stderr


def test_nothing_else_warns():
    found = [p.name for p in PACKAGE.rglob("*.py") if "warnings.warn(" in p.read_text()]
    assert found == ["errors.py"]
