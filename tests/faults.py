"""The fault table: what was done to the project, what happened, what was kept. A test that survives a fault writes its row to results/faults.json."""

import json
from pathlib import Path

from hinv.companion.checks import alone, write_atomically

TABLE = Path(__file__).parents[1] / "results" / "faults.json"


def survived(fault: str, happened: str, kept: str) -> None:
    with alone(TABLE.with_suffix(".lock"), "writing the fault table"):
        rows = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else []
        rows = [row for row in rows if row["fault"] != fault] + [{"fault": fault, "happened": happened, "kept": kept}]
        text = json.dumps(sorted(rows, key=lambda row: row["fault"]), indent=1, ensure_ascii=False) + "\n"
        if not TABLE.exists() or TABLE.read_text("utf-8") != text:
            write_atomically(TABLE, text)
