"""The prompts of a preflight: loading them, choosing among them, and turning them into token ids."""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
ACCEPTED = (
    "Pass the name of a data set, a JSON, JSONL, CSV or Parquet file with a column `prompt`, a .txt file with one "
    "prompt per line, a `Dataset`, or a list of prompts."
)


def load_prompts(prompts: Any, *, split: str = "train", name: str | None = None) -> Dataset:
    """
    Returns rows with a column `prompt`, whose values are strings or lists of messages.

    Args:
        prompts (`str` or `os.PathLike` or [`~datasets.Dataset`] or `list`):
            A file (.json, .jsonl, .csv or .parquet with a column `prompt`, or .txt with one prompt per line), a folder
            or name that [`~datasets.load_dataset`] accepts, a data set, or a list of prompts or of rows.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a data set that is given by name or folder.
        name (`str`, *optional*):
            Configuration of a data set that is given by name or folder.

    Returns:
        [`~datasets.Dataset`]: The rows, of which there is at least one.

    Raises:
        `TypeError`: If `prompts` has a type that is not accepted.
        `ValueError`: If no rows with prompts can be loaded.
    """
    if isinstance(prompts, str | os.PathLike):
        prompts = _read(Path(prompts), split, name)
    elif isinstance(prompts, list | tuple):
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
        try:
            prompts = Dataset.from_list(rows)
        except (ValueError, TypeError) as error:  # pyarrow raises these for mixed types
            raise TypeError(
                f"`prompts` must all be strings or all be lists of messages ({error}). {ACCEPTED}"
            ) from error
    if not isinstance(prompts, Dataset):
        raise TypeError(f"`prompts` must not be of type {type(prompts).__name__}. {ACCEPTED}")
    if not len(prompts):
        raise ValueError(f"`prompts` has no rows. {ACCEPTED}")
    if "prompt" not in prompts.column_names:
        raise ValueError(f"The rows have no column `prompt`, got {prompts.column_names}. {ACCEPTED}")
    return prompts


def choose(rows: Dataset, count: int, seed: int) -> Dataset:
    """
    Returns `count` rows in an order that `seed` decides. Rows are used again, about equally often, only if there are
    fewer than `count`.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.select([order[index % len(order)] for index in range(count)])


def tokenize(tokenizer: Any, rows: Dataset) -> list[list[int]]:
    """
    Returns the token ids of each prompt. The chat template is applied to messages, and strings are used unchanged.

    Raises:
        `TypeError`: If a prompt is neither a string nor a list of messages.
        `ValueError`: If a prompt has no tokens, or if there is no chat template for messages.
    """
    prompts = list(rows["prompt"])
    is_text = isinstance(prompts[0], str)
    if not is_text and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "Prompts of messages need a tokenizer with a chat template, got one without. Pass prompts that "
            "are strings, or set `chat_template`."
        )
    encoded = []
    for prompt in prompts:
        if is_text:
            ids = tokenizer(prompt)["input_ids"]
        elif _is_chat(prompt):
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            raise TypeError(
                f"A `prompt` must be a string or a list of messages with `role` and `content`, got {prompt!r:.100}. "
                f"{ACCEPTED}"
            )
        if not ids:
            raise ValueError(f"The prompt {prompt!r:.100} has no tokens. Remove the row.")
        encoded.append(ids)
    return encoded


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)


def _read(path: Path, split: str, name: str | None) -> Dataset:
    try:
        if not path.is_file():
            return load_dataset(str(path), name=name, split=split)
        if path.suffix in FILE_FORMATS:
            return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            return Dataset.from_dict({"prompt": [line for line in lines if line.strip()]})
    except (OSError, ValueError, DatasetsError, StopIteration) as error:  # an empty JSON file raises the last one
        reason = str(error) or "the file is empty"
        raise ValueError(f"No prompts could be loaded from {str(path)!r} ({reason}). {ACCEPTED}") from error
    raise ValueError(f"The file {str(path)!r} has the unknown ending {path.suffix!r}. {ACCEPTED}")
