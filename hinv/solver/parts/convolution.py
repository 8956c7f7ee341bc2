"""A convolution as the linear map of its patches, with weights shared over the positions."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional, grad

from hinv.network import Stage
from hinv.shapes import Inexact  # floats, or complex numbers at a complex shift

from .linear import Linear


class Convolution(Linear):
    """The same map of patches to channels at every position; patches take the place of samples. Rows of V: (sample, channel, position).

    Only for B L >= d (L positions): a batch of images excites all weights. One dimension is two, the first of them of one position.
    """

    def __init__(self, stage: Stage, gauss_newton: bool, wrt_input: bool):
        module = cast(nn.Conv1d | nn.Conv2d, stage.module)
        one = isinstance(module, nn.Conv1d)
        images, outputs, self.weight = (
            t.unsqueeze(2) if one else t for t in (stage.inputs, stage.outputs, stage.weight)
        )
        self.shape_in, self.shape_out, self.positions = images.shape, outputs.shape, outputs[0, 0].numel()
        self.options: dict[str, Any] = {
            "stride": (1, *module.stride) if one else module.stride,
            "padding": padding(module),
            "dilation": (1, *module.dilation) if one else module.dilation,
        }
        patches = functional.unfold(images, self.weight.shape[2:], **self.options).mT.flatten(0, 1)  # (B L, d)
        rows = torch.cat([patches, torch.ones_like(patches[:, :1])], 1) if stage.has_bias else patches
        self._set(stage, rows, stage.b.view(outputs.shape), gauss_newton, wrt_input)

    def first(self, r: Tensor) -> Inexact[Tensor, "BL ak"]:
        r = r.reshape(self.batch, self.a_out, self.positions, -1).transpose(1, 2)
        return r.reshape(self.batch * self.positions, -1)

    def middle(self, X: Tensor) -> Inexact[Tensor, "n BL a_out"]:
        X = X.view(-1, self.a_out, self.positions).mT
        return X.reshape(-1, self.batch * self.positions, self.a_out)

    def flat(self, X: Tensor, k: int) -> Inexact[Tensor, "rows k"]:
        return X.view(self.batch, self.positions, self.a_out, k).transpose(1, 2).reshape(-1, k)

    def A_T(self, r: Inexact[Tensor, "rows k"]) -> Inexact[Tensor, "columns k"]:
        return self.times_A(r.T).T.contiguous()

    def A(self, y: Inexact[Tensor, "columns k"]) -> Inexact[Tensor, "rows k"]:
        images = y.T.reshape(-1, *self.shape_in[1:])
        return functional.conv2d(images, self.weight, **self.options).view(y.shape[1], -1).T

    def times_A(self, X: Inexact[Tensor, "r rows"]) -> Inexact[Tensor, "r columns"]:
        return self._transposed(X.reshape(-1, *self.shape_out[1:]), self.weight).view(X.shape[0], -1)

    def _transposed(
        self, images: Inexact[Tensor, "N c_out h w"], kernels: Inexact[Tensor, "c_out c_in kh kw"]
    ) -> Inexact[Tensor, "N c_in height width"]:
        """The transpose of the convolution with these kernels, on (N, channels out, height, width)."""
        if images.is_complex():  # torch has this for real images only, and the kernels are real
            two = (self._transposed(images.real, kernels.real), self._transposed(images.imag, kernels.real))
            return torch.complex(*two)
        shape = (len(images), kernels.shape[1], *self.shape_in[2:])
        return grad.conv2d_input(shape, kernels, images, **self.options)

    def plus_F(self, JV: Inexact[Tensor, "n rows"]) -> Inexact[Tensor, "n k"]:
        """dW meets dz where b is: F[(j, o), n] is the transposed convolution of channel o of the backward signal b_n with column j of Q."""
        N = self.times_A(JV)
        if self.curved:
            kernels = self.Q_in.T.reshape(self.m, *self.weight.shape[1:])
            signals = self.e.transpose(0, 1).reshape(-1, 1, *self.shape_out[2:])  # (a_out B, 1, height, width)
            for kernel, rows in zip(kernels, N.view(self.m, -1), strict=True):
                rows += self._transposed(signals, kernel.unsqueeze(0)).flatten()
        return N


def padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...] | None:
    """Its padding in numbers, of height and width; None where "same" pads one side more than the other."""
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "valid":
        total = [0 for _ in total]
    elif not isinstance(module.padding, str):
        total = [2 * int(pad) for pad in module.padding]
    return None if any(t % 2 for t in total) else (0, *(t // 2 for t in total))[-2:]
