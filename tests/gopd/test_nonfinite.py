"""
Numbers that are not finite never reach an optimizer step.

- One of a frozen model, of the student, of a task reward or in the gradient ends the run with the weights of the last
  good step, and names the model, the row and the remedy.
- With "skip", weights, optimizer and learning rate are bit for bit as if the step had not been there; one bad
  micro-batch is enough for its step; too many skips in a row end the run.
- What is allowed stays allowed: ids that a model does not have, and rewards of functions that have no say.
"""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback

from tests.gopd.harness import Recording, load, logged
from tests.tiny import build_model
from trl_gopd.gopd.checks import check_steps_can_be_skipped
from trl_gopd.gopd.nonfinite import skip_step


class Poisoned(Recording):
    """Scores of the rows `bad_rows` of a role are `value`, in the generation batches `bad_batches`."""

    role, value, bad_rows, bad_batches = "teachers", torch.nan, (1,), (0,)

    def _generate_and_score_completions(self, inputs):
        self.batches = getattr(self, "batches", -1) + 1
        scorer = getattr(self._frozen, self.role)[None]
        is_bad, score = self.batches in self.bad_batches, type(scorer).score

        def poisoned(sequences):
            logps = score(scorer, sequences)
            if is_bad:
                logps[list(self.bad_rows)] = logps[list(self.bad_rows)].masked_fill(
                    sequences.scored[list(self.bad_rows)], self.value
                )
            return logps

        scorer.score = poisoned
        return super()._generate_and_score_completions(inputs)


def poisoned(**attributes):
    return type("Poisoned", (Poisoned,), attributes)


class Steps(TrainerCallback):
    """Keeps copies of everything that an optimizer step changes, before and after each one."""

    def __init__(self):
        self.before, self.after = [], []

    @staticmethod
    def copies(model, optimizer, lr_scheduler):
        state = [optimizer.state_dict(), lr_scheduler.state_dict()]
        return copy.deepcopy([dict(model.named_parameters()), *state, [g["lr"] for g in optimizer.param_groups]])

    def on_step_begin(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        self.before.append(self.copies(model, optimizer, lr_scheduler))

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        self.after.append(self.copies(model, optimizer, lr_scheduler))


def is_same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


ADAMW = {
    "optim": "adamw_torch",
    "weight_decay": 0.1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
}


def is_untouched(trainer, models):
    start = load(models / "student").state_dict()
    return all(torch.equal(start[name], value) for name, value in trainer.model.state_dict().items())


class TestRaise:
    def test_a_nan_in_the_teacher_ends_the_run_before_the_weights_change(self, make, models, tokenizer):
        teacher = load(models / "teacher")
        teacher.get_input_embeddings().weight.data[tokenizer("W")["input_ids"]] = torch.nan  # of every prompt
        trainer = make(teacher_model=teacher)
        with pytest.raises(FloatingPointError, match="log-probability nan"):
            trainer.train()
        assert is_untouched(trainer, models)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.5, -torch.inf])
    def test_names_teacher_row_and_prompt(self, make, models, value):
        trainer = make(poisoned(value=value))
        with pytest.raises(FloatingPointError) as error:
            trainer.train()
        message = str(error.value)
        assert f"`teacher_model` ({models / 'teacher'}) gave the log-probability {value} to token 0" in message
        assert "in row 1 of the generation batch of rank 0, whose prompt is 'What is" in message
        assert "`teacher_model_init_kwargs={'dtype': 'float32'}`" in message and "gopd_nonfinite='skip'" in message

    def test_names_the_reference_by_its_id(self, several, models):
        trainer = several(ref_model={"math": str(models / "student"), "code": load(models / "base")})
        head = trainer.references["code"].head.weight
        head.data[0] = torch.nan
        with pytest.raises(FloatingPointError, match=r"`ref_model\['code'\]` \(LlamaFor.*`ref_model_init_kwargs"):
            trainer.train()

    @pytest.mark.parametrize("estimator", ["full", "stratified"])
    def test_a_nan_in_the_loss_names_the_teacher(self, make, models, estimator):
        trainer = make(gopd_estimator=estimator)
        trainer.teachers[None].head.weight.data[7] = torch.nan
        with pytest.raises(FloatingPointError, match=r"`teacher_model` .* gave the log-probability nan to token 0 "):
            trainer.train()
        assert is_untouched(trainer, models)

    def test_a_nan_of_the_student(self, make, models):
        student = load(models / "student")
        trainer = make(model=student, ref_model=str(models / "student"))
        student.get_output_embeddings().weight.data[7] = torch.nan
        with pytest.raises(
            FloatingPointError, match="The student gave the log-probability nan.*Lower `learning_rate`"
        ):
            trainer.train()

    @pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
    def test_a_gradient_that_overflows(self, make, models, max_grad_norm):
        class Overflowing(Recording):
            def _compute_loss(self, model, inputs):
                return super()._compute_loss(model, inputs) * 1e38

        trainer = make(Overflowing, max_grad_norm=max_grad_norm, max_steps=2)
        with pytest.raises(FloatingPointError, match=r"gradient is (inf|nan). Optimizer step 1 was not taken"):
            trainer.train()
        assert is_untouched(trainer, models)

    def test_evaluation_raises_too(self, make, prompts):
        with pytest.raises(FloatingPointError, match="log-probability nan"):
            make(Poisoned, eval_dataset=prompts).evaluate()

    def test_a_batch_without_any_usable_token(self, make, models, tokenizer, tmp_path):
        build_model(tokenizer, seed=1, vocab_size=270).save_pretrained(tmp_path / "padded")
        trainer = make(model=str(tmp_path / "padded"), ref_model=str(models / "base"))
        trainer._generate_single_turn = lambda ids, *args, **kwargs: ([[265, 266]] * len(ids), None)
        with pytest.raises(FloatingPointError) as error:
            trainer.train()
        message = str(error.value)
        assert message.startswith("None of the 8 tokens of this generation batch can be trained on: 8 are not in the ")
        assert "vocabulary of `teacher_model`" in message and "vocabulary of `ref_model`" in message
        assert "have the same token ids" in message


class TestSkip:
    def test_nothing_moves_and_the_schedule_waits(self, make):
        steps = Steps()
        trainer = make(poisoned(bad_batches=(1,)), gopd_nonfinite="skip", max_steps=4, **ADAMW)
        trainer.add_callback(steps)
        trainer.train()
        moved = [not is_same(a, b) for a, b in zip(steps.before, steps.after, strict=True)]
        assert moved == [True, False, True, True]
        # four steps are planned, and three of them are taken
        assert [lr for *_, (lr, _) in steps.after] == pytest.approx([7.5e-3, 7.5e-3, 5e-3, 2.5e-3], rel=1e-12)
        assert logged(trainer, "gopd/skipped_steps") == [0, 1, 1, 1]
        assert logged(trainer, "gopd/nonfinite_share")[0] > 0 and len(logged(trainer, "gopd/nonfinite_share")) == 1
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())

    def test_one_bad_micro_batch_is_enough(self, make, models):
        trainer = make(
            Poisoned, gopd_nonfinite="skip", per_device_train_batch_size=1, gradient_accumulation_steps=4, **ADAMW
        )
        trainer.train()
        assert is_untouched(trainer, models)
        assert len(trainer.losses) == 4 and sum(loss == loss for loss in trainer.losses) == 3

    @pytest.mark.parametrize("value", [0.5, -torch.inf])
    def test_what_is_finite_or_would_be_masked_is_skipped_too(self, make, models, value):
        trainer = make(poisoned(value=value), gopd_nonfinite="skip", **ADAMW)
        trainer.train()
        assert is_untouched(trainer, models)

    def test_a_gradient_that_overflows(self, make, models, caplog):
        class Overflowing(Recording):
            def _compute_loss(self, model, inputs):
                return super()._compute_loss(model, inputs) * (1e38 if self.state.global_step == 0 else 1)

        steps = Steps()
        trainer = make(Overflowing, gopd_nonfinite="skip", max_steps=2, **ADAMW)
        trainer.add_callback(steps)
        with caplog.at_level(logging.WARNING, "trl_gopd"):
            trainer.train()
        assert is_same(steps.before[0], steps.after[0]) and not is_same(steps.before[1], steps.after[1])
        assert "The norm of the gradient is inf" in caplog.text and "step 1 is left out" in caplog.text

    def test_only_finite_numbers_are_logged(self, make, tmp_path):
        class Overflowing(Recording):
            def _compute_loss(self, model, inputs):
                return super()._compute_loss(model, inputs) * (1e38 if self.state.global_step == 0 else 1.0)

        trainer = make(Overflowing, gopd_nonfinite="skip", max_steps=2, save_strategy="steps", save_steps=2)
        trainer.train()
        text = (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text()
        assert "NaN" not in text and "Infinity" not in text and len(logged(trainer, "grad_norm")) == 1

    def test_the_schedule_of_lambda_does_not_see_it(self, make):
        options = {"gopd_lambda_schedule": "adaptive", "gopd_lambda": 2.0, "gopd_nonfinite": "skip"}
        trainer = make(Poisoned, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
        before = trainer._schedule.state_dict()
        trainer.train()
        assert trainer._schedule.state_dict() == before

    def test_too_many_in_a_row_end_the_run(self, make):
        limits = {"gopd_nonfinite": "skip", "gopd_max_skipped_steps": 2, "max_steps": 9}
        with pytest.raises(
            FloatingPointError, match="2 optimizer steps in a row .* up to step 3.*log-probability nan"
        ):
            make(poisoned(bad_batches=(1, 2)), **limits).train()
        trainer = make(poisoned(bad_batches=(0, 2, 4)), **{**limits, "max_steps": 5})
        trainer.train()
        assert logged(trainer, "gopd/skipped_steps")[-1] == 3


class TestRewards:
    def build(self, make, value, **options):
        def reward(completions, **kwargs):
            return [value, *(1.0 * len(text) for text in completions[1:])]

        return make(reward_funcs=reward, num_generations=2, **options)

    @pytest.mark.parametrize("value", [torch.inf, -torch.inf])
    def test_an_infinite_reward_names_function_and_prompt(self, make, models, value):
        trainer = self.build(make, float(value))
        with pytest.raises(FloatingPointError, match=f"`reward` gave {value} to .* 'What is .*or None where"):
            trainer.train()
        assert is_untouched(trainer, models)

    @pytest.mark.parametrize("scale", ["none", "group"])  # with "group" GRPO makes 0 of every advantage
    def test_it_is_skipped(self, make, models, scale):
        trainer = self.build(make, float("inf"), gopd_nonfinite="skip", scale_rewards=scale)
        trainer.train()
        assert is_untouched(trainer, models)

    @pytest.mark.parametrize("value", [None, float("nan")])
    def test_no_say_is_allowed(self, make, models, value):
        trainer = self.build(make, value)
        trainer.train()
        assert not is_untouched(trainer, models)


class TestWeights:
    """A step can be taken with finite numbers and lead to weights that are not."""

    def test_they_are_not_saved(self, make, tmp_path):
        trainer = make(learning_rate=1e38, lr_scheduler_type="constant", save_strategy="steps", save_steps=1)
        trainer.model.lm_head.weight.register_hook(lambda grad: grad + 100)
        with pytest.raises(FloatingPointError, match="weights of the student, lm_head.weight for one, .* step 1, so"):
            trainer.train()
        assert not list((tmp_path / "out").glob("checkpoint-*/model*"))

    def test_nor_at_the_end(self, make, tmp_path):
        trainer = make()
        with torch.no_grad():
            trainer.model.lm_head.weight[3, 1] = torch.nan
        with pytest.raises(FloatingPointError, match="lm_head.weight for one, are not finite.*Lower `learn"):
            trainer.save_model(str(tmp_path / "last"))
        assert not (tmp_path / "last").exists()

    def test_weights_that_are_not_trained_are_not_looked_at(self, make, tmp_path):
        trainer = make()
        trainer.model.lm_head.weight.requires_grad_(False)
        with torch.no_grad():
            trainer.model.lm_head.weight[3, 1] = torch.inf
        trainer.save_model(str(tmp_path / "last"))
        assert (tmp_path / "last" / "model.safetensors").exists()


def test_ids_outside_the_vocabulary_stay_out_of_the_loss(make, models, tokenizer, tmp_path):
    build_model(tokenizer, seed=1, vocab_size=270).save_pretrained(tmp_path / "padded")
    trainer = make(model=str(tmp_path / "padded"), ref_model=str(models / "base"))
    completions = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *a, **k: ([[265, *c] for c in completions(ids)[0]], None)
    trainer.train()
    assert 0 < logged(trainer, "gopd/outside_vocabulary_share")[0] < 1


class TestSkipStep:
    def test_the_gradient_scaler_forgets_the_step_and_keeps_its_scale(self):
        weight = torch.nn.Parameter(torch.ones(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight], lr=0.1), device_placement=False, scaler=scaler)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        optimizer.gradient_state._set_sync_gradients(True)

        def backward():
            optimizer.optimizer.zero_grad()
            scaler.scale(weight.sum()).backward()
            scaler.unscale_(optimizer.optimizer)

        backward()
        skip_step(optimizer)
        optimizer.step()
        assert optimizer.step_was_skipped and weight.tolist() == [1.0, 1.0] and not optimizer.state_dict()["state"]
        assert scaler.get_scale() == 8.0
        backward()  # which the scaler refuses for one that it has not forgotten
        optimizer.step()
        assert not optimizer.step_was_skipped and weight.tolist() != [1.0, 1.0]
        scheduler.step()


@pytest.mark.parametrize(
    "options",
    [
        {"deepspeed": "zero2.json"},
        {"distributed_state": SimpleNamespace(distributed_type="DEEPSPEED")},
        {"optim": "galore_adamw_layerwise"},
        {"optim": "lomo"},
    ],
)
def test_a_step_inside_the_backward_pass_cannot_be_skipped(options):
    from transformers.training_args import OptimizerNames

    args = {"deepspeed": None, "distributed_state": SimpleNamespace(distributed_type="NO"), "optim": "adamw_torch"}
    args |= options
    args["optim"] = OptimizerNames(args["optim"])
    with pytest.raises(ValueError, match="which takes it inside the backward pass. Use 'raise'"):
        check_steps_can_be_skipped(SimpleNamespace(**args))
