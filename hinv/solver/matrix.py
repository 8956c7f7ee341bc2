"""The matrix as the rooms above see it: products, and factorizations of it plus a multiple of the identity."""

import copy
import functools
import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from hinv.modes import exact, threads
from hinv.network import Chain, losses

from .dual import Dual
from .estimate import Estimate, estimate
from .factor import Factor
from .kept import KEEP
from .memory import SMALL_NEED, available, require, require_elsewhere
from .parts import Structure, parts
from .products import Products

M = TypeVar("M", bound="Matrix")  # the kind of matrix one has


class Matrix(Products):
    """The Hessian of a chain or its Gauss-Newton matrix, H below: products of it, and factorizations of H + damping I.

    What does not depend on the damping is computed at the first factorization and kept.
    """

    def __init__(self, chain: Chain, gauss_newton: bool):
        super().__init__(chain, gauss_newton)
        # eigenvalues below a shift, and how uncertain their number is, kept by `hinv.spectrum`
        self.counted: dict[float, int] = {}
        self.uncertain: dict[float, float] = {}
        self.bounded: float | None = None  # what |H| is proved to be below, kept by `hinv.spectrum`
        self._structures: dict[torch.dtype, Structure] = {}
        self._estimates: dict[torch.dtype, Estimate] = {}
        self._convex: bool | None = None
        self._others: dict[torch.dtype, Matrix] = {}  # the same in another dtype

    def estimate(self, damping: float = 1e-2) -> Estimate:
        """Predicted flops, seconds and peak bytes of a factorization, from shapes alone; str() of it is a sentence.

        Nothing is allocated. The cost does not depend on the damping.
        """
        return self._estimate(self.dtype)

    def _estimate(self, dtype: torch.dtype) -> Estimate:
        if dtype not in self._estimates:
            self._estimates[dtype] = estimate(self.chain, self.gauss_newton, dtype)
        return self._estimates[dtype]

    @exact()
    def factor(self, damping: float = 1e-2, dtype: torch.dtype | None = None, keep: str = "all") -> Factor | Dual:
        """Factor H + damping I once, for many right-hand sides, its inertia and its determinant.

        Source: `hinv.solver.factor`, the symmetric stagewise elimination (the paper's K, eliminated from the loss backwards). Derivatives are computed
        at the first call and kept; each further damping costs the factorization only.

        Args:
            damping: shift (loss / parameter^2), of any sign: H - sigma I with damping = -sigma.
            dtype: of the arithmetic; the model's by default. float64 for a float32 model costs twice and loses no digits to small pivots.
            keep: "all" stages, or "checkpoints": V at every sqrt(L)-th of them, from which the others are made again, to the bit. Memory of 2 sqrt(L)
                stages instead of L; a solve then costs two factorizations more, inertia and determinant nothing (of an indefinite matrix a solve, which
                measures how far they are to be believed). Or all stages elsewhere, one at a time on the device: "host" (from a GPU), "disk" (a temporary
                file, in TMPDIR); a solve reads them twice.

        Returns:
            a `Factor` with solve(b), inertia, logdet and parts of the inverse: inverse_diagonal(), inverse_block(stage), inverse_trace(),
            output_covariance(), sample(n) (for a GGN with few outputs, its dual with the same).

        Raises:
            SingularShiftError: a pivot is zero to working precision (damping is minus an eigenvalue), with the stage's name.
            MemoryError: the estimate exceeds the free memory, or the file the free disk; says what to reduce. Nothing was allocated.
        """
        damping = checked_damping(damping)
        dtype = dtype or self.dtype
        prediction = self._estimate(dtype)
        if prediction.factored == "dual" and damping > 0 and self._is_convex():
            require(prediction, "dual", self.device)
            return Dual(converted(self.chain, dtype), damping)
        if keep not in KEEP:
            raise ValueError(f"keep must be one of {', '.join(map(repr, KEEP))}, not {keep!r}")
        scarce = require(prediction, KEEP[keep], self.device)
        if KEEP[keep] == "stage":
            require_elsewhere(prediction, keep, self.device)
        return Factor(self.structure(dtype), damping, functools.partial(_multiplied, self, dtype), scarce, keep)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_structures": {}, "_others": {}}

    @exact()
    def structure(self, dtype: torch.dtype) -> Structure:
        """What the elimination needs and no damping changes: the derivatives of every stage. Computed once for each dtype."""
        if dtype not in self._structures:
            with threads(self.chain.rows):
                self._structures[dtype] = parts(converted(self.chain, dtype), self.gauss_newton)
        return self._structures[dtype]

    def double(self: M) -> M:
        """The same matrix in float64 arithmetic (itself if it is)."""
        return self.cast(torch.float64)

    @exact()
    def cast(self: M, dtype: torch.dtype) -> M:
        """The same matrix in another dtype, kept."""
        if dtype == self.dtype:
            return self
        if dtype not in self._others:
            other: M = object.__new__(type(self))  # a subclass may be made from something else than a chain
            Matrix.__init__(other, converted(self.chain, dtype), self.gauss_newton)
            self._others[dtype] = other
        return cast(M, self._others[dtype])

    def _is_convex(self) -> bool:
        if self._convex is None:
            self._convex = losses.convex(self.chain.loss, self.chain.outputs, self.chain.targets)
        return self._convex


def counting(H: Matrix, damping: float) -> Factor | Dual:
    """H + damping I factored in float64 for its inertia and determinant alone: by checkpoints where all stages would not fit in memory."""
    need = H._estimate(torch.float64).bytes["factor"]
    fits = need <= SMALL_NEED or need <= available(H.device)
    return H.factor(damping, torch.float64, "all" if fits else "checkpoints")


def _multiplied(H: Matrix, dtype: torch.dtype, v: Tensor) -> Tensor:
    return H.cast(dtype) @ v


def checked_damping(damping: float) -> float:
    damping = float(damping)
    if not math.isfinite(damping):
        raise ValueError(f"damping must be a finite number, not {damping}")
    return damping


def converted(chain: Chain, dtype: torch.dtype) -> Chain:
    """The same problem in another dtype (the parameters' values are kept)."""
    if dtype == chain.inputs.dtype:
        return chain
    loss = copy.deepcopy(chain.loss).to(dtype) if isinstance(chain.loss, nn.Module) else chain.loss
    targets = chain.targets.to(dtype) if chain.targets.is_floating_point() else chain.targets
    try:
        return Chain(copy.deepcopy(chain.model).to(dtype), loss, chain.inputs.to(dtype), targets, check=False)
    except ValueError as error:
        raise ValueError(
            f"model and loss cannot be computed in {dtype}, in which solves and counts are made: {error}. A tensor that a closure or a plain attribute "
            "holds is not converted with them: register it as a buffer, or convert it where it is used, as in weight.to(outputs.dtype)"
        ) from error
