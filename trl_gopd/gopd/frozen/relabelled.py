"""
A frozen model with two of its token ids exchanged, so that its own end of an answer stands for the student's.

It is a model of the same tokens under other numbers: wherever a completion has one of the two ids the model reads the
other one, and its probability of the one is taken for that of the other. Prompts are read as they are.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Sequences
from .protocols import LogitScorer, Scorer, TopScorer


def relabelled(scorer: Scorer, one: int, other: int) -> Scorer:
    """A model with the ids `one` and `other` exchanged; it can be asked for whatever `scorer` can."""
    if isinstance(scorer, LogitScorer):
        return _RelabelledLogits(scorer, one, other)
    if isinstance(scorer, TopScorer):
        return _RelabelledTop(scorer, one, other)
    return _Relabelled(scorer, one, other)


class _Relabelled:
    def __init__(self, scorer: Any, one: int, other: int) -> None:
        self.scorer, self.ids = scorer, (one, other)

    @property
    def is_sharded(self) -> bool:
        return bool(self.scorer.is_sharded)

    @property
    def context(self) -> int | None:
        context: int | None = self.scorer.context
        return context

    def identity(self) -> dict[str, Any]:
        return {**self.scorer.identity(), "exchanged_ids": list(self.ids)}

    def score(self, sequences: Sequences) -> Tensor:
        logps: Tensor = self.scorer.score(self._read(sequences))
        return logps

    def _read(self, sequences: Sequences) -> Sequences:
        prompts = sequences.input_ids[:, : sequences.input_ids.size(1) - sequences.num_tokens]
        return replace(sequences, input_ids=torch.cat([prompts, self._exchange(sequences.completion_ids)], dim=1))

    def _exchange(self, ids: Tensor) -> Tensor:
        one, other = self.ids
        return torch.where(ids == one, other, torch.where(ids == other, one, ids))


class _RelabelledLogits(_Relabelled):
    @property
    def vocab_size(self) -> int:
        return int(self.scorer.vocab_size)

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self.scorer.head
        return head

    def hidden(self, sequences: Sequences) -> Tensor:
        states: Tensor = self.scorer.hidden(self._read(sequences))
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.scorer.logits(hidden)
        return logits.index_copy(1, torch.tensor(self.ids, device=logits.device), logits[:, list(self.ids[::-1])])


class _RelabelledTop(_Relabelled):
    def score_top(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        logps, ids, top_logps = self.scorer.score_top(self._read(sequences))
        return logps, self._exchange(ids), top_logps
