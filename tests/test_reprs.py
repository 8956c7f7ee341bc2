"""What a person sees of an object: one line, and in notebooks a small table; never a page of numbers."""

import sys

import pytest
import torch
from torch import nn

import hinv
from hinv import GGN, CurvatureMonitor, Hessian, optim, paper, spectrum
from hinv.companion import data

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y, LOSS = torch.arange(8) % 4, nn.CrossEntropyLoss()


def model():
    return hinv.tall_skinny((6, 5, 5, 4), gain=1.2)


def objects():
    H, G, m = Hessian(model(), LOSS, X, Y), GGN(model(), LOSS, X, Y), model()
    return {
        "Hessian(89 x 89, 5 stages, batch 8, torch.float64)": H,
        "GGN(89 x 89, 5 stages, batch 8, torch.float64)": G,
        "Chain(5 stages, batch 8, 89 parameters)": H.chain,
        "Stage('0', Linear, linear, (6,) -> (5,))": H.chain.stages[0],
        "Factor(89 x 89, damping 10, 5 stages, 0 negative pivots, torch.float64)": H.factor(10.0),
        "Dual(89 x 89, damping 0.1, by a Cholesky factor of 24 x 24, torch.float64)": hinv.solver.dual.Dual(
            G.chain, 0.1
        ),
        "Matrices(3 layers, 89 parameters, damping 0.1, c 1)": paper.matrices(H, 0.1),
        "Images(digits, (4, 1, 8, 8), 10 classes)": data.load("digits", n=4),
        "GradientDescent(89 parameters, SGD with rate 1)": optim.GradientDescent(m, LOSS),
        "GaussNewton(89 parameters, SGD with rate 1, damping 0.1, every 1)": optim.GaussNewton(m, LOSS),
        "TrustRegionNewton(89 parameters, SGD with rate 1, every 2, sample 4)": optim.TrustRegionNewton(
            m, LOSS, every=2, sample=4
        ),
        "CurvatureMonitor(lambda_max, trace by hinv, every 500 steps; 0 records)": CurvatureMonitor(m, LOSS, X, Y),
        "DataHessian(89 x 89, 1 batches)": spectrum.DataHessian(m, LOSS, [(X, Y)]),
    }


def test_one_line():
    for line, thing in objects().items():
        assert repr(thing) == line
    pairs = repr(Hessian(model(), LOSS, X, Y).eigsh(7))
    assert pairs.startswith("Eigenpairs([") and pairs.endswith(", ...], certified=True)") and len(pairs) < 120


def test_tables_for_notebooks():
    H = Hessian(model(), LOSS, X, Y)
    shown = H._repr_html_()
    for text in (
        "Hessian, 89 x 89",
        "<th>stages</th><td>5, 3 of them with parameters",
        "<th>batch</th><td>8",
        "dense",
        "MiB",
        " s<",
    ):
        assert text in shown
    assert "<th>damping</th><td>0.1<" in H.factor(0.1)._repr_html_()
    pairs = H.eigsh(2)._repr_html_()
    assert "Eigenpairs, certified" in pairs and pairs.count("residual") == 2


def test_seconds_are_predicted_for_every_method():
    for kind, methods in ((Hessian, {"factor", "dense"}), (GGN, {"factor", "dense", "dual"})):
        prediction = kind(model(), LOSS, X, Y).estimate()
        assert set(prediction.overhead) >= methods
        assert all(0 < prediction.seconds(method) < 60 for method in methods)
        assert prediction.seconds() == prediction.seconds(prediction.method)


def test_a_data_set_without_its_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(ImportError, match=r"pip install 'hinv\[dataset\]'"):
        spectrum.DataHessian(model(), LOSS, [(X, Y)])
