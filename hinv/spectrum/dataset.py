"""A whole data set: products summed over its batches (curvlinops), and estimates where an exact answer is out of reach."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hinv.modes import exact
from hinv.shapes import Float
from hinv.solver.products import operator

from .eigenpairs import Eigenpairs
from .loader import Batches, Loader, check_loader, terms


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
        loss: with `reduction` "sum", or "mean" of a loss of torch.nn, which is then the mean over the whole data set: batches of another size, number
            of tokens, class weights or ignored labels weigh as they should.
        loader: a DataLoader without shuffling, or a list of batches (inputs, targets). Batches may differ in size.
        adapt: makes a pair (inputs, targets) of what the loader gives, for dictionaries, triples and the like.

    Raises:
        TypeError, ValueError: a loader that is empty, shuffled, or gone after one pass; NaN in a batch, by number; a loss whose mean is not known;
            a model or loader that does not repeat itself.
    """

    @exact()
    def __init__(
        self,
        model: torch.nn.Module,
        loss: torch.nn.Module,
        loader: Loader,
        adapt: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    ):
        try:
            from curvlinops import HessianLinearOperator
        except ImportError as error:
            raise ImportError("whole data sets need curvlinops: pip install 'hinv[dataset]'") from error

        check_loader(loader)
        reduction = getattr(loss, "reduction", None)
        if reduction not in ("mean", "sum", "batchmean"):
            raise TypeError(
                f"the loss must have reduction 'mean' or 'sum', so that batches can be added up; {loss} has none of them"
            )
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("the model has no trainable parameter: set requires_grad=True on some")
        try:
            self._batches = Batches(loader, adapt)
            mean, summed = 1.0, copy.deepcopy(loss)
            if reduction != "sum":
                mean = sum(terms(loss, y) for _, y in self._batches)
                vars(summed).update(reduction="sum")
            if not mean > 0:
                raise ValueError("the data has no label that counts: all are ignored, or weigh nothing")
            self.operator = (1.0 / mean) * HessianLinearOperator(model, summed, self._parameters, self._batches)
        except RuntimeError as error:
            raise ValueError(
                f"model or data do not repeat themselves: call model.eval(), no random augmentation. curvlinops says: {error}"
            ) from error
        self.shape = tuple(self.operator.shape)

    def __repr__(self) -> str:
        return f"DataHessian({self.shape[0]} x {self.shape[1]}, {len(self._batches)} batches)"

    @exact()
    def __matmul__(self, v: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        """H v for v (P,) or (P, k): one pass over the data."""
        if v.ndim not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(
                f"the factor has shape {tuple(v.shape)}; expected ({self.shape[0]},) or ({self.shape[0]}, k)"
            )
        out = self.operator @ v
        assert isinstance(out, Tensor)  # as v is one
        if not out.isfinite().all():
            raise ArithmeticError(
                "the product is not finite: the loss or its derivatives overflow somewhere in the data"
            )
        return out

    @exact()
    def eigsh(self, k: int = 1, which: str = "LA") -> Eigenpairs:
        """k eigenpairs by ARPACK on products; not certified, as without a factorization nothing proves that none was skipped."""
        from scipy.sparse.linalg import eigsh

        P, first = self.shape[0], self._parameters[0]
        if not 1 <= k < P:
            raise ValueError(f"k must be from 1 to {P - 1} (P - 1), not {k}")
        with tqdm(desc="Lanczos", unit="product", delay=3, leave=False, disable=None) as bar:

            def matvec(v: Float[np.ndarray, "..."]) -> Float[np.ndarray, " P"]:
                bar.update()
                return (self @ torch.as_tensor(v.reshape(-1), dtype=first.dtype, device=first.device)).cpu().numpy()

            products = operator(
                self.shape, torch.empty(0, dtype=first.dtype, device="cpu").numpy().dtype, matvec=matvec
            )
            values, vectors = eigsh(products, k, which=which, v0=np.random.default_rng(0).standard_normal(P))
        values, vectors = (torch.from_numpy(a.copy()).to(first.device) for a in (values, vectors))
        residuals = torch.linalg.vector_norm(self @ vectors.to(first) - vectors * values, dim=0)
        return Eigenpairs(
            values, vectors, residuals, False, "by ARPACK on products; a data set has no factorization to certify it"
        )

    @exact()
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

    @exact()
    def density(
        self, steps: int = 64, points: int = 512, repeats: int = 5, seed: int = 0
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
        """(grid, density) of the eigenvalues by stochastic Lanczos quadrature (curvlinops): smoothed, and not to be read as counts."""
        from curvlinops import lanczos_approximate_spectrum

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return lanczos_approximate_spectrum(
                self.operator, min(steps, self.shape[0] - 1), num_points=points, num_repeats=repeats
            )
