"""
Which tensors go from block to block in a decoder, tried with passes of four tokens.

Blocks are quantized one at a time: they are run by themselves, on hidden states that the model's own forward pass has
not seen. That is right if a block depends on the blocks before it by nothing but hidden states, and if nothing changes
these on their way. Where it is not, a model is refused: its statistics would be wrong, and no error would say so.
"""

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_gopd.d2quant.recording import evaluation_mode, first_tensor, is_close, noise_like
from trl_gopd.d2quant.topology import Topology, find_blocks
from trl_gopd.evaluation.logits import OutputHead, backbone


# Positional and keyword arguments of a block, without the hidden states.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class BlockPass:
    """
    What a block was given and has returned in one forward pass.

    Args:
        hidden (`torch.Tensor`): hidden states, as it was given them.
        arguments (`Arguments`): its other arguments. Containers are copies: a block may change those it is given.
        output (`Any`): what it has returned.
    """

    hidden: Tensor
    arguments: Arguments
    output: Any = None


def record_blocks(model: PreTrainedModel, blocks: Mapping[str, nn.Module], input_ids: Tensor) -> dict[str, BlockPass]:
    """
    Runs the backbone of a model and records its blocks. Those that it does not call are missing.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model.
        blocks (`Mapping[str, torch.nn.Module]`): its decoder blocks, by name.
        input_ids (`torch.Tensor`): `(1, tokens)` on its device.

    Raises:
        `ValueError`: if it calls a block more than once, or without hidden states `(1, tokens, hidden_size)`.
    """
    passes: dict[str, BlockPass] = {}

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != input_ids.shape:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise refusal(
                model, f"`{name}` must be given hidden states (1, tokens, hidden_size), and is given {shape}"
            )
        if name in passes:
            raise refusal(model, f"`{name}` must run once in a forward pass, and runs more often")
        others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        passes[name] = BlockPass(hidden, copied((args[1:], others)))

    def after(name: str, output: Any) -> None:
        passes[name].output = output

    with ExitStack() as hooks:
        for name, block in blocks.items():
            enter = block.register_forward_pre_hook(lambda m, a, k, n=name: before(n, a, k), with_kwargs=True)
            leave = block.register_forward_hook(lambda m, a, output, n=name: after(n, output))
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        _backbone(model)(input_ids=input_ids, use_cache=False)
    return passes


def check_flow(model: PreTrainedModel) -> None:
    """
    Refuses a model whose blocks cannot be run one after another by themselves.

    Args:
        model ([`~transformers.PreTrainedModel`]): With its weights. It is not changed.

    Raises:
        `ValueError`: if two blocks share a parameter, something changes the hidden states between two blocks, a block
        depends on earlier blocks by another argument, or it returns something else when it runs by itself.
    """
    name, modules = find_blocks(model)
    blocks = {f"{name}.{index}": module for index, module in enumerate(modules)}
    _check_parameters(model, blocks)
    input_ids = _input_ids(model)
    with evaluation_mode(model), torch.no_grad():
        passes = record_blocks(model, blocks, input_ids)
        if not passes:
            raise refusal(model, f"the blocks of `{name}` must run in a forward pass, and none does")
        order = list(passes)
        if order != [block for block in blocks if block in passes]:
            raise refusal(model, f"the blocks of `{name}` must run in the order of the list, and do not")
        for one, other in zip(order, order[1:], strict=False):
            if not _same(first_tensor(passes[one].output), passes[other].hidden):
                raise refusal(model, f"`{other}` must be given what `{one}` returns, and something changes it between")
        for block in order:
            args, kwargs = copied(passes[block].arguments)
            alone = first_tensor(blocks[block](passes[block].hidden, *args, **kwargs))
            if not _same(alone, first_tensor(passes[block].output)):
                raise refusal(model, f"`{block}` must return the same when it runs by itself, and does not")
        handle = blocks[order[0]].register_forward_pre_hook(_with_noise, with_kwargs=True)
        try:
            moved = record_blocks(model, blocks, input_ids)
        finally:
            handle.remove()
    for block in order:
        path = _difference(passes[block].arguments[1], moved[block].arguments[1])
        path = path or _difference(passes[block].arguments[0], moved[block].arguments[0])
        if path is not None:
            raise refusal(
                model,
                f"`{block}` must depend on earlier blocks by hidden states alone, and what they compute is also in "
                f"its argument {path}",
            )


@torch.no_grad()
def check_head(model: PreTrainedModel, topology: Topology) -> None:
    """
    Refuses a model whose logits cannot be computed from what leaves the last block: the tuning does so.

    Args:
        model ([`~transformers.PreTrainedModel`]): With its weights. It is not changed.
        topology ([`~trl_gopd.d2quant.topology.Topology`]): Of `model`.

    Raises:
        `ValueError`: if the final norm of the last block's output is not what the backbone returns, or the logits of
        it are not those of the model.
    """
    remedy = "Leave the tuning out with `tune_epochs=0`"
    last, input_ids = topology.blocks[-1], _input_ids(model)
    with evaluation_mode(model):
        recorded = record_blocks(model, {last.name: last.module}, input_ids)[last.name]
        hidden: Any = first_tensor(recorded.output)
        norm = nn.Identity() if topology.final_norm is None else model.get_submodule(topology.final_norm)
        hidden = norm(hidden)
        if not _same(hidden, _backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state):
            reason = "its backbone does more behind the last block than " + (
                f"`{topology.final_norm.rpartition('.')[2]}` alone" if topology.final_norm else "nothing"
            )
            raise refusal(model, reason, remedy)
        if topology.lm_head is not None:
            expected = model(input_ids=input_ids, use_cache=False).logits[:, 1:3]
            given = OutputHead(model)(hidden[:, 1:3])
            if not is_close(given, expected):
                raise refusal(
                    model, "the logits of a token must depend on its last hidden states alone, and do not", remedy
                )


def refusal(model: PreTrainedModel, reason: str, remedy: str = "Pass a model of another family") -> ValueError:
    """The error for a family that cannot be quantized."""
    return ValueError(f"{type(model).__name__} (`{model.config.model_type}`) cannot be quantized: {reason}. {remedy}.")


def copied(value: Any) -> Any:
    """`value` with new dictionaries, lists and tuples, and the same tensors in them."""
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)
        mapping.update({key: copied(part) for key, part in value.items()})
        return mapping
    if type(value) in (list, tuple):
        return type(value)(copied(part) for part in value)
    return value


def _check_parameters(model: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for block, module in blocks.items():
        for name, parameter in module.named_parameters():
            other = owners.setdefault(id(parameter), block)
            if other != block:
                raise refusal(model, f"blocks must not share parameters, and `{block}` shares `{name}` with `{other}`")


def _input_ids(model: PreTrainedModel) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return torch.arange(4, device=weight.device)[None] % len(weight)


def _backbone(model: PreTrainedModel) -> Any:
    """The backbone, without a head that would compute logits for nothing; a base model is its own."""
    try:
        return backbone(model)
    except TypeError:
        return model


def _with_noise(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0] + noise_like(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"] + noise_like(kwargs["hidden_states"])}


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors have the same bits; NaN is not another number, it is noticed where it can be named."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape):
        return False
    return (
        torch.equal(one, other)
        or torch.equal(one.isnan(), other.isnan())
        and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


def _difference(one: Any, other: Any, path: str = "") -> str | None:
    """Where two arguments differ, as `shared_kv_states.0`; `None` if they are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return None if _same(one, other) else f"`{path}`"
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        pairs: Iterable[tuple[Any, Any, Any]] = ((k, one.get(k), other.get(k)) for k in one.keys() | other.keys())
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = ((index, *parts) for index, parts in enumerate(zip(one, other, strict=True)))
    else:
        return None if type(one) is type(other) else f"`{path}`"
    found = (_difference(a, b, f"{path}.{key}".lstrip(".")) for key, a, b in pairs)
    return next((path for path in found if path is not None), None)
