"""How one frozen model is told from another, and whether it is split over ranks."""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ...files import ALGORITHM


# Of `Scorer.identity`, what stands in for a checksum of the weights where that is not known.
NAMES = ("name", "revision", "adapter")
CHUNK = 2**24  # numbers that are copied from a device at a time
# Of a configuration, what may change between two copies of one model that give the same numbers.
VOLATILE = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
)


def is_same_identity(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """
    Whether two descriptions are of one model. Checksums of weights and configuration decide where both have them;
    otherwise, and where the checksum of the weights is an old one, the names.
    """
    if one.get("config") and other.get("config") and one["config"] != other["config"]:
        return False
    is_known = one.get("weights") and other.get("weights") and is_partial(one) == is_partial(other)
    return all(one.get(name) == other.get(name) for name in (("weights",) if is_known else NAMES))


def is_partial(identity: Mapping[str, Any]) -> bool:
    """Whether the checksum is one of an earlier version, which read the beginning of each parameter only."""
    return re.fullmatch("[0-9a-f]{8}", identity.get("weights") or "") is not None


def weights_digest(model: nn.Module) -> str | None:
    """Checksum of all weights of a model, packed ones among them; `None` if some are elsewhere."""
    return parameters_digest(model.state_dict())


def parameters_digest(parameters: Mapping[str, Any]) -> str | None:
    """Checksum of the names, shapes, dtypes and all numbers of tensors; `None` if some are elsewhere."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(parameters.items()):
        if isinstance(value, Tensor) and not _add(digest, name, value.detach()):
            return None
    return f"{ALGORITHM}:{digest.hexdigest()}"


def _add(digest: Any, name: str, tensor: Tensor) -> bool:
    if tensor.is_meta or hasattr(tensor, "full_tensor"):  # on a disk, or split over ranks
        return False
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized tensor made of others
        inner: Any = tensor
        return all(_add(digest, f"{name}.{part}", getattr(inner, part)) for part in inner.__tensor_flatten__()[0])
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    for chunk in torch.split(tensor.reshape(-1), CHUNK):
        digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return True


def config_digest(config: Any) -> str:
    """Checksum of what a configuration changes of its family's defaults, without names and versions."""
    text = json.dumps(_without_volatile(config.to_diff_dict()), sort_keys=True, default=str)
    return f"{ALGORITHM}:{xxhash.xxh3_128(text.encode()).hexdigest()}"


def _without_volatile(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {str(key): _without_volatile(part) for key, part in value.items() if key not in VOLATILE}


def is_sharded(accelerator: Any) -> bool:
    """Whether a model that is prepared for this run is split over ranks."""
    plugin = accelerator.state.deepspeed_plugin
    return uses_fsdp(accelerator) or plugin is not None and plugin.zero_stage == 3


def uses_fsdp(accelerator: Any) -> bool:
    """Whether models are sharded by FSDP."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None
