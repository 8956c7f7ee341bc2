"""The network as the paper sees it: a pipeline z_l = f_l(z_{l-1}; x_l), walked forward once and backward once.

A `Chain` is an `nn.Sequential` (nested ones flattened), a loss, and one batch, checked here once so that nothing behind
this door needs to check again. It keeps its own copy of the model: training the original afterwards does not move it.

    symbol   shape            meaning
    x_l      (p_l,)           trainable parameters of stage l, flattened in the order of module.parameters()
    z_l      (B, ...)         activations after stage l; z_0 is the batch
    b_l      like z_l         d loss / d z_l, rows of all samples (the loss's 1/B is inside)
"""

from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from hinv.errors import NotFiniteError
from hinv.modes import threads
from hinv.shapes import Float
from hinv.vectors import not_finite

from . import losses
from .blocks import check_twice
from .copies import copied
from .door import check_independent, check_model, check_tensors
from .skip import Merge, Wiring, opened
from .stages import Stage, differentiate


class Chain:
    """A checked pipeline and loss on one batch.

    Args:
        model: nn.Sequential of modules of one tensor to one tensor that treat samples independently.
        loss: callable (outputs, targets) -> scalar, a sum or a mean over samples.
        inputs: (B, ...) floating point, dtype and device of the model.
        targets: as the loss wants them.
        check: False for a model and a loss that passed once; what costs nothing is checked all the same.

    Raises:
        TypeError, ValueError: anything the algorithms cannot take, by name and with the remedy.
    """

    def __init__(self, model: nn.Sequential, loss: losses.Loss, inputs: Tensor, targets: Tensor, check: bool = True):
        check_model(model)
        check_tensors(model, inputs, targets)
        positions = inputs[0, 0].numel()  # of a kernel, about
        units = [len(p) * (positions if p.ndim > 2 else 1) for p in model.parameters() if p.ndim]
        with threads(len(inputs) * max(units, default=1)):
            self._build(model, loss, inputs, targets, check)

    def _build(self, model: nn.Sequential, loss: losses.Loss, inputs: Tensor, targets: Tensor, check: bool) -> None:
        try:
            self.model, self.loss = cast(nn.Sequential, copied(model)), loss
        except RuntimeError as error:
            raise ValueError(f"the model cannot be copied ({error}); call detach() on the tensors it keeps") from error
        self.inputs, self.targets = inputs.detach().clone(), targets.detach().clone()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.stages = self._forward(check)
        self._fold_softmax()
        losses.check_targets(self.loss, self.outputs, self.targets)
        self.value = losses.value(self.loss, self.outputs, self.targets).detach()
        if check:
            losses.check_loss(self.loss, self.outputs, self.targets)
        self._backward()
        if check:
            for stage in self.live:
                if stage.kind == "general":
                    check_twice(stage)

    def __repr__(self) -> str:
        P = sum(p.numel() for p in self.parameters)
        return f"Chain({len(self.stages)} stages, batch {len(self.inputs)}, {P} parameters)"

    @property
    def outputs(self) -> Float[Tensor, "B ..."]:
        """(B, ...) what the loss sees."""
        return self.stages[-1].outputs

    @cached_property
    def rows(self) -> int:
        """The largest number of entries that a stage puts out for the whole batch: rows of the largest matrices there will be."""
        return max(stage.outputs.numel() for stage in self.stages)

    @property
    def live(self) -> list[Stage]:
        """The stages from the first with parameters on; what comes before is a constant."""
        return self.stages[next(i for i, stage in enumerate(self.stages) if stage.parameters) :]

    def _forward(self, check: bool) -> list[Stage]:
        stages, state = [], [self.inputs]
        for name, module in opened("", self.model):
            if isinstance(module, Wiring):
                stages.append(self._wired(name, module, state))
                state = module.forth(state)
                continue
            z = state[-1]
            parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
            try:
                with torch.no_grad():
                    out = module(z.clone())  # cloned for modules that work in place
            except Exception as error:
                raise ValueError(
                    f"stage '{name}' ({module}) cannot take the {tuple(z.shape)} that reaches it; make it follow the "
                    f"stage before. torch says: {error}"
                ) from error
            if not isinstance(out, Tensor) or out.ndim < 2 or len(out) != len(z):
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise ValueError(
                    f"stage '{name}' ({module}) maps a batch of {len(z)} to {got}: each stage must map one tensor to one "
                    "tensor, batch dimension first and at least one dimension for the units"
                )
            stage = Stage(name, module, parameters, z, out, carried=tuple(t[0].numel() for t in state[:-1]))
            if check and stage.kind == "general":
                check_independent(stage)
            stages.append(stage)
            state = [*state[:-1], out]
        if (bad := not_finite([stage.outputs for stage in stages])) is not None:
            raise NotFiniteError(
                f"stage '{stages[bad].name}' ({stages[bad].module}) puts out NaN or infinite values: check the scale of inputs and weights"
            )
        return stages

    @staticmethod
    def _wired(name: str, module: Wiring, state: list[Tensor]) -> Stage:
        if isinstance(module, Merge) and state[-1].shape != state[-2].shape:
            block, a, b = name.rpartition(".")[0], tuple(state[-2].shape), tuple(state[-1].shape)
            raise ValueError(
                f"residual block '{block}': its skip gives {a} and its body {b}, which do not add up; give it a skip= that maps to the shape of the body"
            )
        carried = tuple(t[0].numel() for t in state[:-1])
        return Stage(name, module, {}, state[-1], module.forth(state)[-1], carried=carried)

    def _fold_softmax(self) -> None:
        """LogSoftmax at the end under NLLLoss is cross-entropy of what comes before: the same function, gradient and Hessian, but now the loss has all of
        the curvature in its outputs, and the Gauss-Newton matrix is the Fisher information. With a loss linear in its outputs it would be zero."""
        last, loss = self.stages[-1], self.loss
        if type(last.module) is not nn.LogSoftmax or type(loss) is not nn.NLLLoss:
            return
        if last.module.dim != 1 and (last.module.dim, last.inputs.ndim) != (-1, 2):
            return
        owner, _, name = last.name.rpartition(".")
        self.model.get_submodule(owner).register_module(name, nn.Identity())
        self.stages[-1] = Stage(last.name, nn.Identity(), {}, last.inputs, last.inputs)
        self.loss = nn.CrossEntropyLoss(loss.weight, ignore_index=loss.ignore_index, reduction=loss.reduction)

    def _backward(self) -> None:
        """b_L from the loss, then b_{l-1} = A_l^T b_l stage by stage (eq:backprop)."""
        differentiate([stage for stage in self.live if stage.kind == "elementwise"])
        signals = [losses.gradient(self.loss, self.outputs, self.targets)]
        first = len(self.stages) - len(self.live)
        for i in range(len(self.stages) - 1, -1, -1):
            stage = self.stages[i]
            stage.b = b = signals[-1]
            if i > first:  # what comes before the first parameters is a constant
                if isinstance(stage.module, Wiring):
                    signals = stage.module.back(signals)
                    continue
                if stage.kind == "elementwise":
                    b = (b.flatten(1) * stage.slope).view_as(stage.inputs)
                elif stage.kind == "linear":
                    b = b @ stage.weight
                else:
                    with torch.enable_grad():
                        z = stage.inputs.detach().requires_grad_()
                        out = stage.module(z.clone())
                    (b,) = torch.autograd.grad(out, z, b, materialize_grads=True)
                signals[-1] = b
