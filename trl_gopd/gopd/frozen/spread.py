"""
A function of groups of rows, called for all rows of a batch: of this rank, or, if the model is sharded, of all ranks.

All ranks have to call a sharded model together, and every call gathers its weights. Rows are therefore spread evenly
over the ranks, whichever they come from: every rank calls it equally often, and as seldom as the budget allows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch import Sequences
from .grouping import align, cut, plan_groups, plan_rounds


# Values (n, ...) of the n scored tokens of a group, row by row.
GroupFunction = Callable[[Sequences], Tensor]


@dataclass(frozen=True)
class Budget:
    """
    How much a forward may hold.

    Args:
        batch_size (`int`):
            Rows as long as the longest of the batch, where `max_tokens` is not given.
        max_tokens (`int`, *optional*):
            Positions, padding included. A row that is longer is forwarded alone.
        is_packed (`bool`, *optional*, defaults to `False`):
            Whether rows stand one after another without padding.
    """

    batch_size: int
    max_tokens: int | None = None
    is_packed: bool = False

    def of(self, lengths: list[int]) -> int:
        """Positions of a forward, of rows of such lengths."""
        return self.max_tokens or self.batch_size * max([1, *lengths])


def over_groups(function: GroupFunction, sequences: Sequences, budget: Budget, *, is_sharded: bool = False) -> Tensor:
    """
    Values of the scored tokens.

    Args:
        function (`Callable`):
            Called with groups of rows that begin at the first column, see [`~grouping.align`].
        sequences ([`Sequences`]):
            Any number of rows, padded on any side.
        budget ([`Budget`]):
            How much of them makes a group.
        is_sharded (`bool`, *optional*, defaults to `False`):
            Whether all ranks call this function together and have to call `function` equally often. If no rank has a
            scored token, it is not called, and neither is it without this option if there is none here.

    Returns:
        `torch.Tensor` of shape `(N, ...)`: the values of the N scored tokens, row by row.

    Raises:
        `ValueError`: If a scored token is not seen, or no seen token precedes it.
    """
    aligned = align(sequences)
    if is_sharded and dist.is_initialized() and dist.get_world_size() > 1:
        return _over_ranks(function, aligned, budget)
    lengths = aligned.lengths.tolist()
    parts: list[tuple[Tensor, Tensor]] = []
    for group in plan_groups(lengths, budget.of(lengths), is_packed=budget.is_packed):
        rows = torch.tensor(group, device=aligned.input_ids.device)
        parts.append((rows, function(cut(aligned, rows))))
    return _in_order(aligned.scored, parts)


def _in_order(scored: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Values of all scored tokens, row by row, of pairs of rows and the values of their scored tokens."""
    if not parts:
        return torch.zeros(0, device=scored.device)
    numbers = torch.full(scored.shape, -1, device=scored.device)
    numbers[scored] = torch.arange(int(scored.sum()), device=scored.device)
    values = torch.cat([part for _, part in parts])
    places = torch.cat([numbers[rows][scored[rows]] for rows, _ in parts]).to(values.device)
    result = torch.empty_like(values)
    result[places] = values
    return result


def _over_ranks(function: GroupFunction, aligned: Sequences, budget: Budget) -> Tensor:
    device, rank, ranks = aligned.input_ids.device, dist.get_rank(), dist.get_world_size()
    facts = _gather_rows(torch.stack([aligned.lengths, aligned.scored.sum(1)], 1))
    owners = [owner for owner, part in enumerate(facts) for _ in range(len(part))]
    lengths, counts = torch.cat(facts).T.tolist()
    starts = [0, *accumulate(len(part) for part in facts)]
    rounds = plan_rounds(lengths, budget.of(lengths), ranks, is_packed=budget.is_packed)
    if not rounds:
        return torch.zeros(0, device=device)
    leaving: list[list[int]] = [[] for _ in range(ranks)]
    coming: list[list[int]] = [[] for _ in range(ranks)]
    for row, reader in sorted((row, to) for groups in rounds for to, group in enumerate(groups) for row in group):
        if owners[row] == rank:
            leaving[reader].append(row)
        if reader == rank:
            coming[owners[row]].append(row)
    # Rows travel as ids and whether they are scored, in one integer.
    words = aligned.input_ids * 2 + torch.nn.functional.pad(aligned.scored, (1, 0)).long()
    sent = [words[row - starts[rank], : lengths[row]] for rows in leaving for row in rows]
    received = _exchange(torch.cat([words.new_zeros(0), *sent]), *_sizes(lengths, leaving, coming))
    mine = [row for rows in coming for row in rows]
    texts = dict(zip(mine, torch.split(received, [lengths[row] for row in mine]), strict=True))

    values: dict[int, Tensor] = {}
    for groups in rounds:
        group = groups[rank]
        part = function(_group([texts[row] for row in group], device))
        values |= dict(zip(group, torch.split(part, [counts[row] for row in group]), strict=True))
        empty = part[:0]  # known on ranks without a row, too
    back = _exchange(torch.cat([empty, *(values[row] for row in mine)]), *_sizes(counts, coming, leaving))
    own = torch.tensor([row - starts[rank] for rows in leaving for row in rows], dtype=torch.long, device=device)
    return _in_order(aligned.scored, [(own, back)])


def _sizes(amounts: list[int], leaving: list[list[int]], coming: list[list[int]]) -> tuple[list[int], list[int]]:
    """How much goes to every rank, and how much comes from it."""
    out, back = [[sum(amounts[row] for row in rows) for rows in parts] for parts in (leaving, coming)]
    return out, back


def _group(texts: list[Tensor], device: torch.device) -> Sequences:
    """A group of rows as they travelled; without any, a row to keep in step with."""
    if not texts:
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        return Sequences(ids, torch.ones_like(ids), torch.zeros(1, 1, dtype=torch.bool, device=device))
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    words = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    ids = torch.where(seen.bool(), words // 2, words[:, :1] // 2)
    return Sequences(ids, seen, (words % 2).bool()[:, 1:])


def _gather_rows(rows: Tensor) -> list[Tensor]:
    """The rows `(n, k)` of every rank, of which n may differ, in CPU memory."""
    ranks = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros(max(counts), rows.size(1))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return [part[:count].cpu() for part, count in zip(parts, counts, strict=True)]


def _exchange(values: Tensor, leaving: list[int], coming: list[int]) -> Tensor:
    """What the ranks send to this one, of `values` that are split over the ranks by `leaving`."""
    result = values.new_empty(sum(coming), *values.shape[1:])
    dist.all_to_all_single(result, values.contiguous(), output_split_sizes=coming, input_split_sizes=leaving)
    return result
