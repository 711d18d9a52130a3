"""What a run leaves on disk beside its checkpoints."""

import json
import logging
from pathlib import Path
from typing import Any

from ..files import written_whole
from .frozen.identity import is_same_identity
from .schedules import LambdaSchedule


logger = logging.getLogger(__name__)

STATE = "gopd_state.json"
Identities = dict[str, dict[str, dict[str, Any]]]  # of frozen models, by role and teacher id


def write_state(folder: Path, models: Identities, schedule: LambdaSchedule) -> None:
    """Writes what `read_state` reads into the folder of a checkpoint."""
    state = {**models, "lambda_schedule": schedule.state_dict()}
    with written_whole(folder / STATE) as part:
        part.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def read_state(folder: Path, models: Identities, schedule: LambdaSchedule) -> None:
    """
    Restores what a run saved beside its checkpoint; logs it if nothing is there.

    Args:
        folder (`Path`):
            The checkpoint.
        models (`dict[str, dict]`):
            Identities of this run's frozen models, by role and teacher id.
        schedule ([`LambdaSchedule`]):
            Given what it had observed.

    Raises:
        `ValueError`: If the run that saved it had other frozen models.
    """
    path = folder / STATE
    if not path.is_file():
        logger.warning("%s is not there, so the frozen models could not be compared with the checkpoint's.", path)
        return
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for role, present in models.items():
        if saved[role].keys() != present.keys():
            raise ValueError(
                f"The checkpoint {folder} was trained with the {role} {list(saved[role])}, and this run has "
                f"{list(present)}. Pass the same ones, or start anew with another `output_dir`."
            )
        for key, model in present.items():
            before = saved[role][key]
            if not is_same_identity(before, model):
                raise ValueError(
                    f"The checkpoint {folder} was trained with {before} among its {role}"
                    f"{f' as {key!r}' if key else ''}, and this run has {model}. Pass the same model, or start anew "
                    "with another `output_dir`."
                )
    schedule.load_state_dict(saved["lambda_schedule"])
