"""What other libraries answer to the same questions, each by its own functions as its documentation calls them; and what hinv answers.

PEERS[question][library] is a function of (model, loss, x, y). A library without an entry offers no function for that question.
"""

import copy
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hinv.curvature import GGN, Hessian
from hinv.network import losses
from hinv.shapes import Float
from hinv.solver.products import operator as linear_operator

DAMPING = 1e-2  # of the determinants, inertias and solves
SIGMA = 2e-2  # where an interior eigenvalue is asked for
LEVEL = -1e-3  # of the share of the spectrum below
Answer = float | Tensor
Ask = Callable[..., Answer]  # of (model, loss, x, y)
LIBRARIES = ("hinv", "PyHessian", "hessian-eigenthings", "BackPACK", "curvlinops")


def _pyhessian(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Any:
    from pyhessian import hessian

    return hessian(copy.deepcopy(model), loss, data=(x, y), cuda=x.is_cuda)


def eigenthings(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> tuple[ModuleType, Any]:
    import hessian_eigenthings as he

    return he, he.HessianOperator(copy.deepcopy(model), [(x, y)], he.supervised_loss(loss))


def _lanczos(which: str, k: int = 1) -> Ask:
    def ask(*problem: Any) -> Answer:
        he, operator = eigenthings(*problem)
        values = he.lanczos(operator, k=k, which=which, max_iter=min(50, operator.size), seed=0).eigenvalues
        return values[0].item() if k == 1 else values.sort().values

    return ask


def _linop(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> tuple[ModuleType, Any]:
    import curvlinops

    model = copy.deepcopy(model)
    return curvlinops, curvlinops.HessianLinearOperator(model, loss, list(model.parameters()), [(x, y)])


def _arpack(which: str, k: int = 1) -> Ask:
    def ask(*problem: Any) -> Answer:
        from scipy.sparse.linalg import eigsh

        operator = _linop(*problem)[1].to_scipy()
        start = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0)).numpy()
        values = eigsh(operator, k, which=which, v0=start, return_eigenvectors=False)
        return float(values[0]) if k == 1 else torch.as_tensor(values.copy()).sort().values

    return ask


def _seeded(function: Ask) -> Ask:
    """curvlinops and PyHessian draw from the global random numbers."""

    def ask(*problem: Any) -> Answer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return function(*problem)

    return ask


def _backpack(extension: str, attribute: str) -> Callable[..., Tensor]:
    def ask(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, " P"]:
        from backpack import backpack, extend, extensions

        model = extend(copy.deepcopy(model))
        with backpack(getattr(extensions, extension)()):
            extend(copy.deepcopy(loss))(model(x), y).backward()
        return torch.cat([getattr(p, attribute).flatten() for p in model.parameters()])

    return ask


def _share_below(grid: Float[Tensor, " n"], density: Float[Tensor, " n"]) -> float:
    return (torch.trapezoid(density * (grid < LEVEL), grid) / torch.trapezoid(density, grid)).item()


def _pyhessian_density(*problem: Any) -> float:
    values, weights = _pyhessian(*problem).density()
    below = [sum(w for v, w in zip(vs, ws, strict=True) if v < LEVEL) for vs, ws in zip(values, weights, strict=True)]
    return float(sum(below) / len(below))


def _eigenthings_density(*problem: Any) -> float:
    he, operator = eigenthings(*problem)
    result = he.spectral_density(operator, seed=0)
    return _share_below(result.grid, result.density)


def _linop_density(*problem: Any) -> float:
    curvlinops, operator = _linop(*problem)
    return _share_below(*curvlinops.lanczos_approximate_spectrum(operator, ncv=64, num_repeats=10))


def _eigenthings_ggn(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> float:
    import hessian_eigenthings as he

    operator = he.GGNOperator(copy.deepcopy(model), [(x, y)], he.supervised_forward, he.supervised_loss_of_output(loss))
    return he.lanczos(operator, k=1, which="LA", max_iter=min(50, operator.size), seed=0).eigenvalues[0].item()


def _linop_ggn(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> float:
    import curvlinops
    from scipy.sparse.linalg import eigsh

    model = copy.deepcopy(model)
    operator = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(x, y)]).to_scipy()
    start = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0)).numpy()
    return float(eigsh(operator, 1, which="LA", v0=start, return_eigenvectors=False)[0])


def _linop_solve(*problem: Any) -> Float[Tensor, " P"]:
    from curvlinops.examples import IdentityLinearOperator

    curvlinops, operator = _linop(*problem)
    b = torch.cat([g.flatten() for g in operator.gradient_and_loss()[0]])
    shapes = [tuple(p.shape) for p in problem[0].parameters()]
    damped = operator + DAMPING * IdentityLinearOperator(shapes, b.device, b.dtype)
    return curvlinops.CGInverseLinearOperator(damped, max_iter=200, tolerance=1e-8, eps=0.0) @ b


def _interior_arpack(*problem: Any) -> float:
    """Without a factorization: Lanczos for the smallest magnitude of H - sigma I, by products, with a budget."""
    from scipy.sparse.linalg import eigsh

    operator = _linop(*problem)[1].to_scipy()
    shifted = linear_operator(operator.shape, operator.dtype, matvec=lambda v: operator @ v - SIGMA * v)
    start = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0)).numpy()
    return SIGMA + float(eigsh(shifted, 1, which="SM", v0=start, maxiter=20, return_eigenvectors=False)[0])


def _distributed(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, " P"]:
    """One process: enough to see that it runs, and gives the product."""
    import tempfile
    from pathlib import Path

    import hessian_eigenthings as he

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=(Path(folder) / "ranks").as_uri(), rank=0, world_size=1
        )
        try:
            operator = he.DDPHessianOperator(copy.deepcopy(model), [(x, y)], he.supervised_loss(loss))
            return operator.matvec(torch.ones(operator.size, dtype=x.dtype))
        finally:
            torch.distributed.destroy_process_group()


PEERS: dict[str, dict[str, Ask]] = {
    "largest eigenvalue": {
        "hinv": lambda *p: Hessian(*p).eigsh(1, "LA").values[0].item(),
        "PyHessian": _seeded(lambda *p: float(_pyhessian(*p).eigenvalues()[0][0])),
        "hessian-eigenthings": _lanczos("LA"),
        "curvlinops": _arpack("LA"),
    },
    "smallest eigenvalue": {
        "hinv": lambda *p: Hessian(*p).eigsh(1, "SA").values[0].item(),
        "hessian-eigenthings": _lanczos("SA"),
        "curvlinops": _arpack("SA"),
    },
    "top 5 in magnitude": {
        "hinv": lambda *p: Hessian(*p).eigsh(5, "LM").values,
        "PyHessian": _seeded(
            lambda *p: torch.tensor(_pyhessian(*p).eigenvalues(top_n=5)[0], dtype=torch.float64).sort().values
        ),
        "hessian-eigenthings": _lanczos("LM", 5),
        "curvlinops": _arpack("LM", 5),
    },
    "trace": {
        "hinv": lambda *p: Hessian(*p).trace(),
        "PyHessian": _seeded(lambda *p: float(sum(s := _pyhessian(*p).trace()) / len(s))),
        "hessian-eigenthings": lambda *p: (lambda he, op: he.trace(op, num_matvecs=300, seed=0).estimate)(
            *eigenthings(*p)
        ),
        "BackPACK": lambda *p: _backpack("DiagHessian", "diag_h")(*p).sum().item(),
        "curvlinops": _seeded(lambda *p: (lambda c, op: c.xtrace(op, num_matvecs=300).item())(*_linop(*p))),
    },
    "diagonal": {
        "hinv": lambda *p: Hessian(*p).diagonal(),
        "BackPACK": _backpack("DiagHessian", "diag_h"),
        "curvlinops": _seeded(lambda *p: (lambda c, op: c.xdiag(op, num_matvecs=300))(*_linop(*p))),
    },
    "share below -0.001": {
        "hinv": lambda *p: (lambda H: H.count_below(LEVEL) / H.shape[0])(Hessian(*p)),
        "PyHessian": _seeded(_pyhessian_density),
        "hessian-eigenthings": _eigenthings_density,
        "curvlinops": _seeded(_linop_density),
    },
    "GGN, largest eigenvalue": {
        "hinv": lambda *p: GGN(*p).eigsh(1, "LA").values[0].item(),
        "hessian-eigenthings": _eigenthings_ggn,
        "curvlinops": _linop_ggn,
    },
    "GGN, diagonal": {"hinv": lambda *p: GGN(*p).diagonal(), "BackPACK": _backpack("DiagGGNExact", "diag_ggn_exact")},
    "eigenvalue nearest 0.02": {
        "hinv": lambda *p: Hessian(*p).eigsh(1, sigma=SIGMA).values[0].item(),
        "curvlinops": _interior_arpack,
    },
    "negative ones of H + 0.01 I": {"hinv": lambda *p: Hessian(*p).factor(DAMPING).inertia[1]},
    "log |det(H + 0.01 I)|": {"hinv": lambda *p: Hessian(*p).logdet(DAMPING)[1]},
    "(H + 0.01 I)^-1 g": {
        "hinv": lambda *p: (lambda H: H.solve(H.gradient, DAMPING, "factor"))(Hessian(*p)),
        "curvlinops": _linop_solve,
    },
    "H v, distributed": {"hessian-eigenthings": _distributed},
}


def truth(model: nn.Sequential, loss: losses.Loss, x: Tensor, y: Tensor) -> dict[str, Answer]:
    """The same from the dense matrices (P up to a few thousand)."""
    H, G = Hessian(model, loss, x, y), GGN(model, loss, x, y).dense()
    D = H.dense()
    values = torch.linalg.eigvalsh(D)
    shifted = D + DAMPING * torch.eye(len(D), dtype=D.dtype)
    return {
        "largest eigenvalue": values[-1].item(),
        "smallest eigenvalue": values[0].item(),
        "top 5 in magnitude": values[values.abs().argsort()[-5:]].sort().values,
        "trace": values.sum().item(),
        "diagonal": D.diagonal(),
        "share below -0.001": (values < LEVEL).double().mean().item(),
        "GGN, largest eigenvalue": torch.linalg.eigvalsh(G)[-1].item(),
        "GGN, diagonal": G.diagonal(),
        "eigenvalue nearest 0.02": values[(values - SIGMA).abs().argmin()].item(),
        "negative ones of H + 0.01 I": int((values < -DAMPING).sum()),
        "log |det(H + 0.01 I)|": (values + DAMPING).abs().log().sum().item(),
        "(H + 0.01 I)^-1 g": torch.linalg.solve(shifted, H.gradient),
        "H v, distributed": D @ torch.ones(len(D), dtype=D.dtype),
    }


def error(answer: Answer, exact: Answer) -> float:
    """|answer - exact| / |exact| in the 2-norm; absolute where the exact one is zero.

    Raises:
        ValueError: shapes differ.
    """
    answer, exact = (torch.as_tensor(a, dtype=torch.float64) for a in (answer, exact))
    if answer.shape != exact.shape:
        raise ValueError(f"an answer of shape {tuple(answer.shape)} to a question of shape {tuple(exact.shape)}")
    size, scale = (answer - exact).norm().item(), exact.norm().item()
    return size / (scale or 1.0) if math.isfinite(size) else float("inf")
