"""The figures of a GPU: `python -m hinv.companion.bench --device cuda` writes results/gpu.json. Times are of the device's own clock, all work done."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hinv.companion.data import load
from hinv.curvature import GGN, Hessian
from hinv.network import jets, tall_skinny
from hinv.optim import GaussNewton
from hinv.solver.estimate import eliminate

from .measure import SIX, digits_network, eliminated, network, residual


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device is done, and what the function gave."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    out = function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, out


def smallest(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    function()
    return min(timed(function, device)[0] for _ in range(repeats))


def rate(device: torch.device, n: int = 8192) -> float:
    """flops per second of the device's own float64 matrix product."""
    A = torch.randn(n, n, dtype=torch.float64, device=device)
    out = torch.empty_like(A)
    return 2.0 * n**3 / smallest(lambda: torch.mm(A, A, out=out), device)


def six(device: torch.device) -> dict[str, Any]:
    out = {}
    for name, (sizes, batch) in SIX.items():
        H = network(sizes, batch, device=device)
        eliminated(H)
        taken, F = timed(lambda H=H: eliminated(H), device)
        host = eliminated(network(sizes, batch))
        out[name] = {"factor": taken, "residual": residual(H, F, 0.1), "inertia": F.inertia}
        out[name] |= {"as_on_the_host": F.inertia == host.inertia, "logdet_minus_host": F.logdet[1] - host.logdet[1]}
    return out


def classes(device: torch.device) -> dict[str, Any]:
    """Ten and a thousand classes behind nineteen layers of 64, batch 32."""
    out: dict[str, Any] = {}
    for c in (10, 1000):
        H = network((3072, *[64] * 19, c), 32, device=device)
        eliminated(H)
        out[f"seconds_{c}"] = smallest(lambda H=H: eliminated(H), device, 1)
    return out | {"ratio": out["seconds_1000"] / out["seconds_10"]}


def dense(device: torch.device) -> dict[str, Any]:
    """Derivatives, factorization and solve against the dense matrix, its LU and solve."""
    out = {}
    for name, sizes, batch in (("N1", (64, *[24] * 7, 10), 64), ("N2", (64, *[8] * 39, 10), 8)):
        H = digits_network(sizes, batch, device=device)

        def ours(H: Hessian = H) -> object:
            H._structures.clear()
            return H.factor(0.01).solve(H.gradient)

        def theirs(H: Hessian = H) -> object:
            matrix = H.dense()
            matrix.diagonal().add_(0.01)
            return torch.linalg.solve(matrix, H.gradient)

        row = {"derivatives_factor_solve": smallest(ours, device), "dense": smallest(theirs, device, 1)}
        row |= {"residual": residual(H, H.factor(0.01), 0.01), "negative": H.factor(0.01).inertia[1]}
        out[name] = row | {"ratio": row["dense"] / row["derivatives_factor_solve"]}
    return out


def dual(device: torch.device) -> dict[str, Any]:
    """The Gauss-Newton matrix of a network on inputs of 3072 numbers by its dual."""
    G = network((3072, *[64] * 6, 10), 32, GGN, device=device)
    return {"parameters": G.shape[0], "seconds": smallest(lambda: G.factor(0.1).solve(G.gradient), device)}


def flagship(device: torch.device, images: int = 1000, layers: int = 200, width: int = 24) -> dict[str, Any]:
    """Exact solve, inertia and log-determinant of the full-batch Hessian of a thousand CIFAR-10 images (8 x 8, grey) on 200 layers of 24."""
    data = load("cifar10", n=images, side=8, gray=True, normalize=True, dtype=torch.float64, download=False)
    model = tall_skinny((64, *[width] * layers, 10)).to(device)
    taken, H = timed(
        lambda: Hessian(model, nn.CrossEntropyLoss(), data.x.flatten(1).to(device), data.y.to(device)), device
    )
    n, k = width * (width + 1), width * images
    flops = (layers - 1) * eliminate(n, k)
    prediction = H.estimate()
    out: dict[str, Any] = {"data": data.name, "parameters": H.shape[0], "layers": layers, "images": images}
    out |= {"construction": taken, "flops": flops, "flops_estimated": prediction.flops["factor"]}
    out["derivatives"] = timed(lambda: H.structure(H.dtype), device)[0]
    for damping in (1.0, 0.1):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        first, F = timed(lambda damping=damping: H.factor(damping), device)
        peak = torch.cuda.max_memory_allocated(device) - before
        row: dict[str, Any] = {"first_factor": first, "peak_bytes": peak, "predicted_bytes": prediction.bytes["factor"]}
        del F
        row["factor"], F = timed(lambda damping=damping: H.factor(damping), device)
        row["solve"] = timed(lambda F=F: F.solve(H.gradient), device)[0]
        row["product"] = timed(lambda: H @ H.gradient, device)[0]
        row["residual_unrefined"], row["residual"] = (residual(H, F, damping, r) for r in (0, 2))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            row["inertia"], row["logdet"], row["uncertainty"] = F.inertia, F.logdet, F.uncertainty
        row["warnings"] = [str(w.message) for w in said]
        row["kinds"] = kinds(F)
        row["flops_per_second"] = flops / row["factor"]
        out[f"damping {damping:g}"] = row
        del F
        row["float32"] = in_float32(H, damping, device)
    return out


def in_float32(H: Hessian, damping: float, device: torch.device, refinements: int = 6) -> dict[str, Any]:
    """Factored in float32 and refined by float64 products: seconds, bytes, and the relative residual after each refinement."""
    H.structure(torch.float32)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    taken, F = timed(lambda: H.factor(damping, torch.float32), device)
    row: dict[str, Any] = {"factor": taken, "peak_bytes": torch.cuda.max_memory_allocated(device) - before}
    b, x, residuals = H.gradient, torch.zeros_like(H.gradient), []
    for _ in range(refinements + 1):
        x = x + F.solve((b - H @ x - damping * x).float()).double()
        residuals.append(((b - H @ x - damping * x).norm() / b.norm()).item())
    H._structures.pop(torch.float32)
    return row | {"residuals": residuals}


def equation(device: torch.device, inside: int = 3000, edge: int = 600, steps: int = 40) -> dict[str, Any]:
    """Poisson's equation as notebook 12 has it, on 2-64-64-48-48-1 with more points than a CPU would take: exact Gauss-Newton steps by the dual, with a momentum of 0.3."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(inside + edge, 2, generator=generator, dtype=torch.float64)
    number = torch.arange(edge)
    points[inside + number, number % 2] = (number // 2 % 2).double()
    points = points.to(device)
    u = tall_skinny((2, 64, 64, 48, 48, 1)).to(device)
    truth = torch.sin(torch.pi * points).prod(1)
    weights = torch.zeros(len(points), 2, dtype=torch.float64, device=device)
    weights[:inside, 0], weights[inside:, 1] = 1 / inside, 10 / edge
    goals = torch.stack([torch.stack([2 * torch.pi**2 * truth, truth], 1), weights], 2)

    def squares(outputs: Tensor, targets: Tensor) -> Tensor:
        jet, (goal, weight) = outputs[..., 0], targets.unbind(2)
        return 0.5 * (weight * (torch.stack([-jet[:, 3], jet[:, 0]], 1) - goal).square()).sum()

    descent = GaussNewton(jets.network(u), squares, damping=1e-8, adapt=1, search=True, momentum=0.3)
    lifted, errors, seconds = jets.lift(points), [], 0.0
    for _ in range(steps):
        taken, _ = timed(lambda: descent.step(lifted, goals), device)
        seconds += taken
        errors.append(((u(points)[:, 0] - truth).norm() / truth.norm()).item())
    below = next((k + 1 for k, e in enumerate(errors) if e <= 1e-6), None)
    return {
        "parameters": sum(p.numel() for p in u.parameters()),
        "points": len(points),
        "seconds": seconds,
        "steps": steps,
        "error": errors[-1],
        "steps_to_1e-6": below,
    }


def kinds(F: Any) -> dict[str, int]:
    """How many pivot blocks were factored in which way."""
    names = [type(p.S if hasattr(p, "S") else p.T).__name__ for p in F.pivots if hasattr(p, "S") or hasattr(p, "T")]
    return {name: names.count(name) for name in sorted(set(names))}


STEPS: dict[str, Callable[[torch.device], Any]] = {
    "matrix product": rate,
    "six networks": six,
    "a thousand classes": classes,
    "against dense": dense,
    "dual": dual,
    "a differential equation": equation,
    "flagship": flagship,
}
