"""Measurements as pictures: one function a role."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .style import GREY, PALETTE, Numbers, styles


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
    for k, ((name, (x, y)), (colour, marker)) in enumerate(zip(series.items(), styles(list(series)), strict=True)):
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
    return races({title: runs}, xlabel, ylabel, log, bound, bound_label)


def races(
    panels: Mapping[str, Mapping[str, Sequence[tuple[Numbers, Numbers]]]],
    xlabel: str,
    ylabel: str,
    log: str = "xy",
    bound: float | None = None,
    bound_label: str = "",
) -> Figure:
    """`bands` side by side, one panel a title, with one legend: a name has the same colour in all."""
    names = list(dict.fromkeys(name for runs in panels.values() for name in runs))
    look = dict(zip(names, styles(names), strict=True))
    width = 7.4 if len(panels) == 1 else 3.9 * len(panels) + 1.6
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.2), layout="constrained", sharey=True, squeeze=False)
    for axis, (title, runs) in zip(axes[0], panels.items(), strict=True):
        for name, repetitions in runs.items():
            _band(axis, name, repetitions, look[name], "x" in log)
        if bound is not None:
            axis.axhline(bound, color="0.3", ls="--", lw=1, label=bound_label)
        axis.set(xlabel=xlabel, title=title)
        for which in log:
            getattr(axis, f"set_{which}scale")("log")
    axes[0, 0].set_ylabel(ylabel)
    handles = {l: h for axis in axes[0] for h, l in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0, -1].legend(handles.values(), handles.keys(), frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(figure)
    return figure


def _band(
    axis: Axes, name: str, repetitions: Sequence[tuple[Numbers, Numbers]], look: tuple[Any, str], logarithmic: bool
) -> None:
    length = min(len(x) for x, _ in repetitions)
    x, y = (np.array([np.asarray(r[i], float)[:length] for r in repetitions]) for i in (0, 1))
    every = (
        np.unique(np.geomspace(1, length, 6).astype(int) - 1)
        if logarithmic
        else np.linspace(0, length - 1, 6).astype(int)
    )
    x, (colour, marker) = np.median(x, 0), look
    axis.plot(x, np.median(y, 0), marker + "-", color=colour, ms=5, lw=1.4, markevery=every.tolist(), label=name)
    axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)


def fields(
    panels: Mapping[str, Any],
    extent: tuple[float, float, float, float],
    xlabel: str,
    ylabel: str,
    signed: Sequence[str] = (),
) -> Figure:
    """Side by side, functions of two variables on a grid (rows along y), each with its own scale; those named in `signed` in colours that part at zero."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 3.2), layout="constrained", sharey=True)
    for axis, (title, values) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        values = np.asarray(values)
        most = np.abs(values).max()
        limits = {"cmap": "RdBu_r", "vmin": -most, "vmax": most} if title in signed else {"cmap": "viridis"}
        image = axis.imshow(values, origin="lower", extent=extent, aspect="auto", interpolation="bilinear", **limits)
        figure.colorbar(image, ax=axis, format="%.2g")
        axis.set(xlabel=xlabel, title=title)
    np.atleast_1d(axes)[0].set_ylabel(ylabel)
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


def _symlog(axis: Any, values: np.ndarray, linear: float) -> None:
    """A logarithmic axis on both sides of the interval from -linear to linear, with every second decade marked."""
    axis.set_xscale("symlog", linthresh=linear)
    decades = 10.0 ** np.arange(np.floor(np.log10(np.abs(values).max())), np.log10(linear) + 0.3, -2)
    axis.set_xticks([*-decades, 0.0, *decades])


def staircase(values: Numbers, shifts: Numbers, counts: Numbers, linear: float, title: str = "") -> Figure:
    """How many of the sorted values lie below each number (a line), and counts at some shifts (points); logarithmic beyond +-linear."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    values = np.asarray(values)
    axis.step(
        values, np.arange(1, len(values) + 1), where="post", color=GREY, lw=1.4, label="eigvalsh of the dense matrix"
    )
    axis.plot(shifts, counts, "o", color=PALETTE[0], ms=7, mfc="none", mew=1.6, label="inertia of $H - \\sigma I$")
    _symlog(axis, values, linear)
    axis.set(xlabel="shift $\\sigma$ (loss / parameter$^2$)", ylabel="eigenvalues below", title=title)
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
        _symlog(axis, edges, linear)
    axis.set(xlabel="eigenvalue, loss / parameter$^2$", ylabel="eigenvalues in the bin", title=title, ylim=(0, None))
    axis.legend(frameon=False)
    sns.despine(figure)
    return figure


def scatter(
    series: Mapping[str, tuple[Numbers, Numbers]], xlabel: str, ylabel: str, title: str = "", log: bool = False
) -> Figure:
    """Estimates against the truth, one marker for each name -> (truth, estimate); the line is where they agree."""
    figure, axis = plt.subplots(figsize=(5.4, 4.8), layout="constrained")
    for name, (colour, marker), (x, y) in zip(series, styles(list(series)), series.values(), strict=True):
        axis.plot(x, y, marker, color=colour, ms=6 if len(x) < 100 else 2, alpha=0.8, label=name)
    everything = np.concatenate([np.asarray(x) for x, _ in series.values()])
    ends = [float(everything.min()), float(everything.max())]
    axis.plot(ends, ends, color="0.3", lw=1, ls="--")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log:
        axis.set(xscale="log", yscale="log")
    axis.legend(frameon=False, fontsize=9)
    sns.despine(figure)
    return figure


def gallery(images: Sequence[Tensor], titles: Sequence[str], columns: int = 6) -> Figure:
    """Pictures (channels, height, width) of any scale, side by side, each with its title."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.75 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        picture = np.asarray(image).transpose(1, 2, 0)
        low, high = picture.min(), picture.max()
        axis.imshow((picture - low) / max(high - low, 1e-12), cmap="gray", interpolation="nearest")
        axis.set_title(title, fontsize=9)
    return figure
