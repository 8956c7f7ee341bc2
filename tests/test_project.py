"""The project's own promises: pins in step, every equation's test exists, notebooks are clean, the README's example runs."""

import ast
import doctest
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from functools import cached_property
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image

import hinv
from hinv.companion import bench

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *NOTEBOOKS]
EXAMPLES = [page for page in PAGES if page.suffix == ".md" and "```pycon" in page.read_text()]


def pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_requirements_are_exact_and_in_the_ranges_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {Requirement(text).name for text in project["dependencies"]} == {"torch", "numpy", "scipy", "tqdm"}
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    ranges = [Requirement(text) for group in groups for text in group]
    exact = {}
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        exact[pin.name.lower()] = specifier.version
    assert {r.name.lower() for r in ranges} == set(exact)
    for r in ranges:
        assert r.specifier.contains(exact[r.name.lower()], prereleases=True), (r, exact[r.name.lower()])


def test_environment_reads_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.txt", "-e ."]
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.removeprefix("python="))


def test_everything_imported_is_pinned():
    names = {
        "PIL": "pillow",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
        "packaging": "pytest",
        "IPython": "ipykernel",
        "backpack": "backpack-for-pytorch",
        "curvlinops": "curvlinops-for-pytorch",
        "hessian_eigenthings": "hessian-eigenthings",
        "laplace": "laplace-torch",
        "pytorch_optimizer": "pytorch-optimizer",
    }
    sources = [path.read_text() for folder in ("hinv", "tests") for path in (ROOT / folder).rglob("*.py")]
    sources += [
        "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code") for path in NOTEBOOKS
    ]
    used = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                used.add(node.module.split(".")[0])
    third_party = used - set(sys.stdlib_module_names) - {"hinv"} - {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert {names.get(n, n) for n in third_party} <= {pin.name.lower() for pin in pins()}


def ledger():
    """(equation, function, its file, test, its file, notebook) of every entry."""
    entry = r"\*\*(.+?)\*\* · .*?\[`(.+?)`\]\((.+?)\) · \[`(.+?)`\]\((.+?)\) · notebook \[\w+\]\((.+?)\)"
    return re.findall(entry, (ROOT / "EQUATIONS.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("row", ledger(), ids=lambda row: f"{row[0]}: {row[1]}")
def test_ledger_row(row):
    _, function, source, test, path, notebook = row
    thing = pkgutil.resolve_name(function)
    assert callable(thing) or isinstance(thing, property | cached_property)
    assert re.search(rf"(def|class) {function.rpartition('.')[2]}\b", (ROOT / source).read_text())
    assert f"def {test}(" in (ROOT / path).read_text()
    assert ROOT / notebook in NOTEBOOKS


def test_ledger_covers_the_published_equations():
    cited = " ".join(row[0] for row in ledger())
    assert len(ledger()) >= 24
    labels = ("eq:backprop", "eq:gradient-matrix-form", "eq:hessian", "eq:unified-system", "eq:K-pivoted", "eq:P")
    for label in (*labels, "alg:hessian_inverse", "sec:pearlmutter"):
        assert label in cited


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_clean(path):
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), "run it top to bottom"
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert not re.search(r"/(home|root|tmp|work|Users)/|site-packages", text), "a path of one machine"
    parameters = [c.source for c in code if "parameters" in c.metadata.get("tags", [])]
    assert len(parameters) == 1 and parameters[0].startswith("profile = ")
    first = notebook.cells[0].source
    for word in ("**Question.**", "**Answer.**", "**Needs**", "**Makes**", "**Runs**", "**Reading time**"):
        assert word in first
    assert max(len(c.source.splitlines()) for c in code) <= 20
    prose = " ".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert not re.search(r"\bthe plan\b", prose), "a notebook speaks of its subject alone"
    assert "claims.write()" in "".join(c.source for c in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_compared_outputs_hold_no_measured_digits(path):
    """Only bounds, counts and names: nothing a second machine could change."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "NBVAL_CHECK_OUTPUT" in cell.source:
            for out in cell.outputs:
                assert out.output_type == "stream", "compare printed lines only"
                for line in out.text.splitlines():
                    assert line.startswith(("ok: ", "SingularQError with nullity ")), line
                    assert not re.search(r"\d\.\d{5,}", line), line


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_print_what_they_say(page, unenforced):
    """All `pycon` blocks of a page, one after the other, as a reader pastes them."""
    blocks = re.findall(r"```pycon\n(.*?)```", page.read_text(), re.S)
    example = doctest.DocTestParser().get_doctest("".join(blocks), {}, page.stem, str(page), 0)
    assert len(example.examples) >= 6
    assert doctest.DocTestRunner().run(example).failed == 0


def test_what_the_guide_shows_runs(unenforced, monkeypatch, tmp_path):
    """All `python` blocks of docs/guide.md, one after the other, on a small network; its training run on fewer images and steps."""
    monkeypatch.setenv("HINV_RUNS", str(tmp_path))
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.S))
    long = 'dataset="cifar10", images=10_000, side=16, steps=150, test=2000'
    assert code.count("```") == 0 and code.count(long) == 1 and code.count('"4"') == 2
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=draw).double()
    model, loss, y = hinv.tall_skinny([5, 6, 6, 3]), torch.nn.CrossEntropyLoss(), x[:, :3].argmax(1)
    descent = hinv.optim.GaussNewton(model, loss, search=True)
    for _ in range(5):  # until H + 0.01 I is positive definite
        descent.step(x, y)
    H = hinv.Hessian(model, loss, x, y)
    given = {"hinv": hinv, "torch": torch, "model": model, "loss": loss, "x": x, "y": y, "H": H, "b": H.gradient}
    given |= {"x_new": x[:4] + 0.1, "x_test": x[:4] + 0.1, "y_test": y[:4], "points": x[:, :2]}
    given |= {"loader": [(x[:40], y[:40]), (x[40:], y[40:])]}
    given["la"] = types.SimpleNamespace(model=model, prior_precision=torch.tensor(1.0))  # as laplace-torch's
    exec(code.replace(long, 'dataset="digits", steps=3, test=100'), given)
    assert given["run"].reached(10.0, "probe_loss") is not None and given["posterior"].prior_precision > 0
    assert given["pairs"].certified and given["jet"].shape == (64, 4, 1)


def test_readme_fits_a_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 85


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """Every relative link of a page, and of the notebooks' prose, to a file that is there."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#", "mailto")):
            assert (path.parent / target.split("#")[0]).exists(), target


def test_the_page_of_benchmarks_shows_the_measured_figures():
    page, figures = (
        (ROOT / "docs" / "benchmarks.md").read_text(),
        json.loads((ROOT / "results" / "bench.json").read_text())["figures"],
    )
    table = bench.table(figures)
    assert table in page, "replace the table of docs/benchmarks.md by:\n" + table
    gpu = bench.on_a_gpu(json.loads((ROOT / "results" / "gpu.json").read_text()))
    assert gpu in page, "replace the paragraph of docs/benchmarks.md by:\n" + gpu
    for name, figure in figures["7 against SuperLU on K"].items():
        assert figure["reached"] == (figure["ratio"] >= figure["target"]), name


def test_the_figures_of_a_gpu_are_taken_right(tmp_path, monkeypatch):
    """The script that runs where there is a GPU, here on the CPU with its clock stilled and everything small."""
    from hinv.companion.bench import device

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(device, "SIX", {"small": ((6, 5, 5, 4), 5)})
    monkeypatch.setenv("HINV_DATA", str(tmp_path))
    for label in ("a", "b"):
        folder = tmp_path / "cifar10-images" / "train" / label
        folder.mkdir(parents=True)
        for k in range(6):
            Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                folder / f"{k}.png"
            )
    here = torch.device("cpu")
    assert device.rate(here, 64) > 0
    row = device.six(here)["small"]
    assert row["as_on_the_host"] and row["residual"] < 1e-12 and abs(row["logdet_minus_host"]) < 1e-9
    flag = device.flagship(here, images=10, layers=4, width=3)
    assert flag["data"] == "cifar10-images" and flag["parameters"] == 195 + 3 * 12 + 40
    for damping in ("1", "0.1"):
        at = flag[f"damping {damping}"]
        assert at["residual"] < 1e-12 and sum(at["inertia"]) == flag["parameters"] and sum(at["kinds"].values()) == 5
        assert at["float32"]["residuals"][0] > 1e-9 > 1e-13 > at["float32"]["residuals"][-1]
    found = device.equation(here, inside=60, edge=20, steps=3)
    assert found["points"] == 80 and found["parameters"] == 9873 and 0 < found["error"] < 2


def test_readme_lists_every_notebook_and_figure():
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme
    for figure in re.findall(r"\]\((\S+\.png)\)", readme):
        assert (ROOT / figure).exists()


def test_wheel_outside_the_source_tree(tmp_path):
    """Built by way of the sdist, so that nothing of the working tree but what is declared gets in."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--quiet", "--outdir", tmp_path / "dist", ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    installed = {path.relative_to(tmp_path / "site" / "hinv") for path in (tmp_path / "site" / "hinv").rglob("*.py")}
    assert installed == {path.relative_to(ROOT / "hinv") for path in (ROOT / "hinv").rglob("*.py")}
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONWARNINGS": "ignore"}
    smoke = [sys.executable, ROOT / "tests" / "smoke.py"]
    out = subprocess.run(smoke, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert out.startswith("hinv 0.1.0 with torch ") and out.endswith("all right\n")


def test_upkeep_files_agree():
    """Version and license are said once more in CITATION.cff and CHANGELOG.md; CI calls the make targets that exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"] == hinv.__version__
    assert citation["license"] == project["license"] == "MIT" and "MIT License" in (ROOT / "LICENSE").read_text()
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for job in yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values():
        for step in job["steps"]:
            for target in re.findall(r"make (\w+)", step.get("run", "")):
                assert re.search(rf"^{target}:.*##", makefile, re.M), target


@pytest.fixture
def makeable(tmp_path):
    """The Makefile with a stand-in for Python that writes down what it was asked and makes what it should."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "hinv").mkdir()
    for name in ("00_map", "01_a", "02_b"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text("{}")
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "hinv" / "paper.py").write_text("")
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
echo "$@" >> log
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  *"reproduce parameters"*) mkdir -p build/notebooks; printf '%s' "$*" > new; cmp -s new build/parameters.json || cp new build/parameters.json;;
  *"reproduce run"*) touch build/notebooks/$(basename "$4");;
esac
"""
    )
    python.chmod(0o755)

    def make(*arguments):
        (tmp_path / "log").write_text("")
        command = ["make", "-s", f"PYTHON={python}", *arguments]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        subprocess.run(command, cwd=tmp_path, check=True, env=environment)
        return (tmp_path / "log").read_text()

    def age():
        """Everything an hour older, so that what changes next is newer for certain."""
        for path in tmp_path.rglob("*"):
            stat = path.stat()
            os.utime(path, (stat.st_atime - 3600, stat.st_mtime - 3600))

    return tmp_path, make, age


def test_make_sets_up_once_and_runs_only_what_changed(makeable):
    folder, make, age = makeable
    runs = lambda log: re.findall(r"reproduce run notebooks/(\d\d)", log)
    first = make("reproduce")
    assert first.count("pip install") == 2 and "reproduce report" in first
    assert sorted(runs(first)) == ["00", "01", "02"] and runs(first)[-1] == "00"  # two at a time, the map last
    age()
    again = make("reproduce")
    assert "pip install" not in again and runs(again) == [] and "reproduce report" in again
    (folder / "notebooks" / "02_b.ipynb").write_text("{ }")
    assert runs(make("reproduce")) == ["02", "00"]
    age()
    (folder / "hinv" / "paper.py").write_text("x = 1")
    assert sorted(runs(make("reproduce"))) == ["00", "01", "02"]
    age()
    assert sorted(runs(make("reproduce", "PARAMS=seed=1"))) == ["00", "01", "02"]
    age()
    (folder / "requirements.txt").write_text("torch==1.0\n")
    assert "pip install" in make("setup")
    age()
    test = make("test")
    assert "ruff check" in test and "ty check" in test and "pytest" in test and "nbval" in test
    assert "pip install" not in test
    assert "nbval" not in make("check")
