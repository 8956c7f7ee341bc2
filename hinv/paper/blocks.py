"""Block matrices: a partition of the rows, one of the columns, and a dictionary of the blocks that are not zero.

A matrix A with row sizes (2, 3), column sizes (2, 1) and blocks {(0, 0): a, (1, 1): c} is

        [ a  0 ]   2 rows, a is 2 x 2
    A = [ 0  c ]   3 rows, c is 3 x 1

A missing key is a zero block. Every matrix of the paper (M, P, D_x, Q, A, K ...) has this form with O(L) blocks for an
L-layer network, so storage and products are linear in L. One class serves them all: block-diagonal, bidiagonal and
tridiagonal are patterns of the dictionary, not types.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from hinv.shapes import Bool, Float, Int


class BlockMatrix:
    """A partitioned matrix with only its nonzero blocks stored.

    Args:
        row_sizes: rows of each block row.
        col_sizes: columns of each block column.
        blocks: {(i, j): tensor of shape (row_sizes[i], col_sizes[j])}.
        like: a tensor whose dtype and device the zeros take; needed only when `blocks` is empty.

    Raises:
        ValueError: a block outside the partition or of the wrong shape, named by its index.
    """

    def __init__(
        self,
        row_sizes: Sequence[int],
        col_sizes: Sequence[int],
        blocks: Mapping[tuple[int, int], Float[Tensor, "_ _"]],
        like: Tensor | None = None,
    ):
        self.row_sizes, self.col_sizes = tuple(row_sizes), tuple(col_sizes)
        self.blocks = dict(blocks)
        for (i, j), block in self.blocks.items():
            if not (0 <= i < len(self.row_sizes) and 0 <= j < len(self.col_sizes)):
                raise ValueError(
                    f"block ({i}, {j}) lies outside a {len(self.row_sizes)} x {len(self.col_sizes)} partition"
                )
            expected = (self.row_sizes[i], self.col_sizes[j])
            if tuple(block.shape) != expected:
                raise ValueError(f"block ({i}, {j}) has shape {tuple(block.shape)}; the partition says {expected}")
        like = next(iter(self.blocks.values()), like)
        if like is None:
            raise ValueError("a BlockMatrix without blocks needs like=<tensor> to know its dtype and device")
        self._like = like

    @classmethod
    def diagonal(cls, blocks: Sequence[Float[Tensor, "_ _"]]) -> "BlockMatrix":
        """diag(blocks[0], blocks[1], ...); the blocks may be rectangular."""
        return cls(
            [b.shape[0] for b in blocks], [b.shape[1] for b in blocks], {(i, i): b for i, b in enumerate(blocks)}
        )

    @classmethod
    def identity(cls, sizes: Sequence[int], like: Tensor) -> "BlockMatrix":
        return cls.diagonal([torch.eye(n, dtype=like.dtype, device=like.device) for n in sizes])

    @classmethod
    def compose(cls, grid: Sequence[Sequence["BlockMatrix | None"]]) -> "BlockMatrix":
        """[[A, B], [C, None]] as one BlockMatrix whose partition lists A's rows, then C's (None is zero).

        Raises:
            ValueError: neighbours in one row (column) of the grid whose row (column) partitions differ.
        """
        rows = [_shared([m.row_sizes for m in line if m is not None], "row") for line in grid]
        cols = [
            _shared([m.col_sizes for m in (line[j] for line in grid) if m is not None], "column")
            for j in range(len(grid[0]))
        ]
        blocks: dict[tuple[int, int], Tensor] = {}
        like = None
        for r, line in enumerate(grid):
            for c, matrix in enumerate(line):
                if matrix is None:
                    continue
                like = matrix._like
                down, right = sum(map(len, rows[:r])), sum(map(len, cols[:c]))
                blocks.update({(down + i, right + j): b for (i, j), b in matrix.blocks.items()})
        return cls(sum(rows, ()), sum(cols, ()), blocks, like=like)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.row_sizes), sum(self.col_sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def T(self) -> "BlockMatrix":
        return BlockMatrix(
            self.col_sizes, self.row_sizes, {(j, i): b.T for (i, j), b in self.blocks.items()}, self._like
        )

    def __repr__(self) -> str:
        return (
            f"BlockMatrix({self.shape[0]} x {self.shape[1]}, {len(self.row_sizes)} x {len(self.col_sizes)} blocks, "
            f"{len(self.blocks)} nonzero)"
        )

    def __add__(self, other: "BlockMatrix") -> "BlockMatrix":
        _shared([self.row_sizes, other.row_sizes], "row")
        _shared([self.col_sizes, other.col_sizes], "column")
        blocks = dict(self.blocks)
        for key, block in other.blocks.items():
            blocks[key] = blocks[key] + block if key in blocks else block
        return BlockMatrix(self.row_sizes, self.col_sizes, blocks, self._like)

    def __neg__(self) -> "BlockMatrix":
        return self * -1.0

    def __sub__(self, other: "BlockMatrix") -> "BlockMatrix":
        return self + (-other)

    def __mul__(self, scalar: float) -> "BlockMatrix":
        blocks = {key: scalar * block for key, block in self.blocks.items()}
        return BlockMatrix(self.row_sizes, self.col_sizes, blocks, self._like)

    __rmul__ = __mul__

    def __truediv__(self, scalar: float) -> "BlockMatrix":
        return self * (1.0 / scalar)

    @overload
    def __matmul__(self, other: "BlockMatrix") -> "BlockMatrix": ...

    @overload
    def __matmul__(self, other: Float[Tensor, "n *k"]) -> Float[Tensor, "m *k"]: ...

    def __matmul__(self, other: "BlockMatrix | Float[Tensor, 'n *k']") -> "BlockMatrix | Float[Tensor, 'm *k']":
        """Times another BlockMatrix, a vector (n,) or a matrix (n, k); work is proportional to the blocks that meet."""
        if isinstance(other, Tensor):
            if other.shape[0] != self.shape[1]:
                raise ValueError(f"cannot multiply {self} by a tensor with {other.shape[0]} rows")
            pieces = other.split(self.col_sizes)
            out = other.new_zeros(self.shape[0], *other.shape[1:])
            rows = out.split(self.row_sizes) if self.row_sizes else ()
            for (i, j), block in self.blocks.items():
                rows[i].add_(block @ pieces[j])
            return out
        _shared([self.col_sizes, other.row_sizes], "inner")
        by_row: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for (j, k), block in other.blocks.items():
            by_row[j].append((k, block))
        blocks: dict[tuple[int, int], Tensor] = {}
        for (i, j), left in self.blocks.items():
            for k, right in by_row[j]:
                product = left @ right
                blocks[i, k] = blocks[i, k] + product if (i, k) in blocks else product
        return BlockMatrix(self.row_sizes, other.col_sizes, blocks, self._like)

    def take(self, rows: Sequence[int], cols: Sequence[int]) -> "BlockMatrix":
        """The submatrix of these block rows and block columns, in this order (a reordering or a restriction).

        Costs O(len(rows) + len(cols) + blocks); for a few rows of a long matrix use `submatrix_dense`.
        """
        to_row, to_col = {i: r for r, i in enumerate(rows)}, {j: c for c, j in enumerate(cols)}
        blocks = {(to_row[i], to_col[j]): b for (i, j), b in self.blocks.items() if i in to_row and j in to_col}
        return BlockMatrix([self.row_sizes[i] for i in rows], [self.col_sizes[j] for j in cols], blocks, self._like)

    def reorder(self, order: Sequence[int]) -> "BlockMatrix":
        """Pi A Pi^T: block rows and block columns listed in `order`, for example `layer_major(3, L)`."""
        return self.take(order, order)

    def dense(self) -> Float[Tensor, "m n"]:
        return self.submatrix_dense(range(len(self.row_sizes)), range(len(self.col_sizes)))

    def submatrix_dense(self, rows: Sequence[int], cols: Sequence[int]) -> Float[Tensor, "m n"]:
        """These block rows and columns as one dense tensor, without a pass over the other blocks."""
        out = self._like.new_zeros(sum(self.row_sizes[i] for i in rows), sum(self.col_sizes[j] for j in cols))
        top = 0
        for i in rows:
            left = 0
            for j in cols:
                if (i, j) in self.blocks:
                    out[top : top + self.row_sizes[i], left : left + self.col_sizes[j]] = self.blocks[i, j]
                left += self.col_sizes[j]
            top += self.row_sizes[i]
        return out

    def pattern(self) -> Bool[Tensor, "rows cols"]:
        """(block rows, block columns) of bool: which blocks are stored."""
        out = torch.zeros(len(self.row_sizes), len(self.col_sizes), dtype=torch.bool, device="cpu")
        for key in self.blocks:
            out[key] = True
        return out


def layer_major(components: int, layers: int) -> list[int]:
    """The order x_1, y_1, z_1, x_2, y_2, z_2, ... of blocks listed as x_1 .. x_L, y_1 .. y_L, z_1 .. z_L."""
    return [c * layers + layer for layer in range(layers) for c in range(components)]


def _shared(partitions: Sequence[tuple[int, ...]], what: str) -> tuple[int, ...]:
    if not partitions:
        raise ValueError(f"a {what} of the grid holds only zeros (None): its {what} partition is unknown")
    if any(p != partitions[0] for p in partitions):
        raise ValueError(f"{what} partitions differ: {' and '.join(str(p) for p in sorted(set(partitions)))}")
    return partitions[0]


class BlockTridiagonalLU:
    """Block LDU of a matrix that is block-tridiagonal in groups of consecutive blocks.

        Delta_1 = B_11,    Delta_l = B_ll - B_{l,l-1} Delta_{l-1}^-1 B_{l-1,l}

    (the paper's Section "Applying the inverse of the Hessian", after eq:K-pivoted). Only the rows of B_{l-1,l} and the
    columns of B_{l,l-1} that hold a block take part in the update. Pivoting happens inside each Delta_l (LU with
    partial pivoting), not across groups: a small Delta_l loses digits, and the caller must look at the residual.

    Args:
        matrix: square BlockMatrix, its blocks already listed group by group.
        group_size: blocks in each group (3 for K's x, y, z).

    Cost: for group dimension w and coupling rank n, about (2/3) w^3 + 2 w^2 n flops each; storage w^2. Linear in the number of groups.

    Raises:
        ValueError: a block outside the three block diagonals.
        torch.linalg.LinAlgError: an exactly singular Delta_l, with the number of its group.
    """

    def __init__(self, matrix: BlockMatrix, group_size: int):
        if matrix.row_sizes != matrix.col_sizes or len(matrix.row_sizes) % group_size:
            raise ValueError(f"{matrix} does not split into square groups of {group_size} blocks")
        outside = [key for key in matrix.blocks if abs(key[0] // group_size - key[1] // group_size) > 1]
        if outside:
            raise ValueError(f"not block-tridiagonal in groups of {group_size}: block {outside[0]} is set")
        count = len(matrix.row_sizes) // group_size
        self._sizes = [sum(matrix.row_sizes[g * group_size : (g + 1) * group_size]) for g in range(count)]
        self._pivots: list[tuple[Tensor, Tensor]] = []
        self._lower: list[_Coupling] = []
        self._upper: list[_Coupling] = []
        update = None
        for g in range(count):
            here = range(g * group_size, (g + 1) * group_size)
            delta = matrix.submatrix_dense(here, here)
            if update is not None:
                rows, cols, value = update
                delta[rows[:, None], cols[None, :]] -= value
            lu, piv, info = torch.linalg.lu_factor_ex(delta)
            if info.item() != 0:
                raise torch.linalg.LinAlgError(
                    f"pivot block {g + 1} of {count} is exactly singular; change the damping, or use a method that "
                    "pivots across layers (method='dense')"
                )
            self._pivots.append((lu, piv))
            if g + 1 == count:
                break
            after = range((g + 1) * group_size, (g + 2) * group_size)
            lower = _Coupling(matrix, after, here)
            upper = _Coupling(matrix, here, after)
            self._lower.append(lower)
            self._upper.append(upper)
            selected = delta.new_zeros(len(delta), len(upper.rows))
            selected[upper.rows, torch.arange(len(upper.rows), device=delta.device)] = 1.0
            between = torch.linalg.lu_solve(lu, piv, selected)[
                lower.cols
            ]  # columns of Delta^-1 that meet both couplings
            update = lower.rows, upper.cols, lower.value @ (between @ upper.value)

    def solve(self, rhs: Float[Tensor, "n *k"]) -> Float[Tensor, "n *k"]:
        """matrix^-1 rhs for rhs (n,) or (n, k): one forward and one backward substitution."""
        if not self._sizes:
            return rhs
        columns = rhs.reshape(len(rhs), -1)
        forward = [piece.clone() for piece in columns.split(self._sizes)]
        for g, lower in enumerate(self._lower):
            done = torch.linalg.lu_solve(*self._pivots[g], forward[g])
            forward[g + 1][lower.rows] -= lower.value @ done[lower.cols]
        solution = forward
        for g in reversed(range(len(self._sizes))):
            if g < len(self._upper):
                upper = self._upper[g]
                solution[g][upper.rows] -= upper.value @ solution[g + 1][upper.cols]
            solution[g] = torch.linalg.lu_solve(*self._pivots[g], solution[g])
        return torch.cat(solution).reshape(rhs.shape)


class _Coupling:
    """The nonzero rows and columns of one off-diagonal group block: value = block[rows][:, cols]."""

    def __init__(self, matrix: BlockMatrix, rows: range, cols: range):
        used_rows = [i for i in rows if any((i, j) in matrix.blocks for j in cols)]
        used_cols = [j for j in cols if any((i, j) in matrix.blocks for i in rows)]
        device = matrix._like.device
        self.rows = _positions(matrix.row_sizes, rows, used_rows).to(device)
        self.cols = _positions(matrix.col_sizes, cols, used_cols).to(device)
        self.value = matrix.submatrix_dense(used_rows, used_cols)


def _positions(sizes: Sequence[int], group: range, used: Sequence[int]) -> Int[Tensor, " n"]:
    """Entry numbers, counted from the group's first entry, of the used blocks."""
    out, start = [torch.zeros(0, dtype=torch.long, device="cpu")], 0
    for i in group:
        if i in used:
            out.append(torch.arange(start, start + sizes[i], device="cpu"))
        start += sizes[i]
    return torch.cat(out)
