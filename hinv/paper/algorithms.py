"""The paper's algorithms on its matrices: backpropagation, Pearlmutter's product, and both solvers. Costs are for B samples, layers of width a and p parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from hinv.shapes import Float

from .blocks import BlockMatrix, BlockTridiagonalLU, layer_major
from .layers import Layered
from .matrices import Matrices, inverse, matrices


def substitute(M: BlockMatrix, rhs: Float[Tensor, "n *k"]) -> Float[Tensor, "n *k"]:
    """M^-1 rhs for unit block-bidiagonal M, lower (forward substitution: forward propagation of a perturbation) or
    upper (backward substitution: backpropagation). O(L).
    """
    pieces = [piece.clone() for piece in rhs.split(M.row_sizes)]
    off_diagonal = sorted(key for key in M.blocks if key[0] != key[1])
    upper = bool(off_diagonal) and off_diagonal[0][0] < off_diagonal[0][1]
    for i, j in reversed(off_diagonal) if upper else off_diagonal:
        pieces[i] -= M.blocks[i, j] @ pieces[j]
    return torch.cat(pieces)


def gradient(H: Layered) -> Float[Tensor, " P"]:
    """(8) eq:gradient-matrix-form: e_L M^-1 D_x, one backward substitution and one product."""
    m = matrices(H)
    b = substitute(m.M.T, m.e_L)
    return m.D_x.T @ b


def product(H: Layered, v: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
    """(9) eq:hessian times v, (P,) or (P, k), by two substitutions: Pearlmutter's algorithm in the paper's matrices. O(L)."""
    m = matrices(H)
    y = substitute(m.M, m.D_x @ v)
    z = substitute(m.M.T, m.DDzxP.T @ v + m.PtDMzzP @ y)
    return m.DDxx @ v + m.DDzxP @ y + m.D_x.T @ z


def four_steps(H: Layered, g: Float[Tensor, "P *k"], damping: float, c: float = 1.0) -> Float[Tensor, "P *k"]:
    """v1's algorithm: (H + damping I)^-1 g through Q^-1 and A, with the dead row dropped (right where Q then has an inverse).

    Cost O(L (p + B a)^3).

    Raises:
        SingularQError: when Q has no inverse even so, with its nullity.
    """
    m = matrices(H, damping, c)
    split = len(m.layers) - 1
    y, x = range(split), range(split, len(m.T.row_sizes))
    # 1. the auxiliary vector g' = [D_x; I] g
    g_y, g_x = (m.T @ g).split([sum(m.n[:-1]), sum(m.p)])
    # 2. A, from Q^-1
    A11, A12, A22 = m.A.take(y, y), m.A.take(y, x), m.A.take(x, x)
    # 3. A^-1 g' by block LDL^T: A_22 is block-diagonal, its Schur complement block-tridiagonal
    A22_inv = inverse(A22)
    schur = BlockTridiagonalLU(A11 - A12 @ A22_inv @ A12.T, group_size=1)
    t_y = schur.solve(g_y - A12 @ (A22_inv @ g_x))
    t_x = A22_inv @ (g_x - A12.T @ t_y)
    # 4. the result, g / c - [D_x; I]^T g'' / c^2
    return g / c - m.T.T @ torch.cat([t_y, t_x]) / c**2


def woodbury(H: Layered, damping: float, c: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Factor v1's system in the form that never inverts Q; the result applies (H + damping I)^-1. Right for every batch.

    Cost: O(L (2 p + 2 B a)^3) flops, O(L (p + B a)^2) numbers, in float64.
    """
    m = _double(H, damping, c)
    lu = BlockTridiagonalLU(m.A_lifted.reorder(layer_major(4, len(m.layers))), group_size=4)

    def solve(g: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        g_x = g.double()
        g_y = m.D_x @ g_x
        right = [g_y, g_x, torch.zeros_like(g_y), torch.zeros_like(g_x)]
        _, _, t_y, t_x = _to_layer_major(right, [m.n, m.p, m.n, m.p], lu.solve)
        return (g_x / m.c - (m.D_x.T @ t_y + t_x) / m.c**2).to(g.dtype)

    return solve


def tridiagonal(H: Layered, damping: float) -> Callable[[Tensor], Tensor]:
    """Factor K' by block LDU (the paper's Algorithm 1, alg:hessian_inverse); the result applies (H + damping I)^-1.

    Cost: O(L (p + 2 B a)^3) flops, O(L (p + 2 B a)^2) numbers, in float64.
    """
    m = _double(H, damping)
    lu = BlockTridiagonalLU(m.K_pivoted, group_size=3)

    def solve(g: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        zero = torch.zeros(sum(m.n), *g.shape[1:], dtype=torch.float64, device=g.device)
        return _to_layer_major([g.double(), zero, zero], [m.p, m.n, m.n], lu.solve)[0].to(g.dtype)

    return solve


def _to_layer_major(
    components: list[Tensor], sizes: list[list[int]], solve: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Pi^T solve(Pi [components]): interleave by layer, solve, and take apart again."""
    by_layer = zip(*(c.split(s) for c, s in zip(components, sizes, strict=True)), strict=True)
    solution = solve(torch.cat([piece for layer in by_layer for piece in layer]))
    pieces = solution.split([size for layer in zip(*sizes, strict=True) for size in layer])
    return [torch.cat(pieces[k :: len(components)]) for k in range(len(components))]


def _double(H: Layered, damping: float, c: float = 1.0) -> Matrices:
    """The same in float64 whatever the model's dtype. Block LU pivots inside layers only: in float32 it lost every digit of a 20-layer
    tanh network at damping 0.01, while float64 arithmetic on the same float32 blocks, refined, reaches float32 accuracy."""
    return Matrices(H.chain, [layer.double() for layer in H.layers], damping, c)
