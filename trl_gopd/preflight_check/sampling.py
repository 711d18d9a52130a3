"""
Sampling from the target of G-OPD itself, q_λ = softmax(λ·z* + (1 − λ)·z_ref) of eq. 12 of
[G-OPD](https://huggingface.co/papers/2602.12125), where z* and z_ref are the logits of the teacher and the reference.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..gopd.divergence import chunk_slices
from ..gopd.frozen.local import FrozenModel, LocalScorer, project
from ..gopd.rollouts import pad_ids
from .models import Models
from .options import Options


class ExtrapolatedLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """
    Makes `generate` of the teacher sample from q_λ: its logits z* become λ·z* + (1 − λ)·z_ref.

    The reference runs beside the teacher and has a key-value cache of its own. A processor therefore serves one call
    of `generate`, and beam search is not supported. Ids that only one of the two models has get -inf. Temperature and
    other logits warpers are applied afterwards.

    Args:
        reference ([`FrozenModel`]):
            The reference. Its temperature is not used.
        gopd_lambda (`float`):
            λ. At 1 the reference is not called.
        attention_mask (`torch.Tensor` of shape `(B, P)`):
            Attention mask of the prompts as it is given to `generate`. Prompts are padded left.

    Example:

    ```python
    >>> inputs = tokenizer(["What is 2+2?"], return_tensors="pt")  # doctest: +SKIP
    >>> extrapolated = ExtrapolatedLogitsProcessor(  # doctest: +SKIP
    ...     FrozenModel(reference), gopd_lambda=1.25, attention_mask=inputs.attention_mask
    ... )
    >>> teacher.generate(**inputs, do_sample=True, logits_processor=[extrapolated])  # doctest: +SKIP

    ```
    """

    def __init__(self, reference: FrozenModel, *, gopd_lambda: float, attention_mask: Tensor) -> None:
        self.reference, self.gopd_lambda = reference, gopd_lambda
        self.transform = replace(reference.transform, temperature=1.0)
        self.attention_mask = attention_mask
        self.seen = 0
        self.cache: Any = None
        backbone = reference.base.base_model
        self.takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """
        Returns the scores `(B, V)` of the next token under q_λ, float32.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`):
                Prompts and the tokens sampled so far.
            scores (`torch.Tensor` of shape `(B, V)`):
                Logits of the teacher, float32.

        Raises:
            `ValueError`: If the ids are not those of the previous call and one more, or if the reference returns no
                key-value cache.
        """
        # Each call after the first has one more column.
        mask = nn.functional.pad(self.attention_mask, (0, int(self.seen > 0)), value=1)
        if input_ids.shape != mask.shape:
            raise ValueError(
                f"`ExtrapolatedLogitsProcessor` expected ids of shape {tuple(mask.shape)}, got "
                f"{tuple(input_ids.shape)}. Create a new processor for each call of `generate`, from the attention "
                "mask of its prompts, and do not use beam search or `num_return_sequences`."
            )
        self.attention_mask = mask
        shared = min(scores.size(-1), self.reference.vocab_size)
        mixed = torch.full_like(scores, -math.inf)
        mixed[:, :shared] = scores[:, :shared]
        if self.gopd_lambda != 1:
            teacher, reference = mixed[:, :shared], self._reference_logits(input_ids)[:, :shared].to(scores.device)
            extrapolated = self.gopd_lambda * teacher + (1 - self.gopd_lambda) * reference
            mixed[:, :shared] = extrapolated.masked_fill(teacher == -math.inf, -math.inf)
        self.seen = input_ids.size(1)
        return mixed

    def _reference_logits(self, input_ids: Tensor) -> Tensor:
        """Returns logits `(B, V)` of the next token at temperature 1. Only tokens that are not yet cached are run."""
        base = self.reference.base
        device = base.get_input_embeddings().weight.device
        ids = input_ids[:, self.seen :].to(device)
        mask = self.attention_mask.to(device)
        positions = {}
        if self.takes_positions:
            positions["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, self.seen :]
        output = base.base_model(
            input_ids=ids.masked_fill(ids >= self.reference.vocab_size, 0),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **positions,
        )
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise ValueError(
                f"The reference ({type(base).__name__}) returns no key-value cache, so q_λ cannot be decoded with it. "
                "Use a reference with attention, or leave out the reward functions."
            )
        return self.transform(project(self.reference.head, output.last_hidden_state[:, -1]))


@dataclass(frozen=True)
class Sampler:
    """
    Samples one completion for each prompt.

    Args:
        models ([`Models`]):
            Teacher, reference and tokenizer.
        prompt_ids (`list[list[int]]`):
            Token ids of the prompts.
        options ([`Options`]):
            Temperature, lengths, batch size and seed.
    """

    models: Models
    prompt_ids: list[list[int]]
    options: Options

    def sample(self, sampler: LocalScorer, title: str, gopd_lambda: float = 1.0) -> list[list[int]]:
        """
        Returns one completion for each prompt, up to and with its end-of-sequence token.

        Args:
            sampler ([`LocalScorer`]):
                The model that takes the place of the teacher in q_λ.
            title (`str`):
                Title of the progress bar.
            gopd_lambda (`float`, *optional*, defaults to `1.0`):
                λ. At 1 the completions are those of `sampler` itself.
        """
        base = sampler.inner.base
        device = base.get_input_embeddings().weight.device
        config = self._generation_config(sampler.vocab_size)
        completions = []
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            _default_generation_config(base),
            tqdm(total=len(self.prompt_ids), desc=title, unit="completion", disable=None) as bar,
        ):
            # The seed is the same for each λ, so that their rewards are compared on the same random numbers.
            torch.manual_seed(self.options.seed)
            for part in chunk_slices(len(self.prompt_ids), self.options.batch_size):
                ids, mask = pad_ids(self.prompt_ids[part], side="left", device=device)
                extrapolated = ExtrapolatedLogitsProcessor(
                    self.models.reference.inner, gopd_lambda=gopd_lambda, attention_mask=mask
                )
                output = base.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([extrapolated]),
                )
                completions += [self._up_to_end(row) for row in output[:, ids.size(1) :].tolist()]
                bar.update(len(ids))
        return completions

    def truncated(self, completions: list[list[int]]) -> float:
        """Returns the fraction of completions without an end-of-sequence token."""
        return mean(float(ids[-1] not in self.models.eos_ids) for ids in completions)

    def _up_to_end(self, row: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(row) if token in self.models.eos_ids), len(row))
        return row[: end + 1]

    def _generation_config(self, vocab_size: int) -> GenerationConfig:
        tokenizer = self.models.tokenizer
        # Padding is masked, so any id will do.
        pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        return GenerationConfig(
            do_sample=True,
            temperature=self.options.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.options.max_completion_length,
            eos_token_id=self.models.eos_ids or None,
            pad_token_id=pad_id,
            suppress_tokens=list(range(self.models.vocab_size, vocab_size)) or None,
            disable_compile=True,
        )


@contextmanager
def _default_generation_config(base: PreTrainedModel) -> Iterator[None]:
    # `generate` takes options that are `None` from the configuration of the model. A top-k or a repetition penalty
    # there would change the distribution of the completions.
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
