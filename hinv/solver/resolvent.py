"""(H - z I)^-1 for a complex shift z off the real axis, by the same elimination with complex numbers.

H - z I is complex symmetric (its transpose is itself, its adjoint is not), so the recursion of `hinv.solver.factor` holds as it stands: every transpose in
it stays a transpose. For Im z > 0 the imaginary part of H - z I is - Im z I, negative definite. Schur complements of such a matrix are such matrices, and the
inverse of each is at most 1 / Im z: every S_l exists, whatever z is next to. So nothing is refused, and no pivot is zero.

The eigenvalues of such an S_l have arguments between - pi and 0, whose sum is a continuous function of S_l: the imaginary part of log det(H - z I), without
the ambiguity of a logarithm, from the pivots alone.
"""

import cmath
import copy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hinv.modes import exact, threads
from hinv.shapes import Inexact

from .factor import Factor, check_right_hand_side
from .matrix import Matrix
from .memory import require
from .parts import Eliminated, HeadPivot, Linear, Pivot, SmallLinear, Structure
from .symmetric import Phased


class Resolvent:
    """H - z I for Im z > 0, factored: solve, log. Four times the flops of a real factorization, twice its memory; half of its time and memory in complex64."""

    @exact()
    def __init__(self, H: Matrix, z: complex, dtype: torch.dtype = torch.complex128):
        if not z.imag > 0:
            raise ValueError(f"the shift must lie above the real axis, not at {z:g}: use factor for a real one")
        need = H._estimate(torch.float64)
        scarce = require(replace(need, bytes={"factor": 2 * need.bytes["factor"]}), "factor", H.device)
        self.z, self.dtype, self.factor = z, dtype, Factor(complexified(H, dtype), -z, H.__matmul__, scarce)

    def __repr__(self) -> str:
        P = sum(self.factor.sizes)
        return f"Resolvent({P} x {P}, shift {self.z:g}, {len(self.factor.pivots)} stages)"

    def solve(self, b: Inexact[Tensor, "P *k"]) -> Inexact[Tensor, "P *k"]:
        """(H - z I)^-1 b for b (P,) or (P, k), complex128: one sweep back and one forth, without refinement."""
        check_right_hand_side(b.real, sum(self.factor.sizes))
        b = b.to(self.dtype)
        if not b.numel():
            return b.to(torch.complex128)
        with threads(self.factor.largest):
            return self.factor._sweeps(b.reshape(len(b), -1)).reshape(b.shape).to(torch.complex128)

    @property
    def trace(self) -> complex:
        """tr (H - z I)^-1, by selected inversion (`hinv.solver.inverse`)."""
        with threads(self.factor.largest):
            return complex(sum(spread.diagonal().sum().item() for spread in self.factor._spreads()))

    @property
    def log(self) -> complex:
        """log det(H - z I) = sum_i log(lambda_i - z), each imaginary part between - pi and 0."""
        pivots = self.factor.pivots
        return complex(sum(pivot.log_abs_det for pivot in pivots), sum(map(phase, pivots)))


def phase(pivot: Eliminated) -> float:
    """Sum of the arguments of its pivot block's eigenvalues."""
    if not isinstance(pivot, Pivot | HeadPivot):
        return 0.0
    # det S = det T det K of a Head, and arguments add: continuous again, and right at z = i infinity, where K is I
    factors = (pivot.T, pivot.K) if isinstance(pivot, HeadPivot) else (pivot.S,)
    return sum(cast(Phased, f).phase for f in factors if f is not None) + pivot.part.perp * cmath.phase(pivot.damping)


def complexified(H: Matrix, dtype: torch.dtype) -> Structure:
    """The structure in complex numbers, kept for the next shift."""
    if dtype not in H._structures:
        stages, V = H.structure(torch.float64)
        H._structures[dtype] = (
            [(stage, _complexified(part, dtype)) for stage, part in stages],
            None if V is None else V.to(dtype),
        )
    return H._structures[dtype]


def _complexified(part: Any, dtype: torch.dtype) -> Any:
    out = copy.copy(part)
    if type(out) is SmallLinear:  # NumPy's small matrices are for real ones
        out.__class__ = Linear
    for name, value in vars(part).items():
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if isinstance(value, Tensor):
            setattr(out, name, value.to(dtype))
    return out
