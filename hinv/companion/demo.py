"""What `make demo` runs: five lines of hinv, three numbers, one picture."""

import inspect
import textwrap

import torch
from torch import Tensor

import hinv
from hinv.companion import figures
from hinv.shapes import Float, Int

EDGES = (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0)


def lines(
    x: Float[Tensor, "B a"], y: Int[Tensor, " B"]
) -> tuple[hinv.Hessian, Float[Tensor, " P"], tuple[int, int, int], Int[Tensor, " bins"]]:
    model = hinv.tall_skinny([20, *[8] * 20, 10])  # or any nn.Sequential of yours
    H = hinv.Hessian(model, torch.nn.CrossEntropyLoss(), x, y)
    step = H.solve(H.gradient, damping=0.1)  # (H + 0.1 I)^-1 g
    inertia = H.factor(damping=0.1).inertia  # positive, negative, zero eigenvalues of H + 0.1 I
    counts = H.counts(EDGES)  # eigenvalues of H between these edges, exact
    return H, step, inertia, counts


def main() -> None:
    x, y = torch.randn(16, 20, generator=torch.manual_seed(0)).double(), torch.arange(16) % 10
    source = inspect.getsource(lines)
    print(textwrap.dedent(source[source.index("    model") : source.index("    return")]))
    H, step, inertia, counts = lines(x, y)
    residual = ((H @ step + 0.1 * step - H.gradient).norm() / H.gradient.norm()).item()
    print(f"residual of the step, by a product that shares no code with the solver: {residual:.0e}")
    print(f"negative eigenvalues of H + 0.1 I, of {H.shape[0]:,}: {inertia[1]:,}")
    print(f"eigenvalues of H between {EDGES[0]:g} and {EDGES[-1]:g}: {int(counts.sum()):,}")
    title = f"20 layers of 8, {H.shape[0]:,} parameters, 16 samples"
    below = H.count_below(EDGES[0])
    outside = [below, *counts.tolist(), H.shape[0] - below - int(counts.sum())]
    figures.save(figures.counted(EDGES, outside, None, title), "demo")
    print("figures/demo.png: the spectrum")


if __name__ == "__main__":
    main()
