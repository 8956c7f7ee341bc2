"""Curvature matrices of one batch, the Hessian and the Gauss-Newton matrix: products, factorizations, and solves that report their own accuracy."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, gmres
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from hinv import baselines, paper, sparse, spectrum
from hinv.dual import Dual
from hinv.estimate import Estimate, estimate, require
from hinv.factor import AccuracyWarning, Factor, SingularShiftError
from hinv.network import losses
from hinv.network.chain import Chain
from hinv.network.stages import check as check_stage
from hinv.parts import parts

REFINEMENTS = 3
KRYLOV = 60  # iterations of GMRES with the factorization as preconditioner, before the next fallback
RTOL = {torch.float64: 1e-8, torch.float32: 1e-4}
COLUMNS = 2**24  # numbers in the result of one block of simultaneous products: H @ V goes block by block


@dataclass(frozen=True)
class SolveReport:
    """What a solve did: `method` (the fallbacks it needed behind a plus), `damping`, `residual` ||(H + damping I)x - b|| / ||b|| (the
    worst column, by an independent product), `refinements`."""

    method: str
    damping: float
    residual: float
    refinements: int


class Curvature:
    """What Hessian and GGN share. A subclass says how to multiply (`_product`) and whether second derivatives count (`gauss_newton`)."""

    gauss_newton = False

    def __init__(self, model: nn.Sequential, loss: losses.Loss, inputs: Tensor, targets: Tensor, check: bool = True):
        self.chain = Chain(model, loss, inputs, targets, check)
        self.last_solve: SolveReport | None = None
        self._structures: dict[torch.dtype, tuple] = {}
        self._counted: dict[float, int] = {}  # eigenvalues below a shift
        self._others: dict[torch.dtype, Curvature] = {}  # the same in another dtype
        parameters = self.chain.parameters
        with torch.enable_grad():
            self._outputs = self.chain.model(self.chain.inputs.clone())
            scalar = losses.value(loss, self._outputs, self.chain.targets)
            # H keeps the gradient's graph: each product with it is one backward pass through that (Pearlmutter); G needs the outputs' alone
            twice = not self.gauss_newton
            self._gradient = torch.autograd.grad(
                scalar, parameters, create_graph=twice, retain_graph=True, materialize_grads=True
            )
        self.loss = scalar.item()
        self.gradient = parameters_to_vector(g.contiguous() for g in self._gradient).detach()
        if not self.gradient.isfinite().all():
            raise losses.NotFiniteError(
                "the gradient contains NaN or infinite values: check the scale of inputs and weights"
            )
        if check:
            for stage in self.chain.live:
                check_stage(stage)
        if check:
            self._check_products()

    def _check_products(self) -> None:
        """u.Hv = v.Hu for one random pair. Not idle: in torch 2.14 double backward through weight_norm is wrong, and not symmetric.

        Raises:
            ValueError: autograd's second derivative is missing, NaN or not symmetric.
        """
        generator = torch.Generator().manual_seed(0)
        u, v = (
            torch.randn(len(self.gradient), generator=generator, dtype=self.dtype).to(self.device) for _ in range(2)
        )
        suspects = [str(stage) for stage in self.chain.stages if stage.kind == "general"] or ["the loss"]
        try:
            Hu, Hv = self._product(u), self._product(v)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"autograd cannot differentiate the model twice; look at {', '.join(suspects)}. torch says: {error}"
            ) from error
        scale = (Hu.norm() * v.norm() + Hv.norm() * u.norm()).item()
        if not abs((u @ Hv - v @ Hu).item()) <= torch.finfo(self.dtype).eps ** 0.5 * scale:
            raise ValueError(
                f"autograd's second derivative is not symmetric, so it is wrong for one of {', '.join(suspects)} (torch {torch.__version__}; "
                "weight_norm is one such): write that module with elementary operations. Or rounding errors are all there is of it, as where the "
                f"outputs are saturated (the loss is {self.loss:.3g}): scale the weights down, or use float64"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.gradient), len(self.gradient)

    @property
    def dtype(self) -> torch.dtype:
        return self.gradient.dtype

    @property
    def device(self) -> torch.device:
        return self.gradient.device

    def __repr__(self) -> str:
        what = f"{self.shape[0]} x {self.shape[1]}, {len(self.chain.stages)} stages, batch {len(self.chain.inputs)}, {self.dtype}"
        return f"{type(self).__name__}({what})"

    # -- products ------------------------------------------------------------------------------------------------------

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for v (P,) or (P, k): exact, by differentiating autograd's graph; never forms H. Uses none of the structure.

        Cost: about four forward passes of the batch for each column.
        """
        v = self._checked(v, "the factor")
        if v.ndim == 1:
            return self._product(v)
        width = max(1, COLUMNS // self.shape[0])
        return torch.cat([self._products(piece) for piece in v.split(width, dim=1)], dim=1)

    @cached_property
    def _product(self) -> Callable[[Tensor], Tensor]:
        """v (P,) -> the matrix times v, with the graphs it needs."""
        raise NotImplementedError

    def _products(self, V: Tensor) -> Tensor:
        return torch.func.vmap(self._product, in_dims=1, out_dims=1)(V) if V.shape[1] else V

    def _pull_back(self, functions: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        """Gradient of sum_i functions_i . weights_i in the parameters, (P,); functions that do not depend on them count as constants."""
        live = [(f, w) for f, w in zip(functions, weights, strict=True) if f.requires_grad]
        if not live:
            return torch.zeros_like(self.gradient)
        functions, weights = zip(*live, strict=True)
        columns = torch.autograd.grad(
            functions, self.chain.parameters, weights, retain_graph=True, materialize_grads=True
        )
        return parameters_to_vector(c.contiguous() for c in columns)

    def _split(self, v: Tensor) -> list[Tensor]:
        parameters = self.chain.parameters
        return [w.view_as(p) for w, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]

    def dense(self) -> Tensor:
        """(P, P): for checks on small networks. P products, P^2 numbers."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """The same matrix for SciPy's iterative solvers and eigensolvers (CPU arrays in and out)."""

        def multiply(v):
            if np.iscomplexobj(v):
                return multiply(v.real) + 1j * multiply(v.imag)
            return (self @ torch.as_tensor(v, dtype=self.dtype, device=self.device)).cpu().numpy()

        def matvec(v):
            return multiply(v.reshape(-1))

        dtype = self.gradient.cpu().numpy().dtype
        return LinearOperator(self.shape, matvec=matvec, rmatvec=matvec, matmat=multiply, rmatmat=multiply, dtype=dtype)

    # -- factorization -------------------------------------------------------------------------------------------------

    def estimate(self, damping: float = 1e-2) -> Estimate:
        """Predicted flops and peak bytes of a factorization, from shapes alone; str() of it is a sentence.

        Nothing is allocated. The cost does not depend on the damping.
        """
        return estimate(self.chain, self.gauss_newton, self.dtype)

    def factor(self, damping: float = 1e-2, dtype: torch.dtype | None = None) -> Factor | Dual:
        """Factor H + damping I once, for many right-hand sides, its inertia and its determinant.

        Source: `hinv.factor`, the symmetric stagewise elimination (the paper's K, eliminated from the loss backwards). Derivatives are computed
        at the first call and kept; each further damping costs the factorization only.

        Args:
            damping: shift (loss / parameter^2), of any sign: H - sigma I with damping = -sigma.
            dtype: of the arithmetic; the model's by default. float64 for a float32 model costs twice and loses no digits to small pivots.

        Returns:
            a `Factor` with solve(b), inertia, logdet (for a GGN with few outputs, its dual with the same three).

        Raises:
            SingularShiftError: a pivot is zero to working precision (damping is minus an eigenvalue), with the stage's name.
            MemoryError: the estimate exceeds the free memory; says what to reduce. Nothing was allocated.
        """
        damping = self._checked_damping(damping)
        dtype = dtype or self.dtype
        prediction = estimate(self.chain, self.gauss_newton, dtype)
        if prediction.method == "dual" and damping > 0 and self._convex:
            require(prediction, "dual", self.device)
            return Dual(_converted(self.chain, dtype), damping)
        require(prediction, "factor", self.device)
        return Factor(self._structure(dtype), damping, lambda v: self._in(dtype) @ v)

    @cached_property
    def _convex(self) -> bool:
        return losses.convex(self.chain.loss, self.chain.outputs, self.chain.targets)

    def _structure(self, dtype: torch.dtype) -> tuple:
        if dtype not in self._structures:
            self._structures[dtype] = parts(_converted(self.chain, dtype), self.gauss_newton)
        return self._structures[dtype]

    def double(self) -> "Curvature":
        """The same matrix in float64 arithmetic (itself if it is)."""
        return self._in(torch.float64)

    def _in(self, dtype: torch.dtype) -> "Curvature":
        if dtype == self.dtype:
            return self
        if dtype not in self._others:
            chain = _converted(self.chain, dtype)
            self._others[dtype] = type(self)(chain.model, chain.loss, chain.inputs, chain.targets, check=False)
        return self._others[dtype]

    # -- spectrum (`hinv.spectrum`) ------------------------------------------------------------------------------------

    def logdet(self, damping: float = 1e-2) -> tuple[float, float]:
        """(sign, log |det(H + damping I)|) by one factorization in float64. Errors as `factor`; AccuracyWarning where it has fewer than eight digits."""
        return self.factor(damping, dtype=torch.float64).logdet

    def count_below(self, shift: float) -> int:
        """Exact number of eigenvalues below a shift (loss / parameter^2), by the inertia of H - shift I: one factorization, kept for later calls.

        Raises:
            SingularShiftError: the shift is an eigenvalue (or, at 0, the batch leaves weights without curvature); choose it a little beside.
            MemoryError: see `factor`.
        """
        return spectrum.count_below(self, shift)

    def counts(self, edges: Sequence[float]) -> Tensor:
        """Exact histogram: how many eigenvalues lie in each of the intervals between n + 1 increasing edges, (n,) int64.

        One factorization for each edge, with a progress bar when it takes long. After Ctrl-C the edges counted so far are kept.

        Raises:
            ValueError: edges that do not increase. SingularShiftError, MemoryError: see `count_below`.
        """
        return spectrum.counts(self, edges)

    def eigval(self, i: int, rtol: float = 1e-8) -> float:
        """The i-th eigenvalue in ascending order (negative i from the top), by bisection on exact counts: about 30 factorizations.

        Args:
            i: from -P to P - 1.
            rtol: half-width of the final bracket relative to the eigenvalue, or 1e-12 of the norm of H; inside a cluster (the zeros of weights that
                the batch does not excite) where no shift can be factored, 1e-8 of it.

        Raises:
            ValueError: i or rtol out of range. MemoryError: see `factor`.
        """
        return spectrum.eigval(self, i, rtol)

    def eigsh(self, k: int = 6, which: str = "LA", sigma: float | None = None) -> spectrum.Eigenpairs:
        """k eigenvalues with vectors and residuals, certified by exact counts: none skipped, none twice.

        ARPACK on products, or with `sigma` on (H - sigma I)^-1 through the factorization. A count of the region around what was found tells how many
        there are; what is missing is searched for in the orthogonal complement. Float64 arithmetic.

        Args:
            k: 1 to P - 1.
            which: "LA" largest, "SA" smallest, "LM" largest in magnitude; not used with sigma.
            sigma: the k eigenvalues nearest to this shift (loss / parameter^2).

        Warns:
            CertificateWarning: the count could not be made, eigenvalues are still missing, or residuals exceed 1e-7 |H|; the note says which.

        Raises:
            ValueError: k or which out of range. SingularShiftError: sigma is an eigenvalue. ArithmeticError: ARPACK found fewer than k.
        """
        return spectrum.find(self, k, which, sigma)

    def diagonal(self) -> Tensor:
        """(P,) the exact diagonal, in O(L) without a factorization: the loss's second derivative goes backwards sample by sample."""
        return spectrum.diagonal(self)

    def trace(self) -> float:
        """The exact trace (loss / parameter^2), in O(L)."""
        return self.diagonal().sum().item()

    def block(self, stage: str | int) -> Tensor:
        """(p_l, p_l) the exact diagonal block of one stage, by its name or its number among the stages with parameters.

        Raises:
            ValueError: no such stage.
        """
        return spectrum.block(self, stage)

    def by_stage(self) -> dict[str, dict[str, float]]:
        """{name: {"parameters", "trace", "norm"}} for each stage with parameters; norm is Frobenius, of its diagonal block."""
        return spectrum.by_stage(self)

    # -- solves --------------------------------------------------------------------------------------------------------

    def solve(self, b: Tensor, damping: float = 1e-2, method: str = "auto", rtol: float | None = None) -> Tensor:
        """x with (H + damping I) x = b, its residual measured with an independent product.

        Source: `hinv.factor` ("factor"); arXiv:2601.06096, (13) eq:unified-system and Algorithm 1 ("tridiagonal"); version 1's Q and A ("woodbury").

        Args:
            b: (P,) or (P, k), for example `H.gradient` (loss / parameter).
            damping: eps (loss / parameter^2); any sign. It is never changed on the way.
            method: "auto" takes the cheaper of "factor" and "dense" by `estimate`, then refines, then GMRES preconditioned by the factorization, then
                "sparse". By name: "factor", "sparse" (SuperLU of K), "tridiagonal" O(L (p + 2Ba)^3), "woodbury" O(L (2p + 2Ba)^3),
                "dense" O(P^3), "minres", "cg".
            rtol: wanted ||(H + damping I)x - b|| / ||b||; by default 1e-8 in float64, 1e-4 in float32.

        Returns:
            x, shaped like b. `H.last_solve` holds the method, the residual reached and the number of refinement steps.

        Warns:
            AccuracyWarning: rtol was not reached after all fallbacks, or CG met an indefinite matrix.

        Raises:
            ValueError, TypeError: b of another length, dtype or device, NaN in b, an unknown method, a damping that is not finite.
            SingularShiftError, torch.linalg.LinAlgError: an exactly singular matrix or pivot block, named.
            MemoryError: the estimate exceeds the free memory.
        """
        b = self._checked(b, "the right-hand side")
        damping = self._checked_damping(damping)
        if method != "auto" and method not in METHODS:
            raise ValueError(f"unknown method {method!r}: use 'auto', {', '.join(map(repr, METHODS))}")
        if self.gauss_newton and method in ("tridiagonal", "woodbury"):
            raise ValueError(
                f"method {method!r} is the paper's, for the Hessian: use 'factor' for the Gauss-Newton matrix"
            )
        rtol = RTOL[self.dtype] if rtol is None else rtol
        if not rtol > 0:
            raise ValueError(f"rtol must be a positive number, not {rtol}")
        if not b.numel():
            return b.clone()
        size = b.abs().amax(
            dim=0
        )  # solve for columns of size one: squares of very small or large entries leave the range
        size = torch.where(size > 0, size, torch.ones_like(size))
        b = b / size
        if method == "auto":
            x, report, remarks = self._automatic(b, damping, rtol)
        else:
            apply = METHODS[method](self, damping, rtol)
            x, residual, steps = self._refined(apply, b, damping, rtol)
            report = SolveReport(method, damping, residual, steps)
            remarks = [apply.remark()] if hasattr(apply, "remark") else []
        x = x * size
        self.last_solve = report
        if not report.residual <= rtol:
            remarks.append(
                f"relative residual {report.residual:.1e} after {report.refinements} refinements, rtol {rtol:.0e} not reached"
            )
        remarks = [r for r in remarks if r]
        if remarks:
            advice = "try method='sparse', method='dense' on a small network, more damping, or float64"
            warnings.warn(
                f"method '{report.method}', damping {damping:g}: {'; '.join(remarks)}; {advice}",
                AccuracyWarning,
                stacklevel=2,
            )
        return x

    def _automatic(self, b: Tensor, damping: float, rtol: float) -> tuple[Tensor, SolveReport, list[str]]:
        """The cheapest direct method; then GMRES with it as preconditioner; then SuperLU on K. The report names all that were needed."""
        remarks = []
        chosen = "dense" if self.estimate().method == "dense" else "factor"
        try:
            apply = METHODS[chosen](self, damping, rtol)
            x, residual, steps = self._refined(apply, b, damping, rtol)
            report = SolveReport(chosen, damping, residual, steps)
            if residual <= rtol:
                return x, report, remarks
            better, after, _ = self._refined(lambda r: self._gmres(apply, r, damping, rtol), b, damping, rtol, start=x)
            if after < residual:
                x, report = better, SolveReport(f"{chosen}+gmres", damping, after, steps)
            if report.residual <= rtol:
                return x, report, remarks
        except SingularShiftError as error:
            x, report = None, None
            remarks.append(str(error))
        try:
            better, after, steps = self._refined(METHODS["sparse"](self, damping, rtol), b, damping, rtol)
        except torch.linalg.LinAlgError as error:
            if report is None:
                raise SingularShiftError("; ".join([*remarks, str(error)])) from error
            return x, report, remarks
        if report is None or after < report.residual:
            x, report = better, SolveReport(f"{chosen}+sparse", damping, after, steps)
        return x, report, [] if report.residual <= rtol else remarks

    def _gmres(self, apply: Callable, b: Tensor, damping: float, rtol: float) -> Tensor:
        """GMRES on H + damping I preconditioned by a factorization that lost digits, column by column."""
        columns = b.reshape(len(b), -1)

        def shifted(v):
            return self._product(torch.as_tensor(v).to(b)).cpu().numpy() + damping * v

        def precondition(v):
            return apply(torch.as_tensor(v).to(b)).cpu().numpy()

        options = {"dtype": columns.cpu().numpy().dtype}
        A = LinearOperator(self.shape, matvec=shifted, **options)
        M = LinearOperator(self.shape, matvec=precondition, **options)
        solved = [
            gmres(A, column.cpu().numpy(), M=M, rtol=0.1 * rtol, restart=KRYLOV, maxiter=1)[0] for column in columns.T
        ]
        return torch.stack([torch.as_tensor(x).to(b) for x in solved], dim=1).reshape(b.shape)

    def _refined(
        self, apply: Callable, b: Tensor, damping: float, rtol: float, start: Tensor | None = None
    ) -> tuple[Tensor, float, int]:
        """Iterative refinement: x += apply(b - (H + damping I)x) while it helps. Keeps the best x seen."""
        scale = torch.linalg.vector_norm(b, dim=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))

        def residual(x: Tensor) -> tuple[Tensor, float]:
            if not x.isfinite().all():
                return x, float("inf")
            r = b - self @ x - damping * x
            return r, (torch.linalg.vector_norm(r, dim=0) / scale).amax().item()

        x = apply(b) if start is None else start
        r, size = residual(x)
        steps = 0
        while steps < REFINEMENTS and rtol < size < float("inf"):
            candidate = x + apply(r)
            r_new, size_new = residual(candidate)
            steps += 1
            if not size_new < size:
                break
            x, r, size = candidate, r_new, size_new
        return x, size, steps

    # -- checks --------------------------------------------------------------------------------------------------------

    def _checked(self, v: Tensor, what: str) -> Tensor:
        if not isinstance(v, Tensor):
            raise TypeError(f"{what} must be a torch tensor, not {type(v).__name__}: use torch.as_tensor")
        if v.ndim not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(f"{what} has shape {tuple(v.shape)}; expected ({self.shape[0]},) or ({self.shape[0]}, k)")
        if v.dtype != self.dtype or v.device != self.device:
            raise TypeError(f"{what} is {v.dtype} on {v.device}, the model {self.dtype} on {self.device}: convert one")
        if not v.isfinite().all():
            raise ValueError(f"{what} contains NaN or infinite values")
        return v.detach()

    def _checked_damping(self, damping: float) -> float:
        damping = float(damping)
        if not -float("inf") < damping < float("inf"):
            raise ValueError(f"damping must be a finite number, not {damping}")
        return damping


class Hessian(Curvature):
    """Exact Hessian of a loss on one batch with respect to the trainable parameters of an nn.Sequential.

    A snapshot: the model is copied, so training the original afterwards does not change it. Nothing of size P x P is
    formed except by `dense()` and `method="dense"`.

    Args:
        model: nn.Sequential (nested ones are flattened) of Linear, elementwise activations, Flatten, LayerNorm, Conv2d,
            pooling, or any module of one tensor to one tensor that treats samples independently. Parameters with requires_grad=False are constants.
        loss: CrossEntropyLoss, MSELoss, BCEWithLogitsLoss, or any callable (outputs, targets) -> sum or mean over samples.
        inputs: (B, ...), floating point, dtype (float32 or float64) and device of the model.
        targets: as the loss wants them.
        check: False leaves out the checks that take derivatives (samples independent, loss not random, second derivatives symmetric), for a
            model and a loss that passed them once, as in an optimizer's loop.

    Raises:
        TypeError, ValueError: anything the structure does not cover, by name and with what to do instead.

    Example:
        >>> H = hinv.Hessian(model, torch.nn.CrossEntropyLoss(), x, y)
        >>> step = H.solve(H.gradient, damping=1e-2)
    """

    @cached_property
    def _product(self) -> Callable[[Tensor], Tensor]:
        return lambda v: self._pull_back(self._gradient, tuple(self._split(v)))

    @cached_property
    def layers(self) -> list[paper.Layer]:
        """Derivative blocks of the paper's layers, computed once for every damping and method."""
        return paper.layers(self.chain)


class GGN(Curvature):
    """The generalised Gauss-Newton matrix J^T Lambda J of a loss on one batch: J = d outputs / d parameters, Lambda the loss's Hessian in the outputs.

    Positive semidefinite for convex losses, so that every damping > 0 factors by Cholesky; equal to the Fisher information for cross-entropy. Arguments
    and methods are those of `Hessian`; `factor` leaves the second derivatives of the stages out, or takes the dual where that is cheaper.
    """

    gauss_newton = True

    @cached_property
    def _product(self) -> Callable[[Tensor], Tensor]:
        with torch.enable_grad():  # J^T u is linear in u: its derivative along v is J v
            u = torch.zeros_like(self._outputs).requires_grad_()
            JTu = torch.autograd.grad(
                self._outputs, self.chain.parameters, u, create_graph=True, materialize_grads=True
            )
        curvature = losses.products(self.chain.loss, self.chain.outputs, self.chain.targets)

        def product(v: Tensor) -> Tensor:
            live = [(f, w) for f, w in zip(JTu, self._split(v), strict=True) if f.requires_grad]
            functions, weights = zip(*live, strict=True)
            (Jv,) = torch.autograd.grad(functions, u, weights, retain_graph=True, materialize_grads=True)
            return self._pull_back((self._outputs,), (curvature(Jv),))

        return product


def _factor(H: Curvature, damping: float, rtol: float) -> Callable[[Tensor], Tensor]:
    """The stagewise elimination or the dual, in float64 arithmetic whatever the model's dtype."""
    return H.factor(damping, dtype=torch.float64).solve


# name -> (H, damping, rtol) -> (b -> x)
METHODS: dict[str, Callable] = {
    "factor": _factor,
    "sparse": lambda H, damping, rtol: sparse.factor(H.chain, damping, H.gauss_newton),
    "tridiagonal": lambda H, damping, rtol: paper.tridiagonal(H, damping),
    "woodbury": lambda H, damping, rtol: paper.woodbury(H, damping),
    "dense": baselines.dense,
    "minres": baselines.krylov("minres"),
    "cg": baselines.krylov("cg"),
}


def _converted(chain: Chain, dtype: torch.dtype) -> Chain:
    """The same problem in another dtype (the parameters' values are kept)."""
    if dtype == chain.inputs.dtype:
        return chain
    loss = copy.deepcopy(chain.loss).to(dtype) if isinstance(chain.loss, nn.Module) else chain.loss
    targets = chain.targets.to(dtype) if chain.targets.is_floating_point() else chain.targets
    return Chain(copy.deepcopy(chain.model).to(dtype), loss, chain.inputs.to(dtype), targets)
