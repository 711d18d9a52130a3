"""
Rounding a weight matrix to a grid, to nearest or with the error of each column compensated by the columns after it.

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
            float32 `(in_features,)`: the dual scale, by which the dequantized columns must still be multiplied.
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
            float32 `(in_features, in_features)`, H. A column whose diagonal is 0 was never used, and its weights are
            set to 0.
        asymmetry (`torch.Tensor`, *optional*):
            float32 `(in_features, in_features)`, D.
        bits (`int`), group_size (`int`), grid (`str`):
            The codebooks, see [`~trl_gopd.d2quant.grids.fit_group`]. Those of a group are fitted to its compensated
            weights when the sweep reaches it.
        alpha (`float`, *optional*, defaults to `0.25`):
            Share of the asymmetry that is compensated; the value of the GPTAQ paper.
        damp_percent (`float`, *optional*, defaults to `0.01`):
            Share of the mean of H's diagonal that is added to the diagonal.
        act_group_aware (`bool`, *optional*, defaults to `True`):
            Whether columns are visited by decreasing H_jj within their group, and groups by their largest H_jj. Groups
            stay together, so that the stored group of column j is `j // group_size`.
        hessian_weights (`bool`, *optional*, defaults to `True`):
            Whether columns are weighted by H_jj when codebooks are fitted.
        column_scale (`bool`, *optional*, defaults to `False`):
            Whether the dual scale (DSQ) is fitted.
        iterations (`int`, *optional*, defaults to `15`):
            Number of alternations of the fit.
        clip (`bool`, *optional*, defaults to `True`):
            Whether the fit starts from the best clipped range rather than from the full one.
        scale_dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            Dtype in which scales will be stored. They are rounded to it before any weight is rounded.

    Returns:
        [`RoundingResult`]: codes, group parameters and column scales.

    Raises:
        ValueError: If the damped H is not positive definite.
    """
    rows, columns = weight.shape
    groups = torch.split(torch.arange(columns, device=weight.device), group_size)
    if hessian is not None and act_group_aware:
        groups = _order(groups, hessian.diagonal())
    order = torch.cat(groups)
    current = weight.float().T.contiguous()[order]  # (columns, rows): a column is contiguous
    importance = sweep = None
    if hessian is not None:
        current[hessian.diagonal()[order] == 0] = 0
        importance = hessian.diagonal()[order] if hessian_weights else None
        # The factor first: on the way to it, two more matrices of the size of H exist, and after it one.
        factor = inverse_factor(hessian, damp_percent, order)
        sweep = factor, None if asymmetry is None else _reorder(asymmetry, order).mul_(alpha)

    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(columns, device=weight.device) if column_scale else None
    fits: dict[int, GroupGrid] = {}
    start = 0
    for group in groups:
        stop = start + len(group)
        fitted = fit_group(
            current[start:stop],
            bits=bits,
            grid=grid,
            importance=None if importance is None else importance[start:stop],
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
        fits[int(group[0]) // group_size] = fitted
        start = stop

    by_index = [fits[i] for i in range(len(fits))]
    zero_points = [fit.zero_points for fit in by_index if fit.zero_points is not None]
    quantized = QuantizedWeight(
        codes=codes.T.contiguous(),
        scales=torch.stack([fit.scales for fit in by_index], dim=-1),
        zero_points=torch.stack(zero_points, dim=-1).to(torch.uint8) if zero_points else None,
        bits=bits,
        group_size=group_size,
        grid=grid,
    )
    return RoundingResult(quantized, scale)


def inverse_factor(hessian: Tensor, damp_percent: float, order: Tensor | None = None) -> Tensor:
    """
    Upper triangular U with `H⁻¹ = Uᵀ U`, H damped by `damp_percent` of the mean of its diagonal.

    Row i of U, over U_ii, is how the error of column i is spread over the columns after it once those before it are
    frozen. Two matrices of the size of H are allocated, of which U is one.

    Args:
        hessian (`torch.Tensor`): float32 `(in_features, in_features)`, not modified.
        damp_percent (`float`): a fraction, 0.01 for one percent.
        order (`torch.Tensor`, *optional*): int64 `(in_features,)`, columns in the order in which they are frozen.

    Returns:
        `torch.Tensor`: of the shape and dtype of `hessian`.

    Raises:
        ValueError: If the damped H is not positive definite.
    """
    damped = hessian.clone() if order is None else _reorder(hessian, order)
    diagonal = damped.diagonal()
    diagonal.add_(damp_percent * diagonal.mean())
    diagonal.masked_fill_(diagonal == 0, 1)
    del diagonal  # a view, which would keep what is freed next
    # With both axes reversed, H = L Lᵀ reads H = V Vᵀ, V upper triangular, so that U = V⁻¹. This spares H⁻¹ itself,
    # whose second factorization may fail by rounding.
    damped = damped.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(
            f"The Hessian of {len(hessian)} columns is not positive definite with `damp_percent={damp_percent}`. "
            "Raise it, or calibrate on more tokens."
        )
    del damped
    # Column by column in memory, as LAPACK writes it: only then is the identity itself what is solved in place.
    inverse = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device).mT
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def _reorder(matrix: Tensor, order: Tensor) -> Tensor:
    """A copy of a square matrix, its rows and its columns in another order."""
    return matrix[order[:, None], order]


def _order(groups: tuple[Tensor, ...], diagonal: Tensor) -> tuple[Tensor, ...]:
    by_column = [group[diagonal[group].argsort(descending=True, stable=True)] for group in groups]
    return tuple(sorted(by_column, key=lambda group: -float(diagonal[group[0]])))


def _sweep_group(
    current: Tensor, fitted: GroupGrid, start: int, stop: int, factor: Tensor, deviation: Tensor | None
) -> Tensor:
    """
    Quantizes columns `start:stop` of `current` `(columns, rows)` one by one, and updates the columns after each.

                start   lazy block    stop
        frozen    |  · · · i | → → → → | → → → → later groups
                     inside the block: when its turn comes; to the right of it: once a block, in one product

    A column of `current` is not replaced by its rounded values: GPTAQ's shift needs what it was when its turn came.
    """
    codes = torch.empty(stop - start, current.shape[1], dtype=torch.uint8, device=current.device)
    scale = fitted.column_scale
    for left in range(start, stop, LAZY_COLUMNS):
        right = min(left + LAZY_COLUMNS, stop)
        block, later, errors = current[left:right], current[right:], torch.empty_like(current[left:right])
        spread = factor[left:right, left:] / factor.diagonal()[left:right, None]
        shift = None
        if deviation is not None:
            # row i: w_i's deviation D[i, >i], fitted by the columns after it: D[i, >i] H_{>i,>i}⁻¹
            rest = factor[left:, left:]
            shift = torch.triu(deviation[left:right, left:] @ rest.T, diagonal=1) @ rest
        for i, column in enumerate(block):
            column.addmv_(errors[:i].T, spread[:i, i], alpha=-1)
            if shift is not None:
                column.addmv_(block[:i].T, shift[:i, i])
            code, value = fitted.quantize(column, None if scale is None else scale[left - start + i])
            codes[left - start + i] = code
            torch.sub(column, value, out=errors[i])
        later.addmm_(spread[:, len(block) :].T, errors, alpha=-1)
        if shift is not None:
            later.addmm_(shift[:, len(block) :].T, block)
    return codes
