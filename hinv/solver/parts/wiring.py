"""The stages that begin and end a residual block: segments of the state moved and added, no parameters and no curvature."""

from torch import Tensor

from hinv.network import Stage
from hinv.network.skip import on_segments
from hinv.shapes import Inexact  # floats, or complex numbers at a complex shift

from .part import Eliminated
from .spread import Spread


class Wired(Eliminated):
    p = 0
    negative = 0
    log_abs_det = 0.0

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        self.wiring, batch = stage.wiring, len(stage.inputs)
        self.before = [batch * a for a in stage.segments]
        self.behind = self.wiring.sizes(self.before)

    def eliminate(
        self, V: Inexact[Tensor, "rows rows"] | None, damping: complex, try_cholesky: bool
    ) -> tuple[Eliminated, Inexact[Tensor, "columns columns"]]:
        assert V is not None  # only a Head knows V by itself
        for dim in (0, 1):
            V = on_segments(self.wiring.back, V, self.behind, dim)
        return self, V

    def backward(self, r: Inexact[Tensor, "rows k"] | None, g: Tensor) -> tuple[None, Inexact[Tensor, "columns k"]]:
        assert r is not None
        return None, on_segments(self.wiring.back, r, self.behind)

    def forward(self, h: None, y: Inexact[Tensor, "columns k"] | None) -> tuple[Inexact[Tensor, "0 k"], Tensor]:
        assert y is not None  # a stage with parameters comes before it
        return y[:0], on_segments(self.wiring.forth, y, self.before)

    def spread(self, Sigma: Inexact[Tensor, "columns columns"] | None) -> Spread:
        assert Sigma is not None
        for dim in (0, 1):
            Sigma = on_segments(self.wiring.forth, Sigma, self.before, dim)
        return Spread(Sigma)
