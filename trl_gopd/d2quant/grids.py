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

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
        group_size (`int`): columns that share a scale; the last group has what is left.
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
            return self.scales[0][:, group] * (codes - self.zero_points.to(codes.dtype)[:, group])
        if self.grid == "midrise":
            return self.scales[0][:, group] * (codes - (2**self.bits - 1) / 2)
        planes = (self.codes.int() >> torch.arange(self.bits, device=self.codes.device)[:, None, None]) & 1
        return (self.scales[:, :, group] * (2 * planes - 1).to(self.scales.dtype)).sum(0)


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

    def quantize(self, columns: Tensor, column_scale: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """
        Nearest codes of `columns`, and what they stand for.

        Args:
            columns (`torch.Tensor`): float `(..., rows)`.
            column_scale (`torch.Tensor` or `float`, *optional*): what the leading axes are scaled by, broadcastable.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: codes and reconstruction, both float, of the shape of `columns`.
        """
        scaled = columns if column_scale is None else columns / column_scale
        if self.grid == "bitplane":
            codes = _nearest_level(scaled, self.scales)
        else:
            codes = (scaled / self.scales[0] + self._zero()).round_().clamp_(0, 2**self.bits - 1)
        values = self.levels(codes)
        return codes, values if column_scale is None else values * column_scale

    def levels(self, codes: Tensor) -> Tensor:
        """What `codes` `(..., rows)` stand for, before the column scale."""
        if self.grid != "bitplane":
            return self.scales[0] * (codes - self._zero())
        return sum((s * _signs(codes, k) for k, s in enumerate(self.scales)), torch.zeros_like(codes))

    def _zero(self) -> Tensor | float:
        return (2**self.bits - 1) / 2 if self.zero_points is None else self.zero_points

    def error(self, columns: Tensor, importance: Tensor | None) -> Tensor:
        """Weighted squared error of each row `(rows,)` of `columns` `(columns, rows)`."""
        column_scale = None if self.column_scale is None else self.column_scale[:, None]
        _, values = self.quantize(columns, column_scale)
        return _row_error(columns - values, importance)


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
            Float `(columns,)`, `h_j ≥ 0`. `None` weighs all columns alike, and picks the clipped range by errors to
            the power 2.4, as the release does.
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
    fitted = _start(columns, bits=bits, grid=grid, importance=importance, factors=CLIP_FACTORS if clip else (1.0,))
    scale = torch.ones_like(columns[:, 0]) if column_scale else None
    for _ in range(iterations):
        codes, _ = fitted.quantize(columns, None if scale is None else scale[:, None])
        fitted = _refit_rows(columns, codes, fitted, scale, importance)
        if scale is not None:
            codes, _ = fitted.quantize(columns, scale[:, None])
            scale = _refit_columns(columns, fitted.levels(codes), scale)
    scales = fitted.scales
    if scale is not None:
        # (c, s) and (αc, s/α) are the same codebook: keep c near 1, and half-precision scales in their range.
        gauge = scale.log().mean().exp()
        scale, scales = scale / gauge, scales * gauge
    if scale_dtype is not None:
        scales = scales.to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny).to(scales.dtype)
    return replace(fitted, scales=scales, column_scale=scale)


def _start(
    columns: Tensor, *, bits: int, grid: Grid, importance: Tensor | None, factors: tuple[float, ...]
) -> GroupGrid:
    if grid == "bitplane":
        return GroupGrid(_greedy_planes(columns, bits, importance), None, None, bits, grid)
    ranges = _clipped_ranges(columns, bits, grid, factors)
    return _search(columns, ranges, importance, CLIP_NORM if importance is None else 2.0)


def _clipped_ranges(columns: Tensor, bits: int, grid: Grid, factors: tuple[float, ...]) -> Iterable[GroupGrid]:
    top = 2**bits - 1
    if grid == "midrise":
        # the outermost levels are ±s·(2^bits − 1)/2
        bound = columns.abs().amax(0)
        bound = torch.where(bound == 0, 1.0, bound)
        for factor in factors:
            yield GroupGrid((2 * factor / top * bound)[None], None, None, bits, grid)
        return
    low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
    empty = low == high
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    zero_points = (-low * top / (high - low)).round()  # the same for all factors
    for factor in factors:
        yield GroupGrid((factor / top * (high - low))[None], zero_points, None, bits, grid)


def _search(columns: Tensor, candidates: Iterable[GroupGrid], importance: Tensor | None, power: float) -> GroupGrid:
    best: GroupGrid | None = None
    best_error = columns.new_full(columns.shape[1:], float("inf"))
    for candidate in candidates:
        _, values = candidate.quantize(columns)
        error = _row_error(values.sub_(columns), importance, power)
        better = error < best_error
        best = candidate if best is None else _choose(better, candidate, best)
        best_error = torch.where(better, error, best_error)
    assert best is not None
    return best


def _choose(rows: Tensor, new: GroupGrid, old: GroupGrid) -> GroupGrid:
    zero_points = old.zero_points
    if new.zero_points is not None and old.zero_points is not None:
        zero_points = torch.where(rows, new.zero_points, old.zero_points)
    return replace(old, scales=torch.where(rows, new.scales, old.scales), zero_points=zero_points)


def _row_error(difference: Tensor, importance: Tensor | None, power: float = 2.0) -> Tensor:
    powers = difference.square() if power == 2 else difference.abs().pow(power)
    return powers.sum(0) if importance is None else importance.to(powers.dtype) @ powers


def _refit_rows(
    columns: Tensor, codes: Tensor, old: GroupGrid, scale: Tensor | None, importance: Tensor | None
) -> GroupGrid:
    """
    Least squares of the row parameters, given the codes `(columns, rows)`.

    With `x = w/c` and weights `a_j = c_j²·h_j`, the affine pair is a weighted regression of x on q:
    `s = Cov(q, x)/Var(q)`, `z = mean(q) − mean(x)/s`, rounded, then s again for the rounded z. A row keeps what it had
    if the rounding makes it worse.
    """
    weights = torch.ones_like(columns[:, 0]) if importance is None else importance.to(columns.dtype)
    inputs = columns
    if scale is not None:
        weights = weights * scale.square()
        inputs = columns / scale[:, None]
    if old.grid == "bitplane":
        return replace(old, scales=_solve_planes(inputs, codes, weights, old))
    candidates: list[Tensor | None] = [old.zero_points]
    if old.zero_points is not None:
        total = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        mean_q, mean_x = weights @ codes / total, weights @ inputs / total
        variance = weights @ codes.square() / total - mean_q.square()
        slope = (weights @ (codes * inputs) / total - mean_q * mean_x) / variance.clamp(min=1e-12)
        zero_points = (mean_q - mean_x / slope).round().clamp_(0, 2**old.bits - 1)
        candidates.append(torch.where(slope > 0, zero_points, old.zero_points))
    result, result_error = old, _row_error(inputs - old.levels(codes), weights)
    for zero in candidates:
        offset = codes - ((2**old.bits - 1) / 2 if zero is None else zero)
        denominator = weights @ offset.square()
        scales = (weights @ (offset * inputs) / denominator)[None]
        new = replace(old, scales=scales, zero_points=zero)
        error = _row_error(inputs - new.levels(codes), weights)
        better = (error < result_error) & (scales[0] > 0)  # false where the denominator is 0
        result, result_error = _choose(better, new, result), torch.where(better, error, result_error)
    return result


def _refit_columns(columns: Tensor, levels: Tensor, old: Tensor) -> Tensor:
    """`c_j = ⟨w_j, d_j⟩/⟨d_j, d_j⟩`, where it is positive. The importance of a column cancels."""
    scale = (columns * levels).sum(1) / levels.square().sum(1)
    return torch.where(scale > 0, scale, old)


def _signs(codes: Tensor, plane: int) -> Tensor:
    """±1 of bit `plane` of float codes."""
    return 2 * torch.remainder(torch.floor(codes / 2**plane), 2) - 1


def _nearest_level(columns: Tensor, scales: Tensor) -> Tensor:
    """Code of the nearest of the `2^planes` levels of each row, as floats of the shape of `columns`."""
    best, best_distance = torch.zeros_like(columns), torch.full_like(columns, float("inf"))
    for code in range(2 ** len(scales)):
        level = sum(s if code >> k & 1 else -s for k, s in enumerate(scales))
        distance = (columns - level).abs_()
        closer = distance < best_distance
        best.masked_fill_(closer, code)
        best_distance = torch.where(closer, distance, best_distance)
    return best


def _greedy_planes(columns: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """Each plane takes the weighted mean magnitude of what the planes before it left. Largest first."""
    weights = torch.ones_like(columns[:, 0]) if importance is None else importance.to(columns.dtype)
    weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    rest, scales = columns, []
    for _ in range(bits):
        scales.append((weights @ rest.abs()).clamp(min=torch.finfo(columns.dtype).eps))
        rest = rest - torch.where(rest < 0, -scales[-1], scales[-1])
    return torch.stack(scales)


def _solve_planes(inputs: Tensor, codes: Tensor, weights: Tensor, old: GroupGrid) -> Tensor:
    """Normal equations `(Σ_j a_j b_j b_jᵀ + ridge) r = Σ_j a_j b_j x_j` of each row; r < 0 turns its plane around."""
    signs = torch.stack([_signs(codes, k) for k in range(old.bits)])  # (planes, columns, rows)
    weighted = signs * weights[:, None]
    normal = torch.einsum("kcr,lcr->rkl", weighted, signs)
    normal = normal + RIDGE * weights.sum() * torch.eye(old.bits, dtype=normal.dtype, device=normal.device)
    moments = torch.einsum("kcr,cr->rk", weighted, inputs)
    # the ridge pulls towards the old scales, not towards zero: it cannot raise the error
    moments = moments + RIDGE * weights.sum() * old.scales.T
    scales = torch.linalg.solve(normal, moments[..., None])[..., 0].abs().T
    return scales.clamp(min=torch.finfo(scales.dtype).eps)
