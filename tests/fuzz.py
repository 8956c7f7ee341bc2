"""Random networks, batches, dampings, modes and calls in random order, every answer against the dense matrix: `make fuzz SECONDS=600`.

Of each call there are three outcomes: an answer within its promise, a warning that says what it lacks, or an error that hinv itself raises. Anything else is a
finding. One minute of it is part of `make test`.
"""

import argparse
import copy
import itertools
import json
import pickle
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import nn

import hinv
from hinv import GGN, AccuracyWarning, CertificateWarning, Hessian, optim
from hinv.companion.checks import commit, output, write_atomically
from hinv.network import losses

PACKAGE = str(Path(hinv.__file__).parent)
TALLY: Counter[str] = Counter()


class Finding(AssertionError):
    """An answer outside its promise, or an error that nobody named."""


class Skip(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, z):
        return z + self.outer(torch.tanh(self.inner(z)))


class Attention(nn.Module):
    def forward(self, z):
        q = z.reshape(len(z), 1, -1, 1)
        return nn.functional.scaled_dot_product_attention(q, q, q).reshape(z.shape)


ACTIVATIONS = [
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.ReLU,
    nn.LeakyReLU,
    nn.Softsign,
    nn.Identity,
    nn.Mish,
]
BETWEEN = {
    "activation": None,
    "layernorm": lambda a: nn.LayerNorm(a),
    "group norm": lambda a: nn.GroupNorm(1, a),
    "skip": lambda a: Skip(a, 2),
    "residual": lambda a: hinv.Residual(nn.Sequential(nn.Linear(a, 2), nn.Tanh(), nn.Linear(2, a))),
    "pre-activation": lambda a: hinv.Residual(
        nn.Sequential(nn.LayerNorm(a), nn.GELU(), nn.Linear(a, a)), nn.Linear(a, a, bias=False)
    ),
    "nested": lambda a: hinv.Residual(nn.Sequential(hinv.Residual(nn.Linear(a, a)), nn.Softplus())),
    "prelu": lambda a: nn.PReLU(),
    "attention": lambda a: Attention(),
    "softmax": lambda a: nn.Softmax(dim=1),
    "nothing": lambda a: nn.Identity(),
}
LOSSES = ["cross-entropy", "smoothed", "weighted sum", "nll", "mse", "mse sum", "bce", "quartic", "linear"]


@contextmanager
def half_by_default():
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "default dtype": half_by_default,
}


@st.composite
def problems(draw):
    """(model, loss, x, y) in float64."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    shape = draw(st.integers(0, 9))
    image, positions = shape == 0, shape == 1
    batch, width = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    modules = []
    if image:
        kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        modules += [
            nn.Conv2d(1, 2, kernel, stride, padding=draw(st.integers(0, 1))),
            draw(st.sampled_from(ACTIVATIONS))(),
        ]
        modules += draw(st.sampled_from([[], [nn.AvgPool2d(2, ceil_mode=True)], [nn.Conv2d(2, 2, 1), nn.Tanh()]]))
        modules += [nn.Flatten()]
        x = torch.randn(batch, 1, 5, 4).double()
        width = nn.Sequential(*modules).double()(x).shape[1]
    elif positions:
        inner = draw(st.integers(1, 4))
        maker = draw(st.sampled_from(["linear", "shared", "convolution", "normalized"]))
        modules += {
            "linear": [nn.Linear(width, inner, bias=draw(st.booleans())), nn.Tanh()],
            "shared": [hinv.SharedLinear(width, inner, (1.0, 0.0, 0.5)), nn.Tanh()],
            "convolution": [nn.Conv1d(3, inner, 1, bias=draw(st.booleans())), nn.Sigmoid()],
            "normalized": [nn.Linear(width, inner), nn.LayerNorm(inner), hinv.Residual(nn.Linear(inner, inner))],
        }[maker]
        modules += [nn.Flatten()]
        x = torch.randn(batch, 3, width).double()
        width = nn.Sequential(*modules).double()(x).shape[1]
    else:
        x = torch.randn(batch, width).double()
    for _ in range(draw(st.integers(0, 4))):
        after = draw(st.integers(1, 6))
        modules.append(nn.Linear(width, after, bias=draw(st.booleans())))
        width = after
        name = draw(st.sampled_from(list(BETWEEN)))
        modules.append(draw(st.sampled_from(ACTIVATIONS))() if name == "activation" else BETWEEN[name](width))
    classes = draw(st.integers(1, 4))
    modules.append(nn.Linear(width, classes))
    loss = draw(st.sampled_from(LOSSES))
    if loss == "nll":
        modules.append(nn.LogSoftmax(1))
    if draw(st.booleans()) and len(modules) > 2:
        modules = [nn.Sequential(*modules[:2]), *modules[2:]]
    model = nn.Sequential(*modules).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(draw(st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.3])))
    if draw(st.integers(0, 4)) == 0:  # some weights are constants
        for p in list(model.parameters())[:-1]:
            p.requires_grad_(draw(st.booleans()))
    x *= draw(st.sampled_from([1.0, 1.0, 1.0, 0.01, 30.0]))
    kind = draw(st.sampled_from(["random", "random", "random", "constant", "duplicates"]))
    x = torch.full_like(x, 0.5) if kind == "constant" else x[[0] * batch] if kind == "duplicates" else x
    labels, goals = torch.randint(0, classes, (batch,)), torch.rand(batch, classes).double()
    makers = {
        "cross-entropy": (nn.CrossEntropyLoss(), labels),
        "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), labels),
        "weighted sum": (nn.CrossEntropyLoss(weight=torch.rand(classes).double() + 0.1, reduction="sum"), labels),
        "nll": (nn.NLLLoss(), labels),
        "mse": (nn.MSELoss(), goals),
        "mse sum": (nn.MSELoss(reduction="sum"), goals),
        "bce": (nn.BCEWithLogitsLoss(), goals),
        "quartic": (quartic, goals),
        "linear": (linear, goals),
    }
    return model, *((makers[loss][0], x, makers[loss][1]))


def quartic(outputs, targets):
    return ((outputs - targets) ** 4).sum(1).mean()


def linear(outputs, targets):
    return (outputs * targets).sum()


def double_backward(model, loss, x, y):
    """The Hessian of the model itself, row by row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True, materialize_grads=True)
        rows = []
        for entry in torch.cat([g.reshape(-1) for g in first]):
            if not entry.requires_grad:
                rows.append([torch.zeros_like(p) for p in parameters])
                continue
            rows.append(torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True))
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def gauss_newton(model, loss, x, y):
    """J^T Lambda J; under LogSoftmax and NLLLoss that of cross-entropy."""
    if isinstance(loss, nn.NLLLoss):
        model, loss = nn.Sequential(*list(model)[:-1]), nn.CrossEntropyLoss()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = model(x)
        J = torch.stack(
            [
                torch.cat(
                    [
                        g.reshape(-1)
                        for g in torch.autograd.grad(o, parameters, retain_graph=True, materialize_grads=True)
                    ]
                )
                for o in out.flatten()
            ]
        )
    Lambda = torch.func.hessian(lambda o: loss(o.view_as(out), y))(out.detach().flatten())
    return J.T @ Lambda @ J


class Machine(RuleBasedStateMachine):
    H = None

    @contextmanager
    def called(self, name, mode="plain"):
        """An error of hinv's own ends the call; any other is a finding. Warnings are kept in self.said."""
        TALLY[name] += 1
        self.said, self.refused = [], False
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                with MODES[mode]():
                    yield
            self.said = said
        except (Finding, hypothesis.errors.HypothesisException):
            raise
        except Exception as error:
            if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE):
                raise Finding(f"{name}: {type(error).__name__}: {error}") from error
            TALLY[f"{name}: {type(error).__name__}"] += 1
            self.refused = True

    def warned(self, *kinds):
        return any(issubclass(w.category, kinds) for w in self.said)

    @initialize(
        problem=problems(),
        kind=st.sampled_from([Hessian, Hessian, GGN]),
        single=st.integers(0, 4),
        check=st.booleans(),
        mode=st.sampled_from(list(MODES)),
    )
    def construct(self, problem, kind, single, check, mode):
        self.model, self.loss, self.x, self.y = problem
        if not any(p.requires_grad for p in self.model.parameters()):
            return
        self.dtype = torch.float32 if single == 0 else torch.float64
        model, loss, x, y = (copy.deepcopy(t) for t in problem)
        if self.dtype == torch.float32:
            model, x, y = model.float(), x.float(), y.float() if y.is_floating_point() else y
            loss = loss.float() if isinstance(loss, nn.Module) else loss
            self.model = copy.deepcopy(model).double()
            self.x, self.y = x.double(), y.double() if y.is_floating_point() else y
            self.loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
        with self.called("construct", mode):
            H = kind(model, loss, x, y)
            H = H if check else kind(model, loss, x, y, check=False)  # as for a model that passed once
        if self.ended():
            return
        self.D = (double_backward if kind is Hessian else gauss_newton)(*self.plain())
        self.values = torch.linalg.eigvalsh(self.D)
        self.size = self.values.abs().max().item() or 1.0
        at = self.loss, self.model(self.x).detach(), self.y
        bent = max(V.abs().max().item() for V in losses.curvature(*at)) if len(self.x) else 0.0
        # saturated: what is left of the curvature is rounding, in the reference too
        if self.size < 1e-6 or 0.0 < bent * len(self.x) < 1e-3:
            TALLY["saturated"] += 1
            return
        self.native, self.H = (model, loss, x, y), H

    def ended(self):
        """Whether the last call was refused."""
        refused, self.refused = getattr(self, "refused", False), False
        return refused

    def plain(self):
        return self.model, self.loss, self.x, self.y

    def near(self, ours, dense, tolerance, what):
        if self.dtype == torch.float32:
            tolerance = max(tolerance, 2e-3)
        error = (ours.double() - dense).norm().item()
        # of the reference: two normalizations of two units multiply it by a million
        rounding = (1e-10 if self.dtype == torch.float64 else 1e-5) * self.size
        if not error <= tolerance * dense.norm().item() + rounding:
            raise Finding(f"{what}: error {error:.1e} of {dense.norm().item():.1e}")

    def damping(self, data):
        """Relative to the largest eigenvalue, of both signs; sometimes next to minus an eigenvalue, or 0."""
        how = data.draw(st.sampled_from(["relative", "relative", "relative", "next to", "zero"]))
        if how == "zero":
            return 0.0
        if how == "next to":
            value = self.values[data.draw(st.integers(0, len(self.values) - 1))].item()
            return -value + self.size * data.draw(st.sampled_from([0.0, 1e-13, -1e-9, 1e-6, -1e-4]))
        return self.size * data.draw(st.sampled_from([1.0, 0.1, 1e-2, 1e-4, 1e-7, -1e-3, -0.03, -0.4, -2.0]))

    def gap(self, damping):
        return (self.values + damping).abs().min().item() / self.size

    @rule(data=st.data(), mode=st.sampled_from(list(MODES)))
    def multiply(self, data, mode):
        if self.H is None:
            return
        V = torch.randn(len(self.D), data.draw(st.integers(1, 3))).to(self.dtype)
        with self.called("product", mode):
            out = self.H @ V
            self.near(out, self.D @ V.double(), 1e-9, "product")

    @rule(
        data=st.data(),
        method=st.sampled_from(
            ["auto", "auto", "factor", "factor32", "sparse", "tridiagonal", "woodbury", "dense", "minres", "cg"]
        ),
        mode=st.sampled_from(list(MODES)),
    )
    def solve(self, data, method, mode):
        if self.H is None:
            return
        damping, b = self.damping(data), torch.randn(len(self.D)).to(self.dtype)
        with self.called(f"solve {method}", mode):
            x = self.H.solve(b, damping, method)
        if self.ended():
            return
        if self.warned(AccuracyWarning):
            TALLY[f"solve {method}: AccuracyWarning"] += 1
            return
        x, b, rtol = x.double(), b.double(), 1e-8 if self.dtype == torch.float64 else 1e-4
        error, rounding = (self.D @ x + damping * x - b).norm().item(), 1e-13  # of the reference
        if not error <= 3 * rtol * b.norm().item() + rounding * (self.size + abs(damping)) * x.norm().item():
            raise Finding(
                f"solve {method}, damping {damping}: residual {error / b.norm().item():.1e}, reported {self.H.last_solve.residual:.1e}"
            )

    @rule(data=st.data(), mode=st.sampled_from(list(MODES)))
    def factor(self, data, mode):
        if self.H is None:
            return
        damping, keep = self.damping(data), data.draw(st.sampled_from(["all", "all", "disk", "checkpoints"]))
        with self.called(f"factor, keep {keep}", mode):
            F = self.H.factor(damping, dtype=torch.float64, keep=keep)
            inertia, (sign, log) = F.inertia, F.logdet
            shifted = self.values + damping
            if self.gap(damping) > 1e-9:
                if inertia[1] != int((shifted < 0).sum()):
                    raise Finding(f"factor, damping {damping}: {inertia}, dense {int((shifted < 0).sum())}")
                exact = shifted.abs().log().sum().item()
                allowed = (
                    1e-7 * max(1.0, abs(exact))
                    + 10 * getattr(F, "uncertainty", 0.0)
                    + 1e-13 * len(shifted) / self.gap(damping)
                )
                if sign != (-1.0) ** inertia[1] or not abs(log - exact) <= allowed:
                    raise Finding(f"factor, damping {damping}: logdet {log}, dense {exact}")
            repr(F)
            b = torch.randn(len(self.D)).double()
            if keep != "all" and not torch.equal(self.H.factor(damping, dtype=torch.float64).solve(b), F.solve(b)):
                raise Finding(f"a factor that keeps {keep} solves otherwise")
            if keep != "disk" and data.draw(st.booleans()):
                again = pickle.loads(pickle.dumps(F))
                if not torch.equal(again.solve(b), F.solve(b)):
                    raise Finding("a pickled factor solves otherwise")

    @rule(data=st.data(), mode=st.sampled_from(list(MODES)))
    def counts(self, data, mode):
        if self.H is None:
            return
        edges = sorted(
            {self.size * data.draw(st.floats(-1.2, 1.2)) for _ in range(4)}
            | {data.draw(st.sampled_from([0.0, 0.123 * self.size])), 1.5 * self.size}
        )
        with self.called("counts", mode):
            found = self.H.counts(edges).tolist()
            clear = [i for i, e in enumerate(edges) if (self.values - e).abs().min() > 1e-8 * self.size]
            dense = [int((self.values < e).sum()) for e in edges]
            for i, j in itertools.pairwise(clear):
                if sum(found[i:j]) != dense[j] - dense[i]:
                    raise Finding(
                        f"counts between {edges[i]} and {edges[j]}: {sum(found[i:j])}, dense {dense[j] - dense[i]}"
                    )

    @rule(data=st.data(), which=st.sampled_from(["LA", "SA", "LM", "sigma"]), mode=st.sampled_from(list(MODES)))
    def eigenpairs(self, data, which, mode):
        if self.H is None or len(self.D) < 3:
            return
        k = data.draw(st.integers(1, min(3, len(self.D) - 1)))
        sigma = self.size * data.draw(st.sampled_from([0.31, -0.17, 0.011])) if which == "sigma" else None
        with self.called(f"eigsh {which}", mode):
            found = self.H.eigsh(k, which="LM" if which == "sigma" else which, sigma=sigma)
        if self.ended():
            return
        if not found.certified:
            if not self.warned(CertificateWarning):
                raise Finding("not certified, and no warning")
            return
        measure = {
            "LA": lambda v: v,
            "SA": lambda v: -v,
            "LM": lambda v: v.abs(),
            "sigma": lambda v: -(v - (sigma or 0.0)).abs(),
        }[which]
        wanted = self.values[measure(self.values).argsort(descending=True)[:k]]
        gave, kept = measure(found.values), measure(wanted)
        error = (gave.sort().values - kept.sort().values).abs().max().item()
        if not error <= 1e-6 * self.size:
            raise Finding(f"eigsh {which} certified, off by {error / self.size:.1e}")

    @rule(i=st.integers(0, 1000))
    def one_eigenvalue(self, i):
        if self.H is None:
            return
        with self.called("eigval"):
            i %= len(self.values)
            error = abs(self.H.eigval(i, 1e-6) - self.values[i].item())
            if not error <= 1e-5 * abs(self.values[i].item()) + 2e-8 * self.size:
                raise Finding(f"eigval {i}: off by {error / self.size:.1e}")

    @rule(mode=st.sampled_from(list(MODES)))
    def diagonal(self, mode):
        if self.H is None:
            return
        with self.called("diagonal", mode):
            self.near(self.H.diagonal(), self.D.diagonal(), 1e-8, "diagonal")
            start = 0
            for number, (name, facts) in enumerate(self.H.by_stage().items()):
                stop = start + facts["parameters"]
                self.near(self.H.block(number), self.D[start:stop, start:stop], 1e-7, f"block {name}")
                start = stop

    @rule(data=st.data(), mode=st.sampled_from(list(MODES)))
    def inverse(self, data, mode):
        """Parts of the inverse against the eigenvalues' own; what it says itself that it lost is allowed."""
        if self.H is None:
            return
        damping = self.damping(data)
        with self.called("inverse", mode):
            F = self.H.factor(damping, dtype=torch.float64)
            diagonal, trace = F.inverse_diagonal(), F.inverse_trace()
        if self.ended() or self.gap(damping) < 1e-9:
            return
        exact = torch.linalg.inv(self.D + damping * torch.eye(len(self.D), dtype=self.D.dtype)).diagonal()
        lost = 100 * F.inverse_error + 1e-13 * len(self.D) / self.gap(damping) ** 2
        allowed = lost if self.dtype == torch.float64 else max(lost, 2e-3 / self.gap(damping))
        error = (diagonal.double() - exact).norm() / exact.norm()
        if not error <= allowed or not abs(trace - diagonal.sum().item()) <= 1e-8 * diagonal.abs().sum().item():
            raise Finding(f"inverse_diagonal, damping {damping}: off by {error:.1e}, says {F.inverse_error:.1e}")

    @rule(data=st.data(), mode=st.sampled_from(list(MODES)))
    def absolute(self, data, mode):
        """(|H| + damping I)^-1 b within the bound it states, and a smoothed count."""
        if self.H is None or type(self.H) is GGN:
            return
        damping, b = self.size * data.draw(st.sampled_from([1.0, 0.1, 1e-2, 1e-3])), torch.randn(len(self.D)).double()
        width, shift = 0.1 * self.size, self.size * data.draw(st.sampled_from([-0.3, 0.0, 0.2]))
        with self.called("absolute_solve", mode):
            x = self.H.double().absolute_solve(b, damping)
            count = self.H.smoothed_count(shift, width)
        if self.ended() or self.dtype == torch.float32:
            return
        values, vectors = torch.linalg.eigh(self.D)
        exact = vectors @ ((vectors.T @ b) / (values.abs() + damping))
        bound = self.H.double().last_poles.bound
        if not (x - exact).norm() <= (1.01 * bound + 1e-9) * exact.norm():
            raise Finding(f"absolute_solve, damping {damping}: off by {(x - exact).norm():.1e}, bound {bound:.1e}")
        smooth = (0.5 + torch.arctan((shift - values) / width) / torch.pi).sum().item()
        if not abs(count - smooth) <= 1e-6 * len(values):
            raise Finding(f"smoothed_count at {shift}: {count}, dense {smooth}")

    @rule()
    def pickled(self):
        if self.H is None or not isinstance(self.loss, nn.Module):
            return
        with self.called("pickle"):
            H = pickle.loads(pickle.dumps(self.H))
            if not torch.equal(H.gradient, self.H.gradient):
                raise Finding("a pickled matrix has another gradient")
            self.H = H

    @rule(
        method=st.sampled_from(["GaussNewton", "DampedNewton", "TrustRegionNewton", "SaddleFreeNewton"]),
        steps=st.integers(1, 3),
        mode=st.sampled_from(["plain", "no_grad", "autocast"]),
    )
    def train(self, method, steps, mode):
        if self.H is None or (method == "SaddleFreeNewton" and len(self.D) <= 20):  # its default is 20 pairs
            return
        model, loss, x, y = (copy.deepcopy(t) for t in self.native)
        with self.called(method, mode):
            descent = getattr(optim, method)(model, loss)
            for _ in range(steps):
                report = descent.step(x, y)
                if (
                    report.accepted
                    and report.loss_after is not None
                    and getattr(descent, "accept", False)
                    and report.loss_after > report.loss
                ):
                    raise Finding(f"{method}: a step was accepted from {report.loss} to {report.loss_after}")
            if not all(p.isfinite().all() for p in model.parameters()):
                raise Finding(f"{method}: weights are not finite")


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def fuzz(seconds, seed, examples=25):
    """Machines until the time is up; findings by seed. Returns the summary."""
    start, findings, seeds, halfway = time.monotonic(), [], [], None
    TALLY.clear()
    quiet = settings(
        max_examples=examples,
        stateful_step_count=10,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        phases=[hypothesis.Phase.generate],  # shrinking takes minutes: the seed says enough
    )
    while time.monotonic() - start < seconds:
        hypothesis.seed(seed)(Machine)
        seeds.append(seed)
        print(f"seed {seed}", file=sys.stderr, flush=True)  # the last thing heard of a process that dies
        try:
            run_state_machine_as_test(Machine, settings=quiet)
        except Exception as error:
            findings.append({"seed": seed, "finding": f"{type(error).__name__}: {error}"[:600]})
            print(f"seed {seed}: {error}", file=sys.stderr, flush=True)
            traceback.print_exc()
        seed += 1
        if halfway is None and time.monotonic() - start > seconds / 2:
            halfway = resident()
    grown = resident() - (halfway or resident())
    return {
        "seconds": round(time.monotonic() - start),
        "seeds": [seeds[0], seeds[-1]],
        "networks": TALLY["construct"],
        "calls": dict(sorted(TALLY.items())),
        "grown_in_the_second_half": grown,
        "findings": findings,
    }


def together(seconds, seed, jobs):
    """`jobs` processes at a time, which share the seconds; their summaries as one."""
    each = [
        [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--seconds",
            str(seconds / jobs),
            "--seed",
            str(seed + 10_000 * j),
            "--json",
        ]
        for j in range(jobs)
    ]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in each]
    found = []
    for process in running:
        lines = process.communicate()[0].splitlines()
        if process.returncode:
            raise Finding(f"a process died with {process.returncode}; the last seed on its standard error is the one")
        found.append(json.loads(next(line for line in reversed(lines) if line.startswith("{"))))
    calls = sum((Counter(one["calls"]) for one in found), Counter())
    return {
        "seconds": sum(one["seconds"] for one in found),
        "seeds": [one["seeds"] for one in found],
        "networks": sum(one["networks"] for one in found),
        "calls": dict(sorted(calls.items())),
        "grown_in_the_second_half": max(one["grown_in_the_second_half"] for one in found),
        "findings": [finding for one in found for finding in one["findings"]],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of all jobs together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", action="store_true", help="one line, and no file")
    arguments = parser.parse_args()
    if arguments.json:
        torch.set_num_threads(1)
        np.seterr(all="ignore")
        print("\n" + json.dumps(fuzz(arguments.seconds, arguments.seed)))
        return 0
    summary = {"commit": commit(), "torch": torch.__version__} | together(
        arguments.seconds, arguments.seed, arguments.jobs
    )
    write_atomically(output("results") / "fuzz.json", json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    return 1 if summary["findings"] or summary["grown_in_the_second_half"] > 2**28 else 0


if __name__ == "__main__":
    sys.exit(main())
