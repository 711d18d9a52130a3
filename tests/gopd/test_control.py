"""
Estimators, schedules of λ, gates, credit and monitors inside the trainer. What each of them computes is tested in its
own room; here, that the trainer gives it the right tensors at the right time.
"""

import json

import pytest
import torch
from peft import LoraConfig

from tests.gopd.harness import (
    Recording,
    assert_gradient,
    assert_policy_gradient,
    load,
    log_probs,
    logged,
    sampled_logps,
)
from tests.tiny import LORA
from trl_gopd.gopd.schedules import LambdaSchedule


class Repeating(Recording):
    """Every completion is one token over and over, and ends."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [[5] * 8 + [self._tokenizer.eos_token_id] for _ in prompt_ids], None


class TestStratified:
    @pytest.mark.parametrize("gopd_lambda", [1.0, 1.5])
    def test_all_ids_give_the_full_gradient(self, make, tokenizer, gopd_lambda):
        options = {"gopd_lambda": gopd_lambda}
        full = make(gopd_estimator="full", **options)
        full.train()
        stratified = make(gopd_estimator="stratified", gopd_top_k=len(tokenizer), **options)
        stratified.train()
        for name, gradient in full.grads.items():
            torch.testing.assert_close(stratified.grads[name], gradient, rtol=1e-4, atol=1e-6)
        assert stratified.losses == pytest.approx(full.losses, rel=1e-5)
        assert logged(stratified, "gopd/top_k_coverage") == [pytest.approx(1)]
        assert logged(stratified, "gopd/top_k_overlap") == [pytest.approx(1)]

    def test_few_ids_and_the_sampled_one(self, make, models):
        """The coefficients of ∇ log π_v are π_v (A_v − b) inside S, and A_y − b for a sampled token outside."""
        trainer = make(gopd_estimator="stratified", gopd_top_k=3)
        trainer.train()
        inputs, student = trainer.seen, load(models / "student")
        log_s = log_probs(student, inputs)
        with torch.no_grad():
            log_t = log_probs(load(models / "teacher"), inputs)
            own = log_s.detach()
            advantages = (log_t - own) + 0.25 * (log_t - own)  # the reference is the student's start
            stratum = torch.zeros_like(own, dtype=torch.bool).scatter(-1, own.topk(3).indices, True)
            rest_t = log_t.masked_fill(stratum, -torch.inf).logsumexp(-1, keepdim=True)
            rest_s = own.masked_fill(stratum, -torch.inf).logsumexp(-1, keepdim=True)
            baseline = 1.25 * (rest_t - rest_s)
            sampled = torch.zeros_like(own).scatter(-1, inputs["completion_ids"].unsqueeze(-1), 1.0)
            weights = torch.where(stratum, own.exp(), sampled) * (advantages - baseline)
        assert_gradient(trainer, student, -(weights * log_s).sum(-1))

    def test_adapter_and_evaluation(self, make, prompts):
        trainer = make(
            gopd_estimator="stratified",
            peft_config=LoraConfig(**LORA),
            eval_dataset=prompts,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        assert 0 < trainer.evaluate()["eval_gopd/top_k_coverage"] < 1

    @pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 2}])
    def test_reuse_is_refused(self, make, options):
        with pytest.raises(ValueError, match="a rollout is used for one step"):
            make(gopd_estimator="stratified", **options)


class TestCredit:
    @pytest.mark.parametrize("discount", [0.5, 1.0])
    def test_discount(self, make, models, discount):
        trainer = make(gopd_discount=discount, ref_model=str(models / "base"))
        trainer.train()
        s, t, r = sampled_logps(models, trainer.seen, reference="base")
        advantages = ((t - s) + 0.25 * (t - r)) * trainer.seen["completion_mask"]
        powers = torch.arange(advantages.size(1))
        gaps = powers.unsqueeze(0) - powers.unsqueeze(1)  # [t, later]
        matrix = torch.where(gaps >= 0, discount ** gaps.clamp(min=0).float(), 0.0)
        assert_policy_gradient(trainer, models, advantages @ matrix.T)

    @pytest.mark.parametrize("estimator", ["full", "stratified"])
    def test_discount_of_expected_advantages(self, make, models, tokenizer, estimator):
        """Each token's divergence, and its score times what is expected of the later tokens."""
        options = {"gopd_estimator": estimator, "gopd_top_k": len(tokenizer)}  # with all ids both are exact
        trainer = make(gopd_discount=0.5, ref_model=str(models / "base"), **options)
        trainer.train()
        inputs, student = trainer.seen, load(models / "student")
        mask, log_s = inputs["completion_mask"].float(), log_probs(student, inputs)
        with torch.no_grad():
            log_t, log_r = (log_probs(load(models / name), inputs) for name in ("teacher", "base"))
            advantages = log_t - log_s + 0.25 * (log_t - log_r)
        expected = (log_s.exp() * advantages).sum(-1) * mask
        later = torch.zeros_like(expected)
        for step in reversed(range(expected.size(1) - 1)):
            later[:, step] = 0.5 * (expected[:, step + 1] + later[:, step + 1])
        sampled = log_s.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
        credit = (log_s.exp() * advantages.detach()).sum(-1) + later.detach() * sampled
        assert_gradient(trainer, student, -credit)

    def test_discount_of_expected_advantages_uses_a_rollout_once(self, make):
        make(gopd_discount=0.5, gopd_estimator="full")
        with pytest.raises(ValueError, match="used for one step with `gopd_estimator='full'` and `gopd_discount=0.5`"):
            make(gopd_discount=0.5, gopd_estimator="full", num_iterations=2)

    @pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
    def test_skipped_tokens(self, make, models, loss_type):
        """They are not counted either: the loss is the negated mean of what is logged as the mean advantage."""
        trainer = make(num_loss_tokens_to_skip=2, gopd_lambda=1.0, loss_type=loss_type)
        trainer.train()
        s, t, _ = sampled_logps(models, trainer.seen)
        mask = trainer.seen["completion_mask"]
        later = (torch.arange(s.size(1)) >= 2) * mask
        counts = later.sum(1, keepdim=True).clamp(min=1) if loss_type == "grpo" else later.sum() / len(later)
        # `assert_policy_gradient` divides by the tokens of each whole row
        credit = (t - s) * later * mask.sum(1, keepdim=True) / counts
        assert_policy_gradient(trainer, models, credit)
        if loss_type == "dapo":
            log = trainer.state.log_history[0]
            assert log["loss"] == pytest.approx(-log["gopd/advantage_mean"], rel=1e-5)


class TestSchedule:
    def test_warm_up(self, make, models):
        options = {"gopd_lambda": 2.0, "gopd_lambda_schedule": "linear", "gopd_lambda_warmup_steps": 4}
        trainer = make(max_steps=6, **options)
        trainer.train()
        assert logged(trainer, "gopd/lambda") == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0]
        first = make(ref_model=str(models / "base"), **options)
        first.train()
        s, t, _ = sampled_logps(models, first.seen)
        assert_policy_gradient(first, models, t - s)  # λ = 1 at the first step

    @pytest.mark.parametrize("estimator", ["sampled", "stratified", "full"])
    def test_adaptive_is_the_ratio_of_the_step_before(self, make, models, estimator):
        options = {
            "gopd_lambda": 1.5,
            "gopd_lambda_schedule": "adaptive",
            "gopd_estimator": estimator,
            "ref_model": str(models / "base"),
            "max_steps": 2,
        }
        trainer = make(per_device_train_batch_size=8, **options)
        batches = []
        observe = trainer._observer.micro_batch

        def observing(estimate, batch, **kwargs):
            batches.append(vars(batch))
            return observe(estimate, batch, **kwargs)

        trainer._observer.micro_batch = observing
        trainer.train()
        s, t, r = sampled_logps(models, batches[0], reference="base")
        mask = batches[0]["completion_mask"].bool()
        ratio = (t - s)[mask].square().mean().sqrt() / (t - r)[mask].square().mean().sqrt()
        want = 1 + 0.25 * min(float(ratio), 2.0)
        assert logged(trainer, "gopd/lambda") == [1.25, pytest.approx(want, rel=1e-5)]

        parts = make(per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
        parts.train()
        assert logged(parts, "gopd/lambda") == pytest.approx(logged(trainer, "gopd/lambda"), rel=1e-5)

    def test_back_off(self, make, caplog):
        trainer = make(Repeating, gopd_back_off={"max_repetition": 0.5}, max_steps=3)
        trainer.train()
        # five 4-grams of the repeated token, of which one is new, and one with the end
        assert logged(trainer, "completions/repetition") == [pytest.approx(4 / 6)] * 3
        assert logged(trainer, "gopd/lambda") == [1.125, 1.0625, 1.03125]
        assert "repetition 0.667 > 0.5" in caplog.text

    def test_masked_completions_keep_their_length(self, make):
        """A limit below all lengths but one truncates them; masked out or not, back-off sees the same completions."""
        options = {"gopd_back_off": {"max_truncated_share": 0.5}, "max_steps": 2}

        class Cut(Recording):
            def _generate_single_turn(self, *args, **kwargs):
                completions, extra = super()._generate_single_turn(*args, **kwargs)
                return [ids[:-1] if len(ids) > 3 else ids for ids in completions], extra

        plain, masked = (make(Cut, mask_truncated_completions=value, **options) for value in (False, True))
        plain.train()
        masked.train()
        assert logged(masked, "completions/p95_length") == logged(plain, "completions/p95_length")
        assert min(logged(plain, "completions/p95_length")) > 3
        assert masked._schedule.state_dict() == plain._schedule.state_dict() != LambdaSchedule().state_dict()

    def test_evaluation_does_not_move_it(self, make, prompts):
        trainer = make(Repeating, gopd_back_off='{"max_repetition": 0.5}', eval_dataset=prompts)
        before = trainer._schedule.state_dict()
        trainer.evaluate()
        assert trainer._schedule.state_dict() == before

    def test_resume(self, make, tmp_path):
        options = {
            "gopd_lambda_schedule": "adaptive",
            "gopd_back_off": {"max_repetition": 0.5},
            "gopd_lambda": 1.6,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        whole = make(Repeating, max_steps=4, **options)
        whole.train()
        state = json.loads((tmp_path / "out" / "checkpoint-2" / "gopd_state.json").read_text())
        assert state["lambda_schedule"]["trust"] == 0.25
        resumed = make(Repeating, max_steps=4, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert resumed.losses == whole.losses[2:]
        assert logged(resumed, "gopd/lambda")[-2:] == logged(whole, "gopd/lambda")[2:]


class TestGates:
    def test_certain_teacher(self, make, models):
        trainer = make(gopd_deterministic_above=0.005, gopd_lambda=2.0, ref_model=str(models / "base"))
        trainer.train()
        s, t, r = sampled_logps(models, trainer.seen, reference="base")
        is_open = t.exp() <= 0.005
        assert is_open.any() and not is_open.all()
        assert_policy_gradient(trainer, models, (t - s) + is_open * (t - r))

    def test_agreement(self, make, models):
        trainer = make(gopd_needs_agreement=True, gopd_lambda=2.0, ref_model=str(models / "base"))
        trainer.train()
        s, t, r = sampled_logps(models, trainer.seen, reference="base")
        is_open = (t - s).sign() == (t - r).sign()
        assert is_open.any() and not is_open.all()
        assert_policy_gradient(trainer, models, (t - s) + is_open * (t - r))
        assert 1 < logged(trainer, "gopd/lambda")[0] < 2


class TestMonitors:
    def test_end_of_sequence(self, make, models, tokenizer):
        trainer = make(ref_model=str(models / "base"))
        trainer.train()
        s, t, r = sampled_logps(models, trainer.seen, reference="base")
        ends = (trainer.seen["completion_ids"] == tokenizer.eos_token_id) & trainer.seen["completion_mask"].bool()
        assert logged(trainer, "gopd/eos_implicit_reward")[0] == pytest.approx(float((t - r)[ends].mean()), rel=1e-4)
        advantage = (t - s) + 0.25 * (t - r)
        assert logged(trainer, "gopd/eos_advantage")[0] == pytest.approx(float(advantage[ends].mean()), rel=1e-4)

    def test_page_of_tokens(self, make, tmp_path):
        trainer = make(log_completions=True)
        trainer.train()
        page = (tmp_path / "out" / "completions" / "advantages_00001.html").read_text()
        assert page.count("advantage ") >= int(trainer.seen["completion_mask"].sum())
        assert "teacher_logp" in page and "reference_logp" in page


@pytest.mark.parametrize(
    "options,message",
    [
        ({"gopd_top_k": 0}, "`gopd_top_k` must be at least 1"),
        ({"num_loss_tokens_to_skip": -1}, "`num_loss_tokens_to_skip` must be at least 0"),
        ({"gopd_discount": 1.5}, "`gopd_discount` must be between 0 and 1"),
        ({"gopd_needs_agreement": True, "gopd_estimator": "stratified"}, "needs `gopd_estimator='sampled'`"),
        ({"gopd_deterministic_above": 1.0}, "`gopd_deterministic_above` must be between 0 and 1"),
        ({"gopd_lambda_schedule": "cosine"}, "The schedule of λ.*must be one of"),
        ({"gopd_lambda_schedule": "linear"}, "The schedule of λ.*`warmup_steps` must be at least 1"),
        ({"gopd_back_off": {"max_length": 3}}, "The schedule of λ.*max_length"),
        ({"gopd_estimator": "exact"}, "must be one of"),
    ],
)
def test_bad_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
