"""The network as the paper sees it. This room knows no other.

`chain`   the pipeline and the loss on one batch, walked once: forward for z, backward for b
`door`    what the structure cannot take, refused by name
`stages`  one stage: its first derivatives, and its second ones contracted with b
`losses`  the loss as the last link: its value, gradient and Hessian in the outputs
`build`   tall, skinny networks whose signal survives the depth
"""

from .build import tall_skinny
from .chain import Chain
from .stages import Derivatives, Stage, derivatives

__all__ = ["Chain", "Derivatives", "Stage", "derivatives", "tall_skinny"]
