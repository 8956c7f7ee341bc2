"""The paper's matrices and its two algorithms, equation by equation. Nothing here is clever: it is the definition.

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

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call

from hinv.blocks import BlockMatrix, BlockTridiagonalLU, layer_major
from hinv.network import losses
from hinv.network.chain import Chain, Stage
from hinv.network.stages import Derivatives, derivatives, fuse

LITERAL_LIMIT = 2**31  # bytes of one layer's third-order tensor beyond which the uncontracted matrices are refused


class SingularQError(torch.linalg.LinAlgError):
    """Q has no inverse; `nullity` says by how many dimensions."""

    def __init__(self, message: str, nullity: int):
        super().__init__(message)
        self.nullity = nullity


@dataclass(frozen=True)
class Layer:
    """One layer of the paper, samples stacked: J (n_out, p), E (p, p), A (n_out, n_in), F (p, n_in), G (n_in, n_in).

    A, F and G are None for the first layer.
    """

    J: Tensor
    E: Tensor
    A: Tensor | None
    F: Tensor | None
    G: Tensor | None

    def double(self) -> "Layer":
        return Layer(*(None if block is None else block.double() for block in (self.J, self.E, self.A, self.F, self.G)))


def split_layers(chain: Chain) -> list[list[Stage]]:
    """The chain's stages grouped into the paper's layers; leading stages without parameters are dropped (constants)."""
    groups: list[list[Stage]] = []
    for stage in chain.stages:
        if stage.parameters:
            groups.append([stage])
        elif groups:
            groups[-1].append(stage)
    return groups


def layers(chain: Chain) -> list[Layer]:
    """Derivative blocks of every layer, the loss fused into the last.

    Cost: O(B a p^2 + B a^2 p) flops and p^2 + B a p + (B a)^2 numbers per layer.
    """
    groups = split_layers(chain)
    head = Derivatives(
        J=chain.outputs.new_zeros(0),
        E=chain.outputs.new_zeros(0),
        A=chain.stages[-1].b.flatten(1).unsqueeze(1),  # (B, 1, C): the loss adds up the samples
        G=losses.curvature(chain.loss, chain.outputs, chain.targets),
    )
    out = []
    for number, group in enumerate(groups):
        block = derivatives(group[0], wrt_input=number > 0)
        for stage in group[1:]:
            block = fuse(block, derivatives(stage))
        last = number == len(groups) - 1
        out.append(_stack(fuse(block, head) if last else block, last))
    return out


def _stack(block: Derivatives, last: bool) -> Layer:
    """Per-sample blocks -> one layer over the stacked batch (A and G block-diagonal over samples, J and F side by side)."""
    J = block.J.sum(0) if last else block.J.flatten(0, 1)
    if block.A is None:
        return Layer(J, block.E, None, None, None)
    A = block.A.transpose(0, 1).flatten(1) if last else torch.block_diag(*block.A)
    return Layer(J, block.E, A, block.F.transpose(0, 1).flatten(1), torch.block_diag(*block.G))


def matrices(H, damping: float = 1e-2, c: float = 1.0) -> "Matrices":
    """Every matrix of the paper for this Hessian, each a BlockMatrix built when first asked for.

    Args:
        H: an `hinv.Hessian`.
        damping: eps in H + eps I (loss / parameter^2).
        c: the constant of the Woodbury splitting H + eps I = c I + ..., 1 in the paper's first version.
    """
    return Matrices(H, H.layers, damping, c)


def _double_matrices(H, damping: float, c: float = 1.0) -> "Matrices":
    """The same in float64 whatever the model's dtype. Block LU pivots inside layers only: in float32 it lost every digit of a 20-layer
    tanh network at damping 0.01, while float64 arithmetic on the same float32 blocks, refined, reaches float32 accuracy."""
    return Matrices(H, [layer.double() for layer in H.layers], damping, c)


class Matrices:
    """M, P, D_x; D_D, D_M, D_xx, D_zx, D_xz, D_zz; Q, A; K. See the module's definition.

    The six matrices D_D ... D_zz hold every layer's third-order tensor uncontracted, as the paper writes them: they are
    for small networks, and refused (MemoryError) beyond 2 GiB a layer. All others need O(L) storage.
    """

    def __init__(self, H, layers: list[Layer], damping: float, c: float):
        if c == 0:
            raise ValueError("c must not be zero: the Woodbury splitting divides by it")
        self.chain, self.damping, self.c = H.chain, float(damping), float(c)
        self.layers = layers
        self.groups = split_layers(H.chain)
        self.n = [layer.J.shape[0] for layer in self.layers]  # n_1 .. n_L, stacked activations
        self.p = [layer.J.shape[1] for layer in self.layers]
        self.n0 = self.groups[0][0].inputs.numel()
        self._like = self.layers[0].J

    def _sub_diagonal(self, rows, cols, blocks) -> BlockMatrix:
        return BlockMatrix(rows, cols, {(i, i - 1): b for i, b in enumerate(blocks) if i > 0}, self._like)

    @cached_property
    def M(self) -> BlockMatrix:
        """(7): unit block-bidiagonal, -A_l below the diagonal; b M = e_L is backpropagation."""
        below = [-layer.A if layer.A is not None else None for layer in self.layers]
        return BlockMatrix.identity(self.n, self._like) + self._sub_diagonal(self.n, self.n, below)

    @cached_property
    def P(self) -> BlockMatrix:
        """(eq:P): the block down-shift (z_1 .. z_L) -> (z_0 .. z_{L-1}); its first block row is zero."""
        inputs = [self.n0, *self.n[:-1]]
        return self._sub_diagonal(inputs, self.n, [torch.eye(n).to(self._like) for n in inputs])

    @cached_property
    def D_x(self) -> BlockMatrix:
        """diag(J_l), J_l = grad_x f_l."""
        return BlockMatrix.diagonal([layer.J for layer in self.layers])

    @cached_property
    def e_L(self) -> Tensor:
        """(0, ..., 0, 1): selects the loss z_L."""
        out = self._like.new_zeros(sum(self.n))
        out[-1] = 1.0
        return out

    # -- the literal, uncontracted second derivatives ------------------------------------------------------------------

    @cached_property
    def b(self) -> list[Tensor]:
        """b_l = d z_L / d z_l as rows (n_l,), b_L = 1."""
        return [*(group[-1].b.flatten() for group in self.groups[:-1]), self._like.new_ones(1)]

    def _kron_b(self, sizes: list[int]) -> BlockMatrix:
        return BlockMatrix.diagonal(
            [torch.kron(torch.eye(m).to(b), b[None]) for m, b in zip(sizes, self.b, strict=True)]
        )

    @cached_property
    def D_D(self) -> BlockMatrix:
        """diag(I kron b_l), (p_l, p_l n_l)."""
        self._refuse_if_large()
        return self._kron_b(self.p)

    @cached_property
    def D_M(self) -> BlockMatrix:
        """diag(I kron b_l), (n_{l-1}, n_{l-1} n_l)."""
        self._refuse_if_large()
        return self._kron_b([self.n0, *self.n[:-1]])

    def _second(self, inner: int, outer: int) -> BlockMatrix:
        """diag of d vec(grad_inner f_l) / d outer; argument 0 is x, 1 is z. Column-major vec, as in the paper's appendix.

        By double backward, one output at a time (torch.func.hessian is wrong for LayerNorm in torch 2.14).
        """
        self._refuse_if_large()
        blocks = []
        for number, group in enumerate(self.groups):
            leaves = [group[0].x.requires_grad_(), group[0].inputs.detach().flatten().requires_grad_()]
            options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
            with torch.enable_grad():
                out = self._layer_output(number, *leaves)
                rows = []
                for entry in out:
                    (first,) = torch.autograd.grad(entry, leaves[inner], create_graph=True, materialize_grads=True)
                    second = None
                    if first.requires_grad:
                        eye = torch.eye(len(first)).to(first)
                        (second,) = torch.autograd.grad(first, leaves[outer], eye, **options)
                    rows.append(first.new_zeros(len(first), len(leaves[outer])) if second is None else second)
            blocks.append(torch.stack(rows, dim=1).flatten(0, 1))  # (inner, n, outer): n is the fast row index
        return BlockMatrix.diagonal(blocks)

    @cached_property
    def D_xx(self) -> BlockMatrix:
        """diag(grad_xx f_l), (n_l p_l, p_l)."""
        return self._second(0, 0)

    @cached_property
    def D_zx(self) -> BlockMatrix:
        """diag(grad_zx f_l): how grad_x f_l moves with z_{l-1}, (n_l p_l, n_{l-1})."""
        return self._second(0, 1)

    @cached_property
    def D_xz(self) -> BlockMatrix:
        """diag(grad_xz f_l): how grad_z f_l moves with x_l, (n_l n_{l-1}, p_l)."""
        return self._second(1, 0)

    @cached_property
    def D_zz(self) -> BlockMatrix:
        """diag(grad_zz f_l), (n_l n_{l-1}, n_{l-1})."""
        return self._second(1, 1)

    def _layer_output(self, number: int, x: Tensor, z: Tensor) -> Tensor:
        """f_l(x_l; stacked z_{l-1}) -> stacked z_l, straight from the modules (not from the contracted blocks)."""
        first, *rest = self.groups[number]
        out = functional_call(first.module, first.named(x), (z.view_as(first.inputs),))
        for stage in rest:
            out = stage.module(out)
        if number == len(self.groups) - 1:
            return self.chain.loss(out, self.chain.targets).reshape(1)
        return out.flatten()

    def _refuse_if_large(self) -> None:
        for number, (n, p, n_in) in enumerate(zip(self.n, self.p, [self.n0, *self.n[:-1]], strict=True), start=1):
            need = n * max(p, n_in) ** 2 * self._like.element_size()
            if need > LITERAL_LIMIT:
                raise MemoryError(
                    f"the uncontracted derivatives of layer {number} (n = {n}, p = {p}, inputs {n_in}) need {need:,} bytes, limit "
                    f"{LITERAL_LIMIT:,}: use fewer samples or a smaller network; Q, A, K and the solvers do not need them"
                )

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
        return BlockMatrix(
            self.n, self.n, {(i - 1, i - 1): layer.G for i, layer in enumerate(self.layers) if i > 0}, self._like
        )

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
            Q22_inv = _inverse(Q22)
        except torch.linalg.LinAlgError as error:
            raise SingularQError(
                f"Q_22 = D_D D_xx + (damping - c) I is singular ({error}): choose c different from the damping", 0
            ) from error
        S_inv = _inverse(Q11 - Q12 @ Q22_inv @ Q21)
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


def _inverse(diagonal: BlockMatrix) -> BlockMatrix:
    """Inverse of a block-diagonal matrix; a missing block counts as zero and is refused."""
    blocks = {}
    for i, size in enumerate(diagonal.row_sizes):
        inverse, info = torch.linalg.inv_ex(diagonal.submatrix_dense([i], [i]))
        if info.item() != 0 and size:
            raise torch.linalg.LinAlgError(f"diagonal block {i + 1} has no inverse")
        blocks[i, i] = inverse
    return BlockMatrix(diagonal.row_sizes, diagonal.col_sizes, blocks, diagonal._like)


def substitute(M: BlockMatrix, rhs: Tensor) -> Tensor:
    """M^-1 rhs for unit block-bidiagonal M, lower (forward substitution: forward propagation of a perturbation) or
    upper (backward substitution: backpropagation). O(L).
    """
    pieces = [piece.clone() for piece in rhs.split(M.row_sizes)]
    off_diagonal = sorted(key for key in M.blocks if key[0] != key[1])
    upper = bool(off_diagonal) and off_diagonal[0][0] < off_diagonal[0][1]
    for i, j in reversed(off_diagonal) if upper else off_diagonal:
        pieces[i] -= M.blocks[i, j] @ pieces[j]
    return torch.cat(pieces)


def gradient(H) -> Tensor:
    """(8) eq:gradient-matrix-form: e_L M^-1 D_x, one backward substitution and one product."""
    m = matrices(H)
    b = substitute(m.M.T, m.e_L)
    return m.D_x.T @ b


def product(H, v: Tensor) -> Tensor:
    """(9) eq:hessian times v, (P,) or (P, k), by two substitutions: Pearlmutter's algorithm in the paper's matrices. O(L)."""
    m = matrices(H)
    y = substitute(m.M, m.D_x @ v)
    z = substitute(m.M.T, m.DDzxP.T @ v + m.PtDMzzP @ y)
    return m.DDxx @ v + m.DDzxP @ y + m.D_x.T @ z


def four_steps(H, g: Tensor, damping: float, c: float = 1.0) -> Tensor:
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
    A22_inv = _inverse(A22)
    schur = BlockTridiagonalLU(A11 - A12 @ A22_inv @ A12.T, group_size=1)
    t_y = schur.solve(g_y - A12 @ (A22_inv @ g_x))
    t_x = A22_inv @ (g_x - A12.T @ t_y)
    # 4. the result, g / c - [D_x; I]^T g'' / c^2
    return g / c - m.T.T @ torch.cat([t_y, t_x]) / c**2


def woodbury(H, damping: float, c: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Factor v1's system in the form that never inverts Q; the result applies (H + damping I)^-1. Right for every batch.

    Cost: O(L (2 p + 2 B a)^3) flops, O(L (p + B a)^2) numbers, in float64.
    """
    m = _double_matrices(H, damping, c)
    lu = BlockTridiagonalLU(m.A_lifted.reorder(layer_major(4, len(m.layers))), group_size=4)

    def solve(g: Tensor) -> Tensor:
        g_x = g.double()
        g_y = m.D_x @ g_x
        right = [g_y, g_x, torch.zeros_like(g_y), torch.zeros_like(g_x)]
        _, _, t_y, t_x = _to_layer_major(right, [m.n, m.p, m.n, m.p], lu.solve)
        return (g_x / m.c - (m.D_x.T @ t_y + t_x) / m.c**2).to(g.dtype)

    return solve


def tridiagonal(H, damping: float) -> Callable[[Tensor], Tensor]:
    """Factor K' by block LDU (the paper's Algorithm 1, alg:hessian_inverse); the result applies (H + damping I)^-1.

    Cost: O(L (p + 2 B a)^3) flops, O(L (p + 2 B a)^2) numbers, in float64.
    """
    m = _double_matrices(H, damping)
    lu = BlockTridiagonalLU(m.K_pivoted, group_size=3)

    def solve(g: Tensor) -> Tensor:
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
