"""What the figures are measured on and with: networks, seconds, peak bytes, residuals."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hinv.companion.data import load
from hinv.curvature import GGN, Curvature, Hessian
from hinv.network import Residual, tall_skinny
from hinv.optim import GaussNewton
from hinv.shapes import Float, Int
from hinv.solver.dual import Dual
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


def network(
    sizes: tuple[int, ...],
    batch: int,
    kind: type[Curvature] = Hessian,
    gain: float = 1.0,
    bias: bool = False,
    device: torch.device | str = "cpu",
) -> Curvature:
    """A tanh network with orthogonal weights under cross-entropy, on seeded normal inputs."""
    x = torch.randn(batch, sizes[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, y = tall_skinny(sizes, bias=bias, gain=gain), torch.arange(batch) % sizes[-1]
    return kind(model.to(device), nn.CrossEntropyLoss(), x.to(device), y.to(device))


def digits_network(sizes: tuple[int, ...], batch: int, device: torch.device | str = "cpu") -> Hessian:
    images = load("digits", n=batch, normalize=True, dtype=torch.float64)
    model = tall_skinny(sizes, bias=False, gain=0.9).to(device)
    return Hessian(model, nn.CrossEntropyLoss(), images.x.flatten(1).to(device), images.y.to(device))


def residual_network(hidden: int, blocks: int = 20, batch: int = 32, width: int = 24) -> Hessian:
    """64-24x(blocks)-10 with z + W2 tanh(W1 z) of a hidden width, on seeded normal inputs."""
    torch.manual_seed(0)

    def block() -> nn.Module:
        return Residual(nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)))

    model = nn.Sequential(nn.Linear(64, width), *[block() for _ in range(blocks)], nn.Linear(width, 10)).double()
    for parameter in model.parameters():  # so that twenty blocks do not blow the signal up
        parameter.data *= 0.5
    return Hessian(model, nn.CrossEntropyLoss(), torch.randn(batch, 64).double(), torch.arange(batch) % 10, check=False)


def convolutional(batch: int = 32) -> Hessian:
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 3, stride=2),
    ]
    model = nn.Sequential(*[m for c in convolutions for m in (c, nn.Tanh())], nn.Flatten(), nn.Linear(32, 10)).double()
    x = torch.randn(batch, 1, 12, 12).double()
    return Hessian(model, nn.CrossEntropyLoss(), x, torch.arange(batch) % 10, check=False)


def whole_step(sizes: tuple[int, ...], batch: int) -> Callable[[], Tensor]:
    """What a step of training pays: a Hessian (unchecked), its derivatives, a factorization and a refined solve."""
    H, model, loss = network(sizes, batch), tall_skinny(sizes, bias=False), nn.CrossEntropyLoss()

    def step() -> Tensor:
        fresh = Hessian(model, loss, H.chain.inputs, H.chain.targets, check=False)
        return fresh.solve(fresh.gradient, 0.1, method="factor")

    return step


def seconds_of(method: str, H: Curvature) -> float:
    """Of a solve by "factor", "dual" or "dense", derivatives included."""
    b = H.gradient

    def factor() -> Tensor:
        H._structures.clear()
        return eliminated(H).solve(b)

    def dense() -> Tensor:
        return torch.linalg.solve(H.dense() + 0.1 * torch.eye(len(b), dtype=b.dtype), b)

    def dual() -> Tensor:
        return Dual(H.chain, 0.1).solve(b)

    return seconds({"factor": factor, "dense": dense, "dual": dual}[method], 3)


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
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")
        before = status("VmRSS")
        function()
        return status("VmHWM") - before
    except OSError:
        function()
        return None


def residual(H: Curvature, F: Factor | Dual, damping: float, refinements: int = 2) -> float:
    b = H.gradient
    x = F.solve(b)
    for _ in range(refinements):
        x = x + F.solve(b - H @ x - damping * x)
    return ((H @ x + damping * x - b).norm() / b.norm()).item()


def eliminated(H: Curvature, damping: float = 0.1) -> Factor:
    """A factorization by the stagewise elimination; its derivatives are computed once, so that timing it again times the elimination only."""
    return Factor(H.structure(H.dtype), damping, H.__matmul__)


def deep(layers: int) -> Curvature:
    return network((16, *[16] * (layers - 1), 10), 4)


def memory_of_depth(layers: int) -> int:
    """Peak growth of derivatives and factorization in a process of its own, whose allocator returns every freed block."""
    code = f"import hinv.companion.bench as b; H = b.deep({layers}); print(b.peak_bytes(lambda: H.factor(0.1)))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"}
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True).stdout)


def step_of_gauss_newton(classes: int) -> dict[str, Any]:
    """One Gauss-Newton step of the 20-layer network on 32 images of 16 x 16: predicted and measured peak bytes, seconds of the next step."""

    def descent(
        sizes: tuple[int, ...], columns: int
    ) -> tuple[GaussNewton, tuple[Float[Tensor, "B a"], Int[Tensor, " B"]]]:
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


def memory_of_a_step(classes: int) -> dict[str, Any]:
    """`step_of_gauss_newton` in a process of its own, whose allocator returns every freed block."""
    code = f"import json, hinv.companion.bench as b; print(json.dumps(b.step_of_gauss_newton({classes})))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    return json.loads(run.stdout)
