"""The inverse of a factored matrix, where it is small enough to keep: its diagonal, its blocks, what it makes of the outputs, draws with it as covariance.

If the loss is minus a log-likelihood and damping the precision of a normal prior of the parameters, (H + damping I)^-1 is their covariance in Laplace's
approximation; everything here is defined without that. `Factor` takes selected inversion (`hinv.solver.parts.spread`), `Dual` its Cholesky factor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hinv.errors import AccuracyWarning, warn
from hinv.shapes import Float
from hinv.vectors import normal


class Inverse:
    """What `Factor` and `Dual` share: four parts of (H + damping I)^-1 and samples."""

    damping: Any  # a float; of a `Factor` at a complex shift a complex number
    names: list[str]  # of the stages with parameters
    like: Tensor  # empty, of the dtype and device of the arithmetic
    inverse_error: float  # estimate of the relative error of the diagonal

    @property
    def inertia(self) -> tuple[int, int, int]:
        """(positive, negative, zero) eigenvalues of H + damping I."""
        raise NotImplementedError

    def inverse_diagonal(self) -> Float[Tensor, " P"]:
        """(P,) the diagonal of (H + damping I)^-1 (parameter^2 / loss).

        By selected inversion, forwards over the stages: 2 n k^2 + 3 n^2 k + 2 n^3 flops a stage (n = a_out min(B, d), k = B a_in), one to three
        factorizations, and in memory its peak once more; nothing of P x P. By the dual: 2 a_out B^2 (r^2 + a_in) a stage, r the rank of the loss's Hessian
        for a sample. Source: Takahashi, Fagan & Chin (1973), for the stages.

        Warns:
            AccuracyWarning: it has fewer than half of the digits (`inverse_error`), as next to an eigenvalue of a later part of the network: a solve
                loses 1/d at a distance d, this 1/d^2.
        """
        self._warn()
        return self._diagonal()

    def inverse_trace(self) -> float:
        """The trace of (H + damping I)^-1 (parameter^2 / loss): d log|det(H + damping I)| / d damping. Cost and warning as `inverse_diagonal`."""
        self._warn()
        return self._trace()

    def inverse_block(self, stage: str | int) -> Float[Tensor, "p p"]:
        """(p, p) the diagonal block of (H + damping I)^-1 of one stage, by its name or its number among the stages with parameters, as `H.block`.

        Cost and warning as `inverse_diagonal`, and p^2 numbers.

        Raises:
            ValueError: no such stage.
        """
        number = numbered(self.names, stage)
        self._warn()
        return self._block(number)

    def output_covariance(self) -> Float[Tensor, "B C C"]:
        """(B, C, C) J_n (H + damping I)^-1 J_n^T for each sample, J_n (C x P) the derivative of its flattened outputs in the parameters.

        Cost and warning as `inverse_diagonal`, and under a loss with class blocks 2 B C k (k + C) flops, k the units before the last stage times B.
        """
        self._warn()
        return self._of_outputs()

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "P n"]:
        """(P, n) independent draws from N(0, (H + damping I)^-1) (parameters), each by one sweep forwards: half a solve; by the dual, a solve (Matheron's rule).

        Args:
            n: how many.
            generator: of the normal numbers, on the CPU; by default one from seed 0, the same at every call.

        Raises:
            ValueError: H + damping I is not positive definite, and so the inverse of no covariance.
        """
        self._require_definite()
        return self.colored(normal((self.noises, n), self.like, generator))

    @property
    def noises(self) -> int:
        """How many independent normal numbers `colored` takes for each draw."""
        raise NotImplementedError

    def colored(self, noise: Float[Tensor, "noises n"]) -> Float[Tensor, "P n"]:
        """The linear map, its product with its own transpose (H + damping I)^-1, that makes samples of independent standard normal numbers."""
        raise NotImplementedError

    def _diagonal(self) -> Float[Tensor, " P"]:
        raise NotImplementedError

    def _trace(self) -> float:
        return self._diagonal().sum().item()

    def _block(self, number: int) -> Float[Tensor, "p p"]:
        raise NotImplementedError

    def _of_outputs(self) -> Float[Tensor, "B C C"]:
        raise NotImplementedError

    def _require_definite(self) -> None:
        if negative := self.inertia[1]:
            raise ValueError(
                f"H + ({self.damping:g}) I has {negative} negative eigenvalues, so its inverse is no covariance: use more damping than minus the smallest "
                "eigenvalue of H (H.eigval(0)), or hinv.GGN"
            )

    def _warn(self) -> None:
        if not self.inverse_error <= torch.finfo(self.like.dtype).eps ** 0.5:
            warn(
                f"the inverse of H + ({self.damping:g}) I is right to a relative {self.inverse_error:.1g} only: the damping is close to minus an "
                "eigenvalue of a later part of the network; change it a little, take more, or factor in float64. Single columns of the inverse are right "
                "by H.solve",
                AccuracyWarning,
            )


def numbered(names: Sequence[str], stage: str | int) -> int:
    """Which of these stages is meant, by its name or by its number.

    Raises:
        ValueError: none.
    """
    if isinstance(stage, int) and -len(names) <= stage < len(names):
        return stage % len(names)
    if stage in names:
        return list(names).index(str(stage))
    raise ValueError(
        f"no stage {stage!r} with parameters: use one of {', '.join(map(repr, names))}, or its number from 0 to {len(names) - 1}"
    )
