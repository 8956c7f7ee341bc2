"""What memory there is: free on the device, left to the container; refused before anything is allocated, and given back in between."""

import ctypes
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .estimate import Estimate

SMALL_NEED = (
    2**24
)  # bytes that are not asked for: finding out what is free takes as long as eliminating ten narrow stages


def available(device: torch.device) -> float:
    """Bytes that can be allocated on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            machine = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, left_to_the_container())


def left_to_the_container(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes until the memory limit of this process's control group, or of one above it (Linux, versions 1 and 2); infinite without one.

    Page cache that can be dropped does not count as used.
    """
    left = float("inf")
    try:
        lines = [line.split(":", 2) for line in own.read_text("utf-8").splitlines()]
    except OSError:
        return left
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, usage = (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        if not controllers:  # version 2
            root, limit, usage = groups, "memory.max", "memory.current"
        # inside a container its own group may be mounted as the root
        inside = [root / path.lstrip("/"), *(root / path.lstrip("/")).parents]
        for group in [folder for folder in inside if folder == root or root in folder.parents]:
            try:
                allowed, used = (group / limit).read_text("utf-8").strip(), int((group / usage).read_text("utf-8"))
                cache = next(
                    int(line.split()[1])
                    for line in (group / "memory.stat").read_text("utf-8").splitlines()
                    if line.split()[0] in ("inactive_file", "total_inactive_file")
                )
            except (OSError, ValueError, StopIteration):
                continue
            if allowed != "max":
                left = min(left, max(0, int(allowed) - used + cache))
    return left


def require(prediction: Estimate, method: str, device: torch.device) -> bool:
    """Refuse before allocating; otherwise, whether memory is scarce: less than three times what is needed.

    Raises:
        MemoryError: parameters, batch, bytes needed and free, and what to reduce.
    """
    need = prediction.bytes[method]
    if need <= SMALL_NEED:
        return False
    free = available(device)
    if need > free:
        raise MemoryError(
            f"method '{method}' on {prediction.parameters:,} parameters and a batch of {prediction.batch} needs about {need:,} bytes; "
            f"{free:,.0f} are free on {device}. Reduce the batch or the width (memory grows with the square of batch times width), use "
            "float32, factor(damping, keep='checkpoints') or keep='disk' where the network is deep, or an iterative method ('minres')"
        )
    return 3 * need > free and device.type == "cpu"


def require_elsewhere(prediction: Estimate, keep: str, device: torch.device) -> None:
    """Refuse what does not fit into the host's memory, or into the folder of temporary files.

    Raises:
        ValueError: the device is the host. MemoryError: bytes needed and free.
    """
    if keep == "host" and device.type == "cpu":
        raise ValueError(
            "keep='host' is for a model on another device: on the CPU 'all' does that, and keep='disk' takes the stages out of memory"
        )
    need = prediction.bytes["kept"]
    where, free = ("the host", available(torch.device("cpu"))) if keep == "host" else room()
    if need > free:
        raise MemoryError(
            f"the stages of a factor of {prediction.parameters:,} parameters with keep={keep!r} take about {need:,} bytes; {free:,.0f} are free in {where}. "
            "Set TMPDIR to a folder with more space for keep='disk', use keep='checkpoints', or reduce the batch or the width"
        )


def room() -> tuple[str, float]:
    """The folder of temporary files, and how many bytes are free in it."""
    folder = tempfile.gettempdir()
    return folder, shutil.disk_usage(folder).free


HOLES = 2**25  # bytes freed after which the allocator is asked to return them


class Holes:
    """Asks glibc to return what was freed, each time that has become much, where memory is scarce.

    What a factorization keeps of a stage lies between that stage's temporary arrays, and the holes they leave are of little use to the next stage: without
    this the resident peak is up to 2.5 times the sum of what is alive, with it 1.2 times; but memory that comes fresh costs a quarter of the time.
    """

    def __init__(self, scarce: bool):
        self.scarce, self.freed = scarce, 0

    def __call__(self, freed: int) -> None:
        self.freed += freed * self.scarce
        if self.freed > HOLES:
            self.freed = 0
            _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    """glibc's malloc_trim, or nothing."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda padding: 0
