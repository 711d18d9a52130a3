"""
What a teacher reads before the completion, where that is not what the student read: a solution, a critique, its own
chat template. The completion's ids stay the student's, so that each is scored after the same completion so far.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedPrompts:
    """
    The prompts that the teachers of a batch read.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(B, P')`):
            Ids, padded left, and 1 where there is one.
        is_readable (`torch.Tensor` of shape `(B,)`):
            0 for a row that its teacher cannot read and that is left out of the loss.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    is_readable: Tensor


class TeacherPrompts:
    """
    Renders the prompts of teachers.

    Args:
        functions (`Mapping[str | None, Callable]`):
            By teacher id, what makes a prompt, a string or a list of messages, of a row. Goes before the column.
        tokenizers (`Mapping[str | None, PreTrainedTokenizerBase]`):
            By teacher id, the tokenizer whose chat template renders its prompts. Its ids must be the student's.
        column (`str`):
            Column of the data set with a row's prompt for its teacher.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's, for the other teachers.
        template_options (`Mapping[str, Any]`):
            Keyword arguments of `apply_chat_template` for the student's tokenizer.
        contexts (`Mapping[str | None, int | None]`):
            By teacher id, how many tokens a teacher can read, if it is known.
        drops_overlong (`bool`):
            Whether a row that a teacher cannot read is left out of the loss instead of raising.

    Raises:
        `ValueError`: if a tokenizer has other ids than the student's.
    """

    def __init__(
        self,
        functions: Mapping[str | None, Callable[[Mapping[str, Any]], Any]],
        tokenizers: Mapping[str | None, PreTrainedTokenizerBase],
        *,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        template_options: Mapping[str, Any],
        contexts: Mapping[str | None, int | None],
        drops_overlong: bool = False,
    ) -> None:
        for teacher_id, other in tokenizers.items():
            if other.get_vocab() != tokenizer.get_vocab():
                name = "teacher_processing_class" + ("" if teacher_id is None else f"[{teacher_id!r}]")
                raise ValueError(
                    f"`{name}` has other token ids than the student's tokenizer. Only its chat template may differ."
                )
        self.functions, self.tokenizers, self.column = functions, tokenizers, column
        self.tokenizer, self.template_options = tokenizer, template_options
        self.contexts, self.drops_overlong = contexts, drops_overlong

    def __call__(
        self,
        rows: Sequence[Mapping[str, Any]],
        teacher_ids: Sequence[str | None],
        *,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_mask: Tensor,
    ) -> RenderedPrompts | None:
        """
        The prompts of a batch, or `None` if all teachers read what the student reads.

        Args:
            rows (`Sequence[Mapping]`):
                Rows of the data set.
            teacher_ids (`Sequence[str | None]`):
                The teacher of each.
            prompt_ids (`torch.Tensor` of shape `(B, P)`), prompt_mask (`torch.Tensor` of shape `(B, P)`):
                The student's prompts, padded left.
            completion_mask (`torch.Tensor` of shape `(B, T)`):
                1 where a completion has a token.

        Returns:
            [`RenderedPrompts`], in which a row that is left out has the student's prompt.

        Raises:
            `ValueError`: if a prompt and its completion exceed a teacher's context, unless such rows are dropped.
        """
        rendered = [self._render(row, teacher_id) for row, teacher_id in zip(rows, teacher_ids, strict=True)]
        if all(ids is None for ids in rendered):
            return None
        lengths = completion_mask.sum(1).tolist()
        prompts: list[Tensor] = []
        is_readable = []
        for number, ids in enumerate(rendered):
            own = prompt_ids[number][prompt_mask[number].bool()]
            context = self.contexts[teacher_ids[number]]
            fits = ids is None or context is None or len(ids) + lengths[number] <= context
            if ids is not None and not fits and not self.drops_overlong:
                raise ValueError(
                    f"The teacher's prompt for the row with the prompt {rows[number]['prompt']!r} has {len(ids)} "
                    f"tokens, which with the {lengths[number]} of the completion exceed its context of {context}. "
                    "Shorten it, or set `overlong_teacher_prompts='drop'`."
                )
            prompts.append(own if ids is None or not fits else own.new_tensor(ids))
            is_readable.append(fits)
        width = max(map(len, prompts))
        padded = prompt_ids.new_full((len(prompts), width), int(self.tokenizer.pad_token_id))
        mask = prompt_mask.new_zeros(padded.shape)
        for number, prompt in enumerate(prompts):
            padded[number, width - len(prompt) :] = prompt
            mask[number, width - len(prompt) :] = 1
        return RenderedPrompts(
            padded, mask, torch.tensor(is_readable, dtype=prompt_mask.dtype, device=prompt_mask.device)
        )

    def _render(self, row: Mapping[str, Any], teacher_id: str | None) -> list[int] | None:
        if teacher_id in self.functions:
            prompt = self.functions[teacher_id](row)
        else:
            prompt = row.get(self.column)
        if prompt is None:
            if teacher_id not in self.tokenizers:
                return None
            prompt = row["prompt"]
        tokenizer, options = self.tokenizer, self.template_options
        if teacher_id in self.tokenizers:
            tokenizer, options = self.tokenizers[teacher_id], {}
        if isinstance(prompt, str):
            return list(tokenizer(text=prompt)["input_ids"])
        if not isinstance(prompt, list) or not prompt or not all(isinstance(message, Mapping) for message in prompt):
            raise TypeError(
                f"The teacher's prompt must be a string or a list of messages, got {prompt!r} for the row with the "
                f"prompt {row['prompt']!r}."
            )
        encoded = tokenizer.apply_chat_template(
            conversation=prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )
        return list(encoded["input_ids"])
