"""
Two processes train what one process trains: DDP, ZeRO-2 and ZeRO-3 on the same global batches give the same losses,
gradient norms and weights.

The optimizer is SGD without clipping, since Adam and clipping would hide a gradient of the wrong scale. Losses and
gradient norms are sums of a few thousand float32 terms in another order, hence 1e-4 relative; the weights move by 1e-3
and more, and 1e-6 is a thousandth of that.
"""

import random
import zlib

import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from tests.distributed import harness
from trl_gopd.gopd.config import GOPDConfig
from trl_gopd.gopd.trainer import GOPDTrainer


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
GLOBAL_BATCH, STEPS = 8, 3
# Left by questions of 1 to 16 words: the ranks' batches are padded to different widths.
PROMPTS = [" ".join(f"{i * j % 10}" for j in range(1, 2 + i % 16)) for i in range(48)]


class ScriptedTrainer(GOPDTrainer):
    """Completions depend on the prompt and the step alone, so that every layout sees the same tokens."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        super()._generate_single_turn(prompt_ids, *args, **kwargs)  # the real one too, with all its gathering
        completions = []
        for ids in prompt_ids:
            rng = random.Random(zlib.crc32(repr((ids, self.state.global_step)).encode()))
            length = rng.randrange(1, 12)
            completions.append([rng.randrange(3, 259) for _ in range(length)] + [self._tokenizer.eos_token_id])
        return completions, None

    def _compute_loss(self, model, inputs):
        ids = inputs["completion_ids"]
        self.seen = [*getattr(self, "seen", []), (ids.size(1), int(inputs["completion_mask"].sum()))]
        return super()._compute_loss(model, inputs)


def train(layout, rank, *, models, out, estimator="sampled", lora=False, accumulation=1, save=False):
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
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        weight_decay=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps" if save else "no",
        save_steps=STEPS,
    )
    set_seed(0)  # the adapter's random half
    trainer = ScriptedTrainer(
        model=f"{models}/student",
        teacher_model=f"{models}/teacher",
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.train()
    frozen = {"teacher": trainer.teacher, "reference": trainer.reference}
    modules = {"student": trainer.model, **{name: given.inner for name, given in frozen.items() if given is not None}}
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


def run_layout(layout, models, out, lora=False, **scenario):
    """Results of both ranks of a layout that is the one asked for."""
    ranks = harness.run(train, layout, models=str(models), out=str(out), lora=lora, **scenario)
    for got in ranks:
        assert got["distributed_type"] == harness.DISTRIBUTED_TYPES[layout]
        assert got["num_processes"] == 2
        # With an adapter the reference is the student without it.
        assert set(got["shapes"]) == {"student", "teacher"} | (set() if lora else {"reference"})
        assert got["trained"] == {"student"}
        for shapes in got["shapes"].values():
            is_sharded = [local == (0,) and whole != () for local, whole in shapes]
            assert all(is_sharded) if layout == "zero3" else not any(is_sharded)
    widths, tokens = ([[value[i] for value in got["seen"]] for got in ranks] for i in (0, 1))
    assert widths[0] != widths[1] and tokens[0] != tokens[1]
    return ranks


def assert_same_training(got, want):
    assert len(got["logs"]) == len(want["logs"]) == STEPS
    for ours, theirs in zip(got["logs"], want["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        assert theirs["grad_norm"] > 1e-2
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("estimator", ["sampled"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_two_processes_train_as_one(layout, lora, estimator, models, tmp_path, single):
    got = run_layout(layout, models, tmp_path, lora=lora, estimator=estimator)[0]
    assert_same_training(got, single(lora=lora, estimator=estimator))
