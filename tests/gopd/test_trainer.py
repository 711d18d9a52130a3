"""
Laws of the trainer on tiny models: gradients against a policy gradient written here, which model is the reference,
what each kind of teacher gives, and that nothing about the layout of a batch changes the result.
"""

import copy
import json
import math

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.gopd.harness import Recording, load, log_probs, logged, sampled_logps
from tests.tiny import LORA, build_model, build_tokenizer
from trl_gopd.gopd.frozen.adapter import AdapterScorer
from trl_gopd.gopd.trainer import GOPDTrainer


def naive_loss(student, teacher, reference, inputs, gopd_lambda, estimator):
    """Mean over sequences of token means, three models, no trick."""
    mask, ids = inputs["completion_mask"].float(), inputs["completion_ids"].unsqueeze(-1)
    log_s = log_probs(student, inputs)
    with torch.no_grad():
        log_t, log_r = log_probs(teacher, inputs), log_probs(reference, inputs)
    if estimator == "full":
        log_q = (gopd_lambda * log_t + (1 - gopd_lambda) * log_r).log_softmax(-1)
        token = (log_s.exp() * (log_s - log_q)).sum(-1)
    else:
        s, t, r = (x.gather(-1, ids).squeeze(-1) for x in (log_s, log_t, log_r))
        token = -(gopd_lambda * t - (gopd_lambda - 1) * r - s).detach() * s
    return ((token * mask).sum(1) / mask.sum(1)).mean()


def assert_same_gradient(got, model, loss, relative=1e-5):
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    want = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    norm = math.sqrt(sum(float(g.square().sum()) for g in want.values()))
    gap = math.sqrt(sum(float((got[n] - want[n]).square().sum()) for n in want))
    assert norm > 0 and gap / norm < relative, gap / norm


class TestGradient:
    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    @pytest.mark.parametrize("gopd_lambda", [0.5, 1.0, 1.25])
    def test_equals_naive_policy_gradient(self, make, models, estimator, gopd_lambda):
        trainer = make(gopd_lambda=gopd_lambda, gopd_estimator=estimator, ref_model=str(models / "base"))
        trainer.train()
        student = load(models / "student")
        loss = naive_loss(
            student, load(models / "teacher"), load(models / "base"), trainer.seen, gopd_lambda, estimator
        )
        assert_same_gradient(trainer.grads, student, loss)

    def test_logged_loss_is_the_negated_mean_advantage(self, make):
        trainer = make(loss_type="dapo")
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(-log["gopd/advantage_mean"], rel=1e-5)

    def test_lambda_zero_towards_its_own_start_is_still(self, make):
        """At λ = 0 the target is the reference; the student is there already, up to the noise of one token."""
        trainer = make(gopd_lambda=0.0, gopd_estimator="full")
        trainer.train()
        # g = 0 up to the rounding of log-probabilities of magnitude below 16
        assert max(float(g.abs().max()) for g in trainer.grads.values()) < 1e3 * 16 * torch.finfo(torch.float32).eps

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_teacher_equal_to_student_gives_no_gradient(self, make, models, estimator):
        trainer = make(teacher_model=str(models / "student"), gopd_estimator=estimator)
        trainer.train()
        assert max(float(g.abs().max()) for g in trainer.grads.values()) < 1e3 * 16 * torch.finfo(torch.float32).eps
        assert abs(trainer.state.log_history[0]["gopd/reverse_kl"]) < 100 * torch.finfo(torch.float32).eps

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_rollout_correction(self, make, models, estimator):
        """
        Tokens from another sampler weigh min(π/π_sampler, 5), without a lower bound and without a gradient; the
        expectation over the vocabulary has no sampled token to weigh.
        """

        class Sampler(Recording):
            def _generate_single_turn(self, *args, **kwargs):
                completions, _ = super()._generate_single_turn(*args, **kwargs)
                # the student gives each about -5.6 nats: ratios of about e^-4.6 and e^3.4, which is 30
                return completions, [[(-1.0, -9.0)[i % 2] for i in range(len(ids))] for ids in completions]

        trainer = make(cls=Sampler, ref_model=str(models / "base"), gopd_estimator=estimator)
        trainer.use_vllm = True  # what generates is scripted; what corrects is not
        trainer.train()
        student, inputs = load(models / "student"), trainer.seen
        mask, ids = inputs["completion_mask"].float(), inputs["completion_ids"].unsqueeze(-1)
        if estimator == "full":
            loss = naive_loss(student, load(models / "teacher"), load(models / "base"), inputs, 1.25, "full")
        else:
            log_s = log_probs(student, inputs).gather(-1, ids).squeeze(-1)
            with torch.no_grad():
                log_t, log_r = (
                    log_probs(load(models / name), inputs).gather(-1, ids).squeeze(-1) for name in ("teacher", "base")
                )
            weight = (log_s.detach() - inputs["sampling_per_token_logps"]).exp().clamp(max=5.0)
            assert weight[mask.bool()].min() < 0.1 and (weight[mask.bool()] == 5.0).any()
            token = -weight * (1.25 * log_t - 0.25 * log_r - log_s).detach() * log_s
            loss = ((token * mask).sum(1) / mask.sum(1)).mean()
        assert_same_gradient(trainer.grads, student, loss)

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_accumulation_equals_one_batch(self, make, estimator):
        one, two = (
            make(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, gopd_estimator=estimator)
            for size in (4, 2)
        )
        one.train()
        two.train()
        for name, grad in one.grads.items():
            torch.testing.assert_close(two.grads[name], grad, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_padding_changes_nothing(self, make, estimator):
        plain, padded = (make(pad_to_multiple_of=n, gopd_estimator=estimator) for n in (None, 32))
        plain.train()
        padded.train()
        assert padded.seen["completion_ids"].shape != plain.seen["completion_ids"].shape
        for name, grad in plain.grads.items():
            torch.testing.assert_close(padded.grads[name], grad, rtol=1e-4, atol=1e-6)

    def test_temperature_divides_all_three(self, make, models):
        trainer = make(temperature=0.7, ref_model=str(models / "base"))
        trainer.train()
        students = [load(models / name) for name in ("student", "teacher", "base")]
        for model in students:
            model.lm_head.weight.data /= 0.7
        loss = naive_loss(*students, trainer.seen, 1.25, "sampled")
        grads = torch.autograd.grad(loss, students[0].model.layers[0].mlp.up_proj.weight)[0]
        got = trainer.grads["model.layers.0.mlp.up_proj.weight"]
        assert (got - grads).norm() / grads.norm() < 1e-5


class Reusing(Recording):
    """Keeps the student before each step, and the masks of all steps."""

    def training_step(self, *args, **kwargs):
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        self.before = {name: p.detach().clone() for name, p in named}
        loss = super().training_step(*args, **kwargs)
        self.masks = [*getattr(self, "masks", []), self.seen["completion_mask"]]
        return loss


class TestReuse:
    """
    The second of two steps on one generation batch, whose tokens the start has sampled. TRL's formula of each loss
    type is written out, with advantages under the policy that sampled.
    """

    # Bounds that some ratios of the second step lie in, below and above
    EPSILON, EPSILON_HIGH = 0.02, 0.03

    @pytest.fixture
    def second_step(self, make, models):
        def train(**options):
            trainer = make(
                cls=Reusing,
                ref_model=str(models / "base"),
                steps_per_generation=2,
                max_steps=2,
                learning_rate=0.02,
                epsilon=self.EPSILON,
                epsilon_high=self.EPSILON_HIGH,
                **options,
            )
            trainer.train()
            student = load(models / "student")
            student.load_state_dict(trainer.before)
            ids = trainer.seen["completion_ids"].unsqueeze(-1)
            s = log_probs(student, trainer.seen).gather(-1, ids).squeeze(-1)
            old, t, r = sampled_logps(models, trainer.seen, reference="base")
            return trainer, student, s, old, (t - old) + 0.25 * (t - r)

        return train

    def clipped(self, ratio, advantages, largest=math.inf):
        inside = ratio.clamp(1 - self.EPSILON, 1 + self.EPSILON_HIGH)
        return -torch.minimum(ratio.clamp(max=largest) * advantages, inside * advantages)

    def token_losses(self, loss_type, s, old, advantages, mask):
        log_ratio, is_encouraged = s - old, advantages > 0
        if loss_type == "cispo":  # here the upper bound is one of the ratio itself
            return -log_ratio.exp().clamp(max=self.EPSILON_HIGH).detach() * advantages * s
        if loss_type == "sapo":
            temperature = torch.where(is_encouraged, 1.0, 1.05)
            return -(temperature * (log_ratio.exp() - 1)).sigmoid() * 4 / temperature * advantages
        if loss_type == "vespo":  # w^k·e^(c − c·w) of the ratio w of the sequence
            weight = (log_ratio * mask).sum(1, keepdim=True).exp().detach()
            k, c = torch.where(is_encouraged, 2.0, 3.0), torch.where(is_encouraged, 3.0, 2.0)
            return -(weight**k) * (c - c * weight).exp() * advantages * s
        return self.clipped(log_ratio.exp(), advantages)

    def mean(self, loss_type, losses, mask, masks):
        if loss_type in ("grpo", "sapo"):
            return ((losses * mask).sum(1) / mask.sum(1)).mean()
        total = (losses * mask).sum()
        if loss_type == "bnpo":
            return total / mask.sum()
        if loss_type == "dr_grpo":
            return total / (4 * 10)  # four rows of `max_completion_length`
        return total / (sum(m.sum() for m in masks) / 2)  # tokens a step of the whole generation batch

    @pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
    def test_loss_types(self, second_step, loss_type):
        trainer, student, s, old, advantages = second_step(loss_type=loss_type)
        mask = trainer.seen["completion_mask"].float()
        losses = self.token_losses(loss_type, s, old, advantages, mask)
        loss = self.mean(loss_type, losses, mask, trainer.masks)
        # a few sums of log-probabilities below 16
        assert trainer.losses[1] == pytest.approx(loss.item(), abs=8 * 16 * torch.finfo(torch.float32).eps)
        assert trainer.masks[0].sum() != trainer.masks[1].sum()
        assert_same_gradient(trainer.grads, student, loss)

    @pytest.mark.parametrize("delta", [None, 1.04])
    def test_tokens_are_clipped_by_their_own_ratio(self, second_step, delta):
        """Each ratio is to the policy that sampled; `delta` bounds the ratios of tokens that are discouraged."""
        trainer, student, s, old, advantages = second_step(delta=delta)
        counted = trainer.seen["completion_mask"].bool()
        mask, ratio = counted.float(), (s - old).exp()
        losses = self.clipped(ratio, advantages, delta or math.inf)
        assert_same_gradient(trainer.grads, student, ((losses * mask).sum(1) / mask.sum(1)).mean())
        is_low = (ratio < 1 - self.EPSILON) & (advantages < 0)
        is_high = (ratio > 1 + self.EPSILON_HIGH) & (advantages > 0)
        assert is_low[counted].any() and is_high[counted].any() and ((ratio > 1.04) & (advantages < 0))[counted].any()
        share = (is_low | is_high)[counted].float().mean().item()
        assert 0 < share < 1 and logged(trainer, "clip_ratio/region_mean") == pytest.approx([0.0, share], abs=1e-6)


class TestReference:
    def test_lambda_one_never_touches_it(self, make, models, monkeypatch):
        with pytest.warns(UserWarning, match="`ref_model` is not loaded"):
            given = make(gopd_lambda=1.0, ref_model=str(models / "base"), max_steps=3)
        monkeypatch.setattr(AdapterScorer, "switched", lambda self: pytest.fail("the reference was called"))
        given.train()
        plain = make(gopd_lambda=1.0, max_steps=3)  # made now: the constructor seeds, and training draws
        plain.train()
        assert not given.references and not plain.references
        assert given.losses == plain.losses
        for a, b in zip(given.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_default_is_the_start_in_memory(self, make, models):
        student = load(models / "student")
        with torch.no_grad():
            student.lm_head.weight.mul_(1.5)
        start = copy.deepcopy(student)
        trainer = make(model=student, max_steps=2)
        trainer.train()
        assert torch.equal(trainer.references[None].inner.model.lm_head.weight, start.lm_head.weight)
        want = log_probs(start, trainer.seen).gather(-1, trainer.seen["completion_ids"].unsqueeze(-1)).squeeze(-1)
        mask = trainer.seen["completion_mask"].bool()
        torch.testing.assert_close(trainer.seen["gopd_reference_logps"][mask], want[mask], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_fresh_lora_is_switched_off(self, make, models, estimator):
        trainer = make(peft_config=LoraConfig(**LORA), max_steps=3, gopd_estimator=estimator)
        assert isinstance(trainer.references[None], AdapterScorer)
        trainer.train()
        base = load(models / "student")
        merged = copy.deepcopy(trainer.model).merge_and_unload()
        # recompute the gradient of the last step with the adapter of before it: LoRA by hand is the merged model
        assert any(not torch.equal(a, b) for a, b in zip(merged.parameters(), base.parameters(), strict=True))
        if estimator == "sampled":
            ids = trainer.seen["completion_ids"].unsqueeze(-1)
            want = log_probs(base, trainer.seen).gather(-1, ids).squeeze(-1)
            mask = trainer.seen["completion_mask"].bool()
            torch.testing.assert_close(trainer.seen["gopd_reference_logps"][mask], want[mask], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_lora_gradient_uses_teacher_and_reference(self, make, models, estimator):
        trainer = make(peft_config=LoraConfig(**LORA), gopd_estimator=estimator)
        trainer.train()
        student = get_peft_model(load(models / "student"), LoraConfig(**LORA))
        start = load(models / "student")
        trained = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(trained[name])  # B starts at 0, so A has no gradient in the first step
        loss = naive_loss(student, load(models / "teacher"), start, trainer.seen, 1.25, estimator)
        assert_same_gradient(trainer.grads, student, loss)

    def trained_adapter(self, models):
        torch.manual_seed(0)
        model = get_peft_model(load(models / "student"), LoraConfig(**LORA))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        return model

    @pytest.mark.parametrize("beta", [0.0, 0.1])
    def test_trained_adapter_is_copied(self, make, models, beta):
        model = self.trained_adapter(models)
        start = copy.deepcopy(model)
        trainer = make(model=model, beta=beta, max_steps=2)
        trainer.train()
        ids = trainer.seen["completion_ids"].unsqueeze(-1)
        want = log_probs(start, trainer.seen).gather(-1, ids).squeeze(-1)
        mask = trainer.seen["completion_mask"].bool()
        torch.testing.assert_close(trainer.seen["gopd_reference_logps"][mask], want[mask], rtol=0, atol=1e-5)
        trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert trainable and not any(".ref." in name for name in trainable)

    def test_state_is_restored_after_an_error(self, make):
        trainer = make(peft_config=LoraConfig(lora_dropout=0.5, **LORA))
        trainer.model.train()
        with pytest.raises(RuntimeError, match="boom"), trainer.references[None].switched():
            assert not trainer.model.training
            raise RuntimeError("boom")
        assert trainer.model.training and trainer.model.active_adapter == "default"
        layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj
        assert not layer.disable_adapters and layer.lora_dropout["default"].training


class TestTeacher:
    def scores(self, trainer, model):
        trainer.train()
        ids = trainer.seen["completion_ids"].unsqueeze(-1)
        want = log_probs(model, trainer.seen).gather(-1, ids).squeeze(-1)
        mask = trainer.seen["completion_mask"].bool()
        return trainer.seen["gopd_teacher_logps"][mask], want[mask]

    def test_path_and_instance_agree(self, make, models):
        by_path = make(max_steps=2)
        by_path.train()
        by_instance = make(teacher_model=load(models / "teacher"), max_steps=2)
        by_instance.train()
        assert by_path.losses == by_instance.losses

    def test_peft_model(self, make, models):
        torch.manual_seed(0)
        teacher = get_peft_model(load(models / "teacher"), LoraConfig(**LORA))
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        got, want = self.scores(make(teacher_model=teacher), copy.deepcopy(teacher))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        with teacher.disable_adapter():
            _, base = self.scores(make(teacher_model=copy.deepcopy(teacher)), teacher)
        assert (got - base).abs().max() > 0.1  # the adapter is part of the teacher

    def test_int8_quantized(self, make, models):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        quantized = AutoModelForCausalLM.from_pretrained(
            models / "teacher", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
        )
        got, want = self.scores(make(teacher_model=quantized), quantized)
        # both are the quantized model; its activations are rounded to 8 bits by row, so padding moves nothing
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_dtype_by_name_or_object(self, make, dtype):
        trainer = make(teacher_model_init_kwargs={"dtype": dtype})
        assert trainer.teachers[None].inner.base.dtype == torch.bfloat16

    def test_checkpoint_dtype_is_kept(self, make, models, tmp_path, tokenizer):
        load(models / "teacher").bfloat16().save_pretrained(tmp_path / "half")
        tokenizer.save_pretrained(tmp_path / "half")
        assert make(teacher_model=str(tmp_path / "half")).teachers[None].inner.base.dtype == torch.bfloat16

    def test_frozen_innerare_not_trained_or_saved(self, make, tmp_path, models):
        trainer = make(max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        frozen = {
            p.data_ptr() for m in (trainer.teachers[None], trainer.references[None]) for p in m.inner.parameters()
        }
        trained = {p.data_ptr() for group in trainer.optimizer.param_groups for p in group["params"]}
        assert not frozen & trained
        assert all(
            not p.requires_grad
            for m in (trainer.teachers[None], trainer.references[None])
            for p in m.inner.parameters()
        )
        saved = load(tmp_path / "out" / "checkpoint-1")
        assert saved.num_parameters() == load(models / "student").num_parameters()

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_padded_vocabulary(self, make, models, tokenizer, estimator):
        teacher = build_model(tokenizer, seed=5, vocab_size=len(tokenizer) + 21)
        trainer = make(teacher_model=teacher, gopd_estimator=estimator)
        trainer.train()
        assert math.isfinite(trainer.losses[0])

    def test_vocabulary_smaller_than_the_tokenizer(self, make, tokenizer):
        teacher = build_model(tokenizer, seed=5, vocab_size=len(tokenizer) - 9)
        with pytest.raises(ValueError, match="vocabulary of 250 ids.*tokenizer has 259"):
            make(teacher_model=teacher)

    def test_other_tokenizer_names_the_first_difference(self, make, tmp_path):
        other = build_tokenizer(extra_tokens=("<|think|>",))
        build_model(other, seed=5).save_pretrained(tmp_path / "other")
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=r"id 3 is '<\|think\|>' there and '!' in the student's"):
            make(teacher_model=str(tmp_path / "other"))

    def test_student_as_its_own_teacher(self, make, models):
        model = load(models / "student")
        with pytest.raises(ValueError, match="`teacher_model` is the student itself"):
            make(model=model, teacher_model=model)

    def test_missing(self, make):
        with pytest.raises(ValueError, match="No teacher.*Pass one of them"):
            make(teacher_model=None)

    def test_named_in_the_configuration(self, make, models):
        trainer = make(teacher_model=None, teacher_model_name_or_path=str(models / "teacher"))
        assert trainer.teachers[None].inner.config.hidden_size == 48

    def test_init_kwargs_for_an_instance(self, make, models):
        with pytest.raises(ValueError, match="already instantiated"):
            make(teacher_model=load(models / "teacher"), teacher_model_init_kwargs={"dtype": "bfloat16"})


class TestRun:
    def test_defaults_sample_for_real(self, make):
        trainer = make(cls=GOPDTrainer, max_steps=2, per_device_train_batch_size=1)
        trainer.train()
        assert trainer.state.log_history[0]["completions/max_length"] <= 10

    @pytest.mark.parametrize("gopd_lambda", [1.0, 1.25])
    def test_divergence_to_the_target_falls(self, make, gopd_lambda):
        trainer = make(
            cls=GOPDTrainer,
            gopd_lambda=gopd_lambda,
            gopd_estimator="full",
            max_steps=20,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            optim="adamw_torch",
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses[-1] < 0.5 * losses[0]

    def test_extrapolation_exceeds_the_teachers_own_reward(self, make, models, prompts, tokenizer):
        """
        E[log π*/π_ref] rises with λ along the optimum, so a student trained at 1.25 passes the teacher's own; at λ = 1
        it does not. The expectation is exact over the first token of every prompt.
        """
        rewards = {}
        teacher, reference = load(models / "teacher"), load(models / "student")
        for gopd_lambda in (1.0, 1.25):
            trainer = make(
                cls=GOPDTrainer,
                gopd_lambda=gopd_lambda,
                gopd_estimator="full",
                max_steps=150,
                per_device_train_batch_size=16,
                max_completion_length=1,
                num_train_epochs=150,
                learning_rate=1e-2,
                optim="adamw_torch",
            )
            trainer.train()
            values = []
            for prompt in prompts["prompt"]:
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                with torch.no_grad():
                    log_s, log_t, log_r = (
                        m.eval()(input_ids=ids).logits[0, -1].log_softmax(-1)
                        for m in (trainer.model, teacher, reference)
                    )
                values.append([(p.exp() * (log_t - log_r)).sum() for p in (log_s, log_t)])
            rewards[gopd_lambda], own = torch.tensor(values).mean(0).tolist()
        # the optimum at 1 is the teacher itself; how far the run still is from it is the yardstick
        assert rewards[1.25] - own > 2 * abs(rewards[1.0] - own)

    def test_sampled_reverse_kl_falls(self, make):
        trainer = make(
            cls=GOPDTrainer,
            gopd_lambda=1.0,
            max_steps=30,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            optim="adamw_torch",
        )
        trainer.train()
        values = [log["gopd/reverse_kl"] for log in trainer.state.log_history if "loss" in log]
        assert sum(values[-5:]) < 0.7 * sum(values[:5])

    @pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
    def test_full_loss_types_log_the_divergence(self, make, loss_type):
        trainer = make(loss_type=loss_type, gopd_estimator="full", gopd_lambda=1.0)
        trainer.train()
        mask = trainer.seen["completion_mask"]
        log = trainer.state.log_history[0]
        if loss_type in ("bnpo", "dapo"):  # both are the mean over tokens here
            assert trainer.losses[0] == pytest.approx(log["gopd/reverse_kl"], rel=1e-5)
        if loss_type == "dr_grpo":
            total = log["gopd/reverse_kl"] * mask.sum().item()
            assert trainer.losses[0] == pytest.approx(total / (4 * 10), rel=1e-5)

    def test_generations_with_task_reward(self, make):
        """A_t plus the group advantage of the reward: rows of one prompt differ by the reward alone."""

        def reward(completions, **kwargs):
            return [float(i % 2) for i in range(len(completions))]

        trainer = make(reward_funcs=reward, num_generations=2, gopd_lambda=1.0)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["rewards/reward/mean"] == pytest.approx(0.5)
        assert sorted(trainer.seen["advantages"].tolist()) == [-0.5, -0.5, 0.5, 0.5]

    def test_both_advantages_are_logged(self, make, tmp_path):
        def reward(completions, **kwargs):
            return [float(i % 2) for i in range(len(completions))]

        trainer = make(reward_funcs=reward, num_generations=2, log_completions=True, max_steps=2)
        trainer.train()
        for step in (1, 2):
            table = pd.read_parquet(tmp_path / "out" / "completions" / f"completions_{step:05d}.parquet")
            assert set(table["advantage"]) == {-0.5, 0.5}
            assert table["gopd_advantage"].map(math.isfinite).all() and table["gopd_advantage"].abs().min() > 0
            page = (tmp_path / "out" / "completions" / f"advantages_{step:05d}.html").read_text()
            assert "teacher_logp" in page
        # a mean over sequences of token means, in which the rewards' advantages cancel
        assert -table["gopd_advantage"].mean() == pytest.approx(trainer.losses[1], rel=1e-4)

    def test_reward_needs_a_group(self, make):
        with pytest.raises(ValueError, match="`reward_funcs` with `num_generations=1` have no effect"):
            make(reward_funcs=lambda completions, **kw: [0.0] * len(completions))

    def test_evaluate(self, make, prompts):
        trainer = make(eval_dataset=prompts, per_device_eval_batch_size=4)
        metrics = trainer.evaluate()
        assert math.isfinite(metrics["eval_loss"])
        logged = trainer.state.log_history[-1]
        assert "eval_gopd/reverse_kl" in logged and not any("null" in key for key in logged)

    def test_iterable_and_conversational(self, make):
        rows = [{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(16)]
        trainer = make(train_dataset=IterableDataset.from_generator(lambda: iter(rows)), max_steps=2)
        trainer.train()
        assert trainer.state.global_step == 2

    def test_resume(self, make, tmp_path):
        whole = make(max_steps=4, save_strategy="steps", save_steps=2)
        whole.train()
        rest = make(max_steps=4)
        rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert rest.losses == whole.losses[2:]

    def test_no_trace_of_the_null_reward(self, make, tmp_path):
        trainer = make(log_completions=True, save_strategy="steps", save_steps=1)
        trainer.train()
        assert not any("reward" in key for log in trainer.state.log_history for key in log if "gopd/" not in key)
        table = pd.read_parquet(next((tmp_path / "out" / "completions").glob("*.parquet")))
        assert list(table.columns) == ["step", "prompt", "completion", "advantage"]
        mean = trainer.state.log_history[0]["gopd/advantage_mean"]
        lengths = trainer.seen["completion_mask"].sum(1)
        assert table["advantage"].abs().min() > 0 and len(table) == len(lengths) and math.isfinite(mean)

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    def test_extrapolation_is_logged_as_it_is_clipped(self, make, models, estimator):
        """At c the term is at most (λ − 1)·c in size, and its share is what it adds to the distance to the teacher."""
        clip = 1e-3
        trainer = make(gopd_extrapolation_clip=clip, gopd_estimator=estimator, ref_model=str(models / "base"))
        trainer.train()
        log = trainer.state.log_history[0]
        assert 0.5 < log["gopd/clip_share"] <= 1
        assert abs(log["gopd/extrapolation"]) <= 0.25 * clip * (1 + 1e-5)
        # a thousandth of a nat beside the tenths of a nat between these models
        assert 0 < log["gopd/extrapolation_share"] < 0.01

    def test_an_id_the_teacher_lacks_does_not_spoil_the_table(self, make, models, tokenizer, tmp_path):
        """The student's padded vocabulary has one id more than the teacher's, and the first token of a row is that."""

        class Outside(Recording):
            def _generate_single_turn(self, *args, **kwargs):
                completions, extra = super()._generate_single_turn(*args, **kwargs)
                completions[0][0] = len(tokenizer)
                return completions, extra

        student = build_model(tokenizer, seed=1, vocab_size=len(tokenizer) + 1)
        trainer = make(cls=Outside, model=student, ref_model=str(models / "base"), log_completions=True)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["gopd/outside_vocabulary_share"] == pytest.approx(1 / trainer.seen["completion_mask"].sum().item())
        table = pd.read_parquet(next((tmp_path / "out" / "completions").glob("*.parquet")))
        assert table["advantage"].map(math.isfinite).all() and math.isfinite(trainer.losses[0])

    def test_model_card(self, make, models, tmp_path):
        trainer = make(save_strategy="steps", save_steps=1, ref_model=str(models / "base"))
        trainer.train()
        card = (tmp_path / "out" / "README.md").read_text()
        assert "2602.12125" in card and "@article{yang2026learning" in card and "DeepSeekMath" not in card
        assert "[None]" not in card and f"a fine-tuned version of `{models / 'student'}`" in card
        for line in (
            f"| Student |  | {models / 'student'} |",
            f"| Teacher |  | `{models / 'teacher'}` |",
            f"| Reference |  | `{models / 'base'}` |",
            "| λ |  | 1.25, constant |",
            "| Estimator |  | sampled |",
        ):
            assert line in card

    def test_models_are_attributes(self, make, models):
        trainer = make(ref_model=str(models / "base"))
        assert trainer.teacher_model is trainer.teachers[None].inner.model
        assert trainer.ref_model is trainer.references[None].inner.model
        anchored = make(beta=0.1)  # GRPO's own reference
        assert anchored.ref_model is not anchored.references[None].inner.model
        assert make(gopd_lambda=1.0).ref_model is None

    def test_pad_is_eos(self, make, tokenizer):
        twin = copy.deepcopy(tokenizer)
        twin.pad_token = twin.eos_token
        trainer = make()
        trainer.train()
        other = make()
        other._tokenizer = other.processing_class = twin
        other.train()
        assert torch.equal(trainer.seen["completion_mask"], other.seen["completion_mask"])
        last = other.seen["completion_mask"].sum(1) - 1
        assert (other.seen["completion_ids"].gather(1, last.unsqueeze(1)) == twin.eos_token_id).all()

    def test_missed_hook_raises(self, make, monkeypatch):
        trainer = make()
        trainer.train()
        monkeypatch.setattr(
            "trl.GRPOTrainer._compute_loss", lambda self, model, inputs: inputs["advantages"].sum() * 0
        )
        with pytest.raises(RuntimeError, match="without asking for log-probabilities first.*trl>=1.14"):
            trainer._compute_loss(trainer.model, trainer.seen)


TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools.{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Environment:
    """Gives the last message of each prompt, and a tool."""

    def reset(self, **kwargs):
        return "What is 2 plus 5?"

    def add(self, a: int, b: int) -> int:
        """
        Adds.

        Args:
            a: One number.
            b: Another one.
        """
        return a + b


class Judging(Environment):
    def get_reward(self):
        return 1.0


class TestEnvironment:
    """Which gives prompts and tools, and may give no reward."""

    ROWS = {"prompt": [[{"role": "user", "content": ""}]] * 8}

    @pytest.fixture
    def build(self, make, tokenizer, monkeypatch):
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        monkeypatch.setattr(tokenizer, "chat_template", TOOL_TEMPLATE)
        # Its template is not one that TRL can parse tool calls from; the scripted completions have none.
        monkeypatch.setattr("trl.trainer.grpo_trainer.add_response_schema", lambda tokenizer: tokenizer)
        monkeypatch.setattr("trl.trainer.grpo_trainer.parse_response", lambda *args, **kw: {"role": "assistant"})

        def build(rows, factory, **kwargs):
            return make(
                Recording,
                train_dataset=Dataset.from_dict(rows),
                environment_factory=factory,
                gopd_lambda=1.0,
                **kwargs,
            )

        return build

    def test_without_a_reward(self, build):
        trainer = build(self.ROWS, Environment)
        trainer.train()
        assert not trainer._has_rewards and any(float(g.abs().max()) > 0 for g in trainer.grads.values())

    def test_rows_need_no_prompt(self, build):
        trainer = build({"environment": ["one"] * 8}, {"one": Environment})
        trainer.train()
        assert trainer.state.global_step == 1

    def test_its_reward_needs_a_group(self, build):
        with pytest.raises(ValueError, match="an environment's `get_reward` with `num_generations=1` have no effect"):
            build(self.ROWS, Judging)

    def test_its_reward_alone_is_logged(self, build):
        trainer = build(self.ROWS, Judging, num_generations=2)
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["rewards/Judging/mean"] == log["reward"] == 1.0 and not any("null" in name for name in log)


class TestNothingToLearn:
    def warnings(self, trainer, caplog):
        trainer.train()
        return [record.message for record in caplog.records if "give every sampled token" in record.message]

    def test_teacher_is_the_student(self, make, models, caplog):
        found = self.warnings(make(teacher_model=str(models / "student"), gopd_lambda=1.0, max_steps=2), caplog)
        assert len(found) == 1 and "Student and teacher" in found[0] and "nothing to learn" in found[0]

    def test_reference_is_the_teacher(self, make, models, caplog):
        found = self.warnings(make(ref_model=str(models / "teacher")), caplog)
        assert len(found) == 1 and "Teacher and reference" in found[0] and "λ changes nothing" in found[0]

    def test_most_runs_are_not_warned_of(self, make, models, caplog):
        assert not self.warnings(make(ref_model=str(models / "base")), caplog)


class TestBadInput:
    def test_empty_dataset(self, make):
        with pytest.raises(ValueError, match="`train_dataset` is empty"):
            make(train_dataset=Dataset.from_dict({"prompt": []}))

    def test_no_prompt_column(self, make):
        with pytest.raises(ValueError, match=r"needs a column `prompt`.*it has \['question'\]"):
            make(train_dataset=Dataset.from_dict({"question": ["?"]}))

    def test_evaluation_rows_are_checked_too(self, make):
        with pytest.raises(ValueError, match="`eval_dataset` is empty"):
            make(eval_dataset=Dataset.from_dict({"prompt": []}))

    @pytest.mark.parametrize("column", ["image", "images"])
    def test_images(self, make, column):
        with pytest.raises(ValueError, match=f"has the column `{column}`.*score text only"):
            make(train_dataset=Dataset.from_dict({"prompt": ["?"], column: ["a.png"]}))

    def test_paths_need_not_be_strings(self, make, models):
        trainer = make(model=models / "student", teacher_model=models / "teacher", ref_model=models / "base")
        assert trainer.teachers[None].inner.config.hidden_size == 48 and trainer.references

    def test_grpo_config(self, models, prompts, tmp_path):
        from trl import GRPOConfig

        with pytest.raises(TypeError, match="must be a `GOPDConfig`, got GRPOConfig"):
            GOPDTrainer(
                model=str(models / "student"),
                teacher_model=str(models / "teacher"),
                args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
                train_dataset=prompts,
            )

    def test_adapter_on_the_head(self, make):
        with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
            make(peft_config=LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))


def test_peft_checkpoint_holds_the_adapter_alone(make, tmp_path):
    trainer = make(peft_config=LoraConfig(**LORA), save_strategy="steps", save_steps=1)
    trainer.train()
    config = json.loads((tmp_path / "out" / "checkpoint-1" / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert isinstance(trainer.model, PeftModel)
    assert not (tmp_path / "out" / "checkpoint-1" / "model.safetensors").exists()
