"""The runner: parameters are checked, failures are kept and named, the report tells the truth."""

import json

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from hinv.companion import reproduce


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two notebooks: one that claims something, one that fails."""
    monkeypatch.setenv("HINV_OUTPUT", str(tmp_path))
    for name, value in {"ROOT": tmp_path, "NOTEBOOKS": tmp_path / "notebooks", "BUILD": tmp_path / "build"}.items():
        monkeypatch.setattr(reproduce, name, value)
    (tmp_path / "notebooks").mkdir()
    good = "from hinv.companion import checks\nclaims = checks.Claims('01', 'good', seed, profile)\nclaims.check('below', value, '<=', 1.0, '(1)')\nclaims.write()"
    write(tmp_path / "notebooks" / "01_good.ipynb", "profile = 'quick'\nseed = 0\nvalue = 0.5", good)
    write(tmp_path / "notebooks" / "02_bad.ipynb", "profile = 'quick'", "raise RuntimeError('the reason')")
    return tmp_path


def write(path, parameters, code):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def test_runs_reports_and_keeps_the_failure(project, capfd):
    notebooks = project / "notebooks"
    done = reproduce.run(notebooks / "01_good.ipynb", {"seed": 3})
    assert done == project / "build" / "notebooks" / "01_good.ipynb" and done.exists()
    assert json.loads((project / "results" / "01.json").read_text())["seed"] == 3
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("01_good: cell")]
    assert lines[-1].startswith("01_good: cell 3 of 3, ") and lines[-1].endswith("about 0 s left")
    with pytest.raises(PapermillExecutionError):
        reproduce.run(notebooks / "02_bad.ipynb")
    kept = project / "build" / "notebooks" / "02_bad.failed.ipynb"
    assert "the reason" in kept.read_text() and not (project / "build" / "notebooks" / "02_bad.ipynb").exists()
    assert reproduce.report() is False
    out = capfd.readouterr().out
    assert "02_bad.ipynb failed (RuntimeError: the reason); kept as build/notebooks/02_bad.failed.ipynb" in out
    assert "1 claims passed, 1 failed" in out
    page = (project / "build" / "report.html").read_text()
    assert "data digits; quick, seed 3, float64 on cpu" in page
    assert "below" in page and "FAIL" in page and "pass" in page


def test_a_failed_claim_fails_the_report_although_it_passed_before(project, capfd):
    notebook = project / "notebooks" / "01_good.ipynb"
    (project / "notebooks" / "02_bad.ipynb").unlink()
    reproduce.run(notebook)
    assert reproduce.report() is True
    with pytest.raises(PapermillExecutionError):
        reproduce.run(notebook, {"value": 2.0})
    assert reproduce.report() is False
    assert "FAIL" in capfd.readouterr().out


def test_claims_of_the_full_profile_outlast_a_quick_run(project, capfd):
    notebook = project / "notebooks" / "01_good.ipynb"
    (project / "notebooks" / "02_bad.ipynb").unlink()
    kept = project / "results" / "full.json"
    reproduce.run(notebook)
    assert reproduce.report() and not kept.exists()
    reproduce.run(notebook, {"profile": "full", "value": 0.25, "seed": 7})
    assert reproduce.report() and "the claims of 01 in the full profile" in capfd.readouterr().out
    record = json.loads(kept.read_text())
    assert set(record) == {"01"} and record["01"]["claims"][0]["measured"] == 0.25 and "values" not in record["01"]
    kept.write_text(json.dumps(record | {"99": record["01"] | {"notebook": "99"}}))  # of a notebook not run this time
    reproduce.run(notebook, {"profile": "full", "value": 0.125, "seed": 7})
    assert reproduce.report()
    assert {n: r["claims"][0]["measured"] for n, r in json.loads(kept.read_text()).items()} == {"01": 0.125, "99": 0.25}
    reproduce.run(notebook)
    assert reproduce.report() and json.loads(kept.read_text())["01"]["claims"][0]["measured"] == 0.125
    page = (project / "build" / "report.html").read_text()
    assert "Notebook 01: data digits; full, seed 7" in page and "1.25e-01" in page and "5.00e-01" in page


def test_a_run_without_results_is_a_failure_and_runs_again(project, capfd):
    (project / "notebooks" / "02_bad.ipynb").unlink()
    silent = project / "notebooks" / "03_silent.ipynb"
    write(silent, "profile = 'quick'", "x = 1")
    for notebook in ("01_good.ipynb", "03_silent.ipynb"):
        reproduce.run(project / "notebooks" / notebook)
    assert reproduce.report() is False
    assert "03_silent.ipynb ran but left no claims in results/" in capfd.readouterr().out
    (project / "results" / "01.json").unlink()
    assert reproduce.report() is False
    reproduce.write_parameters([])  # what make does first: the notebook without results must run again
    assert not (project / "build" / "notebooks" / "01_good.ipynb").exists()


def test_a_dead_kernel_is_a_failure(project, capfd):
    write(project / "notebooks" / "02_bad.ipynb", "profile = 'quick'", "import os; os._exit(1)")
    assert reproduce.main(["run", str(project / "notebooks" / "02_bad.ipynb")]) == 1
    folder = project / "build" / "notebooks"
    assert (folder / "02_bad.failed.ipynb").exists() and not (folder / "02_bad.running.ipynb").exists()
    assert "02_bad.ipynb failed" in capfd.readouterr().err


def test_stale_results_do_not_survive_a_failure(project):
    (project / "results").mkdir()
    (project / "results" / "02.json").write_text(json.dumps({"claims": [{"statement": "old", "passed": True}]}))
    with pytest.raises(PapermillExecutionError):
        reproduce.run(project / "notebooks" / "02_bad.ipynb")
    assert not (project / "results" / "02.json").exists()


def test_unknown_parameters_are_errors(project):
    with pytest.raises(ValueError, match=r"01_good.ipynb has no parameter sed; it has profile, seed, value"):
        reproduce.run(project / "notebooks" / "01_good.ipynb", {"sed": 1})
    with pytest.raises(ValueError, match=r"no notebook has a parameter 'sed'; they have: profile, seed, value"):
        reproduce.write_parameters(["sed=1"])
    with pytest.raises(ValueError, match="profile must be one of quick, full, not 'fast'"):
        reproduce.write_parameters(["profile=fast"])
    with pytest.raises(ValueError, match="'seed' is not name=value"):
        reproduce.write_parameters(["seed"])
    assert reproduce.main(["parameters", "sed=1"]) == 2
    assert not (project / "build" / "parameters.json").exists()


def test_parameters_file_changes_only_with_the_parameters(project):
    path = project / "build" / "parameters.json"
    assert reproduce.write_parameters(["profile=quick", "seed=1"]) == {"profile": "quick", "seed": 1}
    before = path.stat().st_mtime_ns
    reproduce.write_parameters(["seed=1", "profile=quick"])
    assert path.stat().st_mtime_ns == before
    reproduce.write_parameters(["seed=2"])
    assert json.loads(path.read_text()) == {"seed": 2}


def test_command_line(project, capsys):
    reproduce.write_parameters(["profile=quick", "seed=5"])
    assert reproduce.main(["run", str(project / "notebooks" / "01_good.ipynb")]) == 0
    assert json.loads((project / "results" / "01.json").read_text())["seed"] == 5
    assert reproduce.main(["run", str(project / "notebooks" / "02_bad.ipynb")]) == 1
    assert reproduce.main(["report"]) == 1
    assert reproduce.main([]) == 2
    assert "python -m hinv.companion.reproduce" in capsys.readouterr().err
