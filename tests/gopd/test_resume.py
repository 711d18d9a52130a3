"""
A run that was interrupted goes on as if it had not been.

- Losses and weights are bit for bit those of the run without an interruption, in the middle of a generation batch too.
- A checkpoint that the trainer takes for complete has what is ours; one that is not whole does not stop a run.
- Other frozen models make it another run; other settings are logged.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from tests.gopd.harness import Keeping, Recording, load
from trl_gopd.gopd.checkpoints import begin, problem, rotate, write_manifest
from trl_gopd.gopd.trainer import GOPDTrainer


class Sampling(Keeping, GOPDTrainer):
    """With completions that the student samples, so that the state of the random numbers counts."""


SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}
LAYOUTS = {
    "several steps a batch": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "several iterations": {"num_iterations": 2, "gradient_accumulation_steps": 2},
    "both": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "log_completions": True,
    },
}


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_middle_of_a_generation_batch(make, tmp_path, layout):
    options = {**SAVING, **LAYOUTS[layout], "per_device_train_batch_size": 2, "max_steps": 5}
    options["log_completions"] = layout == "both"
    whole = make(Sampling, **options)
    whole.train()
    for step in (1, 3):
        resumed = make(Sampling, **options, output_dir=str(tmp_path / f"again-{step}"))
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert resumed.losses == whole.losses[2 * step :]
        again = weights(resumed)
        assert all(torch.equal(value, again[name]) for name, value in weights(whole).items())


def test_rollouts_are_kept_only_while_they_are_needed(make, tmp_path):
    make(**SAVING, steps_per_generation=2, per_device_train_batch_size=2, max_steps=2).train()
    names = [[path.name for path in (tmp_path / "out" / f"checkpoint-{n}").glob("gopd_rollouts*")] for n in (1, 2)]
    assert names == [["gopd_rollouts_0.pt"], []]


def test_missing_rollouts_are_named(make, tmp_path):
    options = {**SAVING, "steps_per_generation": 2, "per_device_train_batch_size": 2, "max_steps": 2}
    make(**options).train()
    folder = tmp_path / "out" / "checkpoint-1"
    (folder / "gopd_rollouts_0.pt").unlink()
    write_manifest(folder)
    with pytest.raises(ValueError, match="gopd_rollouts_0.pt is missing.*Resume from another checkpoint"):
        make(**options).train(resume_from_checkpoint=str(folder))


def test_what_is_ours_comes_first_and_the_manifest_last(make, tmp_path, monkeypatch):
    seen = []
    save = TrainerState.save_to_json

    def saving(state, path):
        seen.append(sorted(found.name for found in Path(path).parent.glob("gopd_*")))
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", saving)
    make(**SAVING).train()
    make(**SAVING).train()  # into the same folder, where the first one's manifest would speak of other files
    assert seen == [["gopd_state.json", "gopd_unfinished"]] * 2
    manifest = json.loads((tmp_path / "out" / "checkpoint-1" / "gopd_manifest.json").read_text())
    assert {"trainer_state.json", "gopd_state.json", "optimizer.pt", "rng_state.pth"} <= manifest["files"].keys()


def test_a_kill_while_saving_does_not_stop_the_run(make, tmp_path, monkeypatch, caplog):
    whole = make(**SAVING, max_steps=3)
    whole.train()
    for name in ("trainer_state.json", "gopd_manifest.json"):
        (tmp_path / "out" / "checkpoint-3" / name).unlink()
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    resumed = make(**SAVING, max_steps=3)
    with caplog.at_level(logging.WARNING, "trl_gopd"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.losses == whole.losses[1:]
    assert "checkpoint-3 is passed over" in caplog.text and "optimizer.pt has 0 bytes instead of" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trl_gopd"):  # all were written anew
        make(**SAVING, max_steps=3).train(resume_from_checkpoint=True)
    assert "passed over" not in caplog.text


def test_settings_that_changed_are_logged_one_by_one(make, tmp_path, caplog):
    make(**SAVING).train()
    changed = {
        "gopd_lambda": 1.5,
        "gopd_lambda_schedule": "adaptive",
        "temperature": 0.5,
        "seed": 7,
        "learning_rate": 0.5,
        "per_device_train_batch_size": 2,
    }
    with caplog.at_level(logging.WARNING, "trl_gopd"):
        make(**{**SAVING, **changed}).train(resume_from_checkpoint=True)
    lines = [text for text in caplog.messages if "was written and is" in text]
    assert {text.split("`")[1] for text in lines} == changed.keys()
    assert any(text.startswith("`gopd_lambda` was 1.25 when ") and "is 1.5 now" in text for text in lines)


def test_the_same_settings_are_not(make, caplog):
    make(**SAVING).train()
    with caplog.at_level(logging.WARNING, "trl_gopd"):
        make(**SAVING, max_steps=2).train(resume_from_checkpoint=True)
    assert not [text for text in caplog.messages if "was written and is" in text]


def test_a_teacher_with_another_row_in_its_head_is_refused(make, models):
    make(**SAVING).train()
    teacher = load(models / "teacher")
    with torch.no_grad():
        teacher.get_output_embeddings().weight[100] += 1e-3
    with pytest.raises(ValueError, match="among its teachers.*Pass the same model"):
        make(**SAVING, teacher_model=teacher).train(resume_from_checkpoint=True)


def test_a_teacher_with_another_configuration_is_refused(make, models):
    make(**SAVING).train()
    teacher = load(models / "teacher")
    teacher.config.rms_norm_eps = 1e-3
    with pytest.raises(ValueError, match="among its teachers.*Pass the same model"):
        make(**SAVING, teacher_model=teacher).train(resume_from_checkpoint=True)


def test_skipped_steps_go_on_being_counted(make):
    trainer = make(Recording, **SAVING, gopd_nonfinite="skip")
    trainer._guard.skipped_steps = 3
    trainer.train()
    resumed = make(Recording, **SAVING, gopd_nonfinite="skip", max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._guard.skipped_steps == 3


def test_older_checkpoints_go_only_when_the_new_one_is_whole(make, tmp_path, monkeypatch):
    from trl_gopd.gopd import state

    seen = []

    def rotating(newest, **options):
        seen.append((problem(newest), sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))))
        rotate(newest, **options)

    monkeypatch.setattr(state, "rotate", rotating)
    trainer = make(**SAVING, max_steps=3, save_total_limit=1)
    trainer.train()
    assert seen == [(None, [f"checkpoint-{n}" for n in (step - 1, step) if n]) for step in (1, 2, 3)]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.args.save_total_limit == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # of torch
        Exception("No space left on device (os error 28)"),  # of tokenizers
    ],
)
def test_a_full_disk_is_named_and_the_checkpoint_before_it_stays(make, tmp_path, monkeypatch, error):
    whole = make(**SAVING, max_steps=3, save_total_limit=1)
    whole.train()
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-2" in str(path) and "scheduler" in str(path):
            raise error
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    options = {**SAVING, "max_steps": 3, "save_total_limit": 1, "output_dir": str(tmp_path / "other")}
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written, .* \d+ free bytes \(\w+: .*go on"):
        make(**options).train()
    monkeypatch.undo()
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.losses == whole.losses[1:]


def test_a_kill_in_the_first_checkpoint_starts_the_run_anew(make, tmp_path, caplog):
    whole = make(**SAVING, max_steps=2)
    whole.train()
    begin(tmp_path / "new" / "checkpoint-1")
    resumed = make(**SAVING, max_steps=2, output_dir=str(tmp_path / "new"))
    with caplog.at_level(logging.WARNING, "trl_gopd"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.losses == whole.losses and "so it starts anew" in caplog.text


def test_a_folder_without_checkpoints_is_likely_a_mistake(make):
    with pytest.raises(ValueError, match="There is no checkpoint in .* Check `output_dir`"):
        make(**SAVING).train(resume_from_checkpoint=True)


def test_a_best_model_that_is_damaged_is_not_loaded(make, tmp_path, prompts):
    class Damaging(Recording):
        def evaluate(self, *args, **kwargs):
            return {"eval_loss": 1.0 + self.state.global_step}  # the first is the best

        def log(self, logs, *args):
            if "train_runtime" in logs:
                with (tmp_path / "out" / "checkpoint-1" / "model.safetensors").open("r+b") as file:
                    file.seek(-1, 2)
                    file.write(b"\x01")
            super().log(logs, *args)

    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "eval_dataset": prompts}
    options["metric_for_best_model"] = "loss"
    with pytest.raises(ValueError, match="checkpoint-1 is not whole: model.safetensors has another content"):
        make(Damaging, **SAVING, max_steps=2, **options).train()


def test_a_start_that_is_damaged_is_named(make, models, tmp_path):
    from peft import LoraConfig, get_peft_model

    from tests.tiny import LORA

    def student():
        torch.manual_seed(0)
        return get_peft_model(load(models / "student"), LoraConfig(**LORA, init_lora_weights=False))

    make(model=student(), **SAVING).train()
    path = tmp_path / "out" / "checkpoint-1" / "gopd_start.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="gopd_start.safetensors has .* bytes instead of"):
        make(model=student(), **SAVING).train(resume_from_checkpoint=str(path.parent))
    write_manifest(path.parent)
    with pytest.raises(ValueError, match="gopd_start.safetensors is damaged .*Resume from another checkpoint"):
        make(model=student(), **SAVING).train(resume_from_checkpoint=str(path.parent))


def test_two_runs_in_one_folder(make, tmp_path):
    from tests.faults.processes import forked

    def other():
        make(**SAVING).train()

    class Meeting(Recording):
        def training_step(self, *args, **kwargs):
            self.met = forked(other).error
            return super().training_step(*args, **kwargs)

    trainer = make(Meeting, **SAVING)
    trainer.train()
    assert "is training in" in str(trainer.met) and problem(tmp_path / "out" / "checkpoint-1") is None


def test_a_run_that_was_over_takes_no_further_step(make, tmp_path):
    options = {**SAVING, "steps_per_generation": 2, "per_device_train_batch_size": 2, "max_steps": 3}
    whole = make(**options)
    whole.train()
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=True)
    again = weights(resumed)
    assert resumed.state.global_step == 3 and not hasattr(resumed, "losses")
    assert all(torch.equal(value, again[name]) for name, value in weights(whole).items())
