"""The off-the-shelf peer: SciPy's SuperLU on the augmented system K, assembled as a sparse matrix.

Unknowns of each parametric stage: its parameters x_l, its output y_l (for a linear stage the pre-activation) and its costate
lambda_l; what lies between (activations, pooling) is composed into the next stage's input map T and curvature C:

    (E + eps I) x + F T y' + J^T lambda       = g
    -J x - A T y' + y                         = 0
    lambda' - T^T F^T x - (C + T^T G T) y' - T^T A^T lambda = 0          (y', lambda': the stage before)

SuperLU pivots across stages, so it also serves where a pivot of the stagewise elimination is close to singular, and at damping 0
where H is regular.
"""

import itertools
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from hinv.network import Chain, Stage, derivatives, losses
from hinv.shapes import Float

from .refine import Apply

# J, E, A, F, G of a stage; None where there is none
Blocks = tuple[Any, Any, Any, Any, Any]


def _blocks(tensor: Float[Tensor, "B r c"]) -> sp.csr_array:
    """(B, r, c) -> block-diagonal (B r, B c); entries that are exactly zero are not stored."""
    return sp.csr_array(sp.block_diag(list(tensor.double().cpu().numpy()), format="csr"))


def _linear(stage: Stage, wrt_input: bool, gauss_newton: bool) -> Blocks:
    W, z, ones, b = (t.double().cpu().numpy() for t in (stage.weight, stage.rows, stage.ones, stage.signal))
    (batch, a_in), a_out, b = z.shape, len(W), b * (not gauss_newton)  # batch: of all positions
    J = sp.csr_array(sp.vstack([sp.kron(sp.eye_array(a_out), row[None]) for row in z]))
    bias = stage.has_bias
    if bias:
        J = sp.hstack([J, sp.csr_array(sp.kron(ones, sp.eye_array(a_out)))])
    if not wrt_input:
        return J, None, None, None, None
    F = sp.csr_array(sp.hstack([sp.kron(row[:, None], sp.eye_array(a_in)) for row in b]))
    if bias:
        F = sp.vstack([F, sp.csr_array((a_out, batch * a_in))])
    return J, None, sp.csr_array(sp.kron(sp.eye_array(batch), W)), F, None


def _general(stage: Stage, wrt_input: bool, gauss_newton: bool) -> Blocks:
    D = derivatives(stage, wrt_input)
    E = None if gauss_newton else sp.csr_array(D.E.double().cpu().numpy())
    J = sp.csr_array(D.J.flatten(0, 1).double().cpu().numpy())
    if D.A is None:
        return J, E, None, None, None
    assert D.F is not None and D.G is not None
    F = D.F.transpose(0, 1).flatten(1).double().cpu().numpy() * (not gauss_newton)
    return J, E, _blocks(D.A), sp.csr_array(F), None if gauss_newton else _blocks(D.G)


def _elementwise(stage: Stage, wrt_input: bool, gauss_newton: bool) -> Blocks:
    A, G = (
        sp.dia_array((t.double().cpu().numpy().reshape(1, -1), [0]), shape=(t.numel(),) * 2)
        for t in (stage.slope, stage.bend)
    )
    return sp.csr_array((A.shape[0], 0)), None, A, sp.csr_array((0, A.shape[0])), None if gauss_newton else G


def _on_the_state(stage: Stage, wrt_input: bool, gauss_newton: bool) -> Blocks:
    """The blocks of the map of the whole state, of which a stage inside a residual block carries some rows, the first ones."""
    blocks = {"linear": _linear, "elementwise": _elementwise, "general": _general}[stage.kind]
    J, E, A, F, G = blocks(stage, wrt_input, gauss_newton)
    passed = len(stage.inputs) * stage.carry
    if not passed:
        return J, E, A, F, G
    J = sp.vstack([sp.csr_array((passed, J.shape[1])), J])
    if A is None:
        return J, E, None, None, None
    A, F = sp.block_diag([sp.eye_array(passed), A]), sp.hstack([sp.csr_array((F.shape[0], passed)), F])
    return J, E, A, F, None if G is None else sp.block_diag([sp.csr_array((passed, passed)), G])


def augmented(chain: Chain, damping: float, gauss_newton: bool = False) -> tuple[sp.csc_array, list[slice]]:
    """K as a sparse matrix, and where each stage's parameters are among the unknowns."""
    head = _blocks(losses.curvature(chain.loss, chain.outputs, chain.targets))
    entries: list[Any] = []
    places: list[slice] = []
    size = 0
    T: Any = None  # input map and curvature between the last outputs y' and this stage
    C: Any = None
    before: Any = None  # where y' and lambda' start

    def put(row: int, col: int, block: Any) -> None:
        if block is not None and block.nnz:
            block = sp.coo_array(block)
            entries.append((block.row + row, block.col + col, block.data))

    def through(curvature: Any) -> Any:
        return T.T @ curvature @ T

    for stage in chain.live:
        if stage.kind == "wiring":
            ends = np.cumsum([0, *stage.segments]) * len(stage.inputs)
            T = sp.vstack(stage.wiring.forth([T[i:j] for i, j in itertools.pairwise(ends)]), format="csr")
            continue
        J, E, A, F, G = _on_the_state(stage, before is not None, gauss_newton)
        if not stage.parameters:
            C = C if G is None else C + through(G)
            T = sp.csr_array(A @ T)
            continue
        n, p = J.shape
        x, y, costate = size, size + p, size + p + n
        put(x, x, damping * sp.eye_array(p) if E is None else E + damping * sp.eye_array(p))
        put(x, costate, J.T)
        put(y, x, -J)
        put(y, y, sp.eye_array(n))
        if before is not None:
            FT, AT = F @ T, A @ T
            put(x, before[0], FT)
            put(y, before[0], -AT)
            put(before[1], x, -FT.T)
            put(before[1], before[0], -(C if G is None else C + through(G)))
            put(before[1], costate, -AT.T)
        put(costate, costate, sp.eye_array(n))
        places.append(slice(x, x + p))
        before, size = (y, costate), costate + n
        T, C = sp.csr_array(sp.eye_array(n)), sp.csr_array((n, n))
    put(before[1], before[0], -(C + through(head)))
    rows, cols, data = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return sp.csc_array((data, (rows, cols)), shape=(size, size)), places


EPS = float(np.finfo(float).eps)


def _factored(K: sp.csc_array) -> Any:
    """SuperLU of K; None where a pivot is zero to working precision.

    A column that cancels to exactly zero makes SuperLU read memory that it never wrote, and the process may end. So every diagonal entry is moved by one
    or two rounding errors of its column, which is what elimination does by itself.
    """
    size = abs(K).max(axis=0).toarray().ravel()
    size[size == 0.0] = 1.0
    moved = EPS * size * (1.0 + 0.618034 * np.arange(len(size)) % 1.0)
    try:
        lu = splu(sp.csc_array(K + sp.diags_array(moved)))
    except RuntimeError:  # singular all the same
        return None
    pivots = np.abs(lu.U.diagonal())[lu.perm_c]
    return lu if (pivots > 8 * EPS * size).all() else None


def factor(chain: Chain, damping: float, gauss_newton: bool = False) -> Apply:
    """Factor K with SuperLU (float64); the result applies (H + damping I)^-1 to b (P,) or (P, k).

    Raises:
        torch.linalg.LinAlgError: K is exactly singular.
    """
    K, places = augmented(chain, damping, gauss_newton)
    lu = _factored(K)
    if lu is None:
        raise torch.linalg.LinAlgError(
            f"K is singular to working precision at damping {damping:g}: the damping is minus an eigenvalue; change it"
        )
    index = np.concatenate([np.arange(place.start, place.stop) for place in places])

    def solve(b: Tensor) -> Tensor:
        columns = b.reshape(len(b), -1)
        rhs = np.zeros((K.shape[0], columns.shape[1]))
        rhs[index] = columns.double().cpu().numpy()
        return torch.from_numpy(lu.solve(rhs)[index]).to(b).reshape(b.shape)

    return solve
