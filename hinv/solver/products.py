"""A curvature matrix of one batch through its products alone: automatic differentiation, none of the structure.

    H v    one backward pass through the graph of the gradient (Pearlmutter)
    G v    J^T Lambda J v: J v as the derivative of J^T u in u, Lambda from the loss, J^T by a backward pass

So a product shares no code with the elimination, and the residual of a solve measured with it is independent evidence.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hinv.errors import NotFiniteError
from hinv.modes import exact, threads
from hinv.network import Chain, losses
from hinv.shapes import Float
from hinv.vectors import flat

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

COLUMNS = 2**24  # numbers that one block of simultaneous products takes: H @ V goes block by block


def operator(shape: tuple[int, int], dtype: Any, **functions: Callable[[np.ndarray], np.ndarray]) -> "LinearOperator":
    """SciPy's LinearOperator from functions (matvec, ...)."""
    from scipy.sparse.linalg import LinearOperator

    make: Any = LinearOperator  # SciPy's types know the abstract class alone
    return make(shape, dtype=dtype, **functions)


class Operator:
    """What iterations and refinement need of a symmetric matrix: its size and arithmetic, and products."""

    @property
    def shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def multiply(self) -> Callable[[Tensor], Tensor]:
        """v (P,) -> the matrix times v, unchecked."""
        raise NotImplementedError

    def __matmul__(self, v: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        raise NotImplementedError

    def checked(self, v: Any, what: str) -> Float[Tensor, "P ..."]:
        """A vector (P,) or several (P, k) that fit this matrix, detached.

        Raises:
            ValueError, TypeError: another length, dtype or device, or not finite; `what` names it in the message.
        """
        if not isinstance(v, Tensor):
            raise TypeError(f"{what} must be a torch tensor, not {type(v).__name__}: use torch.as_tensor")
        if v.ndim not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(f"{what} has shape {tuple(v.shape)}; expected ({self.shape[0]},) or ({self.shape[0]}, k)")
        if v.dtype != self.dtype or v.device != self.device:
            raise TypeError(f"{what} is {v.dtype} on {v.device}, the model {self.dtype} on {self.device}: convert one")
        if not v.isfinite().all():
            raise ValueError(f"{what} contains NaN or infinite values")
        return v.detach()


class Products(Operator):
    """The Hessian of a chain, or its Gauss-Newton matrix, as an operator.

    Args:
        chain: the network on one batch.
        gauss_newton: whether second derivatives of the network are left out.
    """

    def __init__(self, chain: Chain, gauss_newton: bool):
        self.chain, self.gauss_newton = chain, gauss_newton
        self._record()

    def _record(self) -> None:
        """Autograd's graphs, which products go back through."""
        chain = self.chain
        with torch.enable_grad(), threads(chain.rows):
            self._outputs = chain.model(chain.inputs.clone())
            scalar = losses.value(chain.loss, self._outputs, chain.targets)
            # H keeps the gradient's graph: each product with it is one backward pass through that; G needs the outputs' alone
            self._gradient = torch.autograd.grad(
                scalar, chain.parameters, create_graph=not self.gauss_newton, retain_graph=True, materialize_grads=True
            )
        self.loss = scalar.item()
        self.gradient = flat(self._gradient)
        if not self.gradient.isfinite().all():
            raise NotFiniteError("the gradient contains NaN or infinite values: check the scale of inputs and weights")

    # graphs do not survive a pickle, and what is made from the chain is made again

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_outputs", "_gradient", "multiply")}

    @exact()
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._record()

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.gradient), len(self.gradient)

    @property
    def dtype(self) -> torch.dtype:
        return self.gradient.dtype

    @property
    def device(self) -> torch.device:
        return self.gradient.device

    @exact()
    def __matmul__(self, v: Float[Tensor, "P *k"]) -> Float[Tensor, "P *k"]:
        """H v for v (P,) or (P, k): exact, by differentiating autograd's graph; never forms H. Uses none of the structure.

        Cost: about four forward passes of the batch for each column.

        Raises:
            ValueError, TypeError: v of another length, dtype or device, or not finite.
        """
        v = self.checked(v, "the factor")
        if v.ndim == 1:
            with threads(self.chain.rows):
                return self.multiply(v)
        width = max(1, COLUMNS // (self.shape[0] + 4 * sum(stage.outputs.numel() for stage in self.chain.live)))
        return torch.cat([self._columns(piece) for piece in v.split(width, dim=1)], dim=1)

    @cached_property
    def multiply(self) -> Callable[[Tensor], Tensor]:
        """v (P,) -> the matrix times v, unchecked, with the graphs it needs."""
        if not self.gauss_newton:
            return lambda v: self._pull_back(self._gradient, tuple(self._split(v)))
        with torch.enable_grad():  # J^T u is linear in u: its derivative along v is J v
            u = torch.zeros_like(self._outputs).requires_grad_()
            JTu = torch.autograd.grad(
                self._outputs, self.chain.parameters, u, create_graph=True, materialize_grads=True
            )
        curvature = losses.products(self.chain.loss, self.chain.outputs, self.chain.targets)

        def product(v: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
            live = [(f, w) for f, w in zip(JTu, self._split(v), strict=True) if f.requires_grad]
            functions, weights = zip(*live, strict=True)
            (Jv,) = torch.autograd.grad(functions, u, weights, retain_graph=True, materialize_grads=True)
            return self._pull_back((self._outputs,), (curvature(Jv),))

        return product

    def _columns(self, V: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        # columns as rows first: torch before 2.14 cannot lay a product that does not depend on V (H = 0) beside itself
        return torch.func.vmap(self.multiply, in_dims=1)(V).T if V.shape[1] else V

    def _pull_back(self, functions: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Float[Tensor, " P"]:
        """Gradient of sum_i functions_i . weights_i in the parameters, (P,); functions that do not depend on them count as constants."""
        live = [(f, w) for f, w in zip(functions, weights, strict=True) if f.requires_grad]
        if not live:
            return torch.zeros_like(self.gradient)
        functions, weights = zip(*live, strict=True)
        columns = torch.autograd.grad(
            functions, self.chain.parameters, weights, retain_graph=True, materialize_grads=True
        )
        return torch.cat([c.reshape(-1) for c in columns])

    def _split(self, v: Float[Tensor, " P"]) -> list[Tensor]:
        parameters = self.chain.parameters
        return [w.view_as(p) for w, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]

    def dense(self) -> Float[Tensor, "P P"]:
        """(P, P): for checks on small networks. P products, P^2 numbers."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> "LinearOperator":
        """The same matrix for SciPy's iterative solvers and eigensolvers (CPU arrays in and out)."""

        def multiply(v: np.ndarray) -> np.ndarray:
            if np.iscomplexobj(v):
                return multiply(v.real) + 1j * multiply(v.imag)
            return (self @ torch.as_tensor(v, dtype=self.dtype, device=self.device)).cpu().numpy()

        def matvec(v: np.ndarray) -> np.ndarray:
            return multiply(v.reshape(-1))

        dtype = self.gradient.cpu().numpy().dtype
        return operator(self.shape, dtype, matvec=matvec, rmatvec=matvec, matmat=multiply, rmatmat=multiply)
