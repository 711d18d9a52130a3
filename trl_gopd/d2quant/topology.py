"""
Topology of a decoder: which linears read the same tensor, and which scales and shifts can be moved between modules.

Nothing is looked up by model type. One forward pass of four tokens, with hooks, shows the order of the linears and
which tensor each of them reads. Each exact transform is then tried on the block, and accepted only if the block's
output stays the same in every bit. A family that is not known yet is therefore either described correctly, or
described without the transform, together with the reason.

A block has two parts: modules whose class is named `…Attention…`, as transformers names all of them, and the rest,
which is its MLP.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .exact_transforms import ScalePair, find_expert_pairs, find_residual_writers, find_scale_pairs, shift_passes
from .experts import LINEARS, ExpertLinears
from .recording import Call, evaluation_mode, noise_like, record_calls


@dataclass(frozen=True)
class Stage:
    """
    Linears that read the same tensor, and so share a Hessian; or the linears that do the same in all experts.
    Quantizing them changes the input of later stages only.

    Args:
        linears (`tuple[str, ...]`): names relative to the block, in order of execution.
    """

    linears: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """
    A decoder layer. All names are relative to it.

    Args:
        name (`str`): of the block in its model, as `model.layers.3`.
        module (`torch.nn.Module`): the block itself.
        stages (`tuple[Stage, ...]`): all linears to quantize, in order of execution; experts come last.
        routed (`frozenset[str]`): linears of experts, which read the tokens that a router sends them.
        scale_pairs (`tuple[ScalePair, ...]`): where a column scale costs nothing, one for each `down_proj` of a GLU.
        scale_reasons (`Mapping[str, str]`): the other second layers of an MLP, whose column scale must stay an input
            scale, and why.
        attention_norm (`str`, *optional*): norm that the first attention linears read.
        mlp_norm (`str`, *optional*): norm that the first MLP linears read.
        shift_linears (`tuple[str, ...]`): all that reads `mlp_norm`, if these are linears: a shift `μ` of its output
            is `weight @ μ` in their biases. Empty if deviation-aware correction has no site here.
        shift_reason (`str`, *optional*): why it has none.
        norms (`tuple[str, ...]`): all norms outside attention, in order of execution.
        norm_readers (`Mapping[str, tuple[str, ...]]`): linears that read a norm, for norms that nothing else reads.
        residual_writers (`tuple[str, ...]`): linears that alone change the residual stream, each by adding a multiple
            of its output. Empty if something else changes it, or stands between, as the norms of a sandwich do.
        full_precision (`Mapping[str, str]`): matrices that are not quantized, and why: routers, convolutions. Names of
            parameters.
    """

    name: str
    module: nn.Module = field(repr=False)
    stages: tuple[Stage, ...]
    routed: frozenset[str]
    scale_pairs: tuple[ScalePair, ...]
    scale_reasons: Mapping[str, str]
    attention_norm: str | None
    mlp_norm: str | None
    shift_linears: tuple[str, ...]
    shift_reason: str | None
    norms: tuple[str, ...]
    norm_readers: Mapping[str, tuple[str, ...]]
    residual_writers: tuple[str, ...]
    full_precision: Mapping[str, str]

    def linear(self, name: str) -> nn.Linear:
        """The linear of that name, dense or packed."""
        linear = self.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear


@dataclass(frozen=True, eq=False)
class Topology:
    """
    A decoder, by the names of its modules.

    Args:
        blocks_name (`str`): of the list of blocks, as `model.layers`.
        blocks (`tuple[Block, ...]`): in order of execution.
        embeddings (`str`): token embeddings.
        final_norm (`str`, *optional*): norm after the last block; some decoders have none.
        lm_head (`str`, *optional*): `None` for a base model.
        full_precision (`Mapping[str, str]`): matrices of blocks that do not run, and why they are not quantized.
    """

    blocks_name: str
    blocks: tuple[Block, ...]
    embeddings: str
    final_norm: str | None
    lm_head: str | None
    full_precision: Mapping[str, str]


def find_topology(model: PreTrainedModel) -> Topology:
    """
    Topology of a decoder, found with a few forward passes of four tokens. Weights, modes and random states are as
    before when it returns.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            From `AutoModelForCausalLM` or `AutoModel`, weights loaded, not quantized.

    Returns:
        [`Topology`]: names and reasons; `Block.module` aliases the blocks of `model`.

    Raises:
        `TypeError`: if `model` is not a [`~transformers.PreTrainedModel`].
        `ValueError`: if it has no list of decoder blocks, no `torch.nn.Linear` in them, or no weights yet.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from trl_gopd.d2quant.topology import find_topology

    >>> config = LlamaConfig(
    ...     vocab_size=8, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
    ... )
    >>> block = find_topology(LlamaForCausalLM(config)).blocks[0]
    >>> [stage.linears[0] for stage in block.stages]
    ['self_attn.q_proj', 'self_attn.o_proj', 'mlp.gate_proj', 'mlp.down_proj']
    >>> block.scale_pairs
    (ScalePair(producer='mlp.up_proj', consumer='mlp.down_proj', rows=slice(0, 16, None)),)

    ```
    """
    blocks_name, modules = find_blocks(model)
    embeddings = model.get_input_embeddings()
    if embeddings.weight.is_meta:
        raise ValueError("`model` must hold its weights, got them on the meta device. Load them: it has to run.")
    names = {module: name for name, module in model.named_modules()}
    input_ids = torch.arange(4, device=embeddings.weight.device)[None] % embeddings.weight.shape[0]
    with evaluation_mode(model), torch.no_grad():
        calls = record_calls(model, lambda: model(input_ids=input_ids, use_cache=False))
        running = {call.module for call in calls}
        blocks = tuple(_describe_block(names[module], module, calls) for module in modules if module in running)
    last_block = max(index for index, call in enumerate(calls) if call.name == blocks[-1].name)
    norms = [call.name for call in calls[last_block:] if _is_norm(call.module)]
    return Topology(
        blocks_name=blocks_name,
        blocks=blocks,
        embeddings=names[embeddings],
        final_norm=norms[-1] if norms else None,
        lm_head=names.get(model.get_output_embeddings()),
        full_precision={
            f"{names[module]}.{name}": "its block does not run in a forward pass of text"
            for module in modules
            if module not in running
            for name, parameter in module.named_parameters()
            if parameter.ndim > 1
        },
    )


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """
    Name and list of the decoder blocks. Runs nothing, so weights may be on the meta device.

    Raises:
        `TypeError`: if `model` is not a [`~transformers.PreTrainedModel`].
        `ValueError`: if it has no list of decoder blocks, or no `torch.nn.Linear` in them.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a `PreTrainedModel`, got {type(model).__name__}. Load it with `AutoModelForCausalLM`; "
            "merge an adapter first, with `merge_and_unload()`."
        )
    kind = type(model).__name__
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder()  # the part of a model with images or sound that reads text
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers and module in set(decoder.modules())
    }
    if model.config.is_encoder_decoder or not lists:
        raise ValueError(
            f"`model` must be a decoder with a `ModuleList` of its blocks, got {kind}"
            + (", an encoder-decoder." if model.config.is_encoder_decoder else f" without one of {layers}.")
            + " Pass a decoder-only language model."
        )
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    if not any(isinstance(module, (nn.Linear, Conv1D)) for module in lists[name].modules()):
        modules = lists[name].modules()
        owners = {type(m).__name__ for m in modules if any(p.ndim > 1 for p in m.parameters(recurse=False))}
        raise ValueError(
            f"`model` must have `torch.nn.Linear` layers in its blocks, got {kind} with the matrices of `{name}` in "
            f"{' and '.join(sorted(owners)) or 'none'}. Pass a model of another family, not quantized yet."
        )
    return name, lists[name]


def _describe_block(name: str, block: nn.Module, calls: list[Call]) -> Block:
    call = next(call for call in calls if call.name == name)
    own = {"": call} | {c.name.removeprefix(f"{name}."): c for c in calls if c.name.startswith(f"{name}.")}
    experts, gates = _experts(block), _expert_gates(block)
    split = _split_experts(block, own)
    routed = frozenset([*experts, *(n for names in split for n in names)])
    linears = {n: c for n, c in own.items() if isinstance(c.module, nn.Linear) and n not in routed}
    attention = [n for n in linears if _is_in_attention(block, n)]
    mlp = {n: c for n, c in linears.items() if n not in attention}
    norms = {n: c for n, c in own.items() if _is_norm(c.module)}
    readers = {n: tuple(k for k, c in linears.items() if c.reads == norm.writes) for n, norm in norms.items()}
    norm_of = {linear: n for n, found in readers.items() for linear in found}
    attention_norm = next((norm_of.get(n) for n in attention), None)
    mlp_norm = next((norm_of.get(n) for n in mlp), None)
    norm_readers = {n: found for n, found in readers.items() if found and shift_passes(own, n, found)}

    shift_reason = None
    if _expert_counts(block):
        shift_reason = "the router of its experts reads the norm as well"
    elif not attention:
        shift_reason = "it has no attention whose error could be corrected"
    elif mlp_norm is None:
        shift_reason = "no norm stands right before its MLP"
    elif attention_norm is not None and norms[mlp_norm].reads == norms[attention_norm].reads:
        shift_reason = "its MLP runs parallel to attention, and does not read what attention adds"
    elif mlp_norm not in norm_readers:
        shift_reason = f"`{mlp_norm}` is read by more than linears"

    for parent in dict.fromkeys(n.rpartition(".")[0] for n in experts):
        own |= _run_expert(parent, block.get_submodule(parent))
    mlp |= {n: own[n] for n in experts if n in own}
    stages = _stages({n: c for n, c in (linears | mlp).items() if n not in gates})
    stages += tuple(Stage(names) for names in split)
    scale_pairs, scale_reasons = find_scale_pairs(own, mlp)
    for producers, consumers in zip(split, split[1:], strict=False):
        pairs, reasons = find_expert_pairs(own, producers, consumers)
        scale_pairs, scale_reasons = scale_pairs + pairs, scale_reasons | reasons
    return Block(
        name=name,
        module=block,
        stages=stages,
        routed=routed,
        scale_pairs=scale_pairs,
        scale_reasons=scale_reasons,
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        shift_linears=norm_readers[mlp_norm] if mlp_norm is not None and shift_reason is None else (),
        shift_reason=shift_reason,
        norms=tuple(n for n in norms if not _is_in_attention(block, n)),
        norm_readers=norm_readers,
        residual_writers=find_residual_writers(own, linears),
        full_precision=_full_precision(block, stages, gates),
    )


def _run_expert(name: str, expert: nn.Module) -> dict[str, Call]:
    """Calls in an expert that is run on its own, because four tokens are not routed to all experts."""
    first = next(module for module in expert.modules() if isinstance(module, nn.Linear))
    tokens = noise_like(first.weight.new_empty(4, first.in_features))
    return {f"{name}.{call.name}".rstrip("."): call for call in record_calls(expert, lambda: expert(tokens))}


def _split_experts(block: nn.Module, calls: Mapping[str, Call]) -> list[tuple[str, ...]]:
    """Linears of experts that were one parameter, a list for each such parameter, in order of execution."""
    order = {name: index for index, name in enumerate(calls)}
    groups = [
        tuple(f"{name}.{expert}" for expert, _ in module.named_children())
        for name, module in block.named_modules()
        if isinstance(module, ExpertLinears)
    ]
    parents = {names: names[0].rsplit(".", 3)[0] for names in groups}  # without `linears`, parameter and expert
    first = {names: min((order[n] for n in names if n in order), default=len(order)) for names in groups}
    return sorted(groups, key=lambda names: (order.get(parents[names], len(order)), first[names]))


def _stages(linears: Mapping[str, Call]) -> tuple[Stage, ...]:
    stages: dict[Any, tuple[str, ...]] = {}
    for name, call in linears.items():
        stages[call.reads] = (*stages.get(call.reads, ()), name)
    return tuple(Stage(names) for names in stages.values())


def _full_precision(block: nn.Module, stages: tuple[Stage, ...], gates: list[str]) -> dict[str, str]:
    quantized = {f"{linear}.weight" for stage in stages for linear in stage.linears}
    counts, reasons = _expert_counts(block), {}
    for name, parameter in block.named_parameters():
        parent = name.rpartition(".")[0]
        owner = block.get_submodule(parent)
        kind = f"{parameter.ndim}-D parameter of {type(owner).__name__}"
        if parameter.ndim < 2 or name in quantized:
            continue
        if parent in gates:
            reasons[name] = "it weighs experts, with few rows"
        elif isinstance(owner, nn.Linear):
            reasons[name] = "its layer is not called in a forward pass of text"
        elif parameter.ndim == 2 and hasattr(owner, LINEARS):
            reasons[name] = f"{kind}, a vector for each expert"
        elif parameter.ndim == 2 and parameter.shape[0] in counts:
            reasons[name] = f"{kind}, which weighs experts, with few rows"
        else:
            reasons[name] = f"{kind}, which is no `torch.nn.Linear`"
    return reasons


def _experts(block: nn.Module) -> list[str]:
    """Linears of the modules in lists inside the block."""
    lists = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, nn.ModuleList))
    parents = {name: f"{name.rpartition('.')[0]}." for name in _linears(block)}
    return [name for name, parent in parents.items() if parent.startswith(lists) and parent not in lists]


def _expert_gates(block: nn.Module) -> list[str]:
    """Linears outside attention with an output for each expert, or one for a shared expert: routers and gates."""
    counts = _expert_counts(block)
    if not counts:
        return []
    experts = {
        linear for holder in block.modules() if isinstance(holder, ExpertLinears) for linear in holder.children()
    }
    linears = ((name, block.get_submodule(name)) for name in _linears(block) if not _is_in_attention(block, name))
    return [n for n, linear in linears if linear.out_features in {1, *counts} and linear not in experts]


def _expert_counts(module: nn.Module) -> set[int]:
    """
    Numbers of experts in a module, which are modules with linears in a list, linears that were one parameter, or a
    parameter with a dimension for the expert.
    """
    counts = set()
    for child in module.modules():
        if isinstance(child, ExpertLinears) or isinstance(child, nn.ModuleList) and _experts(nn.ModuleList([child])):
            counts.add(len(child))
        elif "Conv" not in type(child).__name__:
            counts |= {parameter.shape[0] for parameter in child.parameters(recurse=False) if parameter.ndim > 2}
    return counts


def _is_in_attention(block: nn.Module, name: str) -> bool:
    parents = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)]
    return any("attention" in type(block.get_submodule(parent)).__name__.lower() for parent in parents)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
