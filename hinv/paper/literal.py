"""The second derivatives as the paper writes them: third-order tensors, uncontracted, and D_D and D_M that contract them with b."""

from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call

from hinv.modes import exact
from hinv.network import Chain
from hinv.shapes import Float

from .blocks import BlockMatrix
from .layers import Layer, split_layers

LITERAL_LIMIT = 2**31  # bytes of one layer's third-order tensor beyond which the uncontracted matrices are refused


class Literal:
    """D_D, D_M, D_xx, D_zx, D_xz, D_zz, every layer's third-order tensor in full: for small networks, and refused (MemoryError) beyond 2 GiB a layer."""

    def __init__(self, chain: Chain, layers: list[Layer]):
        self.chain, self.layers = chain, layers
        self.groups = split_layers(chain)
        self.n = [layer.J.shape[0] for layer in layers]  # n_1 .. n_L, stacked activations
        self.p = [layer.J.shape[1] for layer in layers]
        self.n0 = self.groups[0][0].inputs.numel()
        self._like = layers[0].J

    @cached_property
    def b(self) -> list[Float[Tensor, " n"]]:
        """b_l = d z_L / d z_l as rows (n_l,), b_L = 1."""
        return [*(group[-1].b.flatten() for group in self.groups[:-1]), self._like.new_ones(1)]

    def _kron_b(self, sizes: list[int]) -> BlockMatrix:
        return BlockMatrix.diagonal(
            [
                torch.kron(torch.eye(m, dtype=b.dtype, device=b.device), b[None])
                for m, b in zip(sizes, self.b, strict=True)
            ]
        )

    @cached_property
    def D_D(self) -> BlockMatrix:
        """diag(I kron b_l), (p_l, p_l n_l)."""
        self._refuse_if_large()
        return self._kron_b(self.p)

    @cached_property
    def D_M(self) -> BlockMatrix:
        """diag(I kron b_l), (n_{l-1}, n_{l-1} n_l)."""
        self._refuse_if_large()
        return self._kron_b([self.n0, *self.n[:-1]])

    @exact()
    def _second(self, inner: int, outer: int) -> BlockMatrix:
        """diag of d vec(grad_inner f_l) / d outer; argument 0 is x, 1 is z. Column-major vec, as in the paper's appendix.

        By double backward, one output at a time (torch.func.hessian is wrong for LayerNorm in torch 2.14).
        """
        self._refuse_if_large()
        blocks = []
        for number, group in enumerate(self.groups):
            leaves = [group[0].x.requires_grad_(), group[0].inputs.detach().flatten().requires_grad_()]
            options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
            with torch.enable_grad():
                out = self._layer_output(number, *leaves)
                rows = []
                for entry in out:
                    (first,) = torch.autograd.grad(entry, leaves[inner], create_graph=True, materialize_grads=True)
                    second = None
                    if first.requires_grad:
                        eye = torch.eye(len(first), dtype=first.dtype, device=first.device)
                        (second,) = torch.autograd.grad(first, leaves[outer], eye, **options)
                    rows.append(first.new_zeros(len(first), len(leaves[outer])) if second is None else second)
            blocks.append(torch.stack(rows, dim=1).flatten(0, 1))  # (inner, n, outer): n is the fast row index
        return BlockMatrix.diagonal(blocks)

    @cached_property
    def D_xx(self) -> BlockMatrix:
        """diag(grad_xx f_l), (n_l p_l, p_l)."""
        return self._second(0, 0)

    @cached_property
    def D_zx(self) -> BlockMatrix:
        """diag(grad_zx f_l): how grad_x f_l moves with z_{l-1}, (n_l p_l, n_{l-1})."""
        return self._second(0, 1)

    @cached_property
    def D_xz(self) -> BlockMatrix:
        """diag(grad_xz f_l): how grad_z f_l moves with x_l, (n_l n_{l-1}, p_l)."""
        return self._second(1, 0)

    @cached_property
    def D_zz(self) -> BlockMatrix:
        """diag(grad_zz f_l), (n_l n_{l-1}, n_{l-1})."""
        return self._second(1, 1)

    def _layer_output(self, number: int, x: Float[Tensor, " p"], z: Float[Tensor, " n_in"]) -> Float[Tensor, " n_out"]:
        """f_l(x_l; stacked z_{l-1}) -> stacked z_l, straight from the modules (not from the contracted blocks)."""
        first, *rest = self.groups[number]
        out = functional_call(first.module, first.named(x), (z.view_as(first.inputs),))
        for stage in rest:
            out = stage.module(out)
        if number == len(self.groups) - 1:
            return self.chain.loss(out, self.chain.targets).reshape(1)
        return out.flatten()

    def _refuse_if_large(self) -> None:
        for number, (n, p, n_in) in enumerate(zip(self.n, self.p, [self.n0, *self.n[:-1]], strict=True), start=1):
            need = n * max(p, n_in) ** 2 * self._like.element_size()
            if need > LITERAL_LIMIT:
                raise MemoryError(
                    f"the uncontracted derivatives of layer {number} (n = {n}, p = {p}, inputs {n_in}) need {need:,} bytes, limit "
                    f"{LITERAL_LIMIT:,}: use fewer samples or a smaller network; Q, A, K and the solvers do not need them"
                )
