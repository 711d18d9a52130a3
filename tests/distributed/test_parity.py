"""
Two processes train what one process trains: DDP, ZeRO-2, ZeRO-3 and FSDP2 on the same global batches give the same
losses, gradient norms and weights.

The optimizer is SGD without clipping, since Adam and clipping would hide a gradient of the wrong scale. Losses and
gradient norms are sums of a few thousand float32 terms in another order, hence 1e-4 relative; the weights move by 1e-3
and more, and 1e-6 is a thousandth of that.
"""

import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import harness
from tests.tiny import LORA, build_model, scripted_completions
from trl_gopd.gopd.config import GOPDConfig
from trl_gopd.gopd.trainer import GOPDTrainer


GLOBAL_BATCH, STEPS = 8, 3
# Left by questions of 1 to 16 words: the ranks' batches are padded to different widths.
# Few rows have the small teacher, so that a rank has none of them where the other has some.
TEACHER_IDS = ["small" if i % 4 == 0 else "big" for i in range(48)]
PROMPTS = [" ".join(f"{i * j % 10}" for j in range(1, 2 + i % 16)) for i in range(48)]


class ScriptedTrainer(GOPDTrainer):
    """Completions depend on the prompt and the step alone, so that every layout sees the same tokens."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        super()._generate_single_turn(prompt_ids, *args, **kwargs)  # the real one too, with all its gathering
        completions = scripted_completions(self._tokenizer, prompt_ids, step=self.state.global_step, max_length=12)
        return completions, None

    def _compute_loss(self, model, inputs):
        ids = inputs["completion_ids"]
        self.seen = [*getattr(self, "seen", []), (ids.size(1), int(inputs["completion_mask"].sum()))]
        self.small_rows = [*getattr(self, "small_rows", []), int(inputs["gopd_teacher_index"].sum())]
        return super()._compute_loss(model, inputs)


def train(
    layout,
    rank,
    *,
    models,
    out,
    student="student",
    estimator="sampled",
    lora=False,
    several=False,
    accumulation=1,
    save_steps=None,
    resume=None,
    **options,
):
    """Trains and returns, as plain numbers and tensors, all that a test may want to compare."""
    tokenizer = AutoTokenizer.from_pretrained(f"{models}/student")
    ranks = harness.world_size(layout)
    args = GOPDConfig(
        output_dir=out,
        gopd_lambda=1.25,
        gopd_estimator=estimator,
        gopd_chunk_size=7,  # ranks with different numbers of tokens have different numbers of chunks
        per_device_train_batch_size=GLOBAL_BATCH // ranks,
        gradient_accumulation_steps=accumulation,
        max_completion_length=12,
        max_steps=STEPS,
        logging_steps=1,
        max_grad_norm=0.0,
        weight_decay=0.0,
        use_cpu=layout != "fsdp2",  # with it accelerate would fall back to DDP
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or STEPS,
        **{"learning_rate": 0.1, "optim": "sgd", **options},
    )
    set_seed(0)  # the adapter's random half
    trainer = ScriptedTrainer(
        model=f"{models}/{student}",
        teacher_model={"big": f"{models}/teacher", "small": f"{models}/base"} if several else f"{models}/teacher",
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "teacher_id": TEACHER_IDS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    frozen = {
        name.removesuffix("_None"): given.inner
        for role, scorers in (("teacher", trainer.teachers), ("reference", trainer.references))
        for name, given in ((f"{role}_{key}", given) for key, given in scorers.items())
        if hasattr(given, "inner")  # otherwise it is the student
    }
    modules = {"student": trainer.model, **frozen}
    shapes = {
        name: [(tuple(p.shape), tuple(getattr(p, "ds_shape", ()))) for p in module.parameters()]
        for name, module in modules.items()
    }
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "distributed_type": str(trainer.accelerator.distributed_type).rpartition(".")[2],
        "num_processes": trainer.accelerator.num_processes,
        "shapes": shapes,
        "trained": {name for name, module in modules.items() if any(p.requires_grad for p in module.parameters())},
        "logs": [
            {
                name: value
                for name, value in log.items()
                if name in ("loss", "grad_norm", "entropy") or name.startswith("gopd/")
            }
            for log in logs
        ],
        "seen": trainer.seen,
        "small_rows": trainer.small_rows,
        "weights": {name: value.clone() for name, value in state.items()} if rank == 0 else None,
    }


def instance_refused(layout, rank, *, models, out):
    """The message with which an instance of the student, already sharded, is refused."""
    args = GOPDConfig(output_dir=out, use_cpu=True, bf16=False, report_to="none")
    student = AutoModelForCausalLM.from_pretrained(f"{models}/student")
    with pytest.raises(ValueError) as error:
        GOPDTrainer(
            model=student,
            teacher_model=f"{models}/teacher",
            args=args,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=AutoTokenizer.from_pretrained(f"{models}/student"),
        )
    return str(error.value)


@pytest.fixture(scope="module", autouse=True)
def tied(models, tokenizer):
    """A folder of a student whose head is its embedding."""
    build_model(tokenizer, seed=4, tie_word_embeddings=True).save_pretrained(models / "tied")
    tokenizer.save_pretrained(models / "tied")


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


def run_layout(layout, models, out, lora=False, several=False, **scenario):
    """Results of both ranks of a layout that is the one asked for."""
    ranks = harness.run(train, layout, models=str(models), out=str(out), lora=lora, several=several, **scenario)
    for got in ranks:
        assert got["distributed_type"] == harness.DISTRIBUTED_TYPES[layout]
        assert got["num_processes"] == 2
        # With an adapter the reference is, by default, the student without it.
        has_reference = not lora or "ref_model_name_or_path" in scenario
        teachers = {"teacher_big", "teacher_small"} if several else {"teacher"}
        references = {"reference_big", "reference_small"} if several else {"reference"}
        assert set(got["shapes"]) == {"student"} | teachers | (references if has_reference else set())
        assert got["trained"] == {"student"}
        for name, shapes in got["shapes"].items():
            is_sharded = [local == (0,) and whole != () for local, whole in shapes]
            shards = layout == "zero3" or name != "student" and scenario.get("shard_frozen_models")
            assert all(is_sharded) if shards else not any(is_sharded), name
    widths, tokens = ([[value[i] for value in got["seen"]] for got in ranks] for i in (0, 1))
    assert widths[0] != widths[1] and tokens[0] != tokens[1]
    return ranks


def assert_same_training(got, want, names=None):
    """Compares the logged values of the given names, by default all, and the weights."""
    assert len(got["logs"]) == len(want["logs"]) == STEPS
    for ours, theirs in zip(got["logs"], want["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in names or theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert theirs["grad_norm"] > 1e-2
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("estimator", ["sampled", "full"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_two_processes_train_as_one(layout, lora, estimator, models, tmp_path, single):
    got = run_layout(layout, models, tmp_path, lora=lora, estimator=estimator)[0]
    assert_same_training(got, single(lora=lora, estimator=estimator))


@pytest.mark.parametrize("layout,estimator", [("ddp", "sampled"), ("zero2", "full"), ("zero3", "sampled")])
def test_accumulated_gradients_train_as_one_process(layout, estimator, models, tmp_path, single):
    scenario = {"estimator": estimator, "accumulation": 2}
    got = run_layout(layout, models, tmp_path, **scenario)[0]
    assert len(got["seen"]) == 2 * STEPS
    # Other metrics are means over micro-batches, and which rows share one is drawn by each rank.
    assert_same_training(got, single(**scenario), names=("loss", "grad_norm"))


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3"])
def test_head_tied_to_the_embedding_trains_as_one_process(layout, models, tmp_path, single):
    scenario = {"estimator": "full", "student": "tied"}
    assert_same_training(run_layout(layout, models, tmp_path, **scenario)[0], single(**scenario))


@pytest.mark.parametrize(
    "layout,estimator", [("ddp", "sampled"), ("zero3", "sampled"), ("zero3", "full"), ("fsdp2", "full")]
)
def test_several_teachers_train_as_one_process(layout, estimator, models, tmp_path, single):
    scenario = {"estimator": estimator, "several": True}
    ranks = run_layout(layout, models, tmp_path, **scenario)
    assert any(0 in counts and sum(counts) for counts in zip(*(got["small_rows"] for got in ranks), strict=True))
    assert_same_training(ranks[0], single(**scenario))
    assert ranks[0]["logs"][-1].keys() >= {"gopd/big/reverse_kl", "gopd/big/token_share"}


@pytest.mark.parametrize(
    "layout,estimator", [("ddp", "full"), ("zero3", "full"), ("zero3", "stratified"), ("fsdp2", "stratified")]
)
def test_discount_of_expected_advantages_trains_as_one_process(layout, estimator, models, tmp_path, single):
    """A second part of the student's output then has a gradient."""
    scenario = {"estimator": estimator, "gopd_discount": 0.5, "gopd_top_k": 8}
    assert_same_training(run_layout(layout, models, tmp_path, **scenario)[0], single(**scenario))


@pytest.mark.parametrize("estimator,several", [("sampled", True), ("full", False)])
def test_frozen_models_are_sharded_where_the_student_is_not(estimator, several, models, tmp_path, single):
    scenario = {"estimator": estimator, "several": several}
    ranks = run_layout("zero2", models, tmp_path, **scenario, shard_frozen_models=True)
    assert_same_training(ranks[0], single(**scenario))


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_forwards_of_any_size_train_as_one_process(tokens, models, tmp_path, single):
    scenario = {"estimator": "sampled", "several": True}
    ranks = run_layout("zero3", models, tmp_path, **scenario, gopd_score_batch_tokens=tokens)
    assert_same_training(ranks[0], single(**scenario))


def test_another_reference_with_an_adapter_trains_as_one_process(models, tmp_path, single):
    scenario = {"lora": True, "ref_model_name_or_path": str(models / "base")}
    assert_same_training(run_layout("zero3", models, tmp_path, **scenario)[0], single(**scenario))


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_checkpoint_holds_the_student_alone_and_resumes_exactly(lora, models, tmp_path):
    scenario = {"lora": lora, "optim": "adamw_torch", "learning_rate": 1e-3, "save_steps": STEPS - 1}
    want = run_layout("zero3", models, tmp_path / "whole", **scenario)[0]
    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS - 1}"
    saved = load_file(checkpoint / ("adapter_model.safetensors" if lora else "model.safetensors"))
    trained = {name.replace(".default", ""): p for name, p in want["weights"].items() if not lora or "lora_" in name}
    assert {name: p.shape for name, p in saved.items()} == {name: p.shape for name, p in trained.items()}

    shards = [torch.load(path, weights_only=False) for path in checkpoint.glob("global_step*/*_optim_states.pt")]
    flat = [group for shard in shards for group in shard["optimizer_state_dict"]["fp32_flat_groups"]]
    count = sum(p.numel() for p in trained.values())
    assert len(shards) == 2
    assert count <= sum(group.numel() for group in flat) <= count + len(trained)  # padded to an even length each

    got = run_layout("zero3", models, tmp_path / "resumed", **scenario, resume=str(checkpoint))[0]
    assert got["logs"][-1] == want["logs"][-1]
    for name, weight in want["weights"].items():
        assert torch.equal(got["weights"][name], weight), name


def test_sharded_instance_is_refused_as_its_own_reference(models, tmp_path):
    for message in harness.run(instance_refused, "zero3", models=str(models), out=str(tmp_path)):
        assert message.startswith("The student is already sharded by ZeRO-3")
