"""
What goes wrong on one rank is known to all: they raise, or leave the optimizer step out, together, and none waits for
another in a collective operation. After a run is resumed, every rank has its own rollouts again.
"""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.distributed import harness, launch_fault
from tests.distributed.test_parity import PROMPTS, ScriptedTrainer, train
from trl_gopd.gopd.config import GOPDConfig


def fail_on_one_rank(layout, rank, *, models, out, fault, **options):
    """The message of each rank, how far its student moved from its start, and the steps that it left out."""
    args = GOPDConfig(
        output_dir=out,
        per_device_train_batch_size=2,
        max_completion_length=12,
        max_steps=1,
        learning_rate=0.1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    trainer = ScriptedTrainer(
        model=f"{models}/student",
        teacher_model=f"{models}/teacher",
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(f"{models}/student"),
    )
    teacher = trainer.teachers[None]
    if rank == 1 and fault == "nan":
        teacher.head.weight.data[5] = torch.nan
    if rank == 1 and fault == "error":
        teacher.score = lambda sequences: 1 / 0
    parameters = [p for _, p in sorted(trainer.accelerator.unwrap_model(trainer.model).named_parameters())]
    start = [p.detach().clone() for p in parameters]
    message = None
    try:
        trainer.train()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    trainer.accelerator.wait_for_everyone()  # which ranks that differ would not reach
    moved = max(float((p - s).abs().max()) for p, s in zip(parameters, start, strict=True))
    return {"message": message, "moved": moved, "skipped": trainer._guard.skipped_steps}


@pytest.mark.parametrize("layout", ["ddp", "zero2"])
@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_all_ranks_raise_before_the_weights_change(layout, estimator, models, tmp_path):
    results = harness.run(
        fail_on_one_rank, layout, models=str(models), out=str(tmp_path), fault="nan", gopd_estimator=estimator
    )
    assert results[0] == results[1]
    assert results[0]["message"].startswith("FloatingPointError: `teacher_model` (")
    assert "generation batch of rank 1" in results[0]["message"] and results[0]["moved"] == 0


def test_all_ranks_leave_the_step_out(models, tmp_path):
    results = harness.run(
        fail_on_one_rank, "ddp", models=str(models), out=str(tmp_path), fault="nan", gopd_nonfinite="skip"
    )
    assert results == [{"message": None, "moved": 0, "skipped": 1}] * 2


def test_an_error_of_one_rank_ends_all(models, tmp_path):
    results = harness.run(fail_on_one_rank, "ddp", models=str(models), out=str(tmp_path), fault="error")
    assert results[1]["message"] == "ZeroDivisionError: division by zero"
    assert results[0]["message"] == "OtherRankError: Rank 1: ZeroDivisionError: division by zero"


def test_each_rank_goes_on_in_the_middle_of_its_generation_batch(models, tmp_path):
    options = {
        "models": str(models),
        "accumulation": 2,
        "steps_per_generation": 4,
        "save_steps": 1,
        "optim": "adamw_torch",
    }
    whole = harness.run(train, "ddp", out=str(tmp_path / "whole"), **options)
    again = harness.run(
        train, "ddp", out=str(tmp_path / "again"), resume=str(tmp_path / "whole" / "checkpoint-1"), **options
    )
    for before, after in zip(whole, again, strict=True):
        assert after["seen"] == before["seen"][2:] and after["logs"] == before["logs"]
    assert all(torch.equal(value, again[0]["weights"][name]) for name, value in whole[0]["weights"].items())
    names = {path.name for path in (tmp_path / "whole" / "checkpoint-1").glob("gopd_*")}
    assert names == {"gopd_state.json", "gopd_manifest.json", "gopd_rollouts_0.pt", "gopd_rollouts_1.pt"}


ALONE = {
    "row": ("ddp", {}, f"ValueError: {launch_fault.MESSAGE}"),
    "overlong": ("zero2", {}, "ValueError: The prompt of 680 tokens that `teacher_model` ("),
    "missing": ("zero3", {}, "OSError: "),
    "reward": ("ddp", {}, f"ValueError: {launch_fault.MESSAGE}"),
    "error": ("zero3", {"phase": "scoring"}, f"ValueError: {launch_fault.MESSAGE}"),
    "disk": ("ddp", {"phase": "saving"}, "OSError: The checkpoint "),
}


@pytest.mark.parametrize("fault", ALONE)
def test_ranks_end_while_the_one_that_failed_lives_on(fault, models, tmp_path):
    """With gloo, but not with NCCL, the end of that process would release the other one."""
    layout, options, said = ALONE[fault]
    arguments = {"models": str(models), "out": str(tmp_path), "fault": fault, "lives_on": 20.0, "patience": 1.0}
    zero, one = harness.run_to_end(launch_fault.train, layout, within=0, **arguments, **options)
    assert (zero.code, one.code) == (1, None), zero.log[-3000:]
    assert zero.log.splitlines()[-2].startswith(f"Rank 1: {said}")
    assert f"\n{said}" in one.log


def test_a_disk_that_is_full_for_one_rank_is_named_by_both(models, tmp_path):
    arguments = {"models": str(models), "out": str(tmp_path), "fault": "disk", "phase": "saving"}
    zero, one = harness.run_to_end(launch_fault.train, "ddp", within=8, **arguments)
    assert (zero.code, one.code) == (1, 1)
    assert one.error.startswith(f"OSError: The checkpoint {tmp_path}/checkpoint-2 could not be written")
    assert zero.error.endswith(f"OtherRankError: Rank 1: {one.error}")


def test_the_end_of_a_rank_inside_a_sharded_model_releases_the_other(models, tmp_path):
    arguments = {"models": str(models), "out": str(tmp_path), "fault": "error", "phase": "forward"}
    zero, one = harness.run_to_end(launch_fault.train, "fsdp2", within=8, **arguments)
    assert (zero.code, one.code) == (1, 1)
    assert one.error == f"ValueError: {launch_fault.MESSAGE}"
    assert zero.error.endswith(f"OtherRankError: Rank 1: {one.error}")
