"""Every input the structure cannot take is refused at construction, by name and with the remedy."""

import copy

import pytest
import torch
from conftest import DEVICE, build, reference_hessian, relative
from torch import nn

from hinv import Hessian
from hinv.network.chain import Chain
from hinv.network.copies import copied

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator(DEVICE).manual_seed(0))
Y = torch.tensor([0, 1, 0, 1])
CE = nn.CrossEntropyLoss()


def mlp(*middle):
    return nn.Sequential(nn.Linear(3, 5), *middle, nn.Linear(5, 2)).double()


class MeanOverBatch(nn.Module):
    def forward(self, z):
        return z - z.mean(0)


class Roll(nn.Module):
    def forward(self, z):
        return z.roll(1, 0)


class Noise(nn.Module):
    def forward(self, z):
        return z + torch.randn_like(z)


class Pair(nn.Module):
    def forward(self, z):
        return z, z


class Owner(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 2))
        self.extra = nn.Parameter(torch.ones(1))


class Rewired(nn.Sequential):
    def forward(self, z):
        return super().forward(z) + 1


def tied():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(3, 2)).double()


def twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2)).double()


def hooked():
    model = mlp(nn.Tanh())
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def normed():
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 5).double()), nn.Tanh(), nn.Linear(5, 2).double()
    )


def nan_weight():
    model = mlp()
    model[0].weight.data[0, 0] = float("nan")
    return model


def overflowing():
    model = mlp(nn.Softplus())
    model[0].weight.data.fill_(1e308)
    return model


def mixed_dtype():
    return nn.Sequential(nn.Linear(3, 2).double(), nn.Linear(2, 2).float())


nan = X.clone()
nan[1, 1] = float("nan")
BAD = {
    "batchnorm in training": (
        lambda: mlp(nn.BatchNorm1d(5)),
        CE,
        X,
        Y,
        ValueError,
        r"'1' \(BatchNorm1d\) mixes samples .* model.eval",
    ),
    "batchnorm without statistics": (
        lambda: mlp(nn.BatchNorm1d(5, track_running_stats=False)).eval(),
        *(CE, X, Y, ValueError, "BatchNorm1d.* mixes samples"),
    ),
    "dropout in training": (
        lambda: mlp(nn.Dropout(0.5)),
        CE,
        X,
        Y,
        ValueError,
        r"'1' \(Dropout\) is random .* model.eval",
    ),
    "mean over the batch": (
        lambda: mlp(MeanOverBatch()),
        CE,
        X,
        Y,
        ValueError,
        r"stage '1' \(MeanOverBatch\) mixes samples",
    ),
    "roll over the batch": (lambda: mlp(Roll()), CE, X, Y, ValueError, r"stage '1' \(Roll\) mixes samples"),
    "random module": (
        lambda: mlp(Noise()),
        CE,
        X,
        Y,
        ValueError,
        r"stage '1' \(Noise\) mixes samples \(or is random\)",
    ),
    "hooked module": (hooked, CE, X, Y, ValueError, r"'1' \(Tanh\) has forward hooks.*remove them"),
    "weight_norm, whose double backward is wrong": (
        normed,
        CE,
        X,
        Y,
        ValueError,
        r"stage '0' \(ParametrizedLinear\) cannot be differentiated twice.*not symmetric, so it is wrong",
    ),
    "complex parameters": (lambda: mlp().to(torch.complex128), CE, X, Y, TypeError, "'0.weight' is torch.complex128"),
    "lazy layer": (
        lambda: nn.Sequential(nn.LazyLinear(2, dtype=X.dtype)),
        CE,
        X,
        Y,
        ValueError,
        "'0.weight' is not initialized",
    ),
    "outputs without units": (
        lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double(),
        *(
            nn.MSELoss(),
            X,
            X[:, 0],
            ValueError,
            "maps a batch of 4 to .4,.: each stage must map one tensor to one tensor, batch dimension first",
        ),
    ),
    "inputs as a list": (mlp, CE, X.tolist(), Y, TypeError, "inputs must be a torch tensor, not list"),
    "no targets": (mlp, CE, X, None, TypeError, "targets must be a torch tensor, not NoneType"),
    "random loss": (
        mlp,
        lambda out, y: (out * torch.rand_like(out)).sum(),
        X,
        Y,
        ValueError,
        "the loss gives two values on the same outputs",
    ),
    "loss with a NaN gradient": (
        mlp,
        *(lambda out, y: ((out - out.detach()) ** 2).sum(1).sqrt().sum() + out.sum(), X, Y, ValueError),
        "the loss's gradient or second derivative is NaN",
    ),
    "loss without second derivative": (mlp, nn.MultiMarginLoss(), X, Y, ValueError, "cannot be differentiated twice"),
    "two outputs": (
        lambda: mlp(Pair()),
        CE,
        X,
        Y,
        ValueError,
        r"maps a batch of 4 to tuple: each stage must map one tensor to one",
    ),
    "flattened batch": (lambda: mlp(nn.Flatten(0)), CE, X, Y, ValueError, r"maps a batch of 4 to \(20,\)"),
    "sizes do not chain": (
        lambda: mlp(nn.Linear(4, 5)),
        CE,
        X,
        Y,
        ValueError,
        r"stage '1' \(Linear\(in_features=4.*cannot take the \(4, 5\)",
    ),
    "tied weights": (tied, CE, X, Y, ValueError, "stages '0' and '2' share a parameter"),
    "module used twice": (twice, CE, X, Y, ValueError, "stages '0' and '2' share a parameter"),
    "not a Sequential": (
        lambda: nn.Linear(3, 2).double(),
        CE,
        X,
        Y,
        TypeError,
        "must be an nn.Sequential .* not Linear",
    ),
    "Sequential with its own forward": (lambda: Rewired(nn.Linear(3, 2)).double(), CE, X, Y, TypeError, "not Rewired"),
    "parameters outside": (lambda: Owner().double(), CE, X, Y, ValueError, "outside its stages"),
    "nothing trainable": (lambda: mlp().requires_grad_(False), CE, X, Y, ValueError, "no trainable parameter"),
    "nothing at all": (lambda: nn.Sequential(), CE, X, Y, ValueError, "no trainable parameter"),
    "integer inputs": (mlp, CE, X.long(), Y, TypeError, "inputs are torch.int64"),
    "NaN inputs": (mlp, CE, nan, Y, ValueError, "inputs contain NaN"),
    "infinite inputs": (mlp, CE, X / 0, Y, ValueError, "inputs contain NaN or infinite"),
    "NaN weights": (nan_weight, CE, X, Y, ValueError, "'0.weight' contains NaN"),
    "overflowing activations": (overflowing, CE, X.abs() + 1, Y, ValueError, "puts out NaN or infinite values"),
    "empty batch": (mlp, CE, X[:0], Y[:0], ValueError, r"inputs of shape \(0, 3\)"),
    "no batch dimension": (mlp, CE, X[0], Y[:1], ValueError, r"inputs of shape \(3,\)"),
    "half precision": (lambda: mlp().half(), CE, X.half(), Y, TypeError, "'0.weight' is torch.float16"),
    "dtypes differ": (
        lambda: mlp().float(),
        CE,
        X,
        Y,
        TypeError,
        "'0.weight' is torch.float32, the inputs torch.float64",
    ),
    "dtypes differ inside": (mixed_dtype, CE, X, Y, TypeError, "'1.weight' is torch.float32"),
    "devices differ": (
        lambda: mlp().to("meta"),
        CE,
        X,
        Y,
        ValueError,
        "'0.weight' is on meta, the inputs on (cpu|cuda)",
    ),
    "targets elsewhere": (mlp, CE, X, Y.to("meta"), ValueError, "targets are on meta"),
    "label too large": (mlp, CE, X, Y + 1, ValueError, "label 2 is out of range: the model has 2 outputs"),
    "label negative": (mlp, CE, X, Y - 1, ValueError, "label -1 is out of range"),
    "labels as floats": (mlp, CE, X, Y.double(), TypeError, "class labels as int64"),
    "labels of another shape": (mlp, CE, X, Y[:, None], ValueError, r"class labels have shape \(4, 1\)"),
    "too few targets": (mlp, CE, X, Y[:3], ValueError, "4 outputs but targets of shape"),
    "scalar target": (mlp, CE, X, Y[0], ValueError, r"targets of shape \(\)"),
    "all labels ignored": (mlp, CE, X, torch.full((4,), -100), ValueError, "the loss is nan"),
    "MSE targets broadcast": (mlp, nn.MSELoss(), X, X[:, :1], ValueError, "reshape them"),
    "MSE integer targets": (
        mlp,
        nn.MSELoss(),
        X,
        torch.ones(4, 2).long(),
        TypeError,
        "MSELoss takes floating-point targets",
    ),
    "NaN targets": (mlp, nn.MSELoss(), X, X[:, :2] * float("nan"), ValueError, "targets contain NaN"),
    "loss not a scalar": (mlp, nn.CrossEntropyLoss(reduction="none"), X, Y, ValueError, "the loss must be one number"),
    "loss raises": (mlp, nn.NLLLoss(), X, Y[:, None], ValueError, "refused outputs of shape"),
    "loss couples samples": (mlp, lambda out, y: out.mean() ** 2, X, Y, ValueError, "the loss couples samples"),
    "loss couples the last two": (
        mlp,
        lambda out, y: (out[2] * out[3]).sum() + out.sum(),
        X,
        Y,
        ValueError,
        "couples samples",
    ),
    "loss is constant": (
        mlp,
        lambda out, y: torch.tensor(1.0),
        X,
        Y,
        ValueError,
        "does not depend on the model's outputs",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("unenforced")
def test_bad_input_is_refused(name):
    model, loss, x, y, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        Hessian(model(), loss, x, y)


@pytest.mark.parametrize("name", ["residual blocks", "nested, eval batchnorm and dropout", "convolution"])
def test_backward_signal_is_autograd_of_the_tail(name):
    """b_l = d loss / d z_l, against autograd run from z_l through the rest of the original model."""
    model, loss, x, y = build(name)
    chain = Chain(model, loss, x, y)
    modules = [m for m in model.modules() if not isinstance(m, nn.Sequential) and m is not model]
    modules = [
        m for m in modules if any(type(m) is type(s.module) for s in chain.stages) and not _inside_residual(model, m)
    ]
    assert len(modules) == len(chain.stages)
    for k, stage in enumerate(chain.stages):
        z = stage.outputs.detach().requires_grad_()
        out = z
        for module in modules[k + 1 :]:
            out = module(out)
        if any(s.parameters for s in chain.stages[: k + 1]):
            (expected,) = torch.autograd.grad(loss(out, y), z)
            torch.testing.assert_close(stage.b, expected)


def _inside_residual(model, module):
    return any(
        module is child for block in model.modules() if type(block).__name__ == "Residual" for child in block.children()
    )


def test_names_and_kinds_of_stages():
    chain = Chain(*build("nested, eval batchnorm and dropout"))
    assert [s.name for s in chain.stages] == ["0", "1.0", "1.1", "1.2", "2.0.0", "2.0.1"]
    assert [s.kind for s in chain.stages] == [
        "elementwise",
        "linear",
        "general",
        "elementwise",
        "elementwise",
        "linear",
    ]


def test_the_model_is_left_alone_and_a_snapshot_is_kept():
    model, loss, x, y = build("tanh, cross-entropy")
    H = Hessian(model, loss, x, y)
    assert all(p.grad is None for p in model.parameters())
    v = torch.ones(H.shape[0], dtype=H.dtype)
    before = H @ v
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    x.zero_()
    assert torch.equal(H @ v, before)


class InPlace(nn.Module):
    def forward(self, z):
        return z.mul_(2.0).tanh_()


@pytest.mark.parametrize(
    "module", [nn.Mish(inplace=True), nn.SELU(inplace=True), InPlace(), nn.Sequential(nn.ReLU(inplace=True))]
)
@pytest.mark.parametrize("place", [0, 1])
def test_modules_that_work_in_place_change_nothing(module, place):
    """As first stage they must not overwrite the batch, as a middle one not what came before."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)]
    model = nn.Sequential(*layers[:place], module, *layers[place:]).double()
    x = X.clone()
    H = Hessian(model, CE, x, Y)
    assert torch.equal(x, X) and torch.equal(H.chain.inputs, X)
    assert relative(H.dense(), reference_hessian(model, CE, X, Y)) < 1e-10
    assert H.solve(H.gradient, 0.1).isfinite().all() and H.last_solve.residual < 1e-8


def test_buffers_may_be_infinite():
    """A causal attention mask holds -inf."""
    model = mlp(nn.Tanh())
    model[1].register_buffer("mask", torch.full((2,), -float("inf"), dtype=X.dtype))
    assert Hessian(model, CE, X, Y).loss > 0


def test_inference_mode_is_named():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="leave it first"):
        Hessian(mlp(), CE, X, Y)


def test_copies_are_deepcopys():
    """Parameters that two modules share, buffers, settings, hooks, modules of the user's own, and tensors that lie otherwise in memory."""

    class Own(nn.Linear):
        extra = None

    shared, own = nn.Linear(3, 3), Own(3, 3)
    own.extra = [torch.ones(2)]
    transposed = nn.Linear(3, 3)
    transposed.weight = nn.Parameter(torch.randn(3, 3).T, requires_grad=False)
    model = nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(3), shared), own, nn.Linear(3, 3), transposed).eval()
    model[3].weight = shared.weight
    model[3].register_buffer("unused", None)
    new, reference = copied(model), copy.deepcopy(model)
    assert repr(new) == repr(reference) and not new.training
    for (name, ours), (other, theirs) in zip(new.state_dict().items(), reference.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    old = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    assert not old & {t.data_ptr() for t in [*new.parameters(), *new.buffers()]}
    assert new[0] is new[1][1] and new[3].weight is new[0].weight and new[2].extra[0] is not own.extra[0]
    assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in model.parameters()]
    model[0].register_forward_hook(lambda *_: None)
    model[3].register_parameter("late", nn.Parameter(torch.ones(1)))
    assert not new[0]._forward_hooks and "late" not in dict(new[3].named_parameters())
