"""
What a run leaves in its checkpoints beside what the trainer leaves there: its frozen models, its settings, where it is
within a generation batch, and what the schedule of λ has observed.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import written_whole
from ._trl import get_rollouts, set_rollouts
from .checkpoints import MANIFEST, STATE
from .config import GOPDConfig
from .frozen.identity import is_partial, is_same_identity
from .nonfinite import NonFiniteGuard
from .schedules import LambdaSchedule


logger = logging.getLogger(__name__)

Identities = dict[str, dict[str, dict[str, Any]]]  # of frozen models, by role and teacher id
# With which rows, and how many at a time, the ranks train: rollouts that were stored fit no other layout.
LAYOUT = (
    "num_processes",
    "num_rows",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "seed",
    "data_seed",
    "shuffle_dataset",
)
# Options that change what a step does, apart from the layout
OPTIONS = (
    "gopd_lambda",
    "gopd_estimator",
    "gopd_top_k",
    "gopd_extrapolation_clip",
    "num_loss_tokens_to_skip",
    "gopd_discount",
    "gopd_lambda_schedule",
    "gopd_lambda_warmup_steps",
    "gopd_lambda_gain",
    "gopd_back_off",
    "gopd_deterministic_above",
    "gopd_needs_agreement",
    "gopd_lambda_by_teacher",
    "gopd_weight_by_teacher",
    "use_stored_completions",
    "overlong_teacher_prompts",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "max_completion_length",
    "mask_truncated_completions",
    "chat_template_kwargs",
    "use_vllm",
    "loss_type",
    "beta",
    "epsilon",
    "epsilon_high",
    "scale_rewards",
    "reward_weights",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
)


class RunState:
    """
    Saves and restores what of a run stands in no file of the trainer. All ranks have to call its methods together.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer of the run, with its configuration, its ranks, its data set and its rollouts.
        schedule ([`LambdaSchedule`]), guard ([`NonFiniteGuard`]):
            Whose state is saved.
        identities (`Callable`):
            Returns what tells the frozen models from others, by role and teacher id.
    """

    def __init__(
        self, trainer: Any, schedule: LambdaSchedule, guard: NonFiniteGuard, identities: Callable[[], Identities]
    ) -> None:
        args: GOPDConfig = trainer.args
        self.trainer, self.args, self.accelerator = trainer, args, trainer.accelerator
        self.schedule, self.guard, self.identities = schedule, guard, identities
        values = {name: getattr(args, name, None) for name in (*LAYOUT, *OPTIONS)}
        values["num_processes"] = self.accelerator.num_processes
        if hasattr(trainer.train_dataset, "__len__"):
            values["num_rows"] = len(trainer.train_dataset)
        self.settings: dict[str, Any] = json.loads(json.dumps(values, default=str))
        self._micro_steps = (args.steps_per_generation or 1) * args.num_iterations  # of one generation batch

    def save(self, folder: Path) -> None:
        """
        Writes what `load` reads into a checkpoint, before the trainer writes the file with which it takes the
        checkpoint for complete. The micro-batches of the generation batch are kept if they will be used again.
        """
        step, rollouts = get_rollouts(self.trainer)
        folder.mkdir(parents=True, exist_ok=True)
        own = self._rollouts_path(folder)
        if self.args.should_save:
            (folder / MANIFEST).unlink(missing_ok=True)  # that of an earlier checkpoint of this step
            more = {"settings": self.settings, "micro_step": step, "skipped_steps": self.guard.skipped_steps}
            write_state(folder, self.identities(), self.schedule, **more)
        if step % self._micro_steps and rollouts is not None:
            with written_whole(own) as part:
                torch.save(_on("cpu", rollouts), part)
        else:
            own.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()  # no rank may complete a checkpoint that lacks something of another one

    def load(self, folder: Path) -> None:
        """
        Puts back what `save` found, except for rollouts, where rows are laid out in another way now. Settings that
        have changed are logged.
        """
        saved = read_state(folder, self.identities(), self.schedule)
        self.guard.skipped_steps = saved.get("skipped_steps", 0)
        before: dict[str, Any] = saved.get("settings", {})
        changed = [name for name, value in self.settings.items() if name in before and before[name] != value]
        for name in changed:
            self._warn(
                f"`{name}` was {before[name]!r} when {folder} was written and is {self.settings[name]!r} now. The run "
                "goes on with the latter, and is another one than without the interruption."
            )
        step = saved.get("micro_step", 0)
        is_within = step % self._micro_steps != 0
        if set(changed) & set(LAYOUT):
            if is_within:
                self._warn(f"The rollouts in {folder} fit no other layout of rows, so new ones are sampled.")
            set_rollouts(self.trainer, 0, None)
        else:
            set_rollouts(self.trainer, step, self._read_rollouts(folder) if is_within else None)

    def _read_rollouts(self, folder: Path) -> list[dict[str, Any]]:
        path = self._rollouts_path(folder)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing, which holds the rest of a generation batch. Resume from another checkpoint; to "
                "go on from the weights alone, pass the folder as `model`."
            )
        # torch cannot restore to "cpu:0", the device of a rank without an accelerator
        stored = torch.load(path, map_location="cpu", weights_only=True)
        rollouts: list[dict[str, Any]] = _on(self.accelerator.device, stored)
        return rollouts

    def _rollouts_path(self, folder: Path) -> Path:
        return folder / f"gopd_rollouts_{self.accelerator.process_index}.pt"

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(message)


def write_state(folder: Path, models: Identities, schedule: LambdaSchedule, **more: Any) -> None:
    """Writes what `read_state` reads, and `more`, into the folder of a checkpoint."""
    state = {**models, "lambda_schedule": schedule.state_dict(), **more}
    with written_whole(folder / STATE) as part:
        part.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def read_state(folder: Path, models: Identities, schedule: LambdaSchedule) -> dict[str, Any]:
    """
    Restores what a run saved in its checkpoint.

    Args:
        folder (`Path`):
            The checkpoint.
        models (`dict[str, dict]`):
            Identities of this run's frozen models, by role and teacher id.
        schedule ([`LambdaSchedule`]):
            Given what it had observed.

    Returns:
        `dict[str, Any]`: all that was saved.

    Raises:
        `ValueError`: If the file is missing or damaged, or the run that saved it had other frozen models.
    """
    path = folder / STATE
    remedy = "Resume from another checkpoint; to go on from the weights alone, pass the folder as `model`."
    if not path.is_file():
        raise ValueError(f"{path} is missing, so the run that wrote the checkpoint cannot be continued. {remedy}")
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = {role: {str(key): dict(model) for key, model in saved[role].items()} for role in models}
        observed = dict(saved["lambda_schedule"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
    for role, present in models.items():
        _compare(folder, role, before[role], present)
    try:
        schedule.load_state_dict(observed)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). {remedy}") from error
    return saved


def _compare(
    folder: Path, role: str, before: Mapping[str, Mapping[str, Any]], present: Mapping[str, Mapping[str, Any]]
) -> None:
    if before.keys() != present.keys():
        raise ValueError(
            f"The checkpoint {folder} was trained with the {role} {list(before)}, and this run has {list(present)}. "
            "Pass the same ones, or start anew with another `output_dir`."
        )
    for key, model in present.items():
        if not is_same_identity(before[key], model):
            raise ValueError(
                f"The checkpoint {folder} was trained with {before[key]} among its {role}"
                f"{f' as {key!r}' if key else ''}, and this run has {model}. Pass the same model, or start anew "
                "with another `output_dir`."
            )
        if is_partial(before[key]) and not is_partial(model):
            logger.warning(
                "%s was written by an earlier version, whose checksums did not cover all weights, so %s was compared "
                "by its name with one of its %s.",
                folder,
                model.get("name"),
                role,
            )


def _on(device: Any, value: Any) -> Any:
    """A copy with all tensors on a device, each with a memory of its own: of slices, each would save the whole."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _on(device, part) for key, part in value.items()}
    return [_on(device, part) for part in value] if isinstance(value, list | tuple) else value
