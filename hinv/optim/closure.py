"""A method as a torch.optim.Optimizer, for loops that know closures and no batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .descent import Descent, GradientDescent, StepReport


class ClosureOptimizer(torch.optim.Optimizer):
    """optimizer.step(closure) with a method of this package, so that a plain loop or a trainer that calls torch optimizers needs no rewrite.

    Args:
        descent: a method on the model and the loss that the closure calls. The loss must be a module, as nn.CrossEntropyLoss() is.

    Each step calls the closure once and notes what it gave to the model and to the loss: that is the batch. `report` is the `StepReport` of the last step;
    `param_groups`, `state` and `state_dict` are those of the method, so that schedules and checkpoints work.

    Cost: of `descent.step`, and one forward and backward pass more, the closure's own.

    Raises:
        TypeError: no closure; a loss that is a function. ValueError: the closure calls the model or the loss not once, puts something between the two, or
            returns another number than the loss gave (a penalty, a scaling): what to do instead. The weights are as before the call.

    Example:
        >>> loss = nn.CrossEntropyLoss()
        >>> optimizer = hinv.optim.ClosureOptimizer(hinv.optim.GaussNewton(model, loss))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     value = loss(model(x), y)
        ...     value.backward()
        ...     return value
        >>> optimizer.step(closure)
    """

    def __init__(self, descent: Descent):
        if isinstance(descent, GradientDescent):
            raise TypeError("GradientDescent only wraps a torch optimizer: use that one itself")
        if not isinstance(descent.loss, nn.Module):
            raise TypeError(
                f"the loss {descent.loss} is a function, whose arguments cannot be noted: make it an nn.Module, and call that in the closure"
            )
        self.descent = descent
        self.report: StepReport | None = None
        super().__init__(descent.parameters, {})
        self._share()

    def _share(self) -> None:
        """One list of groups and one state for both, so that a schedule of either moves the other."""
        self.param_groups, self.state = self.descent.optimizer.param_groups, self.descent.optimizer.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise TypeError(
                "a curvature method needs the batch again: call step(closure), the closure computing and returning the loss"
            )
        value, x, y = self._watch(closure)
        self.report = self.descent.step(x, y)
        return value

    def _watch(self, closure: Callable[[], Any]) -> tuple[Any, Tensor, Tensor]:
        """What the closure returns, and the batch it put through the model and the loss."""
        model, loss = self.descent.model, self.descent.loss
        assert isinstance(loss, nn.Module)
        through: list[tuple[tuple[Any, ...], Any]] = []
        judged: list[tuple[tuple[Any, ...], Any]] = []
        hooks = [
            module.register_forward_hook(lambda _, given, out, seen=seen: seen.append((given, out)))
            for module, seen in ((model, through), (loss, judged))
        ]
        try:
            with torch.enable_grad():
                value = closure()
        finally:
            for hook in hooks:
                hook.remove()
        if len(through) != 1 or len(judged) != 1:
            raise ValueError(
                f"the closure called the model {len(through)} times and the loss {len(judged)} times, and a step needs each once: give both to one batch "
                "(gradients summed over several calls are one larger batch), and call the modules that the method was made with"
            )
        (inputs, outputs), (arguments, found) = through[0], judged[0]
        if len(inputs) != 1 or len(arguments) != 2 or arguments[0] is not outputs:
            raise ValueError(
                "the closure puts something between the model and the loss, or gives them more than loss(model(x), y): put it into the nn.Sequential"
            )
        returned = value.item() if isinstance(value, Tensor) else float(value)
        if returned != found.item():
            raise ValueError(
                f"the closure returns {returned:g} where the loss gave {found.item():g}: penalties and scalings belong into the loss, whose curvature is taken"
            )
        return value, inputs[0].detach(), arguments[1]

    # what a checkpoint holds is the method's

    def state_dict(self) -> dict[str, Any]:
        return self.descent.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.descent.load_state_dict(state_dict)
        self._share()
