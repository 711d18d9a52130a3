"""What cannot be quantized is refused before anything is changed."""

from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from trl_gopd.d2quant.as_linears import make_linears
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.finite import check_finite, largest
from trl_gopd.d2quant.flow import check_flow, check_head
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.stages import linears_to_quantize
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
        `TypeError`, `ValueError`: if the model is not one, or is quantized or not in memory, if its family cannot be
        quantized block by block or its head cannot be tuned, if no linear is left to quantize or one is narrower than
        a group, or as [`check_numbers`] does.
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
                f"`{block.name}.{name}` with {width} inputs. Use {width} or less, or name it in "
                "`modules_to_not_convert`."
            )
    check_numbers(model, topology, config)
    return topology


def check_numbers(model: PreTrainedModel, topology: Topology, config: D2QuantConfig) -> None:
    """
    Refuses a model of which a number is not finite, in blocks or elsewhere, or of which a linear is so small or so
    large that its scales vanish or overflow in `config.scale_dtype`.
    """
    check_finite(model.state_dict().items(), "Is the checkpoint whole, and in range of its dtype?")
    info = torch.finfo(config.torch_scale_dtype)
    # Below this, a scale has fewer bits than the codes that it multiplies. It is computed in float32.
    lowest = 2**config.bits * max(info.smallest_normal * info.eps, torch.finfo(torch.float32).tiny)
    for block in topology.blocks:
        for name in (name for stage in linears_to_quantize(block, config) for name in stage):
            magnitude = largest(block.linear(name).weight)
            scale = 2 * magnitude / (2**config.bits - 1)  # of a group that reaches from minus to plus `magnitude`
            if magnitude and not lowest <= scale <= info.max:
                raise ValueError(
                    f"`scale_dtype` must hold the scales of all linears, got {config.scale_dtype!r} and "
                    f"`{block.name}.{name}` with weights up to {magnitude:.3g}. Use 'bfloat16' or 'float32', or name "
                    "it in `modules_to_not_convert`."
                )
