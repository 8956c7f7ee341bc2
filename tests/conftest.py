"""Networks that every test file draws from, and references that do not share a code path with hinv."""

import copy
import os

import hypothesis
import jaxtyping
import pytest
import torch
from torch import nn

jaxtyping.install_import_hook("hinv", "enforce.enforced")  # types and shapes are enforced at every call

import hinv  # noqa: E402
from hinv import SharedLinear, tall_skinny  # noqa: E402

torch.set_num_threads(1)  # pytest runs one process a core
DEVICE = os.environ.get("HINV_DEVICE", "cpu")  # where the tests make their tensors: `make cuda`
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
hypothesis.settings.register_profile("untimed", deadline=None)  # the first call under the hook takes a second
hypothesis.settings.load_profile("untimed")
os.environ.pop("HINV_RUNS", None)  # what tests train stays theirs


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error::hinv.AccuracyWarning")


@pytest.fixture
def unenforced():
    """For tests of what hinv itself says of wrong arguments, which the enforced types would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Residual(nn.Module):
    """z + W2 tanh(W1 z): a small graph as one stage."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, z):
        return z + self.outer(torch.tanh(self.inner(z)))


class TanhOfJet(nn.Module):
    """(u, u', u'') of a function of one variable through tanh."""

    def forward(self, z):
        u, first, second = z.unbind(1)
        t = torch.tanh(u)
        slope = 1 - t**2
        return torch.stack([t, slope * first, slope * second - 2 * t * slope * first**2], 1)


def _jet(batch):
    """Points (x, 1) as jets in x: the values, their first derivatives (1, 0), and none."""
    x = _x(batch, 1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack([torch.cat(pair, 1) for pair in ((x, one), (one, zero), (zero, zero))], 1)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def _mlp(sizes, activation=nn.Tanh, bias=True, gain=1.2):
    return tall_skinny(sizes, activation, bias=bias, gain=gain, seed=3)


def _labels(batch, classes):
    return torch.arange(batch) % classes


def _x(batch, *shape):
    return torch.randn(batch, *shape, generator=torch.Generator(DEVICE).manual_seed(batch), dtype=torch.float64)


def _eval_norm():
    norm = nn.BatchNorm1d(5)
    norm.running_mean.copy_(torch.linspace(-0.3, 0.3, 5))
    norm.running_var.copy_(torch.linspace(0.5, 2.0, 5))
    return norm


def build(name: str):
    """(model, loss, inputs, targets) in float64."""
    torch.manual_seed(0)
    model, loss, x, y = _NETWORKS[name]()
    return model.double(), loss, x, y


# name -> a small problem; batches larger than the number of classes, every activation and loss of the list in docs/models.md
_NETWORKS = {
    "tanh, cross-entropy": lambda: (_mlp((6, 5, 5, 4)), nn.CrossEntropyLoss(), _x(9, 6), _labels(9, 4)),
    "tanh without bias, B < C": lambda: (
        _mlp((6, 5, 5, 4), bias=False),
        nn.CrossEntropyLoss(),
        _x(3, 6),
        _labels(3, 4),
    ),
    "sigmoid, MSE": lambda: (_mlp((4, 6, 3, 2), nn.Sigmoid), nn.MSELoss(), _x(7, 4), _x(7, 2) + 1),
    "softplus, BCE": lambda: (
        _mlp((5, 4, 4, 3), nn.Softplus),
        nn.BCEWithLogitsLoss(),
        _x(6, 5),
        (_x(6, 3) > 0).double(),
    ),
    "gelu, weighted sum": lambda: (
        _mlp((5, 4, 4, 3), nn.GELU),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]).double(), reduction="sum"),
        _x(5, 5),
        _labels(5, 3),
    ),
    "silu, label smoothing": lambda: (
        _mlp((5, 4, 4, 3), nn.SiLU),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        _x(5, 5),
        _labels(5, 3),
    ),
    "elu, custom loss": lambda: (
        _mlp((4, 5, 3, 2), nn.ELU),
        lambda out, y: ((out - y) ** 4).sum(1).mean(),
        _x(5, 4),
        _x(5, 2) + 1,
    ),
    "relu": lambda: (_mlp((6, 7, 7, 3), nn.ReLU), nn.CrossEntropyLoss(), _x(8, 6), _labels(8, 3)),
    "layernorm": lambda: (
        nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
        nn.CrossEntropyLoss(),
        _x(6, 5),
        _labels(6, 3),
    ),
    "convolution": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Tanh(), nn.Linear(2, 3)
        ),
        nn.CrossEntropyLoss(),
        _x(5, 1, 6, 6),
        _labels(5, 3),
    ),
    "convolution in one dimension": lambda: (
        nn.Sequential(
            nn.Conv1d(2, 3, 3, padding=1, dilation=1),
            nn.Tanh(),
            nn.Conv1d(3, 2, 2, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(6, 3),
        ),
        nn.CrossEntropyLoss(),
        _x(5, 2, 6),
        _labels(5, 3),
    ),
    "tokens": lambda: (
        nn.Sequential(
            nn.Linear(3, 4),
            nn.LayerNorm(4),
            nn.GELU(),
            nn.Linear(4, 5, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(15, 3),
        ),
        nn.CrossEntropyLoss(),
        _x(4, 3, 3),
        _labels(4, 3),
    ),
    "outputs on positions": lambda: (
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        nn.MSELoss(),
        _x(3, 2, 2, 4),
        _x(3, 2, 2, 2),
    ),
    "jets": lambda: (
        nn.Sequential(
            SharedLinear(2, 5, (1, 0, 0)),
            TanhOfJet(),
            SharedLinear(5, 4, (1, 0, 0)),
            TanhOfJet(),
            SharedLinear(4, 1, (1, 0, 0)),
        ),
        lambda out, y: ((out[:, 2, 0] + out[:, 0, 0] - y) ** 2).mean(),
        _jet(7),
        _x(7, 1)[:, 0],
    ),
    "max pooling": lambda: (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
        nn.CrossEntropyLoss(),
        _x(5, 1, 6, 6),
        _labels(5, 3),
    ),
    "residual blocks": lambda: (
        nn.Sequential(nn.Linear(4, 5), Residual(5, 3), Residual(5, 2), nn.Tanh(), nn.Linear(5, 3)),
        nn.CrossEntropyLoss(),
        _x(6, 4),
        _labels(6, 3),
    ),
    "skip connections": lambda: (
        nn.Sequential(
            nn.Linear(4, 5),
            hinv.Residual(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5))),
            nn.Tanh(),
            hinv.Residual(
                nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 5, bias=False)), nn.Linear(5, 5)
            ),
            nn.Linear(5, 3),
        ),
        nn.CrossEntropyLoss(),
        _x(6, 4),
        _labels(6, 3),
    ),
    "skip connections, nested, first and last": lambda: (
        nn.Sequential(
            hinv.Residual(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))),
            hinv.Residual(
                nn.Sequential(
                    nn.Linear(4, 4),
                    hinv.Residual(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 4, bias=False)),
                    nn.Linear(4, 2),
                ),
                nn.Sequential(nn.Tanh(), nn.Linear(4, 2)),
            ),
        ),
        nn.CrossEntropyLoss(),
        _x(5, 4),
        _labels(5, 2),
    ),
    "skip connections over images": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Tanh(),
            hinv.Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1))),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        nn.CrossEntropyLoss(),
        _x(4, 1, 4, 4),
        _labels(4, 3),
    ),
    "nested, eval batchnorm and dropout": lambda: (
        nn.Sequential(
            nn.Flatten(),
            nn.Sequential(nn.Linear(6, 5), _eval_norm(), nn.Tanh()),
            nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))),
        ).eval(),
        nn.CrossEntropyLoss(),
        _x(6, 2, 3),
        _labels(6, 3),
    ),
    "frozen layers": lambda: (
        nn.Sequential(
            frozen(nn.Linear(6, 6)),
            nn.Tanh(),
            nn.Linear(6, 4),
            nn.Tanh(),
            frozen(nn.Linear(4, 4)),
            nn.Tanh(),
            nn.Linear(4, 3),
        ),
        nn.CrossEntropyLoss(),
        _x(5, 6),
        _labels(5, 3),
    ),
    "frozen bias, in-place relu": lambda: (
        nn.Sequential(
            nn.Linear(5, 6), nn.ReLU(inplace=True), _frozen_bias(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)
        ),
        nn.CrossEntropyLoss(),
        _x(5, 5),
        _labels(5, 3),
    ),
    "one layer": lambda: (nn.Sequential(nn.Linear(4, 3)), nn.CrossEntropyLoss(), _x(6, 4), _labels(6, 3)),
    "one sample": lambda: (_mlp((4, 3, 3, 2)), nn.CrossEntropyLoss(), _x(1, 4), _labels(1, 2)),
    "twelve layers": lambda: (_mlp((4, *[4] * 11, 3), gain=1.0), nn.CrossEntropyLoss(), _x(5, 4), _labels(5, 3)),
}


def _frozen_bias(linear: nn.Linear) -> nn.Linear:
    linear.bias.requires_grad_(False)
    return linear


NAMES = list(_NETWORKS)


def reference_loss(model, loss, x, y):
    """The loss as a function of the flat trainable parameters, by torch.func.functional_call on the whole model."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def function(vector):
        pieces = vector.split([p.numel() for p in named.values()])
        values = {n: v.view_as(p) for (n, p), v in zip(named.items(), pieces, strict=True)}
        return loss(torch.func.functional_call(model, values, (x.clone(),)), y)

    return function, torch.cat([p.detach().flatten() for p in named.values()])


class ElementaryLayerNorm(nn.LayerNorm):
    """The same function in elementary operations: torch.func.hessian of nn.LayerNorm itself is wrong in torch 2.14."""

    def forward(self, z):
        centred = z - z.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def reference_hessian(model, loss, x, y):
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = ElementaryLayerNorm
    function, vector = reference_loss(model, loss, x, y)
    return torch.func.hessian(function)(vector)


def relative(value, reference):
    return (torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference)).item()


@pytest.fixture(params=NAMES)
def problem(request):
    return build(request.param)
