"""
Matrices that a family keeps as something else than a linear layer, made linears for as long as a model is quantized.

These are the `Conv1D` layers of GPT-2, whose weight is transposed, and experts in 3-D parameters, see `experts`.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import D2QuantConfig
from .experts import LINEARS, ExpertLinears, expert_parameters, find_layout, join_experts, split_experts
from .names import is_listed
from .recording import evaluation_mode, record_calls
from .topology import find_blocks


def make_linears(model: PreTrainedModel, config: D2QuantConfig) -> Callable[[], None]:
    """
    Makes linears of all other matrices in the decoder blocks, but for those that `config` excludes.

    Args:
        model ([`~transformers.PreTrainedModel`]): In full precision, with its weights; changed in place. Its linears
            share memory with what they replace.
        config ([`D2QuantConfig`]): What to leave as it is.

    Returns:
        `Callable`: puts back what was replaced, as long as no weight has changed.
    """
    with ExitStack() as stack:  # an error on the way puts back what was replaced before it
        stack.callback(_announce(model))
        for parent, name, conv in _convolutions(model, config):
            setattr(parent, name, _linear_of(conv))
            stack.callback(setattr, parent, name, conv)
        for module, layouts in _layouts(model, config).items():
            stack.callback(split_experts(module, layouts))
        undo = stack.pop_all()
    return undo.close


def make_listed_linears(model: PreTrainedModel, config: D2QuantConfig) -> None:
    """The same for a model on the meta device, into which a checkpoint of `config` will be loaded."""
    for parent, name, conv in _convolutions(model, config):
        setattr(parent, name, _linear_of(conv))
    listed = config.expert_parameters or {}
    blocks_name, blocks = find_blocks(model)
    for name, module, names in expert_parameters(blocks):
        full_names = {key: f"{blocks_name}.{name}.{key}" for key in names}
        found = {k: [listed[end] for end in listed if is_listed(n, [end])] for k, n in full_names.items()}
        layouts = {key: values[0] for key, values in found.items() if values}
        if layouts:
            split_experts(module, layouts)


def find_expert_parameters(model: PreTrainedModel) -> dict[str, bool]:
    """Names of the 3-D parameters that are linears now, as they were in the model, and whether they are transposed."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinears):
            parent, _, key = name.rpartition(".")
            found[f"{parent.removesuffix(LINEARS)}{key}"] = module.transposed
    return found


def unmake_linears(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """
    Puts back the kinds of matrices that a family has, as far as linears are dense.

    Args:
        model ([`~transformers.PreTrainedModel`]): Dense again; changed in place.
        plain ([`~transformers.PreTrainedModel`]): A model of its configuration, which may be on the meta device.
    """
    kinds: dict[str, Any] = dict(plain.named_modules())
    for name, module in list(model.named_modules()):
        if _is_split(module):
            join_experts(module, getattr(kinds[name], "config", None))
        elif isinstance(kinds.get(name), Conv1D) and type(module) is nn.Linear:
            model.set_submodule(name, _convolution_of(module))


def _is_split(module: nn.Module) -> bool:
    linears = getattr(module, LINEARS, None)
    return isinstance(linears, nn.ModuleDict) and any(isinstance(each, ExpertLinears) for each in linears.values())


def _announce(model: PreTrainedModel) -> Callable[[], None]:
    """
    Tells the code of a family that its model is quantized, as transformers does when it has loaded one. Some then call
    layers by whose weight they multiply otherwise. Returns what takes it back.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    told = [config for config in configs if not hasattr(config, "_is_quantized")]
    for config in told:
        config._is_quantized = True

    def undo() -> None:
        for config in told:
            del config._is_quantized

    return undo


def _layouts(model: PreTrainedModel, config: D2QuantConfig) -> dict[nn.Module, dict[str, bool]]:
    """Modules with experts, the names of their 3-D parameters, and whether these are transposed."""
    blocks_name, blocks = find_blocks(model)
    wanted = {
        module: [key for key in names if not config.skips(f"{blocks_name}.{name}.{key}")]
        for name, module, names in expert_parameters(blocks)
    }
    if not any(wanted.values()):
        return {}
    weight = model.get_input_embeddings().weight
    input_ids = torch.arange(4, device=weight.device)[None] % len(weight)
    layouts = {}
    with evaluation_mode(model), torch.no_grad():
        for call in record_calls(blocks, lambda: model(input_ids=input_ids, use_cache=False)):
            names = wanted.pop(call.module, [])
            transposed = find_layout(call.module, names, call) if names else None
            if transposed is not None:
                layouts[call.module] = dict.fromkeys(names, transposed)
    return layouts


def _convolutions(model: PreTrainedModel, config: D2QuantConfig) -> list[tuple[nn.Module, str, Any]]:
    blocks_name, blocks = find_blocks(model)
    found = []
    for name, module in blocks.named_modules():
        if isinstance(module, Conv1D) and not config.skips(f"{blocks_name}.{name}"):
            parent, _, key = name.rpartition(".")
            found.append((blocks.get_submodule(parent), key, module))
    return found


def _linear_of(conv: Any) -> nn.Linear:
    linear = nn.Linear(conv.nx, conv.nf, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().T, requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias
    return linear.train(conv.training)


def _convolution_of(linear: nn.Linear) -> nn.Module:
    with torch.device("meta"):
        conv: nn.Module = Conv1D(linear.out_features, linear.in_features)
    weight = linear.weight.detach().T.contiguous()
    conv.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    conv.train(linear.training)
    return conv
