"""Matrices as pictures: entries, blocks, the lifted system under its network, the elimination."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from hinv.paper import BlockMatrix
from hinv.shapes import Float

from .style import PALETTE, Numbers, styles


def heatmaps(
    matrices: Mapping[str, Float[Tensor, "_ _"]], boundaries: Numbers = (), unit: str = "", mark: int | None = None
) -> Figure:
    """Matrices side by side on one symmetric logarithmic colour scale.

    Thin lines at the block boundaries (entry numbers); the row and column `mark` are pointed out.
    """
    arrays = {title: np.asarray(m) for title, m in matrices.items()}
    top = max(np.abs(a).max() for a in arrays.values()) or 1.0
    norm = SymLogNorm(linthresh=1e-3 * top, vmin=-top, vmax=top)
    figure, axes = plt.subplots(
        1, len(arrays), figsize=(4.2 * len(arrays) + 0.8, 4.0), layout="constrained", squeeze=False
    )
    for axis, (title, array) in zip(axes[0], arrays.items(), strict=True):
        image = axis.imshow(array, cmap="RdBu_r", norm=norm, interpolation="nearest", aspect="auto")
        for edge in boundaries:
            axis.axhline(edge - 0.5, color="0.1", lw=0.7)
            axis.axvline(edge - 0.5, color="0.1", lw=0.7)
        if mark is not None:
            for line in (axis.axhline, axis.axvline):
                line(mark, color=PALETTE[2], lw=2.5, alpha=0.7)
        axis.set(title=title, xlabel="column", ylabel="row")
    decades = 10.0 ** np.arange(np.ceil(np.log10(3e-3 * top)), np.floor(np.log10(top)) + 1)
    figure.colorbar(image, ax=axes[0].tolist(), label=unit, shrink=0.85, ticks=[*-decades[::-1], 0.0, *decades])
    return figure


def patterns(
    matrices: Mapping[str, BlockMatrix],
    family: Callable[[str, int, int], str],
    columns: int = 3,
    outlines: Mapping[str, int] | None = None,
    names: Callable[[int, int], str] | None = None,
) -> Figure:
    """Which blocks are stored, drawn to scale and coloured by family(title, i, j), side by side with one legend.

    outlines: title -> how many blocks make one layer, to frame the layers of that matrix; names: what stands in block (i, j).
    """
    titles, count = list(matrices), len(matrices)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, min(columns, count), figsize=(3.9 * min(columns, count), 4.1 * rows), layout="constrained", squeeze=False
    )
    colours: dict[str, Any] = {}
    for title in titles:
        for i, j in sorted(matrices[title].blocks):
            colours.setdefault(family(title, i, j), None)
    colours = {name: colour for name, (colour, _) in zip(colours, styles(list(colours)), strict=True)}
    for axis, title in zip(axes.flat, titles, strict=False):
        matrix = matrices[title]
        tops, lefts = np.cumsum([0, *matrix.row_sizes]), np.cumsum([0, *matrix.col_sizes])
        for i, j in sorted(matrix.blocks):
            size = matrix.col_sizes[j], matrix.row_sizes[i]
            colour = colours[family(title, i, j)]
            axis.add_patch(Rectangle((lefts[j], tops[i]), *size, facecolor=colour, edgecolor="white", lw=0.3))
            if names is not None and min(size[0] / lefts[-1], size[1] / tops[-1]) > 0.04:  # else there is no room
                middle = lefts[j] + size[0] / 2, tops[i] + size[1] / 2
                axis.text(*middle, names(i, j), ha="center", va="center", color="white", fontsize=8)
        if outlines and title in outlines:
            _frames(axis, tops, lefts, outlines[title])
        axis.set(xlim=(0, lefts[-1]), ylim=(tops[-1], 0), title=title, xlabel="column", ylabel="row")
        axis.set_aspect(lefts[-1] / tops[-1])
    for axis in list(axes.flat)[count:]:
        axis.axis("off")
    handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    return figure


def _frames(axis: Any, tops: np.ndarray, lefts: np.ndarray, step: int) -> None:
    """Every `step` blocks are a layer: a frame around each pair of a layer with itself and with its neighbours."""
    tops, lefts = tops[::step], lefts[::step]
    for i in range(len(tops) - 1):
        for j in range(max(0, i - 1), min(len(lefts) - 1, i + 2)):
            corner, size = (lefts[j], tops[i]), (lefts[j + 1] - lefts[j], tops[i + 1] - tops[i])
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="0.2", lw=0.8))


def lifted(by_kind: BlockMatrix, by_layer: BlockMatrix) -> Figure:
    """K with its unknowns listed by kind, and by layer under the network itself: each layer's weights, activations and backward signals stand above their columns."""
    layers = len(by_layer.col_sizes) // 3
    kinds = ("parameters $x$", "activations $y$", "backward signals $z$")
    colours = [colour for colour, _ in styles(kinds)]
    figure, axes = plt.subplots(
        2, 2, figsize=(9.6, 5.9), layout="constrained", height_ratios=(1, 4.2), sharex="col", squeeze=False
    )
    for column, (matrix, kind, title) in enumerate(
        (
            (by_kind, lambda j: j // layers, "$K$: unknowns listed by kind"),
            (by_layer, lambda j: j % 3, "$K'$: the same, listed by layer"),
        )
    ):
        axis, edges = axes[1, column], np.cumsum([0, *matrix.col_sizes])
        for i, j in matrix.blocks:
            size = matrix.col_sizes[j], matrix.row_sizes[i]
            corner = edges[j], edges[i]
            axis.add_patch(Rectangle(corner, *size, facecolor=colours[kind(j)], edgecolor="white", lw=0.3))
        if column:
            _frames(axis, edges, edges, 3)
        axis.set(xlim=(0, edges[-1]), ylim=(edges[-1], 0), xlabel="column", ylabel="row" if column == 0 else "")
        above = axes[0, column]
        above.set(ylim=(0, 1), title=title)
        above.axis("off")
        _network(above, edges, layers, colours, by_layer=bool(column))
    handles = [Patch(facecolor=colour, label="column of " + name) for colour, name in zip(colours, kinds, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _network(axis: Any, edges: np.ndarray, layers: int, colours: Sequence[Any], by_layer: bool) -> None:
    """Above its columns in K, one layer after the other; above K by kind, what the three groups of columns are."""
    if not by_layer:
        for k, text in enumerate(("all\nparameters", "all\nactivations", "all backward\nsignals")):
            left, right = edges[k * layers], edges[(k + 1) * layers]
            axis.add_patch(Rectangle((left, 0.15), right - left, 0.6, facecolor=colours[k], edgecolor="white"))
            axis.text((left + right) / 2, 0.45, text, ha="center", va="center", color="white", fontsize=8)
        return
    middles = [(edges[3 * l] + edges[3 * l + 3]) / 2 for l in range(layers)]
    gap = [min(0.16 * edges[-1] / layers, 0.2 * (edges[3 * l + 3] - edges[3 * l])) for l in range(layers)]
    for l, x in enumerate(middles):
        half = (edges[3 * l + 3] - edges[3 * l]) / 2 - gap[l]
        axis.add_patch(Rectangle((x - half, 0.3), 2 * half, 0.4, facecolor=colours[0], edgecolor="none"))
        axis.text(x, 0.5, f"{l + 1}", ha="center", va="center", color="white", fontsize=8)
        if l:
            left, right = middles[l - 1] + (edges[3 * l] - edges[3 * l - 3]) / 2 - gap[l - 1], x - half
            for height, start, end, colour in ((0.62, left, right, colours[1]), (0.38, right, left, colours[2])):
                axis.annotate(
                    "", (end, height), (start, height), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6}
                )
    axis.text(edges[-1], 0.85, "activations go right, backward signals left", ha="right", fontsize=8, color="0.3")


def elimination(sizes: Sequence[int]) -> Figure:
    """Six frames of the recursion of notebook 05: layers still coupled (blue), what is left of the eliminated ones (V, red), their pivots S (grey)."""
    layers, edges = len(sizes), np.cumsum([0, *sizes])
    figure, axes = plt.subplots(1, 6, figsize=(11.4, 2.5), layout="constrained")
    for axis, done in zip(axes, np.linspace(0, layers, 6).round().astype(int), strict=True):
        left = layers - done
        for i in range(layers):
            for j in range(layers):
                coupled = max(i, j) < left
                if not coupled and i != j:
                    continue
                corner, size = (edges[j], edges[i]), (sizes[j], sizes[i])
                colour = PALETTE[0] if coupled else "0.55"
                axis.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="white", lw=0.4))
        if 0 < done < layers:
            corner = edges[left - 1], edges[left - 1]
            axis.add_patch(Rectangle(corner, *[sizes[left - 1]] * 2, facecolor=PALETTE[3], edgecolor="white"))
            axis.text(*(c + sizes[left - 1] / 2 for c in corner), "$V$", color="white", ha="center", va="center")
        title = "$H$ is dense" if done == 0 else "all pivots" if left == 0 else f"{done} eliminated"
        axis.set(xlim=(0, edges[-1]), ylim=(edges[-1], 0), title=title, xticks=[], yticks=[])
        axis.set_aspect("equal")
    names = {
        "still coupled": PALETTE[0],
        "changed by $V$, all that the last layers leave": PALETTE[3],
        "pivots $S$": "0.55",
    }
    handles = [Patch(facecolor=colour, label=name) for name, colour in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure
