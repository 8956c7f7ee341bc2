"""Every eigenvalue by its absolute value."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from hinv.curvature import Curvature, Hessian
from hinv.errors import SingularShiftError
from hinv.network import losses
from hinv.shapes import Float
from hinv.solver.memory import require
from hinv.spectrum.absolute import Absolute, norm_bound

from .descent import Direction
from .preconditioned import Preconditioned

RTOL = 1e-3  # of the step by poles: far below what a quadratic model is worth
USUAL = 8  # poles for that at the usual dampings


class SaddleFreeNewton(Preconditioned):
    """(|H| + eps I)^-1 g: every eigenvalue by its absolute value, so that saddles repel.

    Args:
        method: "lanczos" (see `pairs`), or "poles": all eigenvalues, without finding any, by complex factorizations (`Hessian.absolute_solve`) to a relative
            error of 1e-3, whose bound is the report's `error`. A damping below 1e-6 |H| becomes that, and the report says so by its `damping`.
        pairs: how many eigenpairs of largest magnitude Lanczos finds (ARPACK, to 10 percent); the rest of the gradient is divided by the magnitude of
            the curvature along it. None: all of them, by a dense eigendecomposition, for small networks.

    Cost: some 3 `pairs` products with H a step; with None O(P^3); by poles some 8 to 12 complex factorizations,
    times against the others with `Hessian.absolute_solve`.
    """

    kind = Hessian

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
        damping: float = 0.1,
        adapt: float = 3.0,
        pairs: int | None = 20,
        every: int = 1,
        accept: bool = True,
        sample: int | None = None,
        method: str = "lanczos",
    ):
        super().__init__(model, loss, optimizer, clip, damping, adapt, every, accept, sample)
        P = sum(p.numel() for p in self.parameters)
        if method not in ("lanczos", "poles"):
            raise ValueError(f"unknown method {method!r}: use 'lanczos' or 'poles'")
        if method == "lanczos" and pairs is not None and not 1 <= pairs < P:
            raise ValueError(f"pairs must lie between 1 and {P - 1} (or be None for all), not {pairs}")
        self.pairs, self.method = pairs, method

    def estimate(self, C: Curvature) -> str:
        prediction = C.estimate()
        if self.method == "poles":  # complex numbers; kept for the steps in between
            bytes_ = 2 * prediction.bytes["factor"] * (USUAL if self.every > 1 else 1)
            prediction = replace(prediction, method="factor", bytes={"factor": bytes_})
            require(prediction, "factor", C.device)
            return f"{prediction}, of each of about {USUAL} complex poles"
        if self.pairs is None:
            require(prediction, "dense", C.device)
            return str(replace(prediction, method="dense"))
        P = prediction.parameters
        size = 8 * P * (max(2 * self.pairs + 1, 20) + self.pairs)  # ARPACK's basis and the vectors it returns, float64
        return f"{P:,} parameters, batch {prediction.batch}: Lanczos, about {size / 2**20:,.0f} MiB"

    def _direct(self, H: Curvature, g: Float[Tensor, " P"]) -> Direction:
        self._keep(H)
        found = self._again(g)
        return replace(found, factorizations=len(self._absolute.poles.tau)) if self.method == "poles" else found

    def _keep(self, H: Curvature) -> None:
        from scipy.sparse.linalg import ArpackError, eigsh

        g = H.gradient
        if self.method == "poles":
            H = H.double()
            self._used = max(self._used, Absolute.least * norm_bound(H))
            self._absolute = Absolute(H, self._used, RTOL, kept=self.every > 1)
            return
        if self.pairs is None:
            require(H.estimate(), "dense", H.device)
            values, self._vectors = torch.linalg.eigh(H.dense())
            self._rest = 0.0
        else:
            v0 = (g if g.any() else torch.ones_like(g)).cpu().double().numpy()
            try:
                values, vectors = eigsh(H.to_scipy(), self.pairs, which="LM", tol=0.1, v0=v0)
            except ArpackError as error:
                raise SingularShiftError(str(error)) from error
            values, self._vectors = (torch.from_numpy(a).to(g) for a in (values, vectors))
            rest = g - self._vectors @ (self._vectors.T @ g)
            self._rest = abs((rest @ (H @ rest)).item()) / max((rest @ rest).item(), torch.finfo(g.dtype).tiny)
        self._values = values.abs()
        self._negative = int((values < 0).sum()) if self.pairs is None else None

    def _again(self, g: Float[Tensor, " P"]) -> Direction:
        if self.method == "poles":
            d, report = self._absolute.solve(g)
            return Direction(d.to(g.dtype), error=report.bound)
        inner = self._vectors.T @ g
        d = self._vectors @ (inner / (self._values + self._used))
        if self.pairs is not None:
            d = d + (g - self._vectors @ inner) / (self._rest + self._used)
        inertia = None if self._negative is None else (len(g) - self._negative, self._negative, 0)
        return Direction(d, inertia)
