"""The factorization's parts, one for each stage: what `hinv.solver.factor` eliminates. Symbols are those of `hinv.solver.factor`.

They exploit what a layer is. Shapes: V is (B a, B a), rows numbered as the flattened activations of the whole batch; r and y
are (B a, k).

`Linear`. A batch excites only the span of its inputs. With Zt = [Z, 1] (B x d) and the thin QR Zt^T = Q R, m = min(B, d), the rotated weights
W Q (a_out x m) are the only ones V sees; S is m a_out square, whatever a_in. The rest of the weights sees eps and F alone:
its pivots are all eps, a_out (d - m) of them, and it is eliminated in closed form.
Positions that share the weights (tokens, jets) take the place of samples.
`Convolution`. The same map of patches to channels at every position: J^T V J by two products with the patches.
`Head`. The last linear stage under a loss whose Hessian is diag(w_n) - u_n u_n^T for each sample (cross-entropy, squared error, binary cross-entropy):
S is C blocks of m x m minus a term of rank B, factored as such; nothing of size (C m)^2 or (B C)^2 exists.
`Diagonal`. An elementwise stage. `Wired`. Where a residual block begins or ends; in between V has rows of what it carries, the first ones, and a stage
acts on the others (`Part.carry`). `Dense`. Anything else, with the blocks of `network.derivatives`.
`Spread`. What each of them, eliminated, knows of the inverse (`spread`).
"""

import torch
from torch import Tensor, nn

from hinv.network import Chain, Stage, losses
from hinv.network.stages import RESHAPES

from ..small import SMALL
from .convolution import Convolution, padding
from .dense import Dense
from .diagonal import Diagonal
from .head import Head, HeadPivot
from .linear import Linear, SmallLinear
from .part import Eliminated, Part, Pivot
from .spread import Spread
from .wiring import Wired

__all__ = [
    "Convolution",
    "Dense",
    "Diagonal",
    "Eliminated",
    "Head",
    "HeadPivot",
    "Linear",
    "Part",
    "Pivot",
    "SmallLinear",
    "Spread",
    "Structure",
    "Wired",
    "kind",
    "parts",
]

# the stages with their parts, and V_L (None where a `Head` knows it)
Structure = tuple[list[tuple[Stage, Diagonal | Wired | Part]], Tensor | None]


def parts(chain: Chain, gauss_newton: bool = False) -> Structure:
    """The structure of every stage from the first with parameters on, and V_L. Computed once for all dampings."""
    live = [stage for stage in chain.live if not isinstance(stage.module, RESHAPES)]
    known = losses.diagonal_minus_rank_one(chain.loss, chain.outputs, chain.targets)
    out: list[tuple[Stage, Diagonal | Wired | Part]] = []
    for number, stage in enumerate(live):
        if stage.kind == "linear" and stage is live[-1] and known is not None:
            return [*out, (stage, Head(stage, gauss_newton, number > 0, *known))], None
        part = kind(stage, number > 0)(stage, gauss_newton, number > 0)
        part.carry = len(stage.inputs) * stage.carry
        out.append((stage, part))
    return out, torch.block_diag(*losses.curvature(chain.loss, chain.outputs, chain.targets))


def kind(stage: Stage, wrt_input: bool) -> type:
    """Which part a stage becomes (a `Head`, where the loss allows it, is for `parts` to say)."""
    if stage.kind == "elementwise":
        return Diagonal
    if stage.kind == "wiring":
        return Wired
    if stage.kind == "linear":
        (rows, a_in), entries = stage.rows.shape, stage.outputs.numel()
        n = entries // rows * min(rows, a_in + stage.has_bias)
        small = stage.inputs.device.type == "cpu" and max(n, wrt_input * rows * a_in, entries) <= SMALL
        small = small and not stage.carry
        return SmallLinear if small else Linear
    module = stage.module
    if type(module) is not nn.Conv1d and type(module) is not nn.Conv2d:
        return Dense
    if stage.inputs.ndim != len(module.kernel_size) + 2 or module.groups > 1 or module.padding_mode != "zeros":
        return Dense
    whole = len(stage.parameters) == len(list(module.parameters()))
    rows, d = len(stage.inputs) * stage.outputs[0, 0].numel(), stage.weight[0].numel() + (stage.has_bias)
    return Convolution if whole and rows >= d and padding(module) is not None else Dense
