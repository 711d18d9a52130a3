"""
What vLLM's server is asked for the log-probabilities of texts, and what it may answer. Whatever else it answers raises
[`WrongAnswer`].
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .http import WrongAnswer
from .protocols import ROUNDING


MODELS_PATH, COMPLETIONS_PATH = "/v1/models", "/v1/completions"
NEGATIVE_INFINITY = -9999.0  # what vLLM writes for it, since JSON has no such number
# The most that an answer can have: an id takes 90 bytes with its log-probability, rank and text, which may be longer.
MODELS_BYTES, ANSWER_BYTES, ID_BYTES = 2**22, 2**16, 512
ID_DIGITS = 9  # of ids; a vocabulary of more is unheard of

# How values are shown in messages: neither a long nor a deeply nested one may be written out.
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 80, 80, 80
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class ModelCard:
    """
    A model that a server has.

    Args:
        source (`str`):
            Name or path that it was loaded from, as far as the server tells, or else what it is called there.
        max_length (`int`, *optional*):
            Tokens that it can read and write.
    """

    source: str
    max_length: int | None


@dataclass(frozen=True)
class Asked:
    """
    Texts whose log-probabilities a server is asked for.

    Args:
        model (`str`):
            What the server calls the model.
        sequences (`Sequence[list[int]]`):
            Ids of each text.
        counts (`Sequence[int]`):
            How many tokens at the end of each text are wanted.
        rows (`Sequence[int]`):
            What to call each text in messages.
        temperature (`float`):
            Sampling temperature.
        top (`int`):
            How many of the likeliest ids are wanted at each position, beside the text's own.
        num_ids (`int`, *optional*):
            How many ids there are, if it is known.
    """

    model: str
    sequences: Sequence[list[int]]
    counts: Sequence[int]
    rows: Sequence[int]
    temperature: float
    top: int
    num_ids: int | None = None

    @property
    def payload(self) -> dict[str, Any]:
        """The request, as JSON."""
        return {
            "model": self.model,
            "prompt": self.sequences,
            "max_tokens": 1,
            "prompt_logprobs": self.top,
            "temperature": self.temperature,
            # or else those of the model's own generation configuration
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }

    @property
    def max_bytes(self) -> int:
        """Largest answer there can be."""
        return ANSWER_BYTES + ID_BYTES * (self.top + 1) * sum(map(len, self.sequences))

    def read(self, answer: Any) -> list[list[dict[int, float]]]:
        """Log-probabilities in nats by token id, with the text's own, at the wanted positions of each text."""
        choices = _list_of_objects(answer, "choices", COMPLETIONS_PATH)
        if len(choices) != len(self.sequences):
            raise WrongAnswer(f"answered {len(self.sequences)} sequences with {len(choices)}")
        by_index = {choice.get("index"): choice for choice in choices if type(choice.get("index")) is int}
        if by_index.keys() != set(range(len(choices))):
            found = [choice.get("index") for choice in choices]
            raise WrongAnswer(
                f"answered {len(choices)} sequences with the indices {_shown(found)}; each must be there once"
            )
        return [self._text(by_index[number], number) for number in range(len(choices))]

    def _text(self, choice: dict[str, Any], number: int) -> list[dict[int, float]]:
        ids, count, row = self.sequences[number], self.counts[number], self.rows[number]
        given = choice.get("prompt_logprobs")
        if given is None:
            given = []
        if not isinstance(given, list):
            raise WrongAnswer(f"answered row {row} with {_shown(given)}; it must be a list with an entry a token")
        first = len(ids) - count
        if len(given) != len(ids):
            raise WrongAnswer(
                f"answered the {len(ids)} tokens of row {row} with {len(given)}, so the completion has no "
                f"log-probabilities from position {max(len(given) - first, 0)} on"
            )
        return [
            self._position(token, entries, f"row {row}, position {position} of the completion,")
            for position, (token, entries) in enumerate(zip(ids[first:], given[first:], strict=True))
        ]

    def _position(self, token: int, entries: Any, where: str) -> dict[int, float]:
        entries = {} if entries is None else entries
        if not isinstance(entries, dict) or len(entries) > self.top + 1:
            raise WrongAnswer(
                f"answered {where} with {_shown(entries)}; it must be an object of at most {self.top + 1} ids"
            )
        by_id = {}
        for key, entry in entries.items():
            is_number = key.isascii() and key.isdecimal() and len(key) <= ID_DIGITS
            index = int(key) if is_number else 0
            # "03" would be another name of 3
            if not is_number or str(index) != key or self.num_ids is not None and index >= self.num_ids:
                known = "" if self.num_ids is None else f" below {self.num_ids}"
                raise WrongAnswer(f"answered {where} with {_shown(key)} among the ids, which must be numbers{known}")
            by_id[index] = _log_probability(entry, where, index)
        if token not in by_id:
            raise WrongAnswer(_no_log_probability(where, token, None))
        return by_id


def read_cards(answer: Any) -> dict[str, ModelCard]:
    """The models of a server by what it calls them, in its order."""
    cards = {}
    for card in _list_of_objects(answer, "data", MODELS_PATH):
        name, root, length = card.get("id"), card.get("root"), card.get("max_model_len")
        if (
            not (isinstance(name, str) and name)
            or not (root is None or isinstance(root, str))
            or not (length is None or type(length) is int and length > 1)
        ):
            raise WrongAnswer(
                f"answered {MODELS_PATH} with {_shown(card)}; a model must have a name as `id`, and may have another "
                "one as `root` and a number above 1 as `max_model_len`"
            )
        cards[name] = ModelCard(root or name, length)
    return cards


def answering_model(answer: Any) -> str | None:
    """Which model a server says that it has asked, if it says so."""
    name = answer.get("model") if isinstance(answer, dict) else None
    return name if isinstance(name, str) else None


def _list_of_objects(answer: Any, key: str, path: str) -> list[dict[str, Any]]:
    given = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise WrongAnswer(f"answered {path} without a list of `{key}`: {_shown(answer)}")
    return given


def _log_probability(entry: Any, where: str, index: int) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else None
    # A boolean is a number to Python. NaN is in no range.
    if isinstance(value, bool) or not isinstance(value, int | float) or not NEGATIVE_INFINITY < value <= ROUNDING:
        raise WrongAnswer(_no_log_probability(where, index, value))
    return float(value)


def _no_log_probability(where: str, index: int, value: Any) -> str:
    return f"answered {where} with the log-probability {_shown(value)} for id {index}; it must be finite and at most 0"


def _shown(value: Any) -> str:
    text = _BRIEF.repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
