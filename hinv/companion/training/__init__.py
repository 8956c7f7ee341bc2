"""Training runs that can be killed, resumed, and never run twice.

    run = training.run(Config(method="GaussNewton", dataset="cifar10", images=10_000, side=16, steps=150))
    run.records, run.validations, run.model

A run lives in results/runs/<key>, the key a hash of the configuration, the data found, the package's sources and torch's version. There it keeps

    config.json        the configuration
    metrics.jsonl      a line for each step and each validation
    step-N-HASH.pt     the last two checkpoints: weights, method, schedule, random state; the name carries the digest of the contents
    done.json          how it ended

What a batch holds depends on the seed and the number of the step alone, so that a run resumed after SIGKILL ends with the same bits (on the CPU)
as one that was left alone (with as many threads). A run with done.json is read, not repeated.
"""

import contextlib
import math
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hinv import ranks
from hinv.companion.checks import alone

from .config import Config
from .folder import Folder, home, key
from .images import images
from .session import STOPPED, Session

__all__ = ["Config", "Run", "best", "run", "sweep"]


@dataclass(repr=False)
class Run:
    """A finished (or stopped) run. `status` is "done", "target reached" or what stopped it; `records` and `validations` are dicts as in metrics.jsonl."""

    config: Config
    folder: Path
    status: str
    data: str
    parameters: int
    estimate: str
    records: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    model: nn.Sequential

    def __repr__(self) -> str:
        return f"Run({self.config.method} on {self.data}, {len(self.records)} steps, {self.status})"

    @property
    def diverged(self) -> bool:
        return self.status.startswith(STOPPED)

    def curve(self, metric: str = "loss", against: str = "step") -> tuple[list[float], list[float]]:
        """(x, y): a metric of the steps ("loss", "ratio", ...) or of the validations ("probe_loss", "test_top1", ...) against "step" or "elapsed" seconds."""
        lines = [line for line in (*self.records, *self.validations) if metric in line]
        return [line[against] for line in lines], [line[metric] for line in lines]

    def reached(self, level: float, metric: str = "loss") -> tuple[int, float] | None:
        """(steps, seconds) when a metric was first seen at or below a level, or None. For "loss" that is before or after the last of these steps."""
        of_steps = metric == "loss"
        for line in self.records if of_steps else self.validations:
            value = min(line["loss"], line.get("loss_after", math.inf)) if of_steps else line[metric]
            if value <= level:
                return line["step"] + of_steps, line["elapsed"]
        return None


def sweep(configs: Mapping[Hashable, Config], metric: str = "loss") -> dict[Hashable, float]:
    """The last value of a metric (see `Run.curve`) in a run of each configuration; NaN where the run diverged, as some of a grid will."""
    out: dict[Hashable, float] = {}
    for name, config in configs.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f".*{STOPPED}", UserWarning)
            result = run(config, progress=False)
        out[name] = math.nan if result.diverged else result.curve(metric)[1][-1]
    return out


def best(values: Mapping[Hashable, float]) -> Hashable:
    """The name of the smallest number that is not NaN (the first one if all are)."""
    return min(values, key=lambda name: (math.isnan(values[name]), values[name]))


def run(config: Config, folder: Path | None = None, writer: Any = None, progress: bool = True) -> Run:
    """Train, or go on with a run that was interrupted, or read one that is done.

    Args:
        folder: results/runs/<key> by default; one that holds another run is refused.
        writer: a TensorBoard SummaryWriter, or anything with add_scalar(tag, value, step).
        progress: a bar with the time left, after a line with the memory that a step needs.

    A second process that wants the same run waits for the first one. Where torch.distributed is initialized, all processes call this, each takes its share of
    every batch (`hinv.optim.GaussNewton`, `GradientDescent`), the first one alone reads and writes the folder, and all get the run; a run begun by one process
    may go on in several, with the same steps up to rounding.

    Warns:
        UserWarning: a damaged file, by name (what is whole is used, the rest is made again); a run that ends in NaN (its weights are the last good ones);
            another process at the same run.

    Raises:
        ValueError: an unknown option; a folder of another run, or whose config.json is damaged; a batch larger than the data. DataNotFound: see `hinv.companion.data.load`.
        ConnectionError: another of several processes has ended; what was written stays valid. MemoryError: a step would not fit. OSError: metrics or checkpoints cannot be written; what was written before stays valid, and the same
            call goes on from the last checkpoint.
    """
    found = images(config)
    files = Folder(home() / key(config, found) if folder is None else Path(folder))
    random_state = torch.get_rng_state()
    try:
        session = Session(config, found, files)  # refuses what it cannot do before anything is written
        with contextlib.ExitStack() as held:
            if ranks.from_first(lambda: _claimed(session, held)):
                session.train(writer, progress)
            return ranks.from_first(lambda: _read(session))
    finally:
        torch.set_rng_state(random_state)


def _claimed(session: Session, held: contextlib.ExitStack) -> bool:
    """Make the folder this run's; whether there is something left to train, with the folder's lock held then."""
    files = session.folder
    if files.done is None:  # else it is read, also from where nothing can be written
        files.path.mkdir(parents=True, exist_ok=True)
        held.enter_context(alone(files.path / "lock", "training this run"))
    files.claim(session.config, session.images)
    return files.done is None


def _read(session: Session) -> Run:
    """The run as its folder has it."""
    files, done = session.folder, session.folder.done
    state = files.newest(session.config.device)
    if done is None or state is None:
        raise ValueError(
            f"{files.path} is done, but none of its checkpoints is whole: remove it, and the run is made again"
        )
    session.model.load_state_dict(state["model"])
    return Run(
        session.config,
        files.path,
        done["status"],
        session.images.name,
        sum(p.numel() for p in session.model.parameters()),
        done["estimate"],
        files.lines("step"),
        files.lines("validation"),
        session.model,
    )
