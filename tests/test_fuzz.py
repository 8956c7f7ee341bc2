"""One minute of `make fuzz`, from seeds of its own; and the long run on record."""

import json
from pathlib import Path

import fuzz


def test_one_minute():
    summary = fuzz.fuzz(60, seed=10_000)
    assert not summary["findings"], json.dumps(summary["findings"], indent=1)
    assert summary["networks"] > 20 and summary["grown_in_the_second_half"] < 2**28


def test_the_run_on_record():
    record = json.loads((Path(__file__).parents[1] / "results" / "fuzz.json").read_text())
    assert record["seconds"] >= 30 * 60 and record["findings"] == [] and record["grown_in_the_second_half"] < 2**28
