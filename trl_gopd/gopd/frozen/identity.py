"""How one frozen model is told from another, and whether it is split over ranks."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


# Of `Scorer.identity`, what stands in for a checksum of the weights where that is not known.
NAMES = ("name", "revision", "adapter")


def is_same_identity(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of one model: the checksums decide where both are known, otherwise the names."""
    compared = ("weights",) if one.get("weights") and other.get("weights") else NAMES
    return all(one.get(name) == other.get(name) for name in compared)


def weights_digest(model: nn.Module) -> str:
    """Checksum of the parameters of a model."""
    return parameters_digest(dict(model.named_parameters()))


def parameters_digest(parameters: Mapping[str, Tensor]) -> str:
    """Checksum of the beginning of every parameter: cheap, and another for any other training of the same model."""
    value = 0
    for _, parameter in sorted(parameters.items()):
        start = parameter.detach().flatten()[:64].cpu().contiguous()
        value = zlib.crc32(start.view(torch.uint8).numpy().tobytes(), value)
    return f"{value:08x}"


def is_sharded(accelerator: Any) -> bool:
    """Whether a model that is prepared for this run is split over ranks."""
    plugin = accelerator.state.deepspeed_plugin
    return uses_fsdp(accelerator) or plugin is not None and plugin.zero_stage == 3


def uses_fsdp(accelerator: Any) -> bool:
    """Whether models are sharded by FSDP."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None
