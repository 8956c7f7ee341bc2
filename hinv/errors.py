"""Every error and warning of the library that has a name of its own."""

import contextlib
import functools
import os
import sys
import warnings

import torch

_HERE, _TORCH = (os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))
# a warning is about the line that called hinv, not about hinv's own, or those of what wraps its functions
_INSIDE = (_HERE, _TORCH, contextlib.__file__, functools.__file__)


class NotFiniteError(ValueError):
    """Weights, activations, the loss or its gradient are NaN or infinite."""


class SingularShiftError(torch.linalg.LinAlgError):
    """H + damping I cannot be factored at this damping: a pivot is zero to working precision."""


class AccuracyWarning(UserWarning):
    """A result is less accurate than asked. The message says how far it got and what to try."""


class CertificateWarning(UserWarning):
    """Eigenvalues are returned without the proof that none was skipped."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line that called hinv, however deep below it this is noticed."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
