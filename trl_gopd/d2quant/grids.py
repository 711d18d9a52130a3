"""
Group-wise codebooks below four bits: affine, mid-rise and bit-plane, each with an optional scale per column.

A group is `group_size` consecutive columns of a weight `(out_features, in_features)`; the last one may be shorter. In
each (row, group) a weight is rebuilt from a code `q` of `bits` bits:

- affine: `s·(q − z)`, with an integer zero point `z` in `[0, 2^bits)`;
- mid-rise: `s·(q − (2^bits − 1)/2)`, symmetric, without a level at zero and without anything to store for it;
- bit-plane: `Σ_k r_k·(2·q_k − 1)`, `q_k` the k-th bit of `q`: the codebook of the authors' release.

The dual scale (DSQ, eq. 5 of [D²Quant](https://huggingface.co/papers/2602.02546)) multiplies column `j` of any of the
three by `c_j > 0`. Fits minimise `Σ_ij h_j·(w_ij − ŵ_ij)²`; `h`, the importance of a column, is 1 in the paper and the
Hessian's diagonal here unless told otherwise. Group data is laid out `(columns, rows)`, so that what is done for one
column after another runs over contiguous memory.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


Grid = Literal["affine", "midrise", "bitplane"]
GRIDS: tuple[Grid, ...] = ("affine", "midrise", "bitplane")

# The release's clip search: both ends of the range shrunk by 0, 1, … 79 percent, errors to the power 2.4.
CLIP_FACTORS: tuple[float, ...] = tuple(1 - i / 100 for i in range(80))
CLIP_NORM = 2.4
# Bit-planes that coincide over a whole group make the normal equations singular.
RIDGE = 1e-4


@dataclass(frozen=True)
class QuantizedWeight:
    """
    A quantized matrix as codes and group parameters, before packing.

    Args:
        codes (`torch.Tensor`): uint8 `(out_features, in_features)`, each in `[0, 2^bits)`.
        scales (`torch.Tensor`): float `(planes, out_features, groups)`, `planes` being `bits` for bit-planes, else 1.
        zero_points (`torch.Tensor`, *optional*): uint8 `(out_features, groups)`; `None` unless the grid is affine.
        bits (`int`): 2, 3, 4 or 8.
        group_size (`int`): columns that share a scale; the last group may be smaller.
        grid (`str`): one of `GRIDS`.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    group_size: int
    grid: Grid

    def dequantize(self) -> Tensor:
        """Dense weight `(out_features, in_features)` in the dtype of the scales, on their device."""
        group = torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size
        codes = self.codes.to(self.scales.dtype)
        if self.grid == "affine":
            assert self.zero_points is not None
            return codes.sub_(self.zero_points.to(codes.dtype)[:, group]).mul_(self.scales[0][:, group])
        if self.grid == "midrise":
            middle: float = (2**self.bits - 1) / 2
            return codes.sub_(middle).mul_(self.scales[0][:, group])
        codes.zero_()
        for plane, scales in enumerate(self.scales):
            signs = (self.codes >> plane & 1).to(codes.dtype).mul_(2).sub_(1)
            codes.addcmul_(signs, scales[:, group])
        return codes


@dataclass(frozen=True)
class GroupGrid:
    """
    The fitted codebooks of one group: one for each row, and the scales of the columns.

    Args:
        scales (`torch.Tensor`): float `(planes, rows)`, positive.
        zero_points (`torch.Tensor`, *optional*): float `(rows,)` holding integers; `None` unless the grid is affine.
        column_scale (`torch.Tensor`, *optional*): float `(columns,)`, positive, geometric mean 1. `None` without DSQ.
        bits (`int`): code width.
        grid (`str`): one of `GRIDS`.
    """

    scales: Tensor
    zero_points: Tensor | None
    column_scale: Tensor | None
    bits: int
    grid: Grid

    def quantize(self, columns: Tensor, column_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Nearest codes of `columns`, and the values that they are rebuilt to.

        Args:
            columns (`torch.Tensor`): float `(..., rows)`.
            column_scale (`torch.Tensor`, *optional*): what the leading axes are scaled by, broadcastable.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: codes and reconstruction, both float, of the shape of `columns`.
        """
        if column_scale is None:
            codes = self.codes(columns)
            return codes, self.levels(codes)
        codes = self.codes(columns / column_scale)
        return codes, self.levels(codes).mul_(column_scale)

    def codes(self, columns: Tensor) -> Tensor:
        """Code of the level nearest to each of `columns` `(..., rows)`, as floats; the column scale is left out."""
        if self.grid != "bitplane":
            return (columns / self.scales[0]).add_(self.zero).round_().clamp_(0, 2**self.bits - 1)
        order, middles = self._sorted_levels
        codes, above = order[0].expand_as(columns).clone(), torch.empty_like(columns)
        for middle, step in zip(middles, order.diff(dim=0), strict=True):
            # written as floats: selecting by a mask takes ten times as long on a CPU
            codes.addcmul_(torch.gt(columns, middle, out=above), step)
        return codes

    def levels(self, codes: Tensor) -> Tensor:
        """Values of the levels that `codes` `(..., rows)` number, before the column scale."""
        if self.grid != "bitplane":
            return (codes - self.zero).mul_(self.scales[0])
        first, *others = zip(self.scales, _signs(codes, self.bits), strict=True)
        values: Tensor = first[0] * first[1]
        for scales, signs in others:
            values.addcmul_(scales, signs)
        return values

    @property
    def zero(self) -> Tensor:
        """The code, maybe fractional, of the level 0: `(rows,)` or a scalar."""
        return self.scales.new_full((), (2**self.bits - 1) / 2) if self.zero_points is None else self.zero_points

    @cached_property
    def _sorted_levels(self) -> tuple[Tensor, Tensor]:
        """Codes in the order of their levels `(2^bits, rows)`, and the midpoints between neighbours."""
        codes = torch.arange(2**self.bits, dtype=self.scales.dtype, device=self.scales.device)
        levels, order = self.levels(codes[:, None].expand(-1, self.scales.shape[1])).sort(dim=0)
        return order.to(levels.dtype), (levels[1:] + levels[:-1]) / 2


def fit_group(
    columns: Tensor,
    *,
    bits: int,
    grid: Grid,
    importance: Tensor | None = None,
    column_scale: bool = False,
    iterations: int = 15,
    clip: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> GroupGrid:
    """
    Codebooks of one group of columns, with or without the dual scale.

    Starts from the best clipped range (bit-planes: from greedy residuals) and alternates, `iterations` times, between
    row parameters, codes and column scales. Each step minimises the weighted squared error given the others or is not
    taken, so the error never rises, and the grid returned is the last.

    Args:
        columns (`torch.Tensor`):
            Float `(columns, rows)`: the group, transposed.
        bits (`int`):
            Code width.
        grid (`str`):
            One of `GRIDS`.
        importance (`torch.Tensor`, *optional*):
            Float `(columns,)`, `h_j ≥ 0`, of any magnitude. If it is not given, or all are 0, columns weigh alike. If
            it is not given, the clipped range is also chosen by errors to the power 2.4, as in the authors' release.
        column_scale (`bool`, *optional*, defaults to `False`):
            Whether columns get a scale of their own.
        iterations (`int`, *optional*, defaults to `15`):
            Alternations; 0 keeps the start.
        clip (`bool`, *optional*, defaults to `True`):
            Whether the start is searched for among shrunken ranges; otherwise it is the full range.
        scale_dtype (`torch.dtype`, *optional*):
            What scales are stored in; they are rounded to it, so that later roundings of weights see it.

    Returns:
        [`GroupGrid`]: the fitted codebooks.
    """
    weights = torch.ones_like(columns[:, 0])
    if importance is not None:
        mean = importance.mean()
        weights = torch.where(mean > 0, importance / mean, 1).to(columns.dtype)
    scale, inputs, input_weights = None, columns, weights
    if column_scale:
        # Neither 1 nor the mean magnitude, the release's start: half way between, the affine alternation ends lower.
        magnitude = columns.abs().mean(1)
        scale = torch.where(magnitude > 0, magnitude / magnitude.mean(), 1).sqrt_()
        inputs, input_weights = columns / scale[:, None], weights * scale.square()
    if grid == "bitplane":
        fitted = GroupGrid(_greedy_planes(inputs, bits, input_weights), None, None, bits, grid)
    else:
        factors, power = CLIP_FACTORS if clip else (1.0,), CLIP_NORM if importance is None else 2.0
        fitted = _search(inputs, _full_range(inputs, bits, grid), factors, input_weights, power)
    if scale is None:
        fitted = _alternate_rows(columns, fitted, weights, iterations)
    else:
        fitted = _alternate_columns(columns, fitted, scale, weights, iterations)
    return fitted if scale_dtype is None else replace(fitted, scales=_representable(fitted.scales, scale_dtype))


def _full_range(columns: Tensor, bits: int, grid: Grid) -> GroupGrid:
    """The narrowest grid that covers each row; an affine one reaches from its minimum to its maximum, 0 included."""
    top = 2**bits - 1
    low, high = columns.amin(0).clamp_(max=0), columns.amax(0).clamp_(min=0)
    if grid == "midrise":  # the outermost levels are ±s·(2^bits − 1)/2
        scales = 2 / top * torch.maximum(high, -low)
    else:
        scales = (high - low) / top
    scales.clamp_(min=torch.finfo(scales.dtype).tiny)
    zero_points = (-low / scales).round_().clamp_(0, top) if grid == "affine" else None
    return GroupGrid(scales[None], zero_points, None, bits, grid)


def _search(columns: Tensor, full: GroupGrid, factors: tuple[float, ...], weights: Tensor, power: float) -> GroupGrid:
    """`full` with each row shrunk by the one of the falling `factors` that leaves the least error to the `power`."""
    inputs = columns / full.scales[0]
    position, error = torch.empty_like(inputs), torch.empty_like(inputs)
    chosen, least = torch.ones_like(inputs[0]), torch.full_like(inputs[0], float("inf"))
    for i, factor in enumerate(factors):
        torch.add(full.zero, inputs, alpha=1 / factor, out=position)
        torch.round(position, out=error).clamp_(0, 2**full.bits - 1).sub_(position)
        total = factor**power * (weights @ _power_(error, power))
        chosen, least = torch.where(total < least, factor, chosen), torch.minimum(total, least)
        if i % 8 == 7:
            # What lies outside of the range only grows: once it alone exceeds the least error, no factor is better.
            torch.clamp(position, 0, 2**full.bits - 1, out=error).sub_(position)
            if (factor**power * (weights @ _power_(error, power)) >= least).all():
                break
    return replace(full, scales=full.scales * chosen)


def _power_(errors: Tensor, power: float) -> Tensor:
    return errors.square_() if power == 2 else errors.abs_().pow_(power)


def _greedy_planes(columns: Tensor, bits: int, weights: Tensor) -> Tensor:
    """Each plane takes the weighted mean magnitude of what the planes before it left. Largest first."""
    rest, scales = columns, []
    for _ in range(bits):
        scales.append((weights @ rest.abs()).div_(weights.sum()).clamp_(min=torch.finfo(columns.dtype).tiny))
        rest = rest - torch.copysign(scales[-1], rest)
    return torch.stack(scales)


def _alternate_rows(columns: Tensor, fitted: GroupGrid, weights: Tensor, iterations: int) -> GroupGrid:
    """Without column scales, rows are independent: a row whose codes did not change has converged."""
    scales = fitted.scales.clone()
    zero_points = None if fitted.zero_points is None else fitted.zero_points.clone()
    rows = torch.arange(columns.shape[1], device=columns.device)
    codes = fitted.codes(columns)
    for _ in range(iterations):
        fitted = _refit_rows(columns, codes, fitted, weights)
        scales[:, rows] = fitted.scales
        if zero_points is not None and fitted.zero_points is not None:
            zero_points[rows] = fitted.zero_points
        old, codes = codes, fitted.codes(columns)
        moved = old.sub_(codes).abs_().amax(0).nonzero()[:, 0]
        if len(moved) == 0:
            break
        if len(moved) < len(rows) / 2:  # gathering rows costs as much as an alternation
            rows, columns, codes = rows[moved], columns[:, moved], codes[:, moved]
            left = None if fitted.zero_points is None else fitted.zero_points[moved]
            fitted = replace(fitted, scales=fitted.scales[:, moved], zero_points=left)
    return replace(fitted, scales=scales, zero_points=zero_points)


def _alternate_columns(
    columns: Tensor, fitted: GroupGrid, scale: Tensor, weights: Tensor, iterations: int
) -> GroupGrid:
    """With `x = w/c`, the error is `Σ_ij c_j²·h_j·(x_ij − level_ij)²`."""
    for _ in range(iterations):
        inputs = columns / scale[:, None]
        fitted = _refit_rows(inputs, fitted.codes(inputs), fitted, weights * scale.square())
        levels = fitted.levels(fitted.codes(inputs))
        # c_j = ⟨w_j, d_j⟩/⟨d_j, d_j⟩, where it is positive; the importance of a column cancels
        best = (columns * levels).sum(1) / levels.square_().sum(1)
        scale = torch.where(best > 0, best, scale)
    # (c, s) and (αc, s/α) are the same codebook: keep c near 1, and half-precision scales in their range.
    gauge = scale.log().mean().exp()
    return replace(fitted, scales=fitted.scales * gauge, column_scale=scale / gauge)


def _refit_rows(inputs: Tensor, codes: Tensor, old: GroupGrid, weights: Tensor) -> GroupGrid:
    """Least squares of the row parameters, given the codes `(columns, rows)`."""
    if old.grid == "bitplane":
        return replace(old, scales=_solve_planes(inputs, codes, weights, old.scales))
    # With offsets o = q − z and errors e = x − s·o, the pair (s + α, z − β/(s + α)) has the error e − α·o − β.
    scales, offsets = old.scales[0], codes - old.zero
    errors = torch.addcmul(inputs, scales, offsets, value=-1)
    total, o, e = weights.sum(), weights @ offsets, weights @ errors
    oe, oo = weights @ errors.mul_(offsets), weights @ offsets.square_()

    def refit(moved: Tensor | float) -> tuple[Tensor, Tensor]:
        """The best scales once zero points moved down by `moved`, and how much they lower the error."""
        best = (oe + scales * oo + moved * (e + scales * o)) / (oo + 2 * moved * o + moved * moved * total)
        alpha, beta = best - scales, best * moved
        gain = alpha * (2 * oe - alpha * oo - 2 * beta * o) + beta * (2 * e - beta * total)
        return best, torch.where(best > 0, gain, -1.0)  # it is NaN where the denominator is 0

    new_scales, gain = refit(0.0)
    new = replace(old, scales=torch.where(gain > 0, new_scales, scales)[None])
    if old.zero_points is None:
        return new
    # Both at once is a regression; its zero point is rounded, and a row that loses by the rounding keeps the old one.
    determinant = oo * total - o * o
    slope = scales + (total * oe - o * e) / determinant
    zero_points = (old.zero_points - (oo * e - o * oe) / determinant / slope).round_().clamp_(0, 2**old.bits - 1)
    moved_scales, moved_gain = refit(old.zero_points - zero_points)
    better = moved_gain > gain.clamp(min=0)
    return replace(
        new,
        scales=torch.where(better, moved_scales, new.scales),
        zero_points=torch.where(better, zero_points, old.zero_points),
    )


def _solve_planes(inputs: Tensor, codes: Tensor, weights: Tensor, old: Tensor) -> Tensor:
    """
    Normal equations `(Σ_j a_j b_j b_jᵀ + ridge) r = Σ_j a_j b_j x_j + ridge·r_old` of each row `(planes, rows)`.

    The ridge pulls towards the old scales, not towards 0, so that it cannot raise the error. r < 0 turns its plane
    around.
    """
    signs, total = _signs(codes, len(old)), weights.sum()
    ridge = RIDGE * total
    right = [weights @ (inputs * sign) + ridge * r for sign, r in zip(signs, old, strict=True)]
    # Elimination over the planes, for all rows at once: the matrices are too small for LAPACK to be quick.
    normal = [[weights @ (a * b) if a is not b else total + ridge for b in signs] for a in signs]
    planes = range(len(signs))
    for k in planes:
        for i in planes[k + 1 :]:
            share = normal[i][k] / normal[k][k]
            normal[i] = [a - share * b for a, b in zip(normal[i], normal[k], strict=True)]
            right[i] = right[i] - share * right[k]
    for k in reversed(planes):
        known = sum(normal[k][i] * right[i] for i in planes[k + 1 :])
        right[k] = (right[k] - known) / normal[k][k]
    return torch.stack(right).abs_().clamp_(min=torch.finfo(old.dtype).tiny)


def _signs(codes: Tensor, bits: int) -> list[Tensor]:
    """±1 for each bit of float codes, the lowest first: `2·q − (2^bits − 1) = Σ_k 2^k·sign_k`."""
    rest, signs = 2 * codes - (2**bits - 1), []
    for k in reversed(range(bits)):
        signs.append(rest.sign())
        rest.sub_(signs[-1], alpha=2**k)
    return signs[::-1]


def _representable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` rounded to `dtype`, in the dtype they have; none becomes 0, subnormal in float32, or infinite."""
    info = torch.finfo(dtype)
    smallest = max(info.smallest_normal * info.eps, torch.finfo(scales.dtype).tiny)  # subnormals are better than 0
    return scales.clamp(smallest, info.max).to(dtype).to(scales.dtype)
