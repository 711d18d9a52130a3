"""What cannot be quantized is refused before anything is changed."""

import math
from collections.abc import Collection
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from trl_gopd.d2quant.as_linears import make_linears
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.finite import check_finite, largest
from trl_gopd.d2quant.flow import check_flow, check_head
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.names import check_entries
from trl_gopd.d2quant.rotation import rotated_magnitudes
from trl_gopd.d2quant.stages import linears_to_quantize
from trl_gopd.d2quant.token_matrices import chosen_token_matrices
from trl_gopd.d2quant.topology import Topology, find_topology


def check_model(model: PreTrainedModel, config: D2QuantConfig, undo: ExitStack) -> Topology:
    """
    Refuses a model, or a combination of it with `config`, that cannot be quantized.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. Its matrices become linears, see `as_linears`; weights stay as they are.
        config ([`D2QuantConfig`]): How to quantize it.
        undo (`contextlib.ExitStack`): Is given what makes the model what it was.

    Returns:
        [`~trl_gopd.d2quant.topology.Topology`]: of the model.

    Raises:
        `TypeError`, `ValueError`: if the model is not one, or is quantized or not in memory, if an entry of
        `modules_to_not_convert` is no module of it, if its family cannot be quantized block by block or its head
        cannot be tuned, if no linear is left to quantize or one is narrower than a group, if a number is not finite,
        if scales vanish or overflow in `scale_dtype`, or if it cannot be rotated.
    """
    if any(isinstance(module, D2QuantLinear) for module in model.modules()) or getattr(model, "is_quantized", False):
        raise ValueError(
            "`model` must be in full precision, and it is quantized already. Load the original, or call "
            "`model.dequantize()` first."
        )
    if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values()):
        raise ValueError(
            "`model` must be in memory, and some of its weights are on the meta device: not loaded, or offloaded. "
            "Load it without `device_map='disk'` and with enough memory."
        )
    check_entries(config.modules_to_not_convert, model)
    undo.callback(make_linears(model, config))
    check_flow(model)
    topology = find_topology(model)
    if config.tune_epochs:
        check_head(model, topology)
    linears = [
        (block, name) for block in topology.blocks for stage in linears_to_quantize(block, config) for name in stage
    ]
    if not linears:
        raise ValueError(
            f"`modules_to_not_convert` {config.modules_to_not_convert} leaves no linear layer to quantize. Shorten it."
        )
    for block, name in linears:
        width = block.linear(name).in_features
        if config.group_size > width:
            raise ValueError(
                f"`group_size` must be at most the width of every quantized linear, got {config.group_size} and "
                f"`{block.name}.{name}` with {width} inputs. Use {width} or less, -1 for one group a row, or name it "
                "in `modules_to_not_convert`."
            )
    check_finite(model.state_dict().items(), "Is the checkpoint whole, and in range of its dtype?")
    for block, name in linears:
        _check_scales(f"{block.name}.{name}", largest(block.linear(name).weight), config, config.bits)
    if config.embedding_bits is not None:
        for name, matrix in chosen_token_matrices(model, config).items():
            _check_scales(name, largest(matrix.weight), config, config.embedding_bits)
    if config.rotation is not None:
        _check_rotation(model, topology, {f"{block.name}.{name}" for block, name in linears}, config)
    return topology


def _check_rotation(
    model: PreTrainedModel, topology: Topology, linears: Collection[str], config: D2QuantConfig
) -> None:
    """Refuses a rotation that would not be exact, or after which a number is not finite or scales are lost."""
    hidden_size = model.get_input_embeddings().weight.shape[1]
    if config.rotation_size is not None and hidden_size % config.rotation_size:
        raise ValueError(
            f"`group_size` must divide the hidden size {hidden_size} with `rotation='group'`, got "
            f"{config.rotation_size}. Use {math.gcd(hidden_size, config.rotation_size)}, `rotation='full'`, or "
            "`rotation=None`."
        )
    for name, magnitude in rotated_magnitudes(model, topology, size=config.rotation_size, seed=config.seed):
        if not magnitude < math.inf:  # a comparison with NaN is false
            raise ValueError(
                f"`{name}` would hold NaN or infinity, in {model.get_parameter(name).dtype}, after `rotation`. Load "
                "the model in bfloat16 or float32, or use `rotation=None`."
            )
        linear = name.removesuffix(".weight")
        if linear in linears:
            _check_scales(linear, magnitude, config, config.bits)


def _check_scales(name: str, magnitude: float, config: D2QuantConfig, bits: int) -> None:
    """Refuses a matrix with weights up to `magnitude` if its scales vanish or overflow in `config.scale_dtype`."""
    info = torch.finfo(config.torch_scale_dtype)
    # Below this, a scale has fewer bits than the codes that it multiplies. It is computed in float32.
    lowest = 2**bits * max(info.smallest_normal * info.eps, torch.finfo(torch.float32).tiny)
    scale = 2 * magnitude / (2**bits - 1)  # of a group that reaches from minus to plus `magnitude`
    if magnitude and not lowest <= scale <= info.max:
        raise ValueError(
            f"`scale_dtype` must hold the scales of all packed weights, got {config.scale_dtype!r} and `{name}` with "
            f"weights up to {magnitude:.3g}. Use 'bfloat16' or 'float32', or name it in `modules_to_not_convert`."
        )
