"""The loop of a run: take up the last checkpoint, step, validate, save."""

import dataclasses
import io
import time
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hinv import optim, ranks
from hinv.errors import NotFiniteError, warn
from hinv.network import tall_skinny

from .config import Config, descent
from .folder import Folder
from .images import Batch, RunImages, loader
from .validation import score

STOPPED = "stopped at step"


class Session:
    """A run in memory: the model, the method, the schedule and how far they got."""

    def __init__(self, config: Config, images: RunImages, folder: Folder):
        self.config, self.images, self.folder = config, images, folder
        if config.batch < ranks.size():
            raise ValueError(
                f"a batch of {config.batch} images for {ranks.size()} processes: use fewer, or a larger batch"
            )
        torch.manual_seed(config.seed)
        pixels = images.probe[0][0].numel()
        self.model = tall_skinny(
            (pixels, *config.widths, images.classes),
            getattr(nn, config.activation),
            bias=config.bias,
            gain=config.gain,
            seed=config.seed,
            dtype=getattr(torch, config.dtype),
        )
        if config.init == "kaiming":
            generator = torch.Generator().manual_seed(config.seed)
            for layer in self.model[::2]:
                nn.init.kaiming_normal_(cast(nn.Linear, layer).weight, nonlinearity="relu", generator=generator)
        self.model.to(config.device)
        self.descent = descent(config, self.model)
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
        self.parameters = list(self.model.parameters())
        self.step, self.seconds = 0, 0.0
        self.status: str | None = None
        self.good: list[Tensor] | None = None  # the weights before the last step, whose loss was finite

    # what happens, in order

    def train(self, writer: Any, progress: bool) -> None:
        config = self.config
        offset = self._resume()
        needs = ranks.agreed(self._estimate)
        progress, writer = progress and ranks.first(), writer if ranks.first() else None
        if progress:
            print(f"{config.method} on {self.images.name}: {needs}")
        batches = loader(self.images, config, self.step)
        with (
            ranks.agreed(lambda: open(self.folder.metrics, "ab") if ranks.first() else io.BytesIO()) as file,
            tqdm(
                total=self.last, initial=self.step, desc=config.method, unit="step", disable=not progress, leave=False
            ) as bar,
        ):
            file.truncate(offset)
            while self.status is None and not self._used_up():
                if self.step % config.validate_every == 0:
                    self._validate(file, writer)
                report = self._advance(next(batches))
                if report is None:
                    break
                self._alone(lambda line=report: self._write(file, line, writer))
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{report['loss']:.3g}", refresh=False)
                if (
                    config.target is not None
                    and min(report["loss"], report.get("loss_after", report["loss"])) < config.target
                ):
                    self.status = "target reached"
                if self.step % config.checkpoint_every == 0:
                    self._save(file)
            self._save(file)
            self._validate(file, writer)
        end = {"status": self.status or "done", "steps": self.step, "seconds": self.seconds, "estimate": needs}
        self._alone(lambda: self.folder.finish(end))

    @staticmethod
    def _alone(do: Callable[[], None]) -> None:
        """What the first process does alone; where that fails, the others end, too."""
        ranks.agreed(lambda: do() if ranks.first() else None)

    def _advance(self, batch: Batch) -> dict[str, Any] | None:
        """One step and its record; None, with the weights of the last good step, where the loss is not finite."""
        before = [p.detach().clone() for p in self.parameters]
        start = time.perf_counter()
        x, y = (t.to(self.config.device) for t in batch)
        try:
            report = self.descent.step(x.flatten(1), y)
        except ConnectionError as error:
            raise ConnectionError(
                f"step {self.step}: {error}; {self.folder.path} is whole, and the same call goes on from its last checkpoint"
            ) from error
        except NotFiniteError as error:
            if self.good is None:
                raise
            self.status = f"{STOPPED} {self.step}: {error}; the weights are those before step {self.step - 1}"
            with torch.no_grad():
                for p, kept in zip(self.parameters, self.good, strict=True):
                    p.copy_(kept)
            warn(f"{self.config.method}, rate {self.config.rate:g}: {self.status}")
            return None
        self.good = before
        rate = self.descent.optimizer.param_groups[0]["lr"]
        if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(report.loss)  # the loss of the batch
        elif self.schedule is not None:
            self.schedule.step()
        self.seconds += time.perf_counter() - start
        record = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
        record = {name: value for name, value in record.items() if value not in (None, "")}
        return {"kind": "step", "step": self.step} | record | {"rate": rate, "elapsed": self.seconds}

    def _used_up(self) -> bool:
        config = self.config
        return (self.last is not None and self.step >= self.last) or (
            # the clock of the first counts for all
            config.seconds is not None and ranks.from_first(lambda: self.seconds) >= config.seconds
        )

    def _estimate(self) -> str:
        """What a step needs, said (and refused, if there is too little) before the first one."""
        if not isinstance(self.descent, optim.Preconditioned):
            return "first-order memory"
        x, y = self.images.probe[0][:1], self.images.probe[1][:1]
        few = min(self.config.batch, self.descent.sample or self.config.batch)
        x, y = x.expand(few, *x.shape[1:]).flatten(1).to(self.config.device), y.expand(few).to(self.config.device)
        C = type(self.descent).kind(
            self.model, self.descent.loss, x, y
        )  # of all of the batch, as it is gathered from several processes
        return self.descent.estimate(C)

    def _validate(self, file: BinaryIO, writer: Any) -> None:
        self._alone(lambda: self._judge(file, writer))

    def _judge(self, file: BinaryIO, writer: Any) -> None:
        record: dict[str, Any] = {"kind": "validation", "step": self.step, "elapsed": self.seconds}
        for name, images in (("probe", self.images.probe), ("test", self.images.test)):
            if images is not None:
                record |= {f"{name}_{k}": v for k, v in score(self.model, *images, self.config.device).items()}
        self._write(file, record, writer)

    def _write(self, file: BinaryIO, record: dict[str, Any], writer: Any) -> None:
        self.folder.append(file, record)
        if writer is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("step", "elapsed"):
                    writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    # checkpoints

    def _save(self, file: BinaryIO) -> None:
        """Weights, method, schedule and random state after `step` steps."""
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
        self._alone(lambda: self.folder.save(self.step, state))

    def _resume(self) -> int:
        """Take up the newest checkpoint; returns the length of metrics.jsonl then."""
        state = ranks.from_first(lambda: self.folder.newest(self.config.device))
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
