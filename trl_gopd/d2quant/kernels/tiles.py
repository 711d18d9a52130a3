# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Kernels in Triton's language, whose arguments have no types: `gpu` says what they compute. Needs Triton."""

import triton
import triton.language as tl


@triton.jit
def _codes(words, position, step, mask, BITS: tl.constexpr):
    """The codes at a position of bit streams that begin at `words`; words of a stream are `step` apart."""
    bit = position % 32 * BITS
    first = words + (position // 32 * BITS + bit // 32) * step
    shift = bit % 32
    codes = tl.load(first, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if BITS == 3:  # of the widths, this one alone has codes that lie in two words
        rest = tl.load(first + step, mask=mask & (shift + BITS > 32), other=0).to(tl.uint32, bitcast=True)
        codes |= rest << (32 - shift & 31)
    return (codes & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _weights(
    words, scales, zero_points, start, n, N, K, group_size,
    BITS: tl.constexpr, ONE_GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights of outputs `n (1, BLOCK_N)` in the columns from `start` on, `(BLOCK_K, BLOCK_N)` in float32."""
    k = start + tl.arange(0, BLOCK_K)[:, None]
    inside = (k < K) & (n < N)
    codes = _codes(words + n, k, N, inside, BITS)
    group = k // group_size
    if ONE_GROUP:  # of all columns of the tile, so that its parameters are read once
        group = start // group_size
        inside = (start < K) & (n < N)
    scale = tl.load(scales + group * N + n, mask=inside, other=0).to(tl.float32)
    if zero_points is None:
        zero = (2.0**BITS - 1) / 2
    else:
        zero = _codes(zero_points + group * ((N + 31) // 32 * BITS), n, 1, inside, BITS)
    return (codes - zero) * scale


@triton.jit
def products(
    x, words, scales, zero_points, bias, y, M, N, K, group_size, steps,
    BITS: tl.constexpr, IS_ROW: tl.constexpr, ONE_GROUP: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of `y (parts, M, N)`: a part of the columns, which has `steps` tiles."""
    part = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(steps):
        start = (part * steps + step) * BLOCK_K
        weights = _weights(words, scales, zero_points, start, n, N, K, group_size, BITS, ONE_GROUP, BLOCK_K)
        if IS_ROW:
            k = start + tl.arange(0, BLOCK_K)[:, None]
            sums += tl.sum(tl.load(x + k, mask=k < K, other=0).to(tl.float32) * weights, 0, keep_dims=True)
        else:
            k = start + tl.arange(0, BLOCK_K)[None, :]
            rows = tl.load(x + m * K + k, mask=(m < M) & (k < K), other=0)
            weights = weights.to(rows.dtype)
            if UPCAST:
                rows, weights = rows.to(tl.float32), weights.to(tl.float32)
            sums = tl.dot(rows, weights, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    tl.store(y + (part * M + m) * N + n, sums.to(y.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def rebuild(
    words, scales, zero_points, out, begin, end, N, K, group_size,
    BITS: tl.constexpr, ONE_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of outputs `begin` to `end` of W transposed, `(K, end - begin)`."""
    n = begin + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    start = tl.program_id(1) * BLOCK_K
    k = (start + tl.arange(0, BLOCK_K)[:, None]).to(tl.int64)
    weights = _weights(words, scales, zero_points, start, n, N, K, group_size, BITS, ONE_GROUP, BLOCK_K)
    tl.store(out + k * (end - begin) + (n - begin), weights.to(out.dtype.element_ty), mask=(k < K) & (n < end))
