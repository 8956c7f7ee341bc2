"""Modules that people have, as stages: every answer against the double-backward matrix of the user's own model, and that against finite differences."""

import copy

import pytest
import torch
from conftest import build, relative
from torch import nn

import hinv
from hinv import GGN, AccuracyWarning, CertificateWarning, Hessian, optim
from hinv.network.blocks import agree

CE = nn.CrossEntropyLoss()


def double_backward(model, loss, x, y):
    """(P, P), row by row, of the model itself: no chain, no copy."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in first])
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def differences(model, loss, x, y, v, h=1e-5):
    """H v by central differences of the gradient."""

    def gradient(sign):
        moved = copy.deepcopy(model)
        parameters = [p for p in moved.parameters() if p.requires_grad]
        flat = nn.utils.parameters_to_vector([p.contiguous() for p in parameters]) + sign * h * v
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.data = piece.view(p.shape).detach()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(moved(x), y), parameters)])

    return (gradient(1) - gradient(-1)) / (2 * h)


class Sequence(nn.Module):
    """A module of token sequences on (B, T a): reshaped in and out."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.width = inner, width

    def forward(self, z):
        out = self.inner(z.view(len(z), -1, self.width))
        return (out[0] if isinstance(out, tuple) else out).flatten(1)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, z):
        return super().forward(z, z, z, need_weights=False)[0]


class Scaled(nn.Module):
    def forward(self, z):
        q = z.view(len(z), 1, 3, 4)
        return nn.functional.scaled_dot_product_attention(q, q, q).reshape(z.shape)


def between(module, width=12, out=12):
    return nn.Sequential(nn.Linear(5, width), module, nn.Tanh(), nn.Linear(out, 3))


MODULES = {
    "PReLU": lambda: between(nn.PReLU()),
    "PReLU of each unit": lambda: between(nn.PReLU(12)),
    "InstanceNorm1d": lambda: between(Sequence(nn.InstanceNorm1d(3, affine=True), 4)),
    "InstanceNorm2d": lambda: nn.Sequential(
        nn.Linear(5, 18), nn.Unflatten(1, (2, 3, 3)), nn.InstanceNorm2d(2), nn.Flatten(), nn.Tanh(), nn.Linear(18, 3)
    ),
    "GroupNorm": lambda: between(Sequence(nn.GroupNorm(3, 3), 4)),
    "RMSNorm": lambda: between(nn.RMSNorm(12)),
    "LSTM": lambda: between(Sequence(nn.LSTM(4, 3, batch_first=True), 4), out=9),
    "GRU": lambda: between(Sequence(nn.GRU(4, 3, batch_first=True), 4), out=9),
    "RNN": lambda: between(Sequence(nn.RNN(4, 3, batch_first=True), 4), out=9),
    "fused attention": lambda: between(Scaled()),
    "MultiheadAttention": lambda: between(Sequence(SelfAttention(4, 2, batch_first=True), 4)),
    "TransformerEncoderLayer": lambda: between(
        Sequence(nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True), 4)
    ).eval(),
    "Bilinear-like": lambda: between(nn.GLU(), out=6),
    "Softmax": lambda: between(nn.Softmax(dim=1)),
    "LayerNorm": lambda: between(nn.LayerNorm(12)),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    torch.manual_seed(0)
    model, x, y = MODULES[name]().double(), torch.randn(5, 5).double(), torch.tensor([0, 1, 2, 0, 1])
    D = double_backward(model, CE, x, y)
    v = torch.randn(len(D)).double()
    assert relative(D @ v, differences(model, CE, x, y, v)) < 1e-6
    H = Hessian(model, CE, x, y)
    assert relative(H.dense(), D) < 1e-10
    shifted = D + 0.1 * torch.eye(len(D), dtype=D.dtype)
    for method in ("factor", "sparse", "tridiagonal"):
        assert relative(shifted @ H.solve(H.gradient, 0.1, method), H.gradient) < 1e-8, method
    values = torch.linalg.eigvalsh(D)
    F = H.factor(0.1)
    assert F.inertia[1] == int((values < -0.1).sum())
    assert F.logdet[1] == pytest.approx((values + 0.1).abs().log().sum().item(), rel=1e-8, abs=1e-8)
    assert relative(H.diagonal(), D.diagonal()) < 1e-10
    G = GGN(model, CE, x, y)
    assert (
        relative(
            G.factor(0.1).solve(G.gradient), torch.linalg.solve(G.dense() + 0.1 * torch.eye(len(D)).to(D), G.gradient)
        )
        < 1e-8
    )


class Upcast(nn.Module):
    """As large language models have it: the statistics in float32 whatever comes in."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, z):
        wide = z.float()
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(z.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [12, 96])
def test_a_module_that_computes_in_float32_inside(dtype, width):
    """Its derivatives have seven digits: right to those, or named."""
    torch.manual_seed(0)
    model, x, y = between(Upcast(width), width, width).to(dtype), torch.randn(40, 5).to(dtype), torch.arange(40) % 3
    try:
        H = Hessian(model, CE, x, y)
        step = H.solve(H.gradient, 0.1)
    except (ValueError, RuntimeError) as error:
        assert "float32 inside" in str(error)
        return
    assert (H @ step + 0.1 * step - H.gradient).norm() < 1e-4 * H.gradient.norm()


def test_what_float32_rounding_is_called():
    stage = Hessian(*build("layernorm")).chain.stages[1]
    with pytest.raises(RuntimeError, match=r"disagree.*float32 inside"):
        agree(stage, [(torch.ones(3).double(), torch.ones(3).double() * (1 + 1e-7))])
    with pytest.raises(RuntimeError, match=r"elementary operations\.$"):
        agree(stage, [(torch.ones(3).double(), torch.ones(3).double() * 1.1)])


def test_a_float32_loss_that_holds_a_tensor_is_named():
    """What a closure holds does not become float64 with the model, in which solves and counts are made."""
    torch.manual_seed(0)
    model, x, y = between(nn.Tanh()), torch.randn(5, 5), torch.tensor([0, 1, 2, 0, 1])
    weight = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"in torch.float64.*weight\.to\(outputs\.dtype\)"):
        Hessian(model, lambda o, t: nn.functional.cross_entropy(o, t, weight=weight), x, y)
    H = Hessian(model, lambda o, t: nn.functional.cross_entropy(o, t, weight=weight.to(o.dtype)), x, y)
    assert H.eigsh(2).certified


def transposed():
    layer = nn.Linear(5, 5).double()
    layer.weight = nn.Parameter(layer.weight.data.T.contiguous().T)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3).double())


def channels_last():
    net = nn.Sequential(
        nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 4, (1, 2)), nn.Tanh(), nn.Conv2d(4, 3, (1, 2)), nn.Flatten()
    )
    return nn.Sequential(net, nn.Linear(9, 3)).double().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [transposed, channels_last])
def test_weights_that_lie_otherwise_in_memory(make):
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(5, 5).double(), torch.tensor([0, 1, 2, 0, 1])
    assert not all(p.is_contiguous() for p in model.parameters())
    D = double_backward(model, CE, x, y)
    H = Hessian(model, CE, x, y)
    assert relative(H.dense(), D) < 1e-10
    assert relative(H.solve(H.gradient, 0.1), torch.linalg.solve(D + 0.1 * torch.eye(len(D)).to(D), H.gradient)) < 1e-8
    assert relative(H.diagonal(), D.diagonal()) < 1e-10


def test_float32_after_long_training():
    """Nearly certain outputs: in float32 the curvature is rounding, and two products with it are not symmetric; in float64 it is right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(3000):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    H = Hessian(model, CE, x, y)
    assert H.loss < 1e-5
    D = double_backward(copy.deepcopy(model).double(), CE, x.double(), y)
    found = H.eigsh(3)
    assert found.certified
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(D)[-3:], rtol=1e-8, atol=1e-16)


class Whole(nn.Module):
    """As docs/models.md has it: several inputs of a sample side by side in one tensor."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, z):
        return self.inner(z[:, :6].view(-1, 2, 3), z[:, 6:])


class Masked(nn.Module):
    """A model that is no pipeline, of two inputs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.TransformerEncoderLayer(3, 1, 5, dropout=0.0, batch_first=True), nn.Linear(3, 2)

    def forward(self, tokens, mask):
        return self.head((self.body(tokens) * mask.unsqueeze(2)).sum(1))


def test_a_whole_model_as_one_stage():
    torch.manual_seed(0)
    model = nn.Sequential(Whole(Masked())).double().eval()
    x, y = torch.cat([torch.randn(4, 6), (torch.rand(4, 2) > 0.3).float()], 1).double(), torch.tensor([0, 1, 1, 0])
    D = double_backward(model, CE, x, y)
    H = Hessian(model, CE, x, y)
    assert relative(H.dense(), D) < 1e-10
    shifted = D + 0.1 * torch.eye(len(D)).to(D)
    assert relative(shifted @ H.solve(H.gradient, 0.1, method="factor"), H.gradient) < 1e-8
    assert H.factor(0.1).inertia[1] == int((torch.linalg.eigvalsh(shifted) < 0).sum())


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "loss",
    [nn.NLLLoss(), nn.NLLLoss(reduction="sum", ignore_index=1), nn.NLLLoss(torch.tensor([1.0, 2.0, 0.5]).double())],
)
def test_log_softmax_under_nll_is_cross_entropy(loss, nested):
    """The Hessian is that of the pair as it stands; the Gauss-Newton matrix is that of cross-entropy, where that of the pair is zero."""
    torch.manual_seed(0)
    body, x, y = between(nn.Tanh()).double(), torch.randn(5, 5).double(), torch.tensor([0, 1, 2, 0, 1])
    model = (
        nn.Sequential(body, nn.Sequential(nn.LogSoftmax(dim=1))) if nested else nn.Sequential(*body, nn.LogSoftmax(-1))
    )
    same = nn.CrossEntropyLoss(loss.weight, ignore_index=loss.ignore_index, reduction=loss.reduction)
    H, G = Hessian(model, loss, x, y), GGN(model, loss, x, y)
    assert relative(H.dense(), double_backward(model, loss, x, y)) < 1e-10
    assert relative(G.dense(), GGN(body, same, x, y).dense()) < 1e-12 and G.dense().norm() > 1e-3
    assert relative(G.gradient, GGN(body, same, x, y).gradient) < 1e-12


def test_a_gauss_newton_matrix_that_is_zero_says_why():
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(*between(nn.Tanh()), nn.LogSoftmax(1)).double(),
        torch.randn(5, 5).double(),
        torch.tensor([0, 1, 2, 0, 1]),
    )
    with pytest.warns(AccuracyWarning, match="linear in the model's outputs, so the Gauss-Newton matrix is zero"):
        G = GGN(model, lambda o, t: nn.functional.nll_loss(o, t), x, y)
    assert G.dense().norm() == 0


# -- found by make fuzz ------------------------------------------------------------------------------------------------


def test_an_input_exactly_at_a_kink_is_named():
    """LayerNorm of one unit puts out zero, where autograd's PReLU has one slope forwards and another one backwards: the Hessian is none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1), nn.Linear(1, 3, bias=False), nn.PReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"stage '3' \(PReLU\).* exactly at a kink"):
        Hessian(model.double(), CE, torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 0]))


def test_a_module_whose_curvature_is_rounding_alone():
    """Attention over one token is the identity: its second derivative is zero but for rounding, which is not symmetric, and not refused for that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), Tokens(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 5).double(), torch.tensor([0, 1, 2, 0, 1])
    assert relative(Hessian(model, CE, x, y).dense(), double_backward(model, CE, x, y)) < 1e-10


class Tokens(nn.Module):
    def forward(self, z):
        q = z.view(len(z), 1, 1, -1)
        return nn.functional.scaled_dot_product_attention(q, q, q).reshape(z.shape)


def test_a_matrix_that_is_zero():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2)).double(), torch.randn(4, 3).double()
    H = Hessian(model, lambda o, t: (o * t).sum(), x, torch.ones(4, 2).double())
    with pytest.warns(CertificateWarning, match="the edge 0 is an eigenvalue"):
        assert H.counts([-1.0, 0.0, 1.0]).tolist() == [0, 8]
    assert abs(H.eigval(3)) < 1e-10
    with pytest.warns(AccuracyWarning, match="not reached"):
        H.solve(H.gradient, 0.0, method="cg")


def test_saddle_free_newton_where_the_gradient_is_zero():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(4, 5).double()
    before = model(x).detach()
    report = optim.SaddleFreeNewton(model, nn.MSELoss()).step(x, before)
    assert report.loss == 0 and report.step_norm < 1e-12


def test_float32_residuals_are_those_of_the_matrix_and_not_of_its_rounding():
    """Two normalizations in a row take a float32 product's digits: a residual taken with one would be its own. Solves take it in float64."""
    torch.manual_seed(0)
    x, y = torch.tensor([[79.0677, -45.3610, 6.7547], [-10.8369, -18.9045, 7.9729]]), torch.rand(2, 4)
    model = nn.Sequential(
        nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 4)
    )
    H = Hessian(model, nn.MSELoss(), x, y)
    D = double_backward(copy.deepcopy(model).double(), nn.MSELoss(), x.double(), y.double())
    size = torch.linalg.eigvalsh(D).abs().max().item()
    for method in ("auto", "factor", "sparse"):
        step = H.solve(H.gradient, size, method=method).double()
        true = ((D @ step + size * step - H.gradient.double()).norm() / H.gradient.norm()).item()
        assert H.last_solve.residual < 1e-6 and abs(true - H.last_solve.residual) < 1e-6


class BasicBlock(nn.Module):
    """Written as torchvision's: convolutions and normalizations as attributes, the addition in forward."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, z):
        skip = z if self.downsample is None else self.downsample(z)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(z))))) + skip)

    def taken_apart(self):
        """The same as a pipeline: two lines for a block of one's own."""
        body = nn.Sequential(self.conv1, self.bn1, self.relu, self.conv2, self.bn2)
        return nn.Sequential(hinv.Residual(body, self.downsample), nn.ReLU())


def test_torchvisions_blocks_taken_apart():
    torch.manual_seed(0)
    blocks = [BasicBlock(1, 2), BasicBlock(2, 2), BasicBlock(2, 3, stride=2)]
    tail = [nn.Flatten(), nn.Linear(12, 3)]
    whole, apart = (nn.Sequential(*b, *tail).double() for b in (blocks, [b.taken_apart() for b in blocks]))
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            module.running_mean.normal_(std=0.1), module.running_var.uniform_(0.5, 2.0)
    x, y = torch.randn(4, 1, 4, 4).double(), torch.arange(4) % 3
    whole.eval(), apart.eval()
    whole.parameters = apart.parameters  # a projection's come first there
    H, D = Hessian(apart, CE, x, y), double_backward(whole, CE, x, y)
    assert len(H.chain.stages) > 20
    b = torch.randn(len(D)).double()
    x = H.solve(b, 0.1, method="factor", rtol=1e-11)
    assert relative(D @ x + 0.1 * x, b) < 1e-10
    assert H.factor(0.1).inertia[1] == int((torch.linalg.eigvalsh(D) < -0.1).sum())


def test_a_residual_block_that_does_not_add_up_is_named():
    model = nn.Sequential(nn.Linear(3, 4), hinv.Residual(nn.Linear(4, 1)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"residual block '1': its skip gives \(2, 4\) and its body \(2, 1\).*skip="):
        Hessian(model, CE, torch.randn(2, 3), torch.tensor([0, 1]))
