"""Exact counts as bars of equal width, and the picture of notebook 13: spectrum, lifted matrix, pivots."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from hinv.paper import BlockMatrix

from .style import GREY, PALETTE, Numbers, styles

POSITIVE, NEGATIVE = PALETTE[0], PALETTE[3]


def counted(edges: Sequence[float], counts: Sequence[int], eigenvalues: Numbers | None, title: str) -> Figure:
    """Exact counts between edges, below the first and above the last, and every eigenvalue below them where they are known."""
    figure, axis = plt.subplots(figsize=(7.4, 3.6), layout="constrained")
    _counted(axis, edges, counts, eigenvalues)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("eigenvalue, loss / parameter$^2$")
    sns.despine(figure)
    return figure


def explored(
    edges: Sequence[float],
    counts: Sequence[int],
    eigenvalues: Numbers | None,
    K: BlockMatrix,
    pivots: Sequence[tuple[int, int]],
    title: str,
) -> Figure:
    """Exact counts between edges (with every eigenvalue below them, where known), K listed by layer, and each layer's pivots by their sign.

    counts: below the first edge, between each two, above the last; pivots: (positive, negative) from the first layer to the last.
    """
    figure = plt.figure(figsize=(7.4, 6.2))
    # fixed, as a layout that is searched for takes longer than all the rest of a redraw
    layout = {"left": 0.085, "right": 0.985, "top": 0.885, "bottom": 0.085, "hspace": 0.32, "wspace": 0.2}
    axes = figure.subplot_mosaic([["spectrum", "spectrum"], ["K", "pivots"]], gridspec_kw=layout)
    figure.suptitle(title, fontsize=11, y=0.98)
    _counted(axes["spectrum"], edges, counts, eigenvalues)
    _blocks(axes["K"], K)
    _signs(axes["pivots"], pivots)
    for axis in axes.values():
        axis.title.set_fontsize(10)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
    sns.despine(figure)
    return figure


def _counted(axis: Any, edges: Sequence[float], counts: Sequence[int], eigenvalues: Numbers | None) -> None:
    """Bars of equal width, one a bin: between them the edges stand at whole numbers."""
    for k, count in enumerate(counts):
        negative, around = k < len(edges) // 2, 2 * k == len(edges)
        colour = GREY if around else NEGATIVE if negative else POSITIVE
        axis.add_patch(Rectangle((k - 1, 0), 1, count, facecolor=colour, edgecolor="white", alpha=0.55))
        axis.text(k - 0.5, count, f"{count:,}", ha="center", va="bottom", fontsize=9)
    top = max(counts)
    axis.set(xlim=(-1, len(edges)), ylim=(-0.1 * top, 1.15 * top), ylabel="eigenvalues of $H$")
    axis.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges])
    axis.set_title(
        "Exact counts, by inertia" + ("" if eigenvalues is None else "; ticks: eigvalsh of the dense matrix")
    )
    if eigenvalues is not None:
        places = [_place(float(value), edges, np.asarray(eigenvalues)) for value in eigenvalues]
        axis.vlines(places, -0.08 * top, -0.015 * top, color="0.2", lw=0.4)


def _place(value: float, edges: Sequence[float], every: np.ndarray) -> float:
    """Where an eigenvalue stands on the axis of equal bins: by its logarithm, and linear in the bin around zero."""
    k = int(np.searchsorted(edges, value))
    low, high = edges[k - 1] if k else float(every.min()), edges[k] if k < len(edges) else float(every.max())
    if low < 0 < high:
        return k - 1 + (value - low) / (high - low)
    return float(k - 1 + np.log(value / low) / np.log(high / low)) if high != low else float(k)


def _blocks(axis: Any, K: BlockMatrix) -> None:
    kinds = ("parameters", "activations", "backward signals")
    colours = [colour for colour, _ in styles(kinds)]
    ends = np.cumsum([0, *K.col_sizes])
    for i, j in K.blocks:
        size = K.col_sizes[j], K.row_sizes[i]
        axis.add_patch(Rectangle((ends[j], ends[i]), *size, facecolor=colours[j % 3], edgecolor="white", lw=0.3))
    axis.set(xlim=(0, ends[-1]), ylim=(ends[-1], 0), title=f"$K'$: {ends[-1]:,} rows, its blocks by layer")
    axis.set_aspect("equal")
    handles = [Patch(facecolor=colour, label=name) for colour, name in zip(colours, kinds, strict=True)]
    axis.legend(handles=handles, fontsize=7, frameon=False, loc="lower left", title="columns of", title_fontsize=7)


def _signs(axis: Any, pivots: Sequence[tuple[int, int]]) -> None:
    layers = np.arange(1, len(pivots) + 1)
    positive, negative = (np.array([pair[k] for pair in pivots]) for k in (0, 1))
    axis.bar(layers, positive, color=POSITIVE, alpha=0.8, label="positive")
    axis.bar(layers, -negative, color=NEGATIVE, alpha=0.8, label="negative")
    for layer, count in zip(layers, negative, strict=True):
        axis.text(layer, -count, f"{count}", ha="center", va="top", fontsize=8)
    axis.axhline(0, color="0.2", lw=0.8)
    low, high = -max(negative.max(), 0.15 * positive.max()), positive.max()
    axis.set(
        ylim=(1.35 * low, 1.25 * high),
        xlabel="layer",
        ylabel="pivots",
        title=f"Pivots of $H + \\varepsilon I$: {negative.sum():,} negative",
    )
    axis.set_xticks(layers[:: 1 + len(layers) // 9])
    ticks = [tick for tick in axis.get_yticks() if 1.35 * low <= tick <= 1.25 * high]
    axis.set_yticks(ticks, [f"{abs(tick):g}" for tick in ticks])
    axis.legend(fontsize=8, frameon=False, loc="upper center", ncols=2)
