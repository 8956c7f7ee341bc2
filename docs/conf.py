"""Sphinx's settings; `make book` copies them beside the pages it puts together."""

import os
import re
from typing import Any

import hinv

project, author, release = "hinv", "hinv contributors", hinv.__version__
html_title = "hinv"
language = "en"
exclude_patterns = ["listings", "extra"]

extensions = [
    "myst_nb",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax from the package: a page asks no other machine for anything
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
    "sphinx_copybutton",
]

# -- pages and notebooks ------------------------------------------------------------------------------------------------
myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are those of make reproduce, or as committed
nb_render_markdown_format = "myst"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
nb_merge_streams = True
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# -- docstrings ---------------------------------------------------------------------------------------------------------
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_use_rtype = False
default_role = "literal"
python_maximum_signature_line_length = 90

# torch, NumPy and the standard library have no inventory here: nothing is fetched
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|np|scipy|collections|typing|pathlib|nn|Any|Tensor|Array)\b.*")]


def as_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in them; what reStructuredText would take for markup is escaped."""
    for k, line in enumerate(lines):
        pieces = re.split(r"(`[^`]*`)", line)
        lines[k] = "".join(p if p.startswith("`") else re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", p) for p in pieces)


# -- how it looks -------------------------------------------------------------------------------------------------------
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_extra_path = ["extra"]
html_sourcelink_suffix = ""
html_show_sphinx = False
html_show_copyright = False
html_theme_options: dict[str, Any] = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
}
repository = os.environ.get("HINV_REPOSITORY", "")  # as https://github.com/someone/hinv: adds buttons for Colab and Binder
if repository:
    html_theme_options |= {
        "repository_url": repository,
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com", "binderhub_url": "https://mybinder.org"},
    }


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_text, priority=100)  # before napoleon
