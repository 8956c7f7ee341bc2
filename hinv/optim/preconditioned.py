"""The loop of the curvature methods: when a matrix is made and factored, when a step is taken back, how the damping moves."""

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from hinv import ranks
from hinv.curvature import Curvature
from hinv.errors import SingularShiftError
from hinv.modes import exact
from hinv.network import losses
from hinv.shapes import Float
from hinv.solver.memory import require
from hinv.vectors import flat

from .descent import Descent, Direction, StepReport

SUFFICIENT = 1e-4  # share of the predicted decrease below which a step is taken back


class Preconditioned(Descent):
    """The loop of the curvature methods. A subclass says which matrix (`kind`) and finds a direction with it (`_direct`).

    Args:
        damping: eps (loss / parameter^2).
        adapt: factor by which the damping falls where rho > 3/4 and rises where rho < 1/4 (Levenberg, Marquardt); 1 keeps it.
        every: steps between factorizations; in between the last one serves the new gradients.
        accept: whether a step that makes the loss of its batch larger is taken back. Without it rho is measured where the matrix is new, and only there.
        sample: how many images of each batch, the first ones, the matrix is made from; None: all. The loss must be a mean over samples.

    A step whose matrix cannot be factored, or whose direction is not finite, becomes the gradient step of the length that the model suggests,
    |g|^2 / |g.(C + eps I)g|; the report's `note` says why.
    """

    kind: type[Curvature]

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None,
        clip: float | None,
        damping: float,
        adapt: float,
        every: int,
        accept: bool,
        sample: int | None,
    ):
        super().__init__(model, loss, optimizer, clip)
        if not 0 < damping < math.inf:
            raise ValueError(f"damping must be a positive number, not {damping}")
        if not adapt >= 1:
            raise ValueError(f"adapt must be at least 1 (1 keeps the damping), not {adapt}")
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every}")
        if sample is not None and sample < 1:
            raise ValueError(f"sample must be at least 1 image, or None for the whole batch, not {sample}")
        if sample is not None and getattr(loss, "reduction", None) != "mean":
            raise ValueError(
                f"sample= needs a loss with reduction 'mean', so that a few images stand for all; {loss} has not: leave sample at None"
            )
        self.sample = sample
        self.damping, self.adapt, self.every, self.accept = float(damping), float(adapt), int(every), bool(accept)
        self.floor = torch.finfo(self.parameters[0].dtype).eps ** 0.75
        self._curvature: Curvature | None = None  # the one that was factored, and at which damping
        self._used, self._age, self._checked = 0.0, 0, False
        # the batch it was made from, of all processes, for a checkpoint
        self._held: tuple[Tensor, Tensor] | None = None

    def _settings(self) -> str:
        damping = "" if self.damping is None else f", damping {self.damping:g}"
        return f"{damping}, every {self.every}" + (f", sample {self.sample}" if self.sample else "")

    # what a subclass says

    def estimate(self, C: Curvature) -> str:
        """What a factorization of a matrix like C costs, in a sentence.

        Raises:
            MemoryError: it does not fit.
        """
        prediction = C.estimate()
        prediction = replace(prediction, method="dual" if ranks.several() else prediction.factored)
        require(prediction, prediction.method, C.device)
        return str(prediction)

    def _direct(self, C: Curvature, /, g: Float[Tensor, " P"]) -> Direction:
        """A direction from a fresh matrix; keeps what `_again` needs."""
        self._keep(C)
        return replace(self._again(g), factorizations=1)

    def _keep(self, C: Curvature, /) -> None:
        """Factor C at the damping `_used`."""
        self._factor = C.factor(self._used)

    def _again(self, g: Float[Tensor, " P"]) -> Direction:
        """A direction for a gradient from what was kept."""
        return Direction(self._factor.solve(g), self._factor.inertia)

    def _adjust(self, ratio: float, length: float) -> None:
        """The damping after a step with this rho."""
        self.damping = max(self.damping / self.adapt, self.floor) if ratio > 0.75 else self.damping
        self.damping = self.damping * self.adapt if not ratio >= 0.25 else self.damping

    def _length(self, d: Float[Tensor, " P"], loss: float, inputs: Tensor, targets: Tensor) -> float:
        """What a direction is multiplied with before the torch optimizer takes it."""
        return 1.0

    # the step

    @exact()
    def step(self, inputs: Tensor, targets: Tensor) -> StepReport:
        """One step on a batch.

        Raises:
            ValueError, TypeError: what the model, the loss or the batch cannot be, by name (see `hinv.Hessian`); NaN in loss or weights. The weights
                are as before the call. MemoryError: the factorization does not fit.
        """
        start, before = time.perf_counter(), self._position()
        fresh = self._curvature is None or self._age % self.every == 0
        if fresh:
            # the checks that cost products are made once: the model's structure stays, only its weights move
            few = slice(self.sample)
            C = self.kind(self.model, self.loss, inputs[few], targets[few], check=not self._checked)
            self._checked, self._age, self._used, self._curvature = True, 0, self.damping, C
            if self.every > 1:
                self._held = ranks.gathered(C.chain.inputs, 0), ranks.gathered(C.chain.targets, 0)
        C = self._curvature
        whole = fresh and len(C.chain.inputs) == len(inputs)
        loss, g = (C.loss, C.gradient) if whole else self._gradient(inputs, targets)
        try:
            found = self._direct(C, g) if fresh else self._again(g)
            if not found.d.isfinite().all():
                raise SingularShiftError("the direction is not finite")
        except SingularShiftError as error:
            self._age = -1  # nothing to use again
            curvature = (g @ (C @ g) + (self._used or 0.0) * (g @ g)).abs().item()
            found = Direction(
                g * ((g @ g).item() / curvature if curvature > 0 else 1.0), note=f"gradient step: {error}"
            )
        length = self._length(found.d, loss, inputs, targets)
        self._move(found.d if length == 1.0 else length * found.d)
        s = self._position() - before
        report = StepReport(
            loss,
            damping=self._used,
            step_norm=s.norm().item(),
            inertia=found.inertia,
            factorizations=found.factorizations,
            note=found.note,
            error=found.error,
        )
        if self.accept or fresh:
            report = self._judge(report, C, g, s, before, inputs, targets)
        self._age += 1
        return replace(report, seconds=time.perf_counter() - start)

    def _judge(
        self,
        report: StepReport,
        C: Curvature,
        g: Float[Tensor, " P"],
        s: Float[Tensor, " P"],
        before: Float[Tensor, " P"],
        inputs: Tensor,
        targets: Tensor,
    ) -> StepReport:
        """Measure rho, adjust the damping, and take the step back if it is to be."""
        decrease = -(g @ s + 0.5 * (s @ (C @ s))).item()
        loss_after = self._value(inputs, targets)
        gain = report.loss - loss_after
        ratio = gain / decrease if decrease else math.nan
        good = math.isfinite(loss_after) and gain >= SUFFICIENT * max(decrease, 0.0)
        self._adjust(ratio if good else -math.inf, s.norm().item())
        report = replace(report, loss_after=loss_after, decrease=decrease, ratio=ratio)
        if good or not self.accept:
            return report
        vector_to_parameters(before, self.parameters)
        self._refused()
        note = "; ".join(filter(None, [report.note, "taken back: the loss rose"]))
        return replace(report, step_norm=0.0, accepted=False, note=note)

    def _refused(self) -> None:
        self.optimizer.state.clear()  # a velocity that led uphill would do so again, however small the step it is added to
        self._age = -1

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"damping": self.damping, "used": self._used, "age": self._age, "held": None}
        if self._curvature is not None and self._held is not None and self._age % self.every:
            inputs, targets = self._held  # the factorization itself is made again: the batch and weights determine it
            state["held"] = {
                "inputs": inputs,
                "targets": targets,
                "parameters": flat(self._curvature.chain.parameters),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.damping, self._used, self._age = state["damping"], state["used"], state["age"]
        self._curvature = None
        if state["held"] is not None:
            held, now = state["held"], self._position()
            vector_to_parameters(held["parameters"], self.parameters)
            self._held = held["inputs"], held["targets"]
            share = slice(ranks.number(), None, ranks.size())
            self._curvature = self.kind(self.model, self.loss, *(t[share] for t in self._held), check=False)
            self._keep(self._curvature)
            vector_to_parameters(now, self.parameters)
