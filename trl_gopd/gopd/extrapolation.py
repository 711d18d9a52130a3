"""
The target of G-OPD at one state, q_λ = softmax(λ·z* + (1 − λ)·z_ref) of eq. 12 of
[G-OPD](https://huggingface.co/papers/2602.12125), measured against the teacher, and as a distribution that `generate`
samples from. Both need the teacher and the reference alone.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from .frozen.local import FrozenModel, project
from .objective import expectation, extrapolate


# Rules of thumb; no paper gives them.
OFF_TEACHER = 1e-3  # the teacher finds an id unlikely below this probability
DETERMINISTIC = 0.9  # and is nearly certain of one above this


def lambda_effects(
    *, teacher_logps: Tensor, reference_logps: Tensor, lambdas: Sequence[float], eos_ids: Sequence[int]
) -> dict[str, Tensor]:
    """
    What each λ does at each state.

    Args:
        teacher_logps (`torch.Tensor` of shape `(N, V)`):
            Normalised log-probabilities T, nats.
        reference_logps (`torch.Tensor` of shape `(N, V)`):
            Normalised log-probabilities R, nats.
        lambdas (`Sequence[float]`):
            The grid, of length L.
        eos_ids (`Sequence[int]`):
            Ids that end a completion.

    Returns:
        `dict[str, torch.Tensor]`: the fields of [`LambdaEffect`] that are means over all states, each `(N, L)` float32
        before the mean.
    """
    teacher, reference = teacher_logps.float(), reference_logps.float()
    is_unlikely, best = teacher < math.log(OFF_TEACHER), teacher.argmax(-1)
    columns: dict[str, list[Tensor]] = {}
    for gopd_lambda in lambdas:
        log_q, log_z = extrapolate(teacher_logps=teacher, reference_logps=reference, gopd_lambda=gopd_lambda)
        probs = log_q.exp()
        kl = expectation(teacher.exp(), teacher - reference) if gopd_lambda == 1 else log_z / (gopd_lambda - 1)
        values = {
            "renyi": kl,
            "log_z": log_z,
            "kl_to_teacher": expectation(probs, log_q - teacher),
            "entropy": -expectation(probs, log_q),
            "eos_probability": probs[:, list(eos_ids)].sum(-1),
            "flips": (log_q.argmax(-1) != best).float(),
            "off_teacher_mass": (probs * is_unlikely).sum(-1),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.stack(values, 1) for name, values in columns.items()}


class ExtrapolatedLogitsProcessor(LogitsProcessor):
    """
    Makes `generate` of the teacher sample from q_λ: its logits z* become λ·z* + (1 − λ)·z_ref.

    The reference runs beside the teacher with a key-value cache of its own, so a processor serves one call of
    `generate`, without beams. Ids that only one of the two has get -inf. Temperature and other warpers come after.

    Args:
        reference ([`FrozenModel`]):
            The reference. Its temperature is not used.
        gopd_lambda (`float`):
            λ. At 1 the reference is not called.
        attention_mask (`torch.Tensor` of shape `(B, P)`):
            1 where a token of the prompts is seen, as given to `generate`. Prompts are padded left.

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
        self.seen, self.cache = 0, None
        backbone = reference.base.base_model
        self.takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(B, V)` of the next token after `input_ids` `(B, L)`, float32."""
        # one column more than in the call before
        mask = nn.functional.pad(self.attention_mask, (0, int(self.seen > 0)), value=1)
        if input_ids.shape != mask.shape:
            raise ValueError(
                f"`ExtrapolatedLogitsProcessor` expected ids of shape {tuple(mask.shape)}, got "
                f"{tuple(input_ids.shape)}. Make a new one for each `generate`, with the attention mask of its "
                "prompts, without beams or several returned sequences."
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
        """Untempered logits `(B, V)` of the next token; only tokens not yet in the cache are run."""
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
