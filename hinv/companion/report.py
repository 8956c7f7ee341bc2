"""Every claim of every notebook, measured: the table that `make reproduce` prints, build/report.html, and the book's page of claims.

All three are made by what is here, from results/NN.json and figures/NN_*.png alone.
"""

import base64
import html
import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat

from hinv.companion.checks import output, write_atomically

HEAD = ("nb", "claim", "paper", "measured", "bound", "")
SIGNS = {"<=": "≤", ">=": "≥", "==": "="}


def number_of(file: Path) -> str:
    """08a of notebooks/08a_products.ipynb."""
    return file.stem.split("_")[0]


def results(path: Path) -> dict[str, Any]:
    """What a notebook wrote; no claims if it wrote nothing, or what it wrote is damaged (then it counts as a notebook that must run again)."""
    try:
        record = json.loads(path.read_text("utf-8"))
        return record if isinstance(record["claims"], list) else {"claims": []}
    except (OSError, ValueError, KeyError, TypeError):
        return {"claims": []}


def rows(notebooks: Path, build: Path) -> list[dict[str, Any]]:
    """Every claim of every notebook that ran, and one failed row for each notebook that did not finish."""
    out: list[dict[str, Any]] = []
    for notebook in sorted(notebooks.glob("[0-9]*.ipynb")):
        number = number_of(notebook)
        record = results(output("results") / f"{number}.json")
        out += [{"notebook": number, "path": notebook} | claim for claim in record["claims"]]
        if not record["claims"] or not (build / "notebooks" / notebook.name).exists():
            out.append(
                {
                    "notebook": number,
                    "path": notebook,
                    "statement": _failure(notebook, build),
                    "equation": "",
                    "measured": None,
                    "relation": "",
                    "bound": "",
                    "passed": False,
                }
            )
    return out


def _failure(notebook: Path, build: Path) -> str:
    failed = build / "notebooks" / f"{notebook.stem}.failed.ipynb"
    if not failed.exists():
        ran = (build / "notebooks" / notebook.name).exists()
        return f"{notebook.name} {'ran but left no claims in results/, or damaged ones: make reproduce runs it again' if ran else 'did not run'}"
    cells = [c for c in nbformat.read(failed, 4).cells if c.cell_type == "code"]
    errors = [o for c in cells for o in c.outputs if o.output_type == "error"]
    if errors and errors[-1].evalue:
        reason = f"{errors[-1].ename}: {errors[-1].evalue.splitlines()[0]}"
    else:
        cell = sum(c.metadata.get("papermill", {}).get("start_time") is not None for c in cells)  # the last that began
        reason = f"its kernel ended in cell {cell} of {len(cells)}: was it killed for memory? PROFILE=quick needs least; fewer images or a smaller batch less still"
    return f"{notebook.name} failed ({reason}); kept as {failed.relative_to(build.parent)}"


def number(value: Any) -> str:
    return "" if value is None else f"{value:.2e}" if isinstance(value, float) else str(value)


def provenance(record: dict[str, Any]) -> str:
    """Data, parameters, versions and machine of a notebook's run, as it wrote them."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record.get("machine")
    on = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} BLAS threads"
        if machine
        else "a machine it did not name"
    )
    run = f"{record['profile']}, seed {record['seed']}, {record['dtype']} on {record['device']}"
    return f"data {record['data']}; {run}, commit {record['commit']}; {versions}; {on}"


def full() -> dict[str, dict[str, Any]]:
    """By notebook, what runs of the full profile claimed and measured, as results/full.json has it: in git, for nobody repeats hours to read a page."""
    path = output("results") / "full.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def keep_full(notebooks: Path) -> None:
    """results/full.json with what notebooks have left of the full profile since it was written; the others stay."""
    found = [results(output("results") / f"{number_of(notebook)}.json") for notebook in notebooks.glob("[0-9]*.ipynb")]
    new = {r["notebook"]: r for r in found if r["claims"] and r["profile"] == "full"}
    for record in new.values():
        del record["values"]
    if new:
        write_atomically(output("results") / "full.json", json.dumps(dict(sorted((full() | new).items())), indent=1))
        print(f"results/full.json: the claims of {', '.join(sorted(new))} in the full profile")


def write(notebooks: Path, build: Path) -> bool:
    """Print the table of claims, write build/report.html, and say whether all passed."""
    claims = rows(notebooks, build)
    keep_full(notebooks)
    columns = [
        (
            c["notebook"],
            c["statement"],
            c["equation"],
            number(c["measured"]),
            f"{c['relation']} {number(c['bound'])}".strip(),
            "pass" if c["passed"] else "FAIL",
        )
        for c in claims
    ]
    widths = [max(len(row[k]) for row in [HEAD, *columns]) for k in range(len(HEAD))]
    for row in [HEAD, *columns]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for notebook in sorted(notebooks.glob("[0-9]*.ipynb")):
        record = results(output("results") / f"{number_of(notebook)}.json")
        if record["claims"]:
            print(f"{record['notebook']}: {provenance(record)}")
    build.mkdir(exist_ok=True)
    encoded = lambda path: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    sections = "\n".join(
        f"<section><h2>{mathematics(title)}</h2>{body}</section>" if title else body
        for title, body in parts(notebooks, build, encoded)
    )
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>hinv: claims</title>"
        f"<style>{PAGE}</style><h1>hinv: every claim, measured</h1>\n{sections}</html>\n"
    )
    write_atomically(build / "report.html", page)
    print(f"{summary(claims)}; the same with figures: build/report.html")
    return all(c["passed"] for c in claims)


def summary(claims: list[dict[str, Any]]) -> str:
    failed = sum(not c["passed"] for c in claims)
    return f"{len(claims) - failed} claims passed, {failed} failed"


# -- as a page ---------------------------------------------------------------------------------------------------------


def figures(notebook: str) -> list[Path]:
    """The pictures a notebook made; "09a" has its own, and "09" would not take them."""
    return sorted(output("figures").glob(f"{notebook}_*.png"))


def parts(notebooks: Path, build: Path, source: Callable[[Path], str]) -> list[tuple[str, str]]:
    """The page as (title, HTML): how many passed, what failed first, then notebook by notebook the question, its claims, and its plots beside them.

    Args:
        source: of a picture, what its <img> shall load.
    """
    claims = rows(notebooks, build)
    failed = [c for c in claims if not c["passed"]]
    absent = [c for c in failed if c["measured"] is None]
    said = summary(claims)
    if len(absent) == len(claims):
        said, failed = "No notebook has left results here yet: make reproduce runs them", []
    field = "<input type='search' placeholder='Show only claims with …' aria-label='Show only claims with these words'>"
    out = [("", f"<div class='claims'><style>{STYLE}</style><p class='summary'>{said}.</p><p>{field}</p></div>")]
    if failed:
        out.append(("What failed", f"<div class='claims failures'>{_table(failed, named=True)}</div>"))
    for notebook, group in groupby(claims, lambda c: c["path"]):
        key = number_of(notebook)
        title, question = opening(notebook)
        record = results(output("results") / f"{key}.json")
        pictures = "".join(
            f"<figure><a href='{source(p)}'><img alt='{p.stem}' loading='lazy' src='{source(p)}'></a><figcaption>{p.stem}</figcaption></figure>"
            for p in figures(key)
        )
        run = f"<p class='run'>{html.escape(provenance(record))}</p>" if record["claims"] else ""
        body = (
            f"<div class='claims' id='claims-{key}'><p class='question'>{mathematics(question)}</p><div class='chapter'>"
            f"<div class='scroll'>{_table(list(group))}</div><div class='figures'>{pictures}</div></div>{run}</div>"
        )
        out.append((title, body))
    kept = "".join(
        f"<p class='run'>Notebook {key}: {html.escape(provenance(record))}</p><div class='scroll'>{_table(record['claims'])}</div>"
        for key, record in full().items()
    )
    if kept:
        out.append(("The full profile, as last run", f"<div class='claims' id='claims-full'>{kept}</div>"))
    return [*out, ("", f"<script>{FILTER}</script>")]


def _table(claims: list[dict[str, Any]], named: bool = False) -> str:
    head = "".join(
        f"<th>{h}</th>" for h in (["notebook"] if named else []) + ["claim", "paper", "measured", "bound", ""]
    )
    lines = []
    for c in claims:
        first = f"<td><a href='#claims-{c['notebook']}'>{c['notebook']}</a></td>" if named else ""
        bound = f"{SIGNS.get(c['relation'], c['relation'])} {number(c['bound'])}".strip()
        outcome = "pass" if c["passed"] else "FAIL"
        lines.append(
            f"<tr class='{outcome.lower()}'>{first}<td>{html.escape(c['statement'])}</td><td class='paper'>{html.escape(c['equation'])}</td>"
            f"<td class='number'>{number(c['measured'])}</td><td class='number'>{bound}</td><td>{outcome}</td></tr>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


def opening(notebook: Path) -> tuple[str, str]:
    """Title and question of a notebook."""
    cells = nbformat.read(notebook, 4).cells
    first = cells[0].source if cells and cells[0].cell_type == "markdown" else ""
    title = re.search(r"^# (.+)$", first, re.M)
    question = re.search(r"\*\*Question\.\*\* (.+?)(?:\n\n|\Z)", first, re.S)
    return title[1] if title else notebook.stem, question[1] if question else ""


def mathematics(text: str) -> str:
    """The little that titles and questions have of TeX and Markdown, as HTML: a page without scripts shows it, too."""

    def formula(found: re.Match[str]) -> str:
        body = found[1].replace(r"\varepsilon", "ε").replace(r"\,", "\u2009")
        raised = re.sub(r"\^\{?(-?\w+)\}?", lambda m: "<sup>" + m[1].replace("-", "&minus;") + "</sup>", body)
        return f"<i>{raised}</i>"

    text = re.sub(r"\$(.+?)\$", formula, html.escape(text, quote=False))
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", re.sub(r"`(.+?)`", r"<code>\1</code>", text))


# colours are those of the book's theme where the page is part of it
STYLE = """
.claims{container-type:inline-size;--line:var(--pst-color-border,light-dark(#ccc,#444));--quiet:var(--pst-color-text-muted,light-dark(#555,#aaa))}
.claims table{border-collapse:collapse;width:100%;font-size:.9em;margin:0}
.claims td,.claims th{padding:.25em .6em;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.claims th:nth-last-child(2),.claims th:nth-last-child(3),.claims .number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.claims .paper{color:var(--quiet);overflow-wrap:anywhere}
.claims td:first-child{min-width:14em}.claims.failures td:first-child{min-width:0}
.claims .fail td{background:light-dark(#fdd,#522);font-weight:bold}.claims .fail td:last-child::before{content:"✗ "}
.claims .question{font-style:italic;max-width:45em}
.claims .run{color:var(--quiet);font-size:.8em}
.claims .scroll,.claims.failures{overflow-x:auto}
.claims .chapter{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:1.5em;align-items:start}
.claims .figures{display:grid;gap:1em;grid-template-columns:repeat(auto-fit,minmax(14em,1fr))}
.claims figure{margin:0}.claims figcaption{color:var(--quiet);font-size:.8em;font-weight:normal;text-align:left;margin:0}
.claims img{width:100%;background:#fff;border-radius:4px;padding:4px;box-sizing:border-box}
.claims input{font:inherit;width:min(100%,24em);padding:.4em .6em;border:1px solid var(--line);border-radius:4px;background:transparent;color:inherit}
@container (max-width:60em){.claims .chapter{grid-template-columns:minmax(0,1fr)}}
@container (max-width:30em){.claims td,.claims th{padding:.25em .3em;font-size:.9em}.claims td:first-child{min-width:7em}}
"""
PAGE = ":root{color-scheme:light dark}body{font:15px/1.45 system-ui,sans-serif;max-width:90em;margin:2em auto;padding:0 1em}"
FILTER = """
document.querySelector('.claims input').addEventListener('input', event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const part of document.querySelectorAll('.claims:has(tbody)')) {
    const section = part.closest('section'), about = section.querySelector('h2').textContent;
    const rows = [...part.querySelectorAll('tbody tr')];
    for (const row of rows) row.hidden = !words.every(word => (about + ' ' + row.textContent).toLowerCase().includes(word));
    section.hidden = rows.every(row => row.hidden);
  }
});
"""
