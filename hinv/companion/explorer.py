"""Pick a network, see its curvature: what notebook 13 shows. `explore` works without widgets; `controls` puts sliders in front of it.

The networks classify scikit-learn's digits, shrunk to 4 x 4 pixels so that a change is seen at once.
"""

import base64
import html
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import ipywidgets
import torch
from torch import Tensor, nn

from hinv import paper
from hinv.companion import data, figures
from hinv.companion.bench import peak_bytes
from hinv.curvature import Hessian
from hinv.errors import SingularShiftError
from hinv.html import table
from hinv.network import Residual, tall_skinny
from hinv.shapes import Float
from hinv.solver.factor import Factor
from hinv.solver.memory import HOLES, Holes

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "GELU": nn.GELU, "ReLU": nn.ReLU}
DAMPINGS = (-1.0, -0.1, -0.01, 0.0, 0.001, 0.01, 0.1, 1.0, 10.0)
EDGES = (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0)  # between which eigenvalues are counted
DENSE = 1000  # parameters up to which a dense eigensolver is asked for every eigenvalue as well


@lru_cache(maxsize=1)
def _digits() -> data.Images:
    return data.load("digits", n=64, normalize=True, dtype=torch.float64)


@lru_cache(maxsize=4)
def network(
    depth: int = 8, width: int = 6, activation: str = "tanh", residual: bool = False, batch: int = 16, seed: int = 0
) -> Hessian:
    """The Hessian of a network of `depth` linear layers on digits of 4 x 4 pixels, under cross-entropy, at its first weights.

    Args:
        depth: from 2; width: units of each layer but the last, which has ten.
        activation: of `ACTIVATIONS`.
        residual: whether each layer between the first and the last is z + activation(W z + b).
        batch: up to 64 digits.
        seed: of the weights.

    Raises:
        ValueError: an unknown activation, a depth below 2, more digits than there are.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use {', '.join(map(repr, ACTIVATIONS))}")
    if depth < 2 or not 1 <= batch <= 64:
        raise ValueError(f"depth {depth} must be at least 2, and batch {batch} from 1 to 64")
    model = tall_skinny([16, *[width] * (depth - 1), 10], ACTIVATIONS[activation], seed=seed)
    if residual:
        first, *inner, last = model[::2]
        between = [Residual(nn.Sequential(linear, ACTIVATIONS[activation]())) for linear in inner]
        model = nn.Sequential(first, ACTIVATIONS[activation](), *between, last)
    images = _digits()
    pixels = nn.functional.avg_pool2d(images.x[:batch], 2).flatten(1)
    # tests/test_explorer.py checks one network of each kind; at every move of a slider it would be lost time
    return Hessian(model, nn.CrossEntropyLoss(), pixels, images.y[:batch], check=False)


@dataclass(repr=False)
class Exploration:
    """What a factorization of H + damping I tells of one network."""

    H: Hessian
    damping: float
    title: str
    step: Float[Tensor, " P"]  # (H + damping I)^-1 g
    residual: float  # of the step, relative, by a product that shares no code with the solver
    inertia: tuple[int, int, int]
    logdet: tuple[float, float]
    pivots: list[tuple[int, int]]  # of each layer, positive and negative
    counts: list[int]  # eigenvalues below the first of EDGES, between each two, and above the last
    seconds: float  # of derivatives and factorization
    peak: int | None  # by how much they made the resident peak grow, where the system tells

    @cached_property
    def eigenvalues(self) -> Float[Tensor, " P"] | None:
        """All of H's, by a dense eigensolver; None beyond `DENSE` parameters."""
        return torch.linalg.eigvalsh(self.H.dense()) if self.H.shape[0] <= DENSE else None

    def rows(self) -> dict[str, object]:
        """The numbers, as the page shows them."""
        (positive, negative, _), (sign, log), prediction = self.inertia, self.logdet, self.H.estimate()
        grown = "not told by this system" if self.peak is None else f"{self.peak / 2**20:.1f} MiB"
        return {
            "parameters": f"{self.H.shape[0]:,}",
            "inertia of H + εI": f"{positive:,} positive, {negative:,} negative",
            "sign and log |det(H + εI)|": f"{sign:+.0f}, {log:.4f}",
            "norm of the gradient g": f"{self.H.gradient.norm():.4g}",
            "norm of (H + εI)⁻¹g": f"{self.step.norm():.4g}",
            "its relative residual": f"{self.residual:.0e}",
            "time": f"{prediction.seconds('factor'):.2g} s predicted, {self.seconds:.2g} s measured",
            "memory": f"{prediction.bytes['factor'] / 2**20:.1f} MiB predicted, {grown} measured",
        }

    def figure(self) -> Any:
        """The spectrum, K, and the pivots' signs."""
        pattern = paper.matrices(self.H, self.damping).K_pivoted
        return figures.explored(EDGES, self.counts, self.eigenvalues, pattern, self.pivots, self.title)

    def __repr__(self) -> str:
        return f"Exploration({self.title}: {self.H.shape[0]} parameters, inertia {self.inertia})"

    def _repr_html_(self) -> str:
        return table(self.title, self.rows())


def explore(
    depth: int = 8,
    width: int = 6,
    activation: str = "tanh",
    residual: bool = False,
    batch: int = 16,
    damping: float = 0.1,
    seed: int = 0,
) -> Exploration:
    """Factor H + damping I of one network (arguments of `network`) and keep what that tells.

    Raises:
        SingularShiftError: no factorization at this damping. ValueError: see `network`.
    """
    H = network(depth, width, activation, residual, batch, seed)
    factored = H.factor(damping)
    assert isinstance(factored, Factor)  # a Hessian has no dual
    step = H.solve(H.gradient, damping, method="factor")
    assert H.last_solve is not None
    stages = list(reversed(factored.pivots))  # they were eliminated from the loss backwards
    pivots = [(factored.sizes[n] - stages[n].negative, stages[n].negative) for n in factored.owners]
    below = [0, *(H.count_below(edge) for edge in EDGES), H.shape[0]]
    counts = [high - low for low, high in itertools.pairwise(below)]
    kind = f"{activation}, residual" if residual else activation
    title = f"{depth} layers of {width}, {kind}, {batch} digits, ε = {damping:g}"
    return Exploration(
        H,
        damping,
        title,
        step,
        H.last_solve.residual,
        factored.inertia,
        factored.logdet,
        pivots,
        counts,
        *_measured(H, damping),
    )


def _measured(H: Hessian, damping: float) -> tuple[float, int | None]:
    """Seconds, and growth of the resident peak, of derivatives and factorization, each on a fresh matrix."""
    fresh = [Hessian(H.chain.model, H.chain.loss, H.chain.inputs, H.chain.targets, check=False) for _ in range(2)]
    start = time.perf_counter()
    fresh[0].factor(damping)
    seconds = time.perf_counter() - start
    Holes(scarce=True)(2 * HOLES)  # what earlier calls freed goes back, or it would be taken again unseen
    return seconds, peak_bytes(lambda: fresh[1].factor(damping))


def page(**settings: Any) -> str:
    """What `explore` tells as HTML: the numbers and the picture, or in a sentence why there are none."""
    start = time.perf_counter()
    try:
        found = explore(**settings)
    except SingularShiftError as error:
        return f"<p role='alert'><b>Not at this damping.</b> {html.escape(str(error))}</p>"
    picture = base64.b64encode(figures.png(found.figure())).decode()
    inertia = "{} positive and {} negative".format(*found.inertia)
    numbers = found._repr_html_()
    alt = f"Spectrum, block picture of K, and pivots of {found.title}: {inertia}"
    took = f"<p>Drawn in {time.perf_counter() - start:.2f} s.</p>"
    return (
        "<style>.explorer{display:flex;flex-wrap:wrap;gap:1em;line-height:1.5}.explorer th,.explorer td{text-align:left;padding:0 1em 0 0}"
        ".explorer caption{text-align:left;font-weight:bold}.explorer img{max-width:100%;align-self:flex-start}</style>"
        f"<div class='explorer'><div>{numbers}{took}</div><img alt='{alt}' src='data:image/png;base64,{picture}'></div>"
    )


def controls(seed: int = 0) -> ipywidgets.VBox:
    """Sliders over `page`; a change is drawn when the slider is let go."""
    late: dict[str, Any] = {"continuous_update": False, "style": {"description_width": "6em"}}
    inputs: dict[str, Any] = {
        "depth": ipywidgets.IntSlider(8, 2, 16, description="depth", **late),
        "width": ipywidgets.IntSlider(6, 2, 10, description="width", **late),
        "batch": ipywidgets.SelectionSlider(options=(4, 8, 16, 32), value=16, description="batch", **late),
        "damping": ipywidgets.SelectionSlider(
            options=[(f"{value:g}", value) for value in DAMPINGS], value=0.1, description="damping ε", **late
        ),
        "activation": ipywidgets.Dropdown(options=list(ACTIVATIONS), description="activation", style=late["style"]),
        "residual": ipywidgets.Checkbox(False, description="residual"),
    }
    shown = ipywidgets.HTML(layout={"width": "100%"})

    def draw(change: Any = None) -> None:
        shown.value = page(seed=seed, **{name: control.value for name, control in inputs.items()})

    for control in inputs.values():
        control.observe(draw, "value")
    draw()
    box = ipywidgets.HBox(list(inputs.values()), layout={"flex_flow": "row wrap"})
    return ipywidgets.VBox([box, shown])
