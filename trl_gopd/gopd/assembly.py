"""Makes the parts of a run, once GRPO has loaded the student: frozen models, estimator, schedule, and what watches."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ._trl import eos_token_ids, unpack_quantized_head
from .checks import check_student
from .completion_log import CompletionLog
from .config import GOPDConfig
from .contexts import Contexts
from .estimators.build import build_estimator
from .estimators.protocol import Estimator
from .frozen.adapter import is_fresh_adapter, is_peft
from .frozen.build import FrozenBuilder, FrozenModels
from .frozen.routing import Routing
from .frozen.start import StudentStart
from .nonfinite import NonFiniteGuard
from .observer import Observer
from .prompts import TeacherPrompts
from .schedules import LambdaSchedule


@dataclass(frozen=True)
class Run:
    """
    The parts of a run.

    Args:
        frozen ([`FrozenModels`]): Teachers and references.
        estimator ([`Estimator`]): The estimator that the configuration names.
        kept_start ([`StudentStart`], *optional*): What is trained of an adapted student, as it was at the start.
        teacher_prompts ([`TeacherPrompts`]): Renders what teachers read.
        schedule ([`LambdaSchedule`]): The schedule of λ.
        guard ([`NonFiniteGuard`]): Looks for numbers that are not finite.
        observer ([`Observer`]): Metrics, warnings, and what the schedule goes by.
        completion_log ([`CompletionLog`], *optional*): The table and the page of completions, if they are logged.
    """

    frozen: FrozenModels
    estimator: Estimator
    kept_start: StudentStart | None
    teacher_prompts: TeacherPrompts
    schedule: LambdaSchedule
    guard: NonFiniteGuard
    observer: Observer
    completion_log: CompletionLog | None


def assemble(
    trainer: Any,
    *,
    routing: Routing,
    start: "str | nn.Module | None",
    is_named: bool,
    asks_servers: bool,
    teacher_prompt: Any,
    teacher_processing_class: Any,
) -> Run:
    """
    Makes the parts of a run.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, with its student, tokenizer and rewards.
        routing ([`Routing`]):
            Knows the teachers and references that the user gave.
        start (`str` or `torch.nn.Module`, *optional*):
            The start of a student without an adapter, if it is a reference.
        is_named (`bool`):
            Whether the user gave the student by name.
        asks_servers (`bool`):
            Whether the ids of "stratified" are those that servers find likeliest.
        teacher_prompt, teacher_processing_class:
            What the user gave, for all teachers or by teacher id.

    Raises:
        `ValueError`: If a model, or a combination of them, cannot be used.
    """
    args: GOPDConfig = trainer.args
    accelerator, tokenizer = trainer.accelerator, trainer._tokenizer
    student = accelerator.unwrap_model(trainer.model)
    needs_start = routing.uses_start or args.beta != 0
    has_adapter = is_peft(student)
    unpack_quantized_head(student.get_base_model() if has_adapter else student)
    check_student(student, args, needs_start=needs_start, accelerator=accelerator)
    is_fresh = has_adapter and is_fresh_adapter(student)
    kept_start = StudentStart(student, accelerator) if has_adapter and needs_start and not is_fresh else None
    builder = FrozenBuilder(
        args,
        accelerator=accelerator,
        student=lambda: trainer.model,
        tokenizer=tokenizer,
        # Only now are the weights under the student's adapter known to be those of their name.
        is_plain_base=is_named and is_fresh and not getattr(student, "is_quantized", False),
        asks_servers=asks_servers,
    )
    frozen = builder.build(routing, kept_start if start is None else start)
    teacher_prompts = TeacherPrompts(
        routing.by_teacher("teacher_prompt", teacher_prompt),
        routing.by_teacher("teacher_processing_class", teacher_processing_class),
        column=args.teacher_prompt_column,
        tokenizer=tokenizer,
        chat_template=trainer.chat_template,
        template_options=trainer.chat_template_kwargs,
        contexts=Contexts(frozen.teachers, frozen.references, drops_overlong=args.overlong_teacher_prompts == "drop"),
    )
    estimator = build_estimator(
        args,
        frozen,
        student_config=student.config,
        mixes_lambda=routing.varies,
        asks_servers=asks_servers,
    )
    schedule = args.build_lambda_schedule()
    guard = NonFiniteGuard(args, accelerator, frozen=frozen, routing=routing, tokenizer=tokenizer)
    observer = Observer(
        args,
        schedule,
        accelerator,
        guard,
        teacher_ids=list(frozen.teachers),
        mixes_lambda=routing.varies,
        eos_token_ids=eos_token_ids(trainer),
    )
    completion_log = None
    if args.log_completions:
        completion_log = CompletionLog(
            accelerator, has_rewards=trainer._has_rewards, extrapolation_clip=args.gopd_extrapolation_clip
        )
    return Run(frozen, estimator, kept_start, teacher_prompts, schedule, guard, observer, completion_log)
