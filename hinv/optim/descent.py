"""What all methods share: one step of a torch optimizer along a direction, and the report of it; the first-order baseline."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hinv import ranks
from hinv.errors import NotFiniteError
from hinv.network import losses
from hinv.shapes import Float
from hinv.vectors import flat

from .shared import summed, weight


@dataclass(frozen=True)
class StepReport:
    """What one step did; None where the method does not know, or did not measure it (see `Preconditioned`).

    `loss` of the batch before, `loss_after` on the same batch; `decrease` predicted by the model, `ratio` rho; `damping` of the factorization used;
    `step_norm` of the step taken (0 if taken back); `inertia` of C + damping I; `factorizations` and `seconds` it took; `note`: why it is not the
    plain step of its method; `error`: a bound of the direction's relative error, of a method that has an approximate one (SaddleFreeNewton by poles).
    """

    loss: float
    loss_after: float | None = None
    decrease: float | None = None
    ratio: float | None = None
    damping: float | None = None
    step_norm: float | None = None
    inertia: tuple[int, int, int] | None = None
    accepted: bool = True
    factorizations: int = 0
    seconds: float = 0.0
    note: str = ""
    error: float | None = None


@dataclass
class Direction:
    """d, and what it came from."""

    d: Float[Tensor, " P"]
    inertia: tuple[int, int, int] | None = None
    factorizations: int = 0
    note: str = ""
    error: float | None = None


class Descent:
    """What all methods share: the torch optimizer behind them, clipping, acceptance, state.

    Args:
        model, loss: as `hinv.Hessian` takes them.
        optimizer: a torch.optim.Optimizer over the model's parameters, which takes the direction for a gradient; SGD(lr=1) by default.
        clip: largest norm of the direction (as torch.nn.utils.clip_grad_norm_).
    """

    # whether a step is that of the samples of all processes together, where torch.distributed is initialized
    _shares = False

    def __init__(
        self, model: nn.Sequential, loss: losses.Loss, optimizer: torch.optim.Optimizer | None, clip: float | None
    ):
        if ranks.several() and not self._shares:
            raise ValueError(
                f"{type(self).__name__} takes a batch for the whole of it, and here each of {ranks.size()} processes has its own samples: use GaussNewton or "
                "GradientDescent, which sum over them, or one process"
            )
        self.model, self.loss = model, loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameter: set requires_grad=True on some")
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0) if optimizer is None else optimizer
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if {id(p) for p in held} != {id(p) for p in self.parameters}:
            raise ValueError("the optimizer must hold exactly the model's trainable parameters: build it from them")
        if isinstance(self.optimizer, torch.optim.LBFGS) and type(self) is not GradientDescent:
            raise TypeError(
                "LBFGS finds its own direction by evaluating the loss, and takes none: give an optimizer that steps along a gradient (SGD, Adam), or "
                "use GradientDescent with LBFGS"
            )
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be a positive number or None, not {clip}")
        self.clip = clip

    def __repr__(self) -> str:
        P, rate = sum(p.numel() for p in self.parameters), self.optimizer.param_groups[0]["lr"]
        return f"{type(self).__name__}({P} parameters, {type(self.optimizer).__name__} with rate {rate:g}{self._settings()})"

    def _settings(self) -> str:
        """What else the method depends on, for its repr."""
        return ""

    def step(self, inputs: Tensor, targets: Tensor) -> StepReport:
        """One step on a batch; what it found."""
        raise NotImplementedError

    def _gradient(self, inputs: Tensor, targets: Tensor) -> tuple[float, Float[Tensor, " P"]]:
        """Of the loss of the batch: of what all processes give together, where there are several."""

        def own() -> tuple[float, Float[Tensor, " P"]]:
            with torch.enable_grad():
                value = losses.value(self.loss, self.model(inputs), targets)
                gradient = torch.autograd.grad(value, self.parameters, materialize_grads=True)
            g = flat(gradient)
            if not g.isfinite().all():
                raise NotFiniteError(
                    "the gradient contains NaN or infinite values: check the scale of inputs and weights"
                )
            return value.item(), g

        if not ranks.several():
            return own()
        value, g = summed(weight(self.loss, targets), own, self._position())
        if not g.isfinite().all():
            raise NotFiniteError(
                "the gradient contains NaN or infinite values in another process: its own error says why"
            )
        return value, g

    def _value(self, inputs: Tensor, targets: Tensor) -> float:
        def own() -> tuple[float, Float[Tensor, " 0"]]:
            with torch.no_grad():
                return float(self.loss(self.model(inputs), targets)), none

        none = self.parameters[0].new_zeros(0)
        return (summed(weight(self.loss, targets), own, none) if ranks.several() else own())[0]

    def _give(self, d: Float[Tensor, " P"]) -> None:
        """A vector in the place of the gradient."""
        for p, piece in zip(self.parameters, d.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = piece.view_as(p)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)

    def _move(self, d: Float[Tensor, " P"]) -> None:
        """One step of the torch optimizer with d in place of the gradient."""
        self._give(d)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _position(self) -> Float[Tensor, " P"]:
        return flat(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as torch.save and torch.load(weights_only=True) take it. The model's weights are not in it."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])


class GradientDescent(Descent):
    """The baseline: one step of any torch optimizer. It computes nothing more than the step, so the report has only `loss` and `seconds`.

    Where torch.distributed is initialized, the gradient is that of the samples of all processes, as in `GaussNewton`.

    Example:
        >>> descent = GradientDescent(model, loss, torch.optim.Adam(model.parameters(), 1e-3))
        >>> descent.step(x, y).loss
    """

    _shares = True

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
    ):
        super().__init__(model, loss, optimizer, clip)

    def step(self, inputs: Tensor, targets: Tensor) -> StepReport:
        start = time.perf_counter()

        def closure() -> Any:  # LBFGS calls it several times in a step, the others once
            self.optimizer.zero_grad(set_to_none=True)
            if ranks.several():
                value, g = self._gradient(inputs, targets)
                self._give(g)
                return g.new_tensor(value)
            with torch.enable_grad():
                loss = losses.value(self.loss, self.model(inputs), targets)
                loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.clip)
            return loss

        loss: Any = self.optimizer.step(closure)
        return StepReport(loss.item(), seconds=time.perf_counter() - start)
