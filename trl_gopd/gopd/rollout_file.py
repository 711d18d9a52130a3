"""
The micro-batches of a generation batch in a checkpoint, for a run that goes on in the middle of it.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import written_whole
from . import batch as keys


# Entries that every micro-batch has, and the others that are tensors of known shapes: B rows, P tokens of prompts, P'
# of the teachers' own, T of completions. A one-letter name stands for any size, the same wherever it stands.
REQUIRED = {
    keys.PROMPT_IDS: "BP",
    keys.PROMPT_MASK: "BP",
    keys.COMPLETION_IDS: "BT",
    keys.COMPLETION_MASK: "BT",
    keys.ADVANTAGES: "B",
    keys.TEACHER_INDEX: "B",
    keys.LAMBDA: "B",
    keys.ROW: "B",
}
OPTIONAL = {
    keys.TOOL_MASK: "BT",
    keys.OLD_LOGPS: "BT",
    keys.STORED_RATIO: "BT",
    keys.TEACHER_PROMPT_IDS: "BQ",
    keys.TEACHER_PROMPT_MASK: "BQ",
    "gopd_teacher_logps": "BT",
    "gopd_reference_logps": "BT",
    "gopd_top_ids": "BTk",
    "gopd_top_logps": "BTk",
}
IDS = (keys.PROMPT_IDS, keys.COMPLETION_IDS, keys.TEACHER_PROMPT_IDS)
MASKS = (keys.PROMPT_MASK, keys.COMPLETION_MASK, keys.TEACHER_PROMPT_MASK, keys.TOOL_MASK)


def write_rollouts(path: Path, rollouts: list[dict[str, Any]]) -> None:
    """Writes micro-batches, dictionaries of TRL to which the keys of ours were added."""
    with written_whole(path) as part:
        torch.save(_on("cpu", rollouts), part)


def read_rollouts(
    path: Path, device: Any, *, micro_batches: int, rows: int, vocab_size: int, num_teachers: int
) -> list[dict[str, Any]]:
    """
    Micro-batches that `write_rollouts` wrote.

    Args:
        path (`Path`):
            The file.
        device (`torch.device`):
            Where the tensors are to be.
        micro_batches (`int`):
            How many of them a generation batch has.
        rows (`int`):
            Rows of each.
        vocab_size (`int`):
            Ids that the student has.
        num_teachers (`int`):
            How many teachers there are.

    Returns:
        `list[dict]`: the micro-batches.

    Raises:
        `ValueError`: If the file is missing, cannot be read, or holds something else.
    """
    remedy = "Resume from another checkpoint; to go on from the weights alone, pass the folder as `model`."
    if not path.is_file():
        raise ValueError(f"{path} is missing, which holds the rest of a generation batch. {remedy}")
    try:
        stored = _load(path)
        _check(stored, micro_batches=micro_batches, rows=rows, vocab_size=vocab_size, num_teachers=num_teachers)
    except Exception as error:  # of pickles that are no pickles, torch raises errors of many classes
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
    rollouts: list[dict[str, Any]] = _on(device, stored)
    return rollouts


def _load(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("its entries are compressed, which torch never does")
    # torch cannot restore to "cpu:0", the device of a rank without an accelerator
    return torch.load(path, map_location="cpu", weights_only=True)


def _check(stored: Any, *, micro_batches: int, rows: int, vocab_size: int, num_teachers: int) -> None:
    if not isinstance(stored, list) or len(stored) != micro_batches:
        size = f"of {len(stored)} entries" if isinstance(stored, list) else ""
        raise ValueError(f"it holds a {type(stored).__name__} {size} instead of {micro_batches} micro-batches")
    for micro_batch in stored:
        if not isinstance(micro_batch, dict):
            raise ValueError(f"a micro-batch is a {type(micro_batch).__name__}")
        sizes = {"B": rows}
        for name, axes in (REQUIRED | OPTIONAL).items():
            if name in REQUIRED or micro_batch.get(name) is not None:
                _check_tensor(micro_batch.get(name), name, axes, sizes)
        _check_values(micro_batch, vocab_size=vocab_size, num_teachers=num_teachers)
        for name, value in micro_batch.items():
            # A view of a few numbers may pretend to be large, and a list to have another row each.
            if isinstance(value, Tensor) and not value.is_contiguous():
                raise ValueError(f"`{name}` is not contiguous")
            is_per_row = isinstance(value, list) or isinstance(value, Tensor) and value.ndim > 0
            if is_per_row and len(value) != rows:
                raise ValueError(f"`{name}` has {len(value)} rows instead of {rows}")


def _check_tensor(value: Any, name: str, axes: str, sizes: dict[str, int]) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"`{name}` is a {type(value).__name__} instead of a tensor")
    shape = tuple(value.shape)
    if value.ndim != len(axes) or any(sizes.setdefault(a, size) != size for a, size in zip(axes, shape, strict=True)):
        raise ValueError(f"`{name}` has the shape {shape}, which does not fit {sizes}")
    is_whole = not value.is_floating_point() and not value.is_complex()
    if is_whole != (name in (*IDS, *MASKS, keys.TEACHER_INDEX, keys.ROW, "gopd_top_ids")):
        raise ValueError(f"`{name}` has the dtype {value.dtype}")


def _check_values(micro_batch: Mapping[str, Any], *, vocab_size: int, num_teachers: int) -> None:
    highest = dict.fromkeys(IDS, vocab_size) | dict.fromkeys(MASKS, 2) | {keys.TEACHER_INDEX: num_teachers}
    for name, end in highest.items():
        value = micro_batch.get(name)
        if value is not None and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < end:
            raise ValueError(f"`{name}` has numbers that are not in [0, {end})")


def _on(device: Any, value: Any) -> Any:
    """A copy with all tensors on a device, each with a memory of its own: of slices, each would save the whole."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True).contiguous()
    if isinstance(value, dict):
        return {key: _on(device, part) for key, part in value.items()}
    return [_on(device, part) for part in value] if isinstance(value, list | tuple) else value
