"""
What a packed checkpoint states about itself, so that nothing of it can change without being noticed.

`integrity`, an entry of the quantization configuration in `config.json`, holds

- `model_config`: what `config.json` says of the model, without names, versions, dtype and labels;
- `tensors`: a checksum of each block, and of each tensor outside of the blocks: of names, dtypes, shapes and bytes;
- `checksum`: over these two and over all other entries of the quantization configuration.

The configuration is compared before the model is built, and the tensors before they are loaded. It is stored rather
than its checksum because transformers may rename entries from one version to the next: what is stored and what is in
`config.json` are then read by the same code.
"""

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn

from trl_gopd.d2quant.finite import check_finite
from trl_gopd.digests import parameters_digest, without_volatile
from trl_gopd.files import ALGORITHM


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

REMEDY = "Copy or download the checkpoint again, or quantize the model again."
# Of `config.json`, beside what is volatile in any model: what `from_pretrained` is commonly told, what heads of other
# kinds need, and what is written into `config.json` after `save_pretrained`.
FREE = (
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "id2label",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "quantization_config",
    "return_dict",
    "transformers_weights",
)


def statement(model: "PreTrainedModel", settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    The entry `integrity` of a model that is about to be saved.

    Args:
        model ([`~transformers.PreTrainedModel`]): The packed model.
        settings (`Mapping`): Its quantization configuration as it will be in `config.json`.

    Raises:
        `ValueError`: if a parameter is not finite.
    """
    digests = {}
    for name, tensor in _written_tensors(model):
        check_finite([(name, tensor)], "It is not saved. Load or quantize the model again.")
        digests[name] = parameters_digest({name: tensor})
    integrity = {"model_config": _described(model.config.to_diff_dict()), "tensors": _by_block(digests)}
    return {**integrity, "checksum": _checksum({**settings, "integrity": integrity})}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises a `ValueError` if a quantization configuration, as read from `config.json`, is not what was saved."""
    integrity = settings.get("integrity")
    if not isinstance(integrity, dict) or integrity.get("checksum") != _checksum(settings):
        raise ValueError(
            "The `quantization_config` in config.json is not what was saved: its checksum is missing or differs. "
            f"{REMEDY}"
        )


def check_model_config(config: "PreTrainedConfig", integrity: Mapping[str, Any]) -> None:
    """
    Raises a `ValueError` that names what differs between a model's configuration and what was saved. Called before the
    model is built, so that nobody waits for a model that cannot be loaded.
    """
    stored, blocks = integrity["model_config"], len(integrity["tensors"])
    if stored.get("model_type") != config.model_type:
        differences = [f"`model_type` is {config.model_type!r} and was {stored.get('model_type')!r}"]
    else:
        want = _described(type(config).from_dict(copy.deepcopy(stored)).to_dict())
        differences = list(_differences(want, _described(config.to_dict())))
    if differences:
        raise ValueError(
            f"The model's configuration is not the one that was saved: {'; '.join(differences[:3])}. Restore "
            "config.json, or do not pass it to `from_pretrained`. To change the model, quantize a changed original."
        )
    dtype = getattr(torch, config.dtype, None) if isinstance(config.dtype, str) else config.dtype
    if not (config.dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point dtype, got {config.dtype!r} from config.json. {REMEDY}")
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if layers > blocks:
        raise ValueError(f"config.json describes {layers} blocks, and the checkpoint has {blocks} at most. {REMEDY}")


def check_tensors(files: Sequence[str], integrity: Mapping[str, Any], model: nn.Module) -> None:
    """
    Raises a `ValueError` if the tensors in the files of a checkpoint are not what was saved, or are fewer than what
    `model`, which is still on the meta device, would allocate.
    """
    numbers = sum(math.prod(shape) for file in files for shape in _shapes(file))
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > 2 * numbers:  # a new head, or a matrix that is stored once and used twice, do not reach that
        raise ValueError(f"config.json describes a model of {wanted} numbers, the files hold {numbers}. {REMEDY}")
    digests: dict[str, str | None] = {}
    places: dict[str, set[str]] = {}
    for file in files:
        for name, tensor in _tensors(file):
            digests[name] = parameters_digest({name: tensor})
            places.setdefault(_block(name), set()).add(Path(file).name)
    found, saved = _by_block(digests), integrity["tensors"]
    for name in sorted(found.keys() | saved.keys()):
        if name not in found:
            raise ValueError(f"The checkpoint lacks `{name}`. {REMEDY}")
        if found[name] != saved.get(name):
            where = " and ".join(sorted(places[name]))
            raise ValueError(f"`{name}` in {where} is not what was saved: it is damaged or incomplete. {REMEDY}")


def _written_tensors(model: "PreTrainedModel") -> Iterator[tuple[str, Tensor]]:
    """What `save_pretrained` will write: offloaded and sharded tensors whole, tied ones once, under names in files."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.integrations.accelerate import load_offloaded_parameter
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    tensors = remove_tied_weights_from_state_dict(tensors, model)
    if not any(tensor.is_meta for tensor in tensors.values()):
        yield from ((name, _whole(tensor)) for name, tensor in revert_weight_conversion(model, tensors).items())
        return
    for name, tensor in tensors.items():  # one at a time: there is no memory for all
        loaded = load_offloaded_parameter(model, name) if tensor.is_meta else tensor
        yield from revert_weight_conversion(model, {name: loaded}).items()


def _whole(tensor: Any) -> Tensor:
    """A tensor that is split over ranks, gathered: every rank calls `save_pretrained` then."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _tensors(file: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in a file, one at a time."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                yield name, tensors.get_tensor(name)
    except Exception as error:  # whatever the reader makes of a damaged file
        raise ValueError(f"{file} cannot be read, it is cut short or damaged: {error}. {REMEDY}") from error


def _shapes(file: str) -> Iterator[tuple[int, ...]]:
    """Shapes of the tensors in a file, of which only the header is read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield from (tensors.get_slice(name).get_shape() for name in tensors.keys())
    except Exception as error:
        raise ValueError(f"{file} cannot be read, it is cut short or damaged: {error}. {REMEDY}") from error


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON has it, without what may differ, in nested ones, too."""
    plain: dict[str, Any] = json.loads(json.dumps(_strict(without_volatile(config)), default=str))
    return plain


def _strict(value: Any) -> Any:
    return {k: _strict(v) for k, v in value.items() if k not in FREE} if isinstance(value, Mapping) else value


def _differences(saved: Any, given: Any, name: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in sorted(saved.keys() | given.keys()):
            yield from _differences(saved.get(key), given.get(key), f"{name}.{key}" if name else key)
    elif json.dumps(saved) != json.dumps(given):  # which tells 1 from 1.0 and True, and takes NaN for equal
        yield f"`{name}` is {given!r} and was {saved!r}"


def _checksum(settings: Mapping[str, Any]) -> str:
    integrity = {key: value for key, value in settings["integrity"].items() if key != "checksum"}
    text = json.dumps({**settings, "integrity": integrity}, sort_keys=True)
    return f"{ALGORITHM}:{xxhash.xxh3_128(text.encode()).hexdigest()}"


def _by_block(digests: Mapping[str, str | None]) -> dict[str, str]:
    lines: dict[str, list[str]] = {}
    for name, digest in sorted(digests.items()):
        lines.setdefault(_block(name), []).append(f"{name} {digest}\n")
    return {block: xxhash.xxh3_128("".join(of_block).encode()).hexdigest() for block, of_block in lines.items()}


def _block(name: str) -> str:
    """The name up to its first number, which is that of a block; all of it if there is none."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else name
