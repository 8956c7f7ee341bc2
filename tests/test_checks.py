import json

import pytest
import torch

from hinv.companion import checks


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("HINV_OUTPUT", str(tmp_path))
    return tmp_path


def test_agree_prints_no_measured_digits(capsys):
    a = torch.tensor([1.0, 2.0])
    checks.agree(a * (1 + 1e-6), a, 1e-5, "this against that")
    assert capsys.readouterr().out == "ok: this against that, relative error below 1e-05\n"
    with pytest.raises(AssertionError, match=r"this: relative error 1.00e-01 exceeds 1e-05"):
        checks.agree(a * 1.1, a, 1e-5, "this")
    with pytest.raises(AssertionError):
        checks.agree(a * float("nan"), a, 1e-5, "this")
    with pytest.raises(ValueError, match="shapes differ"):
        checks.agree(a, a[None], 1e-5, "this")


def test_relative_error():
    assert checks.relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0
    assert checks.relative_error(torch.tensor([0.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(10**0.5 / 5)


def test_claims_are_recorded_with_their_context(output, capsys):
    claims = checks.Claims("99", "a test", seed=7, profile="quick", data="digits")
    claims.check("small enough", 1e-13, "<=", 1e-12, "(8)")
    claims.check("exactly", 3, "==", 3)
    claims.check("share", 1.0, ">=", 0.75)
    claims.note(slope=1.0)
    claims.write()
    record = checks.read("99")
    assert (
        record["seed"] == 7
        and record["dtype"] == "float64"
        and record["device"] == "cpu"
        and record["data"] == "digits"
    )
    assert set(record["versions"]) == {"python", "torch", "numpy", "scipy"} and record["commit"]
    assert record["claims"][0] == {
        **{"statement": "small enough", "equation": "(8)", "measured": 1e-13},
        **{"relation": "<=", "bound": 1e-12, "passed": True},
    }
    assert record["values"] == {"slope": 1.0}
    assert capsys.readouterr().out.splitlines() == [
        "ok: small enough (<= 1e-12)",
        "ok: exactly (== 3)",
        "ok: share (>= 0.75)",
        "ok: 3 claims of notebook 99 hold",
    ]


@pytest.mark.parametrize(
    ("measured", "relation", "bound"), [(2e-12, "<=", 1e-12), (float("nan"), "<=", 1.0), (2, "==", 3), (0.1, ">=", 0.5)]
)
def test_failed_claims_are_kept_and_raised(output, measured, relation, bound):
    claims = checks.Claims("98", "a test", seed=0, profile="quick")
    claims.check("holds", 1.0, ">=", 0.5)
    claims.check("does not", measured, relation, bound)
    with pytest.raises(AssertionError, match="1 claims of notebook 98 failed: does not"):
        claims.write()
    assert [c["passed"] for c in checks.read("98")["claims"]] == [True, False]


def test_missing_results_say_how_to_make_them():
    with pytest.raises(FileNotFoundError, match="no results of notebook 42: run it first, or 'make reproduce'"):
        checks.read("42")


def test_writes_are_atomic(output, monkeypatch):
    path = output / "file.json"
    path.write_text("old")
    monkeypatch.setattr(checks.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checks.write_atomically(path, json.dumps({}))
    assert path.read_text() == "old" and [p.name for p in output.iterdir()] == ["file.json"]


def test_table():
    assert checks.table(["a", "b"], [[1, "x"], (2.5, None)]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2.5 | None |"
