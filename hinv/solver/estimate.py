"""What a factorization will cost, from shapes alone: flops and peak memory, before anything is allocated.

The bytes are those of the numbers alive at the peak. The resident peak of a fresh process grew by 0.8 to 1.2 of it on six networks where less than three
times as much was free, and by up to 2.5 of it where more was, as glibc then keeps what was freed (`hinv.solver.memory`).
"""

import functools
import time
from dataclasses import dataclass

import torch

from hinv.network import Chain, losses
from hinv.network.stages import RESHAPES

from .kept import segment
from .parts import Convolution, Dense, Diagonal, Linear, SmallLinear, Wired, kind
from .products import COLUMNS
from .small import SMALL
from .symmetric import STRIPES, WIDE


@dataclass(frozen=True)
class Estimate:
    """Predicted work of one factorization. `method` is the cheapest: "factor", "dual" (GGN) or "dense"."""

    parameters: int
    batch: int
    method: str
    flops: dict[str, float]  # by method
    # peak, by method; "checkpoints": of a factor that keeps these alone, and of a solve with it; "stage": of one that keeps its stages elsewhere, where they
    # take "kept"
    bytes: dict[str, int]
    overhead: dict[str, float]  # by method: what calls cost, in flops

    @property
    def factored(self) -> str:
        """The cheaper of "factor" and "dual", where there is one."""
        cost = {name: self.flops[name] + self.overhead[name] for name in ("factor", "dual") if name in self.flops}
        return min(cost, key=lambda name: cost[name])

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
    flops, kept, fixed, peak, walked, products, formed = 0.0, 0, 0, 0, 0.0, 0.0, 0
    columns = batch * chain.outputs[0].numel()  # of the dual, at most
    stages: list[tuple[int, int, int]] = []  # from the loss on: V behind it, what it keeps, what it takes
    for number in reversed(range(len(live))):
        stage = live[number]
        structure = kind(stage, number > 0)
        a_out, a_in, p = stage.outputs[0].numel(), stage.inputs[0].numel(), len(stage.x)
        passed = batch * stage.carry  # rows of V that pass it by
        rows, k = batch * a_out, batch * a_in if number else 0
        derivatives, again = 0, 0  # of what is kept: what no `keep` moves elsewhere, and what is made again
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
            derivatives = blocks
            keep, scratch = p * p + p * k + blocks, 2 * rows * rows + p * (rows + p + 2 * k) + 2 * k * k + blocks
            walked += 2.0 * columns * a_out * (a_in + p)
            products, formed = products + p * columns**2, formed + p * columns
        elif known and stage is live[-1]:
            m = min(batch, p // a_out)
            side = batch + (a_in if number else 0)
            flops += a_out * (m**3 / 3 + 2 * m * side * side) + 4 * batch * k * a_out * (a_in if number else 0)
            keep, derivatives = a_out * (m * (m + batch) + batch * a_in), a_out * batch * a_in
            # basis and its copy, inner products, their reordered parts, left-hand factors; V three times
            scratch = a_out * (2 * m * side + side * side + batch * (3 * a_in + 2 * batch) + a_in**2) + 3 * k * k
        else:
            units = stage.weight.shape[0]
            positions, fan_in = a_out // units, stage.weight[0].numel()
            m = min(batch * positions, p // units)
            n = units * m
            flops += 2.0 * m * batch * positions * units * (rows + passed + n)
            flops += 2.0 * rows * fan_in * (rows + passed + n + k) if number else 0
            whole, k = rows + passed, k + passed if number else 0
            flops += eliminate(n, k)
            keep = n * n + n * k
            if max(n, k) <= SMALL:
                again = n * k + (k * k if m * units < p else 0)
                keep += again
            # S with the rows it comes from; N and V before and after; S twice while it is factored; N, X and what D^-1 reorders
            phases = (
                n * rows + n * n,
                n * n + n * k + rows * k + k * k,
                2 * n * n + n * k + k * k,
                n * n + 3 * n * k + k * k,
            )
            scratch = whole * whole + max(phases) - n * n - n * k
            if passed:
                scratch += rows * rows + n * k + k * k  # the stage's own V, and what is put beside it
            if structure is Convolution:
                scratch += rows * rows + n * rows + rows * k + k * k  # changes of layout
                derivatives = 2 * batch * positions * (fan_in + 1)
                keep += derivatives
        if structure in (Linear, SmallLinear, Convolution):
            walked += 2.0 * columns * a_out * a_in
            products += 2.0 * columns**2 * a_out
        peak = max(peak, kept + keep + scratch)
        kept, fixed = kept + keep, fixed + derivatives
        if not isinstance(stage.module, RESHAPES):
            stages.append(((rows + passed) ** 2, keep - derivatives - again, scratch + again))
    cost = {"factor": flops, "dense": 2 / 3 * P**3 + 4.0 * P * P * batch}
    alive = P + 4 * sum(
        stage.outputs.numel() for stage in live
    )  # of one product, of which many columns are taken at once
    size = {
        "factor": int(item * peak),
        "checkpoints": int(item * (fixed + by_checkpoints(stages))),
        "stage": int(item * (fixed + max(keep + scratch for _, keep, scratch in stages))),
        "kept": int(item * sum(keep for _, keep, _ in stages)),
        "dense": item * (3 * P * P + max(alive, min(P * alive, COLUMNS))),
    }
    if gauss_newton:
        gram = products + columns**3 / 3, 3 * columns**2
        small = 2.0 * P * P * columns + P**3 / 3, 3 * P * P + 2 * P * columns
        of_the_smaller = small if columns > P else gram
        cost["dual"] = walked + of_the_smaller[0]
        size["dual"] = item * (of_the_smaller[1] + formed + 2 * columns * sum(s.outputs[0].numel() for s in live))
    # in flops, what calls cost: a network's derivatives and sweeps stage by stage, the dense route once
    overhead = {"factor": 1e7 * (2 + len(live)), "dual": 1e7 * len(live), "dense": 2e7}
    method = min(cost, key=lambda name: cost[name] + overhead[name])
    return Estimate(P, batch, method, cost, size, overhead)


def by_checkpoints(stages: list[tuple[int, int, int]]) -> int:
    """Numbers alive at the peak of a solve (`kept.Checkpoints`): V before every segment, and of one segment what is kept and taken."""
    peak, saved, length = 0, 0, segment(len(stages))
    for start in range(0, len(stages), length):
        kept, saved = 0, saved + stages[start][0]
        for _, keep, scratch in stages[start : start + length]:
            kept += keep
            peak = max(peak, kept + scratch)
    return saved + peak
