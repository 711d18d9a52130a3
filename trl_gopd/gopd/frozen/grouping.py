"""
Which rows of a batch a frozen model reads together.

Rows are cut to the tokens that have to be read, and those of like length share a forward under a budget of positions.
Every row begins at the first column, so that neither positions nor a causal mask depend on the padding.
"""

from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor

from ..batch import Sequences


# Padding of all groups together, as a share of the tokens.
MAX_PADDING = 1 / 8
# The best groups of n sorted rows are found in n² steps for each group; more rows than these are grouped piecemeal.
MAX_ROWS = 256


def align(sequences: Sequences) -> Sequences:
    """
    The same rows without padding on the left and without what comes after the last scored token.

    Args:
        sequences ([`Sequences`]):
            Rows padded on any side.

    Returns:
        [`Sequences`]: rows that begin at the first column, with `T = L - 1`. Columns after the end of a row hold its
        first id and are not seen. Rows without scored tokens are empty.

    Raises:
        `ValueError`: If a scored token is not seen, or no seen token precedes it.
    """
    ids, seen = sequences.input_ids, sequences.attention_mask.bool()
    scored = torch.zeros_like(seen)
    scored[:, seen.size(1) - sequences.num_tokens :] = sequences.scored
    if bool((scored & ~(seen & (seen.cumsum(1) > 1))).any()):
        raise ValueError(
            "A token is to be scored that is masked, or that is the first of its row, before which a model predicts "
            "nothing. Give prompts of at least one token, and score tokens that `attention_mask` shows."
        )
    kept = seen & (scored.flip(1).cumsum(1).flip(1) > 0)
    lengths = kept.sum(1)
    width = max([1, *lengths.tolist()])
    order = (~kept).long().argsort(dim=1, stable=True)[:, :width]
    is_token = torch.arange(width, device=ids.device) < lengths.unsqueeze(1)
    ids, scored = ids.gather(1, order), scored.gather(1, order) & is_token
    # A token of its own, since the embedding of a padding token may be anything.
    return Sequences(torch.where(is_token, ids, ids[:, :1]), is_token.long(), scored[:, 1:])


def cut(aligned: Sequences, rows: Tensor) -> Sequences:
    """Some of the rows that [`align`] returned, no wider than the longest of them."""
    part = aligned[rows]
    width = int(part.lengths.max())
    return Sequences(part.input_ids[:, :width], part.attention_mask[:, :width], part.scored[:, : width - 1])


def plan_groups(lengths: list[int], max_tokens: int, *, is_packed: bool = False) -> list[list[int]]:
    """
    The fewest groups of rows with little padding: at most `MAX_PADDING` of the tokens.

    Args:
        lengths (`list[int]`):
            Tokens of the rows. Rows of none are in no group.
        max_tokens (`int`):
            Positions of a group, padding included. A row that is longer has a group of its own.
        is_packed (`bool`, *optional*, defaults to `False`):
            Whether a group is one row without padding.

    Returns:
        `list[list[int]]`: rows of each group, the longest first.
    """
    order = _longest_first(lengths)
    groups = []
    for start in range(0, len(order), MAX_ROWS):
        part = order[start : start + MAX_ROWS]
        bounds = _split([lengths[row] for row in part], max_tokens, is_packed)
        groups += [part[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
    return groups


def plan_rounds(lengths: list[int], max_tokens: int, ranks: int, *, is_packed: bool = False) -> list[list[list[int]]]:
    """
    The fewest rounds in which every rank has one group at most, of groups as even as can be.

    Args:
        lengths (`list[int]`):
            Tokens of the rows of all ranks. Rows of none are in no group.
        max_tokens (`int`), is_packed (`bool`, *optional*, defaults to `False`):
            As for [`plan_groups`].
        ranks (`int`):
            How many ranks there are.

    Returns:
        `list[list[list[int]]]`: for each round the rows of each rank's group, which may be none.
    """
    order = _longest_first(lengths)
    sizes = [lengths[row] for row in order]
    num_rounds = -(-(len(_fill(sizes, max_tokens, is_packed)) - 1) // ranks)
    # The least budget that needs no more rounds: all ranks wait for the one with the largest group.
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_fill(sizes, middle, is_packed)) - 1 <= num_rounds * ranks:
            high = middle
        else:
            low = middle + 1
    bounds = _fill(sizes, high, is_packed)
    groups = [order[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
    groups += [[] for _ in range(num_rounds * ranks - len(groups))]
    return [groups[start : start + ranks] for start in range(0, len(groups), ranks)]


def _longest_first(lengths: list[int]) -> list[int]:
    return sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])


def _fill(sizes: list[int], max_tokens: int, is_packed: bool) -> list[int]:
    """Where groups of descending sizes begin and end, each filled as far as the budget allows."""
    sums = [0, *accumulate(sizes)]
    bounds = [0]
    while bounds[-1] < len(sizes):
        start = bounds[-1]
        if is_packed:
            end = bisect_right(sums, sums[start] + max_tokens) - 1
        else:
            end = start + max_tokens // sizes[start]
        bounds.append(min(max(end, start + 1), len(sizes)))
    return bounds


def _split(sizes: list[int], max_tokens: int, is_packed: bool) -> list[int]:
    """Where the groups of [`plan_groups`] begin and end, of descending sizes."""
    count = len(sizes)
    ends = torch.arange(count + 1, dtype=torch.float64)
    starts = ends.unsqueeze(1)
    sums = torch.tensor([0, *accumulate(sizes)], dtype=torch.float64)
    padded = torch.tensor([*sizes, 0], dtype=torch.float64).unsqueeze(1) * (ends - starts)
    # Positions of a group from a start (first axis) to an end (second axis).
    positions = sums - sums.unsqueeze(1) if is_packed else padded
    positions = positions.masked_fill((ends <= starts) | (positions > max_tokens) & (ends > starts + 1), torch.inf)
    least = torch.full((count + 1,), torch.inf, dtype=torch.float64)  # positions of the rows up to an end
    least[0] = 0
    history = []
    while least[count] > (1 + MAX_PADDING) * sums[count]:  # one group more at a time; with one a row there is none
        least, before = (least.unsqueeze(1) + positions).min(0)
        history.append(before.tolist())
    bounds = [count]
    for before_end in reversed(history):
        bounds.append(before_end[bounds[-1]])
    return bounds[::-1]
