"""One minute of `make fuzz`, from seeds of its own."""

import json

import fuzz


def test_one_minute():
    summary = fuzz.fuzz(60, seed=10_000)
    assert not summary["findings"], json.dumps(summary["findings"], indent=1)
    assert summary["networks"] > 20 and summary["grown_in_the_second_half"] < 2**28
