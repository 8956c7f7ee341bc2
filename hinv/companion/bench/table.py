"""The figures as docs/benchmarks.md shows them."""

from typing import Any


def table(figures: dict[str, Any]) -> str:
    """The figures as docs/benchmarks.md shows them: the aim, what was measured, whether it was reached."""

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
        (
            "10,000 layers of 16",
            "1.3 s",
            f"{f['deepest_seconds']:.1f} s, residual {f['deepest_residual']:.0e}",
            {"reached": f["deepest_seconds"] <= 1.3},
        )
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
    f = figures["10 import"]
    rows.append(
        (
            "`import hinv` beyond `import torch`",
            "at most 0.5 s, 60 MB",
            f"{f['seconds_more']:.2f} s, {f['megabytes_more']:.0f} MB",
            f,
        )
    )
    for name, f in figures["11 a fresh step"].items():
        what = f"{name}: a Hessian from nothing, derivatives, factorization and solve, in Hessian-vector products"
        got = f"{f['in_products']:.1f} ({f['seconds'] * 1e3:.0f} ms)"
        aim, reached = ("at most 8", f["in_products"] <= 8) if "79" in name else ("0.42 s", f["seconds"] <= 0.42)
        rows.append((what, aim, got, {"reached": reached}))
    f = figures["12 residual blocks"]
    small, wide = f["hidden 24"], f["hidden 96"]
    what = "20 residual blocks of 24, batch 32: first factorization, further ones, memory"
    rows.append(
        (
            what,
            small["target"],
            f"{small['first']:.1f} s, {small['again']:.1f} s, {small['peak_bytes'] / 1e6:.0f} MB",
            small,
        )
    )
    what = "the same with hidden width 96, 96,370 parameters: times the network without skips (hidden width 24)"
    rows.append(
        (what, "at most 3", f"{wide['times_plain']:.1f} ({small['times_plain']:.1f}); {wide['again']:.1f} s", wide)
    )
    f = figures["13 choices"]
    what = f"the chosen of factorization, dual and dense on {len(f['networks'])} networks: worst, over the best"
    rows.append((what, "at most 1.3", f"{f['worst']:.2f}", f))
    f = figures["14 a busy neighbour"]
    rows.append(
        ("8-8x79-10 B8 while another process keeps a core busy: times longer", "at most 1.5", f"{f['ratio']:.2f}", f)
    )
    f = figures["15 memory"]
    what = "growth of a fresh process over the estimate, worst of six networks, where memory is scarce; where it is not"
    rows.append((what, "at most 1.3; -", f"{f['worst']:.2f}; {f['plenty']:.2f}", f))
    f = figures["16 the inverse"]
    what = "the inverse's diagonal, worst of four networks, in factorizations; a sample, in solves, and by the dual"
    rows.append((what, "at most 4; 3", f"{f['worst']:.1f}; {f['sample']:.1f}, {f['sample_of_the_dual']:.1f}", f))
    what = f"Laplace's approximation of {f['parameters']:,} parameters: evidence maximized, 100 predictive covariances"
    rows.append((what, "seconds", f"{f['seconds']:.1f} s", f | {"reached": f["seconds"] <= 10}))
    f = figures["17 checkpoints"]
    what = "10,000 layers of 16 with keep='checkpoints': growth of a fresh process, and time of a factorization and solve, over keep='all'"
    rows.append((what, "at most 0.25; 2.2", f"{f['memory']:.3f}; {f['times']:.1f}", f))
    lines = ["| | aim | measured | reached |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {aim} | {got} | {mark(f['reached'])} |" for what, aim, got, f in rows)])


def on_a_gpu(record: dict[str, Any]) -> str:
    """results/gpu.json as docs/benchmarks.md tells it: what it is for, and what loses there."""
    figures = record["figures"]
    flag, rate, (thousand, ten) = (
        figures["flagship"],
        figures["matrix product"],
        (figures["a thousand classes"][f"seconds_{c}"] for c in (1000, 10)),
    )
    at = {damping: flag[f"damping {damping}"] for damping in ("1", "0.1")}
    slowest = max(row["factor"] for row in at.values())
    share = min(row["flops_per_second"] for row in at.values()) / rate
    residual = max(row["residual"] for row in at.values())
    negative = " and ".join(f"{row['inertia'][1]:,} (damping {damping})" for damping, row in at.items())
    small = ", ".join(
        f"{name} {1e3 * row['derivatives_factor_solve']:.0f} ms (dense {1e3 * row['dense']:.0f})"
        for name, row in figures["against dense"].items()
    )
    single, u = [row["float32"] for row in at.values()], figures["a differential equation"]
    refined = max(next(k for k, r in enumerate(row["residuals"]) if r <= 1e-12) for row in single)
    return (
        f"On one {record['device']} (`make cuda`, `results/gpu.json`): the full-batch Hessian of {flag['images']:,} CIFAR-10 images (8 x 8, grey) on "
        f"{flag['layers']} layers, {flag['parameters']:,} parameters, is factored in {slowest:.1f} s with {at['1']['peak_bytes'] / 1e9:.0f} GB: "
        f"residual {residual:.0e} refined, {negative} negative eigenvalues, log-determinant. The aim was half of the device's own rate of matrix products "
        f"({rate / 1e12:.0f} Tflop/s); it is {share:.2f}, as for every layer the factorization also passes several times over a matrix of {(24 * flag['images']) ** 2 * 8 / 1e9:.1f} GB. "
        f"The network of 19 layers of 64 takes {ten:.2f} s with ten classes, {thousand:.2f} with a thousand. Small networks gain little "
        f"there, as a stage is a few dozen launches: derivatives, factorization and solve take {small}. In float32 the large one takes "
        f"{max(row['factor'] for row in single):.1f} s and {single[0]['peak_bytes'] / 1e9:.0f} GB; {refined} refinements with float64 products bring the residual "
        f"below 1e-12. {u['steps']} exact Gauss-Newton steps on a differential equation (notebook 12), {u['points']:,} points and {u['parameters']:,} parameters, "
        f"take {u['seconds']:.1f} s and end at an error of {u['error']:.0e}."
    )
