"""What an installed hinv must do, with nothing but its own dependencies: python tests/smoke.py, from outside the source tree."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

import hinv
from hinv.companion import checks

package = Path(hinv.__file__).parent
assert not (package.parent / "pyproject.toml").exists(), f"{package} is the source tree, not an installed package"
assert (package / "py.typed").exists(), "the wheel lacks py.typed"
assert Path.cwd() == checks.ROOT, "results and figures belong in the working folder"
assert version("hinv") == hinv.__version__
missing = {"matplotlib", "sklearn", "torchvision", "curvlinops", "jaxtyping"} & set(sys.modules)
assert not missing - {"jaxtyping"}, f"import hinv must not load {missing}"

x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
model = hinv.tall_skinny((6, *[5] * 6, 4), gain=1.2)
H = hinv.Hessian(model, torch.nn.CrossEntropyLoss(), x, torch.arange(12) % 4)
D = H.dense()
values = torch.linalg.eigvalsh(D)
for method in ("auto", "factor", "sparse", "tridiagonal", "woodbury", "dense"):
    step = H.solve(H.gradient, 0.1, method)
    assert ((D @ step + 0.1 * step - H.gradient).norm() / H.gradient.norm()).item() < 1e-8, method
F = H.factor(0.05)
assert F.inertia[1] == int((values < -0.05).sum())
assert abs(F.logdet[1] - (values + 0.05).abs().log().sum().item()) < 1e-8
assert H.counts([-10.0, -0.01, 0.01, 10.0]).sum() == len(values)
pairs = H.eigsh(2, "SA")
assert pairs.certified and torch.allclose(pairs.values, values[:2])
assert abs(H.trace() - D.trace().item()) < 1e-10
before = H.loss
report = hinv.optim.GaussNewton(model, torch.nn.CrossEntropyLoss()).step(x, torch.arange(12) % 4)
assert report.accepted and report.loss_after < before
conv = torch.nn.Sequential(
    torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)
).double()
H = hinv.Hessian(
    conv, torch.nn.CrossEntropyLoss(), x[:, :4].reshape(12, 1, 2, 2).repeat(1, 1, 2, 2), torch.arange(12) % 3
)
H.solve(H.gradient, 0.1, "factor")
assert H.last_solve.residual < 1e-8
print(f"hinv {hinv.__version__} with torch {torch.__version__}, Python {sys.version.split()[0]}: all right")
