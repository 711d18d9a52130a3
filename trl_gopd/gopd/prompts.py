"""
What a teacher reads before the completion, where that is not what the student read: a solution, a critique, its own
chat template. The completion's ids stay the student's, so that each is scored after the same completion so far.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .batch import Batch
from .contexts import Contexts, shortened
from .frozen.tokenizers import different_id


def prompt_problem(prompt: Any) -> str | None:
    """Why something is no prompt, in a sentence without an end; `None` if it is one."""
    if isinstance(prompt, str):
        return _text_problem(prompt)
    if not isinstance(prompt, list) or not prompt:
        return "it is neither a string nor a list of at least one message"
    for number, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
            return f"message {number} is no dictionary with a `role`"
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        for part in content if isinstance(content, list) and content else [None]:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                return f"the `content` of message {number} is no text"
            problem = _text_problem(part["text"])
            if problem:
                return problem
    return None


def _text_problem(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} is a half of a character ({text[error.start]!r}), which no tokenizer knows"
    return None


@dataclass(frozen=True)
class RenderedPrompts:
    """
    What the teachers of a batch read.

    Args:
        is_readable (`torch.Tensor` of shape `(B,)`):
            0 for a row that its teacher or its reference cannot read and that is left out of the loss.
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(B, P')`, *optional*):
            Ids of the teachers' prompts, padded left, and 1 where there is one. A row that is left out has the
            student's prompt. `None` if all teachers read what the student reads.
    """

    is_readable: Tensor
    prompt_ids: Tensor | None = None
    prompt_mask: Tensor | None = None


class TeacherPrompts:
    """
    Renders the prompts of teachers.

    Args:
        functions (`Mapping[str | None, Callable]`):
            By teacher id, what makes a prompt, a string or a list of messages, of a row. Goes before the column.
        tokenizers (`Mapping[str | None, PreTrainedTokenizerBase]`):
            By teacher id, the tokenizer whose chat template renders its prompts. It must have the student's ids, and
            may have more.
        column (`str`):
            Column of the data set with a row's prompt for its teacher.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's, for the other teachers.
        chat_template (`str`, *optional*):
            What the student's tokenizer is given in place of its own template. The templates of `tokenizers` stay.
        template_options (`Mapping[str, Any]`):
            Further keyword arguments of `apply_chat_template`, for all tokenizers.
        contexts ([`Contexts`]):
            How many tokens the frozen models can read.

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
        chat_template: str | None,
        template_options: Mapping[str, Any],
        contexts: Contexts,
    ) -> None:
        for teacher_id, other in tokenizers.items():
            index = different_id(tokenizer, other)
            if index is not None:
                name = "teacher_processing_class" + ("" if teacher_id is None else f"[{teacher_id!r}]")
                raise ValueError(
                    f"`{name}` has other token ids than the student's tokenizer, {index} for example. Only its chat "
                    "template may differ, and it may have further ids."
                )
        self.functions, self.tokenizers, self.column = functions, tokenizers, column
        self.tokenizer, self.chat_template, self.template_options = tokenizer, chat_template, template_options
        self.contexts = contexts

    def __call__(
        self,
        rows: Sequence[Mapping[str, Any]],
        batch: Batch,
        *,
        prompts: Sequence[Any],
        tools: Sequence[list[Callable[..., Any]]],
    ) -> RenderedPrompts:
        """
        What the teachers of a batch read.

        Args:
            rows (`Sequence[Mapping]`):
                Rows of the data set.
            batch ([`Batch`]):
                The same rows with their completions.
            prompts (`Sequence`):
                What the student's prompts were rendered from. An environment may have added to that of the row.
            tools (`Sequence[list[Callable]]`):
                Tools that the student's prompts name.

        Raises:
            `ValueError`: if a model has no room for a prompt and its completion, unless such rows are dropped.
        """
        ids = list(self.contexts.models["teacher_model"])
        teacher_ids = [ids[index] for index in batch.teacher_index.tolist()]
        rendered = [self._render(*row) for row in zip(rows, teacher_ids, prompts, tools, strict=True)]
        lengths = batch.prompt_mask.sum(1).tolist()
        is_readable = self.contexts.readable(
            rows,
            teacher_ids,
            gopd_lambda=batch.gopd_lambda,
            teacher_lengths=[
                length if own is None else len(own) for own, length in zip(rendered, lengths, strict=True)
            ],
            reference_lengths=lengths,
            completion_lengths=batch.completion_mask.sum(1).tolist(),
        )
        readable = batch.prompt_mask.new_tensor(is_readable)
        if all(own is None for own in rendered):
            return RenderedPrompts(readable)
        read = [
            batch.prompt_ids[number][batch.prompt_mask[number].bool()]
            if own is None or not is_readable[number]
            else batch.prompt_ids.new_tensor(own)
            for number, own in enumerate(rendered)
        ]
        width = max(map(len, read))
        padded = batch.prompt_ids.new_full((len(read), width), int(self.tokenizer.pad_token_id))
        mask = batch.prompt_mask.new_zeros(padded.shape)
        for number, prompt in enumerate(read):
            padded[number, width - len(prompt) :] = prompt
            mask[number, width - len(prompt) :] = 1
        return RenderedPrompts(readable, padded, mask)

    def _render(
        self, row: Mapping[str, Any], teacher_id: str | None, read: Any, tools: list[Callable[..., Any]]
    ) -> list[int] | None:
        if teacher_id in self.functions:
            prompt = self.functions[teacher_id](row)
        else:
            prompt = row.get(self.column)
        if prompt is None:
            if teacher_id not in self.tokenizers:
                return None
            prompt = read
        # An empty list is not the same to all templates as no tools.
        options = {"tools": tools or None, **self.template_options}
        tokenizer = self.tokenizers.get(teacher_id)
        if tokenizer is None:
            tokenizer, options = self.tokenizer, {"chat_template": self.chat_template, **options}
        problem = prompt_problem(prompt)
        if problem is not None:
            raise TypeError(
                f"The teacher's prompt must be a string or a list of messages, got {shortened(prompt)} for the row "
                f"with the prompt {shortened(read)}: {problem}. Correct it, or give None for the student's prompt."
            )
        if isinstance(prompt, str):
            ids = list(tokenizer(text=prompt)["input_ids"])
        else:
            encoded = tokenizer.apply_chat_template(
                conversation=prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **options
            )
            ids = list(encoded["input_ids"])
        if not ids:
            raise ValueError(
                f"The teacher's prompt {shortened(prompt)} for the row with the prompt {shortened(read)} has no "
                "tokens. Give at least one, or None for the student's prompt."
            )
        return ids
