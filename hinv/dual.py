"""The Gauss-Newton matrix through its dual: one (B C) x (B C) Cholesky, exact, and no P x P or stagewise elimination.

    GGN = J^T Lambda J,  Lambda = R R^T,  D = J^T R  (P x BC; fewer columns where Lambda has less rank)
    (GGN + eps I)^-1 g = (g - D (eps I + D^T D)^-1 D^T g) / eps
    log det(GGN + eps I) = (P - BC) log eps + log det(eps I + D^T D)                                  (Sylvester's identity)

D is never formed for linear stages: its column for output direction c of sample n is the outer product of a backpropagated delta_nc and the stage's
input, so D^T D adds up (delta_nc . delta_n'c') (z_n . z_n' + 1) over the stages. Cost O(sum over stages of B C a (a + B C)) and (B C)^3 / 3.
"""

import math

import torch
from torch import Tensor

from . import heads
from .chain import Chain
from .factor import SingularShiftError, check_right_hand_side
from .stages import derivatives, elementwise


class Dual:
    """GGN + damping I for damping > 0, factored: solve, inertia, logdet."""

    def __init__(self, chain: Chain, damping: float):
        if not damping > 0:
            raise ValueError(f"the dual form needs damping > 0, not {damping}: use method='factor'")
        self.damping, batch = damping, len(chain.inputs)
        known = heads.diagonal_minus_rank_one(chain.loss, chain.outputs, chain.targets)
        if known is None:
            values, vectors = torch.linalg.eigh(heads.curvature(chain.loss, chain.outputs, chain.targets))
            if not heads.semidefinite(values):
                raise ValueError(
                    "the loss is not convex in the outputs here, and the dual form needs it: use method='factor'"
                )
        else:
            w, u = known
            values, vectors = torch.linalg.eigh(
                w.diag_embed() if u is None else w.diag_embed() - u.unsqueeze(2) * u.unsqueeze(1)
            )
        # (B, C, r): columns span Lambda_n = R_n R_n^T; softmax has rank C - 1 in every sample
        rank = max(1, int((values.amax(0) > 4 * torch.finfo(values.dtype).eps * values.max()).sum()))
        delta = vectors[:, :, -rank:] * values[:, -rank:].clamp_min(0.0).sqrt().unsqueeze(1)
        size = batch * delta.shape[2]
        gram = delta.new_zeros(size, size)
        self.stages = []  # ("linear", delta, Zt) or ("dense", D): D_l^T D_l and products with D_l
        for number, stage in reversed(list(enumerate(chain.live))):
            if stage.kind == "linear":
                z = stage.inputs
                Zt = torch.cat([z, torch.ones_like(z[:, :1])], 1) if stage.module.bias is not None else z
                rows = delta.transpose(1, 2).reshape(size, -1)  # ((n, c), a_out)
                outer = (rows @ rows.T).view(batch, -1, batch, size // batch)
                gram.view_as(outer).addcmul_(outer, (Zt @ Zt.T)[:, None, :, None])
                self.stages.insert(0, ("linear", delta, Zt, stage.module.weight.shape))
                delta = stage.module.weight.detach().T @ delta if number else None
            elif stage.kind == "elementwise":
                delta = elementwise(stage)[0].unsqueeze(2) * delta
            else:
                block = derivatives(stage, wrt_input=number > 0)
                if stage.parameters:
                    D = torch.einsum("nop,noc->pnc", block.J, delta).flatten(1)
                    gram += D.T @ D
                    self.stages.insert(0, ("dense", D))
                delta = block.A.mT @ delta if number else None
        self.size = size
        gram.diagonal().add_(damping)
        self.L, info = torch.linalg.cholesky_ex(gram)
        if info.item():
            raise SingularShiftError(f"GGN + {damping:g} I is singular to working precision: use more damping")
        self.sizes = [
            s[3].numel() + int(s[2].shape[1] > s[3][1]) * s[3][0] if s[0] == "linear" else len(s[1])
            for s in self.stages
        ]

    @property
    def inertia(self) -> tuple[int, int, int]:
        return sum(self.sizes), 0, 0

    @property
    def logdet(self) -> tuple[float, float]:
        log = 2.0 * self.L.diagonal().log().sum().item()
        return 1.0, (sum(self.sizes) - self.size) * math.log(self.damping) + log

    def solve(self, b: Tensor) -> Tensor:
        """(GGN + damping I)^-1 b for b (P,) or (P, k), without refinement; errors as `Factor.solve`."""
        check_right_hand_side(b, sum(self.sizes))
        if not b.numel():
            return b.clone()
        g = b.reshape(len(b), -1).to(self.L.dtype)
        inner = sum(
            self._transpose(stage, piece) for stage, piece in zip(self.stages, g.split(self.sizes), strict=True)
        )
        w = torch.cholesky_solve(inner, self.L)
        Dw = torch.cat([self._apply(stage, w) for stage in self.stages])
        return ((g - Dw) / self.damping).reshape(b.shape).to(b.dtype)

    def _transpose(self, stage: tuple, g: Tensor) -> Tensor:
        """D_l^T g (BC, k)."""
        if stage[0] == "dense":
            return stage[1].T @ g
        _, delta, Zt, (a_out, a_in) = stage
        full = g[: a_out * a_in].reshape(a_out, a_in, -1)
        if Zt.shape[1] > a_in:
            full = torch.cat([full, g[a_out * a_in :].unsqueeze(1)], 1)
        moved = torch.einsum("nd,odk->nok", Zt, full)
        return (delta.mT @ moved).reshape(-1, g.shape[1])

    def _apply(self, stage: tuple, w: Tensor) -> Tensor:
        """D_l w (p_l, k)."""
        if stage[0] == "dense":
            return stage[1] @ w
        _, delta, Zt, (a_out, a_in) = stage
        back = delta @ w.reshape(len(delta), delta.shape[2], -1)  # (B, a_out, k)
        full = torch.einsum("nok,nd->odk", back, Zt)
        weights = full[:, :a_in].reshape(a_out * a_in, -1)
        return torch.cat([weights, full[:, a_in]]) if Zt.shape[1] > a_in else weights
