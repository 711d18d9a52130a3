"""
`y = x Ŵᵀ + b` for a weight `Ŵ` that stays packed.

A slice of rows of `Ŵ` is rebuilt, multiplied and freed before the next one. The slice fits in the cache, its memory is
used again, and neither the forward nor the backward pass ever holds all of `Ŵ`. The value of a weight is defined once,
by [`dequantize`]: code minus zero point, times the stored scale, in float32, and then cast.

[`enable_compiled`] turns on a faster kernel for generation on a CPU, one token at a time.
"""

import logging
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .grids import Grid
from .packing import unpack_rows


# Elements of a slice: 2 MiB of float32. Smaller slices are slower, and larger ones no faster.
_SLICE = 2**19
# On an accelerator, many kernel launches cost more than the additional memory.
_SLICE_ON_ACCELERATOR = 2**26
# The compiled kernel takes a row at a time; for more rows, rebuilding the weight once is as fast.
_COMPILED_ROWS = 4

logger = logging.getLogger(__name__)

# Compiled kernels by width, or `None` while they are not asked for.
_compiled: dict[int, Callable[..., Tensor]] | None = None


class Packed(NamedTuple):
    """The tensors of a `D2QuantLinear`, and how to read them."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    in_features: int
    bits: int
    group_size: int
    grid: Grid


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
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if input_scale is not None:
        x = x * input_scale.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor | None = _compiled_linear(rows, bias, packed) if _suits_compiled(rows, bias, packed) else None
    if y is None:
        y = _QuantizedLinear.apply(rows, bias, *packed)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def enable_compiled(enabled: bool = True) -> None:
    """
    Turns a compiled kernel for one to four rows on or off, in this process.

    It multiplies by the packed words without rebuilding the weight. On one thread, a row of 2048 inputs and 5632
    outputs takes a tenth of the time it takes otherwise, and half that of a dense float32 layer. It is off by default
    because the first row of each width waits for the C++ compiler, up to half a minute. Without a compiler, a warning
    is logged once and everything works as before.

    It is used on CPUs, when nothing requires a gradient, for the affine and mid-rise grids, if 32 divides `group_size`
    and `group_size` divides `in_features`. Everything else is not affected.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): Whether to use it.
    """
    global _compiled
    _compiled = {} if enabled else None


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Dense weight `(out_features, in_features)`, computed in float32 (float64 for such scales), then cast."""
    weight = torch.empty(packed.weight.shape[1], packed.in_features, dtype=dtype, device=packed.weight.device)
    for rows, offsets, scales in _slices(packed):
        weight[rows] = _rebuild(offsets, scales, packed.group_size)
    return weight


class _QuantizedLinear(torch.autograd.Function):
    """`x (M, in_features)` times the weight transposed, plus `bias` in the dtype of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
        packed = Packed(*fields)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, *fields[:3])
        ctx.layout = fields[3:]
        y = x.new_empty(x.shape[0], packed.weight.shape[1])
        for rows, offsets, scales in _slices(packed):
            weight = _rebuild(offsets, scales, packed.group_size).to(x.dtype)
            y[:, rows] = F.linear(x, weight, None if bias is None else bias[rows])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        packed = Packed(*tensors, *ctx.layout)
        of_x, of_bias, _, of_scales, *_ = ctx.needs_input_grad
        # A sum over slices, which must not be rounded after each of them.
        exact = torch.promote_types(grad.dtype, torch.float32)
        grad_x = grad.new_zeros(grad.shape[0], packed.in_features, dtype=exact) if of_x else None
        grad_scales = torch.zeros_like(packed.weight_scale) if of_scales else None
        for rows, offsets, scales in _slices(packed):
            if grad_scales is not None:
                sums = torch.empty_like(scales)
                for part, total in _by_group(offsets * (grad[:, rows].T @ x), sums, packed.group_size):
                    total.copy_(part.sum(-1, keepdim=True))
                grad_scales[..., rows] = sums.mT.view_as(grad_scales[..., rows])
            if grad_x is not None:
                grad_x += grad[:, rows] @ _rebuild(offsets, scales, packed.group_size).to(grad.dtype)
        return (
            None if grad_x is None else grad_x.to(grad.dtype),
            grad.sum(0) if of_bias else None,
            None,
            grad_scales,
            *[None] * 5,
        )


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
            for part, zero_point in _by_group(offsets, zero_points[rows], group_size):
                part -= zero_point
        yield rows, offsets, scales[:, rows]


def _rebuild(offsets: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Rows of the weight, `(rows, in_features)`. Overwrites `offsets`."""
    for part, scale in _by_group(offsets, scales, group_size):
        part *= scale
    return offsets[0] if len(offsets) == 1 else offsets.sum(0)


def _by_group(matrix: Tensor, parameters: Tensor, group_size: int) -> Iterator[tuple[Tensor, Tensor]]:
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


def _compiled_linear(x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor | None:
    """What `_QuantizedLinear` returns, or `None` if the kernel turned out not to compile."""
    # The compiler starts over for every combination of these three.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _run_compiled(x, bias, packed)


def _run_compiled(x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor | None:
    global _compiled
    compiled = _compiled
    if compiled is None:
        return None
    if packed.bits not in compiled:
        logger.info("Compiling the kernel for %d bits, which takes up to half a minute.", packed.bits)
        compiled[packed.bits] = torch.compile(_row_product(packed.bits), dynamic=True, fullgraph=True)
    words, scales = packed.weight.detach(), packed.weight_scale.float()
    if packed.weight_zero_point is None:
        zero_points = torch.full_like(scales, (2**packed.bits - 1) / 2)
    else:
        zero_points = unpack_rows(packed.weight_zero_point, packed.bits, torch.float32)[:, : words.shape[1]]
    # One dtype and layout for all layers, for the same reason; and of bfloat16 it makes slow code.
    parameters = words, scales.detach().contiguous(), zero_points.contiguous()
    inputs = torch.empty(x.shape, dtype=torch.float32).copy_(x)
    try:
        y = torch.stack([compiled[packed.bits](row, *parameters) for row in inputs])
    except Exception as error:  # what the compiler raises is private, and many things
        logger.warning("The kernel cannot be compiled, and stays off: %s", error)
        _compiled = None
        return None
    return (y if bias is None else y + bias).to(x.dtype)


def _suits_compiled(x: Tensor, bias: Tensor | None, packed: Packed) -> bool:
    tracked = any(tensor is not None and tensor.requires_grad for tensor in (x, bias, packed.weight_scale))
    return (
        _compiled is not None
        and not torch.compiler.is_compiling()
        and not (tracked and torch.is_grad_enabled())
        and x.device.type == "cpu"
        and 0 < x.shape[0] <= _COMPILED_ROWS
        and x.shape[1] == packed.in_features
        and torch.float64 not in (x.dtype, packed.weight_scale.dtype)
        and packed.grid != "bitplane"
        and packed.group_size % 32 == 0
        and packed.in_features % packed.group_size == 0
    )


def _row_product(bits: int) -> Callable[..., Tensor]:
    """
    A function of one row `(in_features,)`, of words, and of scales and zero points `(groups, out_features)`, all
    float32 but the words. The compiler makes one loop over words of it, with outputs as vector lanes.
    """

    def product(x: Tensor, words: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
        blocks = torch.unflatten(words, 0, (-1, bits))  # (blocks, bits, out_features), a block has 32 codes
        inputs = torch.unflatten(x, 0, (-1, 32))
        total: Tensor = -inputs.sum(1)[:, None] * _repeat(zero_points, blocks.shape[0])
        for position in range(32):
            word, shift = position * bits // 32, position * bits % 32
            codes = blocks[:, word] >> shift
            if shift + bits > 32:
                codes = codes & (2 ** (32 - shift) - 1) | blocks[:, word + 1] << (32 - shift)
            total = total + inputs[:, position, None] * (codes & (2**bits - 1)).float()
        return (total * _repeat(scales, blocks.shape[0])).sum(0)

    # Compiled code is kept by code object, eight times before it silently is no longer compiled: one for each width.
    return FunctionType(
        product.__code__.replace(co_name=f"product_{bits}"), globals(), closure=product.__closure__, name="product"
    )


def _repeat(groups: Tensor, blocks: int) -> Tensor:
    """`(groups, N)` as `(blocks, N)`, without `repeat_interleave`, whose index is slow."""
    count, columns = groups.shape
    return groups[:, None].expand(count, blocks // count, columns).reshape(blocks, columns)
