"""
What one micro-batch holds, as typed fields, and the only place where keys of TRL's dictionary are spelled.

TRL keeps a generation batch as a dictionary of tensors, which it shuffles and splits by rows until the loss. [`Batch`]
and [`Scores`] are put into it when completions have been scored, and taken out of it when a loss is computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


# Keys of TRL
PROMPT_IDS, PROMPT_MASK = "prompt_ids", "prompt_mask"
COMPLETION_IDS, COMPLETION_MASK, TOOL_MASK = "completion_ids", "completion_mask", "tool_mask"
ADVANTAGES, OLD_LOGPS, NUM_ITEMS = "advantages", "old_per_token_logps", "num_items_in_batch"
SAMPLER_RATIO = "importance_sampling_ratio"
IMAGES = "pixel_values"
# Keys of ours
TEACHER_INDEX, LAMBDA, ROW = "gopd_teacher_index", "gopd_lambda", "gopd_row"
TEACHER_PROMPT_IDS, TEACHER_PROMPT_MASK = "gopd_teacher_prompt_ids", "gopd_teacher_prompt_mask"
STORED_RATIO = "gopd_stored_ratio"


@dataclass(frozen=True)
class Sequences:
    """
    Prompts and completions as one model reads them, and which tokens of the completions are to be scored.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`):
            Prompts, padded left, and completions, padded right.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            1 where a token is seen.
        scored (`torch.Tensor` of shape `(B, T)`):
            Boolean; which of the last `T` tokens are to be scored. Only tokens that are seen can be.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> "Sequences":
        """Sequences of which all seen tokens among the last `num_tokens` are scored."""
        return cls(input_ids, attention_mask, attention_mask[:, input_ids.size(1) - num_tokens :].bool())

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        """`T`, the columns of the completions."""
        return self.scored.size(1)

    @property
    def completion_ids(self) -> Tensor:
        """Ids `(B, T)` of the completions."""
        return self.input_ids[:, self.input_ids.size(1) - self.num_tokens :]

    @property
    def lengths(self) -> Tensor:
        """Tokens `(B,)` that are seen in each row."""
        return self.attention_mask.bool().sum(1)

    def __getitem__(self, rows: Tensor | slice) -> "Sequences":
        return Sequences(self.input_ids[rows], self.attention_mask[rows], self.scored[rows])


@dataclass(frozen=True)
class Batch:
    """
    A micro-batch.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(B, P)`):
            What the student read, padded left.
        completion_ids, completion_mask (`torch.Tensor` of shape `(B, T)`):
            Completions, padded right; the mask is 1 for the answers of tools, too.
        loss_mask (`torch.Tensor` of shape `(B, T)`):
            1 for the tokens that are trained on.
        teacher_index (`torch.Tensor` of shape `(B,)`):
            Which of the teachers a row belongs to, int64.
        gopd_lambda (`torch.Tensor` of shape `(B,)`):
            λ that a row asks for, float32.
        task_advantages (`torch.Tensor` of shape `(B,)`):
            GRPO's advantages of `reward_funcs`; zeros without.
        row (`torch.Tensor` of shape `(B,)`):
            Number of the row in the generation batch of this process, int64.
        teacher_prompt_ids, teacher_prompt_mask (`torch.Tensor` of shape `(B, P')`, *optional*):
            What the teacher read, where that is not what the student did.
        old_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Log-probabilities under the student that sampled, where rollouts are reused.
        sampler_ratio (`torch.Tensor` of shape `(B, T)` or `(B, 1)`, *optional*):
            Importance weights π/μ of vLLM's samples, by which TRL multiplies the loss.
        stored_ratio (`torch.Tensor` of shape `(B, T)`, *optional*):
            The same of stored completions, of which TRL knows nothing.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    loss_mask: Tensor
    teacher_index: Tensor
    gopd_lambda: Tensor
    task_advantages: Tensor
    row: Tensor
    teacher_prompt_ids: Tensor | None = None
    teacher_prompt_mask: Tensor | None = None
    old_logps: Tensor | None = None
    sampler_ratio: Tensor | None = None
    stored_ratio: Tensor | None = None

    @classmethod
    def from_trl(cls, inputs: Mapping[str, Any]) -> "Batch":
        """The batch in TRL's dictionary, to which the keys of ours were added."""
        mask = inputs[COMPLETION_MASK]
        return cls(
            prompt_ids=inputs[PROMPT_IDS],
            prompt_mask=inputs[PROMPT_MASK],
            completion_ids=inputs[COMPLETION_IDS],
            completion_mask=mask,
            loss_mask=mask * inputs[TOOL_MASK] if TOOL_MASK in inputs else mask,
            teacher_index=inputs[TEACHER_INDEX],
            gopd_lambda=inputs[LAMBDA],
            task_advantages=inputs[ADVANTAGES],
            row=inputs[ROW],
            teacher_prompt_ids=inputs.get(TEACHER_PROMPT_IDS),
            teacher_prompt_mask=inputs.get(TEACHER_PROMPT_MASK),
            old_logps=inputs.get(OLD_LOGPS),
            sampler_ratio=inputs.get(SAMPLER_RATIO),
            stored_ratio=inputs.get(STORED_RATIO),
        )

    @property
    def ratio(self) -> Tensor | None:
        """Importance weights of the tokens `(B, T)` or of whole sequences `(B, 1)`, whoever multiplies by them."""
        return self.sampler_ratio if self.stored_ratio is None else self.stored_ratio

    @property
    def token_ratio(self) -> Tensor | None:
        """Importance weights of the tokens `(B, T)`; `None` if there are none, or one a sequence."""
        ratio = self.ratio
        return ratio if ratio is not None and ratio.shape == self.loss_mask.shape else None

    @property
    def read_by_student(self) -> Sequences:
        """Prompts and completions as the student and the reference read them."""
        return self._after(self.prompt_ids, self.prompt_mask)

    @property
    def read_by_teacher(self) -> Sequences:
        """Prompts and completions as the teachers read them."""
        if self.teacher_prompt_ids is None or self.teacher_prompt_mask is None:
            return self.read_by_student
        return self._after(self.teacher_prompt_ids, self.teacher_prompt_mask)

    def _after(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Sequences:
        scored = self.loss_mask.bool()
        # A row without a token to score need not be read, and may be too long to be: the last token of its prompt, of
        # which every row has one, keeps it in the batch.
        last = torch.arange(prompt_mask.size(1), device=prompt_mask.device) == prompt_mask.size(1) - 1
        is_read = scored.any(1, keepdim=True)
        seen = torch.cat([prompt_mask * (is_read | last), self.completion_mask * is_read], dim=1)
        return Sequences(torch.cat([prompt_ids, self.completion_ids], dim=1), seen, scored)


@dataclass(frozen=True)
class Scores:
    """
    What frozen models said before the loss: float32 nats of the sampled tokens, 0 where a token is not trained on.

    Args:
        teacher_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Under each row's teacher.
        reference_logps (`torch.Tensor` of shape `(B, T)`, *optional*):
            Under each row's reference; those of rows at λ = 1 are never asked for and are 0.
        top_ids (`torch.Tensor` of shape `(B, T, k)`, *optional*):
            Ids that a served teacher finds likeliest, int64.
        top_logps (`torch.Tensor` of shape `(B, T, k)`, *optional*):
            Their log-probabilities.
    """

    teacher_logps: Tensor | None = None
    reference_logps: Tensor | None = None
    top_ids: Tensor | None = None
    top_logps: Tensor | None = None

    def to_trl(self) -> dict[str, Tensor]:
        """The entries of TRL's dictionary that hold these scores."""
        values = {f"gopd_{field.name}": getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_trl(cls, inputs: Mapping[str, Any]) -> "Scores":
        """The scores in TRL's dictionary."""
        return cls(**{field.name: inputs.get(f"gopd_{field.name}") for field in fields(cls)})
