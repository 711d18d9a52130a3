"""
Dense models from packed ones, which can be saved, and loaded without this package.

DAC may have given biases to linears that have none in their family. Many families have a place for them that a flag of
the configuration opens, such as `mlp_bias` of Llama: it is set, and the other linears behind it get biases of zeros.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from trl_gopd.d2quant.as_linears import unmake_linears
from trl_gopd.d2quant.embedding import D2QuantEmbedding
from trl_gopd.d2quant.linear import D2QuantLinear


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

WRAPPED = ".base_layer"  # what PEFT appends to the name of a linear with an adapter


def make_dense(
    model: "PreTrainedModel", packed: "dict[str, D2QuantLinear | D2QuantEmbedding]", dtype: torch.dtype | None
) -> None:
    """
    Replaces packed linears by dense ones that compute the same, in place.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The quantized model, all of it in memory. Its configuration is changed where biases need it.
        packed (`dict[str, D2QuantLinear | D2QuantEmbedding]`):
            Its packed linears and embeddings, by their names.
        dtype (`torch.dtype`, *optional*):
            Of all its parameters, except for adapters and for what transformers keeps in float32. By default that of
            dense linears is float32, and the others stay as they are.
    """
    with torch.device("meta"):
        family: Any = type(model)(model.config)
    for name, module in packed.items():
        if isinstance(module, D2QuantEmbedding):
            dense: nn.Module = module.to_dense(family.get_submodule(name.removesuffix(WRAPPED)), dtype)
        else:
            dense = module.to_dense(dtype)
        # Trainable, as after loading a dense checkpoint, except for the frozen base of an adapter.
        model.set_submodule(name, dense.requires_grad_(not name.endswith(WRAPPED)))
    unmake_linears(model, family)
    biased = {name for name, module in packed.items() if getattr(module, "bias", None) is not None}
    plain = _open_places(model, {name.removesuffix(WRAPPED) for name in biased})
    kept = {} if dtype is None else model._get_dtype_plan(dtype)
    for name, parameter in model.named_parameters():
        is_own = name.replace(f"{WRAPPED}.", ".") in plain
        if dtype is not None and is_own and parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def _open_places(model: "PreTrainedModel", biased: set[str]) -> set[str]:
    """
    Sets the flags of the configuration that give a place to the biases of the linears `biased`, and warns of those
    without. Returns the names of the parameters that a model of this configuration has.
    """
    plain = _parameter_names(model, {})
    config = model.config.get_text_config(decoder=True)
    for flag in [name for name, value in vars(config).items() if value is False and name.endswith("bias")]:
        missing = {f"{name}.bias" for name in biased} - plain
        if not missing:
            break
        opened = _parameter_names(model, {flag: True})
        added = {name: _owner(model, name) for name in opened - plain}
        # It must add nothing but biases of linears: anything else would have to be given values.
        if missing & added.keys() and plain <= opened and all(isinstance(m, nn.Linear) for m in added.values()):
            setattr(config, flag, True)
            for linear in added.values():
                if linear.bias is None:
                    linear.bias = nn.Parameter(
                        linear.weight.new_zeros(linear.out_features), linear.weight.requires_grad
                    )
            plain = opened
    without = sorted(name for name in biased if f"{name}.bias" not in plain)
    if without:
        logger.warning(
            f"{len(without)} linears of the dense model have a bias, such as `{without[0]}`, for which "
            f"{type(model).__name__} has no place: `from_pretrained` will drop them if it is saved. Save the "
            "quantized model instead."
        )
    return plain


def _parameter_names(model: "PreTrainedModel", flags: dict[str, bool]) -> set[str]:
    """Names of the parameters of a new model of the same configuration, but for `flags`."""
    config = copy.deepcopy(model.config)
    for flag, value in flags.items():
        setattr(config.get_text_config(decoder=True), flag, value)
    with torch.device("meta"):
        return {name for name, _ in type(model)(config).named_parameters(remove_duplicate=False)}


def _owner(model: nn.Module, parameter: str) -> Any:
    """The module of a parameter that a plain model has by this name, under its adapter if it has one; or `None`."""
    try:
        module = model.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:
        return None
    return getattr(module, "base_layer", module)
