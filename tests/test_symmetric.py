import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hinv.symmetric import SingularPivotError, Symmetric


def matrix(kind, n, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=dtype)
    A = A + A.T
    if kind == "definite":
        A = A @ A + torch.eye(n, dtype=dtype)
    elif kind == "zero diagonal":  # forces 2 x 2 pivots
        A = A - torch.diag(A.diagonal())
    elif kind == "negative":
        A = -(A @ A) - torch.eye(n, dtype=dtype)
    return A


@given(
    kind=st.sampled_from(["indefinite", "definite", "zero diagonal", "negative"]),
    n=st.integers(2, 24),
    seed=st.integers(0, 500),
)
def test_solves_inertia_and_determinant(kind, n, seed):
    A = matrix(kind, n, seed)
    values = torch.linalg.eigvalsh(A)
    if values.abs().min() < 1e-6 * values.abs().max():
        return
    S, X = Symmetric(A), torch.eye(n, dtype=A.dtype)
    assert S.kind == ("cholesky" if values[0] > 0 else "ldl")
    condition = (values.abs().max() / values.abs().min()).item()
    tolerance = {"rtol": 1e-13 * condition, "atol": 1e-13 * condition}
    torch.testing.assert_close(A @ S.back(S.half(X)), X, **tolerance)
    torch.testing.assert_close(
        S.half(A).T @ S.over_D(S.half(A)), A, rtol=1e-10, atol=1e-11 * values.abs().max().item() * condition
    )
    assert S.negative == int((values < 0).sum())
    assert S.log_abs_det == pytest.approx(torch.linalg.slogdet(A)[1].item(), rel=1e-9, abs=1e-9)


def test_stacks_by_cholesky_or_eigenvalues():
    definite = torch.stack([matrix("definite", 4, s) for s in range(3)])
    for stack, kind in ((definite, "cholesky"), (torch.stack([*definite[:2], matrix("indefinite", 4, 9)]), "eigh")):
        S, X = Symmetric(stack), torch.randn(3, 4, 2, dtype=torch.float64)
        assert S.kind == kind
        torch.testing.assert_close(stack @ S.back(S.half(X)), X)
        assert S.negative == int((torch.linalg.eigvalsh(stack) < 0).sum())
        assert S.log_abs_det == pytest.approx(torch.linalg.slogdet(stack)[1].sum().item())


def test_float32():
    A = matrix("zero diagonal", 9, 1, torch.float32)
    S = Symmetric(A)
    assert S.back(S.half(torch.eye(9))).dtype == torch.float32
    torch.testing.assert_close(A @ S.back(S.half(torch.eye(9))), torch.eye(9), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("A", [torch.zeros(3, 3), torch.diag(torch.tensor([1.0, -1.0, 0.0])), torch.ones(2, 2) * -1.0])
def test_singular_is_refused(A):
    with pytest.raises(SingularPivotError, match="smallest pivot is zero"):
        Symmetric(A.double())
    with pytest.raises(SingularPivotError, match="smallest pivot is zero"):
        Symmetric(A.double()[None])


def test_not_finite_is_refused():
    A = torch.eye(3, dtype=torch.float64) * float("nan")
    for S in (A, A[None]):
        with pytest.raises(SingularPivotError, match="not finite"):
            Symmetric(S)
