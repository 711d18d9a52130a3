"""
Teachers and references behind the HTTP server of vLLM, which `vllm serve` and `trl vllm-serve` start.

The requests are those of TRL's `VLLMClient.get_sequence_logprobs`, a class that cannot be made without vLLM. Here only
the server needs it: a student on any machine may ask.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Sequences
from .address import Address
from .answers import COMPLETIONS_PATH, MODELS_BYTES, MODELS_PATH, Asked, ModelCard, answering_model, read_cards
from .http import ClientOptions, Exchange, JsonClient, WrongAnswer


logger = logging.getLogger(__name__)

START_SECONDS = 20.0  # for which a server is waited for when a run begins: its address may be wrong
# Ids that every vocabulary has, in an order that no text has, so that the model is sure of few of them.
PROBE = [11, 2, 7, 14, 5, 5, 12, 0, 9, 3, 15, 8, 1, 13, 4, 10]
ADVICE = (
    "The server has to be vLLM's, with log-probabilities and not logits as its `--logprobs-mode`, and its model must "
    "have the student's token ids and room for the prompt, the completion and one token more. For 'stratified' its "
    "`--max-logprobs`, 20 by default, has to be at least `gopd_top_k`."
)


class ServedScorer:
    """
    A model that a vLLM server scores with. Every rank asks for its own rows.

    Args:
        url (`str`):
            Address of the server, such as `"http://localhost:8000"`. Of several models that it serves, adapters among
            them, `"http://localhost:8000#name"` picks one; by default it is the first.
        temperature (`float`):
            Sampling temperature.
        role (`str`):
            For messages.
        batch_size (`int`):
            Rows a request.
        options ([`ClientOptions`]):
            How the server is asked.
        top_k (`int`, *optional*, defaults to `1`):
            How many of the likeliest ids the server is asked for, beside the sampled one.
        num_ids (`int`, *optional*):
            How many ids the student has. The server may then tell of no others.

    Raises:
        `ConnectionError`, `TimeoutError`: If the server cannot be reached, or does not answer in time.
        `RuntimeError`: If it answers with an error, or with something else than log-probabilities.
        `ValueError`: If the address is none, the server has no model of that name, or it ignores the temperature.
    """

    def __init__(
        self,
        url: str,
        *,
        temperature: float,
        role: str,
        batch_size: int,
        options: ClientOptions,
        top_k: int = 1,
        num_ids: int | None = None,
    ) -> None:
        try:
            address = Address.parse(url)
        except ValueError as error:
            raise ValueError(f"The address of `{role}` cannot be used: {error}") from None  # it holds the address
        self.url = address.server
        self.temperature, self.batch_size, self.top_k, self.num_ids = temperature, batch_size, top_k, num_ids
        self._client = JsonClient(address, options)
        self._patience: float | None = min(START_SECONDS, options.patience)
        cards = self._ask([Exchange(MODELS_PATH, None, MODELS_BYTES, read_cards, ADVICE)])[0]
        if not cards or address.model and address.model not in cards:
            raise ValueError(
                f"`{role}` is {address}, but the server has the models {list(cards)}. Put the name of one of them "
                "after `#`, or start the server with it."
            )
        self.model = address.model or next(iter(cards))
        self.source, self._max_length = cards[self.model].source, cards[self.model].max_length
        # Names under which the server has this model: it may answer under another one than it was asked by.
        self._names = {name for name, card in cards.items() if card.source == self.source}
        self._check_temperature(role)
        self._client.greeting = Exchange(MODELS_PATH, None, MODELS_BYTES, self._check_model, ADVICE)
        self._patience = None
        logger.info("`%s` is %s (%s), served at %s.", role, self.model, self.source, self.url)

    @property
    def is_sharded(self) -> bool:
        """Whether all ranks have to call it together."""
        return False

    @property
    def context(self) -> int | None:
        """How many tokens it can read, if that is known."""
        return None if self._max_length is None else self._max_length - 1  # the server always generates a token

    def identity(self) -> dict[str, Any]:
        """Name and address of the model, without the secrets of the address."""
        # the model, and not where it is served: that may change when a run is resumed
        return {"name": self.source, "revision": None, "weights": None, "url": self.url}

    def score(self, sequences: Sequences) -> Tensor:
        """Log-probabilities `(B, T)` of the scored tokens in float32 nats; 0 for the other tokens."""
        return self._ask_for(sequences)[0]

    def score_top(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """
        Log-probabilities of the scored tokens, and the `top_k` likeliest ids of each state with theirs.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: `(B, T)` as from `score`, ids `(B, T, top_k)` in int64,
            distinct where a token is scored, and `(B, T, top_k)` in float32 nats.
        """
        logps, tokens, answers = self._ask_for(sequences)
        # The server adds the sampled id to the likeliest ones, if it is not among them: which ids are taken must not
        # depend on what was sampled.
        tops = [
            {key: value for key, value in by_id.items() if len(by_id) == self.top_k or key != token}
            for token, by_id in zip(tokens, answers, strict=True)
        ]
        for top in tops:
            if len(top) != self.top_k:
                raise RuntimeError(f"{self.url} answered with {len(top)} ids instead of {self.top_k}. {ADVICE}")
        top_ids = torch.zeros(*logps.shape, self.top_k, dtype=torch.long, device=logps.device)
        top_logps = logps.new_zeros(top_ids.shape)
        if tops:
            top_ids[sequences.scored] = top_ids.new_tensor([list(top) for top in tops])
            top_logps[sequences.scored] = logps.new_tensor([list(top.values()) for top in tops])
        return logps, top_ids, top_logps

    def _ask_for(self, sequences: Sequences) -> tuple[Tensor, list[int], list[dict[int, float]]]:
        """
        Log-probabilities `(B, T)` of the scored tokens, these tokens row by row, and for each of them a dictionary of
        log-probabilities by id.
        """
        seen, scored = sequences.attention_mask.bool(), sequences.scored
        ids = [row[mask].tolist() for row, mask in zip(sequences.input_ids, seen, strict=True)]
        # Of the tokens that are seen, the server answers from the first scored one on.
        wanted = [
            own[mask].tolist() for own, mask in zip(scored, seen[:, seen.size(1) - scored.size(1) :], strict=True)
        ]
        counts = [len(own) - own.index(True) if any(own) else 0 for own in wanted]
        rows = [row for row, count in enumerate(counts) if count]
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        asked = [
            Asked(
                self.model,
                [ids[row] for row in part],
                [counts[row] for row in part],
                part,
                temperature=self.temperature,
                top=self.top_k,
                num_ids=self.num_ids,
            )
            for part in parts
        ]
        answers = [row for part in self._distributions(asked) for row in part]
        tokens: list[int] = []
        by_ids: list[dict[int, float]] = []
        for row, answer in zip(rows, answers, strict=True):
            last = slice(-counts[row], None)
            for token, by_id, own in zip(ids[row][last], answer, wanted[row][last], strict=True):
                if own:
                    tokens.append(token)
                    by_ids.append(by_id)
        logps = torch.zeros(scored.shape, dtype=torch.float32, device=sequences.input_ids.device)
        logps[scored] = logps.new_tensor([by_id[token] for token, by_id in zip(tokens, by_ids, strict=True)])
        return logps, tokens, by_ids

    def _check_temperature(self, role: str) -> None:
        """
        Raises `ValueError` unless the temperature divides the logits: log-ratios of two tokens are then those at
        temperature 1 divided by it. The server's noise is far smaller than the log-ratios of the probe together.
        """
        one = self._probe(1.0)  # in any case: what else is wrong shows before anything is generated
        if self.temperature == 1:
            return
        tempered = self._probe(self.temperature)
        plain = divided = 0.0
        for first, second in zip(one, tempered, strict=True):
            shared = first.keys() & second.keys()
            high, low = max(shared, key=first.__getitem__), min(shared, key=first.__getitem__)
            plain += first[high] - first[low]
            divided += second[high] - second[low]
        wanted = plain / self.temperature
        if not abs(divided - wanted) < abs(plain - wanted) / 2:
            raise ValueError(
                f"`{role}` at {self.url} ignores the temperature: the log-ratios of a probe are {divided:.2f} nats at "
                f"{self.temperature} and {plain:.2f} at 1, and should be {wanted:.2f}. vLLM scores prompts at "
                "temperature 1 in every `--logprobs-mode`. Use `temperature=1`, or load the model here by its name."
            )

    def _probe(self, temperature: float) -> list[dict[int, float]]:
        top = max(2, self.top_k)
        probe = Asked(self.model, [PROBE], [len(PROBE) - 1], [0], temperature, top, self.num_ids)
        return self._distributions([probe])[0][0]

    def _distributions(self, asked: Sequence[Asked]) -> list[list[list[dict[int, float]]]]:
        """Log-probabilities by id at the wanted positions of each text, by request."""

        def exchange(each: Asked) -> Exchange[list[list[dict[int, float]]]]:
            def read(answer: Any) -> list[list[dict[int, float]]]:
                name = answering_model(answer)
                if name is not None and name not in self._names:
                    raise WrongAnswer(f"answered with the model {name!r} instead of {self.model!r}")
                return each.read(answer)

            return Exchange(COMPLETIONS_PATH, each.payload, each.max_bytes, read, ADVICE)

        return self._ask([exchange(each) for each in asked])

    def _check_model(self, answer: Any) -> None:
        """Whether a server that was away has come back with the model that it had."""
        cards = read_cards(answer)
        if cards.get(self.model) != ModelCard(self.source, self._max_length):
            raise WrongAnswer(
                f"was away and has come back with the models {cards}, without {self.model!r} as it was, "
                f"{ModelCard(self.source, self._max_length)}"
            )

    def _ask(self, exchanges: Sequence[Exchange[Any]]) -> list[Any]:
        return self._client.ask(exchanges, patience=self._patience)
