"""Figures: one style, one function a role. Only this room imports matplotlib.

style.py: colours, saving. structure.py: matrices. curves.py: measurements. explorer.py: of notebook 13. front.py: of the project.
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
from .explorer import counted, explored
from .front import social
from .structure import elimination, heatmaps, lifted, patterns
from .style import png, save

__all__ = [
    "bands",
    "categories",
    "counted",
    "curves",
    "dots",
    "elimination",
    "explored",
    "fields",
    "gallery",
    "grown",
    "heatmaps",
    "lifted",
    "patterns",
    "plane",
    "png",
    "races",
    "reached",
    "save",
    "scatter",
    "social",
    "spectrum",
    "staircase",
]
