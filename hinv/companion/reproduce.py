"""What `make reproduce` calls: run one notebook through papermill, write the parameters, make the table of claims.

python -m hinv.companion.reproduce parameters profile=quick seed=1   check against the notebooks, write build/parameters.json if changed
python -m hinv.companion.reproduce run notebooks/01_backprop.ipynb   execute into build/notebooks/
python -m hinv.companion.reproduce report                            table of all claims, build/report.html; exit status 1 on a failure
"""

import ast
import json
import sys
import time
from pathlib import Path
from typing import Any

import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from hinv.companion.checks import ROOT, alone, output, write_atomically
from hinv.companion.report import number_of, results, write

NOTEBOOKS, BUILD = ROOT / "notebooks", ROOT / "build"
PROFILES = ("quick", "full")


class PlainProgress(NBClientEngine):
    """papermill's engine with a plain line for each cell instead of a progress bar."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, *args: Any, **kwargs: Any) -> Any:
        complete, started, done = nb_man.cell_complete, time.monotonic(), 0
        name = Path(kwargs.pop("input_path", "notebook")).stem
        total = sum(cell.cell_type == "code" for cell in nb_man.nb.cells)

        def report(cell: Any, cell_index: int | None = None, **rest: Any) -> None:
            nonlocal done
            complete(cell, cell_index, **rest)
            if cell.cell_type == "code":
                done += 1
                elapsed = time.monotonic() - started
                left = elapsed / done * (total - done)
                print(f"{name}: cell {done} of {total}, {elapsed:.0f} s, about {left:.0f} s left", flush=True)

        nb_man.cell_complete = report
        return super().execute_managed_notebook(nb_man, kernel_name, *args, **kwargs)


papermill_engines.register("plain", PlainProgress)


def known_parameters(notebook: Path) -> set[str]:
    return set(papermill.inspect_notebook(str(notebook)))


def write_parameters(pairs: list[str], path: Path | None = None) -> dict[str, Any]:
    """Check name=value pairs against the notebooks' parameter cells; write the file only if it changes (make looks at its date).

    Raises:
        ValueError: a pair without "=", a parameter no notebook has, an unknown profile.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} is not name=value")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    known = {n: known_parameters(n) for n in sorted(NOTEBOOKS.glob("*.ipynb"))}
    for name in values:
        if not any(name in names for names in known.values()):
            every = ", ".join(sorted(set().union(*known.values())))
            raise ValueError(f"no notebook has a parameter {name!r}; they have: {every}")
    if values.get("profile", "quick") not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, not {values['profile']!r}")
    for notebook in known:  # an executed notebook without its results must run again
        if not results(output("results") / f"{number_of(notebook)}.json")["claims"]:
            (BUILD / "notebooks" / notebook.name).unlink(missing_ok=True)
    path = path or BUILD / "parameters.json"
    text = json.dumps(values, indent=1, sort_keys=True)
    if not path.exists() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return values


def run(notebook: Path, parameters: dict[str, Any] | None = None, build: Path | None = None) -> Path:
    """Execute a notebook into build/notebooks/. One that fails is kept as NN_name.failed.ipynb with its traceback.

    Raises:
        ValueError: a parameter the notebook does not have.
        PapermillExecutionError: a cell failed. nbclient.exceptions.DeadKernelError: the kernel died.
    """
    parameters = parameters or {}
    unknown = set(parameters) - known_parameters(notebook)
    if unknown:
        raise ValueError(
            f"{notebook.name} has no parameter {', '.join(sorted(unknown))}; it has {', '.join(sorted(known_parameters(notebook)))}"
        )
    folder = (build or BUILD) / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    done, failed = folder / notebook.name, folder / f"{notebook.stem}.failed.ipynb"
    working = folder / f"{notebook.stem}.running.ipynb"
    with alone(folder / f"{notebook.stem}.lock", f"running {notebook.name}") as waited:
        if waited and done.exists():
            return done
        for stale in (done, failed, output("results") / f"{number_of(notebook)}.json"):
            stale.unlink(missing_ok=True)
        _execute(notebook, working, failed, parameters)
        working.replace(done)
    return done


def _execute(notebook: Path, working: Path, failed: Path, parameters: dict[str, Any]) -> None:
    try:
        options: dict[str, Any] = {
            "engine_name": "plain",
            "kernel_name": "python3",
            "progress_bar": False,
            "cwd": str(notebook.parent),
        }
        options["extra_arguments"] = ["--IPKernelApp.log_level=40"]  # its note on TCP transport is no news here
        papermill.execute_notebook(str(notebook), str(working), parameters, **options)
    except BaseException:  # a failed cell, a dead kernel, Ctrl-C: what was reached is kept
        if working.exists():
            working.replace(failed)
        raise


def report() -> bool:
    """The table of claims, printed and as build/report.html; whether all passed."""
    return write(NOTEBOOKS, BUILD)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["parameters", *pairs]:
            try:
                write_parameters(pairs)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
        case ["run", name]:
            notebook, file = Path(name).resolve(), BUILD / "parameters.json"
            try:
                wanted = json.loads(file.read_text("utf-8")) if file.exists() else {}
            except ValueError:
                print(f"error: {file} is damaged; make parameters writes it anew", file=sys.stderr)
                return 2
            try:
                run(notebook, {k: v for k, v in wanted.items() if k in known_parameters(notebook)})
            except (PapermillExecutionError, RuntimeError) as error:  # RuntimeError: the kernel died
                print(
                    f"{error}\nerror: {notebook.name} failed; kept with its traceback in build/notebooks/",
                    file=sys.stderr,
                )
                return 1
        case ["report"]:
            return 0 if report() else 1
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
