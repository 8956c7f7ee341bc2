"""The paper, literally: its layers, matrices and algorithms, equation by equation. Knows `hinv.network` and nothing else of the house.

`blocks`      block matrices, and a block LDU
`layers`      the paper's layers and their derivative blocks
`literal`     the second derivatives uncontracted: D_D, D_M, D_xx, D_zx, D_xz, D_zz
`matrices`    M, P, D_x, Q, A, K: start here
`algorithms`  backpropagation as a solve, Pearlmutter's product, the first version's four steps, Woodbury, Algorithm 1
"""

from .algorithms import four_steps, gradient, product, substitute, tridiagonal, woodbury
from .blocks import BlockMatrix, BlockTridiagonalLU, layer_major
from .layers import Layer, layers, split_layers
from .matrices import Matrices, SingularQError, matrices

__all__ = [
    "BlockMatrix",
    "BlockTridiagonalLU",
    "Layer",
    "Matrices",
    "SingularQError",
    "four_steps",
    "gradient",
    "layer_major",
    "layers",
    "matrices",
    "product",
    "split_layers",
    "substitute",
    "tridiagonal",
    "woodbury",
]
