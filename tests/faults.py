"""The fault table: what was done to the project, what happened, what was kept. A test that survives a fault writes its row to results/faults.json."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hinv.companion.checks import alone, write_atomically

TABLE = Path(__file__).parents[1] / "results" / "faults.json"


def survived(fault: str, happened: str, kept: str) -> None:
    with alone(TABLE.with_suffix(".lock"), "writing the fault table"):
        rows = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else []
        rows = [row for row in rows if row["fault"] != fault] + [{"fault": fault, "happened": happened, "kept": kept}]
        text = json.dumps(sorted(rows, key=lambda row: row["fault"]), indent=1, ensure_ascii=False) + "\n"
        if not TABLE.exists() or TABLE.read_text("utf-8") != text:
            write_atomically(TABLE, text)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A disk of its own (tmpfs), as large as `size`; the test is skipped where none may be mounted."""
    disk = path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)
