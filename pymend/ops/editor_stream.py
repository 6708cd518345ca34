"""editor_stream: the whole stack of the editor's network, for few rows in one launch.

Each layer is y = x + max(s_l * (U V x + b) + o_l, 0) (Mitchell et al. 2022, Eq. 3). With few rows
its time is that of reading the weights, and a kernel for both layers reads each once and has no
launches in between. It has no backward pass: training, more than ``MOST_ROWS`` rows and CPUs take
``editor_mlp`` layer by layer, as does a GPU on which the kernel is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymend import _lib
from pymend.ops import editor_mlp

DEVICE = "cuda"  # that has the kernel
DTYPES = (torch.float32, torch.bfloat16)  # of the kernel's weights
LAYERS = 2  # that the kernel takes
MOST_ROWS = 64  # csrc/math/editor_stream.h says the same, and the native op refuses more


@dataclass(frozen=True)
class Layer:
    """One layer of an editor network; the tensors are those of ``editor_mlp``."""

    v: Tensor
    u: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    residual: bool

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """v, u, bias, scale, shift."""
        return self.v, self.u, self.bias, self.scale, self.shift


def editor_stream(x: Tensor, layers: Sequence[Layer], mode: Tensor) -> Tensor:
    """Send rows through the layers, one after the other.

    Differentiable once in everything but ``mode``, with factored gradients, as ``editor_mlp`` is.

    Args:
        x: [R, d] rows of any number of weights; any floating dtype and any strides.
        layers: of x's dtype and device. The kernel computes in float32 from x to y.
        mode: [R] int64, the weight of each row, below modes. Not read without scale. Values are
            checked on a CPU; on a GPU, outside of eager, that is the caller's duty.

    Returns:
        y [R, d].

    Raises:
        ValueError: shapes or devices do not fit, one of scale and shift is missing, or a mode is
            out of range.
        TypeError: a dtype is not x's, x is not floating, or mode is not int64.
    """
    for layer in layers:
        editor_mlp.check_operands(x, *layer.tensors(), mode)
    return unchecked(x, layers, mode)


def unchecked(x: Tensor, layers: Sequence[Layer], mode: Tensor) -> Tensor:
    """``editor_stream`` of operands that passed its checks; reads no value, so nothing waits."""
    if _use_kernel(x, layers):
        return _streamed(x.float(), layers, mode).to(x.dtype)
    for layer in layers:
        x = editor_mlp.unchecked(x, *layer.tensors(), mode, layer.residual)
    return x


def eager(x: Tensor, layers: Sequence[Layer], mode: Tensor) -> Tensor:
    """The same in torch ops under torch's own autograd, any device and floating dtype."""
    for layer in layers:
        x = editor_mlp.eager(x, *layer.tensors(), mode, layer.residual)
    return x


def _use_kernel(x: Tensor, layers: Sequence[Layer]) -> bool:
    tensors = [x, *(t for layer in layers for t in layer.tensors() if t is not None)]
    kinds = {(of.v.shape, of.scale is None or of.scale.shape, of.residual) for of in layers}
    return (
        x.device.type == DEVICE
        and x.dtype in DTYPES
        and len(x) <= MOST_ROWS
        and len(layers) == LAYERS
        and len(kinds) == 1
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and _lib.use_kernel("editor_stream", x.device)
    )


def _streamed(x: Tensor, layers: Sequence[Layer], mode: Tensor) -> Tensor:
    """x [R, d] float32, two layers float32 or bfloat16 -> y [R, d] float32, natively."""
    v, u, bias, scale, shift = (
        [t.contiguous() for t in side if t is not None]
        for side in zip(*(layer.tensors() for layer in layers), strict=True)
    )
    residual = layers[0].residual
    return torch.ops.pymend.editor_stream.default(
        x.contiguous(), v, u, bias, scale, shift, mode.contiguous(), residual
    )


if _lib.has_kernels():

    @torch.library.register_fake("pymend::editor_stream")
    def _fake(
        x: Tensor,
        v: list[Tensor],
        u: list[Tensor],
        bias: list[Tensor],
        scale: list[Tensor],
        shift: list[Tensor],
        mode: Tensor,
        residual: bool,
    ) -> Tensor:
        return torch.empty_like(x)
