"""A matrix that is formed, factored as one stage of a chain: what `Factor` gives then needs no code of its own."""

from collections.abc import Callable

from torch import Tensor, nn

from hinv.errors import SingularShiftError
from hinv.network import Stage
from hinv.shapes import Float

from .factor import Factor
from .parts import Eliminated, Part, Pivot
from .symmetric import factored

NAME = "the whole network"


class Whole(Part):
    """S = the matrix + damping I, and no state before or behind it."""

    def __init__(self, matrix: Float[Tensor, "P P"]):
        self.matrix, self.p = matrix, len(matrix)

    def eliminate(self, V: Tensor | None, damping: complex, try_cholesky: bool) -> tuple[Eliminated, Tensor | None]:
        self.matrix.diagonal().add_(damping)
        return Pivot(self, factored(self.matrix, try_cholesky), None, damping), None

    def pull(self, r: Float[Tensor, "0 k"]) -> tuple[Float[Tensor, "P k"], None]:
        return r.new_zeros(self.p, r.shape[1]), None

    def push(self, x: Float[Tensor, "P k"], y: Tensor | None) -> Float[Tensor, "0 k"]:
        return x[:0]


class Formed(Factor):
    """(H + damping I) of a symmetric matrix that is formed: one Cholesky or Bunch-Kaufman factorization, P^3 / 3 flops, P^2 numbers.

    Args:
        matrix: (P, P) symmetric; overwritten.
        product: v -> H v, independent of it, for `uncertainty`.
    """

    def __init__(self, matrix: Float[Tensor, "P P"], damping: float, product: Callable[[Tensor], Tensor]):
        # no view of the matrix, which would keep it beside its factor
        none = matrix.new_empty(0)
        stage = Stage(NAME, nn.Identity(), {NAME: nn.Parameter(none)}, none, matrix.new_empty(len(matrix)))
        part = Whole(matrix)
        try:
            super().__init__(([(stage, part)], matrix.new_empty(0, 0)), damping, product)
        except SingularShiftError as error:
            raise SingularShiftError(
                f"H + ({damping:g}) I is singular to working precision: the damping is minus an eigenvalue of H; change it a little"
            ) from error
        del part.matrix  # it is the factor now

    def __repr__(self) -> str:
        return super().__repr__().replace("Factor(", "Formed(", 1)

    def _of_outputs(self) -> Float[Tensor, "B C C"]:
        raise TypeError(
            "a formed matrix does not know the outputs: with H = hinv.GGN or hinv.Hessian on one batch, H.factor(damping).output_covariance() does"
        )
