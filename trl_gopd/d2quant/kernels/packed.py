"""A packed weight, as the kernels take it."""

from typing import NamedTuple

from torch import Tensor

from ..grids import Grid


class Packed(NamedTuple):
    """The tensors of a `D2QuantLinear`, and how to read them."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    in_features: int
    bits: int
    group_size: int
    grid: Grid
