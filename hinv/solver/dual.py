"""The Gauss-Newton matrix through its dual: one (B C) x (B C) Cholesky, exact, and no P x P or stagewise elimination.

    GGN = J^T Lambda J,  Lambda = R R^T,  D = J^T R  (P x BC; fewer columns where Lambda has less rank)
    (GGN + eps I)^-1 g = (g - D (eps I + D^T D)^-1 D^T g) / eps
    log det(GGN + eps I) = (P - BC) log eps + log det(eps I + D^T D)                                  (Sylvester's identity)

D is never formed for linear stages: its column for output direction c of sample n is the outer product of a backpropagated delta_nc and the stage's
input, so D^T D adds up (delta_nc . delta_n'c') (z_n . z_n' + 1) over the stages. Cost O(sum over stages of B C a (a + B C)) and (B C)^3 / 3.
"""

import itertools
import math

import torch
from torch import Tensor

from hinv.errors import SingularShiftError
from hinv.network import Chain, Stage, derivatives, losses
from hinv.shapes import Float

from .factor import check_right_hand_side

# rows of D^T D formed at a time: all of them in one product waste half of it, few of them waste calls
STRIPE = 768


class Dual:
    """GGN + damping I for damping > 0, factored: solve, inertia, logdet."""

    def __init__(self, chain: Chain, damping: float):
        if not damping > 0:
            raise ValueError(f"the dual form needs damping > 0, not {damping}: use method='factor'")
        self.damping, batch = damping, len(chain.inputs)
        delta = losses.root(chain.loss, chain.outputs, chain.targets)  # (B, C, r)
        self.batch, self.rank = batch, delta.shape[2]
        size, live = batch * self.rank, chain.live
        gram = delta.new_zeros(batch, self.rank, batch, self.rank)  # its lower triangle only
        stripes = 1 + size // STRIPE
        cuts = [batch * i // stripes for i in range(stripes + 1)]
        # of each stage with parameters Z (B, a_in) if it is linear and not shared over positions, else D_l (p, BC); the deltas of the former
        self.stages, deltas = [], []
        signals = [delta]  # of the state's segments
        for number in reversed(range(len(live))):
            stage = live[number]
            if stage.kind == "wiring":
                signals = stage.wiring.back(signals)
                continue
            delta = signals[-1]
            if _alone(stage):
                z = stage.inputs
                rows = delta.mT.reshape(size, delta.shape[1])  # ((n, c), a_out)
                kernel = (z @ z.T + float(stage.has_bias))[:, None, :, None]
                for top, end in itertools.pairwise(cuts):
                    block = gram[top:end, :, :end]
                    outer = rows[top * self.rank : end * self.rank] @ rows[: end * self.rank].T
                    block.addcmul_(outer.view_as(block), kernel[top:end, :, :end])
                self.stages.insert(0, z)
                deltas.insert(0, delta)
                if number:  # nobody asks for the deltas of the input, which may be much wider than any layer
                    delta = stage.weight.T @ delta
            elif stage.kind == "elementwise":
                delta = stage.slope.unsqueeze(2) * delta
            else:
                D, delta = (_shared if stage.kind == "linear" else _general)(stage, delta, number > 0)
                if stage.parameters:
                    gram += (D.T @ D).view_as(gram)
                    self.stages.insert(0, D)
            signals[-1] = delta
        gram = gram.view(size, size)
        gram.diagonal().add_(damping)
        self.L, info = torch.linalg.cholesky_ex(gram)
        if info.item():
            raise SingularShiftError(f"GGN + {damping:g} I is singular to working precision: use more damping")
        owners = [stage for stage in live if stage.parameters]
        self.linear = [_alone(stage) for stage in owners]
        self.sizes = [len(stage.x) for stage in owners]
        self.units = [d.shape[1] for d in deltas]
        self.delta = torch.cat(deltas, 1) if deltas else gram.new_zeros(batch, 0, self.rank)  # (B, sum of a_out, r)

    def __repr__(self) -> str:
        P, n = sum(self.sizes), len(self.L)
        return f"Dual({P} x {P}, damping {self.damping:g}, by a Cholesky factor of {n} x {n}, {self.L.dtype})"

    @property
    def inertia(self) -> tuple[int, int, int]:
        return sum(self.sizes), 0, 0

    @property
    def logdet(self) -> tuple[float, float]:
        log = 2.0 * self.L.diagonal().log().sum().item()
        return 1.0, (sum(self.sizes) - len(self.L)) * math.log(self.damping) + log

    def solve(self, b: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        """(GGN + damping I)^-1 b for b (P,) or (P, k), without refinement; errors as `Factor.solve`."""
        check_right_hand_side(b, sum(self.sizes))
        if not b.numel():
            return b.clone()
        g = b.reshape(len(b), -1).to(self.L.dtype).T.contiguous()  # (k, P): a column's weights lie together
        x = g - self._apply(torch.cholesky_solve(self._transpose(g), self.L))
        return (x / self.damping).T.reshape(b.shape).to(b.dtype)

    def _pieces(self, g: Float[Tensor, "k P"]) -> list[tuple[bool, Tensor, Tensor]]:
        """(whether it is linear, Z or D_l, its columns of g) for each stage."""
        return list(zip(self.linear, self.stages, g.split(self.sizes, 1), strict=True))

    def _transpose(self, g: Float[Tensor, "k P"]) -> Float[Tensor, "n k"]:
        """D^T g^T, (BC, k) for g (k, P)."""
        k, moved, inner = len(g), [g.new_zeros(self.batch, len(g), 0)], 0.0
        for linear, kept, piece in self._pieces(g):
            if not linear:
                inner = inner + kept.T @ piece.T
                continue
            units, fan_in = self.units[len(moved) - 1], kept.shape[1]
            weights, bias = piece[:, : units * fan_in].reshape(-1, fan_in), piece[:, units * fan_in :]
            product = torch.addmm(bias.reshape(-1), kept, weights.T) if bias.numel() else kept @ weights.T
            moved.append(product.view(self.batch, k, units))
        return inner + (torch.cat(moved, 2) @ self.delta).mT.reshape(-1, k)

    def _apply(self, w: Float[Tensor, "n k"]) -> Float[Tensor, "k P"]:
        """(D w)^T, (k, P) for w (BC, k)."""
        k = w.shape[1]
        moved = w.view(self.batch, self.rank, k).mT @ self.delta.mT  # (B, k, sum of a_out)
        columns, out = list(moved.split(self.units, 2)), w.new_empty(k, sum(self.sizes))
        for linear, kept, piece in self._pieces(out):
            if not linear:
                piece.copy_((kept @ w).T)
                continue
            column = columns.pop(0).reshape(self.batch, -1)  # (B, k a_out)
            weights = (column.T @ kept).view(k, -1)
            piece[:, : weights.shape[1]] = weights
            if piece.shape[1] > weights.shape[1]:
                piece[:, weights.shape[1] :] = column.sum(0).view(k, -1)
        return out


def _alone(stage: Stage) -> bool:
    """Whether a stage is linear and meets each sample once: then D_l stays in its factors."""
    return stage.kind == "linear" and stage.inputs.ndim == 2


def _shared(stage: Stage, delta: Float[Tensor, "B rows r"], wrt_input: bool) -> tuple[Tensor, Tensor]:
    """D_l = sum_t delta_nt z_nt^T (p, B r) of a linear stage shared over positions, and the deltas before it."""
    batch, rank = len(delta), delta.shape[2]
    at = delta.view(batch, -1, len(stage.weight), rank)  # (B, T, a_out, r)
    z = torch.cat([stage.rows, stage.ones], 1).view(*at.shape[:2], -1)
    weights, bias = torch.einsum("ntor,nti->oinr", at, z).split([stage.rows.shape[1], stage.has_bias * 1], 1)
    D = torch.cat([weights.reshape(-1, batch * rank), bias.reshape(-1, batch * rank)])
    return D, (stage.weight.T @ at).reshape(batch, -1, rank) if wrt_input else delta


def _general(stage: Stage, delta: Float[Tensor, "B rows r"], wrt_input: bool) -> tuple[Tensor, Tensor]:
    block = derivatives(stage, wrt_input)
    D = torch.einsum("nop,noc->pnc", block.J, delta).flatten(1)
    return D, delta if block.A is None else block.A.mT @ delta
