"""What a trainer refuses before it samples anything, and what it refuses in a batch before anything is scored."""

import copy

import pytest
import torch

from tests.gopd.test_head import build, changed
from trl_gopd.gopd.checks import check_student
from trl_gopd.gopd.config import GOPDConfig


def student(family, **options):
    from trl.trainer.utils import add_fused_lm_head

    model = build(family, torch.bfloat16)
    add_fused_lm_head(model, **options)
    return model


class TestStudent:
    @pytest.fixture
    def args(self, tmp_path):
        return lambda **options: GOPDConfig(str(tmp_path), use_cpu=True, bf16=False, **options)

    @pytest.mark.parametrize("estimator", ["sampled", "full", "stratified"])
    @pytest.mark.parametrize("family", ["llama", "cohere", "gemma2"])
    def test_families(self, args, family, estimator):
        check_student(student(family, temperature=0.7), args(gopd_estimator=estimator, temperature=0.7))

    @pytest.mark.parametrize("estimator", ["full", "stratified"])
    def test_refuses_a_head_that_cannot_be_applied_in_chunks(self, args, estimator):
        model = student("llama")
        with pytest.raises(ValueError, match=r"logits of `model` \(LlamaForCausalLM\).*1\.3 times"):
            check_student(changed(model, lambda logits: 1.3 * logits), args(gopd_estimator=estimator))

    def test_a_family_that_trl_does_not_know(self, args):
        """TRL's forward of the student leaves out the soft cap of RecurrentGemma, which ours has."""
        check_student(student("recurrent_gemma"), args(gopd_estimator="full"))
        with pytest.raises(ValueError, match="TRL computes other log-probabilities.*Use `gopd_estimator='full'`"):
            check_student(student("recurrent_gemma"), args())

    def test_leaves_the_student_as_it_was(self, args):
        model = student("llama").train()
        model.model.layers[0].eval()
        before = copy.deepcopy(model.state_dict())
        check_student(model, args(gopd_estimator="stratified"))
        assert model.training and not model.model.layers[0].training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
