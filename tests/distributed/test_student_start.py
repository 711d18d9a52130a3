"""
The start of a student with an adapter is the reference in every layout: the log-probabilities under it after training
are those that one process computes before training, and the ranks begin with the same adapter.

Tolerances are those of `test_parity`.
"""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import harness
from tests.distributed.test_parity import GLOBAL_BATCH, PROMPTS, ScriptedTrainer
from tests.tiny import LORA
from trl_gopd.gopd.batch import Sequences
from trl_gopd.gopd.config import GOPDConfig


ATOL = 1e-5
STEPS = 2
KINDS = {
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "random-head": LoraConfig(**LORA, init_lora_weights=False, modules_to_save=["lm_head"]),
}


def leave_whole(layout, path):
    """Lets the ranks of this process keep parameters whole between passes: all under FSDP, small ones under ZeRO-3."""
    if layout == "fsdp2":
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "false"
    if layout == "zero3":
        config = json.loads(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text())
        del config["zero_optimization"]["stage3_param_persistence_threshold"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)


def train(layout, rank, *, models, out, kind, estimator, accumulation=1, in_memory=False, stays_whole=False):
    """Trains; returns the losses, the trained tensors, and the scores of the reference before and after."""
    if stays_whole:
        leave_whole(layout, Path(out, f"{rank}.json"))
    args = GOPDConfig(
        output_dir=out,
        gopd_lambda=1.25,
        gopd_estimator=estimator,
        gopd_chunk_size=7,
        per_device_train_batch_size=GLOBAL_BATCH // harness.world_size(layout) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_completion_length=12,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=0.5,
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=layout != "fsdp2",
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=STEPS,
    )
    student, config = f"{models}/student", copy.deepcopy(KINDS[kind])
    if in_memory:
        torch.manual_seed(rank)  # every rank draws its own adapter
        student, config = get_peft_model(AutoModelForCausalLM.from_pretrained(student), config), None
    trainer = ScriptedTrainer(
        model=student,
        teacher_model=f"{models}/teacher",
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(f"{models}/student"),
        peft_config=config,
    )
    ids = torch.arange(3, 27).view(2, 12)
    batch = Sequences.of(ids, torch.ones_like(ids), 6)
    reference = trainer.references[None]
    before = reference.score(batch) if layout == "single" else None  # elsewhere it is not placed yet
    trainer.train()
    after = reference.score(batch)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "type": str(trainer.accelerator.distributed_type).rpartition(".")[2],
        "keeps": reference.start is not None,
        "before": before,
        "after": after,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "weights": {name: value.clone() for name, value in state.items()} if rank == 0 else None,
    }


@pytest.fixture(scope="module")
def single(models, tmp_path_factory):
    """Results of one process, each computed once."""
    results = {}

    def get(**scenario):
        key = tuple(sorted(scenario.items()))
        if key not in results:
            out = str(tmp_path_factory.mktemp("single"))
            results[key] = harness.run(train, "single", models=str(models), out=out, **scenario)[0]
        return results[key]

    return get


def refusal(layout, rank, **scenario):
    with pytest.raises(ValueError) as error:
        train(layout, rank, **scenario)
    return str(error.value)


SCENARIOS = [("pissa", "sampled"), ("ia3", "sampled"), ("head", "full"), ("random-head", "full")]


@pytest.mark.parametrize(
    "layout,kind,estimator",
    [
        (layout, *scenario)
        for layout in ("ddp", "zero2", "zero3", "fsdp2")
        for scenario in SCENARIOS
        if layout != "fsdp2" or "head" not in scenario[0]
    ],
)
def test_reference_is_the_start(layout, kind, estimator, models, tmp_path, single):
    want = single(kind=kind, estimator=estimator)
    assert want["keeps"] is (kind != "head")
    torch.testing.assert_close(want["after"], want["before"], rtol=0, atol=ATOL)
    ranks = harness.run(train, layout, models=str(models), out=str(tmp_path), kind=kind, estimator=estimator)
    assert_same(ranks, want, layout)


def assert_same(ranks, want, layout):
    for got in ranks:
        assert got["type"] == harness.DISTRIBUTED_TYPES[layout]
        torch.testing.assert_close(got["after"], want["before"], rtol=0, atol=ATOL)
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-4)
    for name, weight in want["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=0, atol=2e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("layout", ["zero3", "fsdp2"])
def test_parameters_that_stay_whole_are_exchanged_too(layout, models, tmp_path, single):
    scenario = {"kind": "ia3", "estimator": "full", "accumulation": 2}  # the reference is scored between passes
    ranks = harness.run(train, layout, models=str(models), out=str(tmp_path), stays_whole=True, **scenario)
    assert_same(ranks, single(**scenario), layout)


def test_ranks_begin_with_the_adapter_of_the_first(models, tmp_path, single):
    scenario = {"kind": "random-head", "estimator": "sampled", "in_memory": True}
    ranks = harness.run(train, "ddp", models=str(models), out=str(tmp_path), **scenario)
    assert_same(ranks, single(**scenario), "ddp")


def test_trained_head_is_refused_under_fsdp(models, tmp_path):
    """Its gradient would be that of each rank's own rows."""
    scenario = {"models": str(models), "out": str(tmp_path), "kind": "head", "estimator": "sampled"}
    for message in harness.run(refusal, "fsdp2", **scenario):
        assert "`modules_to_save` of the student has the output head" in message and "ZeRO-3" in message
