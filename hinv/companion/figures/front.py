"""The picture that stands for the project where a link to it is shown."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from .style import png, styles

INK, PAPER = "#1d1d1d", "#ffffff"


def social(
    sizes: Sequence[int], blocks: Sequence[tuple[int, int]], inertia: tuple[int, int, int], damping: float
) -> bytes:
    """1280 x 640 pixels: what the project does, and the chain matrix of a network with the counts of its eigenvalues."""
    figure = plt.figure(figsize=(12.8, 6.4), dpi=100, facecolor=PAPER)
    axis = figure.add_axes((0.545, 0.08, 0.42, 0.84))
    colours = [colour for colour, _ in styles(("parameters", "activations", "backward signals"))]
    ends = np.cumsum([0, *sizes])
    for i, j in blocks:
        axis.add_patch(Rectangle((ends[j], ends[i]), sizes[j], sizes[i], facecolor=colours[j % 3], edgecolor="none"))
    axis.set(xlim=(0, ends[-1]), ylim=(ends[-1], 0))
    axis.axis("off")
    parameters, (positive, negative, _) = sum(sizes[::3]), inertia
    lines = (
        (0.84, 64, "bold", "hinv"),
        (0.64, 27, "normal", "exact curvature of\ndeep, narrow networks"),
        (0.455, 25, "normal", "$(H + \\varepsilon I)^{-1}\\, g$   in time linear in depth"),
        (
            0.275,
            17,
            "normal",
            f"{parameters:,} parameters, $\\varepsilon = {damping:g}$:\n{positive:,} eigenvalues positive, {negative:,} negative,\neach counted, none estimated",
        ),
        (0.10, 15, "normal", "after arXiv:2601.06096, in PyTorch and Jupyter"),
    )
    for height, size, weight, words in lines:
        figure.text(0.055, height, words, fontsize=size, weight=weight, color=INK, va="center", linespacing=1.35)
    return png(figure)
