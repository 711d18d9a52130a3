"""
Signs that training goes wrong: completions that do not end, repeat themselves or change in length, pressure on the end
of sequence, and the reward of each token.

The functions read the tensors of one process and return something that processes can add (`masked_sum`) or gather
(rows); they do not communicate. A mask is 1 where a token counts, and what other tensors hold elsewhere is ignored.
Divergences, advantages and the fraction of clipped rewards are measured where they are computed, in the trainer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """
    Sum of `values` where `mask` is set, and their number. Summed over micro-batches and ranks, the ratio of the two is
    the mean.

    Args:
        values (`torch.Tensor`):
            Any shape and dtype.
        mask (`torch.Tensor`):
            Same shape.

    Returns:
        `torch.Tensor` of shape `(2,)`: float32, detached.
    """
    counted = mask.bool()
    return torch.stack([values.detach().float().masked_fill(~counted, 0.0).sum(), counted.sum().float()])


def is_eos(completion_ids: Tensor, mask: Tensor, eos_token_ids: int | Sequence[int]) -> Tensor:
    """
    Tokens that end a sequence, as a mask for `masked_sum`.

    The mean of log π* − log π_ref over these tokens is the earliest sign of a length bias. Extrapolation weighs it by
    λ − 1, so a teacher that ends later than its reference makes the student end later still, and the mean shows that
    before the completions have grown. The mean of their advantages is the total pressure on the end.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Sampled ids.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token counts. It distinguishes an end from padding where both have the same id.
        eos_token_ids (`int` or `Sequence[int]`):
            The id or ids that end a sequence.

    Returns:
        `torch.Tensor` of shape `(B, T)`: bool.
    """
    ends = torch.as_tensor(eos_token_ids, device=completion_ids.device)
    return torch.isin(completion_ids, ends) & mask.bool()


def is_truncated(completion_ids: Tensor, mask: Tensor, eos_token_ids: int | Sequence[int]) -> Tensor:
    """
    Whether the last token of a completion is not an end, as in a completion that reached the length limit.

    Turns of a conversation end too, so an end that is not the last token does not count. A completion without a token
    is truncated, because `mask_truncated_completions` empties the mask of truncated ones.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Sampled ids.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for all tokens of the completion, those that tools wrote included.
        eos_token_ids (`int` or `Sequence[int]`):
            The id or ids that end a sequence.

    Returns:
        `torch.Tensor` of shape `(B,)`: bool.
    """
    counted = mask.bool()
    is_last = counted.cumsum(1) == counted.sum(
        1, keepdim=True
    )  # also true of masked tokens after it, which are no end
    return ~(is_eos(completion_ids, mask, eos_token_ids) & is_last).any(1)


def repetition(completion_ids: Tensor, mask: Tensor, n: int = 4) -> Tensor:
    """
    Fraction of a completion's n-grams that occurred in it before: 1 − distinct / all.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Sampled ids, 0 or greater where they count.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token counts. No n-gram spans a gap in it.
        n (`int`, *optional*, defaults to `4`):
            Tokens in an n-gram.

    Returns:
        `torch.Tensor` of shape `(B,)`: float32 in [0, 1); 0 for a completion that is shorter than an n-gram.
    """
    batch, length = completion_ids.shape
    if length < n:
        return torch.zeros(batch, device=completion_ids.device)
    is_whole = mask.bool().unfold(1, n, 1).all(-1)
    grams, rows = completion_ids.unfold(1, n, 1)[is_whole], is_whole.nonzero()[:, 0]
    vocabulary = int(grams.max()) + 1 if len(grams) else 1
    # Each n-gram becomes one number, a token at a time. The numbers are made small again after each token, so that no
    # product can overflow.
    numbers, codes = rows, rows
    for tokens in grams.unbind(1):
        numbers, codes = torch.unique(codes * vocabulary + tokens, return_inverse=True)
    row_of_number = rows.new_zeros(len(numbers)).scatter_(0, codes, rows)
    distinct, total = torch.bincount(row_of_number, minlength=batch), is_whole.sum(1)
    return (total - distinct).float() / total.clamp(min=1)


def completion_rows(completion_ids: Tensor, mask: Tensor, eos_token_ids: int | Sequence[int]) -> Tensor:
    """
    Length, truncation and repetition of each completion, in one tensor, so that one gather from all ranks is enough
    for `summarize_completions`.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Sampled ids.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for all tokens of the completion.
        eos_token_ids (`int` or `Sequence[int]`):
            The id or ids that end a sequence.

    Returns:
        `torch.Tensor` of shape `(B, 3)`: float32; the number of tokens, 1 if truncated and 0 if not, and the fraction
        of repeated 4-grams.
    """
    columns = (mask.bool().sum(1), is_truncated(completion_ids, mask, eos_token_ids), repetition(completion_ids, mask))
    return torch.stack([column.float() for column in columns], dim=1)


@dataclass(frozen=True)
class CompletionSummary:
    """
    Statistics of a batch of completions.

    Args:
        mean_length (`float`): Mean number of tokens.
        p95_length (`float`): 95th percentile of the number of tokens, interpolated.
        truncated_share (`float`): Fraction of completions that are truncated.
        repetition (`float`): Mean fraction of repeated 4-grams.
    """

    mean_length: float
    p95_length: float
    truncated_share: float
    repetition: float


def summarize_completions(rows: Tensor) -> CompletionSummary:
    """
    Summary of the `completion_rows` of all micro-batches and ranks.

    Args:
        rows (`torch.Tensor` of shape `(N, 3)`):
            At least one row.

    Returns:
        [`CompletionSummary`].
    """
    mean_length, truncated_share, mean_repetition = rows.mean(0).tolist()
    p95_length = torch.quantile(rows[:, 0], 0.95).item()
    return CompletionSummary(mean_length, p95_length, truncated_share, mean_repetition)


def topk_overlap(student_ids: Tensor, teacher_ids: Tensor) -> Tensor:
    """
    Fraction of the teacher's k likeliest ids that are among the student's.

    Args:
        student_ids (`torch.Tensor` of shape `(N, k)`):
            The student's k likeliest ids at N positions, without duplicates, in any order.
        teacher_ids (`torch.Tensor` of shape `(N, k)`):
            The same for the teacher.

    Returns:
        `torch.Tensor` of shape `(N,)`: float32 in [0, 1].

    Raises:
        `ValueError`: If the shapes differ.
    """
    if student_ids.shape != teacher_ids.shape:
        raise ValueError(
            f"`student_ids` and `teacher_ids` must have one shape (N, k), got {tuple(student_ids.shape)} and "
            f"{tuple(teacher_ids.shape)}. Take as many ids of both models."
        )
    return (student_ids.unsqueeze(2) == teacher_ids.unsqueeze(1)).any(1).float().mean(1)


def token_table(
    tokens: Sequence[Sequence[str]],
    *,
    student_logps: Tensor,
    teacher_logps: Tensor,
    reference_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
) -> list[dict[str, int | float | str | None]]:
    """
    Log-probabilities and advantage of each token, as rows for a logged table or for `visualize.advantages_html`.

    Args:
        tokens (`Sequence[Sequence[str]]`):
            T strings for each of B completions.
        student_logps (`torch.Tensor` of shape `(B, T)`):
            Nats of the tokens under the student.
        teacher_logps (`torch.Tensor` of shape `(B, T)`):
            The same under the teacher.
        reference_logps (`torch.Tensor` of shape `(B, T)` or `None`):
            The same under the reference, when there is one.
        advantages (`torch.Tensor` of shape `(B, T)`):
            What `objective.token_advantages` returned.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token is trained on. The others are left out.

    Returns:
        `list[dict]`: one a token, in order, with `completion` and `position` (counted from 0), `token`,
        `student_logp`, `teacher_logp`, `reference_logp` (`None` without a reference) and `advantage`.

    Raises:
        `ValueError`: If there are not B times T strings.

    Example:

    ```python
    >>> import torch
    >>> from trl_gopd.gopd.monitors import token_table
    >>> rows = token_table(
    ...     [["Hi", "!"]],
    ...     student_logps=torch.tensor([[-1.0, -2.0]]),
    ...     teacher_logps=torch.tensor([[-0.5, -3.0]]),
    ...     reference_logps=None,
    ...     advantages=torch.tensor([[0.5, -1.0]]),
    ...     mask=torch.ones(1, 2),
    ... )
    >>> [(row["token"], row["advantage"]) for row in rows]
    [('Hi', 0.5), ('!', -1.0)]

    ```
    """
    lengths = [len(row) for row in tokens]
    if lengths != [mask.size(1)] * mask.size(0):
        raise ValueError(
            f"`tokens` must hold {mask.size(0)} rows of {mask.size(1)} strings, the shape of `mask`, got rows of "
            f"{lengths}. Give a string for padding too."
        )
    columns = {
        "student_logp": student_logps,
        "teacher_logp": teacher_logps,
        "reference_logp": reference_logps,
        "advantage": advantages,
    }
    counted = mask.bool()
    values = {
        name: [None] * int(counted.sum()) if column is None else column.detach().float()[counted].tolist()
        for name, column in columns.items()
    }
    return [
        {
            "completion": completion,
            "position": position,
            "token": tokens[completion][position],
            **{name: column[index] for name, column in values.items()},
        }
        for index, (completion, position) in enumerate(counted.nonzero().tolist())
    ]
