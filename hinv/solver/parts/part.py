"""What every stage with parameters has in common: a `Part` knows what does not depend on the damping, its `Pivot` is the stage eliminated at one."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hinv.shapes import (
    Array,
    Inexact,  # floats, or complex numbers at a complex shift
)

from ..symmetric import SingularPivotError, Symmetric, factored
from .spread import Joint, Spread

# what the sweep back keeps of a stage for the sweep forth: S^-1 h, or half of it, and the rest beyond the batch
Kept = tuple[Any, Any]


class Eliminated:
    """A stage eliminated at one damping: its share of inertia and determinant, and of the two sweeps of a solve."""

    @property
    def negative(self) -> int:
        """Negative eigenvalues of its pivot block."""
        raise NotImplementedError

    @property
    def log_abs_det(self) -> float:
        """log |det| of its pivot block."""
        raise NotImplementedError

    def backward(self, r: Array | None, g: Array) -> tuple[Any, Array | None]:
        """From r_l (None at the loss) and g_l: what `forward` needs of the stage, and r_{l-1} (None at the first stage)."""
        raise NotImplementedError

    def forward(self, h: Any, y: Array | None) -> tuple[Array, Array | None]:
        """x_l, and y_l from y_{l-1} (None before the first stage, and behind the loss)."""
        raise NotImplementedError

    # the same sweep forwards for matrices instead of vectors (`spread`), and for noise (`hinv.solver.inverse`)

    def spread(self, Sigma: Array | None) -> Spread:
        """What the stage knows of the inverse, Sigma (None before the first stage) being that of y_{l-1}. It may be overwritten."""
        raise NotImplementedError

    noises = 0  # standard normal numbers that `color` takes

    def color(self, noise: Array) -> Any:
        """What `forward` needs for an x_l, and a y_l, of the covariance (H + damping I)^-1, which is positive definite."""
        return None


class Part:
    """A stage with parameters. Subclasses give its blocks at a given V and its products with vectors."""

    p: int  # parameters
    perp = 0  # how many of them the batch does not excite
    carry = 0  # rows of V, the first ones, of what passes the stage by inside a residual block: there A is the identity

    def eliminate(self, V: Tensor | None, damping: complex, try_cholesky: bool) -> tuple[Eliminated, Tensor | None]:
        assert V is not None  # the last stage under a loss that leaves V to it is a Head
        state, c = V, self.carry
        S, N, V = self.blocks(state[c:, c:])
        S.diagonal().add_(damping)
        self.eliminate_perp(V, damping)
        if c and N is not None and V is not None:
            N, V = self._beside(state, N, V)
        S = factored(S, try_cholesky)
        return Pivot(self, S, None if N is None else S.couple(N, V), damping), V

    def _beside(
        self, state: Inexact[Tensor, "rows rows"], N: Inexact[Tensor, "p k"], V: Inexact[Tensor, "k k"]
    ) -> tuple[Inexact[Tensor, "p columns"], Inexact[Tensor, "columns columns"]]:
        """N and V of the whole state: what passes by is coupled to the stage by V alone."""
        c = self.carry
        JV, AV = self.pull(state[c:, :c])
        assert AV is not None
        full = state  # overwritten where it has the size
        if len(state) != c + len(V):
            full = V.new_empty(c + len(V), c + len(V))
            full[:c, :c] = state[:c, :c]
        full[c:, :c], full[:c, c:], full[c:, c:] = AV, AV.mT, V
        return torch.cat([JV, N], 1), full

    def eliminate_perp(self, V: Array | None, damping: complex) -> None:
        if not self.perp:
            return
        if damping == 0:
            raise SingularPivotError(
                "the weights that the batch does not excite have no curvature of their own, and the damping is 0"
            )
        if V is not None:
            self.add_perp(V, -1.0 / damping)

    def blocks(self, V: Inexact[Tensor, "rows rows"]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """J^T V J + E, J^T V A + F and A^T V A + G, new arrays; the last two None for the first stage."""
        raise NotImplementedError

    def pull(self, r: Array) -> tuple[Array, Array | None]:
        """J^T r and A^T r."""
        raise NotImplementedError

    def push(self, x: Array, y: Array | None) -> Array:
        """J x + A y."""
        raise NotImplementedError

    def add_perp(self, V: Array, factor: complex) -> None:
        """V += factor F_rest^T F_rest."""
        raise NotImplementedError

    def F_rest(self, y: Array) -> Array:
        """The part of F y beyond the span of the batch."""
        raise NotImplementedError

    def F_rest_T(self, rest: Array) -> Array:
        """Its transpose."""
        raise NotImplementedError

    def take_apart(self, g: Array) -> tuple[Array, Array | None]:
        """A vector in the order of the parameters (p, k) -> in the order of S, and its part beyond the span of the batch."""
        return g, None

    def put_together(self, x: Array, rest: Array | None) -> Array:
        return x

    def variances(self, joint: Joint) -> Inexact[Array, " p"]:
        """The diagonal of the inverse in the order of the parameters."""
        return joint.C.diagonal()


@dataclass
class Pivot(Eliminated):
    part: Part
    S: Symmetric
    Y: Array | None
    damping: complex

    @property
    def negative(self) -> int:
        return self.S.negative + self.part.perp * (self.damping.real < 0)

    @property
    def log_abs_det(self) -> float:
        return self.S.log_abs_det + (self.part.perp * math.log(abs(self.damping)) if self.part.perp else 0.0)

    def backward(self, r: Array | None, g: Inexact[Array, "p k"]) -> tuple[Kept, Array | None]:
        g, rest = self.part.take_apart(g)
        if rest is not None:
            rest = rest / self.damping
        assert r is not None  # the last stage under a loss that gives none is a Head
        c, passed = self.part.carry, r
        Jr, r = self.part.pull(r[c:])
        u, w = self.S.start(g + Jr)
        if r is None or self.Y is None:  # the first stage
            return (w, rest), None
        if rest is not None:
            r = r - self.part.F_rest_T(rest)
        if c:
            r = torch.cat([passed[:c], r])
        return (w, rest), r - self.Y.T @ u

    def forward(self, h: Kept, y: Array | None) -> tuple[Inexact[Array, "p k"], Array]:
        w, rest = h
        if y is not None:
            w = w - self.Y @ y
            if rest is not None:
                rest = rest - self.part.F_rest(y[self.part.carry :]) / self.damping
        x = self.S.back(w)
        return self.part.put_together(x, rest), self.push(x, y)

    def push(self, x: Inexact[Array, "n k"], y: Inexact[Array, "columns k"] | None) -> Inexact[Array, "rows k"]:
        """J x + A y for the whole state: what is carried passes by."""
        c = self.part.carry
        if not c:
            return self.part.push(x, y)
        moved = self.part.push(x, None if y is None else y[c:])
        return torch.cat([moved.new_zeros(c, x.shape[1]) if y is None else y[:c], moved])

    def spread(self, Sigma: Inexact[Array, "columns columns"] | None) -> Joint:
        if Sigma is None or self.Y is None:
            return Joint(self, self.S.formed(), None, None)
        return Joint(self, *self.S.spread(self.Y, Sigma), Sigma)

    @property
    def noises(self) -> int:
        return self.part.p

    def color(self, noise: Inexact[Array, "p k"]) -> Kept:
        noise, rest = self.part.take_apart(noise)  # a rotation, and a projection: independent of each other
        return self.S.color(noise), None if rest is None else rest / self.damping**0.5
