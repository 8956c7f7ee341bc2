"""One minute of `make fuzz`, from seeds of its own, and the record of a long run."""

import json
from pathlib import Path

import fuzz

RECORD = Path(__file__).resolve().parent.parent / "results" / "fuzz.json"


def test_one_minute():
    summary = fuzz.fuzz(60, seed=10_000)
    assert not summary["findings"], json.dumps(summary["findings"], indent=1)
    assert summary["networks"] > 20 and summary["grown_in_the_second_half"] < 2**28


def test_the_long_run_on_record_ended_without_a_finding():
    """`make fuzz SECONDS=1830`, made again after a change of what it looks at."""
    record = json.loads(RECORD.read_text("utf-8"))
    assert record["seconds"] >= 1800 and record["findings"] == []
    assert record["networks"] > 1000 and record["grown_in_the_second_half"] < 2**28
