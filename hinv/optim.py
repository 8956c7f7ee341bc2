"""Descent with exact curvature: one `step(inputs, targets)`, whatever the method.

Every class finds a direction d on the batch and hands it to an ordinary torch optimizer as if it were the gradient: theta -= rate * d for the
default SGD(lr=1). So momentum on the preconditioned step is SGD's momentum, and every schedule of torch.optim.lr_scheduler works on `.optimizer`.

    GradientDescent      d = g                                  the baseline: SGD, momentum, Adam, anything from torch.optim
    DampedNewton         d = (H + eps I)^-1 g                   the paper's
    GaussNewton          d = (G + eps I)^-1 g                   G the Gauss-Newton matrix; eps by Levenberg and Marquardt
    TrustRegionNewton    d = argmin of the model in a ball      More and Sorensen (1983) on exact factorizations
    SaddleFreeNewton     d = (|H| + eps I)^-1 g                 Dauphin et al. (2014), on the dense or a Lanczos spectrum

With s the step really taken, the model predicts the decrease -(g.s + s.Cs / 2), C = H or G, and rho = decrease of the loss / predicted decrease. A step
that makes the loss of its own batch larger is taken back, and momentum starts anew.

Minibatches: a gradient wants many images and costs little; a matrix is good enough from few, and stays good for many steps. `sample` makes it from the
first images of the batch alone (Byrd et al., SIAM J. Optim. 21, 2011), `every` keeps a factorization for several steps. Both together bring an exact
Gauss-Newton step to less than two gradient steps.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hinv.curvature import GGN, Curvature, Hessian
from hinv.errors import NotFiniteError, SingularShiftError
from hinv.network import losses
from hinv.solver.estimate import require

SUFFICIENT = 1e-4  # share of the predicted decrease below which a step is taken back


@dataclass(frozen=True)
class StepReport:
    """What one step did; None where the method does not know, or did not measure it (see `Preconditioned`).

    `loss` of the batch before, `loss_after` on the same batch; `decrease` predicted by the model, `ratio` rho; `damping` of the factorization used;
    `step_norm` of the step taken (0 if taken back); `inertia` of C + damping I; `factorizations` and `seconds` it took; `note`: why it is not the
    plain step of its method.
    """

    loss: float
    loss_after: float | None = None
    decrease: float | None = None
    ratio: float | None = None
    damping: float | None = None
    step_norm: float | None = None
    inertia: tuple[int, int, int] | None = None
    accepted: bool = True
    factorizations: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass
class Direction:
    """d, and what it came from."""

    d: Tensor
    inertia: tuple[int, int, int] | None = None
    factorizations: int = 0
    note: str = ""


class Descent:
    """What all methods share: the torch optimizer behind them, clipping, acceptance, state.

    Args:
        model, loss: as `hinv.Hessian` takes them.
        optimizer: a torch.optim.Optimizer over the model's parameters, which takes the direction for a gradient; SGD(lr=1) by default.
        clip: largest norm of the direction (as torch.nn.utils.clip_grad_norm_).
    """

    def __init__(
        self, model: nn.Sequential, loss: losses.Loss, optimizer: torch.optim.Optimizer | None, clip: float | None
    ):
        self.model, self.loss = model, loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameter: set requires_grad=True on some")
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0) if optimizer is None else optimizer
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if {id(p) for p in held} != {id(p) for p in self.parameters}:
            raise ValueError("the optimizer must hold exactly the model's trainable parameters: build it from them")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be a positive number or None, not {clip}")
        self.clip = clip

    def _gradient(self, inputs: Tensor, targets: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            value = losses.value(self.loss, self.model(inputs), targets)
            gradient = torch.autograd.grad(value, self.parameters, materialize_grads=True)
        g = parameters_to_vector(g.contiguous() for g in gradient)
        if not g.isfinite().all():
            raise NotFiniteError("the gradient contains NaN or infinite values: check the scale of inputs and weights")
        return value.item(), g

    def _move(self, d: Tensor) -> None:
        """One step of the torch optimizer with d in place of the gradient."""
        pieces = d.split([p.numel() for p in self.parameters])
        for p, piece in zip(self.parameters, pieces, strict=True):
            p.grad = piece.view_as(p)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _position(self) -> Tensor:
        return parameters_to_vector(self.parameters).detach()

    def state_dict(self) -> dict:
        """Everything the next step depends on, as torch.save and torch.load(weights_only=True) take it. The model's weights are not in it."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])


class GradientDescent(Descent):
    """The baseline: one step of any torch optimizer. It computes nothing more than the step, so the report has only `loss` and `seconds`.

    Example:
        >>> descent = GradientDescent(model, loss, torch.optim.Adam(model.parameters(), 1e-3))
        >>> descent.step(x, y).loss
    """

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
    ):
        super().__init__(model, loss, optimizer, clip)

    def step(self, inputs: Tensor, targets: Tensor) -> StepReport:
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = losses.value(self.loss, self.model(inputs), targets)
            loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return StepReport(loss.item(), seconds=time.perf_counter() - start)


class Preconditioned(Descent):
    """The loop of the curvature methods. A subclass says which matrix (`kind`) and finds a direction with it (`_direct`).

    Args:
        damping: eps (loss / parameter^2).
        adapt: factor by which the damping falls where rho > 3/4 and rises where rho < 1/4 (Levenberg, Marquardt); 1 keeps it.
        every: steps between factorizations; in between the last one serves the new gradients.
        accept: whether a step that makes the loss of its batch larger is taken back. Without it rho is measured where the matrix is new, and only there.
        sample: how many images of each batch, the first ones, the matrix is made from; None: all. The loss must be a mean over samples.

    A step whose matrix cannot be factored, or whose direction is not finite, becomes the gradient step of the length that the model suggests,
    |g|^2 / |g.(C + eps I)g|; the report's `note` says why.
    """

    kind: type[Curvature]

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None,
        clip: float | None,
        damping: float,
        adapt: float,
        every: int,
        accept: bool,
        sample: int | None,
    ):
        super().__init__(model, loss, optimizer, clip)
        if not 0 < damping < math.inf:
            raise ValueError(f"damping must be a positive number, not {damping}")
        if not adapt >= 1:
            raise ValueError(f"adapt must be at least 1 (1 keeps the damping), not {adapt}")
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every}")
        if sample is not None and sample < 1:
            raise ValueError(f"sample must be at least 1 image, or None for the whole batch, not {sample}")
        if sample is not None and getattr(loss, "reduction", None) != "mean":
            raise ValueError(
                f"sample= needs a loss with reduction 'mean', so that a few images stand for all; {loss} has not: leave sample at None"
            )
        self.sample = sample
        self.damping, self.adapt, self.every, self.accept = float(damping), float(adapt), int(every), bool(accept)
        self.floor = torch.finfo(self.parameters[0].dtype).eps ** 0.75
        self._curvature: Curvature | None = None  # the one that was factored, and at which damping
        self._used, self._age, self._checked = 0.0, 0, False

    # what a subclass says

    def estimate(self, C: Curvature) -> str:
        """What a factorization of a matrix like C costs, in a sentence.

        Raises:
            MemoryError: it does not fit.
        """
        prediction = C.estimate()
        prediction = replace(prediction, method="dual" if prediction.method == "dual" else "factor")
        require(prediction, prediction.method, C.device)
        return str(prediction)

    def _direct(self, C: Curvature, g: Tensor) -> Direction:
        """A direction from a fresh matrix; keeps what `_again` needs."""
        self._keep(C)
        return replace(self._again(g), factorizations=1)

    def _keep(self, C: Curvature) -> None:
        """Factor C at the damping `_used`."""
        self._factor = C.factor(self._used)

    def _again(self, g: Tensor) -> Direction:
        """A direction for a gradient from what was kept."""
        return Direction(self._factor.solve(g), self._factor.inertia)

    def _adjust(self, ratio: float, length: float) -> None:
        """The damping after a step with this rho."""
        self.damping = max(self.damping / self.adapt, self.floor) if ratio > 0.75 else self.damping
        self.damping = self.damping * self.adapt if not ratio >= 0.25 else self.damping

    # the step

    def step(self, inputs: Tensor, targets: Tensor) -> StepReport:
        """One step on a batch.

        Raises:
            ValueError, TypeError: what the model, the loss or the batch cannot be, by name (see `hinv.Hessian`); NaN in loss or weights. The weights
                are as before the call. MemoryError: the factorization does not fit.
        """
        start, before = time.perf_counter(), self._position()
        fresh = self._curvature is None or self._age % self.every == 0
        if fresh:
            # the checks that cost products are made once: the model's structure stays, only its weights move
            few = slice(self.sample)
            C = self.kind(self.model, self.loss, inputs[few], targets[few], check=not self._checked)
            self._checked, self._age, self._used, self._curvature = True, 0, self.damping, C
        C = self._curvature
        whole = fresh and len(C.chain.inputs) == len(inputs)
        loss, g = (C.loss, C.gradient) if whole else self._gradient(inputs, targets)
        try:
            found = self._direct(C, g) if fresh else self._again(g)
            if not found.d.isfinite().all():
                raise SingularShiftError("the direction is not finite")
        except (SingularShiftError, ArpackError) as error:
            self._age = -1  # nothing to use again
            curvature = (g @ (C @ g) + (self._used or 0.0) * (g @ g)).abs().item()
            found = Direction(
                g * ((g @ g).item() / curvature if curvature > 0 else 1.0), note=f"gradient step: {error}"
            )
        self._move(found.d)
        s = self._position() - before
        report = StepReport(
            loss,
            damping=self._used,
            step_norm=s.norm().item(),
            inertia=found.inertia,
            factorizations=found.factorizations,
            note=found.note,
        )
        if self.accept or fresh:
            report = self._judge(report, C, g, s, before, inputs, targets)
        self._age += 1
        return replace(report, seconds=time.perf_counter() - start)

    def _judge(
        self,
        report: StepReport,
        C: Curvature,
        g: Tensor,
        s: Tensor,
        before: Tensor,
        inputs: Tensor,
        targets: Tensor,
    ) -> StepReport:
        """Measure rho, adjust the damping, and take the step back if it is to be."""
        decrease = -(g @ s + 0.5 * (s @ (C @ s))).item()
        with torch.no_grad():
            loss_after = float(self.loss(self.model(inputs), targets))
        gain = report.loss - loss_after
        ratio = gain / decrease if decrease else math.nan
        good = math.isfinite(loss_after) and gain >= SUFFICIENT * max(decrease, 0.0)
        self._adjust(ratio if good else -math.inf, report.step_norm)
        report = replace(report, loss_after=loss_after, decrease=decrease, ratio=ratio)
        if good or not self.accept:
            return report
        vector_to_parameters(before, self.parameters)
        self.optimizer.state.clear()  # a velocity that led uphill would do so again, however small the step it is added to
        self._age = -1
        note = "; ".join(filter(None, [report.note, "taken back: the loss rose"]))
        return replace(report, step_norm=0.0, accepted=False, note=note)

    def state_dict(self) -> dict:
        state = super().state_dict() | {"damping": self.damping, "used": self._used, "age": self._age, "held": None}
        if self._curvature is not None and self._age % self.every:
            chain = self._curvature.chain  # the factorization itself is made again: the batch and weights determine it
            at = parameters_to_vector(chain.parameters).detach()
            state["held"] = {"inputs": chain.inputs, "targets": chain.targets, "parameters": at}
        return state

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.damping, self._used, self._age = state["damping"], state["used"], state["age"]
        self._curvature = None
        if state["held"] is not None:
            held, now = state["held"], self._position()
            vector_to_parameters(held["parameters"], self.parameters)
            self._curvature = self.kind(self.model, self.loss, held["inputs"], held["targets"], check=False)
            self._keep(self._curvature)
            vector_to_parameters(now, self.parameters)


class DampedNewton(Preconditioned):
    """The paper's step (H + eps I)^-1 g. Where H has eigenvalues below -eps it may point uphill: it is the honest article, nothing is flipped.

    Cost: one factorization of H (see `Hessian.factor`) for each `every` steps.
    """

    kind = Hessian

    def __init__(
        self, model, loss, optimizer=None, clip=None, damping=1.0, adapt=1.0, every=1, accept=False, sample=None
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)


class GaussNewton(DampedNewton):
    """(G + eps I)^-1 g with the exact Gauss-Newton matrix, always downhill; for cross-entropy the exact natural gradient.

    On a fixed batch the damping adapts and a step that fails is taken back. On minibatches, where rho sees only the batch that made the step,
    a fixed damping (adapt=1, accept=False) and a rate below one are better.
    """

    kind = GGN

    def __init__(
        self, model, loss, optimizer=None, clip=None, damping=0.1, adapt=3.0, every=1, accept=True, sample=None
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)


class TrustRegionNewton(Preconditioned):
    """The minimizer of the quadratic model with the exact Hessian in the ball |s| <= radius.

    It is s = -(H + lambda I)^-1 g with H + lambda I positive semidefinite, known from the inertia of each factorization, and |s| = radius; lambda by
    Newton's method on 1/|s| = 1/radius, safeguarded by a bracket. In the hard case (|s| < radius however close lambda comes to -lambda_min) an
    eigenvector of the lowest eigenvalue, found by inverse iteration with the same factorization, fills up to the boundary.

    Args:
        radius: first radius, in the norm of the parameters; it halves where rho < 1/4, quarters where the loss rose, and doubles where rho > 3/4 at
            the boundary.
        rtol: of |s| = radius.

    Cost: usually one to three factorizations of H a step, and some dozens of products with it for a lower bound of lambda.
    """

    kind = Hessian

    def __init__(self, model, loss, optimizer=None, clip=None, radius=0.3, rtol=0.1, every=1, accept=True, sample=None):
        if not radius > 0:
            raise ValueError(f"radius must be a positive number, not {radius}")
        super().__init__(
            model, loss, optimizer, clip, damping=1.0, adapt=1.0, every=every, accept=accept, sample=sample
        )
        least = torch.finfo(self.parameters[0].dtype).eps ** 0.5
        if not least <= rtol < 1:
            raise ValueError(f"rtol must lie between {least:.1g}, what rounding leaves of |s|, and 1, not {rtol}")
        self.radius, self.rtol, self.damping = float(radius), rtol, None
        self._lowest: Tensor | None = None  # an eigenvector, and how far lambda was above minus its eigenvalue
        self._excess: float | None = None

    def _direct(self, H: Curvature, g: Tensor) -> Direction:
        norm, finite = g.norm().item(), torch.finfo(g.dtype)
        if norm < finite.tiny**0.5:  # what would be computed from its square is zero
            return Direction(g)
        excess = norm / self.radius if self._excess is None else self._excess
        found = more_sorensen(H, g, self.radius, excess, finite.eps**0.5, self.rtol, self._lowest)
        self.damping = self._used = found.shift
        self._factor, self._lowest, self._excess = found.factor, found.lowest, found.excess
        return Direction(-found.s, self._factor.inertia, found.factorizations, found.note)

    def _again(self, g: Tensor) -> Direction:
        found = super()._again(g)
        return replace(found, d=found.d * min(1.0, self.radius / found.d.norm().item()))

    def _adjust(self, ratio: float, length: float) -> None:
        before = self.radius
        if not ratio >= 0.25:
            self.radius = (0.5 if ratio > 0.0 else 0.25) * min(self.radius, length)
        elif ratio > 0.75 and length > (1 - 2 * self.rtol) * self.radius:
            self.radius *= 2.0
        self.radius = max(self.radius, torch.finfo(self.parameters[0].dtype).eps)  # shorter steps are lost in rounding
        if self._excess is not None:
            self._excess *= before / self.radius  # at the boundary lambda + lambda_min goes about as 1 / radius

    def state_dict(self) -> dict:
        return super().state_dict() | {"radius": self.radius, "lowest": self._lowest, "excess": self._excess}

    def load_state_dict(self, state: dict) -> None:
        self.radius, self._lowest, self._excess = state["radius"], state["lowest"], state["excess"]
        super().load_state_dict(state)


MOST = 15  # factorizations in one trust-region step


@dataclass
class Ball:
    """What More and Sorensen's method returns: the step, lambda, its excess over the lower bound, the factorization there, an approximate eigenvector of
    the lowest eigenvalue."""

    s: Tensor
    shift: float
    excess: float
    factor: object
    lowest: Tensor | None
    factorizations: int
    note: str = ""


def more_sorensen(
    H: Curvature, g: Tensor, radius: float, excess: float, floor: float, rtol: float, lowest: Tensor | None = None
) -> Ball:
    """min g.s + s.Hs / 2 in the ball |s| <= radius, to a share rtol of the radius or of the decrease.

    Source: J. J. More, D. C. Sorensen, SIAM J. Sci. Stat. Comput. 4 (1983), section 3; positive definiteness is read off the inertia. Lanczos finds the
    lowest eigenvalue roughly, at the price of a few dozen products: it bounds lambda from below, as -lambda_min >= -z.Hz for every unit vector z.

    Args:
        excess: of the first lambda over that bound. floor: the smallest lambda (loss / parameter^2).
        lowest: a guess of the lowest eigenvector.

    Raises:
        SingularShiftError: no positive definite H + lambda I was met.
    """
    z, bound = _lowest_pair(H, lowest)
    bound = low = max(floor, bound)
    high, best = math.inf, None
    shift = max(1.1 * low, low + excess)
    for count in range(1, MOST + 1):
        try:
            F = H.factor(shift)
            definite = F.inertia[1] == 0
        except SingularShiftError:  # lambda is minus an eigenvalue
            definite = False
        if not definite:
            low = max(low, shift)
            shift = 2.0 * shift if high == math.inf else math.sqrt(low * high)
            continue
        s = -F.solve(g)
        length = s.norm().item()
        u = s / length
        newton = shift + (length - radius) / radius / (u @ F.solve(u)).item()
        found = Ball(s, shift, shift - bound, F, z, count)
        if length > (1 + rtol) * radius:
            low = max(low, shift)
        elif length >= (1 - rtol) * radius:
            return found
        else:
            z, quotient = _inverse_iteration(H, F, s, z)
            tau = _to_the_boundary(s, z, radius)
            # adding tau z costs the model tau^2 z.(H + lambda I)z, of a decrease of at least half of s.(H + lambda I)s + lambda radius^2
            if tau**2 * (quotient + shift) <= rtol * (2 - rtol) * (shift * radius**2 - (s @ g).item()):
                return replace(found, s=s + tau * z, lowest=z, note="hard case: lowest eigenvector added")
            if shift <= 1.1 * floor:
                return found
            best, high, low = replace(found, lowest=z), shift, max(low, -quotient)
            if high <= low * (1 + 1e-3):
                break
        least = 1.1 * low if high == math.inf else low + 0.05 * (high - low)
        shift = min(max(newton, least), high)
    if best is None:
        raise SingularShiftError(f"no positive definite H + lambda I in {MOST} factorizations, lambda up to {low:.2g}")
    note = f"inside the radius {radius:.2g} after {count} factorizations"
    return replace(best, factorizations=count, note=note)


def _lowest_pair(H: Curvature, guess: Tensor | None) -> tuple[Tensor | None, float]:
    """An approximate eigenvector of the lowest eigenvalue of H by Lanczos, and minus its Rayleigh quotient."""
    if H.shape[0] < 3:
        return None, -math.inf
    if guess is None:
        guess = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        _, vectors = eigsh(H.to_scipy(), 1, which="SA", tol=0.01, v0=guess.cpu().double().numpy())
    except ArpackError:  # no convergence, or H is zero
        return None, -math.inf
    z = torch.as_tensor(vectors[:, 0]).to(H.gradient)
    z = z / z.norm()
    return z, -(z @ (H @ z)).item()


def _inverse_iteration(H: Curvature, F, s: Tensor, z: Tensor | None) -> tuple[Tensor, float]:
    """An approximate eigenvector of the lowest eigenvalue of H, and its Rayleigh quotient, by the factorization of H + lambda I."""
    if z is None:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(len(s), generator=generator, dtype=s.dtype).to(s.device)
    for _ in range(2):
        z = F.solve(z)
        z = z / z.norm()
    return z, (z @ (H @ z)).item()


def _to_the_boundary(s: Tensor, z: Tensor, radius: float) -> float:
    """The tau of smaller magnitude with |s + tau z| = radius."""
    sz, rest = (s @ z).item(), radius**2 - (s @ s).item()
    return rest / (sz + math.copysign(math.sqrt(sz**2 + rest), sz)) if rest > 0 else 0.0


class SaddleFreeNewton(Preconditioned):
    """(|H| + eps I)^-1 g: every eigenvalue by its absolute value, so that saddles repel.

    Args:
        pairs: how many eigenpairs of largest magnitude Lanczos finds (ARPACK, to 10 percent); the rest of the gradient is divided by the magnitude of
            the curvature along it. None: all of them, by a dense eigendecomposition, for small networks.

    Cost: some 3 `pairs` products with H a step; with None O(P^3).
    """

    kind = Hessian

    def __init__(
        self,
        model,
        loss,
        optimizer=None,
        clip=None,
        damping=0.1,
        adapt=3.0,
        pairs=20,
        every=1,
        accept=True,
        sample=None,
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)
        P = sum(p.numel() for p in self.parameters)
        if pairs is not None and not 1 <= pairs < P:
            raise ValueError(f"pairs must lie between 1 and {P - 1} (or be None for all), not {pairs}")
        self.pairs = pairs

    def estimate(self, C: Curvature) -> str:
        prediction = C.estimate()
        if self.pairs is None:
            require(prediction, "dense", C.device)
            return str(replace(prediction, method="dense"))
        P = prediction.parameters
        size = 8 * P * (max(2 * self.pairs + 1, 20) + self.pairs)  # ARPACK's basis and the vectors it returns, float64
        return f"{P:,} parameters, batch {prediction.batch}: Lanczos, about {size / 2**20:,.0f} MiB"

    def _direct(self, H: Curvature, g: Tensor) -> Direction:
        self._keep(H)
        return self._again(g)

    def _keep(self, H: Curvature) -> None:
        g = H.gradient
        if self.pairs is None:
            require(H.estimate(), "dense", H.device)
            values, self._vectors = torch.linalg.eigh(H.dense())
            self._rest = 0.0
        else:
            v0 = (g / g.norm()).cpu().double().numpy()
            values, vectors = eigsh(H.to_scipy(), self.pairs, which="LM", tol=0.1, v0=v0)
            values, self._vectors = (torch.as_tensor(a).to(g) for a in (values, vectors))
            rest = g - self._vectors @ (self._vectors.T @ g)
            self._rest = abs((rest @ (H @ rest)).item()) / max((rest @ rest).item(), torch.finfo(g.dtype).tiny)
        self._values = values.abs()
        self._negative = int((values < 0).sum()) if self.pairs is None else None

    def _again(self, g: Tensor) -> Direction:
        inner = self._vectors.T @ g
        d = self._vectors @ (inner / (self._values + self._used))
        if self.pairs is not None:
            d = d + (g - self._vectors @ inner) / (self._rest + self._used)
        inertia = None if self._negative is None else (len(g) - self._negative, self._negative, 0)
        return Direction(d, inertia)
