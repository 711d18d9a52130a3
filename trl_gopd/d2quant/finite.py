"""Numbers that are not finite, found before they are stored or built upon."""

from collections.abc import Iterable

import torch
from torch import Tensor


def largest(tensor: Tensor) -> float:
    """Largest magnitude of a floating-point tensor. 0 of no numbers; NaN or infinite if one of the numbers is."""
    if not tensor.numel():
        return 0.0
    low, high = tensor.detach().aminmax()  # without a copy, which `isfinite` makes
    return float(torch.stack((-low, high)).max())


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    return not tensor.is_floating_point() or largest(tensor) < float("inf")  # a comparison with NaN is false


def check_finite(tensors: Iterable[tuple[str, Tensor]], remedy: str) -> None:
    """Raises a `ValueError` that names the first of `tensors` with a NaN or an infinity, and ends in `remedy`."""
    for name, tensor in tensors:
        if not tensor.is_meta and not is_finite(tensor):
            raise ValueError(f"`{name}` holds NaN or infinity, in {tensor.dtype}. {remedy}")
