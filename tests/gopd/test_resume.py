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
from trl_gopd.gopd.checkpoints import write_manifest
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
