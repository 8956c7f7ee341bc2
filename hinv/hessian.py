"""The Hessian of one batch as a matrix: products, the dense form for checks, and solves that report their own accuracy."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from . import baselines, heads, paper
from .chain import Chain

REFINEMENTS = 3
RTOL = {torch.float64: 1e-8, torch.float32: 1e-4}
COLUMNS = 2**24  # numbers in one block of simultaneous products: bounds the memory of H @ V

# name -> (H, damping, rtol) -> (b -> x)
METHODS: dict[str, Callable] = {
    "tridiagonal": lambda H, damping, rtol: paper.tridiagonal(H, damping),
    "woodbury": lambda H, damping, rtol: paper.woodbury(H, damping),
    "dense": baselines.dense,
    "minres": baselines.krylov("minres"),
    "cg": baselines.krylov("cg"),
}


class AccuracyWarning(UserWarning):
    """A solve did not reach its rtol, or used a method outside its domain. The message says how far it got and what to try."""


@dataclass(frozen=True)
class SolveReport:
    """What a solve did: `method`, `damping`, `residual` ||(H + damping I)x - b|| / ||b|| (the worst column), `refinements`."""

    method: str
    damping: float
    residual: float
    refinements: int


class Hessian:
    """Exact Hessian of a loss on one batch with respect to the trainable parameters of an nn.Sequential.

    A snapshot: the model is copied, so training the original afterwards does not change it. Nothing of size P x P is
    formed except by `dense()` and `method="dense"`.

    Args:
        model: nn.Sequential (nested ones are flattened) of Linear, elementwise activations, Flatten, LayerNorm, Conv2d, pooling, or any module of
            one tensor to one tensor that treats samples independently. Parameters with requires_grad=False are constants.
        loss: CrossEntropyLoss, MSELoss, BCEWithLogitsLoss, or any callable (outputs, targets) -> sum or mean over samples.
        inputs: (B, ...), floating point, dtype (float32 or float64) and device of the model.
        targets: as the loss wants them.

    Raises:
        TypeError, ValueError: anything the structure does not cover, by name and with what to do instead.

    Example:
        >>> H = hinv.Hessian(model, torch.nn.CrossEntropyLoss(), x, y)
        >>> step = H.solve(H.gradient, damping=1e-2)
    """

    def __init__(self, model: nn.Sequential, loss: heads.Loss, inputs: Tensor, targets: Tensor):
        self.chain = Chain(model, loss, inputs, targets)
        self.last_solve: SolveReport | None = None
        parameters = self.chain.parameters
        with torch.enable_grad():
            outputs = self.chain.model(self.chain.inputs.clone())
            scalar = heads.value(loss, outputs, self.chain.targets)
            # the graph of the gradient is kept: each product with H is one backward pass through it (Pearlmutter)
            self._gradient = torch.autograd.grad(scalar, parameters, create_graph=True, materialize_grads=True)
        self.loss = scalar.item()
        self.gradient = parameters_to_vector(g.contiguous() for g in self._gradient).detach()

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.gradient), len(self.gradient)

    @property
    def dtype(self) -> torch.dtype:
        return self.gradient.dtype

    @property
    def device(self) -> torch.device:
        return self.gradient.device

    @cached_property
    def layers(self) -> list[paper.Layer]:
        """Derivative blocks of the paper's layers, computed once for every damping and method."""
        return paper.layers(self.chain)

    def __repr__(self) -> str:
        return f"Hessian({self.shape[0]} x {self.shape[1]}, {len(self.chain.stages)} stages, batch {len(self.chain.inputs)}, {self.dtype})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """H v for v (P,) or (P, k): exact, by differentiating the gradient's graph; never forms H. Uses none of the structure.

        Cost: about four forward passes of the batch for each column.
        """
        v = self._checked(v, "the factor")
        if v.ndim == 1:
            return self._product(v)
        width = max(1, COLUMNS // self.shape[0])
        return torch.cat([self._products(piece) for piece in v.split(width, dim=1)], dim=1)

    def _product(self, v: Tensor) -> Tensor:
        live = [(g, w) for g, w in zip(self._gradient, self._split(v), strict=True) if g.requires_grad]
        if not live:  # a loss linear in the parameters
            return torch.zeros_like(v)
        gradients, pieces = zip(*live, strict=True)
        columns = torch.autograd.grad(
            gradients, self.chain.parameters, pieces, retain_graph=True, materialize_grads=True
        )
        return parameters_to_vector(c.contiguous() for c in columns)

    def _products(self, V: Tensor) -> Tensor:
        return torch.func.vmap(self._product, in_dims=1, out_dims=1)(V) if V.shape[1] else V

    def _split(self, v: Tensor) -> list[Tensor]:
        parameters = self.chain.parameters
        return [w.view_as(p) for w, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]

    def dense(self) -> Tensor:
        """(P, P): for checks on small networks. P products, P^2 numbers."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """The same matrix for SciPy's iterative solvers and eigensolvers (CPU arrays in and out)."""

        def multiply(v):
            return (self @ torch.as_tensor(v, dtype=self.dtype, device=self.device)).cpu().numpy()

        def matvec(v):
            return multiply(v.reshape(-1))

        dtype = self.gradient.cpu().numpy().dtype
        return LinearOperator(self.shape, matvec=matvec, rmatvec=matvec, matmat=multiply, rmatmat=multiply, dtype=dtype)

    def solve(self, b: Tensor, damping: float = 1e-2, method: str = "auto", rtol: float | None = None) -> Tensor:
        """x with (H + damping I) x = b, its residual measured with an independent Hessian-vector product.

        Source: arXiv:2601.06096, (13) eq:unified-system and Algorithm 1 ("tridiagonal"); version 1's Q and A ("woodbury").

        Args:
            b: (P,) or (P, k), for example `H.gradient` (loss / parameter).
            damping: eps (loss / parameter^2); any sign. It is never changed on the way.
            method: "auto" ("tridiagonal"), "tridiagonal" O(L (p + 2Ba)^3), "woodbury" O(L (2p + 2Ba)^3), "dense" O(P^3), "minres", "cg".
            rtol: wanted ||(H + damping I)x - b|| / ||b||; by default 1e-8 in float64, 1e-4 in float32.

        Returns:
            x, shaped like b. `H.last_solve` holds the method, the residual reached and the number of refinement steps.

        Warns:
            AccuracyWarning: rtol was not reached after iterative refinement, or CG met an indefinite matrix.

        Raises:
            ValueError, TypeError: b of another length, dtype or device, NaN in b, an unknown method, a damping that is not finite.
            torch.linalg.LinAlgError: an exactly singular matrix or pivot block, named.
        """
        b = self._checked(b, "the right-hand side")
        method = "tridiagonal" if method == "auto" else method
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: use 'auto', {', '.join(map(repr, METHODS))}")
        if not torch.isfinite(torch.tensor(float(damping))):
            raise ValueError(f"damping must be a finite number, not {damping}")
        rtol = RTOL[self.dtype] if rtol is None else rtol
        apply = METHODS[method](self, damping, rtol)
        x, residual, refinements = self._refined(apply, b, damping, rtol)
        self.last_solve = SolveReport(method, float(damping), residual, refinements)
        remarks = [apply.remark()] if hasattr(apply, "remark") else []
        if not residual <= rtol:
            remarks.append(
                f"relative residual {residual:.1e} after {refinements} refinements, rtol {rtol:.0e} not reached"
            )
        remarks = [r for r in remarks if r]
        if remarks:
            advice = "try method='dense' on a small network, more damping, or float64"
            warnings.warn(
                f"method '{method}', damping {damping:g}: {'; '.join(remarks)}; {advice}", AccuracyWarning, stacklevel=2
            )
        return x

    def _refined(self, apply: Callable, b: Tensor, damping: float, rtol: float) -> tuple[Tensor, float, int]:
        """Iterative refinement: x += apply(b - (H + damping I)x) while it helps. Keeps the best x seen."""
        scale = torch.linalg.vector_norm(b, dim=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))

        def residual(x: Tensor) -> tuple[Tensor, float]:
            if not x.isfinite().all():
                return x, float("inf")
            r = b - self @ x - damping * x
            return r, (torch.linalg.vector_norm(r, dim=0) / scale).amax().item()

        x = apply(b)
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
