"""What is seen of a run while it trains: metrics, warnings, and what moves the schedule of λ."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from .batch import Batch
from .config import GOPDConfig
from .estimators.protocol import Estimate
from .metrics import means, nothing_to_learn, summarize, token_values
from .monitors import completion_rows, summarize_completions
from .nonfinite import NonFiniteGuard
from .schedules import LambdaSchedule, deviation_squares


logger = logging.getLogger(__name__)

NONFINITE_SHARE = "nonfinite_share"


class EndOfStep(TrainerCallback):  # type: ignore[misc]
    """Tells an [`Observer`] that an optimizer step has ended, before anything is saved."""

    def __init__(self, observer: "Observer") -> None:
        self._observer = observer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self._observer.end_step()


class Observer:
    """
    Turns what one process has into numbers of all ranks. All ranks have to call its methods together.

    Args:
        args ([`GOPDConfig`]):
            Configuration of the run.
        schedule ([`LambdaSchedule`]):
            The schedule of λ, which is told what it goes by.
        accelerator ([`~accelerate.Accelerator`]):
            Adds and gathers over ranks.
        guard ([`NonFiniteGuard`]):
            Is told of micro-batches with numbers that are not finite.
        teacher_ids (`list[str | None]`):
            Ids of the teachers.
        mixes_lambda (`bool`):
            Whether rows may differ in λ.
        eos_token_ids (`list[int]`):
            The ids that end a completion.
    """

    def __init__(
        self,
        args: GOPDConfig,
        schedule: LambdaSchedule,
        accelerator: Any,
        guard: NonFiniteGuard,
        *,
        teacher_ids: list[str | None],
        mixes_lambda: bool,
        eos_token_ids: list[int],
    ) -> None:
        self.args, self.schedule, self.accelerator, self.guard = args, schedule, accelerator, guard
        self.teacher_ids, self.eos_token_ids = teacher_ids, eos_token_ids
        is_scheduled = schedule.kind != "constant" or schedule.back_off is not None
        is_gated = args.gopd_deterministic_above is not None or args.gopd_needs_agreement
        self._varies = mixes_lambda or is_scheduled or is_gated
        self._is_first = True
        self._deviations: Tensor | None = None  # of this optimizer step, for the adaptive schedule

    @torch.no_grad()
    def micro_batch(
        self, estimate: Estimate, batch: Batch, *, advantages: Tensor, is_training: bool
    ) -> dict[str, float]:
        """
        Metrics of a micro-batch by name; of one with numbers that are not finite, `nonfinite_share` alone. The first
        one in training is also looked at for whether it can learn.

        Args:
            estimate ([`Estimate`]), batch ([`Batch`]):
                The micro-batch.
            advantages (`torch.Tensor` of shape `(B, T)`):
                What the loss will multiply the ratios with.
            is_training (`bool`):
                Whether it is trained on.
        """
        clip = self.args.gopd_extrapolation_clip
        values = token_values(
            estimate, batch, eos_token_ids=self.eos_token_ids, extrapolation_clip=clip, varies=self._varies
        )
        nonfinite = self.guard.nonfinite_tokens(estimate, batch, advantages)
        values[NONFINITE_SHARE] = nonfinite.float(), batch.loss_mask.bool()
        add_over_ranks = functools.partial(self.accelerator.reduce, reduction="sum")
        by_name = means(values, batch.teacher_index, self.teacher_ids, add_over_ranks=add_over_ranks)
        share = by_name.pop(NONFINITE_SHARE, 0.0)
        if share:
            self.guard.micro_batch(nonfinite, estimate, batch, advantages, is_training=is_training)
            return {NONFINITE_SHARE: share}
        own, known = values["advantage_mean"]
        largest = torch.cat([own[known].abs(), own.new_zeros(1)]).max().reshape(1)
        if is_training:
            if self._is_first:
                for reason in nothing_to_learn(by_name):
                    logger.warning(reason)
            self._is_first = False
            self._add_deviations(estimate)
        return summarize(by_name, self.accelerator.gather(largest).max().item())

    def completions(
        self, completion_ids: Tensor, lengths: Tensor, *, step: int, is_training: bool
    ) -> dict[str, float]:
        """
        Metrics of a batch of completions `(B, T)` with `lengths` `(B,)` tokens, by name. In training they may move λ
        after optimizer step `step`.
        """
        written = torch.arange(completion_ids.size(1), device=completion_ids.device) < lengths.unsqueeze(1)
        rows = completion_rows(completion_ids, written, self.eos_token_ids)
        summary = summarize_completions(self.accelerator.gather(rows))
        if is_training:
            for alarm in self.schedule.observe_completions(summary):
                logger.warning("λ moves towards 1 after step %d: %s.", step, alarm)
        return {"p95_length": summary.p95_length, "repetition": summary.repetition}

    def end_step(self) -> None:
        """Tells the schedule, at the end of an optimizer step, how far the student is from its teacher."""
        was_skipped = self.guard.end_step()
        if self._deviations is not None and not was_skipped:
            self.schedule.observe_deviations(self.accelerator.reduce(self._deviations, reduction="sum"))
        self._deviations = None

    def _add_deviations(self, estimate: Estimate) -> None:
        if self.schedule.kind != "adaptive" or estimate.reference_logps is None:
            return
        known = estimate.known.bool()
        squares = deviation_squares(
            student_logps=estimate.student_logps,
            teacher_logps=estimate.teacher_logps,
            reference_logps=estimate.reference_logps,
            mask=known if estimate.has_reference is None else known & estimate.has_reference,
        )
        self._deviations = squares if self._deviations is None else self._deviations + squares
