"""Laplace's approximation with the exact Gauss-Newton matrix: evidence, its maximization, predictions, samples.

The parameters have the prior N(0, I / alpha), the data the likelihood exp(-N l), l the loss and N what a mean over samples
has to be multiplied with (the samples). Around the trained parameters theta the
posterior is approximated by N(theta, Sigma) with

    Sigma^-1 = N G + alpha I = N (G + (alpha / N) I),    G = J^T Lambda J the Gauss-Newton matrix of the loss
    log evidence = -N l(theta) - alpha |theta|^2 / 2 + P log(alpha) / 2 - log det(Sigma^-1) / 2
    its derivative in log alpha is (gamma - alpha |theta|^2) / 2,    gamma = P - alpha tr Sigma, the effective number of parameters
    predictions, linearized at theta:  N(f(x; theta), J_x Sigma J_x^T)

Everything comes from one factorization of G + (alpha / N) I for each alpha, never of P x P where samples times outputs are few (`hinv.solver.dual`).
"""

import functools
import math

import torch
from torch import Tensor, nn

from hinv.curvature import GGN
from hinv.modes import exact
from hinv.network import Chain, losses
from hinv.shapes import Float
from hinv.solver.dual import Dual
from hinv.solver.factor import Factor
from hinv.solver.root import jacobian
from hinv.spectrum.loader import terms
from hinv.vectors import normal

LIMITS = 1e-12, 1e12  # of the prior precision, between which the evidence is maximized
COLUMNS = 2**25  # numbers of J_x^T formed at once


class Laplace:
    """The approximate posterior N(theta, Sigma) of a trained network on a batch; see the module's description.

    `hinv.laplace(model, loss, x, y)` makes one. Attributes: prior_precision (alpha, 1 / parameter^2); scale (N).
    """

    def __init__(self, G: GGN, prior_precision: float, scale: float):
        self.G, self.scale, self.prior_precision = G.double(), scale, prior_precision
        self.mean = nn.utils.parameters_to_vector(
            p for p in self.G.chain.model.parameters() if p.requires_grad
        ).detach()

    def __repr__(self) -> str:
        P, B = len(self.mean), len(self.G.chain.inputs)
        return f"Laplace({P} parameters, batch {B}, prior precision {self.prior_precision:.3g}, log evidence {self.log_evidence():.6g})"

    def factor(self, prior_precision: float | None = None) -> Factor | Dual:
        """G + (alpha / N) I, factored: N times the posterior's precision. Cost as `GGN.factor`."""
        return self.G.factor(self._alpha(prior_precision) / self.scale)

    def _alpha(self, prior_precision: float | None) -> float:
        return self.prior_precision if prior_precision is None else _positive(prior_precision, "prior_precision")

    def log_evidence(self, prior_precision: float | None = None) -> float:
        """log p(data | alpha) (nats), up to the constant of the likelihood that no alpha changes. Cost: one factorization."""
        alpha, P = self._alpha(prior_precision), len(self.mean)
        log_det = P * math.log(self.scale) + self.factor(alpha).logdet[1]
        return (P * math.log(alpha) - log_det - alpha * self.mean.square().sum().item()) / 2 - self.scale * self.G.loss

    def effective_parameters(self, prior_precision: float | None = None) -> float:
        """gamma = P - alpha tr Sigma: how many directions the data determine. Cost: a factorization and its `inverse_trace`."""
        return self.G.effective_parameters(self._alpha(prior_precision) / self.scale)

    def maximize(self) -> "Laplace":
        """Set prior_precision to a maximum of the evidence, exactly: where gamma = alpha |theta|^2 (MacKay 1992). Returns itself.

        Bracketed by factors of ten from the present prior precision towards the side on which the evidence rises, then Brent's method in log alpha: some ten
        to twenty factorizations.

        Raises:
            ValueError: the evidence has no maximum between 1e-12 and 1e12, as of a network whose parameters are zero.
        """
        from scipy.optimize import brentq  # a tenth of a second that who only imports hinv need not spend

        size = self.mean.square().sum().item()

        @functools.cache
        def rise(log_alpha: float) -> float:
            alpha = math.exp(log_alpha)
            return self.effective_parameters(alpha) - alpha * size

        here = there = math.log(self.prior_precision)
        step = math.copysign(math.log(10.0), rise(here))
        while rise(there) * step > 0:
            here, there = there, there + step
            if not math.log(LIMITS[0]) < there < math.log(LIMITS[1]):
                raise ValueError(
                    f"the evidence has no maximum for prior precisions between {LIMITS[0]:g} and {LIMITS[1]:g} (|theta|^2 = {size:.3g}): train the "
                    "network first, or set prior_precision by hand"
                )
        self.prior_precision = math.exp(brentq(rise, *sorted((here, there)), xtol=1e-10))
        return self

    @exact()
    def predict(self, inputs: Float[Tensor, "T ..."]) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T C C"]]:
        """(T, C) outputs of the network and (T, C, C) their covariance J_x Sigma J_x^T in the linearized posterior, flattened outputs (in float64).

        For classes these are logits: average softmax over draws, or scale them (MacKay's probit). Cost: one factorization, and by the dual a walk
        back for each output and kernels of T B a numbers a stage; otherwise a solve for each output of each input. In chunks.
        """
        factor, chain = self.factor(), self.G.chain
        outputs, covariances = [], []
        C = chain.outputs[0].numel()
        for some in inputs.to(self.mean.dtype).split(max(1, COLUMNS // (C * len(self.mean)))):
            new = Chain(chain.model, _first, some, some.new_zeros(len(some)), check=False)
            outputs.append(new.outputs.flatten(1))
            covariances.append(_covariance(factor, new) / self.scale)
        return torch.cat(outputs), torch.cat(covariances)

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "P n"]:
        """(P, n) draws of the parameters, theta + N(0, Sigma); generator as in `Factor.sample`. Cost: one factorization, and a solve for each draw at most."""
        return self.mean[:, None] + self.factor().sample(n, generator) / self.scale**0.5

    def probabilities(self, inputs: Float[Tensor, "T ..."], n: int = 1000) -> Float[Tensor, "T C"]:
        """(T, C) class probabilities: softmax averaged over n draws of the outputs' normal distribution, the same draws at every call."""
        mean, covariance = self.predict(inputs)
        values, vectors = torch.linalg.eigh(covariance)
        half = vectors * values.clamp_min(0.0).sqrt()[:, None, :]
        draws = normal((mean.shape[1], n), mean)
        return torch.softmax(mean[:, :, None] + half @ draws, 1).mean(2)


def laplace(
    model: nn.Sequential,
    loss: losses.Loss,
    inputs: Float[Tensor, "B ..."],
    targets: Tensor,
    prior_precision: float = 1.0,
    scale: float | None = None,
) -> Laplace:
    """Laplace's approximation of a trained network with the exact Gauss-Newton matrix: evidence, predictive variances, samples.

    Args:
        model, loss, inputs, targets: as of `hinv.GGN`; all of the data that the posterior is to know.
        prior_precision: alpha; `maximize()` finds the best.
        scale: N, by which the loss is multiplied to be minus the log-likelihood. By default what its mean divides by (the labels counted, for classes), and 1
            for a sum. MSELoss needs one: with normal noise of variance s2 it is (number of targets) / (2 s2).

    Raises:
        ValueError: the loss is not convex in the outputs, or its mean none of which it is known what it divides by; otherwise as `hinv.GGN`.
    """
    G = GGN(model, loss, inputs, targets)
    if not losses.convex(G.chain.loss, G.chain.outputs, G.chain.targets):
        raise ValueError("the loss is not convex in the outputs here, so N G is no precision: use another loss")
    if scale is None:
        reduction = getattr(loss, "reduction", None)
        if not isinstance(loss, nn.Module) or isinstance(loss, nn.MSELoss) or reduction not in ("mean", "sum"):
            raise ValueError(
                f"by what {loss} is to be multiplied to be minus the log-likelihood is not known: give scale=, for MSELoss and normal noise of variance s2 "
                "(number of targets) / (2 s2)"
            )
        scale = terms(loss, G.chain.targets) if reduction == "mean" else 1.0
    return Laplace(G, _positive(prior_precision, "prior_precision"), _positive(scale, "scale"))


def _positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {value}")
    return float(value)


def _covariance(factor: Factor | Dual, chain: Chain) -> Float[Tensor, "T C C"]:
    """(T, C, C) J_t (G + damping I)^-1 J_t^T of the samples of this chain."""
    if isinstance(factor, Dual):
        return factor.covariance(chain)
    J = jacobian(chain)  # (P, T C)
    moved = factor.solve(J).view(len(J), len(chain.inputs), -1)
    return torch.einsum("pnc,pnd->ncd", J.view_as(moved), moved)


def _first(outputs: Tensor, _: Tensor) -> Tensor:
    """Any loss: predictions have none."""
    return outputs.sum()
