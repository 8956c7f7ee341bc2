"""The figures, one function each."""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hinv.curvature import GGN, Curvature, Hessian
from hinv.network import tall_skinny
from hinv.posterior import laplace
from hinv.solver import sparse

from .measure import (
    SIX,
    convolutional,
    deep,
    digits_network,
    eliminated,
    memory_of_depth,
    network,
    peak_bytes,
    residual,
    residual_network,
    seconds,
    seconds_of,
    whole_step,
)


def against_the_papers_algorithm() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, target in (("192-24x7-10 B32", 30.0), ("8-8x79-10 B8", 5.0)):
        H = network(*SIX[name])
        assert isinstance(H, Hessian)
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


def depth(depths: tuple[int, ...] = (16, 64, 256, 1024, 4096), deepest: int = 10_000) -> dict[str, Any]:
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


WIDE = (3072, *[64] * 19)  # layers of the network on which rates are measured, without its classes; a batch of 32


def flop_rate() -> dict[str, Any]:
    batch, H = 32, network((*WIDE, 10), 32)
    H.structure(H.dtype)
    elapsed = seconds(lambda: eliminated(H), 2)
    a, m, d = 64, 32, 64
    n, k, hidden = a * min(batch, d), batch * a, len(WIDE) - 2
    formula = hidden * (n**3 / 3 + 2 * n * n * k + n * k * k) + (a * m) ** 3 / 3
    rate, machine = formula / elapsed, matmul_rate()
    out = {"flops": formula, "seconds": elapsed, "rate": rate, "matmul_rate": machine, "share": rate / machine}
    return out | {"target": 0.5, "reached": rate >= machine / 2}


def thousand_classes() -> dict[str, Any]:
    ten, thousand = (network((*WIDE, classes), 32) for classes in (10, 1000))
    for H in (ten, thousand):
        H.structure(H.dtype)
    time_10 = seconds(lambda: eliminated(ten), 2)
    peak = peak_bytes(lambda: eliminated(thousand))
    time_1000 = seconds(lambda: eliminated(thousand), 2)
    predicted = thousand.estimate().bytes["factor"]
    out: dict[str, Any] = {"seconds_10": time_10, "seconds_1000": time_1000, "ratio": time_1000 / time_10}
    out |= {"peak_bytes": peak, "predicted_bytes": predicted, "target": "under 4 GiB, under 1.5 times"}
    return out | {"reached": (peak or predicted) < 2**32 and time_1000 < 1.5 * time_10}


def right_hand_sides() -> dict[str, Any]:
    out: dict[str, Any] = {}
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


def against_sparse() -> dict[str, Any]:
    out: dict[str, Any] = {}
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


def accuracy() -> dict[str, Any]:
    worst = {}
    for name, (sizes, batch) in SIX.items():
        H = network(sizes, batch)
        worst[name] = max(residual(H, eliminated(H, d), d) for d in (1.0, 0.1, 0.01, 1e-3, 1e-4))
    return {"worst_residual": worst, "target": 1e-10, "reached": max(worst.values()) < 1e-10}


def against_dense() -> dict[str, Any]:
    out: dict[str, Any] = {}
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


def million() -> dict[str, Any]:
    H = network((22, *[22] * 1999, 10), 4, bias=True)
    start = time.perf_counter()
    peak = peak_bytes(lambda: H.solve(H.gradient, 0.1, method="factor"))
    elapsed, report = time.perf_counter() - start, H.last_solve
    assert report is not None
    return {
        **{"parameters": H.shape[0], "layers": 2000, "seconds": elapsed, "peak_bytes": peak},
        **{"residual": report.residual, "reached": H.shape[0] >= 10**6 and report.residual < 1e-8},
    }


def dual() -> dict[str, Any]:
    """The Gauss-Newton matrix by the recursion and by its dual, same matrix."""
    G = network((256, *[24] * 7, 10), 64, GGN)
    G.structure(G.dtype)
    recursion, direct = seconds(lambda: eliminated(G)), seconds(lambda: G.factor(0.1))
    return {"recursion": recursion, "dual": direct, "chosen": G.estimate().method}


def fresh_step() -> dict[str, Any]:
    """All that a step of training pays, in Hessian-vector products by automatic differentiation."""
    out: dict[str, Any] = {}
    for name in ("8-8x79-10 B8", "16-16x999-10 B4"):
        H = network(*SIX[name])
        whole, product = seconds(whole_step(*SIX[name]), 9), seconds(lambda H=H: H @ H.gradient, 20)
        out[name] = {"seconds": whole, "product": product, "in_products": whole / product}
    narrow, deepest = out["8-8x79-10 B8"], out["16-16x999-10 B4"]
    narrow |= {"target": "at most 8", "reached": narrow["in_products"] <= 8}
    deepest |= {"target": "0.42 s", "reached": deepest["seconds"] <= 0.42}  # half of what it took
    return out


def residual_blocks() -> dict[str, Any]:
    """Twenty blocks of hidden width 24 and of 96 = 4 x 24, beside the network without the skips."""
    out: dict[str, Any] = {}
    for hidden in (24, 96):
        H, repeats = residual_network(hidden), 3 if hidden == 24 else 1
        start = time.perf_counter()
        eliminated(H)
        first, again = time.perf_counter() - start, seconds(lambda H=H: eliminated(H), repeats)
        peak, _ = grown(f"b.residual_network({hidden})", "2 * e")
        F = eliminated(H)
        out[f"hidden {hidden}"] = {
            **{"parameters": H.shape[0], "first": first, "again": again, "peak_bytes": peak},
            **{
                "predicted_bytes": H.estimate().bytes["factor"],
                "residual": residual(H, F, 0.1),
                "negative": F.inertia[1],
            },
        }
        plain = network((64, 24, *[hidden, 24] * 20, 10), 32, bias=True)
        plain.structure(plain.dtype)
        out[f"hidden {hidden}"]["times_plain"] = again / seconds(lambda H=plain: eliminated(H), repeats)
    small, wide = out["hidden 24"], out["hidden 96"]
    small |= {"target": "1.3 s, then 0.8 s, 400 MB"}
    small["reached"] = small["first"] <= 1.3 and small["again"] <= 0.8 and small["peak_bytes"] <= 4e8
    wide |= {"target": "at most 3"}
    wide["reached"] = wide["times_plain"] <= 3
    return out


def choices() -> dict[str, Any]:
    """Of ten networks: the method that `estimate` names, and its time over the best's, derivatives included."""
    networks: list[Curvature] = [network(*SIX[name]) for name in list(SIX)[:4]]
    networks += [network((64, *[24] * 3, 10), 256, kind) for kind in (Hessian, GGN)]
    networks += [network((64, *[8] * 3, 10), 64), network((64, *[8] * 39, 10), 8, GGN)]
    networks += [residual_network(24, 4, 16), convolutional()]
    out: dict[str, Any] = {}
    for H in networks:
        prediction = H.estimate()
        cost = {m: prediction.seconds(m) for m in prediction.flops}
        # what is predicted to take twenty times as long as the best is not tried
        times = {m: seconds_of(m, H) for m in cost if cost[m] < 20 * min(cost.values())}
        ratio = times[prediction.method] / min(times.values())
        out[repr(H)] = {"chosen": prediction.method, "times": times, "ratio": ratio}
    worst = max(row["ratio"] for row in out.values())
    return {"networks": out, "worst": worst, "target": 1.3, "reached": worst <= 1.3}


def beside_a_neighbour() -> dict[str, Any]:
    """One process keeps one core busy: how much longer a small factorization and a whole step take, at the caller's number of threads."""
    H, step = network(*SIX["8-8x79-10 B8"]), whole_step(*SIX["8-8x79-10 B8"])
    H.structure(H.dtype)

    def median(function: Callable[[], object]) -> float:
        times = []
        for _ in range(21):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    quiet = median(lambda: eliminated(H)), median(step)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            time.sleep(0.5)
            busy = median(lambda: eliminated(H)), median(step)
        finally:
            neighbour.kill()
    ratios = [b / q for b, q in zip(busy, quiet, strict=True)]
    out = {"factor": quiet[0], "factor_busy": busy[0], "step": quiet[1], "step_busy": busy[1], "ratio": max(ratios)}
    return out | {"target": 1.5, "reached": max(ratios) <= 1.5}


def grown(build: str, free: str) -> tuple[int, int]:
    """Growth of a fresh process's resident peak over a factorization with its derivatives, and the estimate e, where so much is free."""
    code = (
        "import hinv.companion.bench as b, hinv.solver.memory as m; w = b.network((4, 4, 4, 2), 2); w.factor(0.1).solve(w.gradient); "
        f"H = {build}; e = H.estimate().bytes['factor']; m.available = lambda device: {free}; print(b.peak_bytes(lambda: H.factor(0.1)), e)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, predicted = map(int, run.stdout.split())
    return peak, predicted


def memory() -> dict[str, Any]:
    """`grown` over the estimate: where memory is scarce, and where it is not."""
    out: dict[str, Any] = {}
    for name in SIX:
        row: dict[str, float] = {}
        for what, free in (("scarce", "2 * e"), ("plenty", "1e15")):
            row[what], row["predicted"] = grown(f"b.network(*b.SIX[{name!r}])", free)
        out[name] = row
    worst, plenty = (max(row[what] / row["predicted"] for row in out.values()) for what in ("scarce", "plenty"))
    return {"networks": out, "worst": worst, "plenty": plenty, "target": 1.3, "reached": worst <= 1.3}


def inverse() -> dict[str, Any]:
    """Parts of the inverse in factorizations, a sample in solves; and a posterior of 218,122 parameters, 64 samples of ten classes, from nothing."""
    out: dict[str, Any] = {}
    for name in list(SIX)[:4]:
        H, damping = network(*SIX[name]), 10.0  # definite
        factored = eliminated(H, damping)
        once = seconds(lambda H=H, damping=damping: eliminated(H, damping), 3)
        solve = seconds(lambda F=factored, H=H: F.solve(H.gradient), 5)

        def diagonal(F: Any = factored) -> object:
            F.__dict__.pop("_variances", None)
            return F.inverse_diagonal()

        row = {"factorizations": seconds(diagonal, 3) / once}
        row["solves"] = seconds(lambda F=factored: F.sample(1), 5) / solve
        out[name] = row
    dual = network((3072, *[64] * 6, 10), 32, GGN).factor(0.1)
    b = torch.ones(sum(dual.sizes), dtype=torch.float64)
    of_the_dual = seconds(lambda: dual.sample(1), 5) / seconds(lambda: dual.solve(b), 5)
    model, generator = tall_skinny((3072, *[64] * 6, 10)), torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 3072, generator=generator, dtype=torch.float64) for n in (64, 100))
    start = time.perf_counter()
    posterior = laplace(model, torch.nn.CrossEntropyLoss(), x, torch.arange(64) % 10).maximize()
    posterior.log_evidence()
    posterior.predict(new)
    taken = time.perf_counter() - start
    worst, sample = (max(row[what] for row in out.values()) for what in ("factorizations", "solves"))
    out |= {
        "worst": worst,
        "sample": sample,
        "sample_of_the_dual": of_the_dual,
        "parameters": len(posterior.mean),
        "seconds": taken,
    }
    return out | {"target": "at most 4 and 3", "reached": worst <= 4 and max(sample, of_the_dual) <= 3}


def checkpoints(layers: int = 10_000) -> dict[str, Any]:
    """Ten thousand layers of 16, batch 4: growth of a fresh process's memory and seconds, of a factorization and a solve, with V kept at every hundredth
    stage, over those with all stages kept."""
    code = (
        "import time, hinv.companion.bench as b, hinv.solver.memory as m; w = b.network((4, 4, 4, 2), 2); w.factor(0.1).solve(w.gradient); "
        "H = b.deep({layers}); m.Holes(True)(2 * m.HOLES); s = time.perf_counter(); "
        "print(b.peak_bytes(lambda: H.factor(0.1, keep='{keep}').solve(H.gradient)), time.perf_counter() - s)"
    )
    grown, spent = {}, {}
    for keep in ("all", "checkpoints"):
        command = [sys.executable, "-c", code.format(layers=layers, keep=keep)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[keep], spent[keep] = map(float, run.stdout.split())
    share, ratio = (of["checkpoints"] / of["all"] for of in (grown, spent))
    out = {"grown_bytes": grown, "seconds": spent, "memory": share, "times": ratio}
    return out | {"target": "at most a quarter; 2.2", "reached": share <= 0.25 and ratio <= 2.2}


def imports(pairs: int = 5) -> dict[str, Any]:
    """What `import hinv` takes beyond `import torch`: medians over pairs of fresh processes, one after the other."""
    code = (
        "import time; start = time.perf_counter(); import {}; spent = time.perf_counter() - start; "
        "peak = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]; "
        "print(spent, int(peak[0]) / 1024)"
    )

    def cost(modules: str) -> np.ndarray:
        run = subprocess.run([sys.executable, "-c", code.format(modules)], capture_output=True, text=True, check=True)
        return np.array(run.stdout.split(), float)

    more = [cost("torch, hinv") - cost("torch") for _ in range(pairs + 1)][1:]  # the first pair reads the disk
    seconds, megabytes = np.median(more, axis=0).tolist()
    out = {"seconds_more": seconds, "megabytes_more": megabytes, "target": "at most 0.5 s and 60 MB"}
    return out | {"reached": seconds <= 0.5 and megabytes <= 60}
