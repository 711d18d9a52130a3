"""
Frozen models behind a file of log-probabilities: a resumed run, another run, or one without any teacher in memory
reads them there.

A row is known by its ids without padding, but its numbers are those of the batch in which it was first scored: another
padding or autocast dtype would have rounded differently. Models with learned positions see padding on the left, and
are not for caching.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from tqdm.auto import tqdm

from ..batch import Sequences
from ..rollouts import pad_ids, token_ids
from .cache_file import LogprobCache, row_key
from .protocols import Scorer


logger = logging.getLogger(__name__)


class CachedScorer:
    """
    Scores like the model it wraps, but no row twice.

    Args:
        wrapped ([`Scorer`] or `None`):
            The model. `None` for none: then all rows have to be stored.
        path (`str` or `os.PathLike`), temperature (`float`):
            As for [`LogprobCache`].

    Attributes:
        hits (`int`):
            Rows answered without the model so far, on this rank. Rows without completion tokens are not counted.
        misses (`int`):
            Rows that the model had to score.
        damaged (`int`):
            Those of them that were stored, but damaged. They are scored anew and replaced.
    """

    def __init__(self, wrapped: Scorer | None, path: str | os.PathLike[str], *, temperature: float) -> None:
        self.wrapped = wrapped
        identity = None if wrapped is None else wrapped.identity()
        self.cache = LogprobCache(path, temperature=temperature, identity=identity)
        self.hits = self.misses = self.damaged = 0
        self._has_warned = False

    @property
    def is_sharded(self) -> bool:
        """Whether all ranks have to call it together."""
        return self.wrapped is not None and self.wrapped.is_sharded

    @property
    def context(self) -> int | None:
        """How many tokens the model can read, if that is known."""
        return None if self.wrapped is None else self.wrapped.context

    def identity(self) -> dict[str, Any]:
        """What tells the model from another one."""
        return self.cache.identity if self.wrapped is None else self.wrapped.identity()

    def score(self, sequences: Sequences) -> Tensor:
        """
        Log-probabilities of the scored tokens.

        Only rows that are not stored go through the model, each with the padding that it has here, and then all
        tokens of their completions are scored and stored. As soon as one rank misses a row, all of them call a sharded
        model, each with the rows that it misses.

        Args:
            sequences ([`Sequences`]):
                Prompts of at least one token, padded left, and completions, padded right.

        Returns:
            `torch.Tensor` of shape `(B, T)`: float32 nats; 0 for tokens that are not scored.

        Raises:
            `ValueError`: If a mask has a gap, or rows are missing and there is no model.
            `OSError`: If the file cannot be used, or rows in it are damaged and there is no model.
        """
        input_ids, mask, num_tokens = sequences.input_ids, sequences.attention_mask.bool().cpu(), sequences.num_tokens
        written = mask[:, input_ids.size(1) - num_tokens :]
        keys = _row_keys(input_ids.cpu(), mask, num_tokens)
        lengths = {key: n for key, n in zip(keys, written.sum(1).tolist(), strict=True) if key is not None}
        known, damaged = self.cache.read(lengths)
        missing = {key: row for row, key in enumerate(keys) if key is not None and key not in known}
        self.misses += len(missing)
        self.hits += sum(key is not None for key in keys) - len(missing)
        self.damaged += len(damaged)
        if damaged:
            self._report(len(damaged), len(keys))

        called, calls = list(missing.values()), bool(missing)
        if self.wrapped is not None and self.wrapped.is_sharded:
            calls = bool(gather(torch.tensor([len(called)], device=input_ids.device)).any())
        if calls:
            if self.wrapped is None:
                raise ValueError(
                    f"{len(called)} of {len(keys)} rows are not among the {len(self.cache)} in {self.cache.path}, and "
                    "there is no model to score them. Score them first with `precompute`, given the very ids of "
                    "prompts (as the chat template renders them) and completions, or pass the model."
                )
            rows = torch.tensor(called, dtype=torch.long, device=input_ids.device)
            logps = self.wrapped.score(Sequences.of(input_ids[rows], sequences.attention_mask[rows], num_tokens))
            scored = dict(zip(called, logps.float().cpu(), strict=True))
            fresh = {key: scored[row][written[row]] for key, row in missing.items()}
            self.cache.write(fresh, damaged)
            known |= fresh

        result = torch.zeros(sequences.scored.shape, dtype=torch.float32)
        for row, key in enumerate(keys):
            if key is not None:
                result[row, written[row]] = known[key]
        return result.to(input_ids.device).masked_fill(~sequences.scored, 0.0)

    def _report(self, damaged: int, asked: int) -> None:
        found = f"{damaged} of {asked} rows in {self.cache.path} are damaged: they are no longer what was written"
        if self.wrapped is None:
            raise OSError(
                f"{found}, and there is no model to score them. Score them anew with `precompute`, or pass the model, "
                "and look at the disk."
            )
        if not self._has_warned:
            logger.warning("%s. Damaged rows are scored anew and replaced. Look at the disk.", found)
            self._has_warned = True


def precompute(
    scorer: Scorer,
    path: str | os.PathLike[str],
    rollouts: Sequence[Mapping[str, Any]],
    *,
    temperature: float,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> int:
    """
    Scores stored rollouts into a cache. What is there already is skipped, so an interrupted call can be repeated.

    Ranks may divide the rollouts among them (`Dataset.shard`), and may write to one file. If the model is sharded, all
    have to pass the same.

    Args:
        scorer ([`Scorer`]):
            The model.
        path (`str` or `os.PathLike`), temperature (`float`):
            As for [`LogprobCache`].
        rollouts ([`~datasets.Dataset`] or `Sequence[Mapping[str, Any]]`):
            Rows with `prompt_ids` and `completion_ids`, lists of at least one id: what this model reads before the
            completion, and the completion with its end.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows that are scored, and then stored, at a time.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the model takes its ids: `accelerator.device`, unless it is served.

    Returns:
        `int`: How many rows were scored.

    Raises:
        `ValueError`: If `batch_size` is below 1, or a row has no such lists. Nothing is scored then.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    columns = ("prompt_ids", "completion_ids")
    lengths = [
        sum(len(token_ids(row, column, number=number)) for column in columns) for number, row in enumerate(rollouts)
    ]
    # Neighbours of like length need little padding, and what does not fit in memory shows at once.
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    cached = CachedScorer(scorer, path, temperature=temperature)
    with tqdm(total=len(order), desc="Scoring", unit="completion", disable=None) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            prompts, completions = (
                [token_ids(rollouts[number], column, number=number) for number in numbers] for column in columns
            )
            prompt_ids, prompt_mask = pad_ids(prompts, side="left", device=device)
            completion_ids, completion_mask = pad_ids(completions, side="right", device=device)
            ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
            cached.score(Sequences.of(ids, mask, completion_ids.size(1)))
            bar.update(len(numbers))
    return cached.misses


def _row_keys(input_ids: Tensor, mask: Tensor, num_tokens: int) -> list[bytes | None]:
    """Keys of rows, `None` of one without completion tokens, which has no log-probabilities."""
    length = input_ids.size(1) - num_tokens
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    is_scored = mask[:, length:].any(1)
    # Padding is no part of the key, so it may not move the tokens against each other.
    broken = is_scored & ((starts > 1) | ~mask[:, :length].any(1))
    if bool(broken.any()):
        raise ValueError(
            f"Rows {broken.nonzero().flatten().tolist()} of `attention_mask` have a gap between tokens, or no prompt. "
            "Give prompts of at least one token padded left, and completions padded right."
        )
    return [
        row_key(ids[:length][seen[:length]].tolist(), ids[length:][seen[length:]].tolist()) if scored else None
        for ids, seen, scored in zip(input_ids, mask, is_scored.tolist(), strict=True)
    ]
