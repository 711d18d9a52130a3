"""
A few steps of everything that reaches into TRL, for `make compat` to run with each version of it: the three
estimators, an adapter, rollouts that are used twice, stored completions, and completions that TRL samples.

Each first step is compared with numbers computed from the models alone; the losses of all steps are recorded, so that
versions can be compared with one another.
"""

import json

import pytest
import torch
import trl
from peft import LoraConfig

from tests.gopd.conftest import make  # noqa: F401
from tests.gopd.harness import Keeping, Recording, load, log_probs, logged
from tests.tiny import LORA, scripted_completions
from trl_gopd import GOPDTrainer
from trl_gopd.gopd._trl import eos_token_ids


STEPS = 3
TOP = 16


class Sampling(Keeping, GOPDTrainer):
    pass


RUNS = {
    "sampled": {"gopd_estimator": "sampled"},
    "full": {"gopd_estimator": "full"},
    "stratified": {"gopd_estimator": "stratified", "gopd_top_k": TOP},
    "plain": {"gopd_estimator": "sampled", "gopd_lambda": 1.0},
    "lora": {"gopd_estimator": "sampled", "peft_config": LoraConfig(**LORA)},
    "lora_full": {"gopd_estimator": "full", "peft_config": LoraConfig(**LORA)},
    "reuse": {"gopd_estimator": "sampled", "num_iterations": 2, "steps_per_generation": 2},
    "reuse_full": {"gopd_estimator": "full", "num_iterations": 2, "steps_per_generation": 2},
    "accumulation": {"gopd_estimator": "sampled", "gradient_accumulation_steps": 2},
    "checkpointing": {"gopd_estimator": "sampled", "gradient_checkpointing": True},
    "logged": {"gopd_estimator": "full", "log_completions": True},
    "stored": {"gopd_estimator": "sampled", "use_stored_completions": True},
    "own": {"gopd_estimator": "sampled", "cls": Sampling},
    "two_ends": {"gopd_estimator": "sampled", "cls": Sampling},
}


@pytest.fixture
def stored(prompts, tokenizer):
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts["prompt"]]
    return prompts.add_column("completion_ids", scripted_completions(tokenizer, ids, step=0, max_length=9))


def first_step(trainer, models):
    """The reverse KL and the share of the likeliest tokens of the first micro-batch, from the models alone."""
    mask = trainer.first["completion_mask"].bool()
    with torch.no_grad():
        student, teacher = (log_probs(load(models / name), trainer.first)[mask] for name in ("student", "teacher"))
    coverage = student.exp().topk(TOP).values.sum(-1).mean()
    ratios = student - teacher
    if trainer.args.gopd_estimator == "sampled":
        return ratios.gather(-1, trainer.first["completion_ids"][mask].unsqueeze(-1)).mean(), coverage
    return (student.exp() * ratios).sum(-1).mean(), coverage


def first(cls):
    """Keeps the first micro-batch too."""

    class First(cls):
        def _compute_loss(self, model, inputs):
            if not hasattr(self, "first"):
                self.first = inputs
            return super()._compute_loss(model, inputs)

    return First


@pytest.mark.parametrize("name", RUNS)
def test_trains(name, make, models, tokenizer, stored, record_property):  # noqa: F811
    options = {"max_steps": STEPS, **RUNS[name]}
    options["cls"] = first(GOPDTrainer if name == "stored" else options.get("cls", Recording))
    if name == "stored":
        options |= {"cls": first(Sampling), "train_dataset": stored}
    if name == "two_ends":
        model = load(models / "student")
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 130)]
        options["model"] = model
    trainer = make(**options)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()

    record_property("trl", trl.__version__)
    if name == "two_ends":  # TRL before 1.14.2 ends completions at one id alone, so they are others
        ids, mask = trainer.first["completion_ids"], trainer.first["completion_mask"].bool()
        rows = [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)]
        assert all(len(row) == 10 or row[-1] in eos_token_ids(trainer) for row in rows)
    else:
        record_property("losses", json.dumps(trainer.losses))
    assert len(trainer.losses) == STEPS * trainer.args.gradient_accumulation_steps
    still = [n for n, p in trainer.model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still, f"not trained: {still}"
    if name == "accumulation":  # its metrics are of two micro-batches
        return
    want, coverage = first_step(trainer, models)
    # Sums over the vocabulary of numbers below 32, in another order than ours: eps a term at most.
    tolerance = 32 * len(tokenizer) * torch.finfo(torch.float32).eps
    if name == "stratified":
        assert logged(trainer, "gopd/top_k_coverage")[0] == pytest.approx(coverage.item(), abs=tolerance)
    else:
        assert logged(trainer, "gopd/reverse_kl")[0] == pytest.approx(want.item(), abs=tolerance)


def test_a_fresh_adapter_depends_on_the_seed_alone(make):  # noqa: F811
    drawn = []
    for before in (1, 2):
        torch.manual_seed(before)
        model = make(peft_config=LoraConfig(**LORA)).model
        drawn.append([parameter for name, parameter in model.named_parameters() if "lora_A" in name])
    assert len(drawn[0]) > 0 and all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize("estimator", ["sampled", "full", "stratified"])
def test_an_adapter_on_the_head_is_refused(estimator, make):  # noqa: F811
    """The head's own weight is what hidden states are multiplied by, so it would not be trained."""
    with pytest.raises(ValueError, match="`lm_head`.*[Rr]emove .*`target_modules`"):
        make(gopd_estimator=estimator, peft_config=LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]}))
