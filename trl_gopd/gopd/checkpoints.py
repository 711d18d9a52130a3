"""
Which checkpoints are whole. The last file of a checkpoint is a manifest with the size and the checksum of every other
one, written when these are on the disk; a checkpoint whose files do not agree with it is passed over.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import ALGORITHM, checksum, sync, sync_tree, written_whole


logger = logging.getLogger(__name__)

MANIFEST = "gopd_manifest.json"
STATE = "gopd_state.json"
UNFINISHED = "gopd_unfinished"  # an empty file: the first of a checkpoint, removed when the manifest is on the disk
FORMAT = 2  # of `STATE`. From 2 on, a checkpoint without a manifest was not written to its end.
LARGEST = 2**24  # bytes of a file of ours in JSON. That of thousands of ranks has a tenth of it.


def begin(folder: Path) -> None:
    """Makes the folder of a checkpoint, which is not whole before `write_manifest` has ended, whatever it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    (folder / MANIFEST).unlink(missing_ok=True)  # that of an earlier checkpoint of this step
    # What killed writers have left would be in the manifest, and be removed by the next writer of the same file.
    for path in folder.glob(".gopd_*.part*"):
        path.unlink()
    sync(folder)


def write_manifest(folder: Path) -> None:
    """Writes sizes and checksums of the files in a checkpoint, after all of them have reached the disk."""
    sync_tree(folder)
    sync(folder.parent)  # which has the name of the folder
    with suppress(PermissionError):  # not every parent can be read, and few are as new as the run
        sync(folder.parent.parent)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, ALGORITHM: checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in (MANIFEST, UNFINISHED)
    }
    with written_whole(folder / MANIFEST) as part:
        part.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    (folder / UNFINISHED).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """
    A dictionary from a file of ours.

    Raises:
        `ValueError`: If the file is no such dictionary, whatever else it is.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"it has {size} bytes, and at most {LARGEST} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of a dictionary")
    return content


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, first that by which it is whole: what a kill leaves of it is then no checkpoint."""
    begin(folder)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(newest: Path, *, limit: int | None, best: str | None) -> None:
    """
    Removes the checkpoints beside a whole one that are more than `limit`, those that were written first before others.

    Args:
        newest (`Path`):
            The checkpoint that was just written. It stays.
        limit (`int`, *optional*):
            `save_total_limit` of the run: how many are kept.
        best (`str`, *optional*):
            The best checkpoint so far, which stays, too.
    """
    if limit is None or limit <= 0:
        return
    kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    others = [folder for folder in _by_step(newest.parent).values() if folder.resolve() not in kept]
    # Not the one of the fewest steps: those that a run has left, which was begun anew since, are older.
    others.sort(key=lambda folder: (int(folder.stat().st_mtime), _step(folder) or 0))
    is_best_beside = len(kept) == 2 and Path(best or "").is_dir()
    for folder in others[: max(len(others) + 1 + is_best_beside - limit, 0)]:
        remove_checkpoint(folder)


def whole_checkpoint(given: str | os.PathLike[str] | bool | None, output_dir: str, accelerator: Any) -> Path | None:
    """
    The checkpoint to resume from, the same on all ranks. Those that are passed over are logged.

    Args:
        given (`str` or `os.PathLike` or `bool`, *optional*):
            A checkpoint, or `True` for the newest whole one in `output_dir`.
        output_dir (`str`):
            Folder of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the ranks, which all have to call this together.

    Returns:
        `Path` or `None`: `None` to start anew, which is also right if the run was killed before its first checkpoint
        was written.

    Raises:
        `ValueError`: If the checkpoint is not whole, or if there are some that were whole once, and none is now; or if
        there is not even the beginning of one.
    """
    if not given:
        return None
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:  # another one might see other files, and reading them all takes time
        try:
            answer[0] = _newest(Path(output_dir)) if given is True else _checked(Path(str(given)))
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    found, reason = broadcast_object_list(answer)
    if reason is not None:
        raise ValueError(reason)
    return None if found is None else Path(found)


def check_whole(folder: str, accelerator: Any) -> None:
    """Raises `ValueError` on all ranks if a checkpoint is not whole. All ranks have to call this together."""
    whole_checkpoint(folder, "", accelerator)


def _step(folder: Path) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name, re.ASCII)
    return int(match[1]) if match and folder.is_dir() else None


def _by_step(output_dir: Path) -> dict[int, Path]:
    """The checkpoints in a folder, those of most steps first."""
    found = {_step(folder): folder for folder in (output_dir.iterdir() if output_dir.is_dir() else ())}
    return {step: found[step] for step in sorted((step for step in found if step is not None), reverse=True)}


def _newest(output_dir: Path) -> str | None:
    folders = _by_step(output_dir).values()
    if not folders:
        raise ValueError(
            f"There is no checkpoint in {output_dir} to resume from. Check `output_dir`, or start anew with "
            "`resume_from_checkpoint=None`."
        )
    reasons = []
    for folder in folders:
        reason = problem(folder)
        if reason is None:
            return str(folder)
        reasons.append(f"{folder.name}: {reason}")
        logger.warning("The checkpoint %s is passed over, since it is not whole: %s.", folder, reason)
    if not any(_was_whole(folder) for folder in folders):
        logger.warning("The run in %s ended before a checkpoint was whole, so it starts anew.", output_dir)
        return None
    raise ValueError(
        f"No checkpoint in {output_dir} is whole any more ({'; '.join(reasons)}). Start anew with "
        "`resume_from_checkpoint=None`, or give the path of a checkpoint elsewhere."
    )


def _was_whole(folder: Path) -> bool:
    """Whether a checkpoint that is not whole was written to its end, once."""
    return not (folder / UNFINISHED).exists() and any(folder.iterdir())


def _has_to_have_manifest(folder: Path) -> bool:
    number = read_json(folder / STATE).get("format", 1)
    return not isinstance(number, int) or number >= 2


def _checked(folder: Path) -> str:
    if not folder.is_dir():
        raise ValueError(
            f"There is no checkpoint {folder}. Give the path of one, or `resume_from_checkpoint=True` for the newest "
            "whole one."
        )
    reason = problem(folder)
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
        try:
            files = _listed(folder / MANIFEST)
        except ValueError as error:
            return f"{MANIFEST} is damaged ({error})"
        for name, (size, digest) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if checksum(path) != digest:
                return f"{name} has another content than was written"
    except (OSError, ValueError) as error:  # `ValueError`: no file system takes a name with a null character
        return f"it cannot be read ({error})"
    return None


def _listed(manifest: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of files by name, as a manifest lists them; `ValueError` if it does not."""
    files = read_json(manifest).get("files")
    if not isinstance(files, dict):
        raise ValueError("it has no dictionary `files`")
    listed = {}
    for name, entry in files.items():
        path = PurePath(name)
        if not path.parts or path.anchor or ".." in path.parts:
            raise ValueError(f"{name!r} is not the name of a file in the checkpoint")
        size, digest = (entry.get(key) if isinstance(entry, dict) else None for key in ("size", ALGORITHM))
        if type(size) is not int or not isinstance(digest, str):
            raise ValueError(f"{name!r} has no `size` and {ALGORITHM}")
        listed[name] = size, digest
    missing = [name for name in (STATE, TRAINER_STATE_NAME) if name not in listed]
    if missing:
        raise ValueError(f"it does not list {missing[0]}")
    return listed


def _problem_without_manifest(folder: Path) -> str | None:
    """The same of a checkpoint whose last file was never written, or that is older than manifests."""
    for name in (TRAINER_STATE_NAME, STATE):
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            read_json(folder / name) if name == STATE else json.loads((folder / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"{name} is damaged ({error})"
    if _has_to_have_manifest(folder):
        return f"{MANIFEST} is missing, so it was not written to its end"
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
