"""What a caller may have switched on for the whole process, and must not reach into exact derivatives."""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def exact() -> Generator[None, None, None]:
    """Gradients on (they are off under torch.no_grad), automatic casts to half precision and anomaly detection off, for as long as it lasts.

    Also a decorator. Products under vmap, which many columns at once need, cannot run with anomaly detection.
    """
    with (
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.autograd.set_detect_anomaly(False),
    ):
        yield
