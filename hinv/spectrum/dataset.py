"""A whole data set: products summed over its batches, solves by them, and the exact answers that a matrix of its parameters or of its outputs gives."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hinv import ranks
from hinv.errors import AccuracyWarning, warn
from hinv.modes import exact
from hinv.shapes import Float
from hinv.solver.dual import Dual
from hinv.solver.matrix import checked_damping
from hinv.solver.products import Operator
from hinv.solver.refine import SolveReport
from hinv.solver.whole import Formed

from . import estimates, streamed
from .eigenpairs import Eigenpairs
from .estimates import TraceEstimate
from .loader import Batches, Loader, check_loader, terms

A = TypeVar("A", bound="DataMatrix")


class DataMatrix(Operator):
    """What DataHessian and DataGGN share. `gauss_newton` says which of the two it is."""

    gauss_newton = False
    last_solve: SolveReport | None = None  # of the last call of `solve`

    @exact()
    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        loader: Loader,
        adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    ):
        reduction = getattr(loss, "reduction", None)
        count = torch.full(
            (2,), torch.nan, dtype=torch.float64, device=next(iter(model.parameters()), torch.empty(0)).device
        )
        total = ranks.summed(lambda: self._prepare(model, loss, loader, adapt, reduction), count)
        if total.isnan().any():
            raise ValueError("another process could not take its model, loss or data: its own error says why")
        mean, weights = total.tolist()
        if ranks.several() and not abs(weights - ranks.size() * self._norm()) <= 1e-9 * weights:
            raise ValueError("the processes have models of different weights: broadcast them from one before")
        if not mean > 0:
            raise ValueError("the data has no label that counts: all are ignored, or weigh nothing")
        self.share = 1.0 if reduction == "sum" else 1.0 / mean
        self.operator = streamed.summed(self.local, self.share)

    def _prepare(
        self, model: nn.Module, loss: nn.Module, loader: Loader, adapt: Any, reduction: Any
    ) -> Float[Tensor, "2"]:
        """What this process has of the data; returns by how much of it the mean divides, and the square of the weights' norm."""
        check_loader(loader)
        if reduction not in ("mean", "sum", "batchmean"):
            raise TypeError(
                f"the loss must have reduction 'mean' or 'sum', so that batches can be added up; {loss} has none of them"
            )
        if self.gauss_newton and isinstance(loss, nn.NLLLoss):
            raise ValueError(
                "NLLLoss is linear in the outputs, so the Gauss-Newton matrix is zero: let the model put out logits, and take CrossEntropyLoss"
            )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameter: set requires_grad=True on some")
        self.model, self.loss, self.batches = model, copy.deepcopy(loss), Batches(loader, adapt)
        vars(self.loss).update(reduction="sum")
        mean = 1.0 if reduction == "sum" else sum(terms(loss, y) for _, y in self.batches)
        try:
            self.local = streamed.local(self, self.batches, check=True)
        except RuntimeError as error:
            raise ValueError(
                f"model or data do not repeat themselves: call model.eval(), no random augmentation. curvlinops says: {error}"
            ) from error
        return torch.tensor([mean, self._norm()], dtype=torch.float64, device=self.device)

    def _norm(self) -> float:
        return sum(p.detach().double().square().sum().item() for p in self.parameters)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {len(self.batches)} batches)"

    @property
    def shape(self) -> tuple[int, int]:
        P = sum(p.numel() for p in self.parameters)
        return P, P

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def multiply(self) -> Callable[[Tensor], Tensor]:
        return self.operator.__matmul__

    @exact()
    def __matmul__(self, v: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        """H v for v (P,) or (P, k): one pass over the data."""
        return self.operator @ self.checked(v, "the factor")

    def double(self: A) -> A:
        """The same matrix in float64 arithmetic (itself if it is)."""
        return self if self.dtype == torch.float64 else streamed.doubled(self)

    @exact()
    def solve(
        self, b: Float[Tensor, "P *k"], damping: float = 1e-2, rtol: float | None = None
    ) -> Float[Tensor, "P *k"]:
        """x with (H + damping I) x = b by products alone: CG where the matrix is definite, MINRES otherwise; the residual is measured.

        Cost: one pass over the data for each product, some tens where damping is large, thousands where it is small. After Ctrl-C the best x so far is
        given back, with a warning. Several right-hand sides at a small damping: `factor`.

        Args:
            b: (P,) or (P, k) (loss / parameter).
            damping: eps (loss / parameter^2); any sign.
            rtol: wanted ||(H + damping I)x - b|| / ||b||; by default 1e-8 in float64, 1e-4 in float32.

        Returns:
            x, shaped like b. `last_solve` holds the method, the residual reached and the number of restarts.

        Warns:
            AccuracyWarning: rtol was not reached, or the iteration was interrupted.

        Raises:
            ValueError, TypeError: b of another length, dtype or device, NaN in b, a damping that is not finite. ArithmeticError: a product is not finite.
        """
        b, damping = self.checked(b, "the right-hand side"), checked_damping(damping)
        if not b.numel():
            return b.clone()
        x, self.last_solve, problem = streamed.solve(self, b, damping, rtol)
        if problem:
            warn(
                f"method '{self.last_solve.method}', damping {damping:g}: {problem}; try more damping, a larger rtol, float64, or factor(damping)",
                AccuracyWarning,
            )
        return x

    @exact()
    def factor(self, damping: float = 1e-2) -> Formed | Dual:
        """Factor H + damping I for many right-hand sides, its inertia, determinant and inverse, in float64: the matrix formed, P products, P^3 / 3 flops.

        A Gauss-Newton matrix of an nn.Sequential with fewer outputs (of all samples) than parameters goes through its dual: P may then be any.

        Returns:
            solve(b), inertia, logdet, inverse_diagonal(), inverse_trace(), sample(n), ..., as of `hinv.Hessian.factor`, of the weights as they are now.

        Raises:
            ValueError: parameters, and outputs for the dual, are more than 20,000. MemoryError: they do not fit. SingularShiftError: damping is minus an
                eigenvalue.
        """
        return streamed.factor(self, checked_damping(damping))

    def inertia(self, damping: float = 1e-2) -> tuple[int, int, int]:
        """(positive, negative, zero) eigenvalues of H + damping I, exact. Cost and errors: `factor`."""
        return self.factor(damping).inertia

    def logdet(self, damping: float = 1e-2) -> tuple[float, float]:
        """(sign, log |det(H + damping I)|). Cost and errors: `factor`."""
        return self.factor(damping).logdet

    @exact()
    def dense(self) -> Float[Tensor, "P P"]:
        """(P, P), summed batch by batch in one pass over the data: P products, P^2 numbers.

        Raises:
            ValueError: more than 20,000 parameters. MemoryError: it does not fit.
        """
        return streamed.dense(self)

    @exact()
    def eigvalsh(self) -> Float[Tensor, " P"]:
        """(P,) all eigenvalues in ascending order, from the formed matrix in float64. Errors: `dense`."""
        return torch.linalg.eigvalsh(self.double().dense())

    @exact()
    def diagonal(self) -> Float[Tensor, " P"]:
        """(P,) the exact diagonal, the batches' added up, as `hinv.Hessian.diagonal`: for an nn.Sequential, one pass over the data.

        Raises:
            TypeError: a model whose stages are not known.
        """
        return streamed.diagonal(self)

    @exact()
    def eigsh(self, k: int = 1, which: str = "LA") -> Eigenpairs:
        """k eigenpairs by ARPACK on products; not certified, as without a factorization nothing proves that none was skipped."""
        led = streamed.Led(self)
        return led.run(lambda: estimates.eigsh(led, k, which))

    @exact()
    def trace(self, method: str = "exact", products: int = 300, seed: int = 0) -> TraceEstimate:
        """The exact trace from `diagonal`, or by curvlinops' "hutchinson", "hutch++" or "xtrace" for any model, with the standard error of independent
        estimates (5 for the last two).

        After Ctrl-C what was reached is returned, with a warning.
        """
        if method == "exact":
            return TraceEstimate(self.diagonal().sum().item(), 0.0, 0, 0)
        return estimates.trace(self.operator, method, products, seed)

    @exact()
    def density(
        self, steps: int = 64, points: int = 512, repeats: int = 5, seed: int = 0
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
        """(grid, density) of the eigenvalues by stochastic Lanczos quadrature (curvlinops): smoothed, and not to be read as counts."""
        return estimates.density(self.operator, steps, points, repeats, seed)


class DataHessian(DataMatrix):
    """Hessian of a loss over a whole data set: products summed over the batches of a loader (curvlinops), solves by them, exact answers up to 20,000 parameters.

    It follows the weights of the model, unlike `Hessian`, which takes a copy. Where torch.distributed is initialized each process gives a loader of its own
    samples, however many, and every call is made by all of them: the sums are over all, one all_reduce a product.

    Args:
        model: any nn.Module (eval mode: layers must not be random or mix samples).
        loss: with `reduction` "sum", or "mean" of a loss of torch.nn, which is then the mean over the whole data set: batches of another size, number
            of tokens, class weights or ignored labels weigh as they should.
        loader: a DataLoader without shuffling, or a list of batches (inputs, targets). Batches may differ in size.
        adapt: makes a pair (inputs, targets) of what the loader gives, for dictionaries, triples and the like.

    Raises:
        TypeError, ValueError: a loader that is empty, shuffled, or gone after one pass; NaN in a batch, by number; a loss whose mean is not known;
            a model or loader that does not repeat itself.
    """


class DataGGN(DataMatrix):
    """Gauss-Newton matrix of a loss over a whole data set, as `DataHessian`; for cross-entropy the Fisher information. Positive semidefinite for a convex loss.

    Args, raises: as `DataHessian`; and a loss that is linear in the outputs (NLLLoss) is refused, as the matrix would be zero.
    """

    gauss_newton = True
