"""python -m hinv.companion.bench: every figure once, results/bench.json; with --device cuda those of a GPU, results/gpu.json."""

import argparse
import functools
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from hinv.companion.checks import alone, commit, output, write_atomically

from . import device as gpu
from . import figures as f


def measure(steps: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Each in a process of its own: ten thousand layers leave a heap behind in which small arrays lie far apart, and forty narrow ones then take twice as long."""
    figures: dict[str, Any] = {}
    start, fresh = time.perf_counter(), multiprocessing.get_context("spawn")
    for name, step in steps.items():
        with ProcessPoolExecutor(1, fresh) as process:
            figures[name] = process.submit(step).result()
        print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(figures[name])}", flush=True)
    return figures


def write(name: str, record: dict[str, Any], figures: dict[str, Any]) -> None:
    record = {"commit": commit(), "torch": torch.__version__} | record | {"figures": figures}
    write_atomically(output("results") / name, json.dumps(record, indent=1) + "\n")


def on_the_cpu() -> None:
    print(f"{torch.get_num_threads()} threads; each figure once", flush=True)
    steps: dict[str, Callable[[], Any]] = {
        "1 against the paper's algorithm": f.against_the_papers_algorithm,
        "2 depth": f.depth,
        "3 flop rate": f.flop_rate,
        "4 right-hand sides": f.right_hand_sides,
        "5 a thousand classes": f.thousand_classes,
        "6 residual": f.accuracy,
        "7 against SuperLU on K": f.against_sparse,
        "8 against dense": f.against_dense,
        "9 a million parameters": f.million,
        "dual": f.dual,
        "10 import": f.imports,
        "11 a fresh step": f.fresh_step,
        "12 residual blocks": f.residual_blocks,
        "13 choices": f.choices,
        "14 a busy neighbour": f.beside_a_neighbour,
        "15 memory": f.memory,
        "16 the inverse": f.inverse,
        "17 checkpoints": f.checkpoints,
    }
    machine = {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()}
    write("bench.json", machine, measure(steps))


def on_a_gpu(device: torch.device) -> None:
    properties = torch.cuda.get_device_properties(device)
    machine = {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    print(machine, flush=True)
    steps = {name: functools.partial(step, device) for name, step in gpu.STEPS.items()}
    write("gpu.json", machine, measure(steps))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hinv.companion.bench", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    device = parser.parse_args().device
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        parser.error(f"there is no {device} here")
    with alone(output("results") / "bench.lock", "measuring"):  # two at once would measure each other
        if device.type == "cpu":
            on_the_cpu()
        else:
            on_a_gpu(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
