"""The Gauss-Newton matrix through its dual: one (B C) x (B C) Cholesky, exact, and no P x P or stagewise elimination.

    GGN = J^T Lambda J,  Lambda = R R^T,  D = J^T R  (P x BC; fewer columns where Lambda has less rank),  Gram = eps I + D^T D
    (GGN + eps I)^-1 = (I - D Gram^-1 D^T) / eps
    log det(GGN + eps I) = (P - BC) log eps + log det Gram                                            (Sylvester's identity)
    tr (GGN + eps I)^-1 = (P - BC) / eps + tr Gram^-1

With fewer parameters than columns the difference cancels, and everything comes from eps I + D D^T (P x P, the smaller of the two).

D is never formed for linear stages: its column for output direction c of sample n is the outer product of a backpropagated delta_nc and the stage's
input, so D^T D adds up (delta_nc . delta_n'c') (z_n . z_n' + 1) over the stages. Cost O(sum over stages of B C a (a + B C)) and (B C)^3 / 3.
"""

import itertools
import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

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

    def __init__(self, chain: Chain, damping: float):
        if not damping > 0:
            raise ValueError(f"the dual form needs damping > 0, not {damping}: use method='factor'")
        self.damping, batch = damping, len(chain.inputs)
        root = losses.root(chain.loss, chain.outputs, chain.targets)  # (B, C, r)
        self.chain, self.batch, self.rank = chain, batch, root.shape[2]
        self.columns = batch * self.rank
        # of each stage with parameters Z (B, a_in) if it is linear and not shared over positions, else D_l (p, BC); the deltas of the former
        self.stages, deltas, biased = [], [], []
        for stage, kept, delta in backpropagated(chain, root):
            self.stages.insert(0, kept)
            if _alone(stage):
                deltas.insert(0, delta)
                biased.insert(0, stage.has_bias)
        owners = [stage for stage in chain.live if stage.parameters]
        self.names, self.like = [stage.name for stage in owners], root.new_zeros(0)
        self.linear = [_alone(stage) for stage in owners]
        self.sizes = [len(stage.x) for stage in owners]
        self.units, self._biased = [d.shape[1] for d in deltas], biased
        self.delta = torch.cat(deltas, 1) if deltas else root.new_zeros(batch, 0, self.rank)  # (B, sum of a_out, r)
        self._factored = self.L if self._small is None else self._small

    @cached_property
    def L(self) -> Float[Tensor, "n n"]:
        """The Cholesky factor of Gram."""
        deltas = list(self.delta.split(self.units, 1))
        return self._cholesky(_gram(self.linear, self.stages, deltas, self._biased, self.batch, self.rank))

    def _cholesky(self, matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """Of a matrix plus damping I, whose lower triangle is read."""
        matrix.diagonal().add_(self.damping)
        L, info = torch.linalg.cholesky_ex(matrix)
        if info.item():
            raise SingularShiftError(f"GGN + {self.damping:g} I is singular to working precision: use more damping")
        return L

    def __repr__(self) -> str:
        P, n = sum(self.sizes), len(self._factored)
        return f"Dual({P} x {P}, damping {self.damping:g}, by a Cholesky factor of {n} x {n}, {self.like.dtype})"

    @property
    def inertia(self) -> tuple[int, int, int]:
        return sum(self.sizes), 0, 0

    @property
    def logdet(self) -> tuple[float, float]:
        log = 2.0 * self._factored.diagonal().log().sum().item()
        return 1.0, (sum(self.sizes) - len(self._factored)) * math.log(self.damping) + log

    def solve(self, b: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        """(GGN + damping I)^-1 b for b (P,) or (P, k), without refinement; errors as `Factor.solve`."""
        check_right_hand_side(b, sum(self.sizes))
        if not b.numel():
            return b.clone()
        if self._small is not None:
            return torch.cholesky_solve(b.reshape(len(b), -1).to(self.like.dtype), self._small).view_as(b).to(b.dtype)
        g = b.reshape(len(b), -1).to(self.like.dtype).T.contiguous()  # (k, P): a column's weights lie together
        x = g - self._apply(torch.cholesky_solve(self._transpose(g), self.L))
        return (x / self.damping).T.reshape(b.shape).to(b.dtype)

    def least_squares(self, previous: Float[Tensor, " P"] | None = None) -> Float[Tensor, " P"] | None:
        """(P,) the minimizer d of |R^T J d - beta|^2 + damping |d - previous|^2 for the batch's own gradient g = D beta: (GGN + damping I)^-1 (g + damping previous).

        From the residuals themselves, d = previous + D Gram^-1 (beta - D^T previous): in `solve` they come back from g by a difference that loses as many digits as
        the damping is smaller than the GGN. None where g is not in the range of D (a loss that is linear far from its targets).
        """
        at = self.chain.loss, self.chain.outputs, self.chain.targets
        R, b = losses.root(*at), losses.gradient(*at).flatten(1).unsqueeze(2)
        beta = torch.linalg.pinv(R) @ b  # (B, r, 1)
        if not (R @ beta - b).norm() <= torch.finfo(b.dtype).eps ** 0.5 * b.norm():
            return None
        residuals = beta.reshape(-1, 1)
        if previous is not None:
            residuals = residuals - self._transpose(previous.unsqueeze(0))
        if self._small is None:
            d = self._apply(torch.cholesky_solve(residuals, self.L))[0]
        else:
            d = torch.cholesky_solve(self._apply(residuals).T, self._small)[:, 0]
        return d if previous is None else d + previous

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
        if self.columns <= P:
            return None
        D = torch.cat([self._formed(number) for number in range(len(self.sizes))])
        return self._cholesky(D @ D.T)

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
                out.append(_quadratic(kept, deltas.pop(0), gram, p))
            else:
                out.append(torch.linalg.solve_triangular(self.L, kept.T, upper=False).square().sum(0))
        return (1.0 - torch.cat(out)) / self.damping

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
        """The outputs' own J goes back once more, and meets D in k* = J D and itself in k** = J_n J_n^T: (k** - k* Gram^-1 k*^T) / eps."""
        outputs = self.chain.outputs.flatten(1)
        batch, C = outputs.shape
        eye = torch.eye(C, dtype=outputs.dtype, device=outputs.device).expand(batch, -1, -1)
        walk = backpropagated(self.chain, eye)
        if self._small is not None:
            J = torch.cat(
                [
                    _outer(kept, d, p) if _alone(s) else kept
                    for (s, kept, d), p in zip(walk, self.sizes[::-1], strict=True)
                ][::-1]
            )
            half = torch.linalg.solve_triangular(self._small, J, upper=False).view(-1, batch, C)
            return torch.einsum("pnc,pnd->ncd", half, half)
        k, own = outputs.new_zeros(batch, C, batch, self.rank), outputs.new_zeros(batch, C, C)
        stages, deltas = self.stages[::-1], list(self.delta.split(self.units, 1))
        for (stage, kept, delta), D in zip(walk, stages, strict=True):
            if _alone(stage):
                kernel = _kernel(stage)
                k.addcmul_((_rows(delta) @ _rows(deltas.pop()).T).view_as(k), kernel[:, None, :, None])
                own += (delta.mT @ delta) * kernel.diagonal()[:, None, None]
            else:
                k += (kept.T @ D).view_as(k)
                J = kept.view(-1, batch, C)
                own += torch.einsum("pnc,pnd->ncd", J, J)
        half = torch.linalg.solve_triangular(self.L, k.view(batch * C, -1).T, upper=False).view(-1, batch, C)
        return (own - torch.einsum("knc,knd->ncd", half, half)) / self.damping

    @property
    def noises(self) -> int:
        return sum(self.sizes) + self.columns

    def colored(self, noise: Float[Tensor, "noises n"]) -> Float[Tensor, "P n"]:
        """Matheron's rule: a draw from the prior, moved by what a noisy observation of D^T x says."""
        prior, observed = noise.split([sum(self.sizes), self.columns])
        x = prior.T / self.damping**0.5
        return (x - self._apply(torch.cholesky_solve(self._transpose(x) + observed, self.L))).T


def _gram(
    linear: list[bool], stages: list[Tensor], deltas: list[Tensor], biased: list[bool], batch: int, rank: int
) -> Float[Tensor, "n n"]:
    """D^T D, its stripes of rows from the left up to the diagonal."""
    size = batch * rank
    gram = stages[0].new_zeros(size, size)
    stripes = 1 + size // STRIPE
    cuts = [batch * i // stripes for i in range(stripes + 1)]
    factors = iter(zip(deltas, biased, strict=True))
    for alone, kept in zip(linear, stages, strict=True):
        rows, kernel = kept.T, None
        if alone:
            delta, bias = next(factors)
            rows, kernel = _rows(delta), kept @ kept.T + float(bias)
        for top, end in itertools.pairwise(cuts):
            block = gram[top * rank : end * rank, : end * rank]
            some, before = rows[top * rank : end * rank], rows[: end * rank]
            if kernel is None:
                block.addmm_(some, before.T)
                continue
            shape = end - top, rank, end, rank
            block = block.unflatten(0, shape[:2]).unflatten(2, shape[2:])
            block.addcmul_((some @ before.T).view(shape), kernel[top:end, None, :end, None])
    return gram


def _quadratic(
    z: Float[Tensor, "B a_in"], delta: Float[Tensor, "B a_out r"], gram: Float[Tensor, "B r n"], p: int
) -> Float[Tensor, " p"]:
    """The diagonal of D_l Gram^-1 D_l^T: sum_nn' z_ni W^o_nn' z_n'i, W^o_nn' = sum_cc' delta_nco [Gram^-1]_nc,n'c' delta_n'c'o; z = 1 for a bias."""
    batch, rank, weights, biases = len(z), delta.shape[2], [], []
    for some in delta.split(max(1, CHUNK // (batch * max(gram.shape[2], z.shape[1]))), 1):
        half = (some @ gram).view(batch, -1, batch, rank)
        W = (half * some.transpose(0, 1)).sum(3).transpose(0, 1)  # (units, B, B)
        weights.append(((W @ z) * z).sum(1))
        biases.append(W.sum((1, 2)))
    out = torch.cat(weights).flatten()
    return torch.cat([out, *biases]) if p > len(out) else out


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
            if not stage.parameters:
                delta = _pulled(stage, delta)
            else:
                D, before = (_shared if stage.kind == "linear" else _general)(stage, delta, number > 0)
                yield stage, D, delta
                delta = before
        signals[-1] = delta


def _rows(delta: Float[Tensor, "B a_out r"]) -> Float[Tensor, "n a_out"]:
    """((n, c), a_out)."""
    return delta.mT.reshape(-1, delta.shape[1])


def _kernel(stage: Stage) -> Float[Tensor, "B B"]:
    return stage.inputs @ stage.inputs.T + float(stage.has_bias)


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
