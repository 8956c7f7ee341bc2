"""Speed and memory figures of the fast solver: `make bench` writes results/bench.json. Benchmarks, not tests.

Each figure says what the aim was, what was measured on this machine in this run, and whether it was reached. Times are the smallest of a few
repetitions in one process, float64; memory is the growth of the peak resident size (Linux).
"""

from .measure import (
    SIX,
    deep,
    digits_network,
    eliminated,
    memory_of_a_step,
    network,
    peak_bytes,
    residual_network,
    seconds,
    step_of_gauss_newton,
)
from .table import on_a_gpu, table

__all__ = [
    "SIX",
    "deep",
    "digits_network",
    "eliminated",
    "memory_of_a_step",
    "network",
    "on_a_gpu",
    "peak_bytes",
    "residual_network",
    "seconds",
    "step_of_gauss_newton",
    "table",
]
