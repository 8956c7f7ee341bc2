"""The network as the paper sees it. This room knows no other.

`chain`   the pipeline and the loss on one batch, walked once: forward for z, backward for b
`door`    what the structure cannot take, refused by name
`stages`  one stage: its module, input, output and backward signal
`blocks`  its first derivatives, and its second ones contracted with b
`stagewise`  a product with the Hessian by them, no block formed
`losses`  the loss as the last link: its value, gradient and Hessian in the outputs
`jets`    networks that carry a function's derivatives along
`build`   tall, skinny networks whose signal survives the depth
"""

from . import jets
from .blocks import derivatives
from .build import tall_skinny
from .chain import Chain
from .shared import SharedLinear
from .skip import Residual
from .stages import Derivatives, Stage

__all__ = ["Chain", "Derivatives", "Residual", "SharedLinear", "Stage", "derivatives", "jets", "tall_skinny"]
