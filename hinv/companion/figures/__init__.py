"""Figures: one style, one function a role. Only this room imports matplotlib.

style.py: colours, saving. structure.py: matrices. curves.py: measurements.
"""

from .curves import (
    bands,
    categories,
    curves,
    dots,
    fields,
    gallery,
    grown,
    plane,
    races,
    reached,
    scatter,
    spectrum,
    staircase,
)
from .structure import elimination, heatmaps, lifted, patterns
from .style import save

__all__ = [
    "bands",
    "categories",
    "curves",
    "dots",
    "elimination",
    "fields",
    "gallery",
    "grown",
    "heatmaps",
    "lifted",
    "patterns",
    "plane",
    "races",
    "reached",
    "save",
    "scatter",
    "spectrum",
    "staircase",
]
