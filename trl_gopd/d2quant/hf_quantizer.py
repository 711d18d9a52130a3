"""
D2Quant in `from_pretrained` and `save_pretrained`. This is the only file that uses transformers' quantizer hooks.

A checkpoint in full precision is loaded as it is and then quantized as a whole, since calibration needs a model that
runs. A quantized one gets packed linears in place of its dense ones while the model is still on the meta device; their
tensors are then loaded like any others, by name, shape and dtype.

A checkpoint states what its configuration and its tensors were when it was saved, see `integrity`: what is damaged,
missing or altered is refused, before the model is built where the configuration tells.
"""

import copy
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from trl_gopd.files import written_whole

from .config import QUANT_METHOD, RUNTIME_FIELDS, D2QuantConfig
from .convert import empty_packed
from .embedding import D2QuantEmbedding
from .foreign import allow_loading, forget_code, write_along
from .integrity import REMEDY, check_model_config, check_tensors, statement
from .linear import D2QuantLinear
from .names import check_entries, is_listed, is_named
from .token_matrices import forget_packed_token_matrices, insert_empty_token_matrices, token_matrices


# Modules that need model classes are imported where they are used: this file is imported while transformers itself is
# being imported, when it has no model classes yet.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)


class D2QuantHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """
    The quantizer that `from_pretrained` uses for a [`D2QuantConfig`], or for a checkpoint that contains one.

    Args:
        quantization_config ([`D2QuantConfig`]): The configuration.
        pre_quantized (`bool`, *optional*, defaults to `True`): Whether the checkpoint is quantized already.
    """

    quantization_config: D2QuantConfig

    def __init__(self, quantization_config: D2QuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._tokenizer: Any = None
        self._inserted: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses to quantize a model of which some weights are offloaded, and a checkpoint without checksums."""
        if self.pre_quantized:
            self._integrity()
            return
        places = {str(place) for place in (device_map.values() if isinstance(device_map, dict) else [device_map])}
        elsewhere = places & {"disk", "meta"} or (places & {"cpu"} if len(places) > 1 else set())
        if elsewhere:
            raise ValueError(
                "`device_map` must keep all weights where they are used while a model is quantized, got "
                f"{' and '.join(sorted(elsewhere))} for some. Use one device, such as 'cpu', or enough of them. To "
                "quantize block by block on an accelerator that cannot hold the model, use `device_map='cpu'` and "
                "`D2QuantConfig(device='cuda', offload='disk')`."
            )

    def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """Refuses an altered configuration, and ranks. It is the one hook that sees it before the model is built."""
        _check_ranks(config, self.pre_quantized)
        if self.pre_quantized:
            check_model_config(config, self._integrity())
            allow_loading(config)
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._inserted = _insert_packed(model, self.quantization_config)
            self._inserted += insert_empty_token_matrices(model, self.quantization_config)
            if checkpoint_files is not None:  # otherwise the caller passes tensors of its own
                check_tensors(checkpoint_files, self._integrity(), model)
        else:
            _check_settings(model, self.quantization_config)
            self._tokenizer = _load_tokenizer(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        if not self.pre_quantized:
            from .pipeline import quantize_blocks

            self.remove_quantization_config(model)  # the model is not quantized yet
            quantize_blocks(model, self._tokenizer, self.quantization_config)
            mark_quantized(model, self.quantization_config)
            return
        for name in self._inserted:
            module = model.get_submodule(name)
            for key, parameter in module.named_parameters(recurse=False):
                # Parameters that are offloaded to disk are on the meta device, and have no mark.
                if not getattr(parameter, "_is_hf_initialized", parameter.is_meta):
                    raise ValueError(f"The checkpoint has no `{name}.{key}`, or one of another shape. {REMEDY}")
            module.requires_grad_(False)  # transformers turns it on for all that is floating point
        if not model.is_remote_code():
            forget_code(model.config)

    def _integrity(self) -> dict[str, Any]:
        """What the checkpoint states of itself; a `ValueError` if it states nothing."""
        if self.quantization_config.integrity is None:
            raise ValueError(
                "The `quantization_config` in config.json has no `integrity`, the checksums of what was saved. Save "
                f"the model with `save_quantized` or `save_pretrained`. {REMEDY}"
            )
        return self.quantization_config.integrity

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
        from .dense import make_dense

        packed = dict(_packed(model))
        offloaded = [name for name, module in packed.items() if module.weight.is_meta]
        if offloaded:
            raise ValueError(
                f"`model` must be in memory, and `{offloaded[0]}` is offloaded. Load it without 'disk', or 'cpu' "
                "beside another device, in `device_map`."
            )
        # `dtype` is a string if it comes from the configuration of a saved model.
        make_dense(model, packed, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if dtype is not None:
            model.config.dtype = dtype
        forget_packed_token_matrices(model)
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[None, dict[str, str]]:
        """
        Called by [`~transformers.PreTrainedModel.save_pretrained`], which builds the state dict itself, before it
        writes `config.json`: the checksums go there. Metadata in the files would be in another order each time.
        """
        if not getattr(model, "_hf_peft_config_loaded", False):  # otherwise only the adapter is saved
            model.config.quantization_config = self.quantization_config
            self.quantization_config.integrity = statement(model, self.quantization_config.to_dict())
            write_along()
        return None, {}

    def is_serializable(self) -> bool:
        """Whether the model can be saved. In transformers this is a method, while the next two are properties."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether generation may compile the model. Experts are called one by one, as many as tokens are sent to."""
        return not self.quantization_config.expert_parameters


def register() -> None:
    """Registers `"quant_method": "d2quant"` with transformers; again, if its tables have been reloaded."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = D2QuantConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = D2QuantHfQuantizer


def mark_quantized(model: "PreTrainedModel", config: D2QuantConfig) -> None:
    """
    Marks a model with packed linears as quantized, as `from_pretrained` would: it can then be saved, adapters can be
    trained on it, and `model.dequantize()` works.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            With [`~trl_gopd.d2quant.linear.D2QuantLinear`] layers in its decoder blocks; changed in place.
        config ([`D2QuantConfig`]):
            How it was quantized. `model.config.quantization_config` becomes a copy of it that also states which
            linears are packed, and how.

    Raises:
        `ValueError`: if a layer is packed in another way.
    """
    quantizer = D2QuantHfQuantizer(_describe(model, config), pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def save_quantized(
    model: "PreTrainedModel", path: str | os.PathLike[str], *, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> None:
    """
    Saves a quantized model, either completely or not at all. `model.save_pretrained` writes the same, file by file:
    killed in the middle, it leaves a folder that is refused when it is loaded. Saving equal models gives files that
    are equal byte for byte.

    A process that has not imported `trl_gopd` refuses to load the checkpoint, and says so. With
    `trust_remote_code=True` it runs a module in the folder that imports `trl_gopd`, and loads the checkpoint.

    Args:
        model ([`~transformers.PreTrainedModel`]): Quantized with [`D2QuantConfig`].
        path (`str` or `os.PathLike`): An empty folder, or one that does not exist yet.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved in the same folder.

    Raises:
        `TypeError`: if `model` is not a [`~transformers.PreTrainedModel`].
        `ValueError`: if it is not quantized, or one of its numbers is not finite.
        `FileExistsError`: if `path` is a file, or a folder that is not empty.
        `OSError`: if it cannot be written, for example because the disk is full. Nothing is left there then.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"`model` must be a `PreTrainedModel`, got {type(model).__name__}. Save an adapter with its own "
            "`save_pretrained`."
        )
    if not isinstance(getattr(model, "hf_quantizer", None), D2QuantHfQuantizer):
        raise ValueError(
            f"`model` must be quantized, got a {type(model).__name__} that is not. Call `quantize_model`."
        )
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"`path` must be a new or empty folder, got {path}. Name another one, or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


def _packed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if _is_packed(module))


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, (D2QuantLinear, D2QuantEmbedding))


def _block_linears(model: "PreTrainedModel") -> dict[str, nn.Linear]:
    """Linears in the decoder blocks, packed or not, by their names in the model."""
    from .topology import find_blocks

    blocks, modules = find_blocks(model)
    return {f"{blocks}.{name}": module for name, module in modules.named_modules() if isinstance(module, nn.Linear)}


def _dense_matrices(model: "PreTrainedModel") -> set[str]:
    """What holds matrices in full precision in the decoder blocks: modules with a weight, and other parameters."""
    from .topology import find_blocks

    blocks, modules = find_blocks(model)
    return {
        f"{blocks}.{name}".removesuffix(".weight")
        for name, parameter in modules.named_parameters()
        if parameter.ndim > 1 and not isinstance(modules.get_submodule(name.rpartition(".")[0]), D2QuantLinear)
    }


def _describe(model: "PreTrainedModel", config: D2QuantConfig) -> D2QuantConfig:
    """Copy of `config` with the fields that a checkpoint states about itself, and without those of quantizing only."""
    from .as_linears import find_expert_parameters

    linears = _block_linears(model)
    packed = {name: module for name, module in linears.items() if isinstance(module, D2QuantLinear)}
    for name, module in packed.items():
        layout = (module.bits, module.group_size)
        if layout != (config.bits, config.group_size_of(module.in_features)) or module.grid not in (
            config.grid,
            config.down_grid,
        ):
            raise ValueError(
                f"`config` must say how `{name}` is packed, got {config.bits} bits, groups of {config.group_size} and "
                f"the grid {config.grid!r} for {module}. Pass the configuration it was quantized with."
            )
    matrices = token_matrices(model)
    dense = [name for name, module in matrices.items() if not _is_packed(module)]
    for name in matrices.keys() - dense:
        layout = (matrices[name].bits, matrices[name].group_size)
        if layout != (config.embedding_bits, config.group_size_of(matrices[name].packed.in_features)):
            raise ValueError(
                f"`config` must say how `{name}` is packed, got `embedding_bits` {config.embedding_bits} and groups "
                f"of {config.group_size} for {matrices[name]}. Pass the configuration it was quantized with."
            )
    described = copy.deepcopy(config)
    defaults = D2QuantConfig()
    for field in RUNTIME_FIELDS:
        setattr(described, field, getattr(defaults, field))
    if len(dense) == len(matrices):
        described.embedding_bits, dense = None, []
    dense_matrices, experts = _dense_matrices(model), find_expert_parameters(model)
    described.modules_to_not_convert = _ends_of_names(
        [*dense_matrices, *dense], [*(dense_matrices | linears.keys()), *matrices]
    )
    described.expert_parameters = {
        end: next(transposed for name, transposed in experts.items() if is_listed(name, [end]))
        for end in _ends_of_names(experts, dense_matrices | experts.keys())
    } or None
    described.bias_modules = _ends_of_names([n for n, m in packed.items() if m.bias is not None], linears)
    described.input_scale_modules = _ends_of_names(
        [n for n, m in packed.items() if m.input_scale is not None], linears
    )
    described.down_modules = _ends_of_names([n for n, m in packed.items() if m.grid != config.grid], linears)
    return described


def _ends_of_names(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """Names within a block, where these mean exactly the `chosen` linears to `is_named`; full ones otherwise."""
    chosen = set(chosen)
    others = [name for name in names if name not in chosen]
    ends = set()
    for name in chosen:
        in_block = re.split(r"\.\d+\.", name, maxsplit=1)[-1]  # all of the name outside of the blocks
        ends.add(name if any(is_named(other, [in_block]) for other in others) else in_block)
    return sorted(ends)


def _insert_packed(model: "PreTrainedModel", config: D2QuantConfig) -> list[str]:
    """Replaces the linears that the checkpoint stores packed by empty packed ones. Returns their names."""
    from .as_linears import make_listed_linears

    make_listed_linears(model, config)
    inserted = []
    for name, linear in _block_linears(model).items():
        if config.skips(name):
            continue
        packed = empty_packed(
            linear,
            config,
            grid=config.grid_of(name),
            bias=is_listed(name, config.bias_modules),
            input_scale=is_listed(name, config.input_scale_modules),
        )
        packed._is_hf_initialized = True  # otherwise transformers would draw random weights for it
        model.set_submodule(name, packed)
        inserted.append(name)
    return inserted


def _check_ranks(config: "PreTrainedConfig", pre_quantized: bool) -> None:
    """Refuses to cut packed weights along their rows, which are words, and to calibrate a part of a model."""
    distributed = getattr(config, "distributed_config", None)
    for name in ("tp_size", "ep_size") if pre_quantized else ("tp_size", "ep_size", "pp_size", "fsdp_size"):
        size = getattr(distributed, name, None) or 1
        if size > 1:
            reason = "for packed weights, which cannot be cut" if pre_quantized else "while a model is quantized"
            raise ValueError(
                f"`{name}` must be 1 {reason}, got {size}. Load without `tp_plan` and `distributed_config`; "
                "`device_map='auto'` places whole blocks on several devices."
            )


def _check_settings(model: "PreTrainedModel", config: D2QuantConfig) -> None:
    """Refuses linears that read hidden states. Of others it is not known yet whether the model calls them."""
    check_entries(config.modules_to_not_convert, model)
    hidden_size = getattr(model.config.get_text_config(decoder=True), "hidden_size", 0)
    for name, linear in _block_linears(model).items():
        if linear.in_features == hidden_size < config.group_size and not config.skips(name):
            raise ValueError(
                f"`group_size` must be at most the width of every linear, got {config.group_size} and `{name}` of "
                f"{linear.in_features} columns. Lower it, or name the linear in `modules_to_not_convert`."
            )


def _load_tokenizer(model: "PreTrainedModel", config: D2QuantConfig) -> Any:
    """The tokenizer to calibrate with; `None` if none can be loaded and the data need none."""
    tokenizer, data = config.tokenizer, config.dataset
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    first = data[0] if isinstance(data, (list, tuple)) and data else data
    is_text = first is None or isinstance(first, (str, os.PathLike))
    try:
        return transformers.AutoTokenizer.from_pretrained(tokenizer or model.name_or_path)
    except (OSError, ValueError, KeyError) as error:
        if tokenizer is None and not is_text:
            return None
        raise ValueError(
            "Calibration on text needs a tokenizer, and none could be loaded from "
            f"{tokenizer or model.name_or_path!r}. Pass `D2QuantConfig(tokenizer=...)`, or token ids as `dataset`."
        ) from error


register()
