"""What one training sample does to the loss on other data: its influence, and leaving it out.

The weights are taken for a minimum of the loss plus damping |x|^2 / 2, the penalty that they were trained with: there its gradient is zero. M = H + damping I
is its Hessian; sample n has the gradient g_n and the curvature H_n of its term in the loss. Without it, to first order in the test loss, that is higher by

    leave_one_out    g_test^T (M - H_n)^-1 g_n     a Newton step of the objective without the sample
    influence        g_test^T M^-1 g_n             the derivative in the weight of the sample

For the Gauss-Newton matrix, H_n = J_n^T R_n R_n^T J_n and g_n = J_n^T R_n beta_n, all samples come from one Cholesky factor of the dual:
(M - H_n)^-1 g_n = M^-1 J_n^T R_n v_n with v_n = (damping [Gram^-1]_nn)^-1 beta_n, which keeps its digits where a sample determines its own prediction.
"""

import torch
from torch import Tensor

from hinv.curvature import Curvature
from hinv.errors import AccuracyWarning, warn
from hinv.modes import exact
from hinv.network import Chain, losses, stagewise
from hinv.shapes import Float
from hinv.solve import RTOL
from hinv.solver.dual import Dual
from hinv.solver.memory import require
from hinv.solver.products import Products
from hinv.solver.refine import preconditioned_gmres, refined


@exact()
def influence(
    H: Curvature, inputs: Float[Tensor, "T ..."], targets: Tensor, damping: float = 1e-2
) -> Float[Tensor, " B"]:
    """(B,) by how much the loss on test samples would rise, to first order, if a sample of H's batch were left out: g_test^T (H + damping I)^-1 g_n.

    Positive for a sample that helps. g_n is the gradient of the sample's term in the loss, its 1 / B included, and the loss of the test samples is reduced
    as that of the batch, to their mean or sum. An `hinv.Hessian` answers what retraining would do, near a minimum; an `hinv.GGN` what a linearized
    network would (cross-validation of a linear model), which away from an exact fit is not the same.

    Source: Koh & Liang, arXiv:1703.04730, (2), with the exact inverse. Cost: one factorization and solve, and one walk forwards for all B samples: the
    derivative of each one's loss along (H + damping I)^-1 g_test; no gradient of a single sample is formed.

    Args:
        H: `hinv.Hessian` or `hinv.GGN` on the training samples.
        inputs, targets: (T, ...) test samples, as H's own.
        damping: eps (loss / parameter^2).

    Warns, raises: as `H.solve`, and ValueError or TypeError for test samples that the network or the loss cannot take.
    """
    return _along(H.chain, H.solve(_gradient(H.chain, inputs, targets), damping))


@exact()
def leave_one_out(
    H: Curvature, inputs: Float[Tensor, "T ..."], targets: Tensor, damping: float = 1e-2
) -> Float[Tensor, " B"]:
    """(B,) by how much the loss on test samples rises, to first order in it, by a Newton step that leaves one sample of H's batch out.

    g_test^T (H - H_n + damping I)^-1 g_n, the loss otherwise as it is (its 1 / B stays), from a minimum of the loss plus damping |x|^2 / 2. With an `hinv.Hessian`
    a step towards what retraining without the sample would find; with an `hinv.GGN` leave-one-out cross-validation of the linearized network, not retraining.
    Source: Rad & Maleki, arXiv:1801.10243 (approximate leave-one-out), with exact inverses.

    Cost: `hinv.GGN` of a convex loss, one Cholesky factorization of size B C for all samples (`hinv.solver.dual`). Otherwise B solves by GMRES preconditioned
    with the factorization of the whole batch, some ten products each. Float64 arithmetic.

    Args: as `influence`.

    Warns:
        AccuracyWarning: a solve without a sample did not come to a relative residual of 1e-8.

    Raises: as `influence`.
    """
    D = H.double()
    chain = D.chain
    g = _gradient(chain, inputs.to(D.dtype), targets.to(D.dtype) if targets.is_floating_point() else targets)
    found = _by_the_dual(D, g, damping) if H.gauss_newton and damping > 0 else None
    return (_one_by_one(D, g, damping) if found is None else found).to(H.dtype)


def _by_the_dual(D: Curvature, g: Float[Tensor, " P"], damping: float) -> Float[Tensor, " B"] | None:
    """None where the loss is not convex, or a sample's gradient not in the range of its Hessian (a loss that is linear far from its targets)."""
    chain = D.chain
    at = chain.loss, chain.outputs, chain.targets
    if not losses.convex(*at):
        return None
    R, b = losses.root(*at), losses.gradient(*at).flatten(1)
    beta = (torch.linalg.pinv(R) @ b.unsqueeze(2)).squeeze(2)  # (B, r)
    if not ((R @ beta.unsqueeze(2)).squeeze(2) - b).norm() <= torch.finfo(b.dtype).eps ** 0.5 * b.norm():
        return None
    require(D.estimate(), "dual", D.device)
    L, (batch, rank) = Dual(chain, damping).L, beta.shape
    inner = torch.cholesky_inverse(L).view(batch, rank, batch, rank).diagonal(0, 0, 2).permute(2, 0, 1)
    v = torch.linalg.solve(damping * inner, beta)
    moved = stagewise.moved(chain, D.solve(g, damping)).flatten(1)  # J M^-1 g_test
    return ((R.mT @ moved.unsqueeze(2)).squeeze(2) * v).sum(1)


def _one_by_one(D: Curvature, g: Float[Tensor, " P"], damping: float) -> Float[Tensor, " B"]:
    rtol, batch = RTOL[torch.float64], len(D.chain.inputs)
    if batch == 1:  # without the only sample the penalty is left alone
        return (g @ D.gradient / damping).reshape(1)
    factor, out, worst = D.factor(damping), [], 0.0
    for n in range(batch):
        M = Products(_without(D.chain, n), D.gauss_newton)
        move, residual, _ = refined(
            M,
            lambda r, M=M: preconditioned_gmres(M, factor.solve, r, damping, rtol),
            D.gradient - M.gradient,
            damping,
            rtol,
        )
        out.append(g @ move)
        worst = max(worst, residual)
    if not worst <= rtol:
        warn(
            f"solves without one sample came to a relative residual of {worst:.1e}: H without it is close to singular at damping {damping:g}; take more "
            "damping, or hinv.GGN",
            AccuracyWarning,
        )
    return torch.stack(out)


def _gradient(chain: Chain, inputs: Tensor, targets: Tensor) -> Float[Tensor, " P"]:
    """Of the loss on other samples."""
    return Products(Chain(chain.model, chain.loss, inputs, targets, check=False), gauss_newton=True).gradient


def _along(chain: Chain, v: Float[Tensor, " P"]) -> Float[Tensor, " B"]:
    """The derivative of each sample's loss along v: b_n . J_n v."""
    b = losses.gradient(chain.loss, chain.outputs, chain.targets)
    return (b * stagewise.moved(chain, v)).flatten(1).sum(1)


def _without(chain: Chain, n: int) -> Chain:
    """The same loss, in which sample n is a constant."""
    outputs, loss, targets = chain.outputs, chain.loss, chain.targets
    others = torch.tensor([i for i in range(len(outputs)) if i != n], device=outputs.device)

    def rest(own: Tensor, _: Tensor) -> Tensor:
        return loss(outputs.index_copy(0, others, own), targets)

    return Chain(chain.model, rest, chain.inputs[others], targets[others], check=False)
