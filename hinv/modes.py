"""What a caller may have switched on for the whole process, and must not reach into exact derivatives; and how many threads they take."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch.backends import cuda

# kernels of attention whose derivative cannot be differentiated: (is it on, switch it), torch.nn.attention.sdpa_kernel in a tenth of its time
FUSED = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
)


@contextmanager
def exact() -> Generator[None, None, None]:
    """Gradients on (they are off under torch.no_grad); automatic casts to half precision, anomaly detection, and attention that can be differentiated once
    only off, for as long as it lasts.

    Also a decorator. Products under vmap, which many columns at once need, cannot run with anomaly detection.
    """
    fused = [switch for on, switch in FUSED if on()]
    try:
        for switch in fused:
            switch(False)
        with (
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.autograd.set_detect_anomaly(False),
        ):
            yield
    finally:
        for switch in fused:
            switch(True)


NARROW = 128  # rows of the largest matrix up to which one thread is as fast as two


@contextmanager
def threads(rows: int) -> Generator[None, None, None]:
    """One thread where matrices have few rows, whatever the caller's setting, which comes back afterwards.

    A second one gains nothing there, and costs a factor of twenty where another process keeps its core busy: calls of some microseconds wait for it.
    """
    before = torch.get_num_threads()
    if rows > NARROW or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
