"""A product with the Hessian stage by stage, no block formed: forwards what moves, backwards what pulls.

    y_l          = A_l y_{l-1} + J_l x_l                                   y_0 = 0
    lambda_L     = V_L y_L
    (H x)_l      = J_l^T lambda_l + E_l x_l + F_l y_{l-1}
    lambda_{l-1} = A_l^T lambda_l + F_l^T x_l + G_l y_{l-1}

Linear and elementwise stages in closed form, any other by plain double backward through its module. It is what the structure says H is, at the cost
of about a product by automatic differentiation of the whole network, which knows nothing of stages: the door compares the two.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hinv.shapes import Float
from hinv.vectors import flat

from . import losses
from .blocks import leaves_and_output
from .chain import Chain
from .stages import Stage

# (y_l, and lambda_l -> ((H x)_l, lambda_{l-1}))
Move = tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]


def product(chain: Chain, v: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """H v for one vector."""
    y, pulls = _forwards(chain, v)
    signals = [losses.products(chain.loss, chain.outputs, chain.targets)(y)]
    out = []
    for stage, pull in zip(reversed(chain.live), reversed(pulls), strict=True):
        if pull is None:
            signals = stage.wiring.back(signals)
            continue
        g, signals[-1] = pull(signals[-1])
        out.append(g)
    return torch.cat(out[::-1])


def moved(chain: Chain, v: Float[Tensor, " P"]) -> Float[Tensor, "B ..."]:
    """J v: how the outputs move, shaped like them."""
    return _forwards(chain, v)[0]


def _forwards(
    chain: Chain, v: Float[Tensor, " P"]
) -> tuple[Float[Tensor, "B ..."], list[Callable[[Tensor], tuple[Tensor, Tensor]] | None]]:
    """y_L, and for the way back lambda_l -> ((H v)_l, lambda_{l-1}) of each stage (None of a wiring)."""
    pieces = iter(v.split([len(stage.x) for stage in chain.live if stage.parameters]))
    live = chain.live
    y: list[Tensor | None] = [None] * len(live[0].segments)  # of the state's segments; None where it is constant
    pulls: list[Callable[[Tensor], tuple[Tensor, Tensor]] | None] = []
    for stage in live:
        if stage.kind == "wiring":
            y = stage.wiring.forth(y)
            pulls.append(None)
            continue
        x = next(pieces) if stage.parameters else v[:0]
        if y[-1] is None and not stage.parameters:
            y[-1] = torch.zeros_like(stage.inputs)
        y[-1], pull = MOVES.get(stage.kind, by_double_backward)(stage, x, y[-1])
        pulls.append(pull)
    assert y[-1] is not None
    return y[-1].view_as(chain.outputs), pulls


def _linear(stage: Stage, x: Float[Tensor, " p"], y: Tensor | None) -> Move:
    W, z, b, ones = stage.weight, stage.rows, stage.signal, stage.ones
    dW, bias = x[: W.numel()].view_as(W), x[W.numel() :].unsqueeze(0)  # of no bias, no entries and no column of ones
    moved = z @ dW.T + ones @ bias if stage.has_bias else z @ dW.T
    y = None if y is None else y.reshape(z.shape)

    def pull(signal: Tensor) -> tuple[Tensor, Tensor]:
        signal = signal.reshape(b.shape)
        weights = signal.T @ z if y is None else signal.T @ z + b.T @ y
        return flat([weights, signal.T @ ones]), (signal @ W + b @ dW).view_as(stage.inputs)

    return (moved if y is None else moved + y @ W.T).view_as(stage.outputs), pull


def _elementwise(stage: Stage, x: Float[Tensor, " p"], y: Tensor | None) -> Move:
    slope, bend = stage.slope, stage.bend
    assert y is not None  # a stage with parameters comes before it
    moved = (slope * y.flatten(1)).view_as(stage.outputs)

    def pull(signal: Tensor) -> tuple[Tensor, Tensor]:
        return x, (slope * signal.flatten(1) + bend * y.flatten(1)).view_as(stage.inputs)

    return moved, pull


def by_double_backward(stage: Stage, x: Float[Tensor, " p"], y: Tensor | None) -> Move:
    leaves, out = leaves_and_output(stage)
    moves = [*stage.named(x).values(), torch.zeros_like(leaves[-1]) if y is None else y]
    with torch.enable_grad():
        u = torch.zeros_like(
            out
        ).requires_grad_()  # (A, J)^T u is linear in u: its derivative along the moves is A y + J x
        transposed = torch.autograd.grad(out, leaves, u, create_graph=True, materialize_grads=True)
        live = [(f, m) for f, m in zip(transposed, moves, strict=True) if f.requires_grad]
        first = torch.autograd.grad(out, leaves, stage.b.view_as(out), create_graph=True, materialize_grads=True)
    (moved,) = torch.autograd.grad([f for f, _ in live], u, [m for _, m in live], materialize_grads=True)

    def pull(signal: Tensor) -> tuple[Tensor, Tensor]:
        second = [(f, m) for f, m in zip(first, moves, strict=True) if f.requires_grad]
        functions, weights = [out, *(f for f, _ in second)], [signal.view_as(out), *(m for _, m in second)]
        *g, back = torch.autograd.grad(functions, leaves, weights, materialize_grads=True)
        return flat(g, x), back

    return moved, pull


MOVES = {"linear": _linear, "elementwise": _elementwise}
