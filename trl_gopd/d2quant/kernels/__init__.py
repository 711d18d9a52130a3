"""
`y = x Ŵᵀ + b` for a weight `Ŵ` that stays packed.

A slice of rows of `Ŵ` is rebuilt, multiplied and freed before the next one. The slice fits in the cache, its memory is
used again, and neither the forward nor the backward pass ever holds all of `Ŵ`. The value of a weight is defined once,
by [`dequantize`]: code minus zero point, times the stored scale, in float32, and then cast.

Where there are kernels for a weight, they do it: machine code on a CPU ([`native`]), Triton on a GPU ([`gpu`]). Both
multiply few rows of `x` by the packed words themselves, with sums in float32, and rebuild slices faster than torch.
Which of them computes is decided here alone and logged once, at level INFO, or WARNING if torch is left.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import unpack_rows
from . import gpu, native
from .packed import Packed


# Elements of a slice: 2 MiB of float32. Smaller slices are slower, and larger ones no faster.
_SLICE = 2**19
# On an accelerator, many kernel launches cost more than the additional memory.
_SLICE_ON_ACCELERATOR = 2**26


def quantized_linear(
    x: Tensor, packed: Packed, *, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    """
    The output of a linear layer with a packed weight.

    Gradients flow to `x`, and to the bias and the scales if they require them. The packed weight is kept for the
    backward pass, and `x` only if the scales require a gradient.

    Args:
        x (`torch.Tensor`): `(..., in_features)`, floating point.
        packed ([`Packed`]): The weight.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*): Added last.
        input_scale (`torch.Tensor` of shape `(in_features,)`, *optional*): Multiplies `x` first.

    Returns:
        `torch.Tensor`: `(..., out_features)` in the dtype of `x`, or of `torch.autocast` where that is on.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    dtype = x.dtype
    if input_scale is not None:
        x = x * input_scale.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if not torch.is_grad_enabled() or not _needs_gradient(x, packed, bias):
        return _product(x, packed, bias)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _QuantizedLinear.apply(rows, bias, *packed)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def set_activation_bits(bits: int | None) -> None:
    """
    Sets whether inputs of packed layers are rounded to eight bits on a CPU, for all models of this process.

    Products are then sums of whole numbers, which processors with VNNI compute several times faster. Each row has a
    scale for every group of columns, or 128 columns of a longer one; a number is off by at most 1/254 of the largest
    magnitude there. Gradients are those of the unrounded product. Layers without machine code (see [`native`]), and
    GPUs, are not affected.

    Args:
        bits (`int` or `None`): 8, or `None` to round nothing, which is the default.

    Raises:
        ValueError: If `bits` is another number.

    Example:

    ```python
    >>> set_activation_bits(8)
    >>> set_activation_bits(None)

    ```
    """
    if bits not in (None, 8):
        raise ValueError(f"`bits` must be 8 or None, got {bits!r}. Other widths have no kernel.")
    native.Settings.activation_bits = bits


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Dense weight `(out_features, in_features)`, computed in float32 (float64 for such scales), then cast."""
    weight = torch.empty(packed.weight.shape[1], packed.in_features, dtype=dtype, device=packed.weight.device)
    for rows, part in _dense_slices(packed, dtype):
        weight[rows] = part
    return weight


class _QuantizedLinear(torch.autograd.Function):
    """`x (M, in_features)` times the weight transposed, plus `bias` in the dtype of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
        packed = Packed(*fields)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, *fields[:3])
        ctx.layout = fields[3:]
        return _product(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        packed = Packed(*tensors, *ctx.layout)
        of_x, of_bias, _, of_scales, *_ = ctx.needs_input_grad
        # A sum over slices, which must not be rounded after each of them.
        exact = torch.promote_types(grad.dtype, torch.float32)
        grad_x = grad.new_zeros(grad.shape[0], packed.in_features, dtype=exact) if of_x else None
        grad_scales = torch.zeros_like(packed.weight_scale) if of_scales else None
        if grad_scales is not None:
            for rows, offsets, scales in _slices(packed):
                sums = torch.empty_like(scales)
                for part, total in by_group(offsets * (grad[:, rows].T @ x), sums, packed.group_size):
                    total.copy_(part.sum(-1, keepdim=True))
                grad_scales[..., rows] = sums.mT.view_as(grad_scales[..., rows])
                if grad_x is not None:
                    grad_x += grad[:, rows] @ _rebuild(offsets, scales, packed.group_size).to(grad.dtype)
        elif grad_x is not None:
            for rows, weight in _dense_slices(packed, grad.dtype):
                grad_x += grad[:, rows] @ weight
        return (
            None if grad_x is None else grad_x.to(grad.dtype),
            grad.sum(0) if of_bias else None,
            None,
            grad_scales,
            *[None] * 5,
        )


def _needs_gradient(x: Tensor, packed: Packed, bias: Tensor | None) -> bool:
    return x.requires_grad or packed.weight_scale.requires_grad or (bias is not None and bias.requires_grad)


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`x (..., in_features)` times the weight transposed, plus `bias` in the dtype of `x`."""
    backend = _backend(packed)
    if backend is not None and backend.multiplies(x, packed):
        return backend.products(x, packed, bias)  # type: ignore[no-any-return]
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(rows.shape[0], packed.weight.shape[1])
    for outputs, weight in _dense_slices(packed, x.dtype):
        y[:, outputs] = F.linear(rows, weight, None if bias is None else bias[outputs])
    # Of an autograd function, whose rows have two axes, the output must not be a view: models may change it in place.
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _backend(packed: Packed) -> Any:
    """The module that has kernels for a weight, `native` or `gpu`; `None` where torch alone computes."""
    if native.serves(packed):
        return native
    return gpu if gpu.serves(packed) else None


def _dense_slices(packed: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of rows and their weights `(rows, in_features)` in `dtype`, each valid until the next is taken."""
    backend = _backend(packed)
    if backend is not None and dtype in backend.REBUILT:
        yield from backend.slices(packed, dtype)
        return
    for rows, offsets, scales in _slices(packed):
        yield rows, _rebuild(offsets, scales, packed.group_size).to(dtype)


def _slices(packed: Packed) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """
    Yields slices of rows, what scales multiply there `(planes, rows, in_features)`, and the scales
    `(planes, rows, groups)`. `planes` is `bits` for bit-planes, else 1.
    """
    weight, scales, zero_points, in_features, bits, group_size, grid = packed
    out_features = weight.shape[1]
    scales = scales.view(-1, *scales.shape[-2:]).mT
    scales = scales.to(torch.promote_types(scales.dtype, torch.float32))
    if zero_points is not None:
        zero_points = unpack_rows(zero_points, bits, scales.dtype).T[:out_features]

    elements = _SLICE if weight.device.type == "cpu" else _SLICE_ON_ACCELERATOR
    step = max(1, elements // max(1, in_features))
    if torch.compiler.is_compiling():  # the compiler would unroll the loop, and makes its own slices
        step = max(1, out_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        if grid == "bitplane":
            codes = unpack_rows(weight[:, rows].T, bits)[:, :in_features]
            offsets = torch.stack([codes >> plane & 1 for plane in range(bits)]).to(scales.dtype).mul_(2).sub_(1)
        else:
            offsets = unpack_rows(weight[:, rows].T, bits, scales.dtype)[None, :, :in_features]
        if grid == "midrise":
            offsets -= (2**bits - 1) / 2
        if zero_points is not None:
            for part, zero_point in by_group(offsets, zero_points[rows], group_size):
                part -= zero_point
        yield rows, offsets, scales[:, rows]


def _rebuild(offsets: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Rows of the weight, `(rows, in_features)`. Overwrites `offsets`."""
    for part, scale in by_group(offsets, scales, group_size):
        part *= scale
    return offsets[0] if len(offsets) == 1 else offsets.sum(0)


def by_group(matrix: Tensor, parameters: Tensor, group_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Yields views of `matrix (..., in_features)` as `(..., groups, columns)` and of `parameters (..., groups)` as
    `(..., groups, 1)`: first of the whole groups, then of a shorter last one.
    """
    groups = matrix.shape[-1] // group_size
    whole = groups * group_size
    if whole:
        yield torch.unflatten(matrix[..., :whole], -1, (groups, group_size)), parameters[..., :groups, None]
    if whole < matrix.shape[-1]:
        yield matrix[..., None, whole:], parameters[..., groups:, None]
