"""
Products with packed weights on a GPU, with [Triton](https://triton-lang.org): tiles of the weight are rebuilt in
registers and multiplied there, so that the packed words alone are read from memory.

One row of `x` is multiplied by weights in float32 that are never rounded; the tiles for more rows are rounded to the
dtype of `x`, for the matrix units. Sums are in float32 either way. When there are too few tiles to occupy the GPU, the
columns are divided into parts, whose sums are added in a fixed order. For many rows a slice of the weight is rebuilt
in memory and multiplied by torch.

With `TRITON_INTERPRET=1` in the environment before Triton is imported, the same kernels run on a CPU, slowly; that is
how they are tested. The sizes of tiles are not tuned: no measurement on a GPU is behind them.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .packed import Packed


try:  # comes with torch for CUDA, ROCm and XPU
    import triton

    from . import tiles
except ImportError:
    triton = None


# From here on, writing the weight once and reading it again costs less than rebuilding it for every tile of rows.
FEW_ROWS = 256
SLICE = 2**26  # numbers of such a slice
# Triton takes so many parts of the columns that each multiprocessor has about so many programs.
PROGRAMS = 4
DTYPES = REBUILT = (torch.float32, torch.float16, torch.bfloat16)

logger = logging.getLogger(__name__)


def serves(packed: Packed) -> bool:
    """
    Whether the kernels can multiply by a weight: on a GPU that Triton knows (of NVIDIA's, from compute capability 8.0
    on), with scales in at most 32 bits, of an affine or mid-rise grid.
    """
    device = packed.weight.device
    return (
        device.type != "cpu"
        and _works_on(device.type, device.index)
        and not torch.compiler.is_compiling()
        and packed.grid != "bitplane"
        and packed.weight_scale.dtype in DTYPES
        and packed.weight.numel() > 0
    )


@functools.cache
def _works_on(kind: str, index: int | None) -> bool:
    if kind not in ("cuda", "xpu"):
        return False
    if triton is None:
        reason = "Triton is not installed. It comes with torch's builds for GPUs"
    elif kind == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        reason = f"{torch.cuda.get_device_name(index)} is older than what Triton supports (compute capability 8.0)"
    else:
        logger.info("Packed weights on %s are multiplied by Triton kernels.", kind)
        return True
    logger.warning("Packed weights on %s are multiplied by torch, which is slower: %s.", kind, reason)
    return False


def multiplies(x: Tensor, packed: Packed) -> bool:
    """Whether `products` takes these inputs: where there are more rows, slices are faster."""
    rows = x.numel() // packed.in_features
    fits = x.shape[-1] == packed.in_features and x.device == packed.weight.device
    return fits and 0 < rows <= FEW_ROWS and x.dtype in DTYPES


def products(x: Tensor, packed: Packed, bias: Tensor | None = None, *, parts: int | None = None) -> Tensor:
    """
    Products with a weight that stays packed.

    Args:
        x (`torch.Tensor`): `(..., in_features)` in float32, bfloat16 or float16, at least one row.
        packed ([`Packed`]): A weight that [`serves`] accepts, on the same device.
        bias (`torch.Tensor`, *optional*): `(out_features,)`, added to the sums in float32.
        parts (`int`, *optional*): Of the columns, each summed by programs of its own; by default as many as the GPU
            needs to be occupied.

    Returns:
        `torch.Tensor`: `(..., out_features)` in the dtype of `x`.
    """
    width, outputs = packed.in_features, packed.weight.shape[1]
    shape, rows = (*x.shape[:-1], outputs), x.numel() // width
    x = x.detach().contiguous()
    block_m, block_n, block_k = tile_of(rows, packed.group_size, x.element_size())
    programs = triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_n)
    steps = triton.cdiv(width, block_k)
    if parts is None:
        parts = max(1, min(PROGRAMS * _multiprocessors(x.device) // programs, steps // 4))
    steps = triton.cdiv(steps, parts)
    y = x.new_empty(shape) if parts == 1 else x.new_empty(parts, rows, outputs, dtype=torch.float32)
    bias = None if bias is None else bias.detach().contiguous()
    grid = (triton.cdiv(outputs, block_n), triton.cdiv(rows, block_m), parts)
    with _current(x.device):
        tiles.products[grid](
            x, *_tensors(packed), bias if parts == 1 else None, y, rows, outputs, width, packed.group_size, steps,
            BITS=packed.bits, IS_ROW=rows == 1, ONE_GROUP=packed.group_size % block_k == 0, UPCAST=_is_interpreted(),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_stages=2,
        )  # fmt: skip
    if parts == 1:
        return y
    total = y.sum(0)
    total = (total if bias is None else total + bias).to(x.dtype)
    return total if len(shape) == 2 else total.view(shape)  # no view of two axes, see `_product`


def slices(packed: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """
    Yields slices of outputs and their weights `(outputs, in_features)`, as `dequantize` defines them, in float32,
    bfloat16 or float16. A slice is valid until the next one is taken.
    """
    size, width = packed.weight.shape[1], packed.in_features
    step = max(1, min(SLICE // width, size))
    memory = torch.empty(step * width, dtype=dtype, device=packed.weight.device)
    block_k, block_n = 32, 64
    for start in range(0, size, step):
        stop = min(start + step, size)
        with _current(memory.device):
            tiles.rebuild[triton.cdiv(stop - start, block_n), triton.cdiv(width, block_k)](
                *_tensors(packed), memory, start, stop, size, width, packed.group_size,
                BITS=packed.bits, ONE_GROUP=packed.group_size % block_k == 0, BLOCK_N=block_n, BLOCK_K=block_k,
            )  # fmt: skip
        yield slice(start, stop), memory[: (stop - start) * width].view(width, stop - start).T


def tile_of(rows: int, group_size: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, outputs and columns at a time."""
    if rows == 1:
        return 1, 128, 32
    # A tile within a group reads its parameters once. In float32, one of 64 columns would not fit into shared memory.
    return min(max(1 << (rows - 1).bit_length(), 16), 64), 64, 64 if group_size % 64 == 0 and itemsize == 2 else 32


def _tensors(packed: Packed) -> list[Tensor | None]:
    tensors = packed.weight, packed.weight_scale, packed.weight_zero_point
    return [None if tensor is None else tensor.detach().contiguous() for tensor in tensors]


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _is_interpreted() -> bool:
    """Whether the kernels run in the interpreter, where `tl.dot` takes the bits of bfloat16 for integers."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 64  # XPUs count otherwise, and the interpreter has none
