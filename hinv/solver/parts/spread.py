"""Selected inversion: what an eliminated stage knows of (H + damping I)^-1, forwards over the stages as in a solve.

In the solve's sweep forwards x_l = u_l - K_l y_{l-1} and y_l = A_l y_{l-1} + J_l x_l, K_l = S_l^-1 N_l, the u_l are what the factorization makes independent:
H + damping I = T^T diag(S) T with u = T x. So if x had the "covariance" (H + damping I)^-1 (indefinite ones are computed with alike), u_l would have S_l^-1,
and with Sigma that of y_{l-1}, 0 before the first stage,

    C      = S^-1 + K Sigma K^T                                            of x_l, its block of the inverse
    X      = -K Sigma                                                      of x_l with y_{l-1}
    Sigma' = A Sigma A^T + A X^T J^T + J X A^T + J C J^T                   of y_l

The weights beyond the span of the batch, -F_rest y / damping and what is independent of all else, P / damping with P their projection, follow from the same
two. Nothing is kept of a stage once Sigma has left it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hinv.shapes import (
    Array,
    Inexact,  # floats, or complex numbers at a complex shift
)

if TYPE_CHECKING:
    from .part import Part, Pivot


class Spread:
    """A stage without parameters, by the Sigma behind it; the others say how they come to theirs."""

    def __init__(self, Sigma: Inexact[Tensor, "rows rows"]):
        self.Sigma = Sigma

    def diagonal(self) -> Inexact[Array, " p"]:
        """The inverse's diagonal at the parameters of the stage."""
        return self.Sigma[:0, 0]

    def block(self) -> Inexact[Array, "p p"]:
        """Its block there."""
        return self.Sigma[:0, :0]

    def moved(self) -> Inexact[Array, "rows rows"]:
        """Sigma behind the stage."""
        return self.Sigma

    def of_samples(self, batch: int) -> Inexact[Tensor, "B a a"]:
        """The diagonal blocks of that, one a sample."""
        Sigma = self.moved()
        a = len(Sigma) // batch
        return Sigma.view(batch, a, batch, a).diagonal(0, 0, 2).permute(2, 0, 1)


@dataclass
class Joint(Spread):
    """x_l, in the order of S, and y_{l-1} together; no X and no Sigma at the first stage."""

    pivot: "Pivot"
    C: Inexact[Array, "n n"]
    X: Inexact[Array, "n columns"] | None
    Sigma: Inexact[Array, "columns columns"] | None

    def diagonal(self) -> Inexact[Array, " p"]:
        return self.pivot.part.variances(self)

    def block(self) -> Inexact[Array, "p p"]:
        return block(self.pivot.part, self.pivot.damping, self.C, self.X, self.Sigma)

    def moved(self) -> Inexact[Array, "rows rows"]:
        push = self.pivot.push
        with_x = push(self.C, None if self.X is None else self.X.T)  # of y_l with x, and with y_{l-1}
        with_y = None if self.X is None else push(self.X, self.Sigma).T
        Sigma = push(with_x.T, with_y)
        return 0.5 * (Sigma + Sigma.T)


class SmallJoint(Joint):
    """Tensors outside, arrays inside."""

    def diagonal(self) -> Inexact[Tensor, " p"]:
        return torch.from_numpy(super().diagonal())

    def block(self) -> Inexact[Tensor, "p p"]:
        return torch.from_numpy(super().block())

    def moved(self) -> Inexact[Tensor, "rows rows"]:
        return torch.from_numpy(super().moved())


def block(
    part: "Part",
    damping: complex,
    C: Inexact[Array, "n n"],
    X: Inexact[Array, "n columns"] | None,
    Sigma: Inexact[Array, "columns columns"] | None,
) -> Inexact[Array, "p p"]:
    """The inverse's block in the order of the parameters, of a `Joint`."""

    def rest(y: Inexact[Array, "columns k"]) -> Array | None:
        """What a movement of the input does to the weights beyond the span of the batch."""
        return -part.F_rest(y[part.carry :]) / damping if part.perp else None

    beyond = part.take_apart(eye(part.p, C))[1]
    if beyond is not None:
        beyond = beyond / damping
    if X is None or Sigma is None:
        return part.put_together(part.put_together(C, None).T, beyond)
    with_x = part.put_together(C, rest(X.T))  # of the parameters with x: (p, n), and with y
    with_y = part.put_together(X, rest(Sigma))
    return part.put_together(with_x.T, None if beyond is None else beyond + rest(with_y.T))


def eye(n: int, like: Array) -> Inexact[Array, "n n"]:
    if isinstance(like, np.ndarray):
        return np.eye(n, dtype=like.dtype)
    return torch.eye(n, dtype=like.dtype, device=like.device)
