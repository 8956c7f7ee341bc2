"""The Gauss-Newton matrix through its dual: one (B C) x (B C) Cholesky, exact, and no P x P or stagewise elimination.

    GGN = J^T Lambda J,  Lambda = R R^T,  D = J^T R  (P x BC; fewer columns where Lambda has less rank),  Gram = eps I + D^T D
    (GGN + eps I)^-1 = (I - D Gram^-1 D^T) / eps
    log det(GGN + eps I) = (P - BC) log eps + log det Gram                                            (Sylvester's identity)
    tr (GGN + eps I)^-1 = (P - BC) / eps + tr Gram^-1

With fewer parameters than columns the difference cancels, and everything comes from eps I + D D^T (P x P, the smaller of the two).

D is never formed for linear stages: its column for output direction c of sample n is the outer product of a backpropagated delta_nc and the stage's
input, so D^T D adds up (delta_nc . delta_n'c') (z_n . z_n' + 1) over the stages. Cost O(sum over stages of B C a (a + B C)) and (B C)^3 / 3.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from hinv.errors import SingularShiftError
from hinv.network import Chain, losses
from hinv.shapes import Float

from .factor import check_right_hand_side
from .inverse import Inverse
from .root import Root, alone, backpropagated, every, jacobian, kernel_of, rows_of

CHUNK = 2**22  # numbers formed at once


class Dual(Inverse):
    """GGN + damping I for damping > 0, factored: solve, inertia, logdet, parts of the inverse and samples."""

    inverse_error = 0.0  # it is definite

    def __init__(self, D: Root | Chain, damping: float):
        if not damping > 0:
            raise ValueError(f"the dual form needs damping > 0, not {damping}: use method='factor'")
        self.D = D = Root(D) if isinstance(D, Chain) else D
        self.damping, self.names, self.sizes = damping, D.names, D.sizes
        self.columns, self.like = D.batch * D.rank, D.delta.new_zeros(0)
        self._factored = self.L if self._small is None else self._small

    @cached_property
    def L(self) -> Float[Tensor, "n n"]:
        """The Cholesky factor of Gram."""
        return self._cholesky(self.D.gram())

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
        x = g - self.D.apply(torch.cholesky_solve(self.D.transpose(g), self.L))
        return (x / self.damping).T.reshape(b.shape).to(b.dtype)

    def least_squares(self, previous: Float[Tensor, " P"] | None = None) -> Float[Tensor, " P"] | None:
        """(P,) the minimizer d of |R^T J d - beta|^2 + damping |d - previous|^2 for the batch's own gradient g = D beta: (GGN + damping I)^-1 (g + damping previous).

        From the residuals themselves, d = previous + D Gram^-1 (beta - D^T previous): in `solve` they come back from g by a difference that loses as many digits as
        the damping is smaller than the GGN. None where g is not in the range of D (a loss that is linear far from its targets), or not this batch's alone.
        """
        chains = list(self.D.chains)
        if len(chains) != 1 or self.D.everywhere:
            return None
        at = chains[0].loss, chains[0].outputs, chains[0].targets
        R, b = losses.root(*at), losses.gradient(*at).flatten(1).unsqueeze(2)
        beta = torch.linalg.pinv(R) @ b  # (B, r, 1)
        if not (R @ beta - b).norm() <= torch.finfo(b.dtype).eps ** 0.5 * b.norm():
            return None
        residuals = beta.reshape(-1, 1)
        if previous is not None:
            residuals = residuals - self.D.transpose(previous.unsqueeze(0))
        if self._small is None:
            d = self.D.apply(torch.cholesky_solve(residuals, self.L))[0]
        else:
            d = torch.cholesky_solve(self.D.apply(residuals).T, self._small)[:, 0]
        return d if previous is None else d + previous

    # -- the inverse (`hinv.solver.inverse`) ----------------------------------------------------------------------------

    @cached_property
    def _small(self) -> Float[Tensor, "P P"] | None:
        """With fewer parameters than columns of D, the Cholesky factor of eps I + D D^T; otherwise None."""
        P = sum(self.sizes)
        if self.columns <= P:
            return None
        D = torch.cat([self.D.formed(number) for number in range(len(self.sizes))])
        return self._cholesky(D @ D.T)

    def _diagonal(self) -> Float[Tensor, " P"]:
        if self._small is not None:
            return torch.cholesky_inverse(self._small).diagonal().clone()
        gram, out = torch.cholesky_inverse(self.L).view(self.D.batch, self.D.rank, -1), []
        deltas = list(self.D.delta.split(self.D.units, 1))
        for linear, kept, p in zip(self.D.linear, self.D.stages, self.sizes, strict=True):
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
        half = torch.linalg.solve_triangular(self.L, self.D.formed(number).T, upper=False)
        out = half.T @ -half
        out.diagonal().add_(1.0)
        return out / self.damping

    def _of_outputs(self) -> Float[Tensor, "B C C"]:
        return torch.cat([self.covariance(chain) for chain in self.D.chains])

    def covariance(self, chain: Chain) -> Float[Tensor, "T C C"]:
        """(T, C, C) J_t (GGN + damping I)^-1 J_t^T of the samples of a chain through the same network, these or others.

        The outputs' own J goes back once more, and meets D in k* = J D and itself in k** = J_t J_t^T: (k** - k* Gram^-1 k*^T) / eps.
        """
        if self._small is not None:
            J = jacobian(chain)
            half = torch.linalg.solve_triangular(self._small, J, upper=False).view(len(J), len(chain.inputs), -1)
            return torch.einsum("pnc,pnd->ncd", half, half)
        outputs = chain.outputs.flatten(1)
        samples, C = outputs.shape
        k, own = outputs.new_zeros(samples, C, self.D.batch, self.D.rank), outputs.new_zeros(samples, C, C)
        stages, deltas = self.D.stages[::-1], list(self.D.delta.split(self.D.units, 1))
        for (stage, kept, delta), D in zip(backpropagated(chain, every(outputs)), stages, strict=True):
            if alone(stage):
                kernel = kernel_of(kept, D, stage.has_bias)
                k.addcmul_((rows_of(delta) @ rows_of(deltas.pop()).T).view_as(k), kernel[:, None, :, None])
                own += (delta.mT @ delta) * (kept.square().sum(1) + float(stage.has_bias))[:, None, None]
            else:
                k += (kept.T @ D).view_as(k)
                J = kept.view(-1, samples, C)
                own += torch.einsum("pnc,pnd->ncd", J, J)
        half = torch.linalg.solve_triangular(self.L, k.view(samples * C, -1).T, upper=False).view(-1, samples, C)
        return (own - torch.einsum("knc,knd->ncd", half, half)) / self.damping

    @property
    def noises(self) -> int:
        return sum(self.sizes) + self.columns

    def colored(self, noise: Float[Tensor, "noises n"]) -> Float[Tensor, "P n"]:
        """Matheron's rule: a draw from the prior, moved by what a noisy observation of D^T x says."""
        prior, observed = noise.split([sum(self.sizes), self.columns])
        x = prior.T / self.damping**0.5
        return (x - self.D.apply(torch.cholesky_solve(self.D.transpose(x) + observed, self.L))).T


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
