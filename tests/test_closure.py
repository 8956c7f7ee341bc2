"""optimizer.step(closure): the loop of everybody, with the steps of the methods."""

import copy

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.nn.utils import parameters_to_vector

from hinv import optim, tall_skinny

METHODS = {
    "DampedNewton": {"damping": 5.0},
    "GaussNewton": {"momentum": 0.3},
    "TrustRegionNewton": {},
    "SaddleFreeNewton": {"pairs": 5},
}


def problem(seed=0):
    x = torch.randn(12, 6, generator=torch.Generator(DEVICE).manual_seed(seed), dtype=torch.float64)
    return tall_skinny((6, 5, 5, 4), seed=seed), nn.CrossEntropyLoss(), x, torch.arange(12) % 4


def inner(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


def closure_of(optimizer, model, loss, x, y):
    def closure():
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    return closure


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_with_closures_takes_the_same_steps(method):
    model, loss, x, y = problem()
    plain = copy.deepcopy(model)
    cls = getattr(optim, method)
    optimizer = optim.ClosureOptimizer(cls(model, loss, inner(model), **METHODS[method]))
    descent = cls(plain, loss, inner(plain), **METHODS[method])
    halved = (
        torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        torch.optim.lr_scheduler.StepLR(descent.optimizer, 2, 0.5),
    )
    for step in range(5):
        few = slice(None) if method == "TrustRegionNewton" else slice(step % 2, None)
        value = optimizer.step(closure_of(optimizer, model, loss, x[few], y[few]))
        report = descent.step(x[few], y[few])
        assert value.item() == pytest.approx(report.loss, rel=1e-14)
        assert optimizer.report is not None and optimizer.report.damping == report.damping
        torch.testing.assert_close(parameters_to_vector(model.parameters()), parameters_to_vector(plain.parameters()))
        for schedule in halved:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == descent.optimizer.param_groups[0]["lr"] == 0.125


def test_state_goes_into_another_optimizer():
    model, loss, x, y = problem()
    first = optim.ClosureOptimizer(optim.GaussNewton(model, loss, inner(model), momentum=0.3))
    for _ in range(2):
        first.step(closure_of(first, model, loss, x, y))
    other = copy.deepcopy(model)
    second = optim.ClosureOptimizer(optim.GaussNewton(other, loss, inner(other), momentum=0.3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for group in (*first.param_groups, *second.param_groups):
        group["lr"] = 0.25  # seen by both, though the groups were loaded
    for optimizer, net in ((first, model), (second, other)):
        optimizer.step(closure_of(optimizer, net, loss, x, y))
    assert torch.equal(parameters_to_vector(model.parameters()), parameters_to_vector(other.parameters()))


def test_no_grad_around_the_step_and_a_float_returned():
    model, loss, x, y = problem()
    optimizer = optim.ClosureOptimizer(optim.GaussNewton(model, loss))
    closure = closure_of(optimizer, model, loss, x, y)
    with torch.no_grad():
        optimizer.step(lambda: closure().item())
    assert loss(model(x), y) < optimizer.report.loss


def test_what_it_cannot_follow_is_refused_and_nothing_moved():
    model, loss, x, y = problem()
    optimizer = optim.ClosureOptimizer(optim.GaussNewton(model, loss))
    before = parameters_to_vector(model.parameters()).clone()

    def refused(closure, match, error=ValueError):
        with pytest.raises(error, match=match):
            optimizer.step(closure)
        assert torch.equal(parameters_to_vector(model.parameters()), before)
        assert not model._forward_hooks and not loss._forward_hooks

    refused(None, r"step\(closure\)", TypeError)
    refused(lambda: loss(model(x[:6]), y[:6]) + loss(model(x[6:]), y[6:]), "model 2 times and the loss 2 times")
    refused(lambda: nn.CrossEntropyLoss()(model(x), y), "the loss 0 times")
    refused(lambda: loss(2 * model(x), y), "between the model and the loss")
    refused(lambda: loss(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters()), "penalties")

    def stops():
        raise RuntimeError("mine")

    refused(stops, "mine", RuntimeError)


def test_a_loss_that_is_a_function_and_a_wrapped_optimizer_are_refused():
    model, loss, _, _ = problem()
    with pytest.raises(TypeError, match=r"nn\.Module"):
        optim.ClosureOptimizer(optim.GaussNewton(model, nn.functional.cross_entropy))
    with pytest.raises(TypeError, match="that one itself"):
        optim.ClosureOptimizer(optim.GradientDescent(model, loss))
