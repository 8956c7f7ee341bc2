"""python -m hinv.companion.bench: every figure once, results/bench.json."""

import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from hinv.companion.checks import commit, output, write_atomically

from . import figures as f


def main() -> int:
    print(f"{torch.get_num_threads()} threads; each figure once", flush=True)
    share, classes = None, None
    figures: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {
        "1 against the paper's algorithm": f.against_the_papers_algorithm,
        "2 depth": f.depth,
        "3 flop rate": lambda: share,
        "4 right-hand sides": f.right_hand_sides,
        "5 a thousand classes": lambda: classes,
        "6 residual": f.accuracy,
        "7 against SuperLU on K": f.against_sparse,
        "8 against dense": f.against_dense,
        "9 a million parameters": f.million,
        "dual": f.dual,
        "10 import": f.imports,
    }
    start = time.perf_counter()
    for name, step in steps.items():
        if name == "3 flop rate":
            share, classes = f.flop_rate_and_classes()
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
