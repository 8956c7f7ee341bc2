"""The face: the Hessian and the Gauss-Newton matrix of one batch. Each method says what it gives and costs, and hands over to the room that does it."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from hinv import paper, spectrum
from hinv.errors import AccuracyWarning, warn
from hinv.html import table
from hinv.modes import exact, threads
from hinv.network import Chain, losses
from hinv.shapes import Float, Int
from hinv.solve import SolveReport, solve
from hinv.solver.matrix import Matrix, checked_damping, counting
from hinv.solver.verify import verify


class Curvature(Matrix):
    """What Hessian and GGN share. `gauss_newton` says which of the two it is."""

    gauss_newton = False
    last_solve: SolveReport | None = None  # of the last call of `solve`

    @exact()
    def __init__(self, model: nn.Sequential, loss: losses.Loss, inputs: Tensor, targets: Tensor, check: bool = True):
        super().__init__(Chain(model, loss, inputs, targets, check), self.gauss_newton)
        if check:
            with threads(self.chain.rows):
                verify(self, model, loss)
        at = self.chain.loss, self.chain.outputs, self.chain.targets
        if check and self.gauss_newton and losses.diagonal_minus_rank_one(*at) is None and losses.linear(*at):
            warn(
                "the loss is linear in the model's outputs, so the Gauss-Newton matrix is zero: let the model put out logits, and the loss take the "
                "logarithm (CrossEntropyLoss)",
                AccuracyWarning,
            )

    def __repr__(self) -> str:
        what = f"{self.shape[0]} x {self.shape[1]}, {len(self.chain.stages)} stages, batch {len(self.chain.inputs)}, {self.dtype}"
        return f"{type(self).__name__}({what})"

    def _repr_html_(self) -> str:
        """For notebooks; the seconds are those of this machine."""
        prediction, stages = self.estimate(), self.chain.stages
        rows = {
            "stages": f"{len(stages)}, {sum(bool(s.parameters) for s in stages)} of them with parameters",
            "batch": f"{len(self.chain.inputs):,}",
            "arithmetic": f"{self.dtype} on {self.device}",
            "loss": f"{self.loss:.6g}",
            "cheapest method": prediction.method,
            "memory of it": f"{prediction.bytes[prediction.method] / 2**20:,.1f} MiB",
            "time of it": f"about {prediction.seconds():.1g} s",
        }
        return table(f"{type(self).__name__}, {self.shape[0]:,} x {self.shape[1]:,}", rows)

    # -- spectrum (`hinv.spectrum`) ------------------------------------------------------------------------------------

    def logdet(self, damping: float = 1e-2) -> tuple[float, float]:
        """(sign, log |det(H + damping I)|) by one factorization in float64. Errors as `factor`; AccuracyWarning where it has fewer than eight digits."""
        return counting(self, damping).logdet

    def effective_parameters(self, damping: float = 1e-2) -> float:
        """tr H (H + damping I)^-1 = sum over eigenvalues of lambda / (lambda + damping): how many directions the data determine (`hinv.GGN`, or H near a
        minimum; where lambda < 0, terms may have any sign).

        As P - damping tr (H + damping I)^-1, right to a relative 1e-15 of P. Source: MacKay, Neural Computation 4 (1992), 415-447. Cost and warning:
        `factor` in float64 and its `inverse_trace`. Errors as `factor`.
        """
        return self.shape[0] - damping * self.factor(damping, dtype=torch.float64).inverse_trace()

    def count_below(self, shift: float) -> int:
        """Exact number of eigenvalues below a shift (loss / parameter^2), by the inertia of H - shift I: one factorization, kept for later calls.

        Raises:
            SingularShiftError: the shift is an eigenvalue (or, at 0, the batch leaves weights without curvature); choose it a little beside.
            MemoryError: see `factor`.
        """
        return spectrum.count_below(self, shift)

    def counts(self, edges: Sequence[float] | Float[Tensor, " n"]) -> Int[Tensor, " bins"]:
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

    def diagonal(self) -> Float[Tensor, " P"]:
        """(P,) the exact diagonal, in O(L) without a factorization: the loss's second derivative goes backwards sample by sample."""
        return spectrum.diagonal(self)

    def trace(self) -> float:
        """The exact trace (loss / parameter^2), in O(L)."""
        return self.diagonal().sum().item()

    def block(self, stage: str | int) -> Float[Tensor, "p p"]:
        """(p_l, p_l) the exact diagonal block of one stage, by its name or its number among the stages with parameters.

        Raises:
            ValueError: no such stage.
        """
        return spectrum.block(self, stage)

    def by_stage(self) -> dict[str, dict[str, float]]:
        """{name: {"parameters", "trace", "norm"}} for each stage with parameters; norm is Frobenius, of its diagonal block."""
        return spectrum.by_stage(self)

    def smoothed_count(self, shift: float, width: float) -> float:
        """sum_i 1/2 + arctan((shift - lambda_i) / width) / pi: eigenvalues below a shift, each spread to a Lorentzian of this half-width.

        The difference of two is the integral of the smoothed density of states, Im tr (H - E - i width)^-1 / pi, between them. One complex factorization of
        H - (shift + i width) I, minus the argument of whose determinant over pi it is: two to four real ones, refused at no shift.

        Args:
            shift, width: loss / parameter^2; width > 0.

        Raises:
            ValueError: the width is not positive. MemoryError: see `factor`; twice its bytes.
        """
        return spectrum.smoothed_count(self, shift, width)

    def smoothed_density(self, shift: float, width: float) -> float:
        """Im tr (H - (shift + i width) I)^-1 / pi: the density of eigenvalues at a shift (parameter^2 / loss), each spread to a Lorentzian of this half-width.

        The derivative of `smoothed_count`, and its cost and selected inversion's, one to three factorizations. Arguments and errors as there.
        """
        return spectrum.smoothed_density(self, shift, width)

    # -- solves (`hinv.solve`) -----------------------------------------------------------------------------------------

    def solve(
        self, b: Float[Tensor, "P *k"], damping: float = 1e-2, method: str = "auto", rtol: float | None = None
    ) -> Float[Tensor, "P *k"]:
        """x with (H + damping I) x = b, its residual measured with an independent product.

        Source: `hinv.solver.factor` ("factor"); arXiv:2601.06096, (13) eq:unified-system and Algorithm 1 ("tridiagonal"); version 1's Q and A ("woodbury").

        Args:
            b: (P,) or (P, k), for example `H.gradient` (loss / parameter).
            damping: eps (loss / parameter^2); any sign. It is never changed on the way.
            method: "auto" takes the cheaper of "factor" and "dense" by `estimate`, then refines, then GMRES preconditioned by the factorization, then
                "sparse". By name: "factor", "factor32" (the same in float32, refined by float64 products: half the memory), "sparse" (SuperLU of K), "tridiagonal" O(L (p + 2Ba)^3), "woodbury" O(L (2p + 2Ba)^3),
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
        b = self.checked(b, "the right-hand side")
        damping = checked_damping(damping)
        if not b.numel():
            return b.clone()
        x, self.last_solve, problem = solve(self, b, damping, method, rtol)
        if problem:
            advice = "try method='sparse', method='dense' on a small network, more damping, or float64"
            warn(f"method '{self.last_solve.method}', damping {damping:g}: {problem}; {advice}", AccuracyWarning)
        return x


class Hessian(Curvature):
    """Exact Hessian of a loss on one batch with respect to the trainable parameters of an nn.Sequential.

    A snapshot: the model is copied, so training the original afterwards does not change it. Nothing of size P x P is
    formed except by `dense()` and `method="dense"`.

    Args:
        model: nn.Sequential (nested ones are flattened) of Linear, elementwise activations, Flatten, LayerNorm, Conv1d, Conv2d,
            pooling, hinv.Residual, or any module of one tensor to one tensor that treats samples independently. Parameters with requires_grad=False are
            constants.
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

    last_poles: spectrum.PoleReport | None = None  # of the last call of `absolute_solve` or `sign`

    def absolute_solve(
        self, b: Float[Tensor, "P *k"], damping: float = 1e-2, rtol: float = 1e-3
    ) -> Float[Tensor, "P *k"]:
        """(|H| + damping I)^-1 b, every eigenvalue by its absolute value: the saddle-free Newton step, to a stated error.

        1 / (|lambda| + damping) as a sum of minimax poles, one complex factorization each (`hinv.spectrum.poles`, whose errors a test measures again), on an
        interval that two counts prove to hold all of H. Each pole's solve is refined with independent products.

        Cost: two factorizations for the bound of H and N complex ones, each of two to four times a real one's time O(L (B a)^3) and twice its memory (those
        far from the axis in single precision: half of that), 2 k N products or more with H. N for an error of 1e-3 is 8, 10, 12, 16 at damping 0.1, 0.01, 0.001,
        1e-4 of |H|; each further digit takes 2 to 4 more. One core, gradient, damping 0.01 |H|, error 1e-3, seconds; Lanczos would have to know when to stop:

            network           P      poles   dense   Lanczos, reorthogonalized   plain Lanczos
            64-8x39-10 B8     3,024  0.4     8       1.9 (350 products)          8 (1,750)
            64-16x19-10 B16   5,792  1.2     88      7 (750)                     11 (3,000)
            192-24x7-10 B32   8,304  5.2     -       18 (1,150)                  5.5 (3,750)

        So the deeper and narrower, and the smaller the damping, the better: at 0.001 |H| plain Lanczos has no three digits after 5,000 products on any of them. At
        0.1 |H| Lanczos takes 150 to 300 products and wins on the widest (0.3 against 6 s). Dense wins below some 1,000 parameters.

        Args:
            b: (P,) or (P, k), for example `H.gradient` (loss / parameter).
            damping: eps > 0 (loss / parameter^2), at least 1e-6 of |H|.
            rtol: wanted |x - exact| / |exact|.

        Returns:
            x, shaped like b. `H.last_poles` holds the bound reached, the number of poles and the bound of |H|.

        Warns:
            AccuracyWarning: the bound exceeds rtol.

        Raises:
            ValueError, TypeError: b of another length, dtype or device, NaN in b, damping or rtol out of range. MemoryError: see `factor`.
            SingularShiftError: no bound of |H| could be proved.
        """
        b = self.checked(b, "the right-hand side")
        x, self.last_poles = spectrum.Absolute(self, checked_damping(damping), rtol).solve(b)
        self._warn_of_poles(rtol)
        return x.to(b.dtype)

    def sign(self, b: Float[Tensor, "P *k"], gap: float, rtol: float = 1e-3) -> Float[Tensor, "P *k"]:
        """sign(H) b, where no eigenvalue lies closer to zero than a gap: (b + sign(H) b) / 2 is the projection on positive curvature.

        Zolotarev's optimal poles on gap <= |lambda| <= |H|, one complex factorization each: 4, 6, 7, 9 for an error of 1e-3 at a gap of 0.1, 0.01, 0.001, 1e-4
        of |H|. Along eigenvectors between -gap and gap (`counts([-gap, gap])` says how many there are; weights that the batch does not excite are) the
        factor is not 1 but an odd function of lambda between -1 and 1.

        Args:
            b: (P,) or (P, k).
            gap: loss / parameter^2, positive.
            rtol: wanted |x - sign(H) b| / |b|, for b without components inside the gap.

        Returns, warns, raises: as `absolute_solve`.
        """
        b = self.checked(b, "the vector")
        x, self.last_poles = spectrum.sign(self, b, float(gap), rtol)
        self._warn_of_poles(rtol)
        return x.to(b.dtype)

    def _warn_of_poles(self, rtol: float) -> None:
        report = self.last_poles
        if report is not None and not report.bound <= rtol:
            warn(
                f"the relative error is at most {report.bound:.1e} with {report.poles} poles (residual {report.residual:.0e}), rtol {rtol:.0e} not reached: "
                "a larger damping or gap helps",
                AccuracyWarning,
            )

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
