"""Other libraries against the dense truth, within the error each of them claims, and hinv against the same."""

import pytest
import torch
from torch import nn

from hinv import tall_skinny
from hinv.companion import bench, peers


@pytest.fixture(scope="module")
def problem():
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return tall_skinny((12, *[9] * 4, 6), gain=1.2, bias=False), nn.CrossEntropyLoss(), x, torch.arange(20) % 6


@pytest.fixture(scope="module")
def exact(problem):
    return peers.truth(*problem)


# library and question -> largest relative error; what is missing here is an estimate without a stated error, or fails (below)
AGREE = {
    **{(q, "hinv"): 1e-9 for q, offered in peers.PEERS.items() if "hinv" in offered},
    **{
        (q, "curvlinops"): 1e-9
        for q in ("largest eigenvalue", "smallest eigenvalue", "top 5 in magnitude", "GGN, largest eigenvalue")
    },
    **{
        (q, "hessian-eigenthings"): 1e-4
        for q in ("largest eigenvalue", "smallest eigenvalue", "top 5 in magnitude", "GGN, largest eigenvalue")
    },
    **{(q, "BackPACK"): 1e-10 for q in ("trace", "diagonal", "GGN, diagonal")},
    ("H v, distributed", "hessian-eigenthings"): 1e-12,
    ("largest eigenvalue", "PyHessian"): 0.1,
}


@pytest.mark.parametrize(("question", "library"), AGREE, ids=" / ".join)
@pytest.mark.filterwarnings("ignore")
def test_agreement(question, library, problem, exact):
    answer = peers.PEERS[question][library](*problem)
    assert peers.error(answer, exact[question]) < AGREE[question, library]


@pytest.mark.filterwarnings("ignore")
def test_estimates_of_the_trace_within_their_own_error(problem, exact):
    import hessian_eigenthings as he

    from hinv.spectrum import DataHessian

    model, loss, x, y = problem
    estimate = he.trace(peers.eigenthings(*problem)[1], num_matvecs=99, seed=0)
    assert abs(estimate.estimate - exact["trace"]) < 5 * estimate.stderr < abs(exact["trace"])
    for method in ("hutchinson", "hutch++", "xtrace"):
        ours = DataHessian(model, loss, [(x, y)]).trace(method, 300)
        assert abs(ours.value - exact["trace"]) < 5 * ours.standard_error < abs(exact["trace"])


@pytest.mark.filterwarnings("ignore")
def test_what_is_broken_is_still_broken(problem):
    """The day one of these passes, notebook 08a must stop saying that it fails."""
    with pytest.raises(RuntimeError, match="deprecated"):
        peers.PEERS["share below -0.001"]["PyHessian"](*problem)


@pytest.fixture(scope="module")
def deep():
    """N2 of notebook 08a, and its spectrum."""
    H = bench.digits_network((64, *[8] * 39, 10), 8)
    return (H.chain.model, H.chain.loss, H.chain.inputs, H.chain.targets), torch.linalg.eigvalsh(H.dense()), H


@pytest.mark.filterwarnings("ignore")
def test_what_falls_short_on_a_deep_network_still_does(deep):
    """PyHessian's power iteration and the densities: as notebook 08a says of them."""
    problem, spectrum, _ = deep
    top = peers.PEERS["largest eigenvalue"]["PyHessian"](*problem)
    assert peers.error(top, spectrum[-1].item()) > 0.1
    share = (spectrum < -0.001).double().mean().item()
    assert peers.error(peers.PEERS["share below -0.001"]["hessian-eigenthings"](*problem), share) > 0.1


@pytest.mark.filterwarnings("ignore")
def test_cg_of_an_indefinite_matrix_warns_and_is_far_away(deep):
    problem, spectrum, H = deep
    assert (spectrum < -0.01).any()
    with pytest.warns(Warning, match="larger than the tolerance"):
        x = peers.PEERS["(H + 0.01 I)^-1 g"]["curvlinops"](*problem)
    assert peers.error(H @ x + 0.01 * x, H.gradient) > 0.1


def test_questions_do_not_touch_the_model(problem):
    model, before = problem[0], [p.clone() for p in problem[0].parameters()]
    for question in ("largest eigenvalue", "trace", "diagonal"):
        for ask in peers.PEERS[question].values():
            ask(*problem)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))


def test_error():
    assert peers.error(2.0, 1.0) == 1.0
    assert peers.error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)) == pytest.approx(
        5**-0.5
    )
    assert peers.error(float("nan"), 1.0) == float("inf")
    assert peers.error(0.0, 0.0) == 0.0 and peers.error(0.5, 0.0) == 0.5
    with pytest.raises(ValueError, match="an answer of shape"):
        peers.error(torch.ones(3), 2.0)
