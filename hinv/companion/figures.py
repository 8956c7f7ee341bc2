"""Figures: one style, one function per role. Only this module imports matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hinv.companion.checks import output
from hinv.paper import BlockMatrix
from hinv.shapes import Float

PALETTE = sns.color_palette("colorblind")
MARKERS = "osD^vPX*<>"
Numbers = Sequence[float] | np.ndarray | Tensor

sns.set_theme(
    context="notebook",
    style="ticks",
    palette=PALETTE,
    rc={"figure.dpi": 90, "savefig.bbox": "tight", "axes.grid": False},
)


def save(figure: Figure, name: str) -> Figure:
    """Write figures/<name>.png and .pdf (without a date, so that the same figure is the same file) and return the figure."""
    folder = output("figures")
    figure.savefig(folder / f"{name}.png", dpi=160)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    plt.close(figure)
    return figure


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


def patterns(matrices: Mapping[str, BlockMatrix], family: Callable[[str, int, int], str], columns: int = 3) -> Figure:
    """Which blocks are stored, drawn to scale and coloured by family(title, i, j), side by side with one legend."""
    titles, count = list(matrices), len(matrices)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, min(columns, count), figsize=(3.7 * min(columns, count), 3.9 * rows), layout="constrained", squeeze=False
    )
    colours: dict[str, tuple[float, float, float]] = {}
    for axis, title in zip(axes.flat, titles, strict=False):
        matrix = matrices[title]
        tops, lefts = np.cumsum([0, *matrix.row_sizes]), np.cumsum([0, *matrix.col_sizes])
        for i, j in sorted(matrix.blocks):
            name = family(title, i, j)
            colour = colours.setdefault(name, PALETTE[len(colours) % len(PALETTE)])
            size = matrix.col_sizes[j], matrix.row_sizes[i]
            axis.add_patch(Rectangle((lefts[j], tops[i]), *size, facecolor=colour, edgecolor="white", lw=0.3))
        axis.set(xlim=(0, lefts[-1]), ylim=(tops[-1], 0), title=title, xlabel="column", ylabel="row")
        axis.set_aspect(lefts[-1] / tops[-1])
    for axis in list(axes.flat)[count:]:
        axis.axis("off")
    handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    return figure


def curves(
    series: Mapping[str, tuple[Numbers, Numbers]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: str = "xy",
    bound: float | None = None,
    bound_label: str = "",
) -> Figure:
    """Lines with markers, one for each name -> (x, y); logarithmic axes named in `log`; a dashed horizontal bound."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for k, (name, (x, y)) in enumerate(series.items()):
        # later markers are smaller, so that a curve on top of another leaves it visible
        axis.plot(
            x, y, marker=MARKERS[k % len(MARKERS)], color=PALETTE[k % len(PALETTE)], label=name, ms=max(4, 9 - 2 * k)
        )
    if bound is not None:
        axis.axhline(bound, color="0.3", ls="--", lw=1, label=bound_label)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ticks = sorted({value for x, _ in series.values() for value in x})
    if "x" in log:
        axis.set_xscale("log")
    if len(ticks) <= 10 and sum(len(f"{tick:g}") for tick in ticks) <= 45:
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axis.minorticks_off()
    if "y" in log:
        axis.set_yscale("log")
    elif all(isinstance(value, int) for _, y in series.values() for value in y):
        locator = axis.yaxis.get_major_locator()
        assert isinstance(locator, MaxNLocator)  # of a linear axis
        locator.set_params(integer=True)
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure


def bands(
    runs: Mapping[str, Sequence[tuple[Numbers, Numbers]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: str = "xy",
    bound: float | None = None,
    bound_label: str = "",
) -> Figure:
    """For each name the median over repetitions (x, y) as a line and their range as a band, as far as the shortest repetition goes."""
    figure, axis = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for k, (name, repetitions) in enumerate(runs.items()):
        length = min(len(x) for x, _ in repetitions)
        x, y = (np.array([np.asarray(r[i], float)[:length] for r in repetitions]) for i in (0, 1))
        every = (
            np.unique(np.geomspace(1, length, 6).astype(int) - 1)
            if "x" in log
            else np.linspace(0, length - 1, 6).astype(int)
        )
        colour, x = PALETTE[k % len(PALETTE)], np.median(x, 0)
        axis.plot(
            x,
            np.median(y, 0),
            MARKERS[k % len(MARKERS)] + "-",
            color=colour,
            ms=5,
            lw=1.4,
            markevery=every.tolist(),
            label=name,
        )
        axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
    if bound is not None:
        axis.axhline(bound, color="0.3", ls="--", lw=1, label=bound_label)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for name in log:
        getattr(axis, f"set_{name}scale")("log")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(figure)
    return figure


def dots(
    groups: Mapping[str, Mapping[str, Numbers]],
    xlabel: str,
    title: str,
    bound: float | None = None,
    bound_label: str = "",
) -> Figure:
    """Measurements on a logarithmic axis: one row for each group, one colour for each name; a dashed vertical bound."""
    names = sorted({name for group in groups.values() for name in group})
    figure, axis = plt.subplots(figsize=(7.2, 0.42 * len(groups) + 1.6), layout="constrained")
    for row, group in enumerate(groups.values()):
        for k, name in enumerate(names):
            values = [max(v, 1e-17) for v in group.get(name, [])]
            offset = 0.16 * (k - (len(names) - 1) / 2)
            label = name if row == next(r for r, g in enumerate(groups.values()) if name in g) else None
            axis.plot(values, [row + offset] * len(values), MARKERS[k], color=PALETTE[k], ms=5, alpha=0.8, label=label)
    if bound is not None:
        axis.axvline(bound, color="0.3", ls="--", lw=1, label=bound_label)
    axis.set(xscale="log", xlabel=xlabel, title=title, yticks=range(len(groups)), yticklabels=list(groups))
    axis.invert_yaxis()
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(figure)
    return figure


def categories(
    table: Sequence[Sequence[str]], rows: Sequence[Any], columns: Sequence[Any], ylabel: str, xlabel: str, title: str
) -> Figure:
    """A grid of named cells, one colour and the name in each."""
    names = sorted({name for line in table for name in line})
    figure, axis = plt.subplots(figsize=(1.3 * len(columns) + 1.6, 0.7 * len(rows) + 1.4), layout="constrained")
    for i, line in enumerate(table):
        for j, name in enumerate(line):
            axis.add_patch(Rectangle((j, i), 1, 1, facecolor=PALETTE[names.index(name)], edgecolor="white", alpha=0.6))
            axis.text(j + 0.5, i + 0.5, name, ha="center", va="center")
    axis.set(xlim=(0, len(columns)), ylim=(len(rows), 0), title=title, xlabel=xlabel, ylabel=ylabel)
    axis.set_xticks([j + 0.5 for j in range(len(columns))], [str(c) for c in columns])
    axis.set_yticks([i + 0.5 for i in range(len(rows))], [str(r) for r in rows])
    axis.tick_params(length=0)
    return figure


def spectrum(
    edges: Numbers,
    counts: Numbers,
    estimates: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    title: str = "",
) -> Figure:
    """Exact eigenvalue counts per bin as steps, and estimated densities (grid, density) as the numbers they predict for the same bins."""
    edges, total = np.asarray(edges), int(np.asarray(counts).sum())
    figure, axis = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    axis.stairs(np.asarray(counts), edges, fill=True, color="0.8", label="exact count")
    axis.stairs(np.asarray(counts), edges, color="0.3")
    centres = (edges[1:] + edges[:-1]) / 2
    for k, (name, (grid, density)) in enumerate((estimates or {}).items()):
        grid, density = np.asarray(grid), np.asarray(density)
        cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
        predicted = total * np.diff(np.interp(edges, grid, cumulative / cumulative[-1]))
        axis.plot(centres, predicted, marker=MARKERS[k], ms=4, lw=1, color=PALETTE[k], label=name)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="eigenvalue, loss / parameter$^2$", ylabel="eigenvalues in the bin", title=title, ylim=(0, None))
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure
