import numpy as np
import pytest
import torch
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from hinv.solver.small import Small
from hinv.solver.symmetric import (
    LDL,
    WIDE,
    Cholesky,
    Eigen,
    SingularPivotError,
    Unpivoted,
    factored,
    in_place,
    subtract_product,
)


def matrix(kind, n, seed, dtype=torch.float64):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=dtype)
    A = A + A.T
    if kind == "definite":
        A = A @ A + torch.eye(n, dtype=dtype)
    elif kind == "zero diagonal":  # forces 2 x 2 pivots
        A = A - torch.diag(A.diagonal())
    elif kind == "negative":
        A = -(A @ A) - torch.eye(n, dtype=dtype)
    return A


def check(S, A, tolerance):
    """Everything the elimination asks of a factored A (or stack), against the definition."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype).expand_as(A)
    torch.testing.assert_close(A @ S.solve(eye), eye, **tolerance)
    values = torch.linalg.eigvalsh(A)
    assert S.negative == int((values < 0).sum())
    assert S.log_abs_det == pytest.approx(torch.linalg.slogdet(A)[1].sum().item(), rel=1e-9, abs=1e-9)


@given(
    kind=st.sampled_from(["indefinite", "definite", "zero diagonal", "negative"]),
    n=st.integers(2, 24),
    seed=st.integers(0, 500),
    try_cholesky=st.booleans(),
)
def test_solves_inertia_and_determinant(kind, n, seed, try_cholesky):
    A = matrix(kind, n, seed)
    values = torch.linalg.eigvalsh(A)
    if values.abs().min() < 1e-6 * values.abs().max():
        return
    S = factored(A.clone(), try_cholesky)
    assert isinstance(S, Cholesky if values[0] > 0 and try_cholesky else LDL if DEVICE == "cpu" else LDL | Unpivoted)
    condition = (values.abs().max() / values.abs().min()).item()
    check(S, A, {"rtol": 1e-13 * condition, "atol": 1e-13 * condition})
    torch.testing.assert_close(
        S.half(A).T @ S.over_D(S.half(A)), A, rtol=1e-10, atol=1e-11 * values.abs().max().item() * condition
    )


@pytest.mark.parametrize("kind", ["indefinite", "definite", "zero diagonal"])
@pytest.mark.parametrize("n", [2, 7, 96, 200])
@pytest.mark.parametrize("arrays", [False, True])
def test_couple_and_sweeps(kind, n, arrays):
    """V - N^T S^-1 N, and what takes N's place: N^T S^-1 t = Y^T u, S^-1 (t - N y) = back(w - Y y); with tensors and with arrays."""
    A = matrix(kind, n, 3)
    generator = torch.Generator(DEVICE).manual_seed(1)
    shapes = ((n, 90), (90, 90), (n, 2), (90, 2))
    N, V, t, y = (torch.randn(r, c, generator=generator, dtype=torch.float64) for r, c in shapes)
    V = V + V.T
    kept = N.clone()  # overwritten by couple
    expected = V - N.T @ torch.linalg.solve(A, N), N.T @ torch.linalg.solve(A, t), torch.linalg.solve(A, t - N @ y)
    S = Small(A.cpu().numpy().copy(), kind == "definite") if arrays else factored(A.clone())
    if arrays:
        N, V, t, y = (X.cpu().numpy().copy() for X in (N, V, t, y))
    Y = S.couple(N, V)
    u, w = S.start(t)
    values = torch.linalg.eigvalsh(A)
    atol = 1e-9
    if isinstance(S, Unpivoted):  # rounding errors of |L| |D| |L^T|, which may have grown, met by S^-1 N on both sides
        grown = (S.L.abs() @ (S.inverse.reciprocal().abs() * S.L.abs().T)).max().item()
        size = max(torch.linalg.matrix_norm(X, 2).item() for X in (kept, t, t - kept @ y))
        atol = max(1e-9, torch.finfo(A.dtype).eps * grown * (size / values.abs().min().item()) ** 2)
    for ours, dense in zip((V, Y.T @ u, S.back(w - Y @ y)), expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours).cpu(), dense.cpu(), rtol=1e-9, atol=atol)
    assert S.negative == int((values < 0).sum())
    assert S.log_abs_det == pytest.approx(torch.linalg.slogdet(A)[1].item(), rel=1e-11, abs=1e-11)


def test_product_by_block_rows():
    X, D = torch.randn(20, WIDE + 3).double(), torch.randn(20, 1).double()
    V = torch.zeros(WIDE + 3, WIDE + 3).double()
    subtract_product(V, X, D * X)
    torch.testing.assert_close(V, -X.T @ (D * X))
    assert torch.equal(V, V.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 7, 130])
def test_ldl_in_place_is_torchs_own(n, dtype):
    """That torch writes into its input where input and output are one tensor, stored by columns, is said nowhere."""
    A = matrix("zero diagonal", n, 3, dtype).cpu()
    packed, pivots, _ = torch.linalg.ldl_factor_ex(A)
    S = A.clone()
    ours, our_pivots = in_place(S)
    assert ours.data_ptr() == S.data_ptr()
    assert torch.equal(ours.tril(), packed.tril()) and torch.equal(our_pivots, pivots)


def eliminated(A):
    """L and d of an elimination without pivoting, column by column."""
    A, n = A.clone(), len(A)
    L, d = torch.eye(n, dtype=A.dtype), torch.empty(n, dtype=A.dtype)
    for j in range(n):
        d[j], L[j + 1 :, j] = A[j, j], A[j + 1 :, j] / A[j, j]
        A[j + 1 :, j + 1 :] -= L[j + 1 :, j, None] * A[j, None, j + 1 :]
    return L, d


@pytest.mark.parametrize("kind", ["indefinite", "definite", "negative"])
@pytest.mark.parametrize("n", [1, 2, 24])
def test_without_pivoting_on_a_gpu(monkeypatch, kind, n):
    """Every answer, where few digits go; LDL^T takes over where many would. Torch's elimination without pivoting is for a GPU alone."""
    if DEVICE == "cpu":
        monkeypatch.setattr("hinv.solver.symmetric._unpivoted", eliminated)
    taken = 0
    for seed in range(20):
        A = matrix(kind, n, seed)
        S = Unpivoted.of(A)
        taken += S is not None
        if S is not None:
            condition = torch.linalg.cond(A).item()
            check(S, A, {"rtol": 1e-12 * condition, "atol": 1e-12 * condition})
            N, V = torch.randn(n, 3, dtype=A.dtype), torch.zeros(3, 3, dtype=A.dtype)
            expected = -N.T @ torch.linalg.solve(A, N)
            S.couple(N.clone(), V)
            torch.testing.assert_close(V, expected, rtol=1e-9 * condition, atol=1e-9)
    assert taken >= 15  # of random indefinite matrices of 130 rows it is a few, of definite ones all
    for bad in (matrix("zero diagonal", 6, 0), torch.full((3, 3), float("nan"), dtype=A.dtype)):
        assert Unpivoted.of(bad) is None


def test_stacks_by_cholesky_or_eigenvalues():
    definite = torch.stack([matrix("definite", 4, s) for s in range(3)])
    for stack, kind in ((definite, Cholesky), (torch.stack([*definite[:2], matrix("indefinite", 4, 9)]), Eigen)):
        S = factored(stack.clone())
        assert isinstance(S, kind)
        check(S, stack, {})


@pytest.mark.parametrize("kind", ["definite", "zero diagonal"])
def test_float32(kind):
    A = matrix(kind, 9, 1, torch.float32)
    for S, eye in (
        (factored(A.clone()), torch.eye(9)),
        (Small(A.cpu().numpy().copy(), True), np.eye(9, dtype=np.float32)),
    ):
        X = torch.as_tensor(S.solve(eye))
        assert X.dtype == torch.float32
        torch.testing.assert_close(A @ X, torch.eye(9), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("A", [torch.zeros(3, 3), torch.diag(torch.tensor([1.0, -1.0, 0.0])), torch.ones(2, 2) * -1.0])
def test_singular_is_refused(A):
    with pytest.raises(SingularPivotError, match="smallest pivot is zero"):
        factored(A.double())
    with pytest.raises(SingularPivotError, match="smallest pivot is zero"):
        factored(A.double()[None])
    for try_cholesky in (True, False):
        with pytest.raises(SingularPivotError, match="smallest pivot is zero"):
            Small(A.double().cpu().numpy().copy(), try_cholesky)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_refused(bad):
    A = torch.eye(3, dtype=torch.float64)
    A[1, 1] = bad
    for call in (
        lambda: factored(A.clone(), False),
        lambda: factored(A.clone()[None]),
        lambda: Small(A.cpu().numpy().copy(), True),
    ):
        with pytest.raises(SingularPivotError, match="not finite"):
            call()
