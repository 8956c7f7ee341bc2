"""Every error and warning of the library that has a name of its own."""

import torch


class NotFiniteError(ValueError):
    """Weights, activations, the loss or its gradient are NaN or infinite."""


class SingularShiftError(torch.linalg.LinAlgError):
    """H + damping I cannot be factored at this damping: a pivot is zero to working precision."""


class AccuracyWarning(UserWarning):
    """A result is less accurate than asked. The message says how far it got and what to try."""


class CertificateWarning(UserWarning):
    """Eigenvalues are returned without the proof that none was skipped."""
