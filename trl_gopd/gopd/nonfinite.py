"""
Numbers that are not finite are found before an optimizer step is taken with them, and all ranks then do the same.

Four things are looked at: the scores of frozen models and the task rewards, once a generation batch; what a
micro-batch is trained with; and the norm of the gradient, which shows everything else.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from .batch import Batch, Scores
from .config import GOPDConfig
from .estimators.protocol import Estimate
from .frozen.address import redacted
from .frozen.build import FrozenModels
from .frozen.identity import is_sharded
from .frozen.protocols import ROUNDING
from .frozen.routing import Routing
from .ranks import OtherRankError


logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 80  # of a prompt
REMEDIES = {
    "teacher_model": "Check the weights of this teacher, or load it in a wider dtype with "
    "`teacher_model_init_kwargs={'dtype': 'float32'}`.",
    "ref_model": "Check the weights of this reference, or load it in a wider dtype with "
    "`ref_model_init_kwargs={'dtype': 'float32'}`.",
    "model": "Lower `learning_rate`, set `max_grad_norm`, or train in a wider dtype.",
    "reward_funcs": "Return a finite number, or None where the function has no say.",
}
OR_SKIP = "To leave optimizer steps like this one out, use `gopd_nonfinite='skip'`."


class NonFiniteGuard:
    """
    Raises, or leaves an optimizer step out, when a number is not finite. All ranks have to call its methods together.

    Args:
        args ([`GOPDConfig`]):
            Configuration of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Adds over ranks.
        frozen ([`FrozenModels`]):
            Teachers and references, whose vocabularies are needed.
        routing ([`Routing`]):
            Knows how the user calls them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes what is shown in messages.
    """

    COUNTS = ("skipped_steps", "skipped_in_a_row")  # what a checkpoint keeps

    def __init__(
        self, args: GOPDConfig, accelerator: Any, *, frozen: FrozenModels, routing: Routing, tokenizer: Any
    ) -> None:
        self.skips, self.max_skipped_steps = args.gopd_nonfinite == "skip", args.gopd_max_skipped_steps
        self.accelerator, self.tokenizer = accelerator, tokenizer
        self.engine_steps = accelerator.distributed_type == "DEEPSPEED"
        # A gradient that overflows in float16 is the business of the gradient scaler, which leaves the step out, too.
        self.has_scaler = accelerator.mixed_precision == "fp16"
        given = {"teacher_model": routing.teachers, "ref_model": routing.references}
        self._labels = {role: [_label(role, *item) for item in models.items()] for role, models in given.items()}
        scorers = {"teacher_model": frozen.teachers.values(), "ref_model": frozen.references.values()}
        self._sizes = {role: torch.tensor([_vocab_size(s) for s in models]) for role, models in scorers.items()}
        self._is_sharded = any(scorer.is_sharded for models in scorers.values() for scorer in models)
        self._rows: Sequence[Mapping[str, Any]] = []  # of the data set, in the order of the generation batch
        self._has_infinite_reward = False
        self._batch_reason: str | None = None  # what is wrong with this generation batch
        self._step_reason: str | None = None  # why the next optimizer step is left out
        self._skipped: Any = None  # the optimizer, between a step that is left out and its end
        self.skipped_steps = self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """How many steps were left out."""
        return {name: getattr(self, name) for name in self.COUNTS}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restores what `state_dict` returned."""
        for name in self.COUNTS:
            setattr(self, name, state[name])

    # One generation batch

    def rewards(self, rewards: Tensor, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """
        Looks for infinite task rewards; NaN means that a function has no say, as in TRL.

        Args:
            rewards (`torch.Tensor` of shape `(N, F)`):
                Rewards of the completions of all ranks by each function.
            names (`Sequence[str]`):
                Names of the functions.
            rows (`Sequence[Mapping[str, Any]]`):
                Rows of the data set, one for each completion of this rank.
        """
        infinite = rewards.isinf().nonzero().tolist()
        self._has_infinite_reward, self._batch_reason = bool(infinite), None
        if infinite:
            number, function = infinite[0]
            rank, row = divmod(number, len(rows))
            reason = None
            if rank == self.accelerator.process_index:
                prompt = _shown(rows[row].get("prompt"))
                reason = (
                    f"The reward function `{names[function]}` gave {rewards[number, function].item()} to the "
                    f"completion of the prompt {prompt}. {REMEDIES['reward_funcs']}"
                )
            self._batch_reason = self._raise_unless_skipped(self._first(reason))
        return rewards

    def task_advantages(self, advantages: Tensor) -> Tensor:
        """GRPO's advantages `(B,)`; all NaN where a reward was infinite, since GRPO replaces by 0 what came of it."""
        return torch.full_like(advantages, torch.nan) if self._has_infinite_reward else advantages

    def scores(self, compute: Callable[[], Scores], batch: Batch, rows: Sequence[Mapping[str, Any]]) -> Scores:
        """
        Scores of frozen models in which every number that they should not give is NaN; [`FloatingPointError`] if there
        are some, unless steps are skipped, or if no token at all can be trained on. An error of one rank is raised on
        all.

        Args:
            compute (`Callable`):
                Asks the frozen models.
            batch ([`Batch`]):
                The generation batch.
            rows (`Sequence[Mapping[str, Any]]`):
                Its rows of the data set.
        """
        self._rows = rows
        failure: Exception | None = None
        try:
            scores = compute()
        except Exception as error:
            if self._is_sharded:  # the other ranks wait for this one inside the model
                raise
            scores, failure = Scores(), error
        wanted = batch.loss_mask.bool()
        invalid = {role: self._invalid(logps, role, batch) for role, logps in _by_role(scores).items()}
        if scores.top_logps is not None:
            invalid["teacher_model"] |= wanted & ~(scores.top_logps <= ROUNDING).all(-1)
        usable = wanted
        for logps in _by_role(scores).values():
            usable = usable & ~logps.isneginf()
        counts = [sum(mask.sum() for mask in invalid.values()), wanted.sum(), usable.sum()]
        counts.insert(0, wanted.new_tensor(failure is not None))
        totals = torch.stack([torch.as_tensor(count, device=wanted.device).float() for count in counts])
        failed, broken, tokens, left = self.accelerator.reduce(totals, reduction="sum").tolist()
        if failed:
            rank = self.accelerator.process_index
            said = self._first(None if failure is None else f"Rank {rank}: {type(failure).__name__}: {failure}")
            raise failure or OtherRankError(said)
        if broken:
            self._batch_reason = self._raise_unless_skipped(self._first(self._explain_scores(scores, batch, invalid)))
        if tokens and not left:
            raise FloatingPointError(self._first(self._explain_unusable(scores, batch)))
        cleaned = {
            "teacher_logps" if role == "teacher_model" else "reference_logps": logps.masked_fill(
                invalid[role], torch.nan
            )
            for role, logps in _by_role(scores).items()
            if broken
        }
        return replace(scores, **cleaned)

    def _invalid(self, logps: Tensor, role: str, batch: Batch) -> Tensor:
        """Which tokens `(B, T)` have a log-probability that is NaN, above 0, or -inf though the model has the id."""
        has_id = batch.completion_ids < self._sizes[role].to(logps.device)[batch.teacher_index].unsqueeze(1)
        return batch.loss_mask.bool() & (~(logps <= ROUNDING) | logps.isneginf() & has_id)

    # One micro-batch

    def nonfinite_tokens(self, estimate: Estimate, batch: Batch, advantages: Tensor) -> Tensor:
        """Which tokens `(B, T)` are trained on with numbers that are not finite; `advantages` are the final ones."""
        is_finite = advantages.isfinite() & estimate.logps.isfinite()
        for logps in (estimate.teacher_logps, estimate.reference_logps):
            if logps is not None:  # -inf is an id that the model does not have
                is_finite &= logps < torch.inf
        return batch.loss_mask.bool() & ~is_finite

    def micro_batch(
        self, nonfinite: Tensor, estimate: Estimate, batch: Batch, advantages: Tensor, *, is_training: bool
    ) -> None:
        """
        Raises, or marks the optimizer step as one to leave out; called when `nonfinite_tokens` of any rank are some.
        """
        reason = self._batch_reason or self._first(self._explain_estimate(nonfinite, estimate, batch, advantages))
        self._raise_unless_skipped(reason)
        if is_training:
            self._step_reason = self._step_reason or reason
        elif self.accelerator.is_main_process:
            logger.warning(reason)

    # One optimizer step

    def gradient(self, norm: Any, optimizer: Any, *, step: int) -> dict[str, list[float]]:
        """
        Called before the optimizer step, with the norm of the gradient of all ranks. Returns metrics by name.

        Args:
            norm (`torch.Tensor` or `float`, *optional*):
                The norm, before it is clipped.
            optimizer ([`~accelerate.optimizer.AcceleratedOptimizer`]):
                The optimizer.
            step (`int`):
                How many steps were taken so far.
        """
        reason, self._step_reason = self._step_reason, None
        if reason is None and norm is not None and not self.has_scaler and not math.isfinite(norm):
            after = "was not taken"
            if self.engine_steps:
                after = "was taken by DeepSpeed, so the weights in memory are lost; resume from the last checkpoint"
            reason = self._raise_unless_skipped(
                f"The norm of the gradient is {float(norm)}. Optimizer step {step + 1} {after}. {REMEDIES['model']}"
            )
        if reason is None:
            self.skipped_in_a_row = 0
        else:
            self._skip(reason, optimizer, step + 1)
        return {"gopd/skipped_steps": [float(self.skipped_steps)]} if self.skips else {}

    def _skip(self, reason: str, optimizer: Any, step: int) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} optimizer steps in a row had to be left out, up to step {step}. {reason} "
                f"The limit is `gopd_max_skipped_steps={self.max_skipped_steps}`."
            )
        if self.accelerator.is_main_process:
            logger.warning("Optimizer step %d is left out. %s", step, reason)
        skip_step(optimizer)
        self._skipped = optimizer

    def weights(self, model: nn.Module, *, step: int) -> None:
        """
        [`FloatingPointError`] if a trained weight is not finite, so that it is never saved. Of a student that is split
        over ranks each looks at its part, and all have to call this together.

        Args:
            model (`torch.nn.Module`):
                The student.
            step (`int`):
                How many steps were taken so far.
        """
        broken = next((name for name, p in model.named_parameters() if p.requires_grad and not _is_finite(p)), None)
        if is_sharded(self.accelerator):
            broken = next((name for name in gather_object([broken]) if name is not None), None)
        if broken is not None:
            raise FloatingPointError(
                f"The weights of the student, {broken} for one, are not finite after optimizer step {step}, so they "
                f"are not saved. {REMEDIES['model']} To go on from the newest checkpoint, use "
                "`resume_from_checkpoint=True`."
            )

    def end_step(self) -> bool:
        """Whether the optimizer step that has just ended was left out."""
        optimizer, self._skipped = self._skipped, None
        if optimizer is not None:
            optimizer._is_overflow = False
        return optimizer is not None

    # What is said

    def _first(self, message: str | None) -> str:
        """The message of the first rank that has one."""
        messages: list[str | None] = gather_object([message])
        return next(text for text in messages if text is not None)

    def _raise_unless_skipped(self, reason: str) -> str:
        if not self.skips:
            raise FloatingPointError(reason if self.engine_steps else f"{reason} {OR_SKIP}")
        return reason

    def _where(self, batch: Batch, row: int, token: int) -> str:
        place = int(batch.row[row])
        prompt = self._rows[place].get("prompt") if place < len(self._rows) else None
        if prompt is None:
            ids = batch.prompt_ids[row][batch.prompt_mask[row].bool()]
            prompt = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        index = int(batch.completion_ids[row, token])
        return (
            f"token {token} of the completion (id {index}, {self.tokenizer.decode([index])!r}) in row {place} of the "
            f"generation batch of rank {self.accelerator.process_index}, whose prompt is {_shown(prompt)}"
        )

    def _explain_scores(self, scores: Scores, batch: Batch, invalid: Mapping[str, Tensor]) -> str | None:
        for role, logps in _by_role(scores).items():
            for row, token in invalid[role].nonzero()[:1].tolist():
                label = self._labels[role][int(batch.teacher_index[row])]
                return (
                    f"{label} gave the log-probability {logps[row, token].item()} to "
                    f"{self._where(batch, row, token)}. It must be finite and at most 0. {REMEDIES[role]}"
                )
        return None

    def _explain_unusable(self, scores: Scores, batch: Batch) -> str | None:
        wanted = batch.loss_mask.bool()
        if not wanted.any():
            return None
        counts = [
            f"{int((wanted & logps.isneginf()).sum())} are not in the vocabulary of {' or '.join(self._labels[role])}"
            for role, logps in _by_role(scores).items()
        ]
        return (
            f"None of the {int(wanted.sum())} tokens of this generation batch can be trained on: "
            f"{', '.join(counts)}. Check that the student, its tokenizer and these models have the same token ids."
        )

    def _explain_estimate(self, nonfinite: Tensor, estimate: Estimate, batch: Batch, advantages: Tensor) -> str | None:
        if not nonfinite.any():
            return None
        row, token = nonfinite.nonzero()[0].tolist()
        where = self._where(batch, row, token)
        for role, logps in (("teacher_model", estimate.teacher_logps), ("ref_model", estimate.reference_logps)):
            if logps is not None and not logps[row, token] < torch.inf:
                label = self._labels[role][int(batch.teacher_index[row])]
                return f"{label} gave the log-probability {logps[row, token].item()} to {where}. {REMEDIES[role]}"
        if not batch.task_advantages[row].isfinite():
            return f"The task reward is not finite at {where}. {REMEDIES['reward_funcs']}"
        if not estimate.student_logps[row, token].isfinite() or not estimate.logps[row, token].isfinite():
            value = estimate.logps[row, token].item()
            return f"The student gave the log-probability {value} to {where}. {REMEDIES['model']}"
        value = estimate.gopd_lambda.expand(nonfinite.shape)[row, token].item()
        return (
            f"The advantage is {advantages[row, token].item()} at {where}, with λ = {value:.4g}, though every model "
            "gave a finite log-probability to it. Lower λ, set `gopd_extrapolation_clip`, or check what the models "
            "give to other tokens."
        )


def skip_step(optimizer: Any) -> None:
    """
    Makes the next `step` of an [`~accelerate.optimizer.AcceleratedOptimizer`] do nothing, and accelerate say so, as it
    does of float16 steps that overflow. The trainer then leaves the schedule of the learning rate where it is.
    """
    taken = optimizer.__dict__.get("step")  # a scheduler of the learning rate has put a wrapper there

    def step(closure: Any = None) -> None:
        del optimizer.step
        if taken is not None:
            optimizer.step = taken
        if optimizer.scaler is not None:  # forgets that the gradient was unscaled, and keeps its scale
            optimizer.scaler.update(optimizer.scaler.get_scale())
        optimizer._is_overflow = True

    optimizer.step = step


def _is_finite(parameter: Any) -> bool:
    """Whether the part of a parameter that this rank holds is finite."""
    own = getattr(parameter, "ds_tensor", parameter)  # of ZeRO-3
    if hasattr(own, "to_local"):  # of FSDP
        own = own.to_local()
    return bool(own.detach().isfinite().all())


def _by_role(scores: Scores) -> dict[str, Tensor]:
    found = {"teacher_model": scores.teacher_logps, "ref_model": scores.reference_logps}
    return {role: logps for role, logps in found.items() if logps is not None}


def _label(role: str, key: str | None, given: Any) -> str:
    """What the user calls a frozen model."""
    name = f"`{role}`" if key is None else f"`{role}[{key!r}]`"
    if given is None:
        return f"{name} (the student's start)"
    return f"{name} ({redacted(given) if isinstance(given, str) else type(given).__name__})"


def _vocab_size(scorer: Any) -> int:
    """Ids that a frozen model is known to have; 0 where only a server or a file knows."""
    size: int = getattr(getattr(scorer, "wrapped", None) or scorer, "vocab_size", 0)
    return size


def _shown(prompt: Any) -> str:
    if isinstance(prompt, list) and prompt:  # a conversation
        prompt = prompt[-1].get("content")
    text = str(prompt)
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")
