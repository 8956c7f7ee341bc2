"""The paper, equation by equation. EQUATIONS.md points at the tests of this file."""

import pytest
import torch
from conftest import DEVICE, build, reference_hessian, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hinv import Hessian, paper, tall_skinny

SMALL = ["tanh, cross-entropy", "sigmoid, MSE", "layernorm", "residual blocks", "one layer", "frozen layers", "relu"]


@pytest.fixture(params=SMALL)
def H(request):
    return Hessian(*build(request.param))


def network(sizes, batch, classes=None, seed=0, **options):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(batch, sizes[0], generator=generator, dtype=torch.float64)
    return Hessian(tall_skinny(sizes, seed=seed, **options), nn.CrossEntropyLoss(), x, torch.arange(batch) % sizes[-1])


def test_gradient_is_a_block_bidiagonal_solve(H):
    assert relative(paper.gradient(H), H.gradient) < 1e-12
    m = paper.matrices(H)
    b = torch.linalg.solve(m.M.dense().T, m.e_L)
    assert relative(m.D_x.dense().T @ b, H.gradient) < 1e-12


def test_M_is_unit_lower_bidiagonal_and_b_solves_it(H):
    m = paper.matrices(H)
    L = len(m.layers)
    assert set(m.M.blocks) == {(i, i) for i in range(L)} | {(i, i - 1) for i in range(1, L)}
    assert torch.linalg.det(m.M.dense()).item() == pytest.approx(1.0)
    assert relative(torch.cat(m.b), paper.substitute(m.M.T, m.e_L)) < 1e-12


def test_P_shifts_down(H):
    """P (z_1 .. z_L) = (0, z_1 .. z_{L-1})."""
    m = paper.matrices(H)
    z = torch.randn(sum(m.n), dtype=H.dtype)
    kept = sum(m.n[:-1])
    assert torch.equal(m.P @ z, torch.cat([torch.zeros(m.n0, dtype=H.dtype), z[:kept]]))


def test_hessian_formula_with_literal_third_order_tensors(H):
    """(9) from D_D, D_M, D_xx, D_zx, D_xz, D_zz as written, M inverted densely."""
    m = paper.matrices(H)
    X = m.D_x.dense()
    Y = m.P.dense() @ torch.linalg.solve(m.M.dense(), X)
    D_D, D_M = m.D_D.dense(), m.D_M.dense()
    formula = (
        D_D @ m.D_xx.dense() + D_D @ m.D_zx.dense() @ Y + Y.T @ D_M @ m.D_xz.dense() + Y.T @ D_M @ m.D_zz.dense() @ Y
    )
    assert relative(formula, reference_hessian(H.chain.model, H.chain.loss, H.chain.inputs, H.chain.targets)) < 1e-10


def test_contraction_gives_the_blocks_the_algorithms_use(H):
    m = paper.matrices(H)
    for literal, ours in (
        (m.D_D @ m.D_xx, m.DDxx),
        (m.D_D @ m.D_zx @ m.P, m.DDzxP),
        (m.P.T @ m.D_M @ m.D_xz, m.DDzxP.T),
        (m.P.T @ m.D_M @ m.D_zz @ m.P, m.PtDMzzP),
    ):
        torch.testing.assert_close(literal.dense(), ours.dense(), rtol=1e-10, atol=1e-13)


def test_product_is_pearlmutters(problem):
    """O(L) product through the paper's matrices = double backward = torch.func.hessian times V."""
    H = Hessian(*problem)
    V = torch.randn(H.shape[0], 2, generator=torch.Generator(DEVICE).manual_seed(0), dtype=H.dtype)
    assert relative(paper.product(H, V), H @ V) < 1e-10
    assert relative(paper.product(H, V), reference_hessian(*problem) @ V) < 1e-10
    assert relative(paper.product(H, V[:, 0]), H @ V[:, 0]) < 1e-10


def test_K_solves_the_unified_system(H):
    """(13): K [x; y; z] = [g; 0; 0] gives (H + eps I) x = g, y = M^-1 D_x x."""
    m = paper.matrices(H, damping=0.3)
    g = H.gradient
    solution = torch.linalg.solve(m.K.dense(), torch.cat([g, torch.zeros(2 * sum(m.n), dtype=H.dtype)]))
    x, y, _ = solution.split([sum(m.p), sum(m.n), sum(m.n)])
    assert relative(H @ x + 0.3 * x, g) < 1e-10
    assert relative(y, paper.substitute(m.M, m.D_x @ x)) < 1e-10


def test_K_pivoted_is_a_tridiagonal_permutation_of_K(H):
    m = paper.matrices(H)
    pattern = m.K_pivoted.pattern()
    rows, cols = pattern.nonzero(as_tuple=True)
    assert ((rows // 3 - cols // 3).abs() <= 1).all()
    assert m.K_pivoted.shape == m.K.shape and len(m.K_pivoted.blocks) == len(m.K.blocks)
    s, t = (torch.linalg.svdvals(matrix.dense()) for matrix in (m.K, m.K_pivoted))
    torch.testing.assert_close(s, t)


def test_Q_as_published_is_singular_for_every_network(H):
    """Its row and column of the loss z_L are zero."""
    m = paper.matrices(H, damping=0.1)
    dead = sum(m.n) - 1
    Q = m.Q.dense()
    assert (Q[dead] == 0).all() and (Q[:, dead] == 0).all()
    assert torch.linalg.matrix_rank(Q) < len(Q)
    assert torch.equal(Q, Q.T) or relative(Q, Q.T) < 1e-14


def test_woodbury_splitting_is_the_damped_hessian(H):
    """H + eps I = c I + [D_x; I]^T Mhat^-T Q Mhat^-1 [D_x; I] for any c, eps = c included."""
    for damping, c in ((0.1, 1.0), (0.5, 0.5), (0.01, -2.0)):
        m = paper.matrices(H, damping, c)
        top = torch.cat([torch.linalg.solve(m.M.dense(), m.D_x.dense()), torch.eye(H.shape[0], dtype=H.dtype)])
        expected = H.dense() + damping * torch.eye(H.shape[0], dtype=H.dtype)
        assert relative(c * torch.eye(H.shape[0], dtype=H.dtype) + top.T @ m.Q.dense() @ top, expected) < 1e-12


@pytest.mark.parametrize("batch", range(1, 13))
def test_nullity_of_the_repaired_Q_against_batch(batch):
    """Widths 6-5-5-4 (C = 4): nullity 2 (B - 3) from B = 4 on, and the named error carries it."""
    H = network((6, 5, 5, 4), batch)
    m = paper.matrices(H, damping=0.1)
    expected = max(0, 2 * (batch - 3))
    dense = m.Q_reduced.dense()
    assert m.nullity == expected == len(dense) - torch.linalg.matrix_rank(dense, hermitian=True).item()
    reference = torch.linalg.solve(H.dense() + 0.1 * torch.eye(H.shape[0], dtype=H.dtype), H.gradient)
    if expected:
        with pytest.raises(paper.SingularQError, match=f"Q has nullity {expected} even without its dead row") as error:
            paper.four_steps(H, H.gradient, damping=0.1)
        assert error.value.nullity == expected
    else:
        assert relative(paper.four_steps(H, H.gradient, damping=0.1), reference) < 1e-8
    assert relative(paper.woodbury(H, 0.1)(H.gradient), reference) < 1e-8


@pytest.mark.parametrize("sizes", [(6, 5, 5, 4), (4, 4, 4, 4, 4, 5), (3, 2), (5, 4, 3, 3)])
@pytest.mark.parametrize("damping", [1.0, 0.1, 0.01])
def test_four_steps_where_Q_has_an_inverse(sizes, damping):
    H = network(sizes, batch=1, gain=1.3)
    reference = torch.linalg.solve(H.dense() + damping * torch.eye(H.shape[0], dtype=H.dtype), H.gradient)
    c = 2.0 if damping == 1.0 else 1.0  # c = damping makes Q_22 = E singular
    assert relative(paper.four_steps(H, H.gradient, damping, c), reference) < 1e-8


def test_A_is_its_definition():
    H = network((6, 5, 5, 4), batch=2)
    m = paper.matrices(H, damping=0.1)
    M_hat = torch.block_diag(m.M_reduced.dense(), torch.eye(H.shape[0], dtype=H.dtype))
    T = m.T.dense()
    expected = M_hat @ torch.linalg.inv(m.Q_reduced.dense()) @ M_hat.T + T @ T.T
    assert relative(m.A.dense(), expected) < 1e-10
    bands = {abs(i - j) for i, j in m.A.take(range(2), range(2)).blocks}
    assert bands <= {0, 1}


def test_c_equal_to_damping():
    H = network((6, 5, 5, 4), batch=2, bias=False)
    with pytest.raises(paper.SingularQError, match=r"Q has nullity|choose c different from the damping"):
        paper.four_steps(H, H.gradient, damping=1.0, c=1.0)
    reference = torch.linalg.solve(H.dense() + torch.eye(H.shape[0], dtype=H.dtype), H.gradient)
    assert relative(paper.woodbury(H, 1.0, c=1.0)(H.gradient), reference) < 1e-10
    with pytest.raises(ValueError, match="c must not be zero"):
        paper.matrices(H, c=0.0)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    batch=st.integers(1, 6),
    bias=st.booleans(),
    activation=st.sampled_from([nn.Tanh, nn.Sigmoid, nn.Softplus, nn.SiLU]),
    damping=st.sampled_from([1.0, 0.1, 0.01]),
    seed=st.integers(0, 50),
)
def test_both_algorithms_on_random_shapes(widths, batch, bias, activation, damping, seed):
    sizes = [*widths, widths[-1] + 1]
    H = network(sizes, batch, seed=seed, activation=activation, bias=bias)
    D = H.dense() + damping * torch.eye(H.shape[0], dtype=H.dtype)
    g = torch.randn(H.shape[0], generator=torch.Generator(DEVICE).manual_seed(seed), dtype=H.dtype)
    reference = torch.linalg.solve(D, g)
    condition = torch.linalg.cond(D).item()
    for method in ("tridiagonal", "woodbury"):
        x = H.solve(g, damping, method)
        assert relative(x, reference) < 1e-8 * max(1.0, condition * 1e-6)
    assert relative(paper.product(H, g), H @ g) < 1e-10 or (H @ g).norm() < 1e-12


def test_storage_is_linear_in_depth():
    """Twice the layers, twice the stored numbers, for K and for the lifted form of A; no block grows."""

    def stored(depth):
        m = paper.matrices(network((4, *[4] * depth, 3), batch=3))
        return [
            (sum(b.numel() for b in matrix.blocks.values()), max(b.numel() for b in matrix.blocks.values()))
            for matrix in (m.K, m.A_lifted)
        ]

    for (one, _), (two, large), (three, larger) in zip(stored(8), stored(16), stored(24), strict=True):
        assert three - two == two - one
        assert large == larger


@pytest.mark.parametrize("method", ["tridiagonal", "woodbury"])
def test_no_dense_array_of_the_whole(monkeypatch, method):
    """No dense() and no factorization larger than one layer's group of unknowns."""
    H = network((4, *[4] * 20, 3), batch=3)
    largest = []
    factor = torch.linalg.lu_factor_ex
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", lambda A: (largest.append(len(A)), factor(A))[1])
    for name in ("solve", "inv", "solve_ex"):
        monkeypatch.setattr(torch.linalg, name, lambda *_: pytest.fail("a dense solve"))
    monkeypatch.setattr(paper.BlockMatrix, "dense", lambda *_: pytest.fail("a dense matrix"))
    H.solve(H.gradient, 0.1, method=method)
    group = (4 * 5 + 2 * 12) if method == "tridiagonal" else 2 * (4 * 5 + 12)
    assert len(largest) == 21 and max(largest) <= group


@pytest.mark.parametrize("width", [3, 4, 5, 7])
@pytest.mark.parametrize("batch", [2, 4, 6, 9])
def test_nullity_grows_with_the_last_hidden_width_and_the_batch(width, batch):
    """(a - C + 1)(B - C + 1) for C = 4 classes where both are positive: a narrow last layer keeps Q regular at every batch."""
    H = network((6, width, width, 4), batch)
    m = paper.matrices(H, damping=0.1)
    assert m.nullity == max(0, width - 3) * max(0, batch - 3)
    if m.nullity == 0:
        reference = torch.linalg.solve(H.dense() + 0.1 * torch.eye(H.shape[0], dtype=H.dtype), H.gradient)
        assert relative(paper.four_steps(H, H.gradient, damping=0.1), reference) < 1e-8


def test_literal_tensors_of_a_large_layer_are_refused():
    H = network((64, 32, 10), batch=32)
    with pytest.raises(MemoryError, match=r"uncontracted derivatives of layer 1 .* need .* bytes"):
        _ = paper.matrices(H).D_xx
