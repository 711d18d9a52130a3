"""What a run leaves on disk about its frozen models, and how one is told from another."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

# Of `Scorer.identity`, what stands in for a checksum of the weights where that is not known.
NAMES = ("name", "revision", "adapter")


def is_same_identity(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of one model: the checksums decide where both are known, otherwise the names."""
    compared = ("weights",) if one.get("weights") and other.get("weights") else NAMES
    return all(one.get(name) == other.get(name) for name in compared)


def read_state(path: Path, models: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """
    What a run saved beside its checkpoint, `None` if that is not there.

    Args:
        path (`Path`):
            The file.
        models (`dict[str, dict]`):
            Identities of this run's frozen models, by role and teacher id.

    Raises:
        `ValueError`: If the run that saved it had others.
    """
    if not path.is_file():
        logger.warning("%s is not there, so the frozen models could not be compared with the checkpoint's.", path)
        return None
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for role, present in models.items():
        if saved[role].keys() != present.keys():
            raise ValueError(
                f"The checkpoint {path.parent} was trained with the {role} {list(saved[role])}, and this run has "
                f"{list(present)}. Pass the same ones, or start anew with another `output_dir`."
            )
        for key, model in present.items():
            before = saved[role][key]
            if not is_same_identity(before, model):
                raise ValueError(
                    f"The checkpoint {path.parent} was trained with {before} among its {role}"
                    f"{f' as {key!r}' if key else ''}, and this run has {model}. Pass the same model, or start anew "
                    "with another `output_dir`."
                )
    return saved
