"""
What happens to a run of G-OPD that dies, whose disk is full, whose checkpoints rot, or whose numbers are not finite.

A run ends as it would have without the fault, bit for bit: weights, the optimizer's state, the learning rate, λ's
state and the random numbers. Or it says in one error what is wrong. Runs sample their completions, accumulate
gradients, and reuse what was sampled over four optimizer steps, so that most checkpoints lie within a generation
batch. Only "stratified" samples for each step.
"""

import atexit
import contextlib
import functools
import io
import logging
import math
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import TrainerCallback

from tests.faults.disks import small_disk
from tests.faults.harness import Ending, Trial, scenario
from tests.faults.processes import Exit, KillAfter, KillAt, count_events, forked
from tests.tiny import build_model, build_tokenizer
from trl_gopd.gopd.checkpoints import STATE, UNFINISHED, problem
from trl_gopd.gopd.config import GOPDConfig
from trl_gopd.gopd.trainer import GOPDTrainer


ESTIMATORS = ("sampled", "full", "stratified")
STEPS = 4
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 5,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "optim": "adamw_torch",
    "gopd_lambda_schedule": "adaptive",
    "gopd_back_off": {"max_truncated_share": 0.1},
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


@functools.cache
def models() -> Path:
    """Folders of a student, a teacher and a reference, for as long as this process lives."""
    logging.getLogger("trl_gopd").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="trl_gopd_models_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = build_tokenizer()
    for name, seed in (("student", 1), ("teacher", 2), ("base", 3)):
        build_model(tokenizer, seed=seed, hidden_size=16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def build(estimator: str, cls: type[GOPDTrainer] = GOPDTrainer, **changed: Any) -> GOPDTrainer:
    """A trainer that writes nowhere yet."""
    folder = models()
    given = ("reward_funcs", "train_dataset", "teacher_model")
    arguments = {name: changed.pop(name) for name in given if name in changed}
    arguments.setdefault("teacher_model", str(folder / "teacher"))
    arguments.setdefault("train_dataset", Dataset.from_dict({"prompt": [f"{i}+{i + 3}" for i in range(16)]}))
    reuse = {} if estimator == "stratified" else {"steps_per_generation": 4, "num_iterations": 2}
    options = {**OPTIONS, "gopd_estimator": estimator, **reuse}
    return cls(
        model=str(folder / "student"),
        ref_model=str(folder / "base"),
        args=GOPDConfig(**{**options, "output_dir": str(folder / "nowhere"), **changed}),
        processing_class=build_tokenizer(),
        **arguments,
    )


@functools.cache
def kept_trainer(estimator: str) -> GOPDTrainer:
    """One that is only ever used in forked processes, so that it stays as it is."""
    return build(estimator)


def result(trainer: GOPDTrainer) -> dict[str, Any]:
    """All that a run leaves, to be compared bit for bit."""
    optimizer = trainer.optimizer.state_dict()
    moments = {f"{key} of {n}": v for n, state in optimizer["state"].items() for key, v in state.items()}
    tensors = {**trainer.model.state_dict(), **moments, "random numbers": torch.get_rng_state()}
    return {
        **{name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        "groups": repr(optimizer["param_groups"]),
        "learning rate": trainer.lr_scheduler.get_last_lr(),
        "schedule": trainer._schedule.state_dict(),
        "skipped": trainer._guard.state_dict(),
    }


def assert_same(result: dict[str, Any], estimator: str, *, but: tuple[str, ...] = ()) -> None:
    """The result is that of the run without faults."""
    want = uninterrupted(estimator)[0]
    differing = [name for name in want if name not in but and result[name] != want[name]]
    assert result.keys() == want.keys() and not differing, f"{estimator}: {differing[:5]} differ."


def train(trainer: GOPDTrainer, folder: Path, resume: bool | str | None = None) -> dict[str, Any]:
    """Trains in a folder, and returns the `result`."""
    trainer.args.output_dir = str(folder)
    set_seed(trainer.args.seed, device_specific=True)  # as the constructor ends with, wherever this process was since
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume)
    return result(trainer)


@functools.cache
def uninterrupted(estimator: str) -> tuple[dict[str, Any], Path]:
    """What a run without faults ends in, and a folder with all of its checkpoints."""
    folder = models() / f"uninterrupted-{estimator}"

    def run() -> dict[str, Any]:
        trainer = kept_trainer(estimator)
        trainer.args.save_total_limit = None
        return train(trainer, folder)

    return done(forked(run)), folder


def done(ended: Exit) -> Any:
    """What a forked process returned, which neither died nor raised."""
    assert not ended.code and ended.error is None, ended.text or f"It ended with {ended.code}."
    return ended.value


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def goes_on(estimator: str, folder: Path) -> Ending:
    """A run goes on from the newest whole checkpoint, if there is the beginning of any, and ends as it should have."""
    whole = [step for step in steps(folder) if problem(folder / f"checkpoint-{step}") is None]
    again = done(forked(train, kept_trainer(estimator), folder, True if steps(folder) else None))
    # A run that was over draws no more random numbers, and does not ask which it would have drawn.
    assert_same(again, estimator, but=("random numbers",) if STEPS in whole else ())
    assert problem(folder / f"checkpoint-{STEPS}") is None, (problem(folder / f"checkpoint-{STEPS}"), steps(folder))
    return Ending.RECOVERED if whole or steps(folder) else Ending.INTACT


# Kills


@functools.cache
def events(estimator: str) -> int:
    """File events of a run."""
    with tempfile.TemporaryDirectory(dir=models()) as folder:
        out = Path(folder, "out")
        return count_events(train, kept_trainer(estimator), out, root=out)


def killed_at_an_event(trial: Trial, mode: Any) -> Ending:
    estimator = ESTIMATORS[trial.number % 3]
    event = (trial.number * 37 + trial.seed) % events(estimator)  # each comes once before any comes again
    out = trial.folder / "out"
    ended = forked(train, kept_trainer(estimator), out, kill=KillAt(event, out, mode=mode, seed=trial.number))
    assert ended.was_killed, ended
    before = steps(out)
    if mode != "power" and before and before[0] > 1:  # rotation has begun, so that one is whole
        assert any(problem(out / f"checkpoint-{step}") is None for step in before)
    return goes_on(estimator, out)


@scenario("killed at a file event of a checkpoint", area="training", tries=135, short=1)
def killed_before_an_event(trial: Trial) -> Ending:
    return killed_at_an_event(trial, "before")


@scenario("killed in the middle of writing a file of a checkpoint", area="training", tries=135, short=1)
def killed_while_writing(trial: Trial) -> Ending:
    return killed_at_an_event(trial, "torn")


@scenario("power lost at a file event of a checkpoint", area="training", tries=135, short=1)
def power_lost(trial: Trial) -> Ending:
    return killed_at_an_event(trial, "power")


@scenario("training killed at a random time", area="training", tries=200, short=1)
def killed_at_any_time(trial: Trial) -> Ending:
    estimator = ESTIMATORS[trial.number % 3]
    out = trial.folder / "out"
    for _ in range(trial.random.choice([1, 1, 1, 3])):
        forked(
            train,
            kept_trainer(estimator),
            out,
            True if steps(out) else None,
            kill=KillAfter(trial.random.uniform(0.02, 1.5)),
        )
    return goes_on(estimator, out)


# Disks


@scenario("disk full in the middle of a checkpoint", area="training", tries=60, short=1)
def full_disk(trial: Trial) -> Ending:
    estimator = ESTIMATORS[trial.number % 3]
    content = sum(path.stat().st_size for path in (uninterrupted(estimator)[1]).rglob("*"))
    size = trial.random.randint(content // 20, content)
    out, more = trial.folder / "out", trial.folder / "more"
    with small_disk(out, size):
        ended = forked(train, kept_trainer(estimator), out)
        shutil.copytree(out, more)
    if ended.error is None:
        assert_same(done(ended), estimator)
        return Ending.INTACT
    assert isinstance(ended.error, OSError), ended.text
    assert "could not be written, on a disk with" in str(ended.error), ended.text
    return goes_on(estimator, more)


# Damage


def cut(path: Path, trial: Trial) -> None:
    path.write_bytes(path.read_bytes()[: trial.random.randrange(max(path.stat().st_size, 1))])


def flip(path: Path, trial: Trial) -> None:
    data = bytearray(path.read_bytes())
    data[trial.random.randrange(len(data))] ^= 1 << trial.random.randrange(8)
    path.write_bytes(data)


def zero(path: Path, trial: Trial) -> None:
    data = bytearray(path.read_bytes())
    start = trial.random.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def delete(path: Path, trial: Trial) -> None:
    path.unlink()


def replace(path: Path, trial: Trial) -> None:
    """By the same file of another checkpoint, which can be read as well."""
    others = [folder / path.name for folder in path.parent.parent.glob("checkpoint-*") if folder != path.parent]
    other = trial.random.choice([other for other in others if other.exists()] or [path])
    path.write_bytes(other.read_bytes())


DAMAGES = (flip, cut, zero, delete, replace)


def damaged(trial: Trial, estimator: str, keep: int) -> tuple[Path, bool]:
    """A folder with the last `keep` checkpoints of a run, the newest of them damaged; whether anything has changed."""
    out = trial.folder / "out"
    shutil.copytree(uninterrupted(estimator)[1], out)
    for step in range(1, STEPS - keep):
        shutil.rmtree(out / f"checkpoint-{step}")
    shutil.rmtree(out / f"checkpoint-{STEPS}")  # with which there would be nothing left to do
    files = sorted((out / f"checkpoint-{STEPS - 1}").iterdir())
    path = files[trial.number // len(DAMAGES) % len(files)]
    before = path.read_bytes()
    DAMAGES[trial.number % len(DAMAGES)](path, trial)
    return out, not path.exists() or path.read_bytes() != before


@scenario("a file of the newest checkpoint damaged", area="training", tries=225, short=1)
def damaged_newest(trial: Trial) -> Ending:
    estimator = ESTIMATORS[trial.number // 5 % 3]
    out, has_changed = damaged(trial, estimator, keep=2)
    assert (problem(out / f"checkpoint-{STEPS - 1}") is not None) == has_changed
    ending = goes_on(estimator, out)
    return ending if has_changed else Ending.INTACT


@scenario("a file of the only checkpoint damaged", area="training", tries=75, short=1)
def damaged_only(trial: Trial) -> Ending:
    estimator = ESTIMATORS[trial.number // 5 % 3]
    out, has_changed = damaged(trial, estimator, keep=1)
    if not has_changed:
        goes_on(estimator, out)
        return Ending.INTACT
    folder = out / f"checkpoint-{STEPS - 1}"
    given = trial.random.choice([True, str(folder)])
    ended = forked(train, kept_trainer(estimator), out, given)
    assert isinstance(ended.error, ValueError), ended.text
    message = str(ended.error)
    assert problem(folder) in message and str(folder if given is not True else out) in message, message
    assert "resume_from_checkpoint" in message, message
    return Ending.REFUSED


@scenario("a checkpoint with files that were written by nobody", area="training", tries=12, short=0)
def foreign_files(trial: Trial) -> Ending:
    estimator = ESTIMATORS[trial.number % 3]
    out = trial.folder / "out"
    shutil.copytree(uninterrupted(estimator)[1], out)
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    for name in ("notes.txt", ".DS_Store", "sub/.nfs0001", UNFINISHED, f".{Path(STATE).stem}.x-1-00000000.part.json"):
        path = out / f"checkpoint-{trial.random.randint(1, STEPS - 1)}" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(trial.random.randbytes(9))
    (out / "checkpoint-latest").mkdir()
    (out / "checkpoint-9").write_text("no folder")
    assert_same(done(forked(train, kept_trainer(estimator), out, True)), estimator)
    return Ending.INTACT


@scenario("two runs in one folder", area="training", tries=30, short=1)
def two_runs(trial: Trial) -> Ending:
    estimator = ESTIMATORS[trial.number % 3]
    out, meeting = trial.folder / "out", trial.random.randrange(2 * STEPS)

    def other() -> dict[str, Any]:
        return train(kept_trainer(ESTIMATORS[(trial.number + 1) % 3]), out, True if steps(out) else None)

    def run() -> tuple[dict[str, Any], str]:
        trainer, met = kept_trainer(estimator), []
        inherited, count = trainer.training_step, iter(range(99))

        def training_step(*args: Any, **kwargs: Any) -> Any:
            if next(count) == meeting:
                random = torch.get_rng_state()
                met.append(str(forked(other).error))
                torch.set_rng_state(random)
            return inherited(*args, **kwargs)

        trainer.training_step = training_step
        return train(trainer, out), met[0]

    first, second = done(forked(run))
    assert_same(first, estimator)
    assert "is training in" in second and "another `output_dir`" in second, second
    assert not list(out.glob("_gopd_*"))
    return Ending.REFUSED


# Other frozen models


@scenario("another frozen model than the one of the checkpoint", area="training", tries=60, short=1)
def other_model(trial: Trial) -> Ending:
    """A number of its weights, or a field of its configuration, has changed by as little as it can."""
    estimator, out = ESTIMATORS[trial.number % 3], trial.folder / "out"
    shutil.copytree(uninterrupted(estimator)[1], out)
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    role = trial.random.choice(["teachers", "references"])

    def run() -> None:
        trainer = kept_trainer(estimator)
        module = getattr(trainer, role)[None].inner.model
        if trial.random.random() < 0.25:
            name = trial.random.choice(["rms_norm_eps", "rope_theta", "hidden_act", "attention_bias"])
            if name == "rope_theta":
                module.config.rope_parameters[name] *= 2
            else:
                old = getattr(module.config, name)
                setattr(module.config, name, "gelu" if isinstance(old, str) else not old if old in (0, 1) else 2 * old)
        else:
            parameter = trial.random.choice(list(module.parameters())).data.view(-1)
            place = trial.random.randrange(parameter.numel())
            parameter[place] = torch.nextafter(parameter[place], torch.tensor(math.inf))
        train(trainer, out, True)

    error = forked(run).error
    assert isinstance(error, ValueError) and "Pass the same model, or start anew" in str(error), error
    assert f"among its {role}" in str(error), error
    return Ending.REFUSED


# Numbers that are not finite


PLACES = ("teacher", "reference", "student", "gradient", "reward", "weights", "scores", "update")


class Poisoned(GOPDTrainer):
    """Has a number that is not finite in one place in one optimizer step."""

    place, value, bad_step = "teacher", math.nan, 1

    def _is_bad(self) -> bool:
        return self.state.global_step == self.bad_step

    def _poison(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[::7] = self.value
        return tensor

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.place == "scores" and self._is_bad():
            # Only "sampled" has scores before the loss.
            name = "gopd_teacher_logps" if "gopd_teacher_logps" in output else "gopd_lambda"
            output[name] = self._poison(output[name])
        if self.place == "weights" and self._is_bad():
            output["gopd_stored_ratio"] = self._poison(output["completion_mask"] * 1.0)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        frozen = {"teacher": self.teachers, "reference": self.references}
        parameter = None
        if self.place in frozen:
            parameter = frozen[self.place][None].head.weight
        elif self.place == "student":
            parameter = model.lm_head.weight
        if parameter is None or not self._is_bad():
            return super()._compute_loss(model, inputs)
        kept = parameter.data
        parameter.data = self._poison(kept)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            parameter.data = kept

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.place == "gradient" and self._is_bad():
            self.model.lm_head.weight.grad = self._poison(self.model.lm_head.weight.grad)
        return loss


class Spoiling(TrainerCallback):
    """After the bad step, weights are not finite."""

    def __init__(self, trainer: Poisoned) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.trainer.bad_step + 1:
            weight = self.trainer.model.lm_head.weight
            weight.data = self.trainer._poison(weight.data)


@functools.cache
def poisoned_trainer(estimator: str, nonfinite: str, place: str) -> Poisoned:
    def reward(completions: list[str], trainer_state: Any = None, **kwargs: Any) -> list[float]:
        values = [float(len(text)) for text in completions]
        if trainer._is_bad():
            values[1] = trainer.value
        return values

    options: dict[str, Any] = {"gopd_nonfinite": nonfinite, "max_grad_norm": 1.0, "num_iterations": 1}
    options |= {"steps_per_generation": 2, "save_total_limit": None}
    if place == "reward":
        options |= {"reward_funcs": reward, "num_generations": 2}
    trainer: Poisoned = build(estimator, Poisoned, **options)
    return trainer


def with_poison(estimator: str, nonfinite: str, place: str, value: float, bad_step: int, folder: Path) -> Any:
    trainer = poisoned_trainer(estimator, nonfinite, place)
    trainer.place, trainer.value, trainer.bad_step = place, value, bad_step
    if place == "update":
        trainer.add_callback(Spoiling(trainer))
    error = None
    try:
        train(trainer, folder)
    except FloatingPointError as raised:
        error = str(raised)
    moments = [v for state in trainer.optimizer.state_dict()["state"].values() for v in state.values()]
    schedule = trainer._schedule.state_dict()
    return {
        "error": error,
        "weights": all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters()),
        "optimizer": all(bool(moment.isfinite().all()) for moment in moments),
        "logged": [v for entry in trainer.state.log_history for v in entry.values() if isinstance(v, float)],
        "schedule": [*schedule["start_lengths"], schedule["ratio"], schedule["trust"]],
        "skipped": trainer._guard.skipped_steps,
    }


@scenario("a number that is not finite in a step", area="training", tries=150, short=1)
def not_finite(trial: Trial) -> Ending:
    place = PLACES[trial.number % len(PLACES)]
    estimator = "sampled" if place == "reward" else ESTIMATORS[trial.number // len(PLACES) % 3]
    nonfinite = trial.random.choice(["raise", "skip"])
    value = trial.random.choice([math.nan, math.inf, -math.inf] if place != "reward" else [math.inf, -math.inf])
    bad_step, out = trial.random.randrange(STEPS - 1), trial.folder / "out"
    ended = done(forked(with_poison, estimator, nonfinite, place, value, bad_step, out))
    for step in steps(out):
        assert problem(out / f"checkpoint-{step}") is None or ended["error"]
        assert weights_are_finite(out / f"checkpoint-{step}")
    assert all(map(math.isfinite, ended["schedule"])), ended
    if ended["error"]:
        assert place == "update" or nonfinite == "raise", ended
        assert place == "update" or ended["weights"] and ended["optimizer"], ended
        assert steps(out)[-1:] <= [bad_step + 1], steps(out)
        return Ending.REFUSED
    assert ended["weights"] and ended["optimizer"] and all(map(math.isfinite, ended["logged"])), ended
    # A value in padding, or one that a model may give, does nothing.
    return Ending.RECOVERED if ended["skipped"] else Ending.INTACT


def weights_are_finite(folder: Path) -> bool:
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    return not path.exists() or all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())
