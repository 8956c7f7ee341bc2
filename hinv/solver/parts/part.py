"""What every stage with parameters has in common: a `Part` knows what does not depend on the damping, its `Pivot` is the stage eliminated at one."""

import math
from dataclasses import dataclass

from torch import Tensor

from ..symmetric import SingularPivotError, Symmetric, factored


class Part:
    """A stage with parameters. Subclasses give its blocks at a given V and its products with vectors."""

    p: int  # parameters
    perp = 0  # how many of them the batch does not excite

    def eliminate(self, V: Tensor, damping: float, try_cholesky: bool) -> tuple["Pivot", Tensor | None]:
        S, N, V = self.blocks(V)
        S.diagonal().add_(damping)
        self.eliminate_perp(V, damping)
        S = factored(S, try_cholesky)
        return Pivot(self, S, None if N is None else S.couple(N, V), damping), V

    def eliminate_perp(self, V: Tensor | None, damping: float) -> None:
        if not self.perp:
            return
        if damping == 0:
            raise SingularPivotError(
                "the weights that the batch does not excite have no curvature of their own, and the damping is 0"
            )
        if V is not None:
            self.add_perp(V, -1.0 / damping)

    def blocks(self, V: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """J^T V J + E, J^T V A + F and A^T V A + G, new arrays; the last two None for the first stage."""
        raise NotImplementedError

    def pull(self, r: Tensor) -> tuple[Tensor, Tensor | None]:
        """J^T r and A^T r."""
        raise NotImplementedError

    def push(self, x: Tensor, y: Tensor | None) -> Tensor:
        """J x + A y."""
        raise NotImplementedError

    def take_apart(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """A vector in the order of the parameters (p, k) -> in the order of S, and its part beyond the span of the batch."""
        return g, None

    def put_together(self, x: Tensor, rest: Tensor | None) -> Tensor:
        return x


@dataclass
class Pivot:
    part: Part
    S: Symmetric
    Y: Tensor | None
    damping: float

    @property
    def negative(self) -> int:
        return self.S.negative + self.part.perp * (self.damping < 0)

    @property
    def log_abs_det(self) -> float:
        return self.S.log_abs_det + (self.part.perp * math.log(abs(self.damping)) if self.part.perp else 0.0)

    def backward(self, r: Tensor, g: Tensor) -> tuple[tuple, Tensor | None]:
        g, rest = self.part.take_apart(g)
        if rest is not None:
            rest = rest / self.damping
        Jr, r = self.part.pull(r)
        u, w = self.S.start(g + Jr)
        if self.Y is not None:
            r = r - self.Y.T @ u
            if rest is not None:
                r -= self.part.F_rest_T(rest)
        return (w, rest), r

    def forward(self, h: tuple, y: Tensor | None) -> tuple[Tensor, Tensor]:
        w, rest = h
        if y is not None:
            w = w - self.Y @ y
            if rest is not None:
                rest = rest - self.part.F_rest(y) / self.damping
        x = self.S.back(w)
        return self.part.put_together(x, rest), self.part.push(x, y)
