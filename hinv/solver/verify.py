"""The door's last question: is the matrix of the structure that of the model as it was handed in?

After construction the gradient and one Hessian-vector product of the user's own model and loss, run as a whole, must be those of the stages. One comparison
for all that could come between the two: a closure that keeps the original, a wrapper, a wrong derivative rule. No block is formed.
"""

import torch
from torch import Tensor, nn

from hinv.network import losses, stagewise
from hinv.network.blocks import of_float32
from hinv.shapes import Float
from hinv.vectors import flat, normal

from .matrix import Matrix
from .products import Products


def verify(H: Matrix, model: nn.Module, loss: losses.Loss) -> None:
    """Cost: a gradient and two products of the batch; for a float32 model also those of its float64 copy, which solves and counts work with.

    Raises:
        ValueError: where they differ, at which parameter, and what to look for.
    """
    chain, v = H.chain, normal(H.shape[0], H.gradient)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]
    try:
        with torch.enable_grad():
            value = losses.value(loss, model(chain.inputs.clone()), chain.targets)
            graph = torch.autograd.grad(value, list(named.values()), create_graph=True, materialize_grads=True)
        gradient = flat(graph)
        _same_gradient(H, gradient, list(named), sizes)
        live = [(g, w.view_as(g)) for g, w in zip(graph, v.split(sizes), strict=True) if g.requires_grad]
        Hv = torch.zeros_like(v)
        if live:
            functions, weights = zip(*live, strict=True)
            Hv = flat(torch.autograd.grad(functions, list(named.values()), weights, materialize_grads=True))
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"autograd cannot differentiate the model twice; look at {_suspects(H)}. torch says: {error}"
        ) from error
    if H.dtype == torch.float64:
        _same_product(H, Hv, stagewise.product(chain, v), list(named), sizes)
        return
    # where little is left of the curvature, after long training, rounding in float32 is larger than it: two runs of the same operations agree all the
    # same, and the structure is compared in float64
    _same_product(H, Hv, Products(chain, gauss_newton=False).multiply(v), list(named), sizes)
    double, v = H.double().chain, v.double()
    whole = Products(double, gauss_newton=False).multiply(v)
    _same_product(H, whole, stagewise.product(double, v), list(named), sizes)


def _same_gradient(H: Matrix, theirs: Float[Tensor, " P"], names: list[str], sizes: list[int]) -> None:
    if (found := _first_difference(theirs, H.gradient, names, sizes)) is not None:
        raise ValueError(
            f"the model's gradient in '{found[0]}' is not that of its copy: something outside the modules' own parameters and buffers takes part "
            "in what it computes (a wrapper, a tensor kept in a plain attribute); make it part of a module"
        )


def _same_product(
    H: Matrix, whole: Float[Tensor, " P"], ours: Float[Tensor, " P"], names: list[str], sizes: list[int]
) -> None:
    rounding = 1e3 * torch.finfo(whole.dtype).eps * (H.gradient.norm() * len(whole) ** 0.5).item()
    if (found := _first_difference(whole, ours, names, sizes, rounding)) is None:
        return
    where, error, scale = found
    raise ValueError(
        f"a product with the model's Hessian differs in '{where}' from the same stage by stage: look at {_suspects(H)} for something that the copy "
        "of the model does not follow (a wrapper, a closure), or that its derivatives get wrong. Or rounding errors are all there is of the curvature, as "
        f"where the outputs are saturated (the loss is {H.loss:.3g}): scale the weights down, or use float64.{of_float32(error, scale, whole.dtype)}"
    )


def _first_difference(
    theirs: Float[Tensor, " P"], ours: Float[Tensor, " P"], names: list[str], sizes: list[int], rounding: float = 0.0
) -> tuple[str, float, float] | None:
    """The first parameter in which two vectors differ by more than rounding and half the digits of the whole, by how much, and the size of the whole."""
    scale = max(theirs.norm().item(), ours.norm().item())
    for name, a, b in zip(names, theirs.split(sizes), ours.split(sizes), strict=True):
        error = (a - b).norm().item()
        if not error <= torch.finfo(ours.dtype).eps ** 0.5 * scale + rounding:
            return name, error, scale
    return None


def _suspects(H: Matrix) -> str:
    return ", ".join(str(stage) for stage in H.chain.stages if stage.kind == "general") or "the loss"
