"""
What a run leaves in its checkpoints beside what the trainer leaves there: its frozen models, its settings, where it is
within a generation batch, and what the schedule of λ has observed.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import os_error_number, written_whole
from ._trl import get_rollouts, set_rollouts
from .checkpoints import FORMAT, STATE, begin, read_json, rotate, whole_checkpoint, write_manifest
from .config import GOPDConfig
from .frozen.identity import is_partial, is_same_identity
from .frozen.local import vocab_size_of
from .frozen.start import StudentStart
from .nonfinite import NonFiniteGuard
from .ranks import is_of_another_rank
from .rollout_file import read_rollouts, write_rollouts
from .schedules import LambdaSchedule
from .sole_writer import sole_writer


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

    def alone(self) -> AbstractContextManager[None]:
        """Context in which no other run saves checkpoints into the same folder; nothing if this one saves none."""
        saves = self.args.save_strategy != "no"
        return sole_writer(Path(self.args.output_dir), self.accelerator) if saves else nullcontext()

    @contextmanager
    def saved(self, output_dir: Path, start: StudentStart | None) -> Iterator[None]:
        """
        Around the trainer's writing of a checkpoint: before it, what `load` reads; after it, the manifest. Only when
        this is on the disk are older checkpoints removed.

        Args:
            output_dir (`Path`):
                Folder of the checkpoints.
            start ([`StudentStart`], *optional*):
                The student's start, if it has to be kept.
        """
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.trainer.state.global_step}"
        limit = self.args.save_total_limit
        try:
            if self.args.should_save:
                begin(folder)
            self.accelerator.wait_for_everyone()
            self._save(folder)
            if start is not None and self.args.should_save:
                start.save(folder)
            self.accelerator.wait_for_everyone()  # no rank may complete what lacks something of another one
            self.args.save_total_limit = None
            yield
            self.accelerator.wait_for_everyone()  # the files of all ranks are there
            if self.args.should_save:
                write_manifest(folder)
                rotate(folder, limit=limit, best=self.trainer.state.best_model_checkpoint)
        except Exception as error:  # of which class, each library that writes decides for itself
            is_of_disk = (
                isinstance(error, OSError | RuntimeError | SafetensorError) or os_error_number(error) is not None
            )
            if not is_of_disk or is_of_another_rank(error):
                raise
            free = shutil.disk_usage(folder.parent).free
            raise OSError(
                f"The checkpoint {folder} could not be written, on a disk with {free} free bytes "
                f"({type(error).__name__}: {error}). Make room; then go on with `resume_from_checkpoint=True`, which "
                "takes the newest whole one."
            ) from error
        finally:
            self.args.save_total_limit = limit

    def _save(self, folder: Path) -> None:
        """The micro-batches of the generation batch are kept if they will be used again."""
        step, rollouts = get_rollouts(self.trainer)
        if self.args.should_save:
            more = {"settings": self.settings, "micro_step": step, **self.guard.state_dict()}
            write_state(folder, self.identities(), self.schedule, **more)
        own = self._rollouts_path(folder)
        if step % self._micro_steps and rollouts is not None:
            write_rollouts(own, rollouts)
        else:
            own.unlink(missing_ok=True)

    def resume(self, given: str | os.PathLike[str] | bool | None, start: StudentStart | None) -> str | None:
        """
        Puts back what `saved` wrote, and returns the folder of the checkpoint for the trainer; `None` to start anew.

        Args:
            given (`str` or `os.PathLike` or `bool`, *optional*):
                A checkpoint, or `True` for the newest whole one.
            start ([`StudentStart`], *optional*):
                The student's start, if it is kept.
        """
        folder = whole_checkpoint(given, self.args.output_dir, self.accelerator)
        if folder is None:
            return None
        if start is not None:  # before it is compared with that of the checkpoint
            start.load(folder)
        self.load(folder)
        return str(folder)

    def load(self, folder: Path) -> None:
        """
        Puts back what a checkpoint has, except for rollouts, where rows are laid out in another way now. Settings that
        have changed are logged.
        """
        saved = read_state(folder, self.identities(), self.schedule)
        before, step = saved["settings"], saved["micro_step"]
        changed = [name for name, value in self.settings.items() if name in before and before[name] != value]
        for name in changed:
            self._warn(
                f"`{name}` was {before[name]!r} when {folder} was written and is {self.settings[name]!r} now. The run "
                "goes on with the latter, and is another one than without the interruption."
            )
        is_within = step % self._micro_steps != 0
        if set(changed) & set(LAYOUT):
            if is_within:
                self._warn(f"The rollouts in {folder} fit no other layout of rows, so new ones are sampled.")
            set_rollouts(self.trainer, 0, None)
        else:
            set_rollouts(self.trainer, step, self._read_rollouts(folder) if is_within else None)
        self.guard.load_state_dict(saved)

    def _read_rollouts(self, folder: Path) -> list[dict[str, Any]]:
        return read_rollouts(
            self._rollouts_path(folder),
            self.accelerator.device,
            micro_batches=self.args.steps_per_generation,
            rows=self.args.per_device_train_batch_size,
            vocab_size=vocab_size_of(self.trainer.model.config),
            num_teachers=len(self.identities()["teachers"]),
        )

    def _rollouts_path(self, folder: Path) -> Path:
        return folder / f"gopd_rollouts_{self.accelerator.process_index}.pt"

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(message)


def write_state(folder: Path, models: Identities, schedule: LambdaSchedule, **more: Any) -> None:
    """Writes what `read_state` reads, and `more`, into the folder of a checkpoint."""
    state = {"format": FORMAT, **models, "lambda_schedule": schedule.state_dict(), **more}
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
        saved = read_json(path)
        before = {role: {str(key): dict(model) for key, model in saved[role].items()} for role in models}
        observed = dict(saved["lambda_schedule"])
        for model in (model for models_of_role in before.values() for model in models_of_role.values()):
            if not all(isinstance(model.get(name), str | None) for name in ("weights", "config")):
                raise ValueError(f"a checksum is no text in {model}")
        _check_counts(saved)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
    for role, present in models.items():
        _compare(folder, role, before[role], present)
    try:
        schedule.load_state_dict(observed)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). {remedy}") from error
    return saved


def _check_counts(saved: dict[str, Any]) -> None:
    """Sets what earlier versions did not write, and raises `ValueError` for what cannot have been written."""
    number = saved.setdefault("format", 1)
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise ValueError(f"its `format` is {number!r}, and this version reads up to {FORMAT}; a later one may read it")
    for name in ("micro_step", *NonFiniteGuard.COUNTS):
        count = saved.setdefault(name, 0)
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"`{name}` must be a whole number from 0 on, got {count!r}")
    if not isinstance(saved.setdefault("settings", {}), dict):
        raise ValueError(f"`settings` must be a dictionary, got {saved['settings']!r}")


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
