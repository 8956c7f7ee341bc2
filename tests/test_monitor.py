"""The monitor measures what it says and leaves training as it was."""

import json
import warnings

import pytest
import torch
from torch import nn

from hinv import CurvatureMonitor, Hessian, spectrum, tall_skinny
from hinv.optim.monitor import BACKENDS

ALL = ("lambda_max", "lambda_min", "trace", "negative", "logdet")


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 6, generator=generator, dtype=torch.float64), torch.arange(24) % 3


def train(monitor_for, steps=7):
    """A few steps with momentum, dropout and batch norm in training mode; its weights, buffers and last random number."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    monitor = monitor_for(model, x, y) if monitor_for else None
    for _ in range(steps):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(x), y).backward()
        optimizer.step()
        before = [p.grad.clone() for p in model.parameters()]
        if monitor:
            monitor()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
        assert model.training
    return [t.clone() for t in model.state_dict().values()], torch.rand(1), monitor


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_training_is_bit_identical(backend, tmp_path):
    what = BACKENDS[backend][1]

    def make(model, x, y):
        return CurvatureMonitor(
            model, nn.CrossEntropyLoss(), x[:12], y[:12], every=3, what=what, backend=backend, path=tmp_path / "c.jsonl"
        )

    plain, number, _ = train(None)
    watched, same, monitor = train(make)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True)) and torch.equal(number, same)
    assert [r["step"] for r in monitor.records] == [0, 3, 6]
    assert not any("errors" in r for r in monitor.records)
    assert all(set(what) <= set(r) for r in monitor.records)
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert lines == monitor.records
    assert 0 < monitor.fraction < 1 and monitor.seconds == pytest.approx(sum(r["seconds"] for r in lines))


def test_values_are_the_dense_ones_and_backends_agree():
    x, y = data()
    model, loss = tall_skinny((6, 8, 8, 3)), nn.CrossEntropyLoss()
    D = Hessian(model, loss, x, y).dense()
    values = torch.linalg.eigvalsh(D)
    written = []

    class Writer:
        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

    exact = CurvatureMonitor(model, loss, x, y, what=ALL, writer=Writer())()
    assert exact["lambda_max"] == pytest.approx(values[-1].item(), rel=1e-9) and exact["lambda_max_certified"]
    assert exact["lambda_min"] == pytest.approx(values[0].item(), rel=1e-9) and exact["lambda_min_certified"]
    assert exact["trace"] == pytest.approx(D.trace().item(), rel=1e-10)
    assert exact["negative"] == int((values < exact["negative_below"]).sum())
    assert exact["negative_below"] == pytest.approx(-1e-6 * values.abs().max().item())
    assert exact["logdet"] == pytest.approx((values + 0.01).abs().log().sum().item(), rel=1e-9)
    assert [w[0] for w in written] == [f"curvature/{name}" for name in ALL]
    theirs = CurvatureMonitor(
        model, loss, x, y, what=("lambda_max", "lambda_min", "trace"), backend="hessian_eigenthings"
    )()
    assert theirs["lambda_max"] == pytest.approx(exact["lambda_max"], rel=1e-4)
    assert theirs["lambda_min"] == pytest.approx(exact["lambda_min"], rel=1e-4)
    assert abs(theirs["trace"] - exact["trace"]) < 5 * theirs["trace_error"] < D.norm()
    pyhessian = CurvatureMonitor(model, loss, x, y, backend="pyhessian")()
    assert pyhessian["lambda_max"] == pytest.approx(exact["lambda_max"], rel=0.02)
    assert abs(pyhessian["trace"] - exact["trace"]) < 5 * pyhessian["trace_error"] < 3 * D.norm()


def test_a_failed_measurement_does_not_stop_training():
    x, y = data()
    model = tall_skinny((6, 4, 3))
    monitor = CurvatureMonitor(model, nn.CrossEntropyLoss(), x, y, every=1)
    assert "errors" not in monitor()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="curvature at step 1 is incomplete: model: NotFiniteError: .*NaN"):
        assert "NaN" in monitor()["errors"]["model"]
    with torch.no_grad():
        model[0].weight[0, 0] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "errors" not in monitor()


def test_one_failure_does_not_lose_the_rest():
    x, y = data()
    monitor = CurvatureMonitor(tall_skinny((6, 8, 3)), nn.CrossEntropyLoss(), x[:2], y[:2], what=ALL, damping=0.0)
    with pytest.warns(UserWarning, match="incomplete: logdet: SingularShiftError"):
        record = monitor()
    assert set(record["errors"]) == {"logdet"} and {"lambda_max", "lambda_min", "trace", "negative"} <= set(record)


def test_pyhessian_is_not_believed_where_the_largest_magnitude_is_negative():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(12, 6, generator=generator).double()
    y = 10.0 * torch.randn(12, 3, generator=generator).double()
    problem = tall_skinny((6, 8, 8, 3), gain=1.5, seed=7), nn.MSELoss(), x, y
    values = torch.linalg.eigvalsh(Hessian(*problem).dense())
    assert -values[0] > values[-1]
    with pytest.warns(UserWarning, match="here a negative one"):
        record = CurvatureMonitor(*problem, backend="pyhessian")()
    assert "lambda_max" not in record and "trace" in record


def test_uncertified_ends_say_so(monkeypatch):
    x, y = data()
    found = spectrum.Eigenpairs(torch.ones(1), torch.ones(1, 1), torch.ones(1), False, "not certified")
    monkeypatch.setattr(Hessian, "eigsh", lambda *a, **k: found)
    record = CurvatureMonitor(tall_skinny((6, 4, 3)), nn.CrossEntropyLoss(), x, y, what=("lambda_max",))()
    assert record["lambda_max"] == 1.0 and record["lambda_max_certified"] is False


def test_small_models_with_every_backend():
    x, y = data()
    for backend in ("hinv", "pyhessian", "hessian_eigenthings"):
        record = CurvatureMonitor(tall_skinny((6, 3)), nn.CrossEntropyLoss(), x, y, backend=backend)()
        assert record["lambda_max"] > 0 and "errors" not in record


@pytest.mark.usefixtures("unenforced")  # a name is not a tuple of names
def test_what_cannot_be_measured_is_refused():
    x, y = data()
    model, loss = tall_skinny((6, 4, 3)), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="at least 1 step"):
        CurvatureMonitor(model, loss, x, y, every=0)
    with pytest.raises(ValueError, match="unknown backend 'numpy'"):
        CurvatureMonitor(model, loss, x, y, backend="numpy")
    for backend, what in (("pyhessian", ("negative",)), ("hinv", ("sharpness",)), ("hinv", "trace"), ("hinv", ())):
        with pytest.raises(ValueError, match=f"backend '{backend}' measures 'lambda_max'"):
            CurvatureMonitor(model, loss, x, y, what=what, backend=backend)
