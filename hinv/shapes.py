"""Array shapes in annotations, written with jaxtyping: Float[Tensor, "P k"] is a floating-point tensor of P rows and k columns.

Within one call a letter has one value; "*k" is any number of further dimensions, "..." any that nobody names. Inexact is real or complex.
The tests enforce them at every call (tests/conftest.py). jaxtyping is not needed to use hinv: where it is not installed, Float[Tensor, "P k"] is Tensor.

    P   parameters of the network      p       of one stage       B   samples
    C   outputs (classes)              a       units of a stage   k   vectors at once
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Complex, Float, Inexact, Int

    Array = Any
else:
    try:
        from jaxtyping import Bool, Complex, Float, Inexact, Int
    except ImportError:

        class Plain:
            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Complex = Float = Inexact = Int = Plain
    Array = Tensor | np.ndarray  # small stages are eliminated by NumPy: all of a call are the one or the other


__all__ = ["Array", "Bool", "Complex", "Float", "Inexact", "Int"]
