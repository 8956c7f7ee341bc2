"""A sum over the batches of a data set, one of them alive at a time: its products, the formed matrix, its diagonal, and factorizations.

H = share sum_batches H_batch    of the summed loss, share = 1 / (terms of the mean, over all of the data)
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hinv import ranks
from hinv.modes import exact
from hinv.network import Chain, losses
from hinv.network.copies import copied
from hinv.shapes import Float
from hinv.solver.dual import Dual
from hinv.solver.krylov import iterated
from hinv.solver.matrix import Matrix
from hinv.solver.memory import available
from hinv.solver.products import COLUMNS, Operator
from hinv.solver.refine import SolveReport
from hinv.solver.root import Root
from hinv.solver.whole import Formed

from .diagonal import diagonal as of_batch
from .loader import Batches

if TYPE_CHECKING:
    from .dataset import DataMatrix

LARGEST = 20_000  # rows of a matrix that is formed: 3.2 GB, and minutes to factor
T = TypeVar("T")


def local(A: "DataMatrix", batches: Iterable[Any], check: bool = False) -> Any:
    """curvlinops' operator of the summed loss over these batches."""
    try:
        from curvlinops import GGNLinearOperator, HessianLinearOperator
    except ImportError as error:
        raise ImportError("whole data sets need curvlinops: pip install 'hinv[dataset]'") from error

    kind = GGNLinearOperator if A.gauss_newton else HessianLinearOperator
    return kind(A.model, A.loss, A.parameters, batches, check_deterministic=check, num_data=None if check else 1)


def summed(own: Any, share: float) -> Any:
    """curvlinops' operator of share times the sum of `own` over the processes."""
    from curvlinops._torch_base import PyTorchLinearOperator

    class Sum(PyTorchLinearOperator):
        SELF_ADJOINT = True
        dtype, device = own.dtype, own.device

        @exact()
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            sizes = [x.numel() for x in X]

            def make() -> Tensor:
                return torch.cat([y.reshape(-1) for y in own._matmat(X)])

            flat = share * ranks.summed(make, X[0].new_empty(sum(sizes)))
            if all(x.isfinite().all() for x in X):
                finite(flat, "product")
            return [y.view_as(x) for y, x in zip(flat.split(sizes), X, strict=True)]

    return Sum(own._in_shape, own._out_shape)


def doubled(A: "DataMatrix") -> Any:
    """The same matrix in float64."""
    out, adapt = copy.copy(A), A.batches.adapt

    def pair(batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch if adapt is None else adapt(batch)
        return x.double(), y.double() if y.is_floating_point() else y

    out.model, out.loss = copy.deepcopy(A.model).double(), copy.deepcopy(A.loss).double()
    out.parameters = [p for p in out.model.parameters() if p.requires_grad]
    out.batches = Batches(A.batches.loader, pair)
    out.local = local(out, out.batches)
    out.operator = summed(out.local, out.share)
    return out


class Led(Operator):
    """The same matrix for an iteration on the first process (`ranks.Led`)."""

    def __init__(self, A: "DataMatrix"):
        self.A, like = A, torch.empty(A.shape[0], dtype=A.dtype, device=A.device)
        self.products = ranks.Led(A.multiply, like)

    @property
    def shape(self) -> tuple[int, int]:
        return self.A.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    @property
    def multiply(self) -> Callable[[Tensor], Tensor]:
        return self.products

    def __matmul__(self, v: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        return self.products(v)

    def run(self, make: Callable[[], T]) -> T:
        return self.products.run(make)


def solve(
    A: "DataMatrix", b: Float[Tensor, "P *k"], damping: float, rtol: float | None
) -> tuple[Float[Tensor, "P *k"], SolveReport, str]:
    led, methods = Led(A), ("cg", "minres") if A.gauss_newton and damping > 0 else ("minres",)
    return led.run(lambda: iterated(led, b, damping, methods, rtol))


# -- the formed matrix ------------------------------------------------------------------------------------------------


def check_size(rows: int, like: Tensor, what: str) -> None:
    if rows > LARGEST:
        raise ValueError(
            f"{what} would be a matrix of {rows:,} rows, more than {LARGEST:,}: use solve, eigsh, or trace and density by estimates, which take products; "
            "or factor a hinv.GGN or hinv.Hessian of one batch, which is never formed"
        )
    need, free = 3 * rows**2 * like.element_size(), available(like.device)
    if need > free:
        raise MemoryError(
            f"{what} would be a matrix of {rows:,} rows, which takes about {need:,} bytes; {free:,.0f} are free on {like.device}. Use solve, or fewer "
            "parameters or samples"
        )


def dense(A: "DataMatrix") -> Float[Tensor, "P P"]:
    P, like = A.shape[0], A.parameters[0].detach()
    check_size(P, like, "dense()")

    def make() -> Float[Tensor, "P P"]:
        out, eye = like.new_zeros(P, P), torch.eye(P, dtype=A.dtype, device=A.device)
        units = sum(len(p) for p in A.parameters if p.ndim)
        for x, y in A.batches:
            of_one = local(A, [(x, y)])
            width = max(1, COLUMNS // (P + 4 * x.numel() + 4 * len(x) * units))
            for start in range(0, P, width):
                out[:, start : start + width] += of_one @ eye[:, start : start + width]
        return out

    out = finite(ranks.summed(make, like.new_empty(P, P)).mul_(A.share), "matrix")
    return 0.5 * (out + out.mT)


def finite(found: Float[Tensor, "..."], what: str) -> Float[Tensor, "..."]:
    if not found.isfinite().all():
        raise ArithmeticError(f"the {what} is not finite: the loss or its derivatives overflow somewhere in the data")
    return found


def factor(A: "DataMatrix", damping: float) -> Formed | Dual:
    A = A.double()
    P = A.shape[0]
    if A.gauss_newton and damping > 0 and isinstance(A.model, nn.Sequential):
        chains = Chains(A, copied(A.model))

        def outputs() -> Float[Tensor, "2"]:
            """Their number, and how many batches have a loss that is not convex."""
            all_of_it = [(c.outputs.numel(), not losses.convex(c.loss, c.outputs, c.targets)) for c in chains]
            return torch.tensor(all_of_it, dtype=A.dtype, device=A.device).sum(0)

        columns, bent = finite(ranks.summed(outputs, torch.empty(2, dtype=A.dtype, device=A.device)), "output").tolist()
        if columns <= P and not bent:
            check_size(int(columns), A.parameters[0], "the dual form")
            return Dual(ranks.agreed(lambda: Root(chains, A.share)).gathered(), damping)
    return Formed(dense(A), damping, A.__matmul__)


# -- by the stages of the network -------------------------------------------------------------------------------------


class Chains:
    """The network on each of the batches, again and again; the first is checked with products, the others by their shapes."""

    def __init__(self, A: "DataMatrix", model: nn.Module):
        if not isinstance(model, nn.Sequential):
            raise TypeError(
                f"this needs the stages of an nn.Sequential, and the model is a {type(model).__name__}: use trace('xtrace'), or dense() for all of it"
            )
        self.model, self.loss, self.batches, self.device, self.checked = model, A.loss, A.batches, A.device, False

    def __iter__(self) -> Iterator[Chain]:
        for x, y in self.batches:
            yield Chain(self.model, self.loss, x.to(self.device), y.to(self.device), check=not self.checked)
            self.checked = True


def diagonal(A: "DataMatrix") -> Float[Tensor, " P"]:
    chains = Chains(A, A.model)

    def make() -> Float[Tensor, " P"]:
        return torch.stack([of_batch(Matrix(chain, A.gauss_newton)) for chain in chains]).sum(0)

    return finite(A.share * ranks.summed(make, torch.empty(A.shape[0], dtype=A.dtype, device=A.device)), "diagonal")
