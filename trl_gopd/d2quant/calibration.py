"""
Token windows for calibration: consecutive pieces of a text, of which some are drawn with a seed.

As in [GPTQ](https://huggingface.co/papers/2210.17323), the texts of a data set are joined, tokenized once without
special tokens, and cut into windows of running text, without padding. Where the hub cannot be reached, there is a text
that every installation of Python contains: the reference of the language.

Models whose tokenizer begins text with a beginning-of-sequence token (BOS), such as Gemma and Llama, were trained with
it and compute something else without it. Every window of text begins with it then.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging


logger = logging.get_logger(__name__)

WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
# Between two texts, as in GPTQ and in common evaluations of perplexity on WikiText-2.
SEPARATOR = "\n\n"
ACCEPTED = (
    "`dataset` may be None (the embedded text), 'wikitext2', the path of a text file, a list of strings, a data set "
    "whose rows have `text`, `messages` or `input_ids`, token lists, or an integer tensor (rows, tokens)."
)


def calibration_windows(
    dataset: Any,
    tokenizer: Any,
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    vocab_size: int | None = None,
    add_bos_token: bool | None = None,
) -> Tensor:
    """
    Windows of tokens, drawn without replacement.

    Args:
        dataset (`str`, `os.PathLike`, `Iterable`, `torch.Tensor` or `None`):
            Where the tokens come from:

            - `None`: [`embedded_text`]`("calibration")`; that it is used is logged once;
            - `"wikitext2"`: the training split of WikiText-2, from the hub;
            - a path: a text file in UTF-8;
            - strings, or rows with a column `text`, or rows with `messages`, which the chat template renders. They
              are joined, in order, and cut into windows. An iterable is read to its end;
            - integer tensors or lists, alone, in a column `input_ids`, or as one tensor `(rows, tokens)`: each row of
              at least `seq_length` tokens is a window, cut after that many. Tokens that the row's `attention_mask`
              hides are left out, and no token is added.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], `str` or `None`):
            Tokenizer, or its folder or name on the hub. Tokens need none.
        num_samples (`int`):
            Number of windows to draw.
        seq_length (`int`):
            Tokens in a window.
        seed (`int`):
            Seed of the draw.
        vocab_size (`int`, *optional*):
            Number of rows of the model's embedding; all ids must be smaller.
        add_bos_token (`bool`, *optional*):
            Whether every window of text begins with the tokenizer's BOS, see [`token_windows`].

    Returns:
        `torch.Tensor` of shape `(num_samples, seq_length)`: int64, on the CPU.

    Raises:
        `ValueError`: if there are too few tokens, one is outside the vocabulary, or the tokenizer has no BOS to add.
        `TypeError`: if `dataset` is none of the above, or text comes without a tokenizer.
        `FileNotFoundError`: if `dataset` is a path where no file is.
        `ConnectionError`: if WikiText-2 cannot be loaded.

    Example:

    ```python
    >>> import torch
    >>> from trl_gopd.d2quant.calibration import calibration_windows

    >>> rows = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    >>> calibration_windows(rows, None, num_samples=2, seq_length=2, seed=0).shape
    torch.Size([2, 2])

    ```
    """
    for name, value in (("num_samples", num_samples), ("seq_length", seq_length)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}. GPTQ uses 128 windows of 2048.")
    data = _read(dataset, tokenizer)
    if isinstance(data, str):
        windows = token_windows(data, tokenizer, seq_length, add_bos_token=add_bos_token)
    else:
        long = [row[:seq_length] for row in data if len(row) >= seq_length]
        if len(long) < len(data):
            logger.warning(f"{len(data) - len(long)} calibration rows have under {seq_length} tokens: left out.")
        windows = torch.stack(long) if long else torch.empty(0, seq_length, dtype=torch.int64)
    if len(windows) < num_samples:
        raise ValueError(
            f"`dataset` must have {num_samples} windows of {seq_length} tokens (`num_samples`, `seq_length`), got "
            f"{len(windows)}. Give more data, or lower one of the two."
        )
    check_ids(windows, vocab_size)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:num_samples]
    return windows[drawn]


def token_windows(text: str, tokenizer: Any, seq_length: int, *, add_bos_token: bool | None = None) -> Tensor:
    """
    All consecutive windows of a text. Tokens that do not fill a last window are left out.

    A window is either `seq_length` tokens of the text, or BOS and `seq_length - 1` tokens of the text. It never begins
    with two BOS: where its text begins with one, as rendered chats do, none is added. There are no other special
    tokens.

    Args:
        text (`str`):
            Running text.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`):
            Tokenizer, or its folder or name on the hub.
        seq_length (`int`):
            Tokens in a window.
        add_bos_token (`bool`, *optional*):
            Whether every window begins with BOS. By default it does if the tokenizer begins text with it when it is
            called: that of Gemma or Llama does, that of Qwen or SmolLM2 does not.

    Returns:
        `torch.Tensor` of shape `(windows, seq_length)`: int64, at least one row.

    Raises:
        `ValueError`: if the text does not fill a window, or the tokenizer has no BOS to add.
    """
    tokenizer = _load(tokenizer)
    # `verbose=False`: the text is meant to be longer than the model's context, and is cut below.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    bos = torch.tensor(_bos(tokenizer, add_bos_token), dtype=torch.int64)
    windows, start = [], 0
    while True:
        prefix = bos[:0] if torch.equal(ids[start : start + 1], bos) else bos
        stop = start + seq_length - len(prefix)
        if stop > len(ids) or stop == start:
            break
        windows.append(torch.cat([prefix, ids[start:stop]]))
        start = stop
    if not windows:
        raise ValueError(
            f"The text must fill a window of {seq_length} tokens (`seq_length`), got {len(ids) + len(bos)}. Give more "
            "text, or lower it."
        )
    return torch.stack(windows)


def _bos(tokenizer: Any, add_bos_token: bool | None) -> list[int]:
    """The id that windows begin with, in a list, which is empty if they begin with none."""
    token_id: Any = getattr(tokenizer, "bos_token_id", None)
    if add_bos_token is None:
        # What a call adds, rather than `tokenizer.add_bos_token`, which many tokenizers lack and others ignore.
        plain, text = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        add_bos_token = token_id is not None and text[:1] == [token_id] != plain[:1]
        if add_bos_token:
            logger.warning_once(
                f"Every window begins with {tokenizer.bos_token!r}, as the tokenizer begins text with it. To leave it "
                "out, pass `add_bos_token=False`."
            )
    elif add_bos_token and token_id is None:
        raise ValueError(
            f"`add_bos_token` must be False for a tokenizer without a `bos_token`, got {add_bos_token}. Leave it out."
        )
    return [token_id] if add_bos_token else []


def check_ids(windows: Tensor, vocab_size: int | None) -> None:
    """Raises a `ValueError` if an id of `windows` has no row in an embedding of `vocab_size` rows."""
    lowest, highest = int(windows.min()), int(windows.max())
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        outside = lowest if lowest < 0 else highest
        known = "0" if vocab_size is None else f"0 to {vocab_size - 1}, the vocabulary of the model"
        raise ValueError(f"Token ids must be from {known}, got {outside}. Tokenize with the model's own tokenizer.")


def embedded_text(split: Literal["calibration", "evaluation"]) -> str:
    """
    English prose from Python's language reference, `pydoc_data.topics`: 290,000 characters for calibration, 80,000
    for evaluation.

    Whole topics belong to either part, every fourth by length to evaluation. Topics quote each other, so a paragraph
    is kept once, and never in both parts. The text is that of the running Python and changes with its version.

    Args:
        split (`str`):
            `"calibration"` or `"evaluation"`.

    Returns:
        `str`: paragraphs, separated by empty lines.
    """
    if split not in ("calibration", "evaluation"):
        raise ValueError(f"`split` must be 'calibration' or 'evaluation', got {split!r}. Name one of them.")
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions leave it out
        raise ImportError("This Python lacks `pydoc_data`, the embedded text. Give a text file instead.") from error

    by_length = sorted(topics, key=lambda name: (-len(topics[name]), name))
    evaluation = by_length[3::4]
    parts: dict[str, list[str]] = {"evaluation": [], "calibration": []}
    seen = set()
    for part, names in (("evaluation", evaluation), ("calibration", [n for n in by_length if n not in evaluation])):
        for paragraph in SEPARATOR.join(topics[name] for name in names).split(SEPARATOR):
            words = " ".join(paragraph.split())  # quotes differ in indentation and line breaks
            if words and words not in seen:
                seen.add(words)
                parts[part].append(paragraph.strip("\n"))
    return SEPARATOR.join(parts[split])


def read_text(path: str | os.PathLike[str]) -> str:
    """Content of a text file in UTF-8; one clear error if there is none."""
    # `os.path` answers False where `pathlib` raises: for a text that was given in place of a path.
    if not os.path.isfile(path):
        shown = str(path) if len(str(path)) <= 100 else f"{str(path)[:100]}…"
        raise FileNotFoundError(f"There is no text file {shown!r}. {ACCEPTED}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not text in UTF-8. Load it with `datasets.load_dataset` and pass that, or convert it."
        ) from error


def _load(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise TypeError("Text needs a `tokenizer`, got None. Pass the model's tokenizer, its folder or its name.")
    return AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer


def _read(dataset: Any, tokenizer: Any) -> str | list[Tensor]:
    """The joined text of `dataset`, or its rows of tokens."""
    if dataset is None:
        logger.warning_once("No calibration set was given: using the embedded text, Python's language reference.")
        return embedded_text("calibration")
    if isinstance(dataset, str | os.PathLike):
        return _join(_wikitext2()) if dataset == "wikitext2" else read_text(dataset)
    if isinstance(dataset, Mapping):
        raise TypeError(f"`dataset` must not be a mapping, got one of {list(dataset)}. Pass one of these.")
    if not isinstance(dataset, Iterable):
        raise TypeError(f"`dataset` must not be of type {type(dataset).__name__}. {ACCEPTED}")
    rows = list(dataset)
    if not rows:
        raise ValueError(f"`dataset` is empty, it has no rows. {ACCEPTED}")

    first = rows[0]
    if isinstance(first, str):
        return _join(rows)
    if not isinstance(first, Mapping):
        return [_token_row(row) for row in rows]
    if "input_ids" in first:
        return [_token_row(row["input_ids"], row.get("attention_mask")) for row in rows]
    if "text" in first:
        return _join([row["text"] for row in rows])
    if "messages" in first:
        tokenizer = _load(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("`messages` need a tokenizer with a chat template, got one without. Pass `text` instead.")
        # Nothing between them: a template ends a conversation itself.
        return "".join(tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows)
    raise ValueError(f"The rows have no known column, got {list(first)}. {ACCEPTED}")


def _join(texts: list[Any]) -> str:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Row {index} must be a string like the first, got {text!r:.100}. Remove or convert it.")
    return SEPARATOR.join(texts)


def _token_row(ids: Any, attention_mask: Any = None) -> Tensor:
    try:
        row = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"A row of tokens must be a list of integers, got {ids!r:.100}. {ACCEPTED}") from error
    if row.dim() != 1 or row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
        raise TypeError(
            f"A row of tokens must be one-dimensional and of integers, got shape {tuple(row.shape)} and {row.dtype}. "
            f"{ACCEPTED}"
        )
    if attention_mask is not None:
        row = row[torch.as_tensor(attention_mask, device=row.device).bool()]
    return row.to("cpu", torch.int64)


def _wikitext2() -> list[str]:
    from datasets import load_dataset

    try:
        texts: list[str] = load_dataset(*WIKITEXT2, split="train")["text"]
    except OSError as error:  # also what the hub's client raises: offline, not found, not allowed
        raise ConnectionError(
            f"WikiText-2 ({WIKITEXT2[0]}) could not be loaded: {error}. Connect to the hub, or pass a text file, or "
            "None for the embedded text."
        ) from error
    return texts
