"""Scores and completions that were stored: the trainer computes with them what it computes without."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.gopd.harness import Keeping, Recording, assert_policy_gradient, logged, sampled_logps
from tests.tiny import LORA
from trl_gopd.gopd.frozen.cached import CachedScorer
from trl_gopd.gopd.trainer import GOPDTrainer


class Plain(Keeping, GOPDTrainer):
    """Its completions are not scripted."""


@pytest.fixture
def stored(make, tmp_path):
    """Rows with the completions that a run has sampled, and the losses of that run."""
    batches = []

    class Storing(Recording):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            for row, ids, mask in zip(inputs, output["completion_ids"], output["completion_mask"], strict=True):
                batches.append({"prompt": row["prompt"], "completion_ids": ids[mask.bool()].tolist()})
            return output

    trainer = make(Storing, max_steps=2)
    trainer.train()
    return Dataset.from_list(batches), trainer


class TestCache:
    def test_second_run_scores_nothing(self, make, models, tmp_path):
        options = {"ref_model": str(models / "base"), "max_steps": 2, "logprob_cache_dir": str(tmp_path / "cache")}
        plain = make(ref_model=str(models / "base"), max_steps=2)
        plain.train()
        first = make(**options)
        first.train()
        assert first.losses == plain.losses
        assert logged(first, "gopd/cache_hit_share") == [0.0, 0.0]
        second = make(**options)
        second.train()
        assert second.losses == first.losses
        assert logged(second, "gopd/cache_hit_share") == [1.0, 1.0]

    def test_files_stand_for_their_models(self, make, models, tmp_path):
        options = {"ref_model": str(models / "base"), "max_steps": 2}
        first = make(logprob_cache_dir=str(tmp_path), **options)
        first.train()
        alone = make(
            teacher_model=tmp_path / "teacher.sqlite3",
            ref_model=str(tmp_path / "reference.sqlite3"),
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
        )
        assert all(isinstance(scorer, CachedScorer) for scorer in (alone.teachers[None], alone.references[None]))
        alone.train()
        assert alone.losses == first.losses
        first.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))  # known as the same models

    def test_missing_rows(self, make, prompts, tmp_path):
        make(logprob_cache_dir=str(tmp_path), gopd_lambda=1.0).train()
        other = prompts.map(lambda row: {"prompt": row["prompt"] + "!"})
        alone = make(teacher_model=str(tmp_path / "teacher.sqlite3"), gopd_lambda=1.0, train_dataset=other)
        with pytest.raises(ValueError, match="4 "):
            alone.train()

    def test_by_teacher_and_another_model(self, several, models, tmp_path):
        several(logprob_cache_dir=str(tmp_path), gopd_lambda=1.0).train()
        assert {path.name for path in tmp_path.glob("*.sqlite3")} == {"teacher-math.sqlite3", "teacher-code.sqlite3"}
        swapped = {"math": str(models / "base"), "code": str(models / "teacher")}
        with pytest.raises(ValueError, match="teacher-math.sqlite3"):
            several(logprob_cache_dir=str(tmp_path), gopd_lambda=1.0, teacher_model=swapped)

    def test_the_students_own_base_has_none(self, make, tmp_path):
        trainer = make(logprob_cache_dir=str(tmp_path), peft_config=LoraConfig(**LORA))
        trainer.train()
        assert [path.name for path in tmp_path.glob("*.sqlite3")] == ["teacher.sqlite3"]

    @pytest.mark.parametrize("estimator", ["full", "stratified"])
    def test_other_estimators(self, make, tmp_path, estimator):
        with pytest.raises(ValueError, match="needs `gopd_estimator='sampled'`"):
            make(logprob_cache_dir=str(tmp_path), gopd_estimator=estimator)
        with pytest.raises(ValueError, match="is a cache of log-probabilities of sampled tokens"):
            make(teacher_model=str(tmp_path / "a.sqlite3"), gopd_estimator=estimator)


class TestCompletions:
    @pytest.mark.parametrize("estimator", ["sampled", "stratified", "full"])
    def test_train_as_if_they_were_sampled(self, make, stored, estimator):
        rows, sampled = stored
        if estimator != "sampled":
            sampled = make(gopd_estimator=estimator, max_steps=2)
            sampled.train()
        trainer = make(
            Plain,
            train_dataset=rows,
            use_stored_completions=True,
            shuffle_dataset=False,
            gopd_estimator=estimator,
            max_steps=2,
        )
        trainer.train()
        assert trainer.losses == pytest.approx(sampled.losses, rel=1e-5)

    def test_weights(self, make, models, stored):
        rows, _ = stored
        rows = rows.map(
            lambda row: {"sampling_per_token_logps": [-5.0 - i / 4 for i in range(len(row["completion_ids"]))]}
        )
        options = {"train_dataset": rows, "use_stored_completions": True, "shuffle_dataset": False}
        trainer = make(Plain, vllm_importance_sampling_clip_max=1.5, **options)
        trainer.train()
        s, t, r = sampled_logps(models, trainer.seen)
        mu = -5.0 - torch.arange(s.size(1)) / 4
        weights = (s - mu).exp().clamp(max=1.5)
        assert (weights < 1.5).any() and (weights == 1.5).any()
        assert_policy_gradient(trainer, models, weights * ((t - s) + 0.25 * (t - r)))

    def test_bad_options(self, make, stored):
        rows, _ = stored
        with pytest.raises(ValueError, match="use `num_generations=1`"):
            make(train_dataset=rows, use_stored_completions=True, num_generations=2)
        with pytest.raises(ValueError, match="`completion_ids` must be a list.*no such column"):
            make(Plain, use_stored_completions=True).train()
