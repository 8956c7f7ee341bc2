"""What `make reproduce` calls: run one notebook through papermill, write the parameters, make the table of claims.

python -m hinv.companion.reproduce parameters profile=quick seed=1   check against the notebooks, write build/parameters.json if changed
python -m hinv.companion.reproduce run notebooks/01_backprop.ipynb   execute into build/notebooks/
python -m hinv.companion.reproduce report                            table of all claims, build/report.html; exit status 1 on a failure
"""

import ast
import base64
import html
import json
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from hinv.companion.checks import ROOT, alone, output, write_atomically

NOTEBOOKS, BUILD = ROOT / "notebooks", ROOT / "build"
PROFILES = ("quick", "full")


def number_of(notebook: Path) -> str:
    """08a of notebooks/08a_products.ipynb."""
    return notebook.stem.split("_")[0]


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


def rows() -> list[dict[str, Any]]:
    """Every claim of every notebook that ran, and one failed row for each notebook that did not finish."""
    out: list[dict[str, Any]] = []
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        number = number_of(notebook)
        result = output("results") / f"{number}.json"
        record = results(result)
        out += [{"notebook": number} | claim for claim in record["claims"]]
        if not record["claims"] or not (BUILD / "notebooks" / notebook.name).exists():
            out.append(
                {
                    "notebook": number,
                    "statement": _failure(notebook),
                    "equation": "",
                    "measured": None,
                    "relation": "",
                    "bound": "",
                    "passed": False,
                }
            )
    return out


def results(path: Path) -> dict[str, Any]:
    """What a notebook wrote; no claims if it wrote nothing, or what it wrote is damaged (then it counts as a notebook that must run again)."""
    try:
        record = json.loads(path.read_text("utf-8"))
        return record if isinstance(record["claims"], list) else {"claims": []}
    except (OSError, ValueError, KeyError, TypeError):
        return {"claims": []}


def _failure(notebook: Path) -> str:
    failed = BUILD / "notebooks" / f"{notebook.stem}.failed.ipynb"
    if not failed.exists():
        ran = (BUILD / "notebooks" / notebook.name).exists()
        return f"{notebook.name} {'ran but left no claims in results/, or damaged ones: make reproduce runs it again' if ran else 'did not run'}"
    cells = [c for c in nbformat.read(failed, 4).cells if c.cell_type == "code"]
    errors = [o for c in cells for o in c.outputs if o.output_type == "error"]
    if errors and errors[-1].evalue:
        reason = f"{errors[-1].ename}: {errors[-1].evalue.splitlines()[0]}"
    else:
        cell = sum(c.metadata.get("papermill", {}).get("start_time") is not None for c in cells)  # the last that began
        reason = f"its kernel ended in cell {cell} of {len(cells)}: was it killed for memory? PROFILE=quick needs least; fewer images or a smaller batch less still"
    return f"{notebook.name} failed ({reason}); kept as {failed.relative_to(ROOT)}"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.2e}" if isinstance(value, float) else str(value)


def report() -> bool:
    """Print the table of claims, write build/report.html, and say whether all passed."""
    claims = rows()
    columns = [
        (
            c["notebook"],
            c["statement"],
            c["equation"],
            _number(c["measured"]),
            f"{c['relation']} {_number(c['bound'])}".strip(),
            "pass" if c["passed"] else "FAIL",
        )
        for c in claims
    ]
    runs = [r for path in sorted(output("results").glob("[0-9][0-9].json")) if (r := results(path))["claims"]]
    provenance = [
        f"{r['notebook']}: data {r['data']}; {r['profile']}, seed {r['seed']}, {r['dtype']} on {r['device']}, commit {r['commit']}"
        for r in runs
    ]
    head = ("nb", "claim", "paper", "measured", "bound", "")
    widths = [max(len(row[k]) for row in [head, *columns]) for k in range(len(head))]
    for row in [head, *columns]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    failed = sum(not c["passed"] for c in claims)
    summary = f"{len(claims) - failed} claims passed, {failed} failed"
    body = "".join(
        f"<tr class='{row[-1].lower()}'>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in columns
    )
    pictures = "".join(
        f"<figure><img alt='{p.stem}' src='data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}'><figcaption>{p.stem}</figcaption></figure>\n"
        for p in sorted(output("figures").glob("[0-9][0-9]_*.png"))
    )
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in provenance)
    style = (
        "body{font:15px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{padding:.25em .8em;border-bottom:1px solid #ccc;text-align:left}.fail{background:#fdd;font-weight:bold}img{max-width:100%}"
    )
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>hinv: claims</title><style>{style}</style><h1>hinv: every claim, measured</h1>"
        f"<p>{summary}.</p><table><tr>{''.join(f'<th>{h}</th>' for h in head)}</tr>\n{body}</table><h2>Data and seeds</h2><ul>{listed}</ul>\n<h2>Figures</h2>\n{pictures}</html>\n"
    )
    BUILD.mkdir(exist_ok=True)
    write_atomically(BUILD / "report.html", page)
    print(*provenance, sep="\n")
    print(f"{summary}; the same with figures: build/report.html")
    return failed == 0


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
