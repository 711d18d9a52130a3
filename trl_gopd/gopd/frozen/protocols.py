"""What frozen models can be asked for: the log-probabilities of tokens, hidden states and logits, or likeliest ids."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..batch import Sequences


# By how much a log-probability may exceed 0: that of a probability of 1 is the difference of two float32 numbers,
# logit and logsumexp, which are below 256 in models.
ROUNDING = 4 * 256 * torch.finfo(torch.float32).eps


@runtime_checkable
class Scorer(Protocol):
    """A model that scores completions and is never trained."""

    @property
    def is_sharded(self) -> bool:
        """Whether all ranks have to call it together, each with any number of rows."""

    @property
    def context(self) -> int | None:
        """How many tokens it can read, if that is known."""

    def score(self, sequences: Sequences) -> Tensor:
        """Log-probabilities `(B, T)` of the scored tokens in float32 nats; 0 for the other tokens."""

    def identity(self) -> dict[str, Any]:
        """What tells this model from another one, as JSON can hold it: its name, its revision, and a checksum."""


@runtime_checkable
class LogitScorer(Scorer, Protocol):
    """A [`Scorer`] whose hidden states and logits are in this process."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits, padding included."""

    @property
    def head(self) -> nn.Module:
        """Output head, whose weight may have to be gathered."""

    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states `(N, D)` from which the N scored tokens are predicted, row by row."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits `(N, V)` of hidden states `(N, D)`."""


@runtime_checkable
class TopScorer(Scorer, Protocol):
    """A [`Scorer`] that tells the likeliest ids of each state, as servers do."""

    def score_top(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """
        Log-probabilities `(B, T)` as from `score`, the k likeliest ids `(B, T, k)` in int64, and `(B, T, k)` their
        log-probabilities in float32 nats.
        """
