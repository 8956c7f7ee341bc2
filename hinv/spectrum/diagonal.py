"""The exact diagonal, its blocks and the trace in O(L), without a factorization.

They need the loss's second derivative alone. Block-diagonal over samples, it goes backwards by V_{l-1} = G_l + A_l^T V_l A_l (no elimination), and the
block of stage l is E_l + sum_n J_ln^T V_ln J_ln. Float64 arithmetic, as for all of the spectrum.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hinv.modes import exact
from hinv.network import Derivatives, Stage, derivatives, losses
from hinv.network.skip import on_segments
from hinv.shapes import Float
from hinv.solver.inverse import numbered
from hinv.solver.matrix import Matrix
from hinv.solver.products import Products


@dataclass(frozen=True)
class Block:
    """One stage's diagonal block, E + sum_n J_n^T V_n J_n, as functions of what is asked."""

    stage: Stage
    diagonal: Callable[[], Float[Tensor, " p"]]
    dense: Callable[[], Float[Tensor, "p p"]]
    norm: Callable[[], Float[Tensor, ""]]  # Frobenius


def blocks(H: Products) -> Iterator[Block]:
    """The blocks of the stages with parameters, from the last to the first, one alive at a time."""
    chain, live = H.chain, H.chain.live
    wide = (max(s.inputs[0].numel(), s.outputs[0].numel()) for s in live if s.kind == "general")
    if len(chain.inputs) * max(wide, default=0) ** 2 > H.shape[0] ** 2:
        yield from _of_the_dense(H)  # few weights on wide activations, as in a convolution: all of H is less than one V
        return
    V = losses.curvature(chain.loss, chain.outputs, chain.targets)  # (B, C, C)
    for number, stage in reversed(list(enumerate(live))):
        c = stage.carry
        if stage.kind == "elementwise":
            slope, bend = functional.pad(stage.slope, (c, 0), value=1.0), functional.pad(stage.bend, (c, 0))
            V = V * slope.unsqueeze(1) * slope.unsqueeze(2)
            if not H.gauss_newton:
                V.diagonal(dim1=1, dim2=2).add_(bend)
        elif stage.kind == "wiring":
            behind = stage.wiring.sizes(stage.segments)
            V = on_segments(stage.wiring.back, on_segments(stage.wiring.back, V, behind, 1), behind, 2)
        elif stage.kind == "linear":
            yield _linear(stage, V[:, c:, c:])
            if number:
                V = _through(functools.partial(_weighted, stage), V, c)
        else:
            D = derivatives(stage, wrt_input=number > 0)
            if stage.parameters:
                yield _general(stage, D, V[:, c:, c:], H.gauss_newton)
            if number:
                assert D.A is not None and D.G is not None
                V = _through(D.A.mT.matmul, V, c)
                if not H.gauss_newton:
                    V[:, c:, c:] += D.G


def _through(transposed: Callable[[Tensor], Tensor], V: Float[Tensor, "B rows rows"], carry: int) -> Tensor:
    """A^T V A, where A is the identity on the first `carry` entries and transposed(X) = A^T X on the others."""
    for _ in range(2):
        V = torch.cat([V[:, :carry], transposed(V[:, carry:])], 1).mT
    return V


def _of_the_dense(H: Products) -> Iterator[Block]:
    stages = [stage for stage in H.chain.live if stage.parameters]
    D, ends = H.dense(), list(itertools.accumulate(len(stage.x) for stage in stages))
    for stage, end in reversed(list(zip(stages, ends, strict=True))):
        own = D[end - len(stage.x) : end, end - len(stage.x) : end]
        yield Block(stage, own.diagonal, own.clone, functools.partial(torch.linalg.matrix_norm, own))


def _weighted(stage: Stage, X: Float[Tensor, "B rows columns"]) -> Float[Tensor, "B entries columns"]:
    """A^T X of a linear stage, position by position."""
    at = X.reshape(len(X), -1, len(stage.weight), X.shape[2])
    return (stage.weight.T @ at).flatten(1, 2)


def _linear(stage: Stage, V: Float[Tensor, "B rows rows"]) -> Block:
    """sum_n of V_nts kron (z~_nt z~_ns^T) over positions t and s, z~ = [z, 1]: nothing of size p x p unless `dense` is called."""
    a_out, a_in = stage.weight.shape
    T = len(stage.rows) // len(V)
    V = V.reshape(len(V), T, a_out, T, a_out)

    def of_positions(rows: Float[Tensor, "BT d"]) -> Float[Tensor, "B T d"]:
        return rows.view(len(V), T, rows.shape[1])

    def diagonal() -> Float[Tensor, " p"]:
        units = V.diagonal(dim1=2, dim2=4).reshape(-1, a_out)  # (B T T, a_out)
        pairs = [z.unsqueeze(2) * z.unsqueeze(1) for z in map(of_positions, (stage.rows, stage.ones))]  # (B, T, T, d)
        return torch.cat([(units.T @ pair.flatten(0, 2)).flatten() for pair in pairs])

    def dense() -> Float[Tensor, "p p"]:
        z = of_positions(torch.cat([stage.rows, stage.ones], 1))
        moved = torch.einsum("ntosp,ntd->nspod", V, z)
        full = torch.einsum("nspod,nse->odpe", moved, z).reshape(a_out * z.shape[2], -1)
        index = torch.arange(len(full), device=full.device).view(a_out, -1)
        order = torch.cat([index[:, :a_in].flatten(), index[:, a_in:].flatten()])
        return full[order][:, order]

    def norm() -> Float[Tensor, ""]:
        if T > 1:
            return torch.linalg.matrix_norm(dense())
        inner = stage.rows @ stage.rows.T + stage.ones @ stage.ones.T
        flat = V.flatten(1)
        return ((flat @ flat.T) * inner.square()).sum().clamp_min(0.0).sqrt()

    return Block(stage, diagonal, dense, norm)


def _general(stage: Stage, D: Derivatives, V: Float[Tensor, "B a_out a_out"], gauss_newton: bool) -> Block:
    def diagonal() -> Float[Tensor, " p"]:
        out = ((V @ D.J) * D.J).sum((0, 1))
        return out if gauss_newton else out + D.E.diagonal()

    def dense() -> Float[Tensor, "p p"]:
        out = D.J.flatten(0, 1).T @ (V @ D.J).flatten(0, 1)
        return out if gauss_newton else out + D.E

    return Block(stage, diagonal, dense, lambda: torch.linalg.matrix_norm(dense()))


@exact()
def diagonal(H: Matrix) -> Float[Tensor, " P"]:
    return torch.cat([block.diagonal() for block in blocks(H.double())][::-1]).to(H.dtype)


@exact()
def by_stage(H: Matrix) -> dict[str, dict[str, float]]:
    """`Curvature.by_stage`."""
    out: dict[str, dict[str, float]] = {}
    for block in blocks(H.double()):
        out[block.stage.name] = {
            "parameters": len(block.stage.x),
            "trace": block.diagonal().sum().item(),
            "norm": block.norm().item(),
        }
    return dict(reversed(out.items()))


@exact()
def block(H: Matrix, stage: str | int) -> Float[Tensor, "p p"]:
    names = [s.name for s in H.chain.live if s.parameters]
    name = names[numbered(names, stage)]
    return next(found.dense() for found in blocks(H.double()) if found.stage.name == name).to(H.dtype)
