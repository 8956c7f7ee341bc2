"""The spectrum of a curvature matrix from its factorizations: exact counts, certified eigenvalues; exact trace, diagonal and blocks without any.

By Sylvester's law H - s I has as many negative eigenvalues as its factorization has negative pivots: one factorization in O(L) counts the
eigenvalues below s. Two counts that differ by k prove that k eigenvalues lie between; ARPACK finds them, the counts certify that none was skipped.

Diagonal and blocks need the loss's second derivative alone. Block-diagonal over samples, it goes backwards by V_{l-1} = G_l + A_l^T V_l A_l (no
elimination), and the block of stage l is E_l + sum_n J_ln^T V_ln J_ln. Matrices are `hinv.Hessian` or `hinv.GGN`; P parameters, B samples.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from tqdm import tqdm

from hinv.errors import CertificateWarning, SingularShiftError
from hinv.network import losses
from hinv.network.chain import Stage
from hinv.network.stages import derivatives, elementwise

ROUNDS = 6  # searches for eigenvalues that the count says are missing
ACCURATE = 1e-7  # of the norm of H: the largest residual |H v - lambda v| of a certified pair


# -- counts ------------------------------------------------------------------------------------------------------------


def count_below(H, shift: float) -> int:
    shift = float(shift)
    if shift not in H.counted:
        H.counted[shift] = H.factor(-shift, dtype=torch.float64).inertia[1]
    return H.counted[shift]


def counts(H, edges: Sequence[float]) -> Tensor:
    edges = torch.as_tensor(edges, dtype=torch.float64).tolist()
    if len(edges) < 2 or not all(a < b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"edges must be at least two increasing numbers, not {edges[:4]}{'...' if len(edges) > 4 else ''}"
        )
    below = []
    try:
        for edge in tqdm(edges, desc="counting eigenvalues", unit="edge", delay=3, leave=False, disable=None):
            below.append(count_below(H, edge))
    except KeyboardInterrupt as stop:
        stop.add_note(f"{len(below)} of {len(edges)} edges are counted and kept: the same call goes on from there")
        raise
    return torch.tensor(below).diff()


def eigval(H, i: int, rtol: float = 1e-8) -> float:
    P = H.shape[0]
    if not -P <= i < P:
        raise ValueError(f"there are {P} eigenvalues: i must be from {-P} to {P - 1}, not {i}")
    if not rtol > 0:
        raise ValueError(f"rtol must be a positive number, not {rtol}")
    i %= P
    radius = (H @ H.gradient).norm().item() / max(H.gradient.norm().item(), 1e-300) or 1.0
    low = high = 0.0
    while not low < high or count_below(H, low) > i or count_below(H, high) <= i:
        radius *= 4.0
        low, high = _countable(H, -1.2 * radius, -0.8 * radius), _countable(H, 0.8 * radius, 1.2 * radius)
    with tqdm(desc=f"bisecting for eigenvalue {i}", unit="count", delay=3, leave=False, disable=None) as bar:
        while high - low > max(rtol * max(abs(low), abs(high)), 1e-12 * radius):
            try:
                middle = _countable(H, low, high)
            except SingularShiftError:
                if high - low > UNRESOLVED * radius:
                    raise
                break  # a cluster, as of the zeros of weights that the batch does not excite, too tight to count inside
            low, high = (middle, high) if count_below(H, middle) <= i else (low, middle)
            bar.update()
    return (low + high) / 2


UNRESOLVED = 1e-8  # of the norm of H: width of a bracket in which no shift could be factored


def _countable(H, low: float, high: float) -> float:
    """A point well inside (low, high) where H can be factored: the middle, unless that is an eigenvalue."""
    for share in (0.5, 0.45, 0.55, 0.35, 0.65, 0.2, 0.8):
        point = low + share * (high - low)
        try:
            count_below(H, point)
            return point
        except SingularShiftError as error:
            last = error
    raise last


# -- certified eigenpairs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eigenpairs:
    """k eigenvalues (loss / parameter^2) in ascending order with their vectors (P, k) and residuals |H v - lambda v| (k,).

    `certified`: inertia counts prove that these are the k wanted ones, none skipped and none twice (of a cluster at the edge of what was wanted, within
    rounding of the last value, as many as there was room for), with residuals below 1e-7 |H|; `note` says what was counted, or what is missing.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    certified: bool
    note: str


def find(H, k: int, which: str = "LA", sigma: float | None = None) -> Eigenpairs:
    """`Curvature.eigsh`."""
    P, H = H.shape[0], H.double()
    if sigma is None and which not in ("LA", "SA", "LM"):
        raise ValueError(f"which must be 'LA' (largest), 'SA' (smallest) or 'LM' (largest magnitude), not {which!r}")
    if not 1 <= k < P:
        raise ValueError(
            f"k must be from 1 to {P - 1} (P - 1), not {k}; for all eigenvalues use torch.linalg.eigvalsh(H.dense())"
        )
    region = _Region(H, which, sigma)
    values, vectors = torch.zeros(0, dtype=torch.float64), torch.zeros(P, 0, dtype=torch.float64)
    residuals, certified, note, missing = values, False, "", k
    for _ in range(ROUNDS):
        new = region.search(min(missing, k, P - len(values)), vectors)
        if new.shape[1] == 0:
            break
        values, vectors = _rayleigh_ritz(H, torch.cat([vectors, new], 1))
        rank = region.measure(values).argsort(descending=True)
        values, vectors = values[rank], vectors[:, rank]
        if len(values) < k:
            missing = k - len(values)
            continue
        values, vectors = values[:k], vectors[:, :k]
        residuals = torch.linalg.vector_norm(H @ vectors - vectors * values, dim=0)
        try:
            missing, note = region.missing(values, residuals)
        except (SingularShiftError, MemoryError) as error:
            note = f"not certified: {error}"
            break
        certified = missing == 0
        if missing <= 0:
            break
    if len(values) < k:
        raise ArithmeticError(
            f"ARPACK found {len(values)} of {k} eigenvalues; try fewer, or sigma next to the ones you want"
        )
    worst, scale = residuals.max().item(), max(values.abs().max().item(), abs(sigma or 0.0))
    if certified and worst > ACCURATE * max(scale, region.norm):
        certified, note = False, f"{note}, but the largest residual is {worst:.1e}"
    if not certified:
        warnings.warn(note, CertificateWarning, stacklevel=3)
    values, order = values.sort()
    return Eigenpairs(values, vectors[:, order], residuals[order], certified, note)


class _Region:
    """What is wanted, as a measure whose k largest values they are, with a search by ARPACK and an exact count of what exceeds a threshold."""

    def __init__(self, H, which: str, sigma: float | None):
        self.H, self.which, self.sigma = H, which, sigma
        self.inverse = None if sigma is None else H.factor(-sigma, dtype=torch.float64)
        g = H.gradient
        self.norm = (H @ g).norm().item() / max(g.norm().item(), 1e-300)  # a lower bound, of the right size for margins

    def measure(self, values: Tensor) -> Tensor:
        if self.sigma is not None:
            return -(values - self.sigma).abs()
        return {"LA": values, "SA": -values, "LM": values.abs()}[self.which]

    def solve(self, v: Tensor) -> Tensor:
        """(H - sigma I)^-1 v, refined once: next to a cluster the factorization alone loses the pairs further away."""
        x = self.inverse.solve(v)
        return x + self.inverse.solve(v - (self.H @ x - self.sigma * x))

    def search(self, k: int, known: Tensor) -> Tensor:
        """Up to k vectors (P, k) orthogonal to the known ones."""
        known, P = known.numpy(), len(known)
        apply = (lambda v: self.H @ v) if self.inverse is None else self.solve
        # where the known ones go: out of the way of what is wanted
        far = 0.0
        if self.inverse is None and known.shape[1]:
            far = (
                {"LA": -1.0, "SA": 1.0, "LM": 0.0}[self.which] * 10.0 * (self.H @ torch.from_numpy(known)).norm().item()
            )

        def matvec(v: np.ndarray) -> np.ndarray:
            v = v.reshape(-1)
            inside = known.T @ v
            image = apply(torch.from_numpy(v - known @ inside)).numpy()
            return image - known @ (known.T @ image) + known @ (far * inside)

        operator = LinearOperator((P, P), matvec=matvec, dtype=np.float64)
        generator = np.random.default_rng(known.shape[1])
        start = generator.standard_normal(P)
        start -= known @ (known.T @ start)
        room = P - known.shape[1]
        if k >= room:  # all that is left
            vectors = np.linalg.svd(known, full_matrices=True)[0][:, known.shape[1] :]
            return torch.from_numpy(np.ascontiguousarray(vectors))
        which, ncv = self.which if self.inverse is None else "LM", max(2 * k + 1, 40)
        for width in (ncv, 3 * ncv, 9 * ncv):
            try:
                vectors = eigsh(operator, k, which=which, v0=start, ncv=min(P, width), tol=1e-10)[1]
                break
            except ArpackNoConvergence as error:
                vectors = error.eigenvectors
                break
            except ArpackError as error:
                vectors = np.zeros((P, 0))
                if "-9:" in str(
                    error
                ):  # the start is mapped to zero: so is all that is left, and any vectors there are eigenvectors
                    vectors = np.linalg.qr(generator.standard_normal((P, k)))[0]
                    break
                # "no shifts could be applied", in a cluster: more room helps
        return torch.from_numpy(np.ascontiguousarray(vectors - known @ (known.T @ vectors)))

    def missing(self, values: Tensor, residuals: Tensor) -> tuple[int, str]:
        """How many of the wanted eigenvalues are not among these k, and the counts that say so.

        At least k lie up to just beyond the last one, and before it as many as were found: the last may be one of many that are equal.
        """
        scale = max(values.abs().max().item(), abs(self.sigma or 0.0), self.norm)
        margin = max(10.0 * residuals.max().item(), 1e-10 * scale) or 1e-10
        worst = self.measure(values).min().item()
        outer, enough = self._beyond(worst, -margin)
        if enough == len(values):
            return 0, f"{enough} eigenvalues {self.describe(outer)} by inertia, {len(values)} found"
        inner, exact = self._beyond(worst, margin)
        found = int((self.measure(values) > inner).sum())
        note = f"{exact} eigenvalues {self.describe(inner)} by inertia, {found} found; {enough} {self.describe(outer)}"
        return max(exact - found, len(values) - enough, 0) or -int(exact < found), note

    def _beyond(self, worst: float, margin: float) -> tuple[float, int]:
        """A threshold beside the last value where H can be factored, and how many eigenvalues exceed it."""
        for attempt in range(4):
            threshold = worst + margin * 3.0**attempt
            try:
                return threshold, self._exceeding(threshold)
            except SingularShiftError as error:
                last = error
        raise last

    def _exceeding(self, t: float) -> int:
        H, P = self.H, self.H.shape[0]
        if self.sigma is not None:
            return 0 if t >= 0 else count_below(H, self.sigma - t) - count_below(H, self.sigma + t)
        if self.which == "LA":
            return P - count_below(H, t)
        if self.which == "SA":
            return count_below(H, -t)
        return P if t <= 0 else P - count_below(H, t) + count_below(H, -t)

    def describe(self, t: float) -> str:
        if self.sigma is not None:
            return f"within {-t:.6g} of {self.sigma:g}"
        return {"LA": f"above {t:.6g}", "SA": f"below {-t:.6g}", "LM": f"of magnitude above {t:.6g}"}[self.which]


def _rayleigh_ritz(H, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The best eigenpairs of H in the span of a basis (P, k)."""
    basis = torch.linalg.qr(basis)[0]
    values, inner = torch.linalg.eigh(basis.T @ (H @ basis))
    return values, basis @ inner


# -- trace, diagonal, blocks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One stage's diagonal block, E + sum_n J_n^T V_n J_n, as functions of what is asked."""

    stage: Stage
    diagonal: Callable[[], Tensor]
    dense: Callable[[], Tensor]
    norm: Callable[[], Tensor]  # Frobenius


def blocks(H) -> Iterator[Block]:
    """The blocks of the stages with parameters, from the last to the first, one alive at a time."""
    chain, live = H.chain, H.chain.live
    V = losses.curvature(chain.loss, chain.outputs, chain.targets)  # (B, C, C)
    for number, stage in reversed(list(enumerate(live))):
        if stage.kind == "elementwise":
            slope, bend = elementwise(stage)
            V = V * slope.unsqueeze(1) * slope.unsqueeze(2)
            if not H.gauss_newton:
                V.diagonal(dim1=1, dim2=2).add_(bend)
            continue
        if stage.kind == "linear":
            yield _linear(stage, V)
            W = stage.module.weight.detach()
            V = W.T @ V @ W if number else None
            continue
        D = derivatives(stage, wrt_input=number > 0)
        if stage.parameters:
            yield _general(stage, D, V, H.gauss_newton)
        if number:
            V = D.A.mT @ V @ D.A if H.gauss_newton else D.G + D.A.mT @ V @ D.A


def _linear(stage: Stage, V: Tensor) -> Block:
    """sum_n V_n kron (z~_n z~_n^T), z~ = [z, 1]: nothing of size p x p unless `dense` is called."""
    z, bias = stage.inputs, stage.module.bias is not None
    a_out, a_in = stage.module.weight.shape

    def diagonal() -> Tensor:
        units = V.diagonal(dim1=1, dim2=2)  # (B, a_out)
        weights = (units.T @ z.square()).flatten()
        return torch.cat([weights, units.sum(0)]) if bias else weights

    def dense() -> Tensor:
        rows = torch.cat([z, torch.ones_like(z[:, :1])], 1) if bias else z
        full = torch.einsum("nop,nd,ne->odpe", V, rows, rows).reshape(a_out * rows.shape[1], -1)
        if not bias:
            return full
        index = torch.arange(len(full), device=full.device).reshape(a_out, a_in + 1)
        order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
        return full[order][:, order]

    def norm() -> Tensor:
        inner = z @ z.T + float(bias)
        flat = V.flatten(1)
        return ((flat @ flat.T) * inner.square()).sum().clamp_min(0.0).sqrt()

    return Block(stage, diagonal, dense, norm)


def _general(stage: Stage, D, V: Tensor, gauss_newton: bool) -> Block:
    def diagonal() -> Tensor:
        out = ((V @ D.J) * D.J).sum((0, 1))
        return out if gauss_newton else out + D.E.diagonal()

    def dense() -> Tensor:
        out = D.J.flatten(0, 1).T @ (V @ D.J).flatten(0, 1)
        return out if gauss_newton else out + D.E

    return Block(stage, diagonal, dense, lambda: torch.linalg.matrix_norm(dense()))


def diagonal(H) -> Tensor:
    return torch.cat([block.diagonal() for block in blocks(H)][::-1])


def by_stage(H) -> dict[str, dict[str, float]]:
    """`Curvature.by_stage`."""
    out = {}
    for block in blocks(H):
        out[block.stage.name] = {
            "parameters": len(block.stage.x),
            "trace": block.diagonal().sum().item(),
            "norm": block.norm().item(),
        }
    return dict(reversed(out.items()))


def block(H, stage: str | int) -> Tensor:
    names = [s.name for s in H.chain.live if s.parameters]
    if isinstance(stage, int) and -len(names) <= stage < len(names):
        stage = names[stage]
    for candidate in blocks(H):
        if candidate.stage.name == stage:
            return candidate.dense()
    raise ValueError(
        f"no stage {stage!r} with parameters: use one of {', '.join(map(repr, names))}, or its number from 0 to {len(names) - 1}"
    )


# -- whole data sets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TraceEstimate:
    """Mean of independent estimates of the trace, their standard error, how many there were, and the products with the matrix they cost."""

    value: float
    standard_error: float
    estimates: int
    products: int


class DataHessian:
    """Hessian of a loss over a whole data set: products summed over the batches of a loader, by curvlinops; estimates instead of exact answers.

    It follows the weights of the model, unlike `Hessian`, which takes a copy.

    Args:
        model: any nn.Module (eval mode: layers must not be random or mix samples).
        loss: with `reduction` "mean" (over samples) or "sum", for example CrossEntropyLoss or MSELoss.
        loader: a DataLoader without shuffling, or a list of batches (inputs, targets). Batches may differ in size.

    Raises:
        TypeError, ValueError: a loader that is empty, shuffled, or gone after one pass; NaN in a batch, by number; a loss whose mean is not over
            samples; a model or loader that does not repeat itself.
    """

    def __init__(self, model: torch.nn.Module, loss: torch.nn.Module, loader):
        from curvlinops import HessianLinearOperator

        _check_loader(loader)
        if getattr(loss, "reduction", None) not in ("mean", "sum"):
            raise TypeError(
                f"the loss must have reduction 'mean' or 'sum', so that batches can be added up; {loss} has none of them"
            )
        by_weight = isinstance(loss, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss) and loss.reduction == "mean"
        if by_weight and loss.weight is not None:
            raise ValueError(
                "this loss divides by the class weights of a batch, so its batches do not add up: use reduction='sum'"
            )
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("the model has no trainable parameter: set requires_grad=True on some")
        try:
            self.operator = HessianLinearOperator(
                model, loss, self._parameters, _Batches(loader, loss if by_weight else None)
            )
        except RuntimeError as error:
            raise ValueError(
                f"model or data do not repeat themselves: call model.eval(), no random augmentation. curvlinops says: {error}"
            ) from error
        self.shape = tuple(self.operator.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for v (P,) or (P, k): one pass over the data."""
        if v.ndim not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(
                f"the factor has shape {tuple(v.shape)}; expected ({self.shape[0]},) or ({self.shape[0]}, k)"
            )
        out = self.operator @ v
        if not out.isfinite().all():
            raise ArithmeticError(
                "the product is not finite: the loss or its derivatives overflow somewhere in the data"
            )
        return out

    def eigsh(self, k: int = 1, which: str = "LA") -> Eigenpairs:
        """k eigenpairs by ARPACK on products; not certified, as without a factorization nothing proves that none was skipped."""
        P, first = self.shape[0], self._parameters[0]
        if not 1 <= k < P:
            raise ValueError(f"k must be from 1 to {P - 1} (P - 1), not {k}")
        with tqdm(desc="Lanczos", unit="product", delay=3, leave=False, disable=None) as bar:

            def matvec(v: np.ndarray) -> np.ndarray:
                bar.update()
                return (self @ torch.as_tensor(v.reshape(-1), dtype=first.dtype, device=first.device)).cpu().numpy()

            operator = LinearOperator(self.shape, matvec=matvec, dtype=torch.empty(0, dtype=first.dtype).numpy().dtype)
            values, vectors = eigsh(operator, k, which=which, v0=np.random.default_rng(0).standard_normal(P))
        values, vectors = torch.as_tensor(values.copy()), torch.as_tensor(vectors.copy())
        residuals = torch.linalg.vector_norm((self @ vectors.to(first)).cpu() - vectors * values, dim=0)
        return Eigenpairs(
            values, vectors, residuals, False, "by ARPACK on products; a data set has no factorization to certify it"
        )

    def trace(self, method: str = "xtrace", products: int = 300, seed: int = 0) -> TraceEstimate:
        """Trace by curvlinops' "hutchinson", "hutch++" or "xtrace", with the standard error of independent estimates (5 for the last two).

        After Ctrl-C what was reached is returned, with a warning.
        """
        from curvlinops import hutchinson_trace, hutchpp_trace, xtrace

        methods = {
            "hutchinson": (hutchinson_trace, 1),
            "hutch++": (hutchpp_trace, products // 15 * 3),
            "xtrace": (xtrace, products // 10 * 2),
        }
        if method not in methods:
            raise ValueError(f"method must be one of {', '.join(methods)}, not {method!r}")
        function, each = methods[method]
        if each < 1 or products // each < 2 or each >= self.shape[0]:
            raise ValueError(
                f"{products} products are too few for two estimates, or one of them would take all {self.shape[0]} and more: choose products so "
                "that an estimate takes fewer (a fifth of them for 'xtrace' and 'hutch++')"
            )
        found = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                for _ in tqdm(
                    range(products // each), desc="trace", unit="estimate", delay=3, leave=False, disable=None
                ):
                    found.append(function(self.operator, num_matvecs=each).item())
            except KeyboardInterrupt:
                if len(found) < 2:
                    raise
                warnings.warn(
                    f"interrupted after {len(found)} of {products // each} estimates", UserWarning, stacklevel=2
                )
        if not np.isfinite(found).all():
            raise ArithmeticError("the trace is not finite: the loss or its derivatives overflow somewhere in the data")
        error = float(np.std(found, ddof=1) / len(found) ** 0.5)
        return TraceEstimate(float(np.mean(found)), error, len(found), len(found) * each)

    def density(self, steps: int = 64, points: int = 512, repeats: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(grid, density) of the eigenvalues by stochastic Lanczos quadrature (curvlinops): smoothed, and not to be read as counts."""
        from curvlinops import lanczos_approximate_spectrum

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return lanczos_approximate_spectrum(
                self.operator, min(steps, self.shape[0] - 1), num_points=points, num_repeats=repeats
            )


class _Batches:
    """A loader whose batches are checked as they come; `by_weight`: a loss whose mean counts the labels that are not ignored."""

    def __init__(self, loader, by_weight: torch.nn.Module | None):
        self.loader, self.by_weight = loader, by_weight

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for number, (x, y) in enumerate(self.loader):
            if not (x.isfinite().all() and (not y.is_floating_point() or y.isfinite().all())):
                raise ValueError(f"batch {number} of the loader contains NaN or infinite values")
            if self.by_weight is not None and not y.is_floating_point() and (y == self.by_weight.ignore_index).any():
                raise ValueError(
                    f"batch {number} has ignored labels, and the loss divides by the number of the others, so its batches do not add up: use "
                    "reduction='sum'"
                )
            yield x, y


def _check_loader(loader) -> None:
    if not hasattr(loader, "__iter__") or iter(loader) is loader:
        raise TypeError(
            "the loader is gone after one pass, and every product needs one: give a DataLoader or a list of batches"
        )
    if isinstance(loader, DataLoader) and not isinstance(loader.sampler, SequentialSampler):
        raise ValueError(
            f"the loader draws samples with {type(loader.sampler).__name__}: batches in another order at every pass make products that differ by "
            "rounding (or, with drop_last, by samples), and Lanczos takes that for a different matrix: use shuffle=False"
        )
    if next(iter(loader), None) is None:
        raise ValueError("the loader is empty")
