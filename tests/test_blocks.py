import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from hinv.paper import BlockMatrix, BlockTridiagonalLU, layer_major

sizes = st.lists(st.integers(0, 3), min_size=1, max_size=4)


def random_matrix(rows, cols, seed, density=0.6):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    blocks = {
        (i, j): torch.randn(m, n, generator=generator, dtype=torch.float64)
        for i, m in enumerate(rows)
        for j, n in enumerate(cols)
        if torch.rand((), generator=generator) < density
    }
    return BlockMatrix(rows, cols, blocks, like=torch.zeros(0, dtype=torch.float64))


def test_dense_is_the_definition_entry_by_entry():
    a, c = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0], [6.0], [7.0]])
    matrix = BlockMatrix((2, 3), (2, 1), {(0, 0): a, (1, 1): c})
    expected = torch.tensor([[1.0, 2, 0], [3, 4, 0], [0, 0, 5], [0, 0, 6], [0, 0, 7]])
    assert torch.equal(matrix.dense(), expected)
    assert matrix.shape == (5, 3)
    assert matrix.pattern().tolist() == [[True, False], [False, True]]


@settings(deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 99))
def test_arithmetic_agrees_with_dense(rows, inner, cols, seed):
    A, B, C = (
        random_matrix(rows, inner, seed),
        random_matrix(inner, cols, seed + 1),
        random_matrix(rows, inner, seed + 2),
    )
    torch.testing.assert_close((A @ B).dense(), A.dense() @ B.dense())
    torch.testing.assert_close((A + C).dense(), A.dense() + C.dense())
    torch.testing.assert_close((2.5 * A - C / 2).dense(), 2.5 * A.dense() - C.dense() / 2)
    assert torch.equal(A.T.dense(), A.dense().T)
    v = torch.randn(A.shape[1], 2, dtype=torch.float64)
    torch.testing.assert_close(A @ v, A.dense() @ v)
    torch.testing.assert_close(A @ v[:, 0], A.dense() @ v[:, 0])


def test_compose_and_reorder():
    A, B, C = (
        random_matrix((1, 2), (2, 1), 0, 1.0),
        random_matrix((1, 2), (3,), 1, 1.0),
        random_matrix((2,), (2, 1), 2, 1.0),
    )
    joined = BlockMatrix.compose([[A, B], [C, None]])
    top = torch.cat([A.dense(), B.dense()], 1)
    bottom = torch.cat([C.dense(), torch.zeros(2, 3, dtype=torch.float64)], 1)
    assert torch.equal(joined.dense(), torch.cat([top, bottom]))
    square = random_matrix((1, 2, 3, 1, 2, 3), (1, 2, 3, 1, 2, 3), 3)
    order = layer_major(2, 3)
    assert order == [0, 3, 1, 4, 2, 5]
    moved = square.reorder(order)
    for i in range(6):
        for j in range(6):
            assert ((i, j) in moved.blocks) == ((order[i], order[j]) in square.blocks)
            if (i, j) in moved.blocks:
                assert torch.equal(moved.blocks[i, j], square.blocks[order[i], order[j]])


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_tridiagonal_lu_solves(group, seed):
    blocks = [2, 3, 1] * 4
    full = random_matrix(blocks, blocks, seed, density=0.7)
    kept = {k: b for k, b in full.blocks.items() if abs(k[0] // group - k[1] // group) <= 1}
    eye = BlockMatrix.identity(blocks, full._like)
    matrix = BlockMatrix(blocks, blocks, kept) + 4 * eye
    rhs = torch.randn(sum(blocks), 2, dtype=torch.float64)
    lu = BlockTridiagonalLU(matrix, group)
    torch.testing.assert_close(matrix.dense() @ lu.solve(rhs), rhs)
    torch.testing.assert_close(lu.solve(rhs[:, 1]), lu.solve(rhs)[:, 1])


def test_tridiagonal_lu_refuses():
    eye = BlockMatrix.identity([2, 2, 2], torch.zeros(0))
    far = eye + BlockMatrix([2, 2, 2], [2, 2, 2], {(0, 2): torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"not block-tridiagonal in groups of 1: block \(0, 2\)"):
        BlockTridiagonalLU(far, 1)
    with pytest.raises(ValueError, match="does not split into square groups of 2"):
        BlockTridiagonalLU(eye, 2)
    singular = BlockMatrix([2, 2], [2, 2], {(0, 0): torch.eye(2), (1, 1): torch.zeros(2, 2)})
    with pytest.raises(torch.linalg.LinAlgError, match="pivot block 2 of 2 is exactly singular"):
        BlockTridiagonalLU(singular, 1)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"block \(0, 1\) has shape \(2, 2\); the partition says \(2, 3\)"):
        BlockMatrix((2,), (2, 3), {(0, 1): torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"block \(1, 0\) lies outside"):
        BlockMatrix((2,), (2,), {(1, 0): torch.ones(2, 2)})
    with pytest.raises(ValueError, match="needs like="):
        BlockMatrix((2,), (2,), {})
    A, B = BlockMatrix.identity([2], torch.zeros(0)), BlockMatrix.identity([3], torch.zeros(0))
    for operation in (lambda: A + B, lambda: A @ B, lambda: BlockMatrix.compose([[A, B]])):
        with pytest.raises(ValueError, match="partitions differ"):
            operation()
    with pytest.raises(ValueError, match="by a tensor with 3 rows"):
        A @ torch.ones(3)
    with pytest.raises(ValueError, match="holds only zeros"):
        BlockMatrix.compose([[A, None]])
