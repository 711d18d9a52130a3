"""
Group-wise codebooks below four bits: affine, mid-rise and bit-plane, each with an optional scale per column.

A group is `group_size` consecutive columns of a weight `(out_features, in_features)`; the last one may be shorter. In
each (row, group) a weight is rebuilt from a code `q` of `bits` bits:

- affine: `s·(q − z)`, with an integer zero point `z` in `[0, 2^bits)`;
- mid-rise: `s·(q − (2^bits − 1)/2)`, symmetric, without a level at zero and without anything to store for it;
- bit-plane: `Σ_k r_k·(2·q_k − 1)`, `q_k` the k-th bit of `q`: the codebook of the authors' release.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


Grid = Literal["affine", "midrise", "bitplane"]
GRIDS: tuple[Grid, ...] = ("affine", "midrise", "bitplane")


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
            return self.scales[0][:, group] * (codes - self.zero_points.to(codes.dtype)[:, group])
        if self.grid == "midrise":
            return self.scales[0][:, group] * (codes - (2**self.bits - 1) / 2)
        planes = (self.codes.int() >> torch.arange(self.bits, device=self.codes.device)[:, None, None]) & 1
        return (self.scales[:, :, group] * (2 * planes - 1).to(self.scales.dtype)).sum(0)
