"""Training runs that can be killed, resumed, and never run twice.

    run = training.run(Config(method="GaussNewton", dataset="cifar10", images=10_000, side=16, steps=150))
    run.records, run.validations, run.model

A run lives in results/runs/<key>, the key a hash of the configuration, the data found, the package's sources and torch's version. There it keeps

    config.json        the configuration
    metrics.jsonl      a line for each step and each validation
    step-N-HASH.pt     the last two checkpoints: weights, method, schedule, random state; the name carries the digest of the contents
    done.json          how it ended

What a batch holds depends on the seed and the number of the step alone, so that a run resumed after SIGKILL ends with the same bits (on the CPU)
as one that was left alone. A run with done.json is read, not repeated.
"""

import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hinv import data, optim
from hinv.checks import output, write_atomically
from hinv.errors import NotFiniteError
from hinv.network.build import tall_skinny


@dataclass(frozen=True)
class Config:
    """Everything a run depends on.

    Args:
        method: a class of `hinv.optim` ("GaussNewton", ...) or of `torch.optim` ("SGD", "Adam", ...).
        rate: learning rate; of SGD on the direction for the classes of `hinv.optim`. momentum: of SGD, theirs too.
        options: further arguments of that class, such as damping, every, clip, betas.
        schedule, schedule_options: a class of torch.optim.lr_scheduler and its arguments; stepped once a step.
        dataset, images, side, gray: as `hinv.data.load` takes them. augment: random resized crops and flips. fallback: as in `load`.
        test: how many test images to validate on, 0 for none. probe: how many training images, the first of `images`.
        widths, activation, gain: the network is tall_skinny((pixels, *widths, classes)) with the activation of torch.nn.
        batch: images a step. steps, epochs, seconds: the budget; what is used up first ends the run. seconds are those of training alone.
        target: end when the loss of a batch falls below it.
        validate_every, checkpoint_every: in steps; validation also before the first and after the last.
        seed: of the weights, the order of the images and their crops; which images are used does not depend on it.
        workers: processes that read images (results do not depend on it).
    """

    method: str = "GaussNewton"
    rate: float = 1.0
    momentum: float = 0.0
    options: dict = field(default_factory=dict)
    schedule: str | None = None
    schedule_options: dict = field(default_factory=dict)
    dataset: str = "digits"
    images: int | None = None
    test: int = 0
    probe: int = 256
    side: int | None = None
    gray: bool = False
    augment: bool = False
    fallback: str | None = None
    widths: tuple[int, ...] = (24,) * 7
    activation: str = "Tanh"
    gain: float = 1.0
    batch: int = 64
    steps: int | None = 100
    epochs: float | None = None
    seconds: float | None = None
    target: float | None = None
    validate_every: int = 25
    checkpoint_every: int = 100
    seed: int = 0
    dtype: str = "float64"
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self):
        if self.steps is None and self.epochs is None and self.seconds is None:
            raise ValueError("a run needs a budget: give steps, epochs or seconds")
        for name in ("batch", "probe", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', not {self.dtype!r}")
        if not hasattr(nn, self.activation):
            raise ValueError(f"torch.nn has no activation {self.activation!r}: use Tanh, ReLU, Sigmoid, GELU, ...")
        if self.schedule is not None and not hasattr(torch.optim.lr_scheduler, self.schedule):
            raise ValueError(f"torch.optim.lr_scheduler has no {self.schedule!r}")
        object.__setattr__(self, "widths", tuple(self.widths))
        _method(self.method)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """A Config from names and values, as json has them.

        Raises:
            ValueError: an unknown name, with the known ones.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown option {', '.join(map(repr, unknown))}: a run has {', '.join(known)}")
        return cls(**values)


@dataclass
class Run:
    """A finished (or stopped) run. `status` is "done", "target reached" or what stopped it; `records` and `validations` are dicts as in metrics.jsonl."""

    config: Config
    folder: Path
    status: str
    data: str
    parameters: int
    estimate: str
    records: list[dict]
    validations: list[dict]
    model: nn.Sequential

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


STOPPED = "stopped at step"


def sweep(configs: Mapping[Hashable, Config], metric: str = "loss") -> dict[Hashable, float]:
    """The last value of a metric (see `Run.curve`) in a run of each configuration; NaN where the run diverged, as some of a grid will."""
    out = {}
    for name, config in configs.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f".*{STOPPED}", UserWarning)
            result = run(config, progress=False)
        out[name] = math.nan if result.diverged else result.curve(metric)[1][-1]
    return out


def best(values: Mapping[Hashable, float]) -> Hashable:
    """The name of the smallest number that is not NaN (the first one if all are)."""
    return min(values, key=lambda name: (math.isnan(values[name]), values[name]))


def run(config: Config, folder: Path | None = None, writer=None, progress: bool = True) -> Run:
    """Train, or go on with a run that was interrupted, or read one that is done.

    Args:
        folder: results/runs/<key> by default; one that holds another run is refused.
        writer: a TensorBoard SummaryWriter, or anything with add_scalar(tag, value, step).
        progress: a bar with the time left, after a line with the memory that a step needs.

    Warns:
        UserWarning: a damaged checkpoint, by name (the one before it is used); a run that ends in NaN (its weights are the last good ones).

    Raises:
        ValueError: an unknown option; a folder of another run; a batch larger than the data. DataNotFound: see `hinv.data.load`.
        MemoryError: a step would not fit. OSError: metrics or checkpoints cannot be written; what was written before stays valid, and the same
            call goes on from the last checkpoint.
    """
    images = _images(config)
    record = {"config": dataclasses.asdict(config), "data": images.name, "key": _key(config, images)}
    folder = output("results") / "runs" / record["key"] if folder is None else Path(folder)
    random_state = torch.get_rng_state()
    try:
        session = _Session(config, images, folder)
        _claim(folder, record)
        if not (folder / "done.json").exists():
            session.train(writer, progress)
        return session.read()
    finally:
        torch.set_rng_state(random_state)


# -- what a run depends on ---------------------------------------------------------------------------------------------


@dataclass
class _Images:
    train: Dataset
    probe: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    classes: int
    name: str


@functools.lru_cache(maxsize=12)
def _loaded(**arguments) -> data.Images:
    return data.load(**arguments)


def _images(config: Config) -> _Images:
    """Training, probe and test images with zero mean and unit variance by the training images' channels (of a sample of them under augmentation)."""
    dtype, side = getattr(torch, config.dtype), config.side
    where = {"name": config.dataset, "fallback": config.fallback}  # the same images for every seed
    how = where | {"gray": config.gray, "side": side, "dtype": dtype}
    if config.augment:
        if side is None:
            raise ValueError("random crops need side=, the size they are resized to")
        source = data.source(**where, n=config.images)
        sample = _loaded(**how, n=min(len(source.y), max(config.probe, 1000)), normalize=True)
        train = data.Crops(source, side, config.gray, sample.mean, sample.std, dtype, config.seed)
    else:
        sample = _loaded(**how, n=config.images, normalize=True)
        train = data.Stack(sample.x, sample.y)
    if config.batch > len(train):
        raise ValueError(f"a batch of {config.batch} from {len(train)} images of {sample.name}: use a smaller batch")
    test = None
    if config.test:
        others = _loaded(**how, split="test", n=config.test)
        test = (others.x - sample.mean[:, None, None]) / sample.std[:, None, None], others.y
    return _Images(train, (sample.x[: config.probe], sample.y[: config.probe]), test, len(sample.classes), sample.name)


def _key(config: Config, images: _Images) -> str:
    """Hash of configuration, data, the package's sources and torch's version."""
    digest = hashlib.sha256()
    values = dataclasses.asdict(config) | {"workers": None, "checkpoint_every": None}  # results do not depend on these
    digest.update(json.dumps([values, images.name, len(images.train), torch.__version__], sort_keys=True).encode())
    for tensor in (*images.probe, *(images.test or ())):
        digest.update(tensor.contiguous().numpy().tobytes())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in UNRELATED:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


UNRELATED = ("figures.py", "reproduce.py", "bench.py", "peers.py", "monitor.py", "spectrum.py", "paper.py", "checks.py")


def _claim(folder: Path, record: dict) -> None:
    """Make the folder this run's, or refuse it."""
    path = folder / "config.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        return
    there = json.loads(path.read_text())
    if there["key"] != record["key"]:
        old, new = there["config"], json.loads(json.dumps(record["config"]))
        differ = [f"{name} {old.get(name)!r} instead of {new[name]!r}" for name in new if old.get(name) != new[name]]
        raise ValueError(
            f"{folder} holds another run ({'; '.join(differ) or 'other images, or another version of hinv or torch'}): use another folder"
        )


def _method(name: str) -> type:
    ours = getattr(optim, name, None)
    if isinstance(ours, type) and issubclass(ours, optim.Preconditioned) and ours is not optim.Preconditioned:
        return ours
    theirs = getattr(torch.optim, name, None)
    if isinstance(theirs, type) and issubclass(theirs, torch.optim.Optimizer):
        return theirs
    raise ValueError(
        f"unknown method {name!r}: use DampedNewton, GaussNewton, TrustRegionNewton or SaddleFreeNewton, or a class of torch.optim (SGD, Adam, ...)"
    )


def _descent(config: Config, model: nn.Sequential) -> optim.Descent:
    cls, loss, options = _method(config.method), nn.CrossEntropyLoss(), dict(config.options)
    known = set(inspect.signature(cls).parameters) - {
        "self",
        "model",
        "loss",
        "optimizer",
        "params",
        "lr",
        "momentum",
    } | {"clip"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"{config.method} has no option {', '.join(map(repr, unknown))}: it has {', '.join(sorted(known))}"
        )
    if issubclass(cls, optim.Preconditioned):
        inner = torch.optim.SGD(model.parameters(), lr=config.rate, momentum=config.momentum)
        return cls(model, loss, inner, **options)
    clip = options.pop("clip", None)
    if config.momentum:
        if "momentum" not in inspect.signature(cls).parameters:
            raise ValueError(f"{config.method} has no momentum: leave it at 0")
        options["momentum"] = config.momentum
    return optim.GradientDescent(model, loss, cls(model.parameters(), lr=config.rate, **options), clip)


class _Batches:
    """Keys (epoch, number) of the batch of every step from `start` on, without end: a permutation for each epoch, seeded by it."""

    def __init__(self, n: int, batch: int, seed: int, start: int):
        self.n, self.batch, self.seed, self.start = n, batch, seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        each, step, epoch = self.n // self.batch, self.start, None
        while True:
            if epoch != step // each:
                epoch = step // each
                generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
                order = torch.randperm(self.n, generator=generator).tolist()
            first = step % each * self.batch
            yield [(epoch, i) for i in order[first : first + self.batch]]
            step += 1


def _as_it_is(batch):
    return batch


# -- the run -----------------------------------------------------------------------------------------------------------


class _Session:
    def __init__(self, config: Config, images: _Images, folder: Path):
        self.config, self.images, self.folder = config, images, folder
        torch.manual_seed(config.seed)
        pixels = images.probe[0][0].numel()
        self.model = tall_skinny(
            (pixels, *config.widths, images.classes),
            getattr(nn, config.activation),
            gain=config.gain,
            seed=config.seed,
            dtype=getattr(torch, config.dtype),
        ).to(config.device)
        self.descent = _descent(config, self.model)
        self.schedule = None
        if config.schedule is not None:
            self.schedule = getattr(torch.optim.lr_scheduler, config.schedule)(
                self.descent.optimizer, **config.schedule_options
            )
        budget = [
            config.steps,
            None if config.epochs is None else int(config.epochs * (len(images.train) // config.batch)),
        ]
        self.last = min((b for b in budget if b is not None), default=None)
        self.step, self.seconds, self.status = 0, 0.0, None
        self.good: list[Tensor] | None = None  # the weights before the last step, whose loss was finite

    # what happens, in order

    def train(self, writer, progress: bool) -> None:
        config = self.config
        offset = self._resume()
        needs = self._estimate()
        if progress:
            print(f"{config.method} on {self.images.name}: {needs}")
        sampler = _Batches(len(self.images.train), config.batch, config.seed, self.step)
        batches = iter(
            DataLoader(
                self.images.train,
                batch_sampler=sampler,
                collate_fn=_as_it_is,
                num_workers=config.workers,
                generator=torch.Generator(),  # the global random numbers are not the loader's
            )
        )
        with (
            open(self.folder / "metrics.jsonl", "ab") as file,
            tqdm(
                total=self.last, initial=self.step, desc=config.method, unit="step", disable=not progress, leave=False
            ) as bar,
        ):
            file.truncate(offset)
            while self.status is None and not self._used_up():
                if self.step % config.validate_every == 0:
                    self._validate(file, writer)
                before = [p.detach().clone() for p in self.model.parameters()]
                start = time.perf_counter()
                x, y = (t.to(config.device) for t in next(batches))
                try:
                    report = self.descent.step(x.flatten(1), y)
                except NotFiniteError as error:
                    if self.good is None:
                        raise
                    self.status = f"{STOPPED} {self.step}: {error}; the weights are those before step {self.step - 1}"
                    with torch.no_grad():
                        for p, kept in zip(self.model.parameters(), self.good, strict=True):
                            p.copy_(kept)
                    warnings.warn(f"{config.method}, rate {config.rate:g}: {self.status}", UserWarning, stacklevel=3)
                    break
                self.good = before
                rate = self.descent.optimizer.param_groups[0]["lr"]
                if self.schedule is not None:
                    self.schedule.step()
                self.seconds += time.perf_counter() - start
                record = {k: v for k, v in dataclasses.asdict(report).items() if v not in (None, "")}
                self._write(
                    file, {"kind": "step", "step": self.step} | record | {"rate": rate, "elapsed": self.seconds}, writer
                )
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{report.loss:.3g}", refresh=False)
                if config.target is not None and min(report.loss, report.loss_after or report.loss) < config.target:
                    self.status = "target reached"
                if self.step % config.checkpoint_every == 0:
                    self._save(file)
            self._save(file)
            self._validate(file, writer)
        done = {"status": self.status or "done", "steps": self.step, "seconds": self.seconds, "estimate": needs}
        write_atomically(self.folder / "done.json", json.dumps(done, indent=1) + "\n")

    def _used_up(self) -> bool:
        config = self.config
        return (self.last is not None and self.step >= self.last) or (
            config.seconds is not None and self.seconds >= config.seconds
        )

    def _estimate(self) -> str:
        """What a step needs, said (and refused, if there is too little) before the first one."""
        if not isinstance(self.descent, optim.Preconditioned):
            return "first-order memory"
        x, y = self.images.probe[0][:1], self.images.probe[1][:1]
        few = min(self.config.batch, self.descent.sample or self.config.batch)
        x, y = x.expand(few, *x.shape[1:]).flatten(1).to(self.config.device), y.expand(few).to(self.config.device)
        C = self.descent.kind(self.model, self.descent.loss, x, y)
        return self.descent.estimate(C)

    def _validate(self, file, writer) -> None:
        record = {"kind": "validation", "step": self.step, "elapsed": self.seconds}
        for name, images in (("probe", self.images.probe), ("test", self.images.test)):
            if images is not None:
                record |= {f"{name}_{k}": v for k, v in self._score(*images).items()}
        self._write(file, record, writer)

    def _score(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Mean loss, top-1 and top-5 accuracy."""
        loss, hits = 0.0, torch.zeros(2, dtype=torch.int64)
        with torch.no_grad():
            for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                outputs, labels = self.model(part.flatten(1).to(self.config.device)), labels.to(self.config.device)
                loss += functional.cross_entropy(outputs, labels, reduction="sum").item()
                best = outputs.topk(min(5, outputs.shape[1]), 1).indices == labels[:, None]
                hits += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
        return {"loss": loss / len(x), "top1": hits[0].item() / len(x), "top5": hits[1].item() / len(x)}

    def _write(self, file, record: dict, writer) -> None:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        if writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("step", "elapsed"):
                    writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    # checkpoints

    def _save(self, file) -> None:
        """Weights, method, schedule and random state after `step` steps; the two newest checkpoints are kept."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "status": self.status,
            "good": self.good,
            "offset": file.tell(),
            "model": self.model.state_dict(),
            "descent": self.descent.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "random": torch.get_rng_state(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        name = f"step-{self.step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix="unfinished-")
        try:
            with os.fdopen(handle, "wb") as checkpoint:
                checkpoint.write(content)
                checkpoint.flush()
                os.fsync(checkpoint.fileno())
            os.replace(temporary, self.folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        for old in self._checkpoints()[2:]:
            old.unlink()

    def _checkpoints(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def _newest(self) -> dict | None:
        """The newest checkpoint that is whole."""
        for path in self._checkpoints():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest()[:16] == path.stem.rpartition("-")[2]:
                return torch.load(io.BytesIO(content), weights_only=True, map_location=self.config.device)
            warnings.warn(
                f"checkpoint {path} is damaged (its digest differs): using the one before it", UserWarning, stacklevel=5
            )
        return None

    def _resume(self) -> int:
        """Take up the newest checkpoint; returns the length of metrics.jsonl then."""
        state = self._newest()
        if state is None:
            return 0
        self.step, self.seconds = state["step"], state["seconds"]
        self.status, self.good = state["status"], state["good"]
        self.model.load_state_dict(state["model"])
        self.descent.load_state_dict(state["descent"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"].cpu())
        return state["offset"]

    def read(self) -> Run:
        done = json.loads((self.folder / "done.json").read_text())
        state = self._newest()
        if state is None:
            raise ValueError(
                f"{self.folder} is done, but none of its checkpoints is whole: remove it, and the run is made again"
            )
        self.model.load_state_dict(state["model"])
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        kinds = {
            kind: [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == kind]
            for kind in ("step", "validation")
        }
        return Run(
            self.config,
            self.folder,
            done["status"],
            self.images.name,
            sum(p.numel() for p in self.model.parameters()),
            done["estimate"],
            kinds["step"],
            kinds["validation"],
            self.model,
        )


CHUNK = 1024  # images of one forward pass in validation
