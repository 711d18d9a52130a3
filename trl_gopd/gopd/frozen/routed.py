"""
The frozen models of one role, of which each scores its own rows.

A frozen model may be sharded. All ranks then have to call it together, in the same order as the others, with the rows
that each of them has for it, even if there are none; see [`~trl_gopd.gopd.frozen.spread`].
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..batch import Sequences
from ..stratified import log_probs_at
from .protocols import LogitScorer, Scorer, TopScorer


class RoutedScorer:
    """
    The frozen models in one role. Each row of a batch belongs to one of them, and is scored by that alone.

    Args:
        scorers (`Sequence[Scorer]`):
            The models by teacher index; one that is there several times is called once.
    """

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self.scorers = list(dict.fromkeys(scorers))
        self._index = torch.tensor([self.scorers.index(scorer) for scorer in scorers])

    @property
    def heads(self) -> list[nn.Module]:
        """Output heads of the models that are in this process."""
        return [scorer.head for scorer in self.scorers if isinstance(scorer, LogitScorer)]

    def score(self, teacher_index: Tensor, sequences: Sequences, needed: Tensor | None = None) -> Tensor:
        """
        Log-probabilities of the scored tokens.

        Args:
            teacher_index (`torch.Tensor` of shape `(B,)`):
                Which of the teachers a row belongs to.
            sequences ([`Sequences`]):
                What the models read.
            needed (`torch.Tensor` of shape `(B,)`, *optional*):
                Which rows are scored; by default all.

        Returns:
            `torch.Tensor` of shape `(B, T)`: float32 nats; 0 for other tokens and rows.
        """
        result = torch.zeros(sequences.scored.shape, dtype=torch.float32, device=sequences.input_ids.device)
        for scorer, rows in self._groups(teacher_index, needed):
            result[rows] = scorer.score(sequences[rows])
        return result

    def score_top(self, teacher_index: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """[`TopScorer.score_top`] of rows that belong to models on servers; arguments as for `score`."""
        parts, order = [], []
        for scorer, rows in self._groups(teacher_index):
            assert isinstance(scorer, TopScorer)
            parts.append(scorer.score_top(sequences[rows]))
            order.append(rows)
        back = torch.cat(order).argsort()
        logps, ids, top_logps = (torch.cat(part)[back] for part in zip(*parts, strict=True))
        return logps, ids, top_logps

    def targets(self, teacher_index: Tensor, sequences: Sequences, needed: Tensor | None = None) -> "Targets":
        """The distributions of the models at the scored tokens; arguments as for `score`."""
        numbers = torch.full(sequences.scored.shape, -1, device=sequences.scored.device)
        numbers[sequences.scored] = torch.arange(int(sequences.scored.sum()), device=numbers.device)
        parts = []
        for scorer, rows in self._groups(teacher_index, needed):
            assert isinstance(scorer, LogitScorer)
            own = numbers[rows]
            parts.append((scorer, scorer.hidden(sequences[rows]), own[own >= 0]))
        width = min(scorer.vocab_size for scorer in self.scorers if isinstance(scorer, LogitScorer))
        return Targets(parts, width)

    def _groups(self, teacher_index: Tensor, needed: Tensor | None = None) -> Iterator[tuple[Scorer, Tensor]]:
        """Models that have to be called, and the rows to call them with."""
        index = self._index.to(teacher_index.device)[teacher_index]
        if needed is not None:
            index = index.masked_fill(~needed, -1)
        for number, scorer in enumerate(self.scorers):
            rows = (index == number).nonzero().squeeze(1)
            if len(rows) or scorer.is_sharded:
                yield scorer, rows


class Targets:
    """
    The distributions of frozen models at N tokens, as logits that exist for a chunk of tokens at a time.

    Args:
        parts (`Sequence`):
            For each model the model itself, hidden states `(n, D)`, and which of the N tokens these predict `(n,)`, in
            ascending order.
        vocab_size (`int`):
            Ids that all models have.
    """

    def __init__(self, parts: Sequence[tuple[LogitScorer, Tensor, Tensor]], vocab_size: int) -> None:
        self._parts, self.vocab_size = parts, vocab_size

    def logits(self, tokens: slice, default: Tensor | None = None) -> Tensor:
        """
        Tempered float32 logits `(n, V)` of a slice of the N tokens, over the ids that all models have.

        Args:
            tokens (`slice`):
                Which tokens.
            default (`torch.Tensor` of shape `(n, V')`, *optional*):
                Logits for tokens that belong to none of the models, of which only the ids in common are kept.
        """
        pieces = list(self._pieces(tokens))
        if sum(len(places) for _, places in pieces) == tokens.stop - tokens.start:
            if len(pieces) == 1:
                return pieces[0][0]
            return torch.cat([logits for logits, _ in pieces])[torch.cat([places for _, places in pieces]).argsort()]
        if default is None:
            raise ValueError("Some tokens belong to no model, and there are no logits to take for them.")
        logits = default[:, : self.vocab_size].clone()
        for piece, places in pieces:
            logits[places] = piece[:, : logits.size(1)]
        return logits

    def log_probs(self, tokens: slice, ids: Tensor, default: Tensor) -> Tensor:
        """
        Log-probabilities `(n, m)` of some ids, as `stratified_divergence` asks for them.

        Args:
            tokens (`slice`):
                Which n of the N tokens.
            ids (`torch.Tensor` of shape `(n, m)`):
                Non-negative ids.
            default (`torch.Tensor` of shape `(n, m)`):
                Log-probabilities for tokens that belong to none of the models.
        """
        logps = default.clone()
        for logits, places in self._pieces(tokens):
            logps[places] = log_probs_at(logits, ids[places])
        return logps

    def _pieces(self, tokens: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits `(m, V)` of each model that has some of the tokens, and which of the n these are `(m,)`."""
        for scorer, hidden, positions in self._parts:  # positions ascend, so those of a slice are neighbours
            first, last = torch.searchsorted(positions, positions.new_tensor([tokens.start, tokens.stop])).tolist()
            if first < last:
                yield scorer.logits(hidden[first:last])[:, : self.vocab_size], positions[first:last] - tokens.start
