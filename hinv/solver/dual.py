"""The Gauss-Newton matrix through its dual: one (B C) x (B C) Cholesky, exact, and no P x P or stagewise elimination.

    GGN = J^T Lambda J,  Lambda = R R^T,  D = J^T R  (P x BC; fewer columns where Lambda has less rank),  Gram = eps I + D^T D
    (GGN + eps I)^-1 = (I - D Gram^-1 D^T) / eps
    log det(GGN + eps I) = (P - BC) log eps + log det Gram                                            (Sylvester's identity)
    tr (GGN + eps I)^-1 = (P - BC) / eps + tr Gram^-1

With fewer parameters than columns the difference cancels, and what is asked of the inverse comes from eps I + D D^T (P x P, the smaller of the two).

D is never formed for linear stages: its column for output direction c of sample n is the outer product of a backpropagated delta_nc and the stage's
input, so D^T D adds up (delta_nc . delta_n'c') (z_n . z_n' + 1) over the stages. Cost O(sum over stages of B C a (a + B C)) and (B C)^3 / 3.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from hinv.errors import SingularShiftError
from hinv.network import Chain, Stage, derivatives, losses
from hinv.shapes import Float

from .factor import check_right_hand_side
from .inverse import Inverse

# rows of D^T D formed at a time: all of them in one product waste half of it, few of them waste calls
STRIPE = 768
CHUNK = 2**22  # numbers formed at once


class Dual(Inverse):
    """GGN + damping I for damping > 0, factored: solve, inertia, logdet, parts of the inverse and samples."""

    inverse_error = 0.0  # it is definite

    def __init__(self, chains: Chain | Iterable[Chain], damping: float, share: float = 1.0):
        """chains: of the batch, or of the batches of a sum (walked again for `output_covariance`); share: what each of them is multiplied with in the sum."""
        if not damping > 0:
            raise ValueError(f"the dual form needs damping > 0, not {damping}: use method='factor'")
        self.damping, self.chains = damping, [chains] if isinstance(chains, Chain) else chains
        self._gather(share)
        gram = self._gram()
        gram.diagonal().add_(damping)
        self.L, info = torch.linalg.cholesky_ex(gram)
        if info.item():
            raise SingularShiftError(f"GGN + {damping:g} I is singular to working precision: use more damping")
        self.like = gram.new_zeros(0)

    def _gather(self, share: float) -> None:
        """Of each stage with parameters Z (B, a_in) if it is linear and not shared over positions, else D_l (p, BC); the deltas of the former.

        Samples of a batch with fewer outputs than another's (tokens) get columns of zeros: D D^T is the same, and Sylvester's identity holds for any D.
        """
        found: list[list[tuple[Stage, Tensor, Tensor]]] = []  # by batch, the first stage first
        for chain in self.chains:
            root = losses.root(chain.loss, chain.outputs, chain.targets)  # (B, C, r)
            found.append(list(backpropagated(chain, root * share**0.5 if share != 1.0 else root))[::-1])
        owners, batches = [stage for stage, _, _ in found[0]], [len(pieces[0][2]) for pieces in found]
        self.names, self.sizes = [stage.name for stage in owners], [len(stage.x) for stage in owners]
        self.linear, self.bias = (
            [_alone(stage) for stage in owners],
            [stage.has_bias for stage in owners if _alone(stage)],
        )
        self.batch, self.rank = sum(batches), max(pieces[0][2].shape[2] for pieces in found)
        self.stages, deltas = [], []
        for linear, pieces in zip(self.linear, zip(*found, strict=True), strict=True):
            kept = [piece for _, piece, _ in pieces]
            if linear:
                self.stages.append(_joined(kept, 0))
                deltas.append(_joined([self._padded(delta) for _, _, delta in pieces], 0))
                continue
            kept = [self._padded(D.view(len(D), batch, -1)) for D, batch in zip(kept, batches, strict=True)]
            self.stages.append(_joined(kept, 1).flatten(1))
        self.units = [d.shape[1] for d in deltas]
        like = found[0][0][1]
        self.delta = (
            torch.cat(deltas, 1) if deltas else like.new_zeros(self.batch, 0, self.rank)
        )  # (B, sum of a_out, r)

    def _padded(self, piece: Float[Tensor, "n m r"]) -> Float[Tensor, "n m rank"]:
        return functional.pad(piece, (0, self.rank - piece.shape[2])) if piece.shape[2] < self.rank else piece

    def _gram(self) -> Float[Tensor, "n n"]:
        """D^T D, its lower triangle only."""
        size = self.batch * self.rank
        gram = self.delta.new_zeros(self.batch, self.rank, self.batch, self.rank)
        stripes = 1 + size // STRIPE
        cuts = [self.batch * i // stripes for i in range(stripes + 1)]
        deltas, biases = list(self.delta.split(self.units, 1)), list(self.bias)
        for linear, kept in zip(self.linear[::-1], self.stages[::-1], strict=True):
            if not linear:
                gram += (kept.T @ kept).view_as(gram)
                continue
            rows, bias = _rows(deltas.pop()), biases.pop()
            for top, end in itertools.pairwise(cuts):
                block = gram[top:end, :, :end]
                outer = rows[top * self.rank : end * self.rank] @ rows[: end * self.rank].T
                block.addcmul_(outer.view_as(block), _kernel(kept[top:end], kept[:end], bias)[:, None, :, None])
        return gram.view(size, size)

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

    # -- the inverse (`hinv.solver.inverse`) ----------------------------------------------------------------------------

    @cached_property
    def _small(self) -> Float[Tensor, "P P"] | None:
        """With fewer parameters than columns of D, the Cholesky factor of eps I + D D^T; otherwise None."""
        P = sum(self.sizes)
        if len(self.L) <= P:
            return None
        D = torch.cat([self._formed(number) for number in range(len(self.sizes))])
        matrix = D @ D.T
        matrix.diagonal().add_(self.damping)
        return torch.linalg.cholesky(matrix)

    def _formed(self, number: int) -> Float[Tensor, "p n"]:
        """D_l."""
        if not self.linear[number]:
            return self.stages[number]
        owner = sum(self.linear[:number])
        delta = self.delta.split(self.units, 1)[owner]
        return _outer(self.stages[number], delta, self.sizes[number])

    def _diagonal(self) -> Float[Tensor, " P"]:
        if self._small is not None:
            return torch.cholesky_inverse(self._small).diagonal().clone()
        gram, out = torch.cholesky_inverse(self.L).view(self.batch, self.rank, -1), []
        deltas = list(self.delta.split(self.units, 1))
        for linear, kept, p in zip(self.linear, self.stages, self.sizes, strict=True):
            if linear:
                out.append(self._quadratic(kept, deltas.pop(0), gram, p))
            else:
                out.append(torch.linalg.solve_triangular(self.L, kept.T, upper=False).square().sum(0))
        return (1.0 - torch.cat(out)) / self.damping

    def _quadratic(
        self, z: Float[Tensor, "B a_in"], delta: Float[Tensor, "B a_out r"], gram: Float[Tensor, "B r n"], p: int
    ) -> Float[Tensor, " p"]:
        """The diagonal of D_l Gram^-1 D_l^T: sum_nn' z_ni W^o_nn' z_n'i, W^o_nn' = sum_cc' delta_nco [Gram^-1]_nc,n'c' delta_n'c'o; z = 1 for a bias."""
        batch, weights, biases = self.batch, [], []
        for some in delta.split(max(1, CHUNK // (batch * max(gram.shape[2], z.shape[1]))), 1):
            half = (some @ gram).view(batch, -1, batch, self.rank)
            W = (half * some.transpose(0, 1)).sum(3).transpose(0, 1)  # (units, B, B)
            weights.append(((W @ z) * z).sum(1))
            biases.append(W.sum((1, 2)))
        out = torch.cat(weights).flatten()
        return torch.cat([out, *biases]) if p > len(out) else out

    def _trace(self) -> float:
        L, beyond = (self.L, sum(self.sizes) - len(self.L)) if self._small is None else (self._small, 0)
        return beyond / self.damping + torch.cholesky_inverse(L).diagonal().sum().item()

    def _block(self, number: int) -> Float[Tensor, "p p"]:
        end, p = sum(self.sizes[: number + 1]), self.sizes[number]
        if self._small is not None:
            return torch.cholesky_inverse(self._small)[end - p : end, end - p : end]
        half = torch.linalg.solve_triangular(self.L, self._formed(number).T, upper=False)
        out = half.T @ -half
        out.diagonal().add_(1.0)
        return out / self.damping

    def _of_outputs(self) -> Float[Tensor, "B C C"]:
        return torch.cat([self._of_chain(chain) for chain in self.chains])

    def _of_chain(self, chain: Chain) -> Float[Tensor, "B C C"]:
        """The outputs' own J goes back once more, and meets D in k* = J D and itself in k** = J_n J_n^T: (k** - k* Gram^-1 k*^T) / eps."""
        outputs = chain.outputs.flatten(1)
        batch, C = outputs.shape
        eye = torch.eye(C, dtype=outputs.dtype, device=outputs.device).expand(batch, -1, -1)
        walk = backpropagated(chain, eye)
        if self._small is not None:
            J = torch.cat(
                [
                    _outer(kept, d, p) if _alone(s) else kept
                    for (s, kept, d), p in zip(walk, self.sizes[::-1], strict=True)
                ][::-1]
            )
            half = torch.linalg.solve_triangular(self._small, J, upper=False).view(-1, batch, C)
            return torch.einsum("pnc,pnd->ncd", half, half)
        k, own = outputs.new_zeros(batch, C, self.batch, self.rank), outputs.new_zeros(batch, C, C)
        stages, deltas = self.stages[::-1], list(self.delta.split(self.units, 1))
        for (stage, kept, delta), D in zip(walk, stages, strict=True):
            if _alone(stage):
                kernel = _kernel(kept, D, stage.has_bias)
                k.addcmul_((_rows(delta) @ _rows(deltas.pop()).T).view_as(k), kernel[:, None, :, None])
                own += (delta.mT @ delta) * (kept.square().sum(1) + float(stage.has_bias))[:, None, None]
            else:
                k += (kept.T @ D).view_as(k)
                J = kept.view(-1, batch, C)
                own += torch.einsum("pnc,pnd->ncd", J, J)
        half = torch.linalg.solve_triangular(self.L, k.view(batch * C, -1).T, upper=False).view(-1, batch, C)
        return (own - torch.einsum("knc,knd->ncd", half, half)) / self.damping

    @property
    def noises(self) -> int:
        return sum(self.sizes) + len(self.L)

    def colored(self, noise: Float[Tensor, "noises n"]) -> Float[Tensor, "P n"]:
        """Matheron's rule: a draw from the prior, moved by what a noisy observation of D^T x says."""
        prior, observed = noise.split([sum(self.sizes), len(self.L)])
        x = prior.T / self.damping**0.5
        return (x - self._apply(torch.cholesky_solve(self._transpose(x) + observed, self.L))).T


def backpropagated(chain: Chain, delta: Float[Tensor, "B C r"]) -> Iterator[tuple[Stage, Tensor, Tensor]]:
    """Directions in the outputs, r for each sample, carried back through the network: of each stage with parameters, the last one first, its input Z and the
    deltas behind it (B, a_out, r), or where it is not `_alone` what they are together, D_l = J_l^T delta (p, B r)."""
    live, signals = chain.live, [delta]  # of the state's segments
    for number in reversed(range(len(live))):
        stage = live[number]
        if stage.kind == "wiring":
            signals = stage.wiring.back(signals)
            continue
        delta = signals[-1]
        if _alone(stage):
            yield stage, stage.inputs, delta
            if number:  # nobody asks for the deltas of the input, which may be much wider than any layer
                delta = stage.weight.T @ delta
        elif stage.kind == "elementwise":
            delta = stage.slope.unsqueeze(2) * delta
        else:
            D, before = (_shared if stage.kind == "linear" else _general)(stage, delta, number > 0)
            if stage.parameters:
                yield stage, D, delta
            delta = before
        signals[-1] = delta


def _rows(delta: Float[Tensor, "B a_out r"]) -> Float[Tensor, "n a_out"]:
    """((n, c), a_out)."""
    return delta.mT.reshape(-1, delta.shape[1])


def _kernel(z: Float[Tensor, "n a_in"], other: Float[Tensor, "N a_in"], bias: bool) -> Float[Tensor, "n N"]:
    return z @ other.T + float(bias)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _outer(z: Float[Tensor, "B a_in"], delta: Float[Tensor, "B a_out r"], p: int) -> Float[Tensor, "p n"]:
    """D_l of a stage that is `_alone`, formed; its biases are what p leaves."""
    weights = torch.einsum("nor,ni->oinr", delta, z).reshape(-1, len(z) * delta.shape[2])
    if p == len(weights):
        return weights
    return torch.cat([weights, delta.transpose(0, 1).flatten(1)])


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
