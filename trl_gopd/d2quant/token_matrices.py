"""
The two matrices with a row for each token, the embedding and the head: which of them can be packed, and how they are.

At 8 bits, and where nothing but a look-up reads it, a matrix is rounded to nearest, since its rows are used alone. The
head multiplies hidden states: below 8 bits it is rounded with GPTQ, as the linears of the blocks are. A tied head
shares the packed tensors of the embedding, and the look-up adds a share of the identity to its Hessian.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import D2QuantConfig
from .convert import replace_module
from .embedding import D2QuantEmbedding, scale_of
from .grids import QuantizedWeight
from .linear import D2QuantLinear
from .rounding import round_weight


# hf_quantizer imports this file while transformers is being imported, see there.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_ROWS = 8192  # rounded at a time: a float32 copy of a whole matrix, and what its fit needs, would not fit
PROBED_TOKENS = 4
NEAREST_BITS = 8  # from which on rounding to nearest changes no perplexity beyond its noise
# Of the mean of the diagonal of H, what is added to it for the look-up of a tied matrix.
LOOK_UP_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class TokenMatrices:
    """
    What became of the embedding and the head.

    Args:
        packed (`tuple[str, ...]`): Names of those that are packed now.
        full_precision (`Mapping[str, str]`): Names of those that should be and cannot, and why.
        full_head (`torch.nn.Linear`, *optional*): The head as it was, if it is packed now.
    """

    packed: tuple[str, ...] = ()
    full_precision: Mapping[str, str] = field(default_factory=dict)
    full_head: nn.Linear | None = None


def token_matrices(model: "PreTrainedModel") -> dict[str, Any]:
    """The embedding and, if the model has one, the head, by name. Weights may be on the meta device."""
    names = {module: name for name, module in model.named_modules()}
    return {names[m]: m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m in names}


def chosen_token_matrices(model: "PreTrainedModel", config: D2QuantConfig) -> dict[str, Any]:
    """Those of [`token_matrices`] that `config` asks to pack. Where they are tied, these are both or none."""
    found = {} if config.embedding_bits is None else token_matrices(model)
    chosen = {name: module for name, module in found.items() if not config.skips(name)}
    return chosen if len(chosen) == len(found) or not is_tied(model) else {}


def is_tied(model: "PreTrainedModel") -> bool:
    """Whether embedding and head are one matrix."""
    matrices = token_matrices(model)
    if len(matrices) < 2:
        return False
    (embedding, first), (head, second) = matrices.items()
    if first.weight.is_meta:  # they are tied once they are loaded
        return bool(model.all_tied_weights_keys.get(f"{head}.weight") == f"{embedding}.weight")
    return bool(first.weight is second.weight)


@torch.no_grad()
def pack_token_matrices(
    model: "PreTrainedModel", config: D2QuantConfig, hessian: Tensor | None = None
) -> TokenMatrices:
    """
    Packs the embedding and the head of a model in place, as far as `config` asks for it and the model allows it.

    Args:
        model ([`~transformers.PreTrainedModel`]): In full precision, in memory, in evaluation mode.
        config ([`D2QuantConfig`]): `embedding_bits`, `group_size`, `scale_dtype` and what controls rounding are used.
        hessian (`torch.Tensor`, *optional*):
            float32 `(hidden_size, hidden_size)`, H of the head's inputs. Without it, the head is rounded to nearest.

    Raises:
        `ValueError`: if a scale is not finite in `scale_dtype`, or H is not positive definite.
    """
    of_look_up: Tensor | None = None
    if hessian is not None and is_tied(model):
        identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        of_look_up = hessian = hessian + LOOK_UP_SHARE * hessian.diagonal().mean() * identity
    found = chosen_token_matrices(model, config)
    reasons = {name: _obstacle(model, name, module, config) for name, module in found.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if refused and is_tied(model):
        return TokenMatrices(full_precision=dict.fromkeys(found, "; ".join(refused.values())))
    allowed = {name: module for name, module in found.items() if name not in refused}

    def pack(name: str, module: Any) -> D2QuantLinear:
        try:
            return D2QuantLinear.from_quantized(
                round_rows(module.weight, config, hessian if isinstance(module, nn.Linear) else of_look_up),
                bias=getattr(module, "bias", None),
                scale_dtype=config.torch_scale_dtype,
                dtype=module.weight.dtype,
            )
        except ValueError as error:
            raise ValueError(f"`{name}` cannot be packed: {error}") from error

    replace_token_matrices(model, allowed, pack)
    heads = [module for module in allowed.values() if isinstance(module, nn.Linear)]
    return TokenMatrices(tuple(allowed), refused, *heads)


def insert_empty_token_matrices(model: "PreTrainedModel", config: D2QuantConfig) -> list[str]:
    """Puts packed modules, whose tensors are yet to be loaded, into a model. Returns the names of the modules."""
    found = chosen_token_matrices(model, config)
    replace_token_matrices(model, found, lambda name, module: empty_token_matrix(module, config))
    return list(found)


def empty_token_matrix(module: Any, config: D2QuantConfig) -> D2QuantLinear:
    """A packed linear of the shape, dtype and device of an embedding or a head, whose tensors are yet to be loaded."""
    assert config.embedding_bits is not None
    rows, columns = module.weight.shape
    return D2QuantLinear(
        columns,
        rows,
        bits=config.embedding_bits,
        group_size=config.group_size_of(columns),
        bias=getattr(module, "bias", None) is not None,
        scale_dtype=config.torch_scale_dtype,
        dtype=module.weight.dtype,
        device=module.weight.device,
    )


def replace_token_matrices(
    model: "PreTrainedModel", found: Mapping[str, Any], build: Callable[[str, Any], D2QuantLinear]
) -> None:
    """
    Puts packed modules in the place of the dense ones `found`, and makes transformers know what they share.

    Args:
        model ([`~transformers.PreTrainedModel`]): Changed in place.
        found (`Mapping[str, torch.nn.Module]`): The embedding, the head, or both, by name.
        build (`Callable`): Makes a packed matrix, given the name and the dense module.
    """
    tied, packed = is_tied(model), None
    for name, module in found.items():
        packed = packed if tied and packed is not None else build(name, module)
        packed._is_hf_initialized = True  # otherwise transformers would draw random weights for it
        if isinstance(module, nn.Linear):
            replace_module(model, name, packed)
            continue
        embedding = D2QuantEmbedding(
            packed, embed_scale=scale_of(module), padding_idx=module.padding_idx, dtype=module.weight.dtype
        )
        replace_module(model, name, embedding)
    if found:
        model.resize_token_embeddings = refuse_to_resize
    if found and tied:
        embedding_name, head_name = found
        shared = {f"{head_name}.{part}": f"{embedding_name}.{part}" for part in ("weight_scale", "weight_zero_point")}
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **shared}
        model.all_tied_weights_keys.update(shared)


def forget_packed_token_matrices(model: "PreTrainedModel") -> None:
    """Takes back what [`replace_token_matrices`] told transformers, once the matrices are dense; ties them again."""
    if vars(model).pop("resize_token_embeddings", None) is not None:
        vars(model).pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()


def refuse_to_resize(*_: Any, **__: Any) -> None:
    """Stands in for `resize_token_embeddings` of a model whose token matrices are packed."""
    raise ValueError(
        "The number of tokens cannot be changed while the embedding or the head is packed. Resize the original model "
        "before it is quantized, quantize it with `embedding_bits=None`, or call `model.dequantize()` first."
    )


def round_rows(weight: Tensor, config: D2QuantConfig, hessian: Tensor | None = None) -> QuantizedWeight:
    """`weight` `(tokens, hidden_size)` in `config.embedding_bits` bits, to nearest or with GPTQ given `hessian`."""
    bits = config.embedding_bits
    assert bits is not None
    parts = [
        round_weight(
            rows,
            None if hessian is None else hessian.to(rows.device),
            bits=bits,
            group_size=config.group_size_of(weight.shape[1]),
            damp_percent=config.damp_percent,
            act_group_aware=config.act_group_aware,
            hessian_weights=config.hessian_weights,
            iterations=config.iterations,
            clip=config.clip,
            scale_dtype=config.torch_scale_dtype,
        ).weight
        for rows in torch.split(weight.detach(), CHUNK_ROWS)
    ]
    return QuantizedWeight(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts], 1),
        zero_points=torch.cat([part.zero_points for part in parts if part.zero_points is not None]),
        bits=bits,
        group_size=config.group_size_of(weight.shape[1]),
        grid="affine",
    )


def _obstacle(model: "PreTrainedModel", name: str, module: Any, config: D2QuantConfig) -> str | None:
    """Why a module cannot be packed, if it cannot."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        ids = torch.arange(PROBED_TOKENS, device=module.weight.device) % module.num_embeddings
        scale = torch.tensor(scale_of(module), dtype=module.weight.dtype)
        if module.max_norm is not None or not torch.equal(module(ids), module.weight[ids] * scale.to(module.weight)):
            return f"{kind} does more than look up a row and scale it"
    elif type(module) is not nn.Linear:
        return f"{kind} is no `torch.nn.Linear` or `torch.nn.Embedding`"
    elif module.bias is not None and is_tied(model):
        return "it is tied to the embedding and has a bias"
    if module.weight.shape[1] < config.group_size:
        return f"its rows have {module.weight.shape[1]} channels, less than a group of {config.group_size}"
    return _reader_of_weight(model, name, module)


class _WithoutWeight(nn.Module):
    """Computes what `inner` does, and has no weight that could be read, but its device."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Any:
        return SimpleNamespace(device=self.inner.weight.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _reader_of_weight(model: "PreTrainedModel", name: str, module: nn.Module) -> str | None:
    """
    Says so if the model makes other use of the module's weight than to call the module, which is found by running it
    without: a model may cast to the dtype of the weight, which packed words would turn into integers.
    """
    ids = torch.arange(PROBED_TOKENS, device=model.get_input_embeddings().weight.device)
    ids = ids[None] % model.get_input_embeddings().num_embeddings
    want = model(input_ids=ids, use_cache=False)[0]
    try:
        model.set_submodule(name, _WithoutWeight(module))
        same = torch.equal(model(input_ids=ids, use_cache=False)[0], want)
    except (AttributeError, TypeError):
        same = False
    finally:
        model.set_submodule(name, module)
    return None if same else f"{type(model).__name__} reads its weight"
