"""
Which checkpoints are whole. The last file of a checkpoint is a manifest with the size and the checksum of every other
one, written when these are on the disk; a checkpoint whose files do not agree with it is passed over.
"""

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import ALGORITHM, checksum, sync, written_whole


logger = logging.getLogger(__name__)

MANIFEST = "gopd_manifest.json"
STATE = "gopd_state.json"


def write_manifest(folder: Path) -> None:
    """Writes sizes and checksums of the files in a checkpoint, after all of them have reached the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            sync(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, ALGORITHM: checksum(path)}
    with written_whole(folder / MANIFEST) as part:
        part.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def whole_checkpoint(given: str | os.PathLike[str] | bool | None, output_dir: str, accelerator: Any) -> Path | None:
    """
    The checkpoint to resume from, the same on all ranks.

    Args:
        given (`str` or `os.PathLike` or `bool`, *optional*):
            A checkpoint, or `True` for the newest whole one in `output_dir`.
        output_dir (`str`):
            Folder of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the ranks, which all have to call this together.

    Returns:
        `Path` or `None`: `None` to start anew, or if there is no checkpoint at all.

    Raises:
        `ValueError`: If the checkpoint is not whole, or none of those that are there is.
    """
    if not given:
        return None
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:  # another one might see other files, and reading them all takes time
        try:
            answer[0] = _newest(Path(output_dir)) if given is True else _checked(Path(str(given)))
        except ValueError as error:
            answer[1] = str(error)
    found, reason = broadcast_object_list(answer)
    if reason is not None:
        raise ValueError(reason)
    return None if found is None else Path(found)


def _newest(output_dir: Path) -> str | None:
    steps = {
        int(match[1]): folder
        for folder in (output_dir.iterdir() if output_dir.is_dir() else ())
        if folder.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
    }
    reasons = []
    for _, folder in sorted(steps.items(), reverse=True):
        reason = problem(folder)
        if reason is None:
            return str(folder)
        reasons.append(f"{folder.name}: {reason}")
        logger.warning("The checkpoint %s is passed over, since it is not whole: %s.", folder, reason)
    if reasons:
        raise ValueError(
            f"No checkpoint in {output_dir} is whole ({'; '.join(reasons)}). Start anew with "
            "`resume_from_checkpoint=None`, or give the path of a checkpoint elsewhere."
        )
    return None


def _checked(folder: Path) -> str:
    reason = problem(folder) if folder.is_dir() else None
    if reason is not None:
        raise ValueError(
            f"The checkpoint {folder} is not whole: {reason}. Use `resume_from_checkpoint=True` for the newest whole "
            "one. To go on from its weights alone, pass the folder as `model`."
        )
    return str(folder)


def problem(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; `None` if it is whole."""
    try:
        if not (folder / MANIFEST).is_file():
            return _problem_without_manifest(folder)
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
            if checksum(path) != entry[ALGORITHM]:
                return f"{name} has another content than was written"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def _problem_without_manifest(folder: Path) -> str | None:
    """The same of a checkpoint whose last file was never written, or that is older than manifests."""
    for name in (TRAINER_STATE_NAME, STATE):
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{name} is damaged ({error})"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                return f"{name} is damaged ({error})"
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{name} is damaged or not complete"
    return None
