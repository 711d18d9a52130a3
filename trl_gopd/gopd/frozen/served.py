"""
Teachers and references behind the HTTP server of vLLM, which `vllm serve` and `trl vllm-serve` start.

The requests are those of TRL's `VLLMClient.get_sequence_logprobs`, a class that cannot be made without vLLM. Here only
the server needs it: a student on any machine may ask.
"""

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from ..batch import Sequences


logger = logging.getLogger(__name__)

RETRY_DELAYS = (1.0, 4.0, 16.0)  # seconds before a server that cannot be reached is tried again
CONCURRENT_REQUESTS = 4  # TRL's default: the server has the next rows at hand while it answers
NEGATIVE_INFINITY = -9999.0  # what vLLM writes for it, since JSON has no such number
# A probability of 1 is the difference of two float32 numbers, logit and logsumexp, which are below 256 in models.
ROUNDING = 4 * 256 * torch.finfo(torch.float32).eps
# Ids that every vocabulary has, in an order that no text has, so that the model is sure of few of them.
PROBE = [11, 2, 7, 14, 5, 5, 12, 0, 9, 3, 15, 8, 1, 13, 4, 10]
ADVICE = (
    "The server has to be vLLM's, with log-probabilities and not logits as its `--logprobs-mode`, and its model must "
    "have the student's token ids and room for the prompt, the completion and one token more. For 'stratified' its "
    "`--max-logprobs`, 20 by default, has to be at least `gopd_top_k`."
)


def is_url(given: Any) -> bool:
    """Whether what the user gave as a model is the address of a server."""
    return isinstance(given, str) and given.startswith(("http://", "https://"))


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
        timeout (`float`):
            Seconds without an answer after which a request has failed.
        top_k (`int`, *optional*, defaults to `1`):
            How many of the likeliest ids the server is asked for, beside the sampled one.

    Raises:
        `ConnectionError`, `TimeoutError`: If the server cannot be reached, or does not answer.
        `RuntimeError`: If it answers with an error, or with something else than log-probabilities.
        `ValueError`: If it has no model of that name, or ignores the temperature.
    """

    def __init__(self, url: str, *, temperature: float, role: str, batch_size: int, timeout: float, top_k: int = 1):
        address, _, name = url.partition("#")
        self.url = address.rstrip("/").removesuffix("/v1")
        self.temperature, self.batch_size, self.timeout, self.top_k = temperature, batch_size, timeout, top_k
        cards = {card["id"]: card for card in self._ask("/v1/models", "data")}
        if not cards or name and name not in cards:
            raise ValueError(
                f"`{role}` is {url}, but the server has the models {list(cards)}. Put the name of one of them after "
                "`#`, or start the server with it."
            )
        self.model = name or next(iter(cards))
        self.source: str = cards[self.model].get("root") or self.model
        self._max_length = cards[self.model].get("max_model_len")
        self._check_temperature(role)
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
        """Name and address of the model."""
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

        def ask(start: int) -> list[list[dict[int, float]]]:
            part = rows[start : start + self.batch_size]
            return self._distributions(
                [ids[row] for row in part],
                [counts[row] for row in part],
                part,
                temperature=self.temperature,
                top=self.top_k,
            )

        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            answers = [row for part in pool.map(ask, range(0, len(rows), self.batch_size)) for row in part]
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
        return self._distributions([PROBE], [len(PROBE) - 1], [0], temperature=temperature, top=top)[0]

    def _distributions(
        self,
        sequences: Sequence[list[int]],
        counts: Sequence[int],
        rows: Sequence[int],
        *,
        temperature: float,
        top: int,
    ) -> list[list[dict[int, float]]]:
        """
        Log-probabilities by token id at the last `count` positions of every sequence: of its own token and of the
        `top` likeliest ones. `rows` are for messages.
        """
        choices = self._ask(
            "/v1/completions",
            "choices",
            {
                "model": self.model,
                "prompt": sequences,
                "max_tokens": 1,
                "prompt_logprobs": top,
                "temperature": temperature,
                # or else those of the model's own generation configuration
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            },
        )
        if len(choices) != len(sequences):
            raise RuntimeError(f"{self.url} answered {len(sequences)} sequences with {len(choices)}. {ADVICE}")
        choices = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [
            self._read(choice.get("prompt_logprobs") or [], ids, count, row)
            for choice, ids, count, row in zip(choices, sequences, counts, rows, strict=True)
        ]

    def _read(self, given: list[Any], ids: list[int], count: int, row: int) -> list[dict[int, float]]:
        first = len(ids) - count
        if len(given) != len(ids):
            raise RuntimeError(
                f"{self.url} answered the {len(ids)} tokens of row {row} with {len(given)}, so the completion has no "
                f"log-probabilities from position {max(len(given) - first, 0)} on. {ADVICE}"
            )
        answer = []
        for position, (token, entries) in enumerate(zip(ids[first:], given[first:], strict=True)):
            by_id = {int(key): entry["logprob"] for key, entry in (entries or {}).items()}
            for key in (token, *by_id):
                value = by_id.get(key)
                if value is None or not NEGATIVE_INFINITY < value <= ROUNDING:  # which NaN is not either
                    raise RuntimeError(
                        f"{self.url} answered row {row}, position {position} of the completion, with the "
                        f"log-probability {value} for id {key}; it must be finite and at most 0. {ADVICE}"
                    )
            answer.append(by_id)
        return answer

    def _ask(self, path: str, key: str, payload: dict[str, Any] | None = None) -> list[Any]:
        """What the server answers under `key`."""
        request = Request(
            self.url + path,
            data=None if payload is None else json.dumps(payload).encode(),
            headers={"Content-Type": "application/json"},
        )
        for delay in (*RETRY_DELAYS, None):
            try:
                with urlopen(request, timeout=self.timeout) as response:
                    body = response.read().decode(errors="replace")
                break
            except HTTPError as error:
                said = error.read().decode(errors="replace")[:500]
                raise RuntimeError(f"{self.url}{path} answered HTTP {error.code}: {said} {ADVICE}") from error
            except (OSError, HTTPException) as error:
                if isinstance(getattr(error, "reason", error), TimeoutError):
                    raise TimeoutError(
                        f"{self.url}{path} did not answer in {self.timeout} seconds. Look whether the server is "
                        "overloaded, or raise `served_teacher_timeout`."
                    ) from error
                if delay is None:
                    raise ConnectionError(
                        f"{self.url} cannot be reached after {len(RETRY_DELAYS) + 1} attempts: {error}. Check that "
                        "the server runs (`vllm serve MODEL`), its host and port, and that this machine may reach it."
                    ) from error
                logger.warning("%s cannot be reached (%s), trying again in %s seconds.", self.url, error, delay)
                time.sleep(delay)
        try:
            answer = json.loads(body)[key]
        except (ValueError, KeyError, TypeError):
            answer = None
        if not isinstance(answer, list):
            raise RuntimeError(f"{self.url}{path} answered without a list of `{key}`: {body[:500]} {ADVICE}")
        return answer
