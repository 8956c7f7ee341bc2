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
mathjax3_config = {"chtml": {"matchFontHeight": False, "scale": 1.1}}
nb_merge_streams = True
bibtex_bibfiles = ["references.bib"]
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

nitpick_ignore_regex = [
    # torch, NumPy and the standard library have no inventory here: nothing is fetched
    ("py:.*", r"(torch|numpy|np|scipy|collections|typing|pathlib|jaxtyping|nn)\..*"),
    ("py:.*", r"(Any|Tensor|Array|Module|LinearOperator|DataNotFound|(dict|tuple|list)\[.*)"),
    # an annotation names a class by the file it is in; it is documented by the name that one imports, or not at all
    ("py:class", r"hinv\..*"),
]

COLON = "\N{RATIO}"  # stands for a colon while napoleon looks


def as_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in them: markup that they do not mean is escaped, tables and lists that they mean become such."""
    out: list[str] = []
    section = code = False
    for line in lines:
        bare, indented = line.strip(), line.startswith(" ")
        section = bool(re.fullmatch(r"(Args|Raises|Returns|Yields|Attributes):", bare)) or (
            section and (indented or not bare)
        )
        if bare and indented and not section and (code or not out or not out[-1].strip()):
            out += [line] if code else ["::", "", line]
            code = True
            continue
        code = code and not bare
        listed = re.match(r"`(\w+)`\s{2,}(.*)", line)
        if listed:
            line = f"* `{listed[1]}`: {listed[2]}"
            if out and out[-1].strip() and not out[-1].startswith("* "):
                out.append("")
        pieces = re.split(r"(`[^`]*`)", line[2:] if listed else line)
        escaped = (p if p.startswith("`") else re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", p) for p in pieces)
        out.append(("* " if listed else "") + "".join(escaped))
    if what in ("property", "attribute"):  # napoleon would take "(7) M: ..." for a type
        out[:1] = [line.replace(":", COLON) for line in out[:1]]
    lines[:] = out


def with_colons(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


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
    "navbar_persistent": [],  # one search field is enough
}
html_context = {"default_mode": "auto"}
html_favicon = "_static/favicon.svg"
repository = os.environ.get(
    "HINV_REPOSITORY", ""
)  # as https://github.com/someone/hinv: adds buttons for Colab and Binder
if repository:
    html_theme_options |= {
        "repository_url": repository,
        "repository_branch": "main",
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com", "binderhub_url": "https://mybinder.org"},
    }


def downloads(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """A button to download notebooks, and nothing else: other pages are of no use outside the book."""
    if not page.startswith("notebooks/"):
        context["page_source_suffix"] = ""


def setup(app: Any) -> None:
    app.set_html_assets_policy("always")  # titles in the table of contents have mathematics, on every page
    app.connect("html-page-context", downloads, priority=100)
    app.connect("autodoc-process-docstring", as_text, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", with_colons, priority=900)
