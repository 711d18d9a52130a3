"""Laws of the refinement: it lowers what it says it lowers, moves what it may, and leaves all else as it was."""

import copy

import pytest
import torch

from tests.tiny import build_model
from trl_gopd.d2quant import refine
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.packing import pack
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.d2quant.refine import TrainedLinear
from trl_gopd.evaluation import compare


TOKENS = torch.randint(0, 200, (8, 32), generator=torch.Generator().manual_seed(0))


def quantize(tokenizer, *, dtype=torch.float32, **settings):
    model = build_model(tokenizer, seed=1).to(dtype)
    settings = {"bits": 2, "group_size": 16, "dataset": TOKENS, "num_samples": 8, "seq_length": 32} | settings
    settings = {"tune_epochs": 0, "tune_learning_rate": 5e-3, "tune_codes": 0.0} | settings
    return model, quantize_model(model, None, D2QuantConfig(**settings))


def tensors(model, kind):
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(kind)}


@pytest.fixture
def one_held_out(monkeypatch):
    """One of the eight windows is held out. By default, so few are all trained on."""
    monkeypatch.setattr(refine, "HELD_OUT_SHARE", 8)


class TestRefine:
    @pytest.mark.parametrize("codes", [0.0, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lowers_the_divergence_from_the_original(self, tokenizer, dtype, codes):
        original = build_model(tokenizer, seed=1).to(dtype)
        before = compare(quantize(tokenizer, dtype=dtype)[0], original, TOKENS).kl
        settings = {"tune_epochs": 6, "tune_learning_rate": 1e-2, "tune_codes": codes}
        tuned, report = quantize(tokenizer, dtype=dtype, **settings)
        assert report.refinement.held_out[-1] < 0.85 * report.refinement.held_out[0]
        assert compare(tuned, original, TOKENS).kl < 0.85 * before

    def test_codes_lower_it_further(self, tokenizer):
        losses, changed = [], []
        for codes in (0.0, 0.5):
            report = quantize(tokenizer, tune_epochs=6, tune_codes=codes)[1].refinement
            losses.append(min(report.held_out))
            changed.append(report.changed_codes)
        assert losses[1] < losses[0]
        assert changed[0] == 0 < changed[1] < 0.5

    @pytest.mark.usefixtures("one_held_out")
    @pytest.mark.parametrize("codes", [0.0, 1e-9])
    def test_losses_are_the_divergence_of_the_rounded_model(self, tokenizer, codes):
        original, (rounded, _) = build_model(tokenizer, seed=1), quantize(tokenizer)
        # Steps so small that the model stays what it is: the losses of the windows trained on and of those held out …
        _, report = quantize(tokenizer, tune_epochs=1, tune_learning_rate=1e-12, tune_codes=codes)
        with torch.no_grad():
            log_p, log_q = (m(TOKENS).logits.log_softmax(-1) for m in (original, rounded))
        # … are the mean over all positions, the last one too.
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        trained, (before, after) = report.refinement.training[0], report.refinement.held_out
        # The products are in bfloat16 where the machine has instructions for it: 8 bits, in a mean over 256 tokens.
        assert (7 * trained + before) / 8 == pytest.approx(float(expected), rel=1e-2)
        assert after == pytest.approx(before, rel=1e-5)

    @pytest.mark.parametrize("codes", [0.0, 1.0])
    def test_moves_what_it_may_only(self, tokenizer, codes):
        rounded, _ = quantize(tokenizer, mean_shift=True)
        tuned, _ = quantize(tokenizer, mean_shift=True, tune_epochs=4, tune_codes=codes)
        moved = {
            name for name, value in tuned.state_dict().items() if not torch.equal(value, rounded.state_dict()[name])
        }
        scales = {name for name in tensors(rounded, "weight_scale") if "layers" in name}  # not of embedding and head
        norms = {name for name in rounded.state_dict() if "layernorm" in name}
        biases = set(tensors(rounded, "bias"))
        words = {name.removesuffix("_scale") for name in scales}
        assert len(biases) == 4
        assert moved - words == scales | norms | biases
        assert bool(moved & words) == (codes > 0)

    @pytest.mark.usefixtures("one_held_out")
    @pytest.mark.parametrize("settings", [{"tune_learning_rate": 3.0}, {"tune_codes": 16.0}, {"bits": 8}])
    def test_keeps_the_model_where_training_makes_it_worse(self, tokenizer, settings):
        settings = {"mean_shift": True} | settings
        rounded, _ = quantize(tokenizer, **settings)
        tuned, report = quantize(tokenizer, **settings, tune_epochs=2)
        held_out = report.refinement.held_out
        if settings.get("bits") != 8:
            assert held_out[0] < min(held_out[1:])
        if held_out[0] == min(held_out):
            assert report.refinement.changed_codes == 0
            assert all(torch.equal(value, rounded.state_dict()[name]) for name, value in tuned.state_dict().items())
        original = build_model(tokenizer, seed=1)
        assert compare(tuned, original, TOKENS).kl < 1.05 * compare(rounded, original, TOKENS).kl

    def test_chunks_of_tokens_change_nothing(self, tokenizer, monkeypatch):
        whole, report = quantize(tokenizer, tune_epochs=1)
        monkeypatch.setattr(refine, "tokens_per_chunk", lambda vocab_size, device: 5)
        chunked, chunked_report = quantize(tokenizer, tune_epochs=1)
        assert chunked_report.refinement.training == pytest.approx(report.refinement.training, rel=1e-4)

    def test_same_seed_same_bytes(self, tokenizer):
        first, second = (quantize(tokenizer, tune_epochs=2)[0].state_dict() for _ in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    def test_dtypes_and_gradients_are_given_back_after_an_error(self, tokenizer, monkeypatch):
        model = build_model(tokenizer, seed=1)
        before = {name: p.requires_grad for name, p in model.named_parameters() if "proj" not in name}
        monkeypatch.setattr(refine, "_backward", lambda *a: 1 / 0)
        settings = {"bits": 2, "group_size": 16, "dataset": TOKENS, "num_samples": 8, "seq_length": 32}
        with pytest.raises(ZeroDivisionError):
            quantize_model(model, None, D2QuantConfig(**settings, tune_epochs=1))
        linears = [module for module in model.modules() if isinstance(module, D2QuantLinear)]
        assert {module.weight_scale.dtype for module in linears} == {torch.float16}
        after = {name: p.requires_grad for name, p in model.named_parameters()}
        assert after == {name: before.get(name, False) for name in after}
        copy.deepcopy(model)  # no graph is left in it


def linear(grid="affine", bits=2, *, in_features=40, negative=False):
    """A packed linear with 24 outputs and groups of 16 columns, the last one shorter."""
    chance = torch.Generator().manual_seed(0)
    packed = D2QuantLinear(in_features, 24, bits=bits, group_size=16, grid=grid, bias=True, scale_dtype=torch.float32)
    codes = torch.randint(0, 2**bits, (in_features, 24), generator=chance, dtype=torch.uint8)
    packed.weight.data = pack(codes, bits)
    packed.weight_scale.data = torch.rand(packed.weight_scale.shape, generator=chance) + 0.5
    if negative:
        packed.weight_scale.data[0] *= -1
    if grid == "affine":
        zeros = torch.randint(0, 2**bits, (24, packed.weight_scale.shape[0]), generator=chance, dtype=torch.uint8)
        packed.weight_zero_point.data = pack(zeros, bits).T.contiguous()
    packed.bias.data = torch.randn(24, generator=chance)
    return packed


@pytest.mark.parametrize(("grid", "bits"), [("affine", 2), ("affine", 3), ("affine", 8), ("midrise", 4)])
class TestTrainedLinear:
    def test_output_and_gradients_are_those_of_the_packed_linear(self, grid, bits):
        x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
        found = []
        for module in (linear(grid, bits), TrainedLinear(linear(grid, bits))):
            packed = module.packed if isinstance(module, TrainedLinear) else module
            packed.weight_scale.requires_grad_(True)
            packed.bias.requires_grad_(True)
            inputs = x.clone().requires_grad_(True)
            output = module(inputs)
            output.square().sum().backward()
            found.append((output, inputs.grad, packed.weight_scale.grad, packed.bias.grad))
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def test_latents_step_against_the_gradient_of_their_weight(self, grid, bits):
        module = TrainedLinear(linear(grid, bits, negative=True))
        packed = module.packed
        packed.weight_scale.requires_grad_(True)
        module.step_size = 0.25
        x, slope = torch.randn(7, 40), torch.randn(7, 24)
        (module(x) * slope).sum().backward()
        group = torch.arange(40) // 16
        gradient = (slope.T @ x) * packed.weight_scale.detach().T[:, group]
        codes = module.codes.float()
        expected = (codes - 0.25 * gradient.sign()).clamp(-0.49, 2**bits - 0.51) - codes
        torch.testing.assert_close(module.moved.float(), expected, rtol=0, atol=1e-3)  # float16 between ¼ and ½

    def test_codes_follow_their_latents_and_stay_in_range(self, grid, bits):
        module = TrainedLinear(linear(grid, bits))
        codes = module.codes.float()
        gradient = torch.randn(24, 40)
        module.step_size = 0.3
        for steps, reached in ((1, 0), (2, 1), (3, 1), (4, 1), (5, 2)):  # 0.3, 0.6, 0.9, 1.2, 1.5 codes
            module.step(gradient.clone(), torch.ones(24, 3))
            moved = (codes - reached * gradient.sign()).clamp(0, 2**bits - 1)
            if steps < 5:  # the fifth is a tie
                assert torch.equal(module.current(), moved)
        assert module.current().min() >= 0 and module.current().max() < 2**bits
        module.set_codes(module.repack())
        assert (module.moved == 0).all() and torch.equal(module.current(), module.codes.float())
