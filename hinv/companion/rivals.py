"""Methods that hinv is compared with and that torch.optim does not have, each with `step(inputs, targets)` as those of `hinv.optim`.

HessianFree   CG on (G + eps I) d = g, after Martens (ICML 2010): no matrix, products alone
KFAC          Kronecker-factored G, by curvlinops, after Martens & Grosse (ICML 2015)
SOAP          Adam in the eigenbasis of Shampoo, by pytorch-optimizer, after Vyas et al. (2024): a torch optimizer
"""

import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from hinv.curvature import GGN, Curvature, Hessian
from hinv.network import losses
from hinv.optim import Descent, Direction, Preconditioned, StepReport
from hinv.shapes import Float

SMALLEST = 5e-4  # relative progress of the quadratic model below which CG stops, per iteration (Martens)


def conjugate_gradients(
    A: Curvature, damping: float, b: Float[Tensor, " P"], x: Float[Tensor, " P"], most: int
) -> list[Float[Tensor, " P"]]:
    """Iterates of CG on (A + damping I) x = b at growing distances, the last one where the quadratic model hardly falls or turns out not to be convex.

    Cost: one product an iteration.
    """
    multiply = A.multiply  # unchecked, some dozens a step
    r = b - (multiply(x) + damping * x)
    p, rr, kept, models, next_kept = r, r @ r, [x], [0.0], 1.0
    for k in range(1, most + 1):
        Ap = multiply(p) + damping * p
        curvature = p @ Ap
        if not curvature > 0:
            break
        alpha = rr / curvature
        x, r = x + alpha * p, r - alpha * Ap
        rr, before = r @ r, rr
        p = r + (rr / before) * p
        models.append(-0.5 * (x @ (b + r)).item())
        if k >= next_kept:
            kept.append(x)
            next_kept *= 1.3
        window = max(10, k // 10)
        if k > window and models[k] < 0 and (models[k] - models[k - window]) / models[k] < window * SMALLEST:
            break
        if rr <= (1e-14 * b.norm()) ** 2:
            break
    return kept if kept[-1] is x else [*kept, x]


class HessianFree(Preconditioned):
    """Martens' method: a truncated CG for the direction, started from the last one, the best of its iterates by the loss, then the length halved until it falls.

    Args:
        damping: the first eps; it moves by 2/3 and 3/2 with rho.
        hessian: H in the place of G, whose negative curvature ends CG.
        most: iterations of CG a step. decay: share of the last direction that CG starts from.
    """

    kind = GGN

    def __init__(
        self,
        model: nn.Sequential,
        loss: losses.Loss,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
        damping: float = 1.0,
        hessian: bool = False,
        most: int = 250,
        decay: float = 0.95,
    ):
        super().__init__(model, loss, optimizer, clip, damping, 1.5, 1, True, None)
        self.kind = Hessian if hessian else GGN
        self.most, self.decay = most, decay
        self._last: Float[Tensor, " P"] | None = None

    def estimate(self, C: Curvature) -> str:
        return "a few vectors of as many numbers as there are parameters"

    def _direct(self, C: Curvature, /, g: Float[Tensor, " P"]) -> Direction:
        start = torch.zeros_like(g) if self._last is None else self.decay * self._last
        iterates = conjugate_gradients(C, self._used, g, start, self.most)
        self._last, here = iterates[-1], self._position()
        best, lowest = iterates[-1], float("inf")
        for d in reversed(iterates[1:]):
            value = self._at(here - d, C)
            if not value < lowest:
                break
            best, lowest = d, value
        length = 1.0
        while not lowest < C.loss and length > 1e-3:
            length /= 2.0
            lowest = self._at(here - length * best, C)
        nn.utils.vector_to_parameters(here, self.parameters)
        return Direction(length * best)

    def _refused(self) -> None:
        super()._refused()
        self._last = None

    def _at(self, position: Float[Tensor, " P"], C: Curvature) -> float:
        nn.utils.vector_to_parameters(position, self.parameters)
        return self._value(C.chain.inputs, C.chain.targets)

    def _adjust(self, ratio: float, length: float) -> None:
        if ratio > 0.75:
            self.damping = max(self.damping / self.adapt, self.floor)
        elif not ratio >= 0.25:
            self.damping *= self.adapt


class KFAC(Descent):
    """(K + eps)^-1 g with curvlinops' Kronecker factors of G (all output directions, damping split between the factors), new ones every few steps."""

    def __init__(
        self,
        model: nn.Sequential,
        loss: nn.CrossEntropyLoss,
        optimizer: torch.optim.Optimizer | None = None,
        clip: float | None = None,
        damping: float = 0.1,
        every: int = 1,
        sample: int | None = None,
    ):
        super().__init__(model, loss, optimizer, clip)
        self.cross_entropy, self.damping, self.every, self.sample = loss, damping, every, sample
        self._age = 0

    def step(self, inputs: Tensor, targets: Tensor) -> StepReport:
        import curvlinops

        start, before = time.perf_counter(), self._position()
        loss, g = self._gradient(inputs, targets)
        if self._age % self.every == 0:
            few = (inputs[: self.sample], targets[: self.sample])
            K = curvlinops.KFACLinearOperator(
                self.model,
                self.cross_entropy,
                self.parameters,
                [few],
                check_deterministic=False,
                fisher_type="type-2",
                separate_weight_and_bias=False,
                num_data=len(few[0]),
                num_per_example_loss_terms=1,
            )
            self._inverse = curvlinops.KFACInverseLinearOperator(K, damping=self.damping, use_heuristic_damping=True)
        self._age += 1
        d = self._inverse @ g
        assert isinstance(d, Tensor)  # as g is one
        self._move(d)
        report = StepReport(loss, damping=self.damping, step_norm=(self._position() - before).norm().item())
        return replace(report, seconds=time.perf_counter() - start)
