"""What is added to a generation batch of TRL before it is scored: teachers, λ, prompts of teachers, the loss mask."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import batch as keys
from .frozen.routing import Routing
from .prompts import TeacherPrompts


def route(
    output: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    *,
    routing: Routing,
    prompts: TeacherPrompts,
    tokens_to_skip: int,
    add_over_ranks: Callable[[Tensor], Tensor],
) -> None:
    """
    Adds which teacher a row belongs to, its λ and what its teacher reads, and leaves tokens out of the loss.

    Args:
        output (`dict[str, Any]`):
            TRL's dictionary of the generation batch; changed in place.
        rows (`Sequence[dict[str, Any]]`):
            The rows of the data set.
        routing ([`Routing`]):
            Knows the teacher and λ of a row.
        prompts ([`TeacherPrompts`]):
            Renders what teachers read.
        tokens_to_skip (`int`):
            How many tokens at the beginning of a completion are not trained on.
        add_over_ranks (`Callable`):
            Adds a number over ranks.
    """
    mask = output[keys.COMPLETION_MASK]
    output[keys.TEACHER_INDEX], output[keys.LAMBDA] = routing.rows(rows, device=mask.device)
    output[keys.ROW] = torch.arange(len(rows), device=mask.device)
    ids = list(routing.teachers)
    rendered = prompts(
        rows,
        [ids[index] for index in output[keys.TEACHER_INDEX].tolist()],
        prompt_ids=output[keys.PROMPT_IDS],
        prompt_mask=output[keys.PROMPT_MASK],
        completion_mask=mask,
    )
    own = mask * output[keys.TOOL_MASK] if keys.TOOL_MASK in output else mask
    if rendered is not None:
        output[keys.TEACHER_PROMPT_IDS] = rendered.prompt_ids
        output[keys.TEACHER_PROMPT_MASK] = rendered.prompt_mask
        own = own * rendered.is_readable.unsqueeze(1)
    if tokens_to_skip:
        own = own * (own.cumsum(1) > tokens_to_skip)
    if tokens_to_skip or prompts.drops_overlong:
        # TRL's loss divides by the tokens of this mask, and of the generation batch, as our metrics do.
        output[keys.TOOL_MASK] = own
        output[keys.NUM_ITEMS] = add_over_ranks(own.sum())
