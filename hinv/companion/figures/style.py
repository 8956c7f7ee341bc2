"""What every figure shares: one style, one colour a thing."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from hinv.companion.checks import output

PALETTE = sns.color_palette("colorblind")
GREY = (0.35, 0.35, 0.35)
MARKERS = "osD^vPX*<>"
# one colour a thing, in every figure: of the first name below that a label begins with. Everything else takes what is left, in order
COLOURS = {
    "factor": PALETTE[0],
    "hinv": PALETTE[0],
    "GaussNewton": PALETTE[0],
    "tridiagonal": PALETTE[1],
    "published": PALETTE[1],
    "Adam": PALETTE[1],
    "dense": GREY,
    "GradientDescent": GREY,
    "sparse": PALETTE[5],
    "woodbury": PALETTE[4],
    "hessian-eigenthings": PALETTE[4],
    "DampedNewton": PALETTE[4],
    "cg": PALETTE[9],
    "minres": PALETTE[2],
    "curvlinops": PALETTE[2],
    "TrustRegionNewton": PALETTE[2],
    "gmres": PALETTE[6],
    "SaddleFreeNewton": PALETTE[6],
    "SGD": PALETTE[3],
    "L-BFGS": PALETTE[5],
    "HessianFree": PALETTE[9],
    "KFAC": PALETTE[4],
    "SOAP": PALETTE[7],
    "Muon": PALETTE[8],
    # unknowns, and the blocks that multiply them
    "parameters": PALETTE[0],
    "activations": PALETTE[1],
    "backward signals": PALETTE[2],
    "$J_": PALETTE[0],
    "$-A_": PALETTE[1],
    "$I$": (0.6, 0.6, 0.6),
    "$s_x$": PALETTE[0],
    "$s_y$": PALETTE[1],
    "$t_x$": PALETTE[9],
    "$t_y$": PALETTE[6],
}
Numbers = Sequence[float] | np.ndarray | Tensor

sns.set_theme(
    context="notebook",
    style="ticks",
    palette=PALETTE,
    rc={"figure.dpi": 90, "savefig.bbox": "tight", "axes.grid": False},
)


def styles(labels: Sequence[str]) -> list[tuple[Any, str]]:
    """A colour and a marker for each label: the thing's own, or what no other of these labels has taken."""
    own = [next((colour for name, colour in COLOURS.items() if label.startswith(name)), None) for label in labels]
    free = iter([*(colour for colour in PALETTE if colour not in own), *PALETTE])
    colours = [next(free) if colour is None else colour for colour in own]
    shades = list(dict.fromkeys([*COLOURS.values(), *PALETTE]))
    # settings of one method have its colour, and markers of their own
    again = [colours[:k].count(colour) for k, colour in enumerate(colours)]
    markers = [MARKERS[(shades.index(c) + 3 * n) % len(MARKERS)] for c, n in zip(colours, again, strict=True)]
    return list(zip(colours, markers, strict=True))


def save(figure: Figure, name: str) -> Figure:
    """Write figures/<name>.png and .pdf (without a date, so that the same figure is the same file) and return the figure."""
    folder = output("figures")
    figure.savefig(folder / f"{name}.png", dpi=160)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    plt.close(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The picture as bytes, drawn once (without the search for a tight frame that `save` makes), and the figure closed."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    plt.close(figure)
    return buffer.getvalue()
