"""
What each step forwards: nothing is computed to be thrown away, and mixtures of experts keep their auxiliary loss with
every estimator.
"""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.gopd.harness import Recording


ESTIMATORS = ["sampled", "full", "stratified"]


def rows_forwarded(trainer):
    """Rows that the backbones of student, teacher and reference forward in a run."""
    counts = [0, 0, 0]

    def counter(number):
        def count(module, args, output):
            counts[number] += len(output.last_hidden_state)

        return count

    frozen = [scorer.inner.base for scorer in (*trainer.teachers.values(), *trainer.references.values())]
    for number, model in enumerate([trainer._student_base, *frozen]):
        model.base_model.register_forward_hook(counter(number))
    trainer.train()
    return tuple(counts)


class TestNothingIsThrownAway:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_logged_completions_cost_no_forward(self, make, models, estimator):
        options = {"ref_model": str(models / "base"), "gopd_estimator": estimator, "logging_steps": 2, "max_steps": 4}
        plain = rows_forwarded(make(**options))
        assert rows_forwarded(make(log_completions=True, **options)) == plain == (16, 16, 16)

    def test_full_needs_no_older_policy(self, make):
        trainer = make(gopd_estimator="full", num_iterations=2, max_steps=4, gopd_lambda=1.0)
        assert rows_forwarded(trainer) == (16, 16, 0)

    def test_sampled_needs_it(self, make):
        trainer = make(num_iterations=2, max_steps=4, gopd_lambda=1.0)
        assert rows_forwarded(trainer) == (16 + 8, 8, 0)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_rows_at_lambda_one_meet_no_reference(self, make, models, prompts, estimator):
        """Six of sixteen rows extrapolate; the loss is that of a run in which the reference sees all rows."""
        lambdas = [1.5 if i % 3 == 1 else 1.0 for i in range(14)] + [1.0, 1.5]
        options = {
            "ref_model": str(models / "base"),
            "gopd_estimator": estimator,
            "max_steps": 4,
            "train_dataset": prompts.add_column("lambda", lambdas),
        }
        trainer = make(**options)
        assert rows_forwarded(trainer) == (16, 16, 6)
        everywhere = make(**options)
        object.__setattr__(everywhere._estimator, "mixes_lambda", False)
        assert rows_forwarded(everywhere) == (16, 16, 16)
        # the rows of a forward change its rounding: a few dozen roundings of log-probabilities below 16
        assert trainer.losses == pytest.approx(everywhere.losses, abs=64 * 16 * torch.finfo(torch.float32).eps)


FAMILIES = {"mixtral": (MixtralForCausalLM, MixtralConfig), "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig)}


def build_experts(family, tokenizer, seed):
    torch.manual_seed(seed)
    model_class, config_class = FAMILIES[family]
    names = {"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 32}
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **names,
    )
    return model_class(config).eval()


class TestExperts:
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_auxiliary_loss_is_the_family_s_own(self, make, tokenizer, family, estimator):
        """It adds its coefficient times the load-balancing loss that the model itself computes for the batch."""

        class Kept(Recording):
            def _compute_loss(self, model, inputs):
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
                mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
                with torch.no_grad():
                    self.own = self._student_base(input_ids=ids, attention_mask=mask, output_router_logits=True)
                return super()._compute_loss(model, inputs)

        losses, own = [], []
        for coefficient in (0.0, 0.5):
            trainer = make(
                Kept,
                model=build_experts(family, tokenizer, 0),
                teacher_model=build_experts(family, tokenizer, 1),
                gopd_estimator=estimator,
                router_aux_loss_coef=coefficient,
            )
            trainer.train()
            losses += trainer.losses
            own.append(trainer.own.aux_loss.item())
            router = [g for name, g in trainer.grads.items() if "gate.weight" in name or "router" in name]
            assert router and all(g.isfinite().all() for g in router)
        assert own[0] == own[1] > 0.5
        assert losses[1] - losses[0] == pytest.approx(0.5 * own[1], rel=1e-5)
