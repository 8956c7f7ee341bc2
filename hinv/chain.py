"""The network as the paper sees it: a pipeline z_l = f_l(z_{l-1}; x_l), walked forward once and backward once.

A `Chain` is an `nn.Sequential` (nested ones flattened), a loss, and one batch, checked here once so that nothing behind
this door needs to check again. It keeps its own copy of the model: training the original afterwards does not move it.

    symbol   shape            meaning
    x_l      (p_l,)           trainable parameters of stage l, flattened in the order of module.parameters()
    z_l      (B, ...)         activations after stage l; z_0 is the batch
    b_l      like z_l         d loss / d z_l, rows of all samples (the loss's 1/B is inside)
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parameters_to_vector

from . import heads

# An activation applied entry by entry, or a change of shape: with flattened samples its Jacobian is diagonal.
ELEMENTWISE = (
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.ReLU, nn.LeakyReLU, nn.Softsign),
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout),
)


@dataclass
class Stage:
    """One module of the pipeline with its input z_{l-1}, its output z_l, the backward signal b_l and, if elementwise, its slope (B, a)."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]  # the trainable ones
    inputs: Tensor
    outputs: Tensor
    b: Tensor | None = None
    slope: Tensor | None = None

    @property
    def kind(self) -> str:
        """How the derivatives are found: "linear", "elementwise", or "general" (torch.func)."""
        if (
            type(self.module) is nn.Linear
            and self.inputs.ndim == 2
            and len(self.parameters) == len(list(self.module.parameters()))
        ):
            return "linear"
        return "elementwise" if type(self.module) in ELEMENTWISE else "general"

    @property
    def x(self) -> Tensor:
        """(p_l,) the parameters, detached."""
        if not self.parameters:
            return self.inputs.new_zeros(0)
        return parameters_to_vector(self.parameters.values()).detach()

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """A flat parameter vector (p_l,) taken apart under the parameters' names, for functional_call."""
        pieces = x.split([p.numel() for p in self.parameters.values()]) if self.parameters else []
        return {name: v.view_as(p) for (name, p), v in zip(self.parameters.items(), pieces, strict=True)}

    def per_sample(self, x: Tensor, z: Tensor) -> Tensor:
        """f_l for one sample: parameters (p_l,) and an input without batch dimension -> flattened output (a_l,)."""
        return functional_call(
            self.module, self.named(x), (z.unsqueeze(0).clone(),)
        ).flatten()  # cloned: it may work in place

    def __str__(self) -> str:
        return f"stage '{self.name}' ({self.module.__class__.__name__})"


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

    def __init__(self, model: nn.Sequential, loss: heads.Loss, inputs: Tensor, targets: Tensor, check: bool = True):
        _check_model(model)
        _check_tensors(model, inputs, targets)
        try:
            self.model, self.loss = copy.deepcopy(model), loss
        except RuntimeError as error:
            raise ValueError(f"the model cannot be copied ({error}); call detach() on the tensors it keeps") from error
        self.inputs, self.targets = inputs.detach().clone(), targets.detach().clone()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.stages = self._forward(check)
        heads.check_targets(loss, self.outputs, self.targets)
        self.value = heads.value(loss, self.outputs, self.targets).detach()
        if check:
            heads.check_loss(loss, self.outputs, self.targets)
        self._backward()

    @property
    def outputs(self) -> Tensor:
        """(B, ...) what the loss sees."""
        return self.stages[-1].outputs

    @property
    def live(self) -> list[Stage]:
        """The stages from the first with parameters on; what comes before is a constant."""
        return self.stages[next(i for i, stage in enumerate(self.stages) if stage.parameters) :]

    def _forward(self, check: bool) -> list[Stage]:
        stages, z = [], self.inputs
        for name, module in _flatten(self.model):
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
            if not out.isfinite().all():
                raise heads.NotFiniteError(
                    f"stage '{name}' ({module}) puts out NaN or infinite values: check the scale of inputs and weights"
                )
            stage = Stage(name, module, parameters, z, out)
            if check and stage.kind == "general":
                _check_independent(stage)
            stages.append(stage)
            z = out
        return stages

    def _backward(self) -> None:
        """b_L from the loss, then b_{l-1} = A_l^T b_l stage by stage (eq:backprop)."""
        b = heads.gradient(self.loss, self.outputs, self.targets)
        first = len(self.stages) - len(self.live)
        for i in range(len(self.stages) - 1, -1, -1):
            stage = self.stages[i]
            stage.b = b
            if i > first:  # what comes before the first parameters is a constant
                with torch.enable_grad():
                    z = stage.inputs.detach().requires_grad_()
                    out = stage.module(z.clone())
                if stage.kind == "elementwise":  # A_l is diagonal: all columns at once
                    (slope,) = torch.autograd.grad(out.sum(), z)
                    b, stage.slope = b.reshape(z.shape) * slope, slope.flatten(1)
                else:
                    (b,) = torch.autograd.grad(out, z, b, materialize_grads=True)


def _flatten(model: nn.Sequential, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """(dotted name, module) of every stage, nested Sequentials opened."""
    out = []
    for name, module in zip(model._modules, model, strict=True):
        if _is_sequential(module):
            out += _flatten(module, f"{prefix}{name}.")
        else:
            out.append((prefix + name, module))
    return out


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _check_model(model: nn.Module) -> None:
    if not _is_sequential(model):
        raise TypeError(
            f"the model must be an nn.Sequential (a pipeline of stages), not {type(model).__name__}; write it as one, "
            "with residual blocks or other small graphs as single modules inside it"
        )
    stages = _flatten(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"'{name}' is not initialized: run the model once on a batch")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"'{name}' ({type(module).__name__}) has forward hooks, which may change what it computes behind the structure's back: "
                "remove them (handle.remove(); for pruning and old-style weight or spectral norm, make the weights permanent)"
            )
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"'{name}' ({type(module).__name__}) mixes samples in training mode: call model.eval(), or use LayerNorm or GroupNorm"
            )
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"'{name}' ({type(module).__name__}) is random in training mode: call model.eval()")
    owner: dict[nn.Parameter, str] = {}
    for name, module in stages:
        for parameter in module.parameters():
            if parameter.requires_grad and owner.setdefault(parameter, name) != name:
                raise ValueError(
                    f"stages '{owner[parameter]}' and '{name}' share a parameter: the layerwise structure needs one owner "
                    "each; untie them, or put both into one module"
                )
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter: set requires_grad=True on some")
    if len(trainable) != len(owner):
        raise ValueError("the Sequential owns parameters outside its stages: move them into a module of the pipeline")


def _check_tensors(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("derivatives cannot be taken under torch.inference_mode(): leave it first")
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch tensor, not {type(tensor).__name__}: use torch.as_tensor")
    if not inputs.is_floating_point():
        raise TypeError(
            f"inputs are {inputs.dtype}: convert them with inputs.to(model's dtype); embed token numbers first and pass the embeddings"
        )
    if inputs.ndim < 2 or len(inputs) == 0:
        raise ValueError(f"inputs of shape {tuple(inputs.shape)}: give a batch (B, ...) of at least one sample")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device != inputs.device:
            raise ValueError(f"'{name}' is on {tensor.device}, the inputs on {inputs.device}: move all to one device")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"'{name}' is {tensor.dtype}: exact curvature needs float32 or float64, use model.double()")
        if tensor.dtype != inputs.dtype:
            raise TypeError(f"'{name}' is {tensor.dtype}, the inputs {inputs.dtype}: convert one to the other")
        if isinstance(tensor, nn.Parameter) and not tensor.isfinite().all():  # a buffer may: attention masks hold -inf
            raise heads.NotFiniteError(f"'{name}' contains NaN or infinite values")
    if not inputs.isfinite().all():
        raise ValueError("inputs contain NaN or infinite values")


def _check_independent(stage: Stage) -> None:
    """A general module must give each sample what it gives in the batch: vmap runs it one sample at a time."""
    try:
        with torch.no_grad():
            alone = vmap(stage.per_sample, in_dims=(None, 0))(stage.x, stage.inputs)
    except Exception as error:
        raise ValueError(
            f"{stage} cannot be evaluated one sample at a time with torch.func.vmap, which its derivatives need. torch says: {error}"
        ) from error
    batch = stage.outputs.flatten(1)
    scale = batch.abs().max().clamp_min(torch.finfo(batch.dtype).tiny)
    if alone.shape != batch.shape or (alone - batch).abs().max() > 1e3 * torch.finfo(batch.dtype).eps * scale:
        raise ValueError(
            f"{stage} mixes samples (or is random): a sample's output changes with the rest of the batch, so the "
            "derivatives are not one block per sample; use a module that treats samples independently"
        )
