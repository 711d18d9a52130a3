"""
Rollouts that were stored: rows with the token ids of a prompt and of its completion, which take the place of sampled
ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .frozen.protocols import ROUNDING


LOWEST = torch.finfo(torch.float32).min  # nats; what is below is infinite where it is used
LOGPS = "sampling_per_token_logps"  # GRPO's name for what the sampler gave its tokens


def token_ids(row: Mapping[str, Any], column: str, *, number: int) -> Tensor:
    """
    Token ids `(n,)`, int64, n at least 1, in a column of a row.

    Args:
        row (`Mapping[str, Any]`):
            Row of a data set.
        column (`str`):
            `"prompt_ids"` or `"completion_ids"`: a list of integers.
        number (`int`):
            Which row it is, for messages.

    Raises:
        `ValueError`: If the column is not there, or no such list.
    """
    given = row.get(column)
    ids = None
    if isinstance(given, list) and given and all(type(i) is int and 0 <= i < 2**63 for i in given):
        ids = torch.tensor(given)
    if ids is None:
        shown = "no such column" if column not in row else f"{type(given).__name__} {str(given)[:60]}"
        raise ValueError(
            f"`{column}` must be a list of at least one token id, integers from 0 on, in every row; row {number} has "
            f"{shown}. Store the ids that the sampler returned, and leave empty rows out."
        )
    return ids


def pad_ids(rows: Iterable[Sequence[int] | Tensor], *, side: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Ids, padded with 0, and attention mask `(B, L)`, both int64, of rows of ids; `side` is that of the padding."""
    ids = [torch.as_tensor(row) for row in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_side=side).to(device),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side).to(device),
    )


def stored_completions(
    rows: Sequence[Mapping[str, Any]], *, max_length: int
) -> tuple[list[list[int]], list[list[float]] | None]:
    """
    What [`~trl.GRPOTrainer`] takes for generated completions, from the columns of rows.

    They come from another policy μ than the student π. The states are μ's whatever is done. Given these, the estimator
    "full" needs no correction; "sampled" and "stratified" are unbiased with weights π(y)/μ(y), for which the column
    `sampling_per_token_logps` is read where it is there, and an approximation that is good for π near μ without.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Rows of the data set, in the order of the prompts, with `completion_ids`, the end of a sequence included,
            and, in all of them or in none, `sampling_per_token_logps`, a list of as many nats.
        max_length (`int`):
            `max_completion_length` of the run. A longer completion is refused, since what was stored for it belongs to
            all its tokens.

    Returns:
        `tuple`: the completions, lists of ids; and log μ of their tokens, lists of nats, or `None`.

    Raises:
        `ValueError`: If a row has no completion, one that is too long, or log-probabilities that do not fit.
    """
    completions = [token_ids(row, "completion_ids", number=number).tolist() for number, row in enumerate(rows)]
    for number, ids in enumerate(completions):
        if len(ids) > max_length:
            raise ValueError(
                f"`completion_ids` of row {number} of the batch has {len(ids)} ids, and `max_completion_length` is "
                f"{max_length}. Raise it, or leave longer rows out."
            )
    given = [row.get(LOGPS) for row in rows]
    if all(logps is None for logps in given):
        return completions, None
    for number, (logps, ids) in enumerate(zip(given, completions, strict=True)):
        if not isinstance(logps, list) or len(logps) != len(ids):
            size = len(logps) if isinstance(logps, list) else f"{type(logps).__name__} instead of a list"
            raise ValueError(
                f"`{LOGPS}` must have one number for each of the {len(ids)} `completion_ids` in row {number} of the "
                f"batch, got {size}. Complete the column, or drop it."
            )
        for value in logps:
            # A sampler that gave a token the probability 0 cannot have drawn it.
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not LOWEST <= value <= ROUNDING:
                raise ValueError(
                    f"`{LOGPS}` must have finite numbers of at most 0, nats of the sampled tokens, got {value!r} in "
                    f"row {number} of the batch. Correct the row, or leave it out."
                )
    return completions, [row[LOGPS] for row in rows]


def stored_ratio(
    student_logps: Tensor, sampler_logps: Sequence[Sequence[float]], mask: Tensor, largest: float | None
) -> Tensor:
    """
    Importance weights π/μ of the tokens of stored completions.

    Args:
        student_logps (`torch.Tensor` of shape `(B, T)`):
            Nats under the student, log π.
        sampler_logps (`Sequence[Sequence[float]]`):
            Nats under the sampler, log μ, as `stored_completions` returns them.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a completion has a token.
        largest (`float`, *optional*):
            Upper bound.

    Returns:
        `torch.Tensor` of shape `(B, T)`: float32, detached; 1 where `mask` is 0.
    """
    sampled = torch.zeros(mask.shape, device=mask.device)
    for number, logps in enumerate(sampler_logps):
        sampled[number, : len(logps)] = torch.tensor(logps)
    weights = ((student_logps.detach().float() - sampled) * mask).exp()
    return weights.clamp(max=largest)
