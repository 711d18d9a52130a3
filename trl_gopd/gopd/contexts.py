"""Whether frozen models have room for what they are to read, which is asked before they are."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .frozen.protocols import Scorer


class Contexts:
    """
    How many tokens each frozen model can read.

    Args:
        teachers (`Mapping[str | None, Scorer]`):
            By teacher id.
        references (`Mapping[str | None, Scorer]`):
            By teacher id; may be empty.
        drops_overlong (`bool`):
            Whether a row that its teacher or its reference cannot read is left out of the loss instead of raising.
    """

    def __init__(
        self,
        teachers: Mapping[str | None, Scorer],
        references: Mapping[str | None, Scorer],
        *,
        drops_overlong: bool = False,
    ) -> None:
        self.models = {"teacher_model": teachers, "ref_model": references}
        self.drops_overlong = drops_overlong

    def readable(
        self,
        rows: Sequence[Mapping[str, Any]],
        teacher_ids: Sequence[str | None],
        *,
        gopd_lambda: Tensor,
        teacher_lengths: Sequence[int],
        reference_lengths: Sequence[int],
        completion_lengths: Sequence[int],
    ) -> list[bool]:
        """
        Which rows their models can read.

        Args:
            rows (`Sequence[Mapping]`):
                Rows of the data set, for messages.
            teacher_ids (`Sequence[str | None]`):
                The teacher of each.
            gopd_lambda (`torch.Tensor` of shape `(B,)`):
                λ that a row asks for. Where it is 1, no reference reads the row.
            teacher_lengths, reference_lengths (`Sequence[int]`):
                Tokens of the prompts that the two read.
            completion_lengths (`Sequence[int]`):
                Tokens of the completions.

        Raises:
            `ValueError`: If a row is too long, unless such rows are dropped.
        """
        fits = [True] * len(rows)
        lengths = {"teacher_model": teacher_lengths, "ref_model": reference_lengths}
        for role, models in self.models.items():
            for number, teacher_id in enumerate(teacher_ids):
                if teacher_id not in models or role == "ref_model" and gopd_lambda[number] == 1:
                    continue
                model, prompt, completion = models[teacher_id], lengths[role][number], completion_lengths[number]
                if model.context is None or prompt + completion <= model.context:
                    continue
                fits[number] = False
                if not self.drops_overlong:
                    label = role if teacher_id is None else f"{role}[{teacher_id!r}]"
                    raise ValueError(
                        f"The prompt of {prompt} tokens that `{label}` ({model.identity()['name']}) reads, and the "
                        f"completion of {completion} tokens, exceed its context of {model.context}, in the row with "
                        f"the prompt {shortened(rows[number].get('prompt'))}. Shorten the prompts, lower "
                        "`max_completion_length`, use a model with a longer context, or set "
                        "`overlong_teacher_prompts='drop'`, which leaves such rows out of the loss."
                    )
        return fits


def shortened(prompt: Any) -> str:
    """A prompt as a message shows it."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 120
    return shown.repr(prompt)
