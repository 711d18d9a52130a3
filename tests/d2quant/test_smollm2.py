"""The quantizer on a real model, as a user runs it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_gopd import D2QuantConfig, quantize_model
from trl_gopd.d2quant.calibration import embedded_text, token_windows
from trl_gopd.demo.smollm2 import smollm2_path
from trl_gopd.evaluation import compare, storage


pytestmark = pytest.mark.slow


def test_packed_folder_is_small_and_computes_the_same(tmp_path):
    config = D2QuantConfig(bits=2, group_size=64, num_samples=4, tune_epochs=0)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path(), quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reloaded(ids).logits)
    generated = reloaded.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=8, do_sample=False))

    size = storage(reloaded, tmp_path)
    assert size.block_bits_per_weight == 2 + (16 + 2) / 64
    stated = (size.quantized_weights + size.parameters_left) * size.bits_per_weight / 8
    assert stated < size.file_bytes <= 65e6 and reloaded.get_memory_footprint() <= 65e6
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1.1 * stated


def test_each_step_comes_closer_to_the_original():
    original = AutoModelForCausalLM.from_pretrained(smollm2_path(), num_hidden_layers=3)
    windows = token_windows(embedded_text("evaluation"), smollm2_path(), 512)[:4]
    divergences = []
    for settings in ({"rounding": "rtn", "clip": False, "iterations": 0, "tune_epochs": 0}, {"tune_epochs": 0}, {}):
        model = AutoModelForCausalLM.from_pretrained(smollm2_path(), num_hidden_layers=3)
        quantize_model(model, smollm2_path(), D2QuantConfig(bits=2, num_samples=8, **settings))
        divergences.append(compare(model, original, windows).kl)
    assert divergences == sorted(divergences, reverse=True)
