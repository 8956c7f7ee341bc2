"""The book before Sphinx sees it: where links land, which number an equation gets, and that tables are those of the results files."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from hinv.companion import book, report
from hinv.companion.checks import output

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = {"04": [3.5e-13, 39, 2.0], "08a": [7.25e-9, 1e-3, 4]}  # two notebooks' measured values


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Results and figures of two notebooks that ran, 04 and 08a, the second with a claim that failed."""
    monkeypatch.setenv("HINV_OUTPUT", str(tmp_path))
    notebooks, build = tmp_path / "notebooks", tmp_path / "build"
    (build / "notebooks").mkdir(parents=True)
    notebooks.mkdir()
    for number, values in CLAIMS.items():
        first = f"# {number} · Title of {number}\n**Question.** Why is $H_{{{number}}}^{{-1}}$ & `so` easy?\n\n**Answer.** It is."
        cells = [nbformat.v4.new_markdown_cell(first)]
        for folder in (notebooks, build / "notebooks"):
            nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{number}_topic.ipynb")
        claims = [
            {"statement": f"claim {k} < {number}", "equation": "(9)", "measured": v, "relation": "<=", "bound": 1.5e-3,
             "passed": v <= 1.5e-3}
            for k, v in enumerate(values)
        ]  # fmt: skip
        record = {
            "notebook": number, "data": "digits", "profile": "quick", "seed": 3, "dtype": "float64", "device": "cpu", "commit": "abc",
            "versions": {"python": "3.11", "torch": "2.14"}, "machine": {"processor": "Some CPU", "cores": 2, "threads": 1}, "claims": claims,
        }  # fmt: skip
        (output("results") / f"{number}.json").write_text(json.dumps(record))
        (output("figures") / f"{number}_plot.png").write_bytes(b"png of " + number.encode())
    return notebooks, build


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_shows_the_plots_of_every_notebook(project, capsys):
    """08a's, which a pattern of two digits left out."""
    notebooks, build = project
    assert report.write(notebooks, build) is False
    page, printed = (build / "report.html").read_text(), capsys.readouterr().out
    for number in CLAIMS:
        assert f"alt='{number}_plot'" in page
        assert (
            f"{number}: data digits; quick, seed 3, float64 on cpu, commit abc; python 3.11, torch 2.14; Some CPU"
            in printed
        )
        assert "Some CPU, 2 cores, 1 BLAS threads" in page
    assert "src='data:image/png;base64," in page and "<script src" not in page and "http" not in page


def test_what_failed_comes_first_and_claims_stand_by_notebook(project):
    found = report.parts(*project, lambda path: path.name)
    assert [title for title, _ in found] == ["", "What failed", "04 · Title of 04", "08a · Title of 08a", ""]
    failed, chapters = found[1][1], [body for _, body in found[2:4]]
    assert re.findall(r"<td>(claim [^<]+)</td>", failed) == ["claim 1 &lt; 04", "claim 2 &lt; 04", "claim 2 &lt; 08a"]
    assert failed.count("<tr class='fail'>") == 3 and "href='#claims-08a'" in failed
    for (number, values), body in zip(CLAIMS.items(), chapters, strict=True):
        assert re.findall(r"<td class='number'>([^<≤]*)</td>", body) == [report.number(v) for v in values]
        assert f"src='{number}_plot.png'" in body and body.count(".png'>") == 2  # a link and a picture
        assert (
            f"<p class='question'>Why is <i>H_{{{number}}}<sup>&minus;1</sup></i> &amp; <code>so</code> easy?</p>"
            in body
        )


def test_numbers_neither_wrap_nor_dance(project):
    page = report.parts(*project, lambda path: path.name)[0][1]
    assert re.search(r"\.claims \.number\{[^}]*white-space:nowrap;font-variant-numeric:tabular-nums", page)


def test_a_stray_notebook_is_no_matter(project):
    notebooks, build = project
    for name in ("Untitled.ipynb", "04_topic-Copy1.ipynb"):
        shutil.copy(notebooks / "04_topic.ipynb", notebooks / name)
    assert report.write(notebooks, build) is False
    page = (build / "report.html").read_text()
    assert "04_topic-Copy1.ipynb ran but" in page or "04_topic-Copy1.ipynb did not run" in page
    assert "Untitled" not in page


def test_no_results_are_said_to_be_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HINV_OUTPUT", str(tmp_path))
    found = report.parts(ROOT / "notebooks", tmp_path / "build", lambda path: path.name)
    assert "No notebook has left results here yet: make reproduce runs them." in found[0][1]
    assert "What failed" not in [title for title, _ in found]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_titles_and_questions_are_readable_without_mathematics(path):
    title, question = report.opening(path)
    assert title.startswith(report.number_of(path)) and question.endswith("?")
    for text in (report.mathematics(title), report.mathematics(question)):
        assert not re.search(r"[$\\`]|\*|\^", text), text


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def assembly(tmp_path, monkeypatch):
    """Of a project where no notebook has been run."""
    monkeypatch.setattr(book, "BUILD", tmp_path / "build")
    return book.Assembly(tmp_path / "source")


@pytest.mark.parametrize(
    "link, folder, expected",
    [
        ("[a](EQUATIONS.md)", ".", "[a](/equations.md)"),
        ("[a](models.md#limits)", "docs", "[a](/models.md#limits)"),
        ("[00](../notebooks/00_map.ipynb)", "docs", "[00](/notebooks/00_map.ipynb)"),
        ("[how fast](../docs/benchmarks.md)", "notebooks", "[how fast](/benchmarks.md)"),
        ("[x](https://example.org/a.py)", ".", "[x](https://example.org/a.py)"),
        ("[x](../results/faults.json)", "docs", "[x](/faults.md)"),
        ("[the file](hinv/solve.py)", ".", "[the file](#src-hinv-solve-py)"),
        ("[`hinv.solve.solve`](hinv/solve.py)", ".", "[`hinv.solve.solve`](#src-hinv-solve-py-solve)"),
        ("[`hinv.paper.Matrices.K`](hinv/paper/matrices.py)", ".", "[`hinv.paper.Matrices.K`](#src-hinv-paper-matrices-py-class-matrices-k)"),
        ("```\n[a](EQUATIONS.md)\n```", ".", "```\n[a](EQUATIONS.md)\n```"),
    ],
)  # fmt: skip
def test_a_link_lands_in_the_book(assembly, link, folder, expected):
    assert assembly.links(link, folder) == expected


def test_a_broken_link_stops_the_build(assembly):
    with pytest.raises(FileNotFoundError, match=r"\[a\]\(nowhere.md\) in docs: there is no docs/nowhere.md"):
        assembly.links("[a](nowhere.md)", "docs")


def test_the_source_of_a_linked_function_begins_where_it_is_defined(assembly):
    assembly.listing("tests/test_paper.py")
    page = (assembly.source / "source/tests/test_paper.py.md").read_text()
    name = "test_P_shifts_down"
    found = re.search(
        rf"\({book.anchor('tests/test_paper.py', name)}\)=\n## `{name}`\n\n.*?:lines: (\d+)-(\d+)\n", page, re.S
    )
    lines = (ROOT / "tests/test_paper.py").read_text().splitlines()[int(found[1]) - 1 : int(found[2])]
    assert lines[0].startswith(("@", f"def {name}")) and any(f"def {name}(" in line for line in lines)
    starts = [tuple(map(int, pair)) for pair in re.findall(r":lines: (\d+)-(\d+)", page)]
    assert all(a <= b < c for (a, b), (c, _) in pairwise(starts))  # every line once


# -- notebooks ---------------------------------------------------------------------------------------------------------


def test_equations_keep_the_papers_numbers_and_get_the_books(assembly):
    assembly.numbers["01"] = {}
    text = assembly.equations("a\n$$x\n= 1 \\tag{2–5, eq:backprop}$$\nb\n\n$$y$$", "01", [0])  # noqa: RUF001
    assert "(equation-01-1)=\n\\begin{equation*}\nx\n= 1 \\tag{2–5, eq:backprop}\n\\end{equation*}" in text  # noqa: RUF001
    assert "(equation-01-2)=\n\\begin{equation*}\ny \\tag{01.2}\n\\end{equation*}" in text and "$$" not in text
    assert assembly.numbers["01"] == dict.fromkeys(range(2, 6), "equation-01-1")
    entry = "**(2–5) eq:backprop** · $b$\n\n$$b$$\n\n[`f`](f.py) · notebook [01](notebooks/01_backpropagation.ipynb)"  # noqa: RUF001
    assert assembly.ledger(entry).endswith("notebook [01](#equation-01-1)")
    other = entry.replace("(2–5)", "(8)")  # noqa: RUF001
    assert assembly.ledger(other) == other


def test_an_executed_notebook_is_shown_unless_the_committed_one_is_newer(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "BUILD", tmp_path)
    path, made = tmp_path / "01_a.ipynb", tmp_path / "notebooks" / "01_a.ipynb"
    path.write_text("{}")
    assert book.executed(path) == path
    made.parent.mkdir()
    made.write_text("{}")
    assert book.executed(path) == made
    os.utime(path, (made.stat().st_mtime + 1,) * 2)
    assert book.executed(path) == path


def test_a_notebook_gets_captions_and_loses_nothing(assembly):
    path = ROOT / "notebooks" / "01_backpropagation.ipynb"
    assembly.notebook(path)
    before, after = (nbformat.read(p, 4) for p in (path, assembly.source / "notebooks" / path.name))
    assert [len(c.get("outputs", [])) for c in before.cells] == [len(c.get("outputs", [])) for c in after.cells]
    pictures = [c for c in after.cells if any("image/png" in o.get("data", {}) for o in c.get("outputs", []))]
    (shown,) = (c.metadata.mystnb.figure for c in pictures)
    assert (
        shown.name == "figure-01-1"
        and shown.caption.startswith("**Figure 01.1.** ")
        and "01_bidiagonal" in shown.caption
    )
    prose = "".join(c.source for c in after.cells if c.cell_type == "markdown")
    assert (
        re.findall(r"\\tag\{(.*?)\}", prose)[:2] == ["01.1", "01.2"] and "([02](/notebooks/02_hessian.ipynb))" in prose
    )
    assert "*Outputs: " in after.cells[0].source
    assert "<summary>Answer</summary>\n\n" in "".join(
        c.source for c in after.cells
    )  # so that mathematics in it is rendered


def test_notebooks_called_by_number_are_linked():
    two = "[02](/notebooks/02_hessian.ipynb)"
    eleven = "[11](/notebooks/11_posterior.ipynb)"
    assert book.mentions("as in 02, (02) and notebook 11.") == f"as in {two}, ({two}) and notebook {eleven}."
    for text in (
        "# 02 · Title",
        "`results/02.json` $02$ `02`",
        "1e-02 and 0.02, v3.02",
        "equations (10, 11)",
        "notebook 99",
        "[02](x)",
    ):
        assert book.mentions(text) == text


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables_hold_exactly_the_numbers_of_the_results_files(tmp_path, monkeypatch):
    """Everything assembled, from results that no page was written for."""
    monkeypatch.setenv("HINV_OUTPUT", str(tmp_path))
    shown = {
        name: json.loads((ROOT / "results" / name).read_text())
        for name in ("bench.json", "gpu.json", "fuzz.json", "faults.json")
    }
    shown["bench.json"]["figures"]["5 a thousand classes"]["ratio"] = 77.77
    shown["gpu.json"]["device"] = "Another Device"
    shown["fuzz.json"] |= {"networks": 123456, "calls": {"solve": 98765}}
    shown["faults.json"] = [{"fault": "lightning", "happened": "thunder", "kept": "the house"}]
    for name, record in shown.items():
        (output("results") / name).write_text(json.dumps(record))
    assembled = book.assemble(tmp_path / "source")
    page = lambda name: (assembled.source / name).read_text()
    assert "1000 classes instead of 10: times the cost | at most 1.5 | 77.77 |" in page("benchmarks.md")
    assert "Another Device" in page("benchmarks.md") and page("benchmarks.md").count("## On a GPU") == 1
    assert "123,456 random networks" in page("fuzz.md") and "| solve | 98,765 |" in page("fuzz.md")
    assert page("faults.md").endswith("| lightning | thunder | the house |\n")
    assert [line for line in assembled.missing if line.startswith("results/0")], "no notebook has run: it is said"
    assert "make reproduce runs them" in page("claims.md")
    for path in assembled.source.rglob("*.md"):  # nothing leads out of the book
        if "source" not in path.relative_to(assembled.source).parts[:1]:
            assert not re.search(
                r"\]\((?!https?:|/|#|mailto:)[^)]*\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
            ), path


def test_the_script_for_several_processes_runs(tmp_path):
    """docs/howto/processes.md, as a reader saves and starts it."""
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/howto/processes.md").read_text(), re.S)
    (tmp_path / "shares.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "shares.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^2 processes: \d+ positive, 0 negative, \d+ zero; loss fell: True$", out, re.M), out
