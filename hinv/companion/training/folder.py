"""The files of a run. What is written is whole or is not there: a crash leaves at most half a line, which the next start cuts off."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

import hinv
from hinv.companion.checks import output, write_atomically
from hinv.errors import warn

from .config import Config
from .images import RunImages

UNRELATED = ("paper", "spectrum", "optim/monitor.py", "companion")  # rooms and files that no run's numbers come from
RELATED = ("companion/training", "companion/data.py", "companion/pictures.py", "companion/rivals.py")


def key(config: Config, images: RunImages) -> str:
    """Hash of configuration, data, the package's sources and torch's version."""
    digest = hashlib.sha256()
    values = dataclasses.asdict(config) | {"workers": None, "checkpoint_every": None}  # results do not depend on these
    digest.update(json.dumps([values, images.name, len(images.train), torch.__version__], sort_keys=True).encode())
    for tensor in (*images.probe, *(images.test or ())):
        digest.update(tensor.contiguous().numpy().tobytes())
    root = Path(hinv.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(RELATED) or not name.startswith(UNRELATED):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def home() -> Path:
    """Where runs live: HINV_RUNS if set (so that tests and notebooks share them), else results/runs."""
    return Path(os.environ["HINV_RUNS"]) if "HINV_RUNS" in os.environ else output("results") / "runs"


def read(file: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None, with a warning that names it, if it is damaged."""
    try:
        record = json.loads(file.read_text("utf-8"))
    except ValueError:  # not JSON, or not text
        record = None
    if not isinstance(record, dict):
        warn(f"{file} is damaged: what it held is made again")
        return None
    return record


class Folder:
    """config.json, metrics.jsonl, step-N-HASH.pt (two of them), done.json; lock, of the process at work."""

    def __init__(self, path: Path):
        self.path, self.metrics = path, path / "metrics.jsonl"

    def claim(self, config: Config, images: RunImages) -> None:
        """Make the folder this run's, or refuse it.

        Raises:
            ValueError: it holds another run; says in what they differ.
        """
        record = {"config": dataclasses.asdict(config), "data": images.name, "key": key(config, images)}
        file = self.path / "config.json"
        if not file.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(record, indent=1) + "\n")
            return
        there = read(file)
        if there is None or "key" not in there:
            if self.path.name != record["key"]:
                raise ValueError(
                    f"{file} is damaged, so whose run {self.path} holds is not known: remove the folder, or use another one"
                )
            write_atomically(file, json.dumps(record, indent=1) + "\n")
        elif there["key"] != record["key"]:
            old, new = there["config"], json.loads(json.dumps(record["config"]))
            differ = [
                f"{name} {old.get(name)!r} instead of {new[name]!r}" for name in new if old.get(name) != new[name]
            ]
            raise ValueError(
                f"{self.path} holds another run ({'; '.join(differ) or 'other images, or another version of hinv or torch'}): use another folder"
            )

    @property
    def done(self) -> dict[str, Any] | None:
        """How the run ended; None if it has not, or if what it left is damaged so that it must go on."""
        file = self.path / "done.json"
        record = read(file) if file.exists() else None
        whole = record is not None and self.metrics.exists() and self.whole_metrics() == self.metrics.stat().st_size
        return record if whole else None

    def whole_metrics(self) -> int:
        """How many bytes of metrics.jsonl are whole lines, and what follows is not; with a warning where that is more than the half line of a crash."""
        good = 0
        if not self.metrics.exists():
            return good
        content = self.metrics.read_bytes()
        for line in content.splitlines(keepends=True):
            try:
                whole = line.endswith(b"\n") and isinstance(json.loads(line), dict)
            except ValueError:
                whole = False
            if not whole:
                break
            good += len(line)
        if b"\n" in content[good:]:
            number = content[:good].count(b"\n") + 1
            warn(f"{self.metrics} is damaged in line {number}: going on from the checkpoint before it")
        return good

    def finish(self, record: dict[str, Any]) -> None:
        write_atomically(self.path / "done.json", json.dumps(record, indent=1) + "\n")

    def append(self, file: BinaryIO, record: dict[str, Any]) -> None:
        """One line of metrics, on the disk when this returns."""
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The metrics of one kind, "step" or "validation"."""
        lines = [json.loads(line) for line in self.metrics.read_bytes().splitlines()]
        return [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == kind]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """A checkpoint whose name carries the digest of its contents; the two newest are kept."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        name = f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix="unfinished-")
        try:
            with os.fdopen(handle, "wb") as checkpoint:
                checkpoint.write(content)
                checkpoint.flush()
                os.fsync(checkpoint.fileno())
            os.replace(temporary, self.path / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        for old in self._checkpoints()[2:]:
            old.unlink()

    def newest(self, device: str) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, and whose metrics are."""
        metrics = self.whole_metrics()
        for path in self._checkpoints():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem.rpartition("-")[2]:
                try:
                    state = torch.load(io.BytesIO(content), weights_only=True, map_location=device)
                except pickle.UnpicklingError:  # somebody else's: it would have run code
                    state, damage = None, "holds more than numbers and names"
                if state is not None:
                    if state["offset"] <= metrics:
                        return state
                    continue
            else:
                damage = "its digest differs"
            warn(f"checkpoint {path} is damaged ({damage}): using the one before it")
        return None

    def _checkpoints(self) -> list[Path]:
        """The newest first."""
        return sorted(self.path.glob("step-*.pt"), reverse=True)
