"""Packed linears in the place of dense ones."""

from typing import Any

from torch import Tensor, nn

from .config import D2QuantConfig
from .grids import Grid, QuantizedWeight
from .linear import D2QuantLinear


def empty_packed(
    linear: nn.Linear, config: D2QuantConfig, *, grid: Grid, bias: bool, input_scale: bool
) -> D2QuantLinear:
    """
    A packed linear of the shape, dtype and device of `linear`, whose tensors are yet to be loaded.

    Args:
        linear (`torch.nn.Linear`): The dense one; its weight may be on the meta device.
        config ([`D2QuantConfig`]): Bits, group size and dtype of the scales.
        grid (`str`): Codebook of this linear.
        bias (`bool`): Whether it has a bias, which DAC may have added.
        input_scale (`bool`): Whether its inputs are scaled.
    """
    return D2QuantLinear(
        linear.in_features,
        linear.out_features,
        bits=config.bits,
        group_size=config.group_size_of(linear.in_features),
        grid=grid,
        bias=bias,
        input_scale=input_scale,
        scale_dtype=config.torch_scale_dtype,
        dtype=linear.weight.dtype,
        device=linear.weight.device,
    )


def pack_linear(
    linear: nn.Linear, weight: QuantizedWeight, config: D2QuantConfig, *, input_scale: Tensor | None
) -> D2QuantLinear:
    """A packed linear with the codes of `weight`, and the bias of `linear`."""
    return D2QuantLinear.from_quantized(
        weight,
        bias=None if linear.bias is None else linear.bias.detach(),
        input_scale=input_scale,
        scale_dtype=config.torch_scale_dtype,
        dtype=linear.weight.dtype,
    )


def replace_module(parent: nn.Module, name: str, packed: nn.Module) -> None:
    """Puts `packed` in the place of the module called `name` in `parent`, in its mode, with the hook of accelerate."""
    dense: Any = parent.get_submodule(name)
    if hasattr(dense, "_hf_hook"):  # by which accelerate moves inputs, and weights, of this very module
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(packed, dense._hf_hook)
    parent.set_submodule(name, packed.train(dense.training))
