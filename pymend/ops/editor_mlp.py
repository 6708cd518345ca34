"""editor_mlp: the layers of the editor's network, y = x + max(s_l * (U V x + b) + o_l, 0) each.

Paper, Eq. 3 (Mitchell et al. 2022). The products are a library's; what follows them, and its
backward, is one native kernel each. The derivative of max(., 0) at 0 is 1: at the identity start U,
b and o are 0, so everything under the max is 0, and a derivative of 0 would never train.

Factored gradients: where a Parameter ``u`` or ``v`` carries a list ``factors``, a backward pass
that wants its gradient appends the pair (left [R, rows], right [R, columns]) to the list and leaves
``.grad`` alone; the gradient is the sum over the pairs of left^T right, and is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pymend import _lib
from pymend.ops.products import product

DTYPES = (torch.float64, torch.float32)  # of the kernels; other floating dtypes run in torch ops
CUDA_COLUMNS = 4096  # most on a GPU: the kernel wins a third at 3840, too little at 20480
NARROW = (torch.bfloat16, torch.float16)  # but on a GPU, where no backward pass follows


class Layer(NamedTuple):
    """One layer of an editor's network, of R rows [R, d] from any number of weights.

    v: [r, d]; u: [d, r]; bias: [d]; scale, shift: [modes, d], or None both: 1 and 0. Without
    ``residual`` x is not added: y = max(.., 0).
    """

    v: Tensor
    u: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    residual: bool

    def map(self, change: Callable[[Tensor], Tensor]) -> Layer:
        """The layer of the changed tensors."""
        return Layer(
            change(self.v),
            change(self.u),
            change(self.bias),
            None if self.scale is None else change(self.scale),
            None if self.shift is None else change(self.shift),
            self.residual,
        )


def editor_mlp(x: Tensor, layers: Sequence[Layer], mode: Tensor) -> Tensor:
    """Send rows through the layers, one after the other.

    Each is x <- x + max(scale[mode] * (x v^T u^T + bias) + shift[mode], 0). Differentiable once in
    every tensor but ``mode``. Factored gradients are not for ``torch.compile``; ordinary ones are.

    Args:
        x: [R, d] rows of any number of weights; any floating dtype and any strides.
        layers: tensors of x's dtype and device.
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
        check_operands(x, layer, mode)
    return unchecked(x, layers, mode)


def unchecked(x: Tensor, layers: Sequence[Layer], mode: Tensor) -> Tensor:
    """``editor_mlp`` of operands that passed its checks; reads no value, so nothing waits."""
    for layer in layers:
        x = _EditorMlp.apply(x, mode, *layer)
    return x


def eager(x: Tensor, layers: Sequence[Layer], mode: Tensor) -> Tensor:
    """The same in torch ops under torch's own autograd, any device and floating dtype."""
    for v, u, bias, scale, shift, residual in layers:
        p = torch.addmm(bias, x @ v.t(), u.t())
        if scale is not None and shift is not None:
            p = scale[mode] * p + shift[mode]
        p = p.clamp(min=0)  # not relu: the derivative of clamp at the bound is 1
        x = x + p if residual else p
    return x


class _EditorMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: Tensor, *parts: Any) -> Tensor:
        layer = Layer(*parts)
        with torch.autocast(x.device.type, enabled=False):
            a = _rows_by_rows(x, layer.v)  # [R, r]
            p = _rows_by_rows(a, layer.u)  # [R, d]
        ctx.save_for_backward(x, mode, a, p, *parts[:-1])
        ctx.residual = layer.residual
        # `factors` is looked up in backward, on the parameters themselves: an optimiser may give
        # them a new list in between, and hooks may hand saved tensors back as copies.
        ctx.parameters = (layer.v, layer.u)
        return _epilogue(x, p, layer, mode, alone=not any(ctx.needs_input_grad))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mode, a, p, v, u, bias, scale, shift = ctx.saved_tensors
        layer = Layer(v, u, bias, scale, shift, ctx.residual)
        need_x, _, need_v, need_u, *needs, _ = ctx.needs_input_grad
        grad_p, *others = _epilogue_backward(grad, p, layer, mode)
        grad_x = grad_v = grad_u = None
        with torch.autocast(x.device.type, enabled=False):
            if need_u:
                grad_u = _parameter_gradient(ctx, 3, grad_p, a)
            if need_x or need_v:
                grad_a = _rows_by_columns(grad_p, u)  # [R, r]
                if need_v:
                    grad_v = _parameter_gradient(ctx, 2, grad_a, x)
                if need_x:
                    grad_x = _rows_by_columns(grad_a, v)  # [R, d]
                    if layer.residual:
                        grad_x += grad
        wanted = (g if need else None for g, need in zip(others, needs, strict=True))
        return grad_x, None, grad_v, grad_u, *wanted, None


def _parameter_gradient(ctx: Any, index: int, left: Tensor, right: Tensor) -> Tensor | None:
    """left^T right; or, for a parameter with a list ``factors``, None and the pair put there.

    ``index`` is the parameter's place among the arguments. A pass limited to other inputs, as in
    ``backward(inputs=...)``, still comes here, and must not leave a pair behind.
    """
    factors = getattr(ctx.parameters[index - 2], "factors", None)
    if not isinstance(factors, list):
        return _columns_by_columns(left, right)
    if torch._C._will_engine_execute_node(ctx.next_functions[index][0]):
        factors.append((left.detach(), right.detach()))  # x would keep its graph alive
    return None


# The three kinds of product, each in one place.


def _rows_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """[R, k] and [n, k] -> left right^T [R, n]."""
    return product(left, right)


def _rows_by_columns(left: Tensor, right: Tensor) -> Tensor:
    """[R, n] and [n, k] -> left right [R, k]."""
    return product(left, right.t())


def _columns_by_columns(left: Tensor, right: Tensor) -> Tensor:
    """[R, n] and [R, k] -> left^T right [n, k]."""
    return left.t() @ right


# What follows the products, natively or in torch ops.


def _use_kernel(p: Tensor, alone: bool = False) -> bool:
    dtypes = (*DTYPES, *NARROW) if alone and p.device.type == "cuda" else DTYPES
    wide = p.device.type == "cuda" and p.shape[1] > CUDA_COLUMNS and _lib.gate() != "all"
    return p.dtype in dtypes and not wide and _lib.use_kernel("editor_mlp", p.device)


def _epilogue(x: Tensor, p: Tensor, layer: Layer, mode: Tensor, alone: bool = False) -> Tensor:
    """x, p [R, d] -> y [R, d]; ``alone``: without a backward pass."""
    if not _use_kernel(p, alone):
        return _torch_epilogue(x, p, layer, mode)
    return torch.ops.pymend.editor_mlp.default(
        *_contiguous(x if layer.residual else None, p, layer, mode)
    )


def _torch_epilogue(x: Tensor, p: Tensor, layer: Layer, mode: Tensor) -> Tensor:
    y = _under_max(p, layer, mode).clamp(min=0)
    return x + y if layer.residual else y


_Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _epilogue_backward(grad: Tensor, p: Tensor, layer: Layer, mode: Tensor) -> _Gradients:
    """grad [R, d] -> of p [R, d], of bias [d], of scale and of shift [modes, d]."""
    if not _use_kernel(p):
        return _torch_epilogue_backward(grad, p, layer, mode)
    return torch.ops.pymend.editor_mlp_backward.default(*_contiguous(grad, p, layer, mode))


def _torch_epilogue_backward(grad: Tensor, p: Tensor, layer: Layer, mode: Tensor) -> _Gradients:
    passed = torch.where(_under_max(p, layer, mode) >= 0, grad, 0)
    if layer.scale is None:
        return passed, passed.sum(0), None, None
    # A product, not index_add: that one's order is left to chance on a GPU.
    rows_of = torch.nn.functional.one_hot(mode, len(layer.scale)).to(p.dtype).t()  # [modes, R]
    grad_p = passed * layer.scale[mode]
    with torch.autocast(p.device.type, enabled=False):
        return grad_p, grad_p.sum(0), rows_of @ (passed * (p + layer.bias)), rows_of @ passed


def _under_max(p: Tensor, layer: Layer, mode: Tensor) -> Tensor:
    z = p + layer.bias
    if layer.scale is None or layer.shift is None:
        return z
    return layer.scale[mode] * z + layer.shift[mode]


def _contiguous(first: Tensor | None, p: Tensor, layer: Layer, mode: Tensor) -> list[Tensor | None]:
    """The operands of a native op, in its order."""
    operands = (first, p, layer.bias, layer.scale, layer.shift, mode)
    return [t if t is None else t.contiguous() for t in operands]


def check_operands(x: Tensor, layer: Layer, mode: Tensor) -> None:
    """Refuse what cannot be done, by the name and the value of the argument."""
    v, u, bias, scale, shift, _ = layer
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected a floating dtype")
    for name, matrix in (("x", x), ("v", v)):
        if matrix.dim() != 2:
            raise ValueError(f"{name} has shape {list(matrix.shape)}, expected a matrix")
    if (scale is None) != (shift is None):
        missing, given = ("scale", "shift") if scale is None else ("shift", "scale")
        raise ValueError(f"{missing} is None and {given} is not; give both or neither")
    n, d = x.shape
    r = len(v)
    modes = 0 if scale is None else len(scale)
    for name, tensor, shape in (
        ("v", v, [r, d]),
        ("u", u, [d, r]),
        ("bias", bias, [d]),
        ("scale", scale, [modes, d]),
        ("shift", shift, [modes, d]),
        ("mode", mode, [n]),
    ):
        if tensor is None:
            continue
        dtype = torch.int64 if name == "mode" else x.dtype
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {shape} for x {[n, d]} "
                f"and rank {r}"
            )
    # Reading values would make the host wait for a GPU, and cannot be compiled.
    readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if scale is not None and n and readable:
        low, high = (int(m) for m in mode.aminmax())
        if low < 0 or high >= modes:
            wrong = low if low < 0 else high
            raise ValueError(f"mode holds {wrong}, expected values from 0 to {modes - 1}")


if _lib.has_kernels():

    @torch.library.register_fake("pymend::editor_mlp")
    def _fake(
        x: Tensor | None,
        p: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        mode: Tensor,
    ) -> Tensor:
        return torch.empty_like(p)

    @torch.library.register_fake("pymend::editor_mlp_backward")
    def _fake_backward(
        grad: Tensor,
        p: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        mode: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        per_mode = p.new_empty(0, p.shape[1]) if scale is None else torch.empty_like(scale)
        return torch.empty_like(p), torch.empty_like(bias), per_mode, torch.empty_like(per_mode)
