"""What is added to a generation batch of TRL before it is scored: teachers, λ, prompts of teachers, the loss mask."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import batch as keys
from .batch import Batch
from .frozen.routing import Routing
from .prompts import TeacherPrompts
from .rollouts import stored_completions, stored_ratio


def route(
    output: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    *,
    routing: Routing,
    prompts: TeacherPrompts,
    student_prompts: Sequence[Any],
    tools: Sequence[list[Callable[..., Any]]],
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
        student_prompts (`Sequence`):
            What the student's prompts were rendered from. An environment may have added to those of the rows.
        tools (`Sequence[list[Callable]]`):
            Tools that the student's prompts name, for each row.
        tokens_to_skip (`int`):
            How many tokens at the beginning of a completion are not trained on.
        add_over_ranks (`Callable`):
            Adds a number over ranks.
    """
    mask = output[keys.COMPLETION_MASK]
    output[keys.TEACHER_INDEX], output[keys.LAMBDA] = routing.rows(rows, device=mask.device)
    output[keys.ROW] = torch.arange(len(rows), device=mask.device)
    batch = Batch.from_trl(output)
    read = prompts(rows, batch, prompts=student_prompts, tools=tools)
    if read.prompt_ids is not None:
        output[keys.TEACHER_PROMPT_IDS], output[keys.TEACHER_PROMPT_MASK] = read.prompt_ids, read.prompt_mask
    own = batch.loss_mask * read.is_readable.unsqueeze(1)
    if tokens_to_skip:
        own = own * (own.cumsum(1) > tokens_to_skip)
    if tokens_to_skip or prompts.contexts.drops_overlong:
        # TRL's loss divides by the tokens of this mask, and of the generation batch, as our metrics do.
        output[keys.TOOL_MASK] = own
        output[keys.NUM_ITEMS] = add_over_ranks(own.sum())


def weigh_stored(
    output: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    *,
    args: Any,
    student_logps: Callable[[Tensor, Tensor, int], Tensor],
) -> None:
    """
    Adds the importance weights of stored completions, if it is known what their sampler gave them.

    Args:
        output (`dict[str, Any]`):
            TRL's dictionary of the generation batch; changed in place.
        rows (`Sequence[dict[str, Any]]`):
            The rows of the data set.
        args ([`GOPDConfig`]):
            Configuration of the run.
        student_logps (`Callable`):
            Given ids and mask `(B, P + T)`, and T, returns log-probabilities `(B, T)` under the student.
    """
    _, sampled = stored_completions(rows, max_length=args.max_completion_length)
    if sampled is None:
        return
    logps = output.get(keys.OLD_LOGPS)
    if logps is None:
        ids = torch.cat([output[keys.PROMPT_IDS], output[keys.COMPLETION_IDS]], 1)
        seen = torch.cat([output[keys.PROMPT_MASK], output[keys.COMPLETION_MASK]], 1)
        logps = student_logps(ids, seen, output[keys.COMPLETION_IDS].size(1))
    output[keys.STORED_RATIO] = stored_ratio(
        logps, sampled, output[keys.COMPLETION_MASK], args.vllm_importance_sampling_clip_max
    )
