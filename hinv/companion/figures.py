"""Figures: one style, one function per role. Only this module imports matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hinv.companion.checks import output
from hinv.paper import BlockMatrix
from hinv.shapes import Float

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
    own = [next((k for k, name in enumerate(COLOURS) if label.startswith(name)), None) for label in labels]
    fixed = [list(COLOURS.values())[k] for k in own if k is not None]
    free = iter([*(c for c in PALETTE if c not in fixed), *PALETTE])
    taken: dict[Any, int] = {}
    out = []
    for k in own:
        colour = next(free) if k is None else list(COLOURS.values())[k]
        # settings of one method have its colour and markers of their own
        taken[colour] = taken.get(colour, -1) + 1
        out.append(
            (
                colour,
                MARKERS[(list(dict.fromkeys([*COLOURS.values(), *PALETTE])).index(colour) + 3 * taken[colour]) % 10],
            )
        )
    return out


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


def plane(
    value: Callable[[Any, Any], Any],
    at: tuple[float, float],
    steps: Mapping[str, Sequence[float]],
    box: tuple[float, float, float, float],
    title: str = "",
) -> Figure:
    """Contours of a loss of two parameters over box = (left, right, bottom, top), and steps from `at` as arrows."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    x, y = np.meshgrid(np.linspace(*box[:2], 161), np.linspace(*box[2:], 161))
    heights = value(x, y)
    axis.contour(x, y, heights, levels=28, colors="0.75", linewidths=0.8)
    for (name, step), (colour, _) in zip(steps.items(), styles(list(steps)), strict=True):
        end = at[0] + float(step[0]), at[1] + float(step[1])
        axis.annotate(
            "", end, at, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.2, "shrinkA": 0, "shrinkB": 0}
        )
        axis.plot([], [], color=colour, lw=2.2, label=f"{name}: loss {value(*end):.3f}")
        outside = np.sign(np.subtract(end, at))
        axis.annotate(
            name, end, 6 * outside, textcoords="offset points", ha="right" if outside[0] < 0 else "left", fontsize=8
        )
    axis.plot(*at, "o", color="k", ms=6, label=f"here: loss {value(*at):.3f}")
    axis.set(xlim=box[:2], ylim=box[2:], xlabel="$x_1$", ylabel="$x_2$", title=title)
    axis.legend(fontsize=9)
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
        colour, marker = styles(list(series))[k]
        # later markers are smaller, so that a curve on top of another leaves it visible
        axis.plot(x, y, marker=marker, color=colour, label=name, ms=max(4, 9 - 2 * k))
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
        (colour, marker), x = styles(list(runs))[k], np.median(x, 0)
        axis.plot(
            x,
            np.median(y, 0),
            marker + "-",
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
            colour, marker = styles(names)[k]
            axis.plot(values, [row + offset] * len(values), marker, color=colour, ms=5, alpha=0.8, label=label)
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
            colour = styles(names)[names.index(name)][0]
            axis.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="white", alpha=0.6))
            axis.text(j + 0.5, i + 0.5, name, ha="center", va="center")
    axis.set(xlim=(0, len(columns)), ylim=(len(rows), 0), title=title, xlabel=xlabel, ylabel=ylabel)
    axis.set_xticks([j + 0.5 for j in range(len(columns))], [str(c) for c in columns])
    axis.set_yticks([i + 0.5 for i in range(len(rows))], [str(r) for r in rows])
    axis.tick_params(length=0)
    return figure


def staircase(values: Numbers, shifts: Numbers, counts: Numbers, linear: float, title: str = "") -> Figure:
    """How many of the sorted values lie below each number (a line), and counts at some shifts (points); logarithmic beyond +-linear."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    values = np.asarray(values)
    axis.step(
        values, np.arange(1, len(values) + 1), where="post", color=GREY, lw=1.4, label="eigvalsh of the dense matrix"
    )
    axis.plot(shifts, counts, "o", color=PALETTE[0], ms=7, mfc="none", mew=1.6, label="inertia of $H - \\sigma I$")
    axis.set_xscale("symlog", linthresh=linear)
    axis.set(xlabel="shift $\\sigma$ (loss / parameter$^2$)", ylabel="eigenvalues below", title=title)
    decades = 10.0 ** np.arange(np.floor(np.log10(np.abs(values).max())), np.log10(linear), -2)
    axis.set_xticks([*-decades, 0.0, *decades])
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure


def grown(
    rows: Mapping[str, tuple[Numbers, Mapping[str, Numbers], Mapping[str, Numbers]]], units: Sequence[str]
) -> Figure:
    """What grows with what: a column for each name -> (x, series of the upper row, of the lower row), logarithmic; units: of the two rows."""
    figure, axes = plt.subplots(2, len(rows), figsize=(2.9 * len(rows), 5.2), layout="constrained", sharex="col")
    for column, (name, (x, *both)) in enumerate(rows.items()):
        for axis, series, unit in zip(axes[:, column], both, units, strict=True):
            for (label, y), (colour, marker) in zip(series.items(), styles(list(series)), strict=True):
                axis.plot(x, y, marker=marker, color=colour, ms=5, label=label)
            axis.set(xscale="log", yscale="log", ylabel=unit if column == 0 else "")
            axis.legend(frameon=False, fontsize=8)
            axis.set_xticks(list(x), [f"{v:g}" for v in x], minor=False)
            axis.minorticks_off()
        axes[0, column].set_title(name, fontsize=10)
        axes[1, column].set_xlabel(name.split(",")[0])
    sns.despine(figure)
    return figure


def reached(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, bool]]]], xlabel: str, ylabel: str
) -> Figure:
    """Side by side, for each method its (x, y, whether the goal was reached): full markers and lines where it was, a cross where time was spent in vain."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), layout="constrained", sharey=True)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axis, (title, panel) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for name, (colour, marker) in zip(names, styles(names), strict=True):
            points = panel.get(name, [])
            done = [(x, y) for x, y, arrived in points if arrived]
            vain = [(x, y) for x, y, arrived in points if not arrived]
            bold = {"lw": 2.6, "zorder": 3} if name.startswith("factor") else {"lw": 1.4}
            axis.plot(*zip(*(done or [(np.nan, np.nan)]), strict=True), marker + "-", color=colour, label=name, **bold)
            axis.plot(*zip(*(vain or [(np.nan, np.nan)]), strict=True), "x", color=colour, ms=8, mew=2)
        axis.set(xscale="log", yscale="log", xlabel=xlabel, title=title)
    np.atleast_1d(axes)[0].set_ylabel(ylabel)
    cross = Line2D([], [], ls="", marker="x", color="0.3", ms=8, mew=2, label="not reached")
    handles = [*np.atleast_1d(axes)[0].get_legend_handles_labels()[0], cross]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    sns.despine(figure)
    return figure


def spectrum(
    edges: Numbers,
    counts: Numbers,
    estimates: Mapping[str, tuple[Numbers, Numbers]] | None = None,
    title: str = "",
    linear: float = 0.0,
) -> Figure:
    """Exact eigenvalue counts per bin as steps, and estimated densities (grid, density) as the numbers they predict for the same bins.

    linear: where not zero, the eigenvalue axis is logarithmic on both sides of the interval from -linear to linear.
    """
    edges, total = np.asarray(edges), int(np.asarray(counts).sum())
    figure, axis = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    axis.stairs(np.asarray(counts), edges, fill=True, color="0.8", label="exact count")
    axis.stairs(np.asarray(counts), edges, color="0.3")
    centres = (edges[1:] + edges[:-1]) / 2
    for k, (name, (grid, density)) in enumerate((estimates or {}).items()):
        grid, density = np.asarray(grid), np.asarray(density)
        cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
        predicted = total * np.diff(np.interp(edges, grid, cumulative / cumulative[-1]))
        colour, marker = styles(list(estimates or {}))[k]
        axis.plot(centres, predicted, marker=marker, ms=4, lw=1, color=colour, label=name)
    axis.set_yscale("symlog", linthresh=1)
    if linear:
        axis.set_xscale("symlog", linthresh=linear)
    axis.set(xlabel="eigenvalue, loss / parameter$^2$", ylabel="eigenvalues in the bin", title=title, ylim=(0, None))
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure
