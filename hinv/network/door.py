"""What the structure cannot take is refused here, by name and with the remedy, so that nothing behind this door needs to check again."""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from hinv.errors import NotFiniteError
from hinv.vectors import not_finite

from .skip import opened
from .stages import Stage


def _is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def check_model(model: nn.Module) -> None:
    if not _is_sequential(model):
        raise TypeError(
            f"the model must be an nn.Sequential (a pipeline of stages), not {type(model).__name__}; write it as one, "
            "with residual blocks as hinv.Residual and other small graphs as single modules inside it"
        )
    stages = opened("", model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"'{name}' is not initialized: run the model once on a batch")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"'{name}' ({type(module).__name__}) has forward hooks, which may change what it computes behind the structure's back: "
                "remove them (handle.remove(); for pruning and old-style weight or spectral norm, make the weights permanent)"
            )
        if "forward" in vars(module):
            raise ValueError(
                f"'{name or 'the model'}' ({type(module).__name__}) has a replaced forward, which belongs to this object and not to the copy that hinv "
                "makes of it: remove it (del module.forward), or write what it does as a module of its own"
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


def check_tensors(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("derivatives cannot be taken under torch.inference_mode(): leave it first")
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a torch tensor, not {type(tensor).__name__}: use torch.as_tensor; several tensors of a sample go side by side into one, "
                "which the model or the loss takes apart"
            )
    if not inputs.is_floating_point():
        raise TypeError(
            f"inputs are {inputs.dtype}: convert them with inputs.to(model's dtype); embed token numbers first and pass the embeddings"
        )
    if inputs.ndim < 2 or len(inputs) == 0:
        raise ValueError(f"inputs of shape {tuple(inputs.shape)}: give a batch (B, ...) of at least one sample")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            raise ValueError(
                f"'{name}' was made under torch.inference_mode() and can take part in no derivative: make the model outside of it, or load a clone() of "
                "its state into one that was"
            )
        if tensor.device != inputs.device:
            raise ValueError(f"'{name}' is on {tensor.device}, the inputs on {inputs.device}: move all to one device")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"'{name}' is {tensor.dtype}: exact curvature needs float32 or float64, use model.double()")
        if tensor.dtype != inputs.dtype:
            raise TypeError(f"'{name}' is {tensor.dtype}, the inputs {inputs.dtype}: convert one to the other")
    names, parameters = zip(*model.named_parameters(), strict=True)  # a buffer may: attention masks hold -inf
    if (bad := not_finite(parameters)) is not None:
        raise NotFiniteError(f"'{names[bad]}' contains NaN or infinite values")
    if not inputs.isfinite().all():
        raise ValueError("inputs contain NaN or infinite values")


def check_independent(stage: Stage) -> None:
    """A general module must give each sample what it gives in the batch."""
    with torch.no_grad():
        try:
            alone = vmap(stage.per_sample, in_dims=(None, 0))(stage.x, stage.inputs)
        except Exception:  # no rule for vmap, or a module that counts its calls
            try:
                alone = torch.stack([stage.module(z.unsqueeze(0).clone()).flatten() for z in stage.inputs])
            except Exception as error:
                raise ValueError(f"{stage} cannot be evaluated on a batch of one. torch says: {error}") from error
    batch = stage.outputs.flatten(1)
    scale = batch.abs().max().clamp_min(torch.finfo(batch.dtype).tiny)
    if alone.shape != batch.shape or (alone - batch).abs().max() > 1e3 * torch.finfo(batch.dtype).eps * scale:
        raise ValueError(
            f"{stage} mixes samples (or is random): a sample's output changes with the rest of the batch, so the "
            "derivatives are not one block per sample; use a module that treats samples independently"
        )
