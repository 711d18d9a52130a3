"""
Rounding a weight matrix to a grid: to nearest, or with the error of each column compensated by the columns after it.

Notation: a linear computes `W x` for tokens x; `W` is `(out_features, in_features)`. Over the calibration tokens,
`H = 2/n Σ x xᵀ` is the Hessian of the squared output error in a row of W, and `D = 2/n Σ (x̃ − x) xᵀ` the asymmetry,
x̃ being the input that the full-precision model has where the quantized one has x.

- [GPTQ](https://huggingface.co/papers/2210.17323) minimises `tr((Ŵ − W) H (Ŵ − W)ᵀ)` greedily, column by column.
- [GPTAQ](https://huggingface.co/papers/2504.02692) aims at `Ŵ x ≈ W x̃` instead: the deviation of column i, `w_i D_i`,
  is compensated by the columns after it, damped by `alpha`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_gopd.d2quant.grids import Grid, GroupGrid, QuantizedWeight, fit_group


# Columns whose errors are collected before they are passed on to the rest of the matrix in one product.
LAZY_COLUMNS = 128


@dataclass(frozen=True)
class RoundingResult:
    """
    Args:
        weight ([`QuantizedWeight`]):
            The quantized matrix, columns in their original order, without the column scale.
        column_scale (`torch.Tensor`, *optional*):
            float32 `(in_features,)`: the dual scale that the rebuilt columns are yet to be multiplied by.
    """

    weight: QuantizedWeight
    column_scale: Tensor | None

    def dequantize(self) -> Tensor:
        """float32 `(out_features, in_features)`, the column scale included."""
        dense = self.weight.dequantize()
        return dense if self.column_scale is None else dense * self.column_scale


def round_weight(
    weight: Tensor,
    hessian: Tensor | None = None,
    asymmetry: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    grid: Grid = "affine",
    alpha: float = 0.25,
    damp_percent: float = 0.01,
    act_group_aware: bool = True,
    hessian_weights: bool = True,
    column_scale: bool = False,
    iterations: int = 15,
    clip: bool = True,
    scale_dtype: torch.dtype | None = torch.float16,
) -> RoundingResult:
    """
    Quantizes a matrix: to nearest without `hessian`, with GPTQ given `hessian`, with GPTAQ given `asymmetry` too.

    No argument is modified: the damping that makes H invertible is added to a copy, so that linears may share H.

    Args:
        weight (`torch.Tensor`):
            `(out_features, in_features)`, any float dtype.
        hessian (`torch.Tensor`, *optional*):
            float32 `(in_features, in_features)`, H. A column whose diagonal is 0 was never used; its weights become 0.
        asymmetry (`torch.Tensor`, *optional*):
            float32 `(in_features, in_features)`, D.
        bits (`int`), group_size (`int`), grid (`str`):
            The codebooks, see [`~trl_gopd.d2quant.grids.fit_group`]. Those of a group are fitted to its compensated
            weights when the sweep reaches it.
        alpha (`float`, *optional*, defaults to `0.25`):
            Share of the asymmetry that is compensated; the value of the GPTAQ paper.
        damp_percent (`float`, *optional*, defaults to `0.01`):
            Added to the diagonal of H, times its mean.
        act_group_aware (`bool`, *optional*, defaults to `True`):
            Visits columns by decreasing H_jj within their group, and groups by decreasing maximum. Groups stay
            together, so that the stored group of column j is `j // group_size`.
        hessian_weights (`bool`, *optional*, defaults to `True`):
            Weighs columns by H_jj when codebooks are fitted.
        column_scale (`bool`, *optional*, defaults to `False`):
            Fits the dual scale (DSQ).
        iterations (`int`, *optional*, defaults to `15`):
            Alternations of the fit.
        clip (`bool`, *optional*, defaults to `True`):
            Whether the fit starts from the best clipped range rather than from the full one.
        scale_dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            What scales will be stored in; they are rounded before any weight is.

    Returns:
        [`RoundingResult`]
    """
    rows, columns = weight.shape
    groups = torch.arange(columns, device=weight.device).split(group_size)
    current = weight.T.to(torch.float32, copy=True)  # (columns, rows): a column is contiguous
    diagonal = sweep = None
    if hessian is not None:
        diagonal = hessian.diagonal().float()
        dead = diagonal == 0
        current[dead] = 0
        if act_group_aware:
            groups = _order(groups, diagonal)
        order = torch.cat(list(groups))
        factor = inverse_factor(hessian[order][:, order], damp_percent)
        shift = None
        if asymmetry is not None:
            shift = alpha * torch.triu(asymmetry[order][:, order] @ factor.T, diagonal=1) @ factor
        current = current[order]
        sweep = (factor, shift)

    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    grids: dict[int, GroupGrid] = {}
    scale = torch.empty(columns, device=weight.device) if column_scale else None
    start = 0
    for group in groups:
        stop = start + len(group)
        fitted = fit_group(
            current[start:stop],
            bits=bits,
            grid=grid,
            importance=diagonal[group] if hessian_weights and diagonal is not None else None,
            column_scale=column_scale,
            iterations=iterations,
            clip=clip,
            scale_dtype=scale_dtype,
        )
        if sweep is None:
            column_scales = None if fitted.column_scale is None else fitted.column_scale[:, None]
            codes[group] = fitted.quantize(current[start:stop], column_scales)[0].to(torch.uint8)
        else:
            codes[group] = _sweep_group(current, fitted, start, stop, *sweep)
        if scale is not None and fitted.column_scale is not None:
            scale[group] = fitted.column_scale
        grids[int(group.min()) // group_size] = fitted
        start = stop

    fits = [grids[i] for i in range(len(grids))]
    zero_points = None
    if grid == "affine":
        zero_points = torch.stack([fit.zero_points for fit in fits if fit.zero_points is not None], dim=-1).to(
            torch.uint8
        )
    quantized = QuantizedWeight(
        codes=codes.T.contiguous(),
        scales=torch.stack([fit.scales for fit in fits], dim=-1),
        zero_points=zero_points,
        bits=bits,
        group_size=group_size,
        grid=grid,
    )
    return RoundingResult(quantized, scale)


def inverse_factor(hessian: Tensor, damp_percent: float) -> Tensor:
    """
    Upper triangular U with `H⁻¹ = Uᵀ U`, H damped by `damp_percent` of the mean of its diagonal.

    Row i of U holds how the error of column i is spread over the columns after it once those before it are frozen.

    Args:
        hessian (`torch.Tensor`): float32 `(in_features, in_features)`, not modified.
        damp_percent (`float`): a fraction, 0.01 for one percent.

    Returns:
        `torch.Tensor`: of the shape and dtype of `hessian`.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal += damp_percent * diagonal.mean()
    diagonal[diagonal == 0] = 1
    # H = L Lᵀ with rows and columns reversed gives H = V Vᵀ, V upper triangular; then U = V⁻¹ᵀ is lower … so U is
    # taken from the inverse itself, as usual.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _order(groups: tuple[Tensor, ...], diagonal: Tensor) -> tuple[Tensor, ...]:
    by_column = [group[diagonal[group].argsort(descending=True, stable=True)] for group in groups]
    return tuple(sorted(by_column, key=lambda group: -float(diagonal[group[0]])))


def _sweep_group(
    current: Tensor, fitted: GroupGrid, start: int, stop: int, factor: Tensor, shift: Tensor | None
) -> Tensor:
    """
    Quantizes columns `start:stop` of `current` `(columns, rows)` one by one, and updates the columns after each.

                start   lazy block    stop
        frozen    |  i → → → | → → → → | → → → → later groups
                         inside the block: at once; to the right of it: once a block, in one product
    """
    codes = torch.empty(stop - start, current.shape[1], dtype=torch.uint8, device=current.device)
    scale = fitted.column_scale
    for left in range(start, stop, LAZY_COLUMNS):
        right = min(left + LAZY_COLUMNS, stop)
        errors = torch.empty_like(current[left:right])
        values = torch.empty_like(errors) if shift is not None else None
        for i in range(left, right):
            column = current[i]
            code, value = fitted.quantize(column, None if scale is None else scale[i - start])
            codes[i - start] = code
            errors[i - left] = (column - value) / factor[i, i]
            rest = current[i + 1 : right]
            if values is not None and shift is not None:
                values[i - left] = column
                rest.addr_(shift[i, i + 1 : right], column)
            rest.addr_(factor[i, i + 1 : right], errors[i - left], alpha=-1)
        later = current[right:]
        later.addmm_(factor[left:right, right:].T, errors, alpha=-1)
        if values is not None and shift is not None:
            later.addmm_(shift[left:right, right:].T, values)
    return codes
