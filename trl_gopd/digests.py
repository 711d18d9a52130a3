"""Checksums of tensors and of models' configurations, which tell whether they are still what they were."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from .files import ALGORITHM


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
    "integrity",  # checksums, in the configuration of a packed checkpoint
)


def parameters_digest(parameters: Mapping[str, Any]) -> str | None:
    """Checksum of the names, shapes, dtypes and all numbers of tensors; `None` if some are elsewhere."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(parameters.items()):
        if isinstance(value, Tensor) and not add_tensor(digest, name, value.detach()):
            return None
    return f"{ALGORITHM}:{digest.hexdigest()}"


def add_tensor(digest: Any, name: str, tensor: Tensor) -> bool:
    """Updates an xxhash digest with a tensor's name, dtype, shape and numbers; `False` if they are elsewhere."""
    if tensor.is_meta or hasattr(tensor, "full_tensor"):  # on a disk, or split over ranks
        return False
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized tensor made of others
        inner: Any = tensor
        parts = inner.__tensor_flatten__()[0]
        return all(add_tensor(digest, f"{name}.{part}", getattr(inner, part)) for part in parts)
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    for chunk in torch.split(tensor.reshape(-1), CHUNK):
        digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
    return True


def config_digest(config: Any) -> str:
    """Checksum of what a configuration changes of its family's defaults, without names and versions."""
    text = json.dumps(without_volatile(config.to_diff_dict()), sort_keys=True, default=str)
    return f"{ALGORITHM}:{xxhash.xxh3_128(text.encode()).hexdigest()}"


def without_volatile(value: Any) -> Any:
    """A configuration as a dictionary without the `VOLATILE` entries, those of nested ones included."""
    if not isinstance(value, Mapping):
        return value
    return {str(key): without_volatile(part) for key, part in value.items() if key not in VOLATILE}
