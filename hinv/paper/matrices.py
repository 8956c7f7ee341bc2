"""The paper's matrices, equation by equation. Nothing here is clever: it is the definition.

Layers are the paper's: each begins with a module that has parameters and takes in the parameter-free ones behind it (Linear, then
tanh); what comes before the first parameters is folded into the constant z_0; the loss is fused into the last layer, so
z_L is one number. With n_l = B a_l stacked activations (n_L = 1) and p_l parameters, a three-layer network has

        [  I             ]        [ 0         ]          [ J_1         ]
    M = [ -A_2   I       ]    P = [ I   0     ]    D_x = [     J_2     ]
        [      -A_3   1  ]        [     I   0 ]          [         J_3 ]

    D_D D_xx = diag(E_l)    D_D D_zx = diag(F_l)    D_M D_xz = diag(F_l^T)    D_M D_zz = diag(G_l)

    H = D_D D_xx + D_D D_zx P M^-1 D_x + D_x^T M^-T P^T D_M D_xz + D_x^T M^-T P^T D_M D_zz P M^-1 D_x.        (9) eq:hessian

Where we depart from the paper's notation: our E, F, G already include the contraction with b (its D_D and D_M), and A_1, F_1, G_1
are not formed by the algorithms, because P's first block row is zero: the input z_0 does not move.

Equation numbers and TeX labels are those of arXiv:2601.06096v3; the matrices Q and A are from v1, where they are unnumbered.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hinv.network import Chain
from hinv.shapes import Float

from .blocks import BlockMatrix, layer_major
from .layers import Layer, Layered
from .literal import Literal


class SingularQError(torch.linalg.LinAlgError):
    """Q has no inverse; `nullity` says by how many dimensions."""

    def __init__(self, message: str, nullity: int):
        super().__init__(message)
        self.nullity = nullity


def matrices(H: Layered, damping: float = 1e-2, c: float = 1.0) -> "Matrices":
    """Every matrix of the paper for this Hessian, each a BlockMatrix built when first asked for.

    Args:
        H: an `hinv.Hessian`.
        damping: eps in H + eps I (loss / parameter^2).
        c: the constant of the Woodbury splitting H + eps I = c I + ..., 1 in the paper's first version.
    """
    return Matrices(H.chain, H.layers, damping, c)


class Matrices(Literal):
    """M, P, D_x; D_D, D_M, D_xx, D_zx, D_xz, D_zz (`Literal`); Q, A; K. See the module's definition. All but the `Literal` ones need O(L) storage."""

    def __init__(self, chain: Chain, layers: list[Layer], damping: float, c: float):
        if c == 0:
            raise ValueError("c must not be zero: the Woodbury splitting divides by it")
        super().__init__(chain, layers)
        self.damping, self.c = float(damping), float(c)

    def __repr__(self) -> str:
        return f"Matrices({len(self.layers)} layers, {sum(self.p)} parameters, damping {self.damping:g}, c {self.c:g})"

    def _sub_diagonal(self, rows: Sequence[int], cols: Sequence[int], blocks: Sequence[Tensor | None]) -> BlockMatrix:
        """Block i at (i, i - 1), from the second on: only the first may be None."""
        below = {(i, i - 1): b for i, b in enumerate(blocks) if i > 0 and b is not None}
        return BlockMatrix(rows, cols, below, self._like)

    @cached_property
    def M(self) -> BlockMatrix:
        """(7): unit block-bidiagonal, -A_l below the diagonal; b M = e_L is backpropagation."""
        below = [-layer.A if layer.A is not None else None for layer in self.layers]
        return BlockMatrix.identity(self.n, self._like) + self._sub_diagonal(self.n, self.n, below)

    @cached_property
    def P(self) -> BlockMatrix:
        """(eq:P): the block down-shift (z_1 .. z_L) -> (z_0 .. z_{L-1}); its first block row is zero."""
        inputs = [self.n0, *self.n[:-1]]
        return self._sub_diagonal(
            inputs, self.n, [torch.eye(n, dtype=self._like.dtype, device=self._like.device) for n in inputs]
        )

    @cached_property
    def D_x(self) -> BlockMatrix:
        """diag(J_l), J_l = grad_x f_l."""
        return BlockMatrix.diagonal([layer.J for layer in self.layers])

    @cached_property
    def e_L(self) -> Float[Tensor, " n"]:
        """(0, ..., 0, 1): selects the loss z_L."""
        out = self._like.new_zeros(sum(self.n))
        out[-1] = 1.0
        return out

    # -- contracted with b: what the algorithms use --------------------------------------------------------------------

    @cached_property
    def DDxx(self) -> BlockMatrix:
        """D_D D_xx = diag(E_l)."""
        return BlockMatrix.diagonal([layer.E for layer in self.layers])

    @cached_property
    def DDzxP(self) -> BlockMatrix:
        """D_D D_zx P: F_l at (l, l-1). Its transpose is P^T D_M D_xz."""
        return self._sub_diagonal(self.p, self.n, [layer.F for layer in self.layers])

    @cached_property
    def PtDMzzP(self) -> BlockMatrix:
        """P^T D_M D_zz P: G_{l+1} at (l, l); nothing at (L, L), because nothing follows the loss."""
        moved = {(i - 1, i - 1): layer.G for i, layer in enumerate(self.layers) if layer.G is not None}
        return BlockMatrix(self.n, self.n, moved, self._like)

    @cached_property
    def eye_x(self) -> BlockMatrix:
        return BlockMatrix.identity(self.p, self._like)

    # -- second version: K ---------------------------------------------------------------------------------------------

    @cached_property
    def K(self) -> BlockMatrix:
        """(13) eq:unified-system: K [x; y; z] = [g; 0; 0], blocks listed component by component (x, then y, then z)."""
        return BlockMatrix.compose(
            [
                [self.DDxx + self.damping * self.eye_x, self.DDzxP, self.D_x.T],
                [-self.D_x, self.M, None],
                [-self.DDzxP.T, -self.PtDMzzP, self.M.T],
            ]
        )

    @cached_property
    def K_pivoted(self) -> BlockMatrix:
        """(14) eq:K-pivoted: K' = Pi K Pi^T listed layer by layer, block-tridiagonal in groups of three."""
        return self.K.reorder(layer_major(3, len(self.layers)))

    # -- first version: Q and A ----------------------------------------------------------------------------------------

    @cached_property
    def Q(self) -> BlockMatrix:
        """v1's Q with c for its 1 and E + eps I for its E. Always singular: the row of the loss z_L is zero."""
        return BlockMatrix.compose(
            [[self.PtDMzzP, self.DDzxP.T], [self.DDzxP, self.DDxx + (self.damping - self.c) * self.eye_x]]
        )

    @cached_property
    def Q_reduced(self) -> BlockMatrix:
        """Q without the dead row and column of z_L: block-diagonal up to order, one block per layer."""
        count = len(self.layers)
        return self.Q.reorder([*range(count - 1), *range(count, 2 * count)])

    @property
    def nullity(self) -> int:
        """Dimension of the null space of Q_reduced, by the numerical rank of its block of each layer."""
        total, count = 0, len(self.layers)
        for i in range(count):
            pair = [count - 1] if i == 0 else [i - 1, count - 1 + i]  # (y_{l-1}, x_l)
            block = self.Q_reduced.submatrix_dense(pair, pair)
            total += len(block) - int(torch.linalg.matrix_rank(block, hermitian=True))
        return total

    @cached_property
    def T(self) -> BlockMatrix:
        """[D_x; I] with the dead row of z_L dropped: activations l < L, then parameters."""
        count = len(self.layers)
        return BlockMatrix.compose([[self.D_x.take(range(count - 1), range(count))], [self.eye_x]])

    @cached_property
    def M_reduced(self) -> BlockMatrix:
        return self.M.reorder(range(len(self.layers) - 1))

    @cached_property
    def Q_inverse(self) -> list[list[BlockMatrix]]:
        """[[Q^-1]_11, [Q^-1]_12], [.., [Q^-1]_22]] of Q_reduced by the partitioned inverse, all block-diagonal up to the shift.

        Raises:
            SingularQError: with the nullity. For a last hidden width a and C softmax classes it is (a - C + 1)(B - C + 1) where both
                factors are positive: for a >= C it comes as soon as B >= C.
        """
        count = len(self.layers)
        y, x = range(count - 1), range(count - 1, 2 * count - 1)
        if self.nullity:
            raise SingularQError(
                f"Q has nullity {self.nullity} even without its dead row (batch {len(self.chain.inputs)}): in some layer fewer directions "
                "bend than there are activations. Use fewer samples, or solve(method='woodbury'), which never inverts Q",
                self.nullity,
            )
        Q11, Q12, Q21, Q22 = (self.Q_reduced.take(rows, cols) for rows in (y, x) for cols in (y, x))
        try:
            Q22_inv = inverse(Q22)
        except torch.linalg.LinAlgError as error:
            raise SingularQError(
                f"Q_22 = D_D D_xx + (damping - c) I is singular ({error}): choose c different from the damping", 0
            ) from error
        S_inv = inverse(Q11 - Q12 @ Q22_inv @ Q21)
        corner = -(S_inv @ Q12 @ Q22_inv)
        return [[S_inv, corner], [corner.T, Q22_inv - Q22_inv @ Q21 @ corner]]

    @cached_property
    def A(self) -> BlockMatrix:
        """v1's A = Mhat Q^-1 Mhat^T + (1/c) [D_x; I] [D_x; I]^T, with the dead row of z_L dropped so that it exists.

        Raises:
            SingularQError: see `Q_inverse`.
        """
        (S11, S12), (S21, S22) = self.Q_inverse
        M = self.M_reduced
        return BlockMatrix.compose([[M @ S11 @ M.T, M @ S12], [S21 @ M.T, S22]]) + self.T @ self.T.T / self.c

    @cached_property
    def A_lifted(self) -> BlockMatrix:
        """[[Mhat, T T^T / c], [-Q, Mhat^T]]: A^-1 T g is the second component of its solution with [T g; 0], and Q is never inverted.

        T = [D_x; I] and Mhat = diag(M, I) with all L activations; blocks listed s_y, s_x, t_y, t_x.
        """
        count = len(self.layers)
        Q11, Q12, Q21, Q22 = (
            self.Q.take(r, c)
            for r in (range(count), range(count, 2 * count))
            for c in (range(count), range(count, 2 * count))
        )
        D, one, c = self.D_x, self.eye_x, self.c
        return BlockMatrix.compose(
            [
                [self.M, None, D @ D.T / c, D / c],
                [None, one, D.T / c, one / c],
                [-Q11, -Q12, self.M.T, None],
                [-Q21, -Q22, None, one],
            ]
        )


def inverse(diagonal: BlockMatrix) -> BlockMatrix:
    """Inverse of a block-diagonal matrix; a missing block counts as zero and is refused."""
    blocks = {}
    for i, size in enumerate(diagonal.row_sizes):
        inverse, info = torch.linalg.inv_ex(diagonal.submatrix_dense([i], [i]))
        if info.item() != 0 and size:
            raise torch.linalg.LinAlgError(f"diagonal block {i + 1} has no inverse")
        blocks[i, i] = inverse
    return BlockMatrix(diagonal.row_sizes, diagonal.col_sizes, blocks, diagonal._like)
