"""The loss as the last link of the chain: its value, its gradient b_L and its Hessian V_L with respect to the outputs.

A loss is any callable (outputs, targets) -> scalar that is a sum or a mean over samples. Then its Hessian with respect
to the stacked outputs (B * C numbers) is block-diagonal, one C x C block per sample, and C products with the vectors
"e_c in every sample at once" read off all blocks together, whatever the loss. Written with plain autograd: a closed form
would be a second thing to trust, and the tests compare with closed forms instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hinv.errors import NotFiniteError
from hinv.shapes import Float
from hinv.vectors import normal, seeded

Loss = Callable[[Tensor, Tensor], Tensor]


def check_targets(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    """Refuse targets that the loss cannot take, before torch says so less clearly.

    Raises:
        ValueError, TypeError: batch sizes differ; class labels out of range or of the wrong shape or dtype; targets of
            another shape than the outputs (MSELoss, BCEWithLogitsLoss: torch would broadcast them).
    """
    if targets.ndim == 0 or len(targets) != len(outputs):
        raise ValueError(
            f"{len(outputs)} outputs but targets of shape {tuple(targets.shape)}: give one target per sample"
        )
    if targets.device != outputs.device:
        raise ValueError(f"targets are on {targets.device}, the model on {outputs.device}: move one to the other")
    if isinstance(loss, nn.CrossEntropyLoss) and targets.shape != outputs.shape:
        classes, expected = outputs.shape[1], (len(outputs), *outputs.shape[2:])
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise TypeError(f"CrossEntropyLoss takes class labels as int64, not {targets.dtype}: use targets.long()")
        if tuple(targets.shape) != expected:
            raise ValueError(f"class labels have shape {tuple(targets.shape)}; these outputs need {expected}")
        bad = ((targets < 0) | (targets >= classes)) & (targets != loss.ignore_index)
        if bad.any():
            raise ValueError(
                f"label {targets[bad][0].item()} is out of range: the model has {classes} outputs, so labels run from 0 "
                f"to {classes - 1} (or {loss.ignore_index} to ignore a sample)"
            )
    if isinstance(loss, nn.MSELoss | nn.BCEWithLogitsLoss):
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}: reshape them"
            )
        if not targets.is_floating_point():
            raise TypeError(
                f"{type(loss).__name__} takes floating-point targets, not {targets.dtype}: use targets.to(outputs.dtype)"
            )
    if targets.is_floating_point() and not targets.isfinite().all():
        raise ValueError("targets contain NaN or infinite values")


def value(loss: Loss, outputs: Float[Tensor, "B ..."], targets: Tensor) -> Float[Tensor, ""]:
    """The scalar loss, refused if it is not a finite differentiable scalar."""
    try:
        out = loss(outputs, targets)
    except Exception as error:
        raise ValueError(f"the loss {loss} refused outputs of shape {tuple(outputs.shape)}: {error}") from error
    if not isinstance(out, Tensor) or out.numel() != 1:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"the loss must be one number, a sum or mean over samples, but is {shape}: use reduction='mean' or 'sum'"
        )
    if not out.isfinite():
        raise NotFiniteError(
            f"the loss is {out.item()}: check the scale of inputs and weights (or that not every label is ignored)"
        )
    return out.reshape(())


def gradient(loss: Loss, outputs: Float[Tensor, "B *C"], targets: Tensor) -> Float[Tensor, "B *C"]:
    """b_L = d loss / d outputs, shaped like the outputs."""
    return _gradient_graph(loss, outputs, targets)[0].detach()


def curvature(loss: Loss, outputs: Float[Tensor, "B ..."], targets: Tensor) -> Float[Tensor, "B C C"]:
    """V_L: (B, C, C), the Hessian of the loss with respect to each sample's flattened outputs. C backward passes."""
    product = products(loss, outputs, targets)
    batch, classes = len(outputs), outputs[0].numel()
    columns = []
    for c in range(classes):
        direction = outputs.new_zeros(batch, classes)
        direction[:, c] = 1.0
        columns.append(product(direction.reshape(outputs.shape)).reshape(batch, classes))
    return torch.stack(columns, dim=2)


def linear(loss: Loss, outputs: Float[Tensor, "B ..."], targets: Tensor) -> bool:
    """Whether the loss has no curvature at all in the outputs: exactly zero in a random direction."""
    return not products(loss, outputs, targets)(normal(outputs.shape, outputs)).any()


def convex(loss: Loss, outputs: Float[Tensor, "B ..."], targets: Tensor) -> bool:
    """Whether V_L is positive semidefinite at these outputs (to rounding)."""
    known = diagonal_minus_rank_one(loss, outputs, targets)
    if known is not None:
        return bool((known[0] >= 0).all())
    return semidefinite(torch.linalg.eigvalsh(curvature(loss, outputs, targets)))


def semidefinite(values: Float[Tensor, "B C"]) -> bool:
    """Whether these eigenvalues (B, C) are those of positive semidefinite matrices, to rounding."""
    return bool(values.min() >= -100 * values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().max())


def root(loss: Loss, outputs: Float[Tensor, "B ..."], targets: Tensor) -> Float[Tensor, "B C r"]:
    """R: (B, C, r) with V_n = R_n R_n^T, for a loss that is convex in the outputs.

    Softmax: V_n = W (I - a a^T) W with W = sqrt(diag(w)) and the unit vector a = u / sqrt(w). The reflection that takes a to the axis of its largest
    entry has an orthonormal basis of the rest in its other columns, so W times these C - 1 columns is R, without cancellation however certain the
    outputs are.

    Raises:
        ValueError: the loss is not convex in the outputs here.
    """
    known = diagonal_minus_rank_one(loss, outputs, targets)
    if known is None:
        values, vectors = torch.linalg.eigh(curvature(loss, outputs, targets))
        if not semidefinite(values):
            raise ValueError(NOT_CONVEX)
        rank = max(1, int((values.amax(0) > 4 * torch.finfo(values.dtype).eps * values.max()).sum()))
        return vectors[:, :, -rank:] * values[:, -rank:].clamp_min(0.0).sqrt().unsqueeze(1)
    w, u = known
    if (w < 0).any():
        raise ValueError(NOT_CONVEX)
    scale = w.sqrt()
    if u is None:
        return scale.diag_embed()
    if u.shape[1] == 1:  # one class: no curvature, and one column that says so, as above
        return torch.zeros_like(u).unsqueeze(2)
    a = torch.where(w > 0, u / scale, 0.0)
    top = a.argmax(1, keepdim=True)
    v = a.scatter_add(1, top, torch.ones_like(a[:, :1]))
    v = v / v.norm(dim=1, keepdim=True)
    reflection = torch.eye(v.shape[1], dtype=v.dtype, device=v.device) - 2.0 * v.unsqueeze(2) * v.unsqueeze(1)
    others = torch.arange(v.shape[1] - 1, device=v.device)
    others = others + (others >= top)  # (B, C - 1)
    return scale.unsqueeze(2) * reflection.gather(2, others.unsqueeze(1).expand(-1, v.shape[1], -1))


NOT_CONVEX = "the loss is not convex in the outputs here, and the dual form needs it: use method='factor'"


def diagonal_minus_rank_one(
    loss: Loss, outputs: Float[Tensor, "B ..."], targets: Tensor
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"] | None] | None:
    """(w, u), each (B, C), with V_n = diag(w_n) - u_n u_n^T, for losses known to have this form on (B, C) outputs; else None.

    Cross-entropy: V_n = omega_n (diag(p_n) - p_n p_n^T), p the softmax and omega_n the sample's weight in the loss. Squared error and
    binary cross-entropy: u is None.
    """
    if outputs.ndim != 2:
        return None
    share = 1.0 / outputs.numel() if getattr(loss, "reduction", "") == "mean" else 1.0
    if type(loss) is nn.MSELoss:
        return torch.full_like(outputs, 2.0 * share), None
    if type(loss) is nn.BCEWithLogitsLoss:
        p = outputs.sigmoid()
        w = share * p * (1 - p)
        if loss.pos_weight is not None:
            w = w * (1 + (loss.pos_weight - 1) * targets)
        return (w if loss.weight is None else w * loss.weight), None
    if type(loss) is nn.CrossEntropyLoss:
        p = outputs.softmax(1)
        omega = _softmax_weights(loss, outputs, targets)[:, None]
        return omega * p, omega.sqrt() * p
    return None


def _softmax_weights(loss: nn.CrossEntropyLoss, outputs: Float[Tensor, "B C"], targets: Tensor) -> Float[Tensor, " B"]:
    """omega (B,): the factor of each sample's logsumexp in the reduced loss."""
    classes, smooth = outputs.shape[1], loss.label_smoothing
    weight = torch.ones_like(outputs[0]) if loss.weight is None else loss.weight
    if targets.shape == outputs.shape:  # class probabilities
        omega = ((1 - smooth) * targets + smooth / classes) @ weight
        return omega / len(outputs) if loss.reduction == "mean" else omega
    counted = targets != loss.ignore_index
    own = torch.where(counted, weight[targets.where(counted, 0)], torch.zeros_like(weight[:1]))
    omega = (1 - smooth) * own + smooth / classes * weight.sum() * counted
    return omega / own.sum() if loss.reduction == "mean" else omega


def check_loss(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    """Refuse a loss that is random, cannot be differentiated twice, or couples samples: its Hessian would not be block-diagonal.

    Any two sample numbers differ in some binary digit, so log2(B) products, each moving the samples whose k-th digit is
    one and looking at the others, see every pair.

    Raises:
        ValueError: with the remedy.
    """
    if value(loss, outputs, targets).item() != value(loss, outputs, targets).item():
        raise ValueError("the loss gives two values on the same outputs: it must not be random")
    try:
        product = products(loss, outputs, targets)
        finite = (
            product(torch.ones_like(outputs)).isfinite().all() and gradient(loss, outputs, targets).isfinite().all()
        )
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the loss {loss} cannot be differentiated twice: {error}") from error
    if others := _other_leaves(loss, outputs, targets):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in others[:3])
        raise ValueError(
            f"the loss depends on {len(others)} trainable tensors besides the outputs (shapes {shapes}), so its Hessian has parts that no layer sees. "
            "A penalty mu |x|^2 / 2 on all parameters (weight_decay=mu in an optimizer) is mu more damping: leave it out of the loss and add mu to damping; a "
            "loss's own parameters "
            "are constants once requires_grad is off"
        )
    if not finite:
        raise ValueError(
            "the loss's gradient or second derivative is NaN or infinite at these outputs (a square root of zero?)"
        )
    number, generator = torch.arange(len(outputs), device=outputs.device), seeded(0)
    direction, other = (normal(outputs.shape, outputs, generator) for _ in range(2))
    moved, moved_other = product(direction), product(other)
    size = (moved.norm() * other.norm() + moved_other.norm() * direction.norm()).item()
    error = abs(((other * moved).sum() - (direction * moved_other).sum()).item())
    known = diagonal_minus_rank_one(loss, outputs, targets) is not None  # of certain outputs only rounding is left
    if not (known or error <= 1e-3 * size):
        raise ValueError(
            f"the second derivative of the loss {loss} by autograd is not symmetric, so it is wrong (torch {torch.__version__}): write it with "
            "elementary operations"
        )
    for k in range((len(outputs) - 1).bit_length()):
        moved = (number >> k & 1).bool()
        masked = direction * moved.reshape(-1, *[1] * (outputs.ndim - 1))
        response = product(masked)
        if not response[~moved].abs().max() <= 1e-6 * response.abs().max():
            raise ValueError("the loss couples samples of the batch; it must be a sum or a mean of one term per sample")


def _other_leaves(loss: Loss, outputs: Float[Tensor, "B ..."], targets: Tensor) -> list[Tensor]:
    """Trainable tensors that the loss reads, other than the outputs it is given."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        pending: list[Any] = [value(loss, leaf, targets).grad_fn]
    seen, found = set(), []
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and node.variable is not leaf:
            found.append(node.variable)
        pending += [above for above, _ in node.next_functions]
    return found


def _gradient_graph(
    loss: Loss, outputs: Float[Tensor, "B *C"], targets: Tensor
) -> tuple[Float[Tensor, "B *C"], Float[Tensor, "B *C"]]:
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        scalar = value(loss, leaf, targets)
        if not scalar.requires_grad:
            raise ValueError("the loss does not depend on the model's outputs through differentiable operations")
        (first,) = torch.autograd.grad(scalar, leaf, create_graph=True, materialize_grads=True)
    return first, leaf


def products(loss: Loss, outputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> (Hessian of the loss w.r.t. the outputs) v, with the gradient's graph built once."""
    first, leaf = _gradient_graph(loss, outputs, targets)
    if not first.requires_grad:  # a loss linear in the outputs
        return torch.zeros_like
    return lambda v: torch.autograd.grad(first, leaf, v, retain_graph=True, materialize_grads=True)[0]
