"""The book: `make book` puts docs/, notebooks and results together and hands them to Sphinx.

python -m hinv.companion.book            build/book/html; exit status 1 on a broken link or a warning
python -m hinv.companion.book assemble   build/book/source alone

Pages stay plain Markdown that reads well where the sources are; what a book needs beyond that is added here: numbered equations and figures, links that
land on the line of a function, tables made from results files.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hinv.companion import bench
from hinv.companion.checks import ROOT, output, table
from hinv.companion.report import figures, number_of, parts

NOTEBOOKS, BUILD = ROOT / "notebooks", ROOT / "build"
SOURCE, HTML = BUILD / "book" / "source", BUILD / "book" / "html"
PAGES = {  # what is a page of the book and does not lie in docs/
    "README.md": "index.md",
    "EQUATIONS.md": "equations.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "data/README.md": "data.md",
    "results/README.md": "claims.md",  # made here, from what the results files hold
    "results/faults.json": "faults.md",
    "results/fuzz.json": "fuzz.md",
}
MADE = ("claims.md", "faults.md", "fuzz.md")
LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
ASIDE = re.compile(r"(```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|!?\[[^\]]*\]\([^)]*\)|^#.*?$|<[^>]*>)", re.S | re.M)
MENTION = re.compile(r"(?<=\bnotebook )(\d\d[ab]?)\b|(?<![\w.,/-])(0\d[ab]?)(?=[\s,;:)']|\.(?!\d)|$)")
DISPLAY = re.compile(r"^\$\$(.+?)\$\$$", re.S | re.M)
RANGE = re.compile("(\\d+)(?:\N{EN DASH}(\\d+))?")  # (2-5) in the paper's numbers
TAG = re.compile(r"\s*\\tag\{([^}]*)\}")


def page_of(path: str) -> str | None:
    """Where in the book a file of the project is: a page of its own, a notebook, or its source, line by line. None for pictures."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    if path.startswith("notebooks/"):
        return path
    return None if path.endswith((".png", ".svg", ".gif")) else f"source/{path}.md"


def executed(notebook: Path) -> Path:
    """What `make reproduce` made of a notebook, if it is not older than the notebook; else the notebook itself, as committed."""
    made = BUILD / "notebooks" / notebook.name
    return made if made.exists() and made.stat().st_mtime >= notebook.stat().st_mtime else notebook


def anchor(path: str, name: str = "") -> str:
    """Of a source file, or of a class or function in it."""
    kind = "class-" if name[:1].isupper() else ""  # ids do not tell capitals apart: Laplace and laplace
    return re.sub(r"[^a-z0-9]+", "-", f"src-{path}-{kind}{name}".lower()).strip("-")


def definitions(text: str) -> dict[str, tuple[int, int]]:
    """Classes and functions of a module and methods of its classes ("Matrices.K"): depth, and the line where each begins."""
    found: dict[str, tuple[int, int]] = {}

    def walk(body: list[ast.stmt], outer: str, depth: int) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = f"{outer}{node.name}"
                found.setdefault(name, (depth, min([node.lineno, *(d.lineno for d in node.decorator_list)])))
                if isinstance(node, ast.ClassDef) and not depth:
                    walk(node.body, f"{name}.", 1)

    walk(ast.parse(text).body, "", 0)
    return found


def defined(path: str, label: str) -> str | None:
    """The definition in a source file that a link's text names, as in [`hinv.paper.Matrices.K`](hinv/paper/matrices.py)."""
    if not path.endswith(".py") or not re.fullmatch(r"`[\w.]+`", label):
        return None
    names, parts = definitions((ROOT / path).read_text("utf-8")), label.strip("`").split(".")
    for first in range(len(parts)):
        if ".".join(parts[first:]) in names:
            return ".".join(parts[first:])
    return next((name for name in names if name.endswith(f".{parts[-1]}")), None)


def mentions(text: str) -> str:
    """Notebooks that prose calls by their number, as in "(02)" and "notebook 11", become links to them; not in code, formulas, links and headings."""
    notebooks = {number_of(path): path.name for path in NOTEBOOKS.glob("[0-9]*.ipynb")}

    def linked(found: re.Match[str]) -> str:
        number = found[1] or found[2]
        return f"[{number}](/notebooks/{notebooks[number]})" if number in notebooks else found[0]

    return "".join(part if k % 2 else MENTION.sub(linked, part) for k, part in enumerate(ASIDE.split(text)))


class Assembly:
    """What one build of the book has met: the files its pages link to, and what was missing."""

    def __init__(self, source: Path):
        self.source = source
        self.linked: set[str] = set()
        self.missing: list[str] = []
        self.numbers: dict[str, dict[int, str]] = {}  # of a notebook: the paper's number -> anchor

    def write(self, name: str, text: str) -> None:
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def links(self, text: str, folder: str = ".") -> str:
        """Relative links of a page in `folder` of the project, turned into links of the book.

        Raises:
            FileNotFoundError: a link to a file that is not there.
        """

        def turned(found: re.Match[str]) -> str:
            picture, label, target = found.groups()
            if re.match(r"https?:|mailto:|#|/", target):
                return found[0]
            name, _, part = target.partition("#")
            path = os.path.normpath(os.path.join(folder, name))
            if not (ROOT / path).exists():
                raise FileNotFoundError(f"{found[0]} in {folder}: there is no {path}")
            page = page_of(path)
            if page is None:
                copy = self.source / "images" / path
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, copy)
                return f"{picture}[{label}](/images/{path})"
            if page.startswith("source/"):
                self.linked.add(path)
                name = defined(path, label)
                return f"[{label}](#{anchor(path, name or '')})"
            return f"[{label}](/{page}{'#' + part if part else ''})"

        fences = re.split(r"(^```.*?^```$)", text, flags=re.S | re.M)
        return "".join(part if k % 2 else LINK.sub(turned, part) for k, part in enumerate(fences))

    # -- notebooks -----------------------------------------------------------------------------------------------------

    def notebook(self, path: Path) -> None:
        """One notebook: executed where `make reproduce` made it, else as committed; with numbered equations and figures."""
        shown = executed(path)
        notebook = json.loads(shown.read_text("utf-8"))
        number, pictures, heading = path.stem.split("_")[0], 0, ""
        self.numbers[number] = {}
        counter = [0]
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                heading = next(iter(re.findall(r"^#+ (.+)$", text, re.M)[-1:]), heading)
                text = self.equations(mentions(text), number, counter)
                text = re.sub(
                    r"(<details><summary>.*?</summary>)(.*?)</details>", r"\1\n\n\2\n\n</details>", text, flags=re.S
                )
                cell["source"] = self.links(text, "notebooks")
                continue
            cell["source"] = text.removeprefix("# NBVAL_CHECK_OUTPUT\n")  # a word to a tool, not to a reader
            for out in cell["outputs"]:
                data = out.get("data", {})
                if data.pop("application/vnd.jupyter.widget-view+json", None):
                    data["text/plain"] = "(A control of the running notebook: open it in JupyterLab.)"
                if "image/png" in data:
                    pictures += 1
                    saved = re.findall(r'"(\d\d[a-z]?_\w+)"', text)
                    title = f"Figure {number}.{pictures}"
                    caption = f"**{title}.** {heading}" + (f" (`{saved[-1]}`)" if saved else "")
                    figure = {"caption": caption, "name": f"figure-{number}-{pictures}"}
                    cell["metadata"]["mystnb"] = {"figure": figure, "image": {"alt": f"{title}: {heading}"}}
        which = "of the last `make reproduce` here" if shown != path else "as committed"
        notebook["cells"][0]["source"] += f"\n\n*Outputs: {which}.*"
        self.write(f"notebooks/{path.name}", json.dumps(notebook, indent=1, ensure_ascii=False))

    def equations(self, text: str, notebook: str, counter: list[int]) -> str:
        """Displayed equations get an anchor each, and a number: the paper's where the notebook has it in a tag, else notebook.count."""

        def numbered(found: re.Match[str]) -> str:
            counter[0] += 1
            name, body = f"equation-{notebook}-{counter[0]}", found[1].strip()
            tags = TAG.findall(body)
            for low, high in RANGE.findall(",".join(tags)):
                for k in range(int(low), int(high or low) + 1):
                    self.numbers[notebook][k] = name
            body = TAG.sub("", body)
            tag = tags[0] if tags else f"{notebook}.{counter[0]}"
            return f"\n({name})=\n\\begin{{equation*}}\n{body} \\tag{{{tag}}}\n\\end{{equation*}}\n"

        return DISPLAY.sub(numbered, text)

    def ledger(self, text: str) -> str:
        """EQUATIONS.md: where a notebook shows an equation under the paper's number, its link lands there."""

        def landed(found: re.Match[str]) -> str:
            entry, between, number, file = found.groups()
            shown = self.numbers.get(number, {})
            low, high = (RANGE.findall(entry) if entry.startswith("(") else [("0", "")])[0]
            hit = next((shown[k] for k in range(int(low), int(high or low) + 1) if k in shown), None)
            return f"**{entry}**{between}notebook [{number}]({'#' + hit if hit else file})"

        entry = r"\*\*([^*\n]+)\*\*( · (?:(?!\n\*\*).)*?)notebook \[(\w+)\]\(([^)]+)\)"
        return re.sub(entry, landed, text, flags=re.S)

    # -- sources -------------------------------------------------------------------------------------------------------

    def listing(self, path: str) -> None:
        """A source file as a page, a part for each class and function."""
        text = (ROOT / path).read_text("utf-8")
        copy = self.source / "listings" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, "utf-8")
        language = {".py": "python", ".yml": "yaml", ".toml": "toml", ".json": "json", ".cff": "yaml"}
        kind = "makefile" if path == "Makefile" else language.get(Path(path).suffix, "text")
        begins = definitions(text) if path.endswith(".py") else {}
        lines = [f"({anchor(path)})=", f"# `{path}`", ""]
        marks = sorted((line, depth, name) for name, (depth, line) in begins.items())
        rows = text.splitlines() or [""]
        for k, (line, depth, name) in enumerate([(1, 0, ""), *marks]):
            end = marks[k][0] - 1 if k < len(marks) else len(rows)
            while end > line and not rows[end - 1].strip():
                end -= 1
            if name:
                lines += [f"({anchor(path, name)})=", *([f"## `{name}`"] if not depth else []), ""]
            if end >= line:
                options = [f":language: {kind}", f":lines: {line}-{end}", ":lineno-match:", ":class: listing"]
                lines += [f"```{{literalinclude}} /listings/{path}", *options, "```", ""]
        self.write(f"source/{path}.md", "\n".join(lines))

    # -- pages made from results ---------------------------------------------------------------------------------------

    def record(self, name: str) -> Any:
        """A results file; None, and a word at the end of the build, where it is not there."""
        path = output("results") / name
        if path.exists():
            return json.loads(path.read_text("utf-8"))
        self.missing.append(f"results/{name}")
        return None

    def benchmarks(self, text: str) -> str:
        """docs/benchmarks.md with the table and the paragraph of a GPU as the results files have them now."""
        figures, gpu = self.record("bench.json"), self.record("gpu.json")
        if figures:
            text = re.sub(r"(\|[^\n]*\|\n)+", lambda _: bench.table(figures["figures"]) + "\n", text, count=1)
        return (
            re.sub(r"(## On a GPU\n\n).*", lambda m: m[1] + bench.on_a_gpu(gpu) + "\n", text, flags=re.S)
            if gpu
            else text
        )

    def generated(self) -> None:
        """Faults survived, random networks, a GPU: as results/*.json have them."""
        rows = self.record("faults.json") or []
        self.write(
            "faults.md",
            "# Faults survived\n\nWhat was done to the project by a test, what happened, and what was kept (`results/faults.json`, written by the tests).\n\n"
            + (
                table(
                    ("fault", "what happened", "what was kept"), [[r["fault"], r["happened"], r["kept"]] for r in rows]
                )
                if rows
                else ABSENT
            )
            + "\n",
        )
        fuzz = self.record("fuzz.json")
        text = ABSENT
        if fuzz:
            found = "\n".join(f"- {f}" for f in fuzz["findings"]) or "None of them differed."
            text = (
                f"{fuzz['networks']:,} random networks in {fuzz['seconds']:,} seconds (torch {fuzz['torch']}, commit {fuzz['commit']}), every answer compared "
                f"with dense matrices. {found}\n\nA call with the name of an error or a warning behind it ended with that, as it should have.\n\n"
                + table(("call", "times"), [(name, f"{n:,}") for name, n in fuzz["calls"].items()])
            )
        self.write("fuzz.md", f"# Random networks\n\n`make fuzz` (`results/fuzz.json`).\n\n{text}\n")

    def claims(self) -> None:
        """The report as a page, with the figures as files beside it."""
        folder = self.source / "extra" / "figures"
        folder.mkdir(parents=True)
        for path in NOTEBOOKS.glob("[0-9]*.ipynb"):
            self.record(f"{number_of(path)}.json")
            for picture in figures(number_of(path)):
                shutil.copyfile(picture, folder / picture.name)
        page = "# Every claim, measured\n\n"
        for title, body in parts(NOTEBOOKS, BUILD, lambda path: f"figures/{path.name}"):
            page += (f"## {title}\n\n" if title else "") + f"```{{raw}} html\n{body}\n```\n\n"
        self.write("claims.md", page)


ABSENT = "*There are no results yet.*"


def assemble(source: Path = SOURCE) -> Assembly:
    """Write the book's sources."""
    shutil.rmtree(source, ignore_errors=True)
    book = Assembly(source)
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        book.notebook(path)
    docs = ROOT / "docs"
    for path in sorted(docs.rglob("*")):
        name = path.relative_to(docs).as_posix()
        if path.suffix == ".md":
            text = path.read_text("utf-8")
            text = book.benchmarks(text) if name == "benchmarks.md" else text
            book.write(name, mentions(book.links(text, f"docs/{Path(name).parent}")))
        elif path.suffix in (".py", ".bib", ".css", ".svg"):
            book.write(name, path.read_text("utf-8"))
    for origin, name in PAGES.items():
        if name not in ("index.md", *MADE):  # the README is the front page elsewhere; the book has its own
            text = (ROOT / origin).read_text("utf-8")
            text = book.ledger(text) if name == "equations.md" else text
            book.write(name, book.links(text, str(Path(origin).parent)))
    book.generated()
    book.claims()
    for path in sorted(book.linked):
        book.listing(path)
    files = "\n".join(f"/source/{path}" for path in sorted(book.linked))
    book.write(
        "sources.md",
        f"# Sources\n\nThe files that pages of this book lead to, as they were when it was built.\n\n```{{toctree}}\n:maxdepth: 1\n\n{files}\n```\n",
    )
    return book


def build() -> int:
    """Assemble and run Sphinx; a warning is an error. Pages of before are removed: each of them is written anew."""
    shutil.rmtree(BUILD / "book", ignore_errors=True)
    book = assemble()
    options = ["-b", "html", "-W", "--keep-going", "-n", "-q", "-d", BUILD / "book" / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, SOURCE, HTML]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status == 0:  # the download button gives the notebook itself, without what was added here
        for path in (SOURCE / "notebooks").glob("*.ipynb"):
            shutil.copyfile(executed(NOTEBOOKS / path.name), HTML / "_sources" / "notebooks" / path.name)
        print(f"the book: {(HTML / 'index.html').relative_to(ROOT)}")
    if book.missing:
        print(f"not in the book: {', '.join(sorted(set(book.missing)))} (make reproduce makes those of the notebooks)")
    return status


if __name__ == "__main__":
    if sys.argv[1:] == ["assemble"]:
        assemble()
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        sys.exit(build())
