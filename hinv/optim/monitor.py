"""Curvature during anybody's training: call a monitor once per optimizer step, and every so many steps it measures on a fixed batch."""

import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hinv.curvature import Hessian
from hinv.errors import warn
from hinv.network import losses

Measures = dict[str, Callable[[], dict[str, Any]]]  # name -> what measures it, as entries of the record


def _exact(model: nn.Module, loss: losses.Loss, x: Tensor, y: Tensor, damping: float) -> Measures:
    H = Hessian(model, loss, x, y).double()  # ty: ignore[invalid-argument-type]  # anything else is refused there

    def end(name: str, which: str) -> dict[str, Any]:
        found = H.eigsh(1, which)
        return {name: found.values[0].item(), f"{name}_certified": found.certified}

    def negative() -> dict[str, Any]:  # away from the zeros of weights that the batch does not excite
        below = -NEGATIVE * H.eigsh(1, "LM").values.abs().max().item()
        return {"negative": H.count_below(below), "negative_below": below}

    def logdet() -> dict[str, Any]:
        sign, value = H.logdet(damping)
        return {"logdet": value, "logdet_sign": sign}

    return {
        "lambda_max": lambda: end("lambda_max", "LA"),
        "lambda_min": lambda: end("lambda_min", "SA"),
        "trace": lambda: {"trace": H.trace()},
        "negative": negative,
        "logdet": logdet,
    }


def _pyhessian(model: nn.Module, loss: losses.Loss, x: Tensor, y: Tensor, damping: float) -> Measures:
    from pyhessian import hessian

    h = hessian(model, loss, data=(x, y), cuda=x.is_cuda)

    def lambda_max() -> dict[str, Any]:
        value = float(h.eigenvalues()[0][0])
        if value < 0:  # power iteration goes for the magnitude
            raise ArithmeticError(
                f"PyHessian finds the eigenvalue of largest magnitude, here a negative one, {value:.3g}"
            )
        return {"lambda_max": value}

    def trace() -> dict[str, Any]:
        samples = torch.tensor(h.trace(tol=0.0), dtype=torch.float64)  # its default tolerance stops after as few as two
        return {"trace": samples.mean().item(), "trace_error": (samples.std() / len(samples) ** 0.5).item()}

    return {"lambda_max": lambda_max, "trace": trace}


def _hessian_eigenthings(model: nn.Module, loss: losses.Loss, x: Tensor, y: Tensor, damping: float) -> Measures:
    import hessian_eigenthings as he

    operator = he.HessianOperator(model, [(x, y)], he.supervised_loss(loss))
    steps = min(50, operator.size)  # its default converges nothing; 50 is the most it reorthogonalizes

    def end(name: str, which: Literal["LA", "SA"]) -> dict[str, Any]:
        return {name: float(he.lanczos(operator, k=1, which=which, max_iter=steps, seed=0).eigenvalues[0])}

    def trace() -> dict[str, Any]:
        estimate = he.trace(operator, num_matvecs=99, seed=0)
        return {"trace": float(estimate.estimate), "trace_error": float(estimate.stderr)}

    return {
        "lambda_max": lambda: end("lambda_max", "LA"),
        "lambda_min": lambda: end("lambda_min", "SA"),
        "trace": trace,
    }


NEGATIVE = 1e-6  # of the largest eigenvalue: what counts as negative lies below minus this share of it
BACKENDS = {
    "hinv": (_exact, ("lambda_max", "lambda_min", "trace", "negative", "logdet")),
    "pyhessian": (_pyhessian, ("lambda_max", "trace")),
    "hessian_eigenthings": (_hessian_eigenthings, ("lambda_max", "lambda_min", "trace")),
}


class CurvatureMonitor:
    """Measures the Hessian of a fixed probe batch every `every` steps and leaves training as it was, to the bit.

    It works on a copy of the model in eval mode: parameters, gradients, buffers, the train/eval mode and the state of the random
    numbers are not touched. What cannot be measured (NaN in the weights, for example) stands in the record's "errors" and is warned of; the rest is
    kept, and training goes on.

    Args:
        model, loss, inputs, targets: as `hinv.Hessian` takes them; inputs and targets are the probe batch. The other backends take any model.
        every: steps between measurements; the first call measures.
        what: any of "lambda_max", "lambda_min", "trace", "negative" (number of eigenvalues below -1e-6 of the largest in magnitude) and "logdet"
            (of H + damping I). "hinv" is exact; "pyhessian" estimates lambda_max and the trace, "hessian_eigenthings" also lambda_min.
        backend: "hinv", "pyhessian" or "hessian_eigenthings".
        path: a file of JSON lines, one for each measurement, appended and flushed.
        writer: a TensorBoard SummaryWriter, or anything with add_scalar(tag, value, step).
        damping: of the log-determinant (loss / parameter^2).

    Raises:
        ValueError: every < 1, an unknown backend, or something it does not measure.

    Example:
        >>> monitor = hinv.CurvatureMonitor(model, loss, x, y, every=500)
        >>> for x, y in loader: ...; optimizer.step(); monitor()
        >>> monitor.records, monitor.fraction
    """

    def __init__(
        self,
        model: nn.Module,
        loss: losses.Loss,
        inputs: Tensor,
        targets: Tensor,
        every: int = 500,
        what: tuple[str, ...] = ("lambda_max", "trace"),
        backend: str = "hinv",
        path: str | Path | None = None,
        writer: Any = None,
        damping: float = 1e-2,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every}")
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: use {', '.join(map(repr, BACKENDS))}")
        self._measures, able = BACKENDS[backend]
        if isinstance(what, str) or not what or set(what) - set(able):
            raise ValueError(
                f"backend {backend!r} measures {', '.join(map(repr, able))}; what={what!r} must be a tuple of these"
            )
        self.model, self.loss, self.probe = model, loss, (inputs.detach().clone(), targets.detach().clone())
        self.every, self.what, self.backend, self.damping = every, tuple(what), backend, damping
        self.path, self.writer = None if path is None else Path(path), writer
        self.step, self.seconds, self._started = 0, 0.0, time.perf_counter()
        self.records: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return f"CurvatureMonitor({', '.join(self.what)} by {self.backend}, every {self.every} steps; {len(self.records)} records)"

    @property
    def fraction(self) -> float:
        """Share of the time since the monitor was made that went into measuring."""
        return self.seconds / max(time.perf_counter() - self._started, 1e-12)

    def __call__(self) -> dict[str, Any] | None:
        """Count one step; every `every` steps measure, and return the record."""
        step, self.step = self.step, self.step + 1
        if step % self.every:
            return None
        start = time.perf_counter()
        record: dict[str, Any] = {"step": step, "backend": self.backend}
        cuda = torch.cuda.is_initialized()
        devices = list(range(torch.cuda.device_count())) if cuda else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)  # of the copy's estimators; fork_rng restores training's numbers
            if cuda:
                torch.cuda.manual_seed_all(0)
            errors = {}
            try:
                probe = copy.deepcopy(self.model).eval()
                probe.zero_grad(set_to_none=True)
                measures = self._measures(probe, self.loss, *self.probe, self.damping)
            except Exception as error:
                measures, errors["model"] = {}, f"{type(error).__name__}: {error}"
            for name in self.what if measures else ():
                try:
                    record |= measures[name]()
                except Exception as error:
                    errors[name] = f"{type(error).__name__}: {error}"
        if errors:
            record["errors"] = errors
            said = "; ".join(f"{name}: {error}" for name, error in errors.items())
            warn(f"curvature at step {step} is incomplete: {said}")
        record["seconds"] = time.perf_counter() - start
        self.seconds += record["seconds"]
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for name in self.what:
                if name in record:
                    self.writer.add_scalar(f"curvature/{name}", record[name], step)
        return record
