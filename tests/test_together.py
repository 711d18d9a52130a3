"""The two methods together: quantized models as student (under an adapter), teacher and reference of `GOPDTrainer`."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.tiny import scripted_completions
from trl_gopd import D2QuantConfig, GOPDConfig, GOPDTrainer, quantize_model
from trl_gopd.d2quant.linear import D2QuantLinear


TOKENS = torch.randint(0, 200, (4, 32), generator=torch.Generator().manual_seed(0))


class ScriptedTrainer(GOPDTrainer):
    """Completions depend on the prompt and the step alone."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return scripted_completions(self._tokenizer, prompt_ids, step=self.state.global_step, max_length=9), None


@pytest.fixture
def quantized(models, tmp_path):
    """Folder of a quantized copy of a model."""

    def build(name):
        config = D2QuantConfig(
            bits=3, group_size=16, mean_shift=True, dataset=TOKENS, num_samples=4, seq_length=32, tune_epochs=1
        )
        model = AutoModelForCausalLM.from_pretrained(models / name, quantization_config=config)
        model.save_pretrained(tmp_path / f"{name}-3bit")
        return str(tmp_path / f"{name}-3bit")

    return build


@pytest.fixture
def train(tmp_path, prompts, tokenizer):
    def run(model, *, estimator="sampled", peft_config=None, bf16=False, **arguments):
        args = GOPDConfig(
            output_dir=str(tmp_path / "out"),
            gopd_lambda=1.5,
            gopd_estimator=estimator,
            per_device_train_batch_size=4,
            max_completion_length=10,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=bf16,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = ScriptedTrainer(
            model=model,
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
            peft_config=peft_config,
            **arguments,
        )
        trainer.train()
        return trainer

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_frozen_models_score_as_their_dense_twins(quantized, train, models, estimator):
    teacher, reference = quantized("teacher"), quantized("base")
    packed = train(str(models / "student"), estimator=estimator, teacher_model=teacher, ref_model=reference)
    dense = train(
        str(models / "student"),
        estimator=estimator,
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher).dequantize(),
        ref_model=AutoModelForCausalLM.from_pretrained(reference).dequantize(),
    )
    assert losses(packed) == pytest.approx(losses(dense), rel=1e-3)
    for ours, theirs in zip(packed.model.parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("estimator", ["sampled", "full", "stratified"])
@pytest.mark.parametrize("bf16", [False, True])
def test_packed_student_learns_as_its_dense_twin(quantized, train, models, estimator, bf16):
    """Its head is packed, too, and losses are computed from a dense copy of it."""
    folder, losses_of = quantized("student"), []
    for student in (folder, AutoModelForCausalLM.from_pretrained(folder).dequantize()):
        peft_config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        trainer = train(
            student, estimator=estimator, teacher_model=str(models / "teacher"), peft_config=peft_config, bf16=bf16
        )
        losses_of.append(losses(trainer))
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder).lm_head, D2QuantLinear)
    # products of a packed weight are summed in another order; bfloat16 rounds each of them
    assert losses_of[0] == pytest.approx(losses_of[1], rel=3e-2 if bf16 else 1e-3)


def test_student_whose_head_cannot_be_made_dense_is_refused(models, train):
    """Its packed words would be multiplied as if they were weights."""

    class Quantized(torch.nn.Linear):
        def __init__(self, linear):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.bias, self.inner = 32, linear.out_features, None, linear
            self.weight = torch.nn.Parameter(torch.zeros(8, 32, dtype=torch.uint8), requires_grad=False)

        def forward(self, hidden):
            return self.inner(hidden)

    student = AutoModelForCausalLM.from_pretrained(models / "student")
    student.lm_head = Quantized(student.lm_head)
    with pytest.raises(ValueError, match="output head is a quantized Quantized, .* name 'lm_head' in `modules_to_not"):
        train(student, teacher_model=str(models / "teacher"))


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_adapter_on_a_packed_student_learns_alone(quantized, train, models, estimator):
    folder = quantized("student")
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = train(folder, estimator=estimator, teacher_model=str(models / "teacher"), peft_config=peft_config)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = trainer.model.state_dict()
    packed = {name: value for name, value in after.items() if name.endswith((".weight_scale", ".base_layer.weight"))}
    assert len(packed) == 2 * 14 + 2  # scales and words of linears, and the scales of embedding and head
    for name, value in packed.items():
        original = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(value, before[original])
    assert all(value.abs().sum() > 0 for name, value in after.items() if "lora_B" in name)


def test_quantized_in_memory_is_a_teacher(train, models):
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    settings = {"bits": 2, "group_size": 16, "dataset": TOKENS, "num_samples": 4, "seq_length": 32, "tune_epochs": 0}
    quantize_model(teacher, None, D2QuantConfig(**settings))
    trainer = train(str(models / "student"), teacher_model=teacher)
    assert len(losses(trainer)) == 2
