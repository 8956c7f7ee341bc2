"""D = J^T R of the Gauss-Newton matrix D D^T, in the factors that it has stage by stage, over one batch or several.

For a linear stage its column for output direction c of sample n is the outer product of a backpropagated delta_nc and the stage's input, and never formed:
D^T D adds up (delta_nc . delta_n'c') (z_n . z_n' + 1) over the stages.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from hinv import ranks
from hinv.network import Chain, Stage, derivatives, losses
from hinv.shapes import Float

# rows of D^T D formed at a time: all of them in one product waste half of it, few of them waste calls
STRIPE = 768


class Root:
    """D (P x n, n = B r), r the rank of the loss's Hessian for a sample: products with it and its transpose, and D^T D."""

    def __init__(self, chains: Chain | Iterable[Chain], share: float = 1.0):
        """chains: of the batch, or of the batches of a sum; share: what each of them is multiplied with in the sum.

        Of each stage with parameters Z (B, a_in) if it is linear and not shared over positions, else D_l (p, BC); the deltas of the former.

        Samples of a batch with fewer outputs than another's (tokens) get columns of zeros: D D^T is the same, and Sylvester's identity holds for any D.
        """
        self.everywhere = False  # whether it is that of all processes, `gathered`
        found: list[list[tuple[Stage, Tensor, Tensor]]] = []  # by batch, the first stage first
        self.chains = [chains] if isinstance(chains, Chain) else chains
        for chain in self.chains:
            root = losses.root(chain.loss, chain.outputs, chain.targets)  # (B, C, r)
            found.append(list(backpropagated(chain, root * share**0.5 if share != 1.0 else root))[::-1])
        owners, batches = [stage for stage, _, _ in found[0]], [len(pieces[0][2]) for pieces in found]
        self.names, self.sizes = [stage.name for stage in owners], [len(stage.x) for stage in owners]
        self.linear, self.bias = (
            [alone(stage) for stage in owners],
            [stage.has_bias for stage in owners if alone(stage)],
        )
        self.batch, self.rank = sum(batches), max(pieces[0][2].shape[2] for pieces in found)
        self.stages, deltas = [], []
        for linear, pieces in zip(self.linear, zip(*found, strict=True), strict=True):
            kept = [piece for _, piece, _ in pieces]
            if linear:
                self.stages.append(joined(kept, 0))
                deltas.append(joined([self._padded(delta) for _, _, delta in pieces], 0))
                continue
            kept = [self._padded(D.view(len(D), batch, -1)) for D, batch in zip(kept, batches, strict=True)]
            self.stages.append(joined(kept, 1).flatten(1))
        self.units = [d.shape[1] for d in deltas]
        like = found[0][0][1]
        self.delta = (
            torch.cat(deltas, 1) if deltas else like.new_zeros(self.batch, 0, self.rank)
        )  # (B, sum of a_out, r)

    def _padded(self, piece: Float[Tensor, "n m r"]) -> Float[Tensor, "n m rank"]:
        return functional.pad(piece, (0, self.rank - piece.shape[2])) if piece.shape[2] < self.rank else piece

    def gathered(self) -> "Root":
        """That of the samples of all processes (`hinv.ranks`), on each of them, in the order of the processes; `chains` stay its own.

        What is sent is Z and deltas, B (a_in + a_out r) numbers a stage; D^T D is then formed by strips, each process some of them.
        """
        if not ranks.several():
            return self
        out, batch, device = copy.copy(self), self.batch, self.delta.device
        out.rank = int(ranks.gathered(torch.tensor([self.rank], device=device), 0).max())
        out.batch = int(ranks.gathered(torch.tensor([batch], device=device), 0).sum())
        out.delta = ranks.gathered(out._padded(self.delta), 0)
        out.stages = [
            ranks.gathered(kept, 0)
            if linear
            else ranks.gathered(out._padded(kept.view(len(kept), batch, -1)), 1).flatten(1)
            for linear, kept in zip(self.linear, self.stages, strict=True)
        ]
        out.everywhere = True
        return out

    def gram(self) -> Float[Tensor, "n n"]:
        """D^T D, its lower triangle only."""
        size, rank = self.batch * self.rank, self.rank
        gram = self.delta.new_zeros(self.batch, rank, self.batch, rank)
        stripes = max(1 + size // STRIPE, 4 * ranks.size() * self.everywhere)
        cuts = [self.batch * i // stripes for i in range(stripes + 1)]
        strips = list(itertools.pairwise(cuts))
        if self.everywhere:
            strips = strips[ranks.number() :: ranks.size()]
        deltas, biases = list(self.delta.split(self.units, 1)), list(self.bias)
        for linear, kept in zip(self.linear[::-1], self.stages[::-1], strict=True):
            rows, bias = (rows_of(deltas.pop()), biases.pop()) if linear else (kept.T, False)
            for top, end in strips:
                block = gram[top:end, :, :end]
                product = (rows[top * rank : end * rank] @ rows[: end * rank].T).view_as(block)
                if linear:
                    block.addcmul_(product, kernel_of(kept[top:end], kept[:end], bias)[:, None, :, None])
                else:
                    block += product
        if self.everywhere:
            gram = ranks.summed(lambda: gram, gram)
        return gram.view(size, size)

    def _pieces(self, g: Float[Tensor, "k P"]) -> list[tuple[bool, Tensor, Tensor]]:
        """(whether it is linear, Z or D_l, its columns of g) for each stage."""
        return list(zip(self.linear, self.stages, g.split(self.sizes, 1), strict=True))

    def transpose(self, g: Float[Tensor, "k P"]) -> Float[Tensor, "n k"]:
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

    def apply(self, w: Float[Tensor, "n k"]) -> Float[Tensor, "k P"]:
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

    def formed(self, number: int) -> Float[Tensor, "p n"]:
        """D_l of a stage."""
        if not self.linear[number]:
            return self.stages[number]
        owner = sum(self.linear[:number])
        delta = self.delta.split(self.units, 1)[owner]
        return outer(self.stages[number], delta, self.sizes[number])


def backpropagated(chain: Chain, delta: Float[Tensor, "B C r"]) -> Iterator[tuple[Stage, Tensor, Tensor]]:
    """Directions in the outputs, r for each sample, carried back through the network: of each stage with parameters, the last one first, its input Z and the
    deltas behind it (B, a_out, r), or where it is not `alone` what they are together, D_l = J_l^T delta (p, B r)."""
    live, signals = chain.live, [delta]  # of the state's segments
    for number in reversed(range(len(live))):
        stage = live[number]
        if stage.kind == "wiring":
            signals = stage.wiring.back(signals)
            continue
        delta = signals[-1]
        if alone(stage):
            yield stage, stage.inputs, delta
            if number:  # nobody asks for the deltas of the input, which may be much wider than any layer
                delta = stage.weight.T @ delta
        elif stage.kind == "elementwise":
            delta = stage.slope.unsqueeze(2) * delta
        else:
            if not stage.parameters:
                delta = _pulled(stage, delta)
            else:
                D, before = (_shared if stage.kind == "linear" else _general)(stage, delta, number > 0)
                yield stage, D, delta
                delta = before
        signals[-1] = delta


def jacobian(chain: Chain) -> Float[Tensor, "P n"]:
    """(P, B C) J^T: the derivatives of every output of every sample in the parameters, formed. Cost: C walks back, and P B C numbers."""
    columns = [
        outer(kept, delta, len(stage.x)) if alone(stage) else kept
        for stage, kept, delta in backpropagated(chain, every(chain.outputs.flatten(1)))
    ]
    return torch.cat(columns[::-1])


def every(outputs: Float[Tensor, "B C"]) -> Float[Tensor, "B C C"]:
    """Each output of each sample as a direction."""
    return torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device).expand(len(outputs), -1, -1)


def rows_of(delta: Float[Tensor, "B a_out r"]) -> Float[Tensor, "n a_out"]:
    """((n, c), a_out)."""
    return delta.mT.reshape(-1, delta.shape[1])


def kernel_of(z: Float[Tensor, "n a_in"], other: Float[Tensor, "N a_in"], bias: bool) -> Float[Tensor, "n N"]:
    return z @ other.T + float(bias)


def joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def outer(z: Float[Tensor, "B a_in"], delta: Float[Tensor, "B a_out r"], p: int) -> Float[Tensor, "p n"]:
    """D_l of a stage that is `alone`, formed; its biases are what p leaves."""
    weights = torch.einsum("nor,ni->oinr", delta, z).reshape(-1, len(z) * delta.shape[2])
    if p == len(weights):
        return weights
    return torch.cat([weights, delta.transpose(0, 1).flatten(1)])


def alone(stage: Stage) -> bool:
    """Whether a stage is linear and meets each sample once: then D_l stays in its factors."""
    return stage.kind == "linear" and stage.inputs.ndim == 2


def _shared(stage: Stage, delta: Float[Tensor, "B rows r"], wrt_input: bool) -> tuple[Tensor, Tensor]:
    """D_l = sum_t delta_nt z_nt^T (p, B r) of a linear stage shared over positions, and the deltas before it."""
    batch, rank = len(delta), delta.shape[2]
    at = delta.view(batch, -1, len(stage.weight), rank)  # (B, T, a_out, r)
    z = torch.cat([stage.rows, stage.ones], 1).view(*at.shape[:2], -1)
    # a sample's numbers lie together, as they come and as the Gram matrix reads them
    weights, bias = torch.einsum("ntor,nti->nroi", at, z).split([stage.rows.shape[1], stage.has_bias * 1], 3)
    D = torch.cat([weights.flatten(2), bias.flatten(2)], 2).flatten(0, 1).T
    return D, (stage.weight.T @ at).reshape(batch, -1, rank) if wrt_input else delta


def _pulled(stage: Stage, delta: Float[Tensor, "B rows r"]) -> Float[Tensor, "B a_in r"]:
    """A^T delta of a stage without parameters by r backward passes through its module; its Jacobians may be much larger."""
    z = stage.inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = stage.module(z.clone()).flatten(1)
    columns = [
        torch.autograd.grad(out, z, column, retain_graph=True, materialize_grads=True)[0].flatten(1)
        for column in delta.unbind(2)
    ]
    return torch.stack(columns, 2)


def _general(stage: Stage, delta: Float[Tensor, "B rows r"], wrt_input: bool) -> tuple[Tensor, Tensor]:
    block = derivatives(stage, wrt_input)
    D = torch.einsum("nop,noc->pnc", block.J, delta).flatten(1)
    return D, delta if block.A is None else block.A.mT @ delta
