"""The explorer, without a browser: its numbers against dense matrices, and its controls."""

import base64
import io
import itertools

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

import hinv
from hinv.companion import checks, explorer

KINDS = [
    {},
    {"residual": True, "depth": 4},
    {"activation": "ReLU", "width": 5},
    {"activation": "GELU", "depth": 3, "batch": 8, "damping": -0.1},
    {"depth": 2, "width": 2, "batch": 4, "damping": 1.0},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_what_it_tells_is_what_dense_matrices_say(settings):
    found = explorer.explore(**settings)
    matrix = found.H.dense() + found.damping * torch.eye(found.H.shape[0], dtype=torch.float64)
    values = torch.linalg.eigvalsh(found.H.dense())
    assert found.inertia == (int((values > -found.damping).sum()), int((values < -found.damping).sum()), 0)
    sign, log = torch.linalg.slogdet(matrix)
    assert found.logdet[0] == sign and found.logdet[1] == pytest.approx(log.item(), rel=1e-10)
    assert checks.relative_error(found.step, torch.linalg.solve(matrix, found.H.gradient)) < 1e-9
    assert found.residual < 1e-8
    edges = [-torch.inf, *explorer.EDGES, torch.inf]
    assert found.counts == [int(((a <= values) & (values < b)).sum()) for a, b in itertools.pairwise(edges)]
    assert torch.equal(found.eigenvalues, values)
    layers = [stage["parameters"] for stage in found.H.by_stage().values()]
    assert [sum(pair) for pair in found.pivots] == layers
    assert sum(negative for _, negative in found.pivots) == found.inertia[1]
    assert found.seconds > 0 and (found.peak is None or found.peak >= 0)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_pivots_of_each_layer_are_those_of_the_recursion(settings):
    """Notebook 05's recursion on the dense blocks of the paper's layers, the last one first."""
    found, V, signs = explorer.explore(**settings), torch.zeros(1, 1, dtype=torch.float64), []
    for layer in reversed(found.H.layers):
        J = layer.J.reshape(-1, len(layer.E))  # the last layer's is one row
        S = layer.E + found.damping * torch.eye(len(layer.E), dtype=torch.float64) + J.T @ V @ J
        negative = int((torch.linalg.eigvalsh((S + S.T) / 2) < 0).sum())
        signs.append((len(S) - negative, negative))
        if layer.A is not None:
            N = layer.F + J.T @ V @ layer.A
            V = layer.G + layer.A.T @ V @ layer.A - N.T @ torch.linalg.solve(S, N)
    assert found.pivots == signs[::-1]


def test_the_numbers_on_the_page():
    found = explorer.explore()
    rows = found.rows()
    assert rows["parameters"] == f"{16 * 6 + 6 + 6 * (6 * 6 + 6) + 6 * 10 + 10}"
    assert rows["inertia of H + εI"] == "{} positive, {} negative".format(*found.inertia)
    assert rows["norm of the gradient g"] == f"{found.H.gradient.norm().item():.4g}"
    assert "predicted" in rows["time"] and "measured" in rows["memory"]
    page = explorer.page()
    for value in (rows["parameters"], rows["inertia of H + εI"], rows["sign and log |det(H + εI)|"]):
        assert f"<td>{value}</td>" in page
    picture = Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split("'")[0])))
    assert picture.size == (666, 558)
    assert not plt.get_fignums(), "a page that is drawn again and again keeps no figures"


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_its_networks_pass_the_checks_that_it_leaves_out(settings):
    H = explorer.explore(**settings).H
    hinv.Hessian(H.chain.model, torch.nn.CrossEntropyLoss(), H.chain.inputs, H.chain.targets)


def test_a_singular_damping_is_a_sentence():
    page = explorer.page(damping=0.0)
    assert "Not at this damping" in page and "no factorization of H + (0) I" in page and "<img" not in page
    assert "'14'" not in page  # escaped


def test_the_controls_draw_what_they_say():
    box = explorer.controls()
    inputs = {control.description: control for control in box.children[0].children}
    shown = box.children[1]
    assert "<td>424</td>" in shown.value
    inputs["depth"].value = 3
    assert f"<td>{explorer.network(depth=3).shape[0]}</td>" in shown.value and "3 layers of 6" in shown.value
    inputs["residual"].value = True
    assert "3 layers of 6, tanh, residual" in shown.value
    inputs["damping ε"].value = 0.0
    assert "Not at this damping" in shown.value
    inputs["damping ε"].value = 1.0
    assert "ε = 1" in shown.value


@pytest.mark.parametrize("wrong", [{"activation": "sine"}, {"depth": 1}, {"batch": 65}, {"batch": 0}], ids=str)
def test_what_there_is_not_is_refused(wrong):
    with pytest.raises(ValueError, match="activation" if "activation" in wrong else "depth"):
        explorer.network(**wrong)


def test_larger_networks_are_not_asked_of_a_dense_eigensolver(monkeypatch):
    monkeypatch.setattr(explorer, "DENSE", 100)
    found = explorer.explore(depth=3)
    assert found.eigenvalues is None
    assert "eigvalsh" not in found.figure().axes[0].get_title()
    plt.close("all")
