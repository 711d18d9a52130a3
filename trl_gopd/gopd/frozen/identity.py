"""How one frozen model is told from another, and whether it is split over ranks."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...digests import parameters_digest


# Of `Scorer.identity`, what stands in for a checksum of the weights where that is not known.
NAMES = ("name", "revision", "adapter")


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


def is_sharded(accelerator: Any) -> bool:
    """Whether a model that is prepared for this run is split over ranks."""
    plugin = accelerator.state.deepspeed_plugin
    return uses_fsdp(accelerator) or plugin is not None and plugin.zero_stage == 3


def uses_fsdp(accelerator: Any) -> bool:
    """Whether models are sharded by FSDP."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None
