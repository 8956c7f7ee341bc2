"""The house: who may know whom, how large a room may be, what the public sees."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import hinv

PACKAGE = Path(hinv.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# from the ground up: a module knows those before it (and its own room); both rooms of one line stand side by side
FLOORS = [
    {"errors", "shapes", "html", "modes"},
    {"vectors", "ranks"},
    {"network"},
    {"paper", "solver"},
    {"solve", "spectrum"},
    {"curvature"},
    {"optim", "posterior"},
    {""},  # hinv/__init__.py
    {"companion"},
]
ONLY = {  # who alone may import what is heavy, or is an extra
    **{
        key: {f"companion/figures/{f}.py" for f in ("style", "structure", "curves", "explorer", "front")}
        for key in ("matplotlib", "seaborn")
    },
    "sklearn": {"companion/data.py"},
    **{key: {"companion/data.py", "companion/pictures.py"} for key in ("torchvision", "PIL")},
    "papermill": {"companion/reproduce.py"},
    "nbformat": {"companion/report.py"},
    "filelock": {"companion/checks.py"},
    **{key: {"companion/peers.py", "optim/monitor.py"} for key in ("pyhessian", "hessian_eigenthings")},
    "ipywidgets": {"companion/explorer.py"},
    "backpack": {"companion/peers.py"},
    "curvlinops": {"companion/peers.py", "companion/rivals.py", "spectrum/estimates.py", "spectrum/streamed.py"},
    "pytorch_optimizer": {"companion/training/config.py"},
    "jaxtyping": {"shapes.py"},
}


def room(module: str) -> str:
    """ "hinv.solver.parts.head" -> "solver"."""
    return ([*module.split("."), ""])[1]


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Absolute names of the modules a file imports, at any depth of its code."""
    package = ["hinv", *path.relative_to(PACKAGE).parent.parts]
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from hinv import solve" imports the room itself
            out += [(f"{module}.{alias.name}", node) for alias in node.names] if module == "hinv" else [(module, node)]
    return out


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix("__init__").strip(".")
    own = room(f"hinv.{name}")
    floor = {r: number for number, rooms in enumerate(FLOORS) for r in rooms}
    for module, node in imports(path):
        if module.split(".")[0] != "hinv":
            allowed = ONLY.get(module.split(".")[0])
            assert allowed is None or path.relative_to(PACKAGE).as_posix() in allowed, f"{path}:{node.lineno} {module}"
            continue
        other = room(module)
        assert other == own or floor[other] < floor[own], f"{path}:{node.lineno}: {own or 'hinv'} must not know {other}"


def test_the_rule_sees_what_it_forbids(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "solver").mkdir()
    path = tmp_path / "solver" / "factor.py"
    for line in (
        "from hinv.curvature import Hessian",
        "from hinv import curvature",
        "from ..curvature import Hessian",
        "import hinv.curvature",
    ):
        path.write_text(f"def late():\n    {line}\n")
        with pytest.raises(AssertionError, match="solver must not know curvature"):
            test_imports_go_down(path)
    path.write_text("import torchvision\n")
    with pytest.raises(AssertionError, match="torchvision"):
        test_imports_go_down(path)
    path.write_text("from .parts import parts\nfrom hinv.network import Chain\n")
    test_imports_go_down(path)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_file_and_no_class_outgrows_a_reader(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 200, node.name


def test_importing_the_library_loads_nothing_of_the_companion():
    heavy = (
        "matplotlib",
        "torchvision",
        "sklearn",
        "pandas",
        "PIL",
        "papermill",
        "curvlinops",
        "scipy.sparse.linalg",
        "hinv.companion",
    )
    code = f"import sys, hinv; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out == "[]\n"


# -- the public names and how they are called --------------------------------------------------------------------------


def signature(thing) -> str:
    """Parameters with their defaults, without types."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(thing).parameters.values()]
    return str(inspect.Signature(parameters))


def public() -> list[str]:
    """A line for each public name, and for each public method of a class."""
    lines = []
    for module in (hinv, hinv.jets, hinv.optim, hinv.paper, hinv.spectrum):
        for name in module.__all__:
            thing = getattr(module, name)
            full = f"{module.__name__.replace('hinv.network.', 'hinv.')}.{name}"  # where the public finds it
            if inspect.ismodule(thing):
                lines.append(full)
            elif inspect.isclass(thing):
                called = "" if issubclass(thing, Exception) else signature(thing)
                lines.append(f"{full}{called}")
                for method in dir(thing):
                    if (
                        method.startswith("_")
                        or (issubclass(thing, nn.Module) and hasattr(nn.Module, method) and method != "forward")
                        or issubclass(thing, Exception)
                        or (issubclass(thing, tuple) and hasattr(tuple, method))
                    ):
                        continue
                    value = inspect.getattr_static(thing, method)
                    value = value.__func__ if isinstance(value, staticmethod | classmethod) else value
                    lines.append(f"{full}.{method}{signature(value) if inspect.isfunction(value) else ''}")
            else:
                lines.append(f"{full}{signature(thing)}")
    return sorted(set(lines))


def test_the_public_interface_is_frozen():
    """tests/api.txt, a line a name. A change here is a change for users: say it in CHANGELOG.md, then write the file anew:
    python tests/test_house.py > tests/api.txt"""
    assert public() == (Path(__file__).parent / "api.txt").read_text().splitlines()


if __name__ == "__main__":
    print(*public(), sep="\n")
