"""The benchmark of packed layers and models: what it runs, its sums, and the pages it writes. No time is asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import d2quant_speed, d2quant_speed_models
from benchmarks.d2quant_speed import BASELINE
from trl_gopd.d2quant.kernels import native
from trl_gopd.d2quant.linear import D2QuantLinear


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_writes_all_that_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(d2quant_speed, "CACHED", 1)
    monkeypatch.setattr(d2quant_speed, "bandwidth", lambda threads: 1e9)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(d2quant_speed.importlib.util, "find_spec", lambda name: None)
    used = []
    products = native.products

    def recorded(x, packed, bias):
        used.append((x.dtype, native.Settings.activation_bits))
        return products(x, packed, bias)

    monkeypatch.setattr(native, "products", recorded)
    page = tmp_path / "page.md"
    page.write_text("head\n{}old\n{}tail\n".format(*d2quant_speed.MARKS))
    arguments = "--shapes 64x32 --rows 1 2 --bits 2 --threads 1 --repeats 1 --json".split()
    d2quant_speed.main([*arguments, str(tmp_path / "speed.json"), "--page", str(page)])
    report = json.loads((tmp_path / "speed.json").read_text())
    names = [row["contestant"] for row in report["summary"]]
    kinds = ["float32", "bfloat16", "rounded", "torch alone"]
    assert names == 2 * ["dense float32", BASELINE, *(f"2 bits, {kind}" for kind in kinds)]
    # Two numbers of rows, two rounds, two calls in each.
    assert all(used.count(kind) == 8 for kind in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 8)))
    assert native.Settings.enabled and native.Settings.activation_bits is None
    begin, end = d2quant_speed.MARKS
    assert page.read_text() == f"head\n{begin}{d2quant_speed.section(report)}{end}tail\n"


def test_ratios_are_those_of_the_same_round():
    shared = {"shape": "8x8", "threads": 1, "rows": 1}
    results = [
        shared | {"contestant": BASELINE, "bytes": 2e6, "seconds": [0.004, 0.008, 0.004]},
        shared | {"contestant": "2 bits, float32", "bytes": 1e6, "seconds": [0.002, 0.002, 0.004]},
    ]
    base, packed = d2quant_speed.summarize(results, {"1": 1e9})
    assert base["times"]["median"] == 1 and packed["times"] == {"median": 2, "min": 1, "max": 4}
    # Reading a million bytes takes a millisecond, of the four that the baseline takes.
    assert packed["bound"] == 4 and packed["milliseconds"]["median"] == 2
    *head, line = d2quant_speed.table([base, packed], 2).splitlines()
    assert head[0] == f"| layer | threads | rows | {BASELINE}, ms | float32 | DRAM bound |" and len(head) == 2
    assert line == "| 8x8 | 1 | 1 | 4.00 | 2.00 | 4.0 |"


def test_codes_are_those_of_the_nearest_numbers(generator):
    weight = torch.randn(3, 128, generator=generator)
    quantized = d2quant_speed_models.rounded(weight, 4)
    step = quantized.scales[0].repeat_interleave(64, 1)
    # Half a step from rounding the number, and half of one from rounding the zero point, at the ends of the range.
    assert ((quantized.dequantize() - weight).abs() <= step * (1 + 1e-5)).all()


@pytest.fixture
def tiny(monkeypatch):
    """A model in place of those that are measured."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(d2quant_speed_models, "smollm2", lambda: model)
    monkeypatch.setattr(d2quant_speed_models, "NEW", 2)
    monkeypatch.setattr(
        d2quant_speed_models, "MODELS", {"smollm2": ((2,), d2quant_speed_models.MODELS["smollm2"][1], 2)}
    )
    return model


@pytest.mark.parametrize("is_random", [True, False])
def test_packed_model_shares_what_is_dense(is_random, tiny):
    packed = d2quant_speed_models.packed(tiny, 2, is_random=is_random)
    linears = [each for each in packed.model.layers.modules() if isinstance(each, torch.nn.Linear)]
    assert len(linears) == 14 and all(isinstance(each, D2QuantLinear) for each in linears)
    assert packed.lm_head.weight is tiny.lm_head.weight and packed.model.norm.weight is tiny.model.norm.weight
    assert not any(isinstance(each, D2QuantLinear) for each in tiny.modules())


def test_models_take_turns(tiny, monkeypatch):
    used = []
    decoder = d2quant_speed_models.decoder

    def recorded(model, *, is_rounded=False):
        generate, number = decoder(model, is_rounded=is_rounded), len(used)
        used.append(0)
        return lambda: (used.__setitem__(number, used[number] + 1), generate())

    monkeypatch.setattr(d2quant_speed_models, "decoder", recorded)
    results = d2quant_speed_models.measure("smollm2", [1])
    assert used == [3] * 5  # rounds
    names = ["dense float32", "2 bits, float32", BASELINE, "2 bits, bfloat16", "2 bits, rounded"]
    assert [row["contestant"] for row in results] == names
    assert all(len(row["tokens_a_second"]) == 2 for row in results)
    text = d2quant_speed_models.section({"results": results, "perplexities": [{"bits": None, "perplexity": 30}]})
    assert "| dense bfloat16 | " in text and "| full precision | 30.00 |  |" in text


@pytest.mark.parametrize("module", [d2quant_speed, d2quant_speed_models])
def test_documented_table_is_the_committed_result(module):
    name = module.__name__.split(".")[-1]
    report = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    begin, end = module.MARKS
    assert f"{begin}{module.section(report)}{end}" in (DOCS / "d2quant.md").read_text(encoding="utf-8")
