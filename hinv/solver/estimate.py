"""What a factorization will cost, from shapes alone: flops and peak memory, before anything is allocated.

The bytes are those of the numbers alive at the peak. Measured with an allocator that gives freed blocks back (glibc with
MALLOC_MMAP_THRESHOLD_=65536) the resident peak was 0.85 to 1.0 of it; glibc's default keeps holes, and the resident peak can be twice as high.
"""

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hinv.network import Chain, losses

from .parts import Convolution, Dense, Diagonal, Linear, SmallLinear, Wired, kind
from .products import COLUMNS
from .symmetric import SMALL, STRIPES, WIDE


@dataclass(frozen=True)
class Estimate:
    """Predicted work of one factorization. `method` is the cheapest: "factor", "dual" (GGN) or "dense"."""

    parameters: int
    batch: int
    method: str
    flops: dict[str, float]  # by method
    bytes: dict[str, int]  # peak, by method
    overhead: dict[str, float]  # by method: what calls cost, in flops

    def __str__(self) -> str:
        flops, size = self.flops[self.method], self.bytes[self.method]
        return (
            f"{self.parameters:,} parameters, batch {self.batch}: method '{self.method}', about {flops:.2g} flops and "
            f"{size / 2**20:,.0f} MiB at the peak"
        )

    def seconds(self, method: str | None = None) -> float:
        """Predicted on this machine, usually to a factor of four, derivatives included; measures its matrix product once (some milliseconds)."""
        method = method or self.method
        return (self.flops[method] + self.overhead[method]) / _rate()


@functools.cache
def _rate() -> float:
    """Flops per second of the float64 matrix product on this machine's CPU, at the size of a middling stage."""
    A = torch.randn(512, 512, dtype=torch.float64, device="cpu")
    times = []
    for _ in range(4):
        start = time.perf_counter()
        A @ A
        times.append(time.perf_counter() - start)
    return 2.0 * len(A) ** 3 / min(times)


def eliminate(n: int, k: int) -> float:
    """Flops of factoring S (n x n), of C^-1 N for N (n x k), and of V - N^T S^-1 N."""
    return n**3 / 3 + n * n * k + (2 if k < WIDE else 1 + 1 / STRIPES) * n * k * k


def estimate(chain: Chain, gauss_newton: bool, dtype: torch.dtype) -> Estimate:
    """Flops and peak bytes of factor in this dtype, of the dense route, and for the Gauss-Newton matrix of the dual.

    Per linear stage with n = a_out m, k = B a_in: n^3/3 + n^2 k + 2 n k^2 + O(B^2 a^3) flops (n k^2 where k is large), n^2 + n k numbers kept;
    two or three matrices V of (B a)^2 alive at a time. A convolution is the same with m = fan-in + bias, and patches for samples.
    """
    item = dtype.itemsize
    live, batch = chain.live, len(chain.inputs)
    P = sum(p.numel() for p in chain.parameters)
    known = losses.diagonal_minus_rank_one(chain.loss, chain.outputs, chain.targets) is not None
    flops, kept, peak, dual = 0.0, 0, 0, 0.0
    classes = chain.outputs[0].numel()
    for number in reversed(range(len(live))):
        stage = live[number]
        structure = kind(stage, number > 0)
        a_out, a_in, p = stage.outputs[0].numel(), stage.inputs[0].numel(), len(stage.x)
        passed = batch * stage.carry  # rows of V that pass it by
        rows, k = batch * a_out, batch * a_in if number else 0
        if structure is Diagonal:
            flops, keep, scratch = flops + 2.0 * rows * (rows + passed), 0, 2 * (rows + passed) ** 2
        elif structure is Wired:
            before = batch * sum(stage.segments)
            behind = batch * sum(stage.wiring.sizes(stage.segments))
            flops, keep, scratch = flops + before**2 + behind**2, 0, before**2 + behind**2 + before * behind
        elif structure is Dense:
            flops += eliminate(p, k) + 2.0 * (p * rows * rows + p * p * rows + p * rows * a_in + rows * rows * a_in)
            alone = stage.by_rows()
            samples, a_out, a_in = len(alone.inputs), alone.outputs[0].numel(), alone.inputs[0].numel()
            # torch.func, as many products would take: fitted to residual blocks of 544 to 2376 parameters
            flops += 50.0 * samples * p * p + 700.0 * samples * p * (a_in + a_out)
            blocks = samples * (a_out * (p + a_in) + (p + a_in) * a_in) + p * p
            keep, scratch = p * p + p * k + blocks, 2 * rows * rows + p * (rows + p + 2 * k) + 2 * k * k + blocks
            dual += 2.0 * batch * classes * (a_out * (a_in + p) + p * batch * classes)
        elif known and stage is live[-1]:
            m = min(batch, p // a_out)
            side = batch + (a_in if number else 0)
            flops += a_out * (m**3 / 3 + 2 * m * side * side) + 4 * batch * k * a_out * (a_in if number else 0)
            keep = a_out * (m * (m + batch) + batch * a_in)
            # basis and its copy, inner products, their reordered parts, left-hand factors; V three times
            scratch = a_out * (2 * m * side + side * side + batch * (3 * a_in + 2 * batch) + a_in**2) + 3 * k * k
        else:
            units = stage.weight.shape[0]
            positions, fan_in = a_out // units, stage.weight[0].numel()
            m = min(batch * positions, p // units)
            n = units * m
            flops += eliminate(n, k) + 2.0 * m * batch * positions * units * (rows + n)
            flops += 2.0 * rows * fan_in * (rows + n + k) if number else 0
            keep = n * n + n * k
            if max(n, k) <= SMALL:
                keep += n * k + (k * k if m * units < p else 0)
            # S with the rows it comes from; N and V before and after; S twice while it is factored; N, X and what D^-1 reorders
            phases = (
                n * rows + n * n,
                n * n + n * k + rows * k + k * k,
                2 * n * n + n * k + k * k,
                n * n + 3 * n * k + k * k,
            )
            scratch = rows * rows + max(phases) - n * n - n * k
            if structure is Convolution:
                scratch += rows * rows + n * rows + rows * k + k * k  # changes of layout
                patches = batch * positions * (fan_in + 1)
                keep += 2 * patches
        if structure in (Linear, SmallLinear, Convolution):
            dual += 2 * batch * classes * (a_out * (a_in + batch * classes))
        peak = max(peak, kept + keep + scratch)
        kept += keep
    cost = {"factor": flops, "dense": 2 / 3 * P**3 + 4.0 * P * P * batch}
    alive = P + 4 * sum(
        stage.outputs.numel() for stage in live
    )  # of one product, of which many columns are taken at once
    size = {"factor": int(item * peak), "dense": item * (3 * P * P + max(alive, min(P * alive, COLUMNS)))}
    if gauss_newton:
        cost["dual"] = dual + (batch * classes) ** 3 / 3
        size["dual"] = item * (
            3 * (batch * classes) ** 2 + 2 * batch * classes * sum(s.outputs[0].numel() for s in live)
        )
    # in flops, what calls cost: a network's derivatives and sweeps stage by stage, the dense route once
    overhead = {"factor": 1e7 * (2 + len(live)), "dual": 1e7 * len(live), "dense": 2e7}
    method = min(cost, key=lambda name: cost[name] + overhead[name])
    return Estimate(P, batch, method, cost, size, overhead)


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


def require(prediction: Estimate, method: str, device: torch.device) -> None:
    """Refuse before allocating.

    Raises:
        MemoryError: parameters, batch, bytes needed and free, and what to reduce.
    """
    need = prediction.bytes[method]
    if need > SMALL_NEED and need > (free := available(device)):
        raise MemoryError(
            f"method '{method}' on {prediction.parameters:,} parameters and a batch of {prediction.batch} needs about {need:,} bytes; "
            f"{free:,.0f} are free on {device}. Reduce the batch or the width (memory grows with the square of batch times width), use "
            "float32, or an iterative method ('minres')"
        )
