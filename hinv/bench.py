"""Speed and memory figures of the fast solver: `make bench` writes results/bench.json. Benchmarks, not tests.

Each figure says what was asked, what was measured on this machine in this run, and whether it was reached. Times are the smallest of a few
repetitions in one process, float64; memory is the growth of the peak resident size (Linux).
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from hinv.checks import commit, output, write_atomically
from hinv.curvature import GGN, Hessian
from hinv.data import load
from hinv.network.build import tall_skinny
from hinv.optim import GaussNewton
from hinv.solver import sparse
from hinv.solver.factor import Factor

# The six networks of the comparison with SuperLU, as (sizes, batch), and the two of the libraries' comparison
SIX = {
    "8-8x79-10 B8": ((8, *[8] * 79, 10), 8),
    "64-8x39-10 B8": ((64, *[8] * 39, 10), 8),
    "192-24x7-10 B32": ((192, *[24] * 7, 10), 32),
    "64-24x7-10 B64": ((64, *[24] * 7, 10), 64),
    "16-16x999-10 B4": ((16, *[16] * 999, 10), 4),
    "64-16x99-10 B16": ((64, *[16] * 99, 10), 16),
}


def network(sizes: tuple[int, ...], batch: int, kind: type = Hessian, gain: float = 1.0, bias: bool = False):
    """A tanh network with orthogonal weights under cross-entropy, on seeded normal inputs."""
    x = torch.randn(batch, sizes[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return kind(tall_skinny(sizes, bias=bias, gain=gain), nn.CrossEntropyLoss(), x, torch.arange(batch) % sizes[-1])


def digits_network(sizes: tuple[int, ...], batch: int) -> Hessian:
    images = load("digits", n=batch, normalize=True, dtype=torch.float64)
    return Hessian(tall_skinny(sizes, bias=False, gain=0.9), nn.CrossEntropyLoss(), images.x.flatten(1), images.y)


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Smallest of `repeats` timings after one call to warm up (long calls are not repeated)."""
    start = time.perf_counter()
    function()
    first = time.perf_counter() - start
    if first > 20:
        return first
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Growth of the resident peak over the call, or None where /proc does not tell."""

    def status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = status("VmRSS")
        function()
        return status("VmHWM") - before
    except OSError:
        function()
        return None


def residual(H: Hessian, F: Factor, damping: float, refinements: int = 2) -> float:
    b = H.gradient
    x = F.solve(b)
    for _ in range(refinements):
        x = x + F.solve(b - H @ x - damping * x)
    return ((H @ x + damping * x - b).norm() / b.norm()).item()


def eliminated(H: Hessian, damping: float = 0.1) -> Factor:
    """A factorization by the stagewise elimination; its derivatives are computed once, so that timing it again times the elimination only."""
    return Factor(H.structure(H.dtype), damping, H.__matmul__)


def against_the_papers_algorithm() -> dict:
    out = {}
    for name, target in (("192-24x7-10 B32", 30.0), ("8-8x79-10 B8", 5.0)):
        H = network(*SIX[name])
        H.layers, eliminated(H)
        ours = seconds(lambda H=H: eliminated(H, 0.01).solve(H.gradient), 5)
        theirs = seconds(lambda H=H: H.solve(H.gradient, 0.01, method="tridiagonal"), 2)
        out[name] = {
            "factor_and_solve": ours,
            "tridiagonal": theirs,
            "ratio": theirs / ours,
            "target": target,
            "reached": theirs / ours >= target,
        }
    return out


def deep(layers: int) -> Hessian:
    return network((16, *[16] * (layers - 1), 10), 4)


def memory_of_depth(layers: int) -> int:
    """Peak growth of derivatives and factorization in a process of its own, whose allocator returns every freed block."""
    code = f"import hinv.bench as b; H = b.deep({layers}); print(b.peak_bytes(lambda: H.factor(0.1)))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"}
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True).stdout)


def step_of_gauss_newton(classes: int) -> dict[str, float]:
    """One Gauss-Newton step of the 20-layer network on 32 images of 16 x 16: predicted and measured peak bytes, seconds of the next step."""

    def descent(sizes: tuple[int, ...], columns: int) -> tuple[GaussNewton, tuple]:
        x = torch.randn(32, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return GaussNewton(tall_skinny(sizes), nn.CrossEntropyLoss(), damping=1.0), (x, torch.arange(32) % sizes[-1])

    warm, batch = descent((4, 3, 2), 4)
    warm.step(*batch)
    ours, batch = descent((768, *[24] * 19, classes), 768)
    prediction = GGN(ours.model, ours.loss, *batch).estimate()
    method = "dual" if prediction.method == "dual" else "factor"
    peak = peak_bytes(lambda: ours.step(*batch))
    again = ours.step(*batch).seconds
    out = {
        "parameters": prediction.parameters,
        "predicted": prediction.bytes[method],
        "measured": peak,
        "seconds": again,
    }
    return out | {"method": method}


def memory_of_a_step(classes: int) -> dict[str, float]:
    """`step_of_gauss_newton` in a process of its own, whose allocator returns every freed block."""
    code = f"import json, hinv.bench as b; print(json.dumps(b.step_of_gauss_newton({classes})))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    return json.loads(run.stdout)


def depth(depths: tuple[int, ...] = (16, 64, 256, 1024, 4096), deepest: int = 10_000) -> dict:
    times, memory = [], []
    for layers in (*depths, deepest):
        H = deep(layers)
        H.structure(H.dtype)
        memory.append(memory_of_depth(layers))
        times.append(seconds(lambda H=H: eliminated(H), 3))
    refined = residual(H, eliminated(H), 0.1)
    slope = float(np.polyfit(np.log(depths), np.log(times[:-1]), 1)[0])
    memory_slope = float(np.polyfit(np.log(depths), np.log(memory[:-1]), 1)[0])
    return {
        **{
            "depths": [*depths, deepest],
            "seconds": times,
            "peak_bytes": memory,
            "time_slope": slope,
            "memory_slope": memory_slope,
        },
        **{
            "target": 1.05,
            "deepest_seconds": times[-1],
            "deepest_residual": refined,
            "reached": slope <= 1.05 and memory_slope <= 1.05,
        },
    }


def matmul_rate(n: int = 4096) -> float:
    """flops per second of this machine's own float64 matrix product."""
    A = torch.randn(n, n, dtype=torch.float64)
    return 2.0 * n**3 / seconds(lambda: A @ A, 3)


def flop_rate_and_classes() -> tuple[dict, dict]:
    sizes, batch = (3072, *[64] * 19, 10), 32
    H = network(sizes, batch)
    H.structure(H.dtype)
    time_10 = seconds(lambda: eliminated(H), 2)
    a, m, d = 64, 32, 64
    n, k, hidden = a * min(batch, d), batch * a, len(sizes) - 3
    formula = hidden * (n**3 / 3 + 2 * n * n * k + n * k * k) + (a * m) ** 3 / 3
    rate, machine = formula / time_10, matmul_rate()
    share = {
        "flops": formula,
        "seconds": time_10,
        "rate": rate,
        "matmul_rate": machine,
        "share": rate / machine,
        "target": 0.5,
        "reached": rate >= machine / 2,
    }
    thousand = network((3072, *[64] * 19, 1000), batch)
    thousand.structure(thousand.dtype)
    peak = peak_bytes(lambda: eliminated(thousand))
    time_1000 = seconds(lambda: eliminated(thousand), 2)
    predicted = thousand.estimate().bytes["factor"]
    classes = {
        "seconds_10": time_10,
        "seconds_1000": time_1000,
        "ratio": time_1000 / time_10,
        "peak_bytes": peak,
        "predicted_bytes": predicted,
    }
    classes |= {
        "target": "under 4 GiB, under 1.5 times",
        "reached": (peak or predicted) < 2**32 and time_1000 < 1.5 * time_10,
    }
    return share, classes


def right_hand_sides() -> dict:
    out = {}
    for name, H in {
        "N1": digits_network((64, *[24] * 7, 10), 64),
        "N2": digits_network((64, *[8] * 39, 10), 8),
    }.items():
        F, B = eliminated(H), torch.randn(H.shape[0], 8, dtype=torch.float64)
        one, eight, product = (
            seconds(lambda F=F, B=B: F.solve(B[:, 0]), 20),
            seconds(lambda F=F, B=B: F.solve(B), 20),
            seconds(lambda H=H, B=B: H @ B[:, 0], 20),
        )
        out[name] = {"one": one, "eight": eight, "product": product, "in_products": one / product, "target": 5.0}
        out[name]["reached"] = one <= 5 * product and eight < 8 * one
    return out


def against_sparse() -> dict:
    out = {}
    for name, (sizes, batch) in SIX.items():
        H = network(sizes, batch)
        ours = seconds(lambda H=H: eliminated(H, 0.1), 3)
        K, _ = sparse.augmented(H.chain, 0.1)
        theirs = seconds(lambda K=K: sparse.splu(K), 1)
        out[name] = {
            "factor": ours,
            "superlu": theirs,
            "ratio": theirs / ours,
            "target": 8.0,
            "reached": theirs >= 8 * ours,
        }
    return out


def accuracy() -> dict:
    worst = {}
    for name, (sizes, batch) in SIX.items():
        H = network(sizes, batch)
        worst[name] = max(residual(H, eliminated(H, d), d) for d in (1.0, 0.1, 0.01, 1e-3, 1e-4))
    return {"worst_residual": worst, "target": 1e-10, "reached": max(worst.values()) < 1e-10}


def against_dense() -> dict:
    out = {}
    for name, H, target in (
        ("N1", digits_network((64, *[24] * 7, 10), 64), 1.0),
        ("N2", digits_network((64, *[8] * 39, 10), 8), 10.0),
    ):
        for damping in (0.01, 0.001):
            H._structures.clear()
            ours = seconds(lambda H=H, d=damping: (H._structures.clear(), H.factor(d).solve(H.gradient)), 3)
            dense = seconds(
                lambda H=H, d=damping: torch.linalg.solve(
                    H.dense() + d * torch.eye(H.shape[0], dtype=H.dtype), H.gradient
                ),
                1,
            )
            error = residual(H, H.factor(damping), damping)
            row = {
                "derivatives_factor_solve": ours,
                "dense": dense,
                "ratio": dense / ours,
                "residual": error,
                "negative": H.factor(damping).inertia[1],
            }
            out[f"{name} {damping:g}"] = row | {"target": target, "reached": dense / ours >= target and error < 1e-10}
    return out


def million() -> dict:
    H = network((22, *[22] * 1999, 10), 4, bias=True)
    start = time.perf_counter()
    peak = peak_bytes(lambda: H.solve(H.gradient, 0.1, method="factor"))
    return {
        **{"parameters": H.shape[0], "layers": 2000, "seconds": time.perf_counter() - start, "peak_bytes": peak},
        **{"residual": H.last_solve.residual, "reached": H.shape[0] >= 10**6 and H.last_solve.residual < 1e-8},
    }


def dual() -> dict:
    """The Gauss-Newton matrix by the recursion and by its dual, same matrix."""
    G = network((256, *[24] * 7, 10), 64, GGN)
    G.structure(G.dtype)
    recursion, direct = seconds(lambda: eliminated(G)), seconds(lambda: G.factor(0.1))
    return {"recursion": recursion, "dual": direct, "chosen": G.estimate().method}


def table(figures: dict) -> str:
    """The figures as the README shows them: what was asked, what was measured, whether it was reached."""

    def mark(reached: bool) -> str:
        return "yes" if reached else "**no**"

    rows = []
    for name, f in figures["1 against the paper's algorithm"].items():
        rows.append(
            (
                f"factor and solve, {name}: times faster than the published algorithm",
                f"{f['target']:g}",
                f"{f['ratio']:.1f} ({f['factor_and_solve'] * 1e3:.0f} ms)",
                f,
            )
        )
    f = figures["2 depth"]
    rows.append(
        (
            "log-log slope against depth (16 to 4096 layers of 16), time and memory",
            "at most 1.05",
            f"{f['time_slope']:.2f}, {f['memory_slope']:.2f}",
            f,
        )
    )
    rows.append(
        ("10,000 layers of 16", "seconds", f"{f['deepest_seconds']:.1f} s, residual {f['deepest_residual']:.0e}", f)
    )
    f = figures["3 flop rate"]
    rows.append(
        (
            "3072-64x19-10, batch 32: share of the matrix-product rate",
            "0.5",
            f"{f['share']:.2f} ({f['seconds']:.1f} s)",
            f,
        )
    )
    for name, f in figures["4 right-hand sides"].items():
        rows.append(
            (
                f"one more right-hand side on {name}, in Hessian-vector products; eight together, in ones",
                "at most 5; less than 8",
                f"{f['in_products']:.1f}; {f['eight'] / f['one']:.1f}",
                f,
            )
        )
    f = figures["5 a thousand classes"]
    rows.append(("1000 classes instead of 10: times the cost", "at most 1.5", f"{f['ratio']:.2f}", f))
    f = figures["6 residual"]
    rows.append(
        (
            "largest residual, six networks, damping 1 to 1e-4, two refinements",
            "1e-10",
            f"{max(f['worst_residual'].values()):.0e}",
            f,
        )
    )
    for name, f in figures["7 against SuperLU on K"].items():
        rows.append((f"factor, {name}: times faster than SuperLU on $K$", f"{f['target']:g}", f"{f['ratio']:.1f}", f))
    for name, f in figures["8 against dense"].items():
        rows.append(
            (
                f"{name}, indefinite: times faster than the dense route",
                f"{f['target']:g}",
                f"{f['ratio']:.1f}, residual {f['residual']:.0e}",
                f,
            )
        )
    f = figures["9 a million parameters"]
    rows.append(
        (
            f"{f['parameters']:,} parameters, 2,000 layers: factor and solve",
            "works",
            f"{f['seconds']:.1f} s, residual {f['residual']:.0e}",
            f,
        )
    )
    lines = ["| | asked | measured | reached |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {what} | {asked} | {got} | {mark(f['reached'])} |" for what, asked, got, f in rows)]
    )


def main() -> int:
    print(f"{torch.get_num_threads()} threads; each figure once", flush=True)
    share, classes = None, None
    figures: dict[str, object] = {}
    steps = {
        "1 against the paper's algorithm": against_the_papers_algorithm,
        "2 depth": depth,
        "3 flop rate": lambda: share,
        "4 right-hand sides": right_hand_sides,
        "5 a thousand classes": lambda: classes,
        "6 residual": accuracy,
        "7 against SuperLU on K": against_sparse,
        "8 against dense": against_dense,
        "9 a million parameters": million,
        "dual": dual,
    }
    start = time.perf_counter()
    for name, step in steps.items():
        if name == "3 flop rate":
            share, classes = flop_rate_and_classes()
        figures[name] = step()
        print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(figures[name])}", flush=True)
    record = {
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    write_atomically(output("results") / "bench.json", json.dumps(record | {"figures": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
