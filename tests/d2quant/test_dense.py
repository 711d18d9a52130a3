"""
Dense models from packed ones: the same function in the same model, also after saving and loading, biases included
where the architecture has a place for them; in one dtype, but for what transformers keeps in float32.
"""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.hf_quantizer import mark_quantized
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model


TOKENS = torch.randint(0, 90, (4, 16), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}


def quantized(family, biased=(), **settings):
    """A packed model, and biases in the linears called one of `biased`, beside those of the settings."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 96, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    for name, linear in model.named_modules():
        if name.endswith(tuple(biased)) and biased:
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features))
    data = {"dataset": TOKENS, "num_samples": 4, "seq_length": 16, "tune_epochs": 0, "iterations": 1}
    quantize_model(model, None, D2QuantConfig(2, 16, **data, **settings))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def shifted():
    """A Llama with the biases of a mean shift. Not to be changed."""
    return quantized("llama", mean_shift=True)


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    return caplog


class TestBiases:
    def test_mean_shift_comes_back(self, shifted, tmp_path, told):
        dense = copy.deepcopy(shifted).dequantize()
        want = logits(dense)
        dense.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (loaded.config.mlp_bias, loaded.config.attention_bias) == (True, False)
        assert loaded.model.layers[0].mlp.gate_proj.bias.abs().max() > 0
        assert not loaded.model.layers[0].mlp.down_proj.bias.any()
        assert torch.equal(logits(loaded), want)
        assert loaded.state_dict().keys() == dense.state_dict().keys()
        assert all(parameter.requires_grad for parameter in dense.parameters())
        assert "bias" not in told.text

    @pytest.mark.parametrize("biased", [("q_proj",), ("o_proj", "down_proj")])
    def test_every_place_is_found(self, biased, tmp_path):
        dense = quantized("llama", biased).dequantize()
        want = logits(dense)
        dense.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert (loaded.config.attention_bias, loaded.config.mlp_bias) == (True, "down_proj" in biased)
        assert torch.equal(logits(loaded), want)

    def test_configuration_of_a_model_without_biases_stays(self, tmp_path):
        model = quantized("llama")
        before = model.config.to_dict()
        dense = model.dequantize()
        before.pop("quantization_config")
        assert dense.config.to_dict() == before

    @pytest.mark.parametrize("family", ["mistral", "qwen2"])
    def test_bias_without_a_place_is_said(self, family, told):
        dense = quantized(family, mean_shift=True).dequantize()
        assert "4 linears of the dense model have a bias, such as `model.layers.0.mlp.gate_proj`" in told.text
        assert dense.model.layers[0].mlp.gate_proj.bias is not None

    def test_under_an_adapter(self, shifted):
        model = get_peft_model(copy.deepcopy(shifted), LoraConfig(r=2, target_modules="all-linear"))
        want = logits(model)
        model.base_model.model.dequantize()
        assert model.base_model.model.config.mlp_bias
        merged = model.merge_and_unload()
        assert not merged.model.layers[0].mlp.down_proj.bias.any()
        # float32 in another order of summation: at most a few dozen roundings in a row
        assert (logits(merged) - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()


class TestDtype:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_is_that_of_all_parameters(self, shifted, dtype):
        dense = copy.deepcopy(shifted).dequantize(dtype=dtype)
        assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
        assert dense.model.rotary_emb.inv_freq.dtype == torch.float32  # as `from_pretrained` has it
        assert dense.config.dtype == dtype

    def test_what_transformers_keeps_in_float32_stays(self, shifted):
        model = copy.deepcopy(shifted)
        model._keep_in_fp32_modules_strict = {"input_layernorm"}
        dense = model.dequantize(dtype=torch.bfloat16)
        kept = {name for name, parameter in dense.named_parameters() if parameter.dtype == torch.float32}
        assert kept == {f"model.layers.{index}.input_layernorm.weight" for index in range(2)}

    def test_adapters_keep_theirs(self, shifted):
        model = get_peft_model(copy.deepcopy(shifted), LoraConfig(r=2, target_modules="all-linear"))
        model.base_model.model.dequantize(dtype=torch.bfloat16)
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
        assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


class TestCasting:
    """`.to(dtype)` casts what is not packed, and leaves the scales, without which codes mean nothing, as they are."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_scales_stay(self, shifted, dtype):
        model = copy.deepcopy(shifted).to(dtype)
        linears = [module for module in model.modules() if isinstance(module, D2QuantLinear)]
        originals = [module for module in shifted.modules() if isinstance(module, D2QuantLinear)]
        assert len(linears) == 15  # the head, too
        for linear, original in zip(linears, originals, strict=True):
            assert linear.weight_scale.dtype == torch.float16
            assert torch.equal(linear.weight_scale, original.weight_scale)
            assert linear.bias is None or linear.bias.dtype == dtype
        assert model.model.norm.weight.dtype == dtype
        assert logits(model).dtype == dtype
        mark_quantized(model, model.config.quantization_config)

    @pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
    def test_layers_are_cast_alike(self, cast):
        linear = D2QuantLinear(32, 16, bits=2, group_size=16, bias=True, input_scale=True, scale_dtype=torch.float32)
        linear.weight_scale.data.fill_(0.1)
        assert getattr(linear, cast)() is linear
        assert {linear.weight_scale.dtype, linear.input_scale.dtype} == {torch.float32}
        assert (linear.weight_scale == torch.tensor(0.1)).all()
        assert linear.bias.dtype == getattr(torch, cast)
        assert (linear.weight.dtype, linear.weight_zero_point.dtype) == (torch.int32, torch.int32)

    def test_gradient_of_scales_stays(self):
        linear = D2QuantLinear(32, 16, bits=2, group_size=16)
        linear.weight_scale.requires_grad_(True).grad = torch.full_like(linear.weight_scale, 0.1)
        linear.to(torch.bfloat16)
        assert linear.weight_scale.requires_grad
        assert linear.weight_scale.grad.dtype == torch.float16

    def test_device_moves_all(self):
        linear = D2QuantLinear(32, 16, bits=2, group_size=16, bias=True).to("meta", torch.bfloat16)
        assert all(parameter.is_meta for parameter in linear.parameters())
        assert (linear.weight_scale.dtype, linear.bias.dtype) == (torch.float16, torch.bfloat16)
        linear.to_empty(device="cpu")
        assert {parameter.device.type for parameter in linear.parameters()} == {"cpu"}
