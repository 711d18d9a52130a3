"""Laws of the tuning: it lowers what it says it lowers, moves what is free to move, and leaves all else as it was."""

import copy

import pytest
import torch

from tests.tiny import build_model
from trl_gopd.d2quant import tuning
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.evaluation import compare


TOKENS = torch.randint(0, 200, (8, 32), generator=torch.Generator().manual_seed(0))


def quantize(tokenizer, *, dtype=torch.float32, **settings):
    model = build_model(tokenizer, seed=1).to(dtype)
    settings = {"bits": 2, "group_size": 16, "dataset": TOKENS, "num_samples": 8, "seq_length": 32} | settings
    settings = {"tune_epochs": 0, "tune_learning_rate": 5e-3} | settings
    return model, quantize_model(model, None, D2QuantConfig(**settings))


def tensors(model, kind):
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(kind)}


class TestTune:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lowers_the_divergence_from_the_original(self, tokenizer, dtype):
        original = build_model(tokenizer, seed=1).to(dtype)
        before = compare(quantize(tokenizer, dtype=dtype)[0], original, TOKENS).kl
        tuned, report = quantize(tokenizer, dtype=dtype, tune_epochs=6, tune_learning_rate=1e-2)
        assert report.tuning_kl == sorted(report.tuning_kl, reverse=True)
        assert compare(tuned, original, TOKENS).kl < 0.85 * before

    def test_first_loss_is_the_divergence_of_the_rounded_model(self, tokenizer):
        original, (rounded, _) = build_model(tokenizer, seed=1), quantize(tokenizer)
        # A step so small that the model stays what it is: the mean over windows is KL over all but one position …
        _, report = quantize(tokenizer, tune_epochs=1, tune_learning_rate=1e-12)
        with torch.no_grad():
            log_p, log_q = (m(TOKENS).logits.log_softmax(-1) for m in (original, rounded))
        # … the tuning takes all of them, the last one too.
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert report.tuning_kl[0] == pytest.approx(float(expected), rel=1e-4)

    def test_moves_scales_norms_and_biases_only(self, tokenizer):
        rounded, _ = quantize(tokenizer, mean_shift=True)
        tuned, _ = quantize(tokenizer, mean_shift=True, tune_epochs=2)
        moved = {
            name for name, value in tuned.state_dict().items() if not torch.equal(value, rounded.state_dict()[name])
        }
        scales = {name for name in tensors(rounded, "weight_scale") if "layers" in name}  # not of embedding and head
        norms = {name for name in rounded.state_dict() if "layernorm" in name}
        biases = set(tensors(rounded, "bias"))
        assert len(biases) == 4
        assert moved == scales | norms | biases

    def test_chunks_of_tokens_change_nothing(self, tokenizer, monkeypatch):
        whole, report = quantize(tokenizer, tune_epochs=1)
        monkeypatch.setattr(tuning, "tokens_per_chunk", lambda vocab_size, device: 5)
        chunked, chunked_report = quantize(tokenizer, tune_epochs=1)
        assert chunked_report.tuning_kl == pytest.approx(report.tuning_kl, rel=1e-4)

    def test_same_seed_same_bytes(self, tokenizer):
        first, second = (quantize(tokenizer, tune_epochs=2)[0].state_dict() for _ in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    def test_dtypes_and_gradients_are_given_back_after_an_error(self, tokenizer, monkeypatch):
        model = build_model(tokenizer, seed=1)
        before = {name: p.requires_grad for name, p in model.named_parameters() if "norm" in name}  # others are packed
        monkeypatch.setattr(tuning, "_backward", lambda *a: 1 / 0)
        settings = {"bits": 2, "group_size": 16, "dataset": TOKENS, "num_samples": 8, "seq_length": 32}
        with pytest.raises(ZeroDivisionError):
            quantize_model(model, None, D2QuantConfig(**settings, tune_epochs=1))
        linears = [module for module in model.modules() if isinstance(module, D2QuantLinear)]
        assert {module.weight_scale.dtype for module in linears} == {torch.float16}
        after = {name: p.requires_grad for name, p in model.named_parameters()}
        assert after == {name: before.get(name, False) for name in after}
        copy.deepcopy(model)  # no graph is left in it
