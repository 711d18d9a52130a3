"""Laws of the plan: no weight is loaded for it, and what it says is what a run allocates and stores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig

from tests.memory import peak_bytes
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.plan import plan
from trl_gopd.d2quant.quantize import quantize_model


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "bos_token_id": None,
    "eos_token_id": None,
}
LARGE = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=4,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype=torch.bfloat16,
)


def config(samples=8, length=32, **settings):
    tokens = torch.randint(0, 500, (samples, length), generator=torch.Generator().manual_seed(0))
    small = {"bits": 2, "group_size": 32, "iterations": 1, "clip": False, "tune_epochs": 0}
    return D2QuantConfig(**{**small, "dataset": tokens, "num_samples": samples, "seq_length": length, **settings})


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()


def phase(made, name):
    return next(phase for phase in made.phases if phase.name == name)


class TestAgainstRuns:
    @pytest.mark.parametrize(
        ("dtype", "settings"),
        [
            (torch.float32, {}),
            (torch.bfloat16, {}),
            (torch.float32, {"samples": 32}),  # the inputs of all windows are the largest tensors
            (torch.float32, {"rounding": "gptq"}),
            (torch.float32, {"rounding": "rtn", "rotation": "full"}),
            (torch.float32, {"mean_shift": True, "tune_epochs": 1}),
        ],
    )
    def test_memory_is_what_torch_allocates(self, dtype, settings):
        model, own = build(dtype), config(**settings)
        dense = [parameter.data for parameter in model.parameters()]  # which mapped files would hold
        made = plan(model, own)
        peak = peak_bytes(lambda: quantize_model(model, None, own))
        # Here weights are in memory, and rotated there, while those of mapped files would be copied.
        planned = made.host_bytes - (made.model_bytes if own.rotation else 0)
        # An upper bound. It exceeds the peak by what is not alive at the same time in a phase: at most the copy of a
        # block that has rounded weights, its codes, and a window's activations.
        largest = max(made.phases, key=lambda phase: sum((*phase.device.values(), *phase.host.values())))
        slack = sum(largest.device.get(part, 0) for part in ("block", "codes of the block", "activations"))
        assert peak <= planned <= peak + max(slack, 0.25 * peak)
        del dense

    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_packed_bytes_are_those_of_the_model(self, bits):
        model, own = build(), config(2, 32, bits=bits, modules_to_not_convert=["layers.1.mlp.down_proj"])
        made = plan(model, own)
        assert made.model_bytes == sum(parameter.nbytes for parameter in model.parameters())
        quantize_model(model, None, own)
        assert made.packed_bytes == sum(parameter.nbytes for parameter in model.parameters())

    @pytest.mark.slow
    @pytest.mark.parametrize("offload", [None, "disk"])
    def test_memory_of_the_process(self, offload):
        """
        Resident memory while the first two blocks of SmolLM2 are quantized, of which pages of the checkpoint's file
        are a part. The hidden states and the inputs of all windows, which the first block adds, are most of the rest.
        """
        code = """
import json, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl_gopd import D2QuantConfig, quantize_model
from trl_gopd.d2quant import pipeline
from trl_gopd.d2quant.plan import plan
from trl_gopd.demo.smollm2 import smollm2_path
from trl_gopd.evaluation import measure
tokens = torch.randint(0, 49152, (16, 512), generator=torch.Generator().manual_seed(0))
config = D2QuantConfig(dataset=tokens, tune_epochs=0, offload=json.loads(sys.argv[1]))
made = plan(AutoConfig.from_pretrained(smollm2_path()), config)
left, quantize_block = [True, True], pipeline.quantize_block
pipeline.quantize_block = lambda *args: left.pop() and quantize_block(*args)
with measure() as before:
    model = AutoModelForCausalLM.from_pretrained(smollm2_path())
try:
    with measure() as used:
        quantize_model(model, None, config)
except IndexError:
    peak = used.peak_memory_bytes - before.peak_memory_bytes
    print(json.dumps([peak, made.host_bytes, made.disk_bytes, made.mapped_bytes]))
"""
        command = [sys.executable, "-c", code, json.dumps(offload)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        peak, host, disk, mapped = json.loads(done.stdout.splitlines()[-1])
        assert (disk > 0) is (offload == "disk")
        # Pages of mapped files are resident too, as long as the system has memory to spare. A quarter of the rest is
        # freed memory between tensors in use, which the allocator gives back once a block is done.
        assert 0.9 * (host + disk + mapped) <= peak <= 1.25 * (host + disk) + mapped
        assert peak <= 1.5 * mapped


class TestPlan:
    def test_loads_no_weights(self):
        assert peak_bytes(lambda: plan(LARGE, D2QuantConfig())) < 2**20

    def test_linears_that_read_one_tensor_are_one_stage(self):
        rounded = [phase.name for phase in plan(LlamaConfig(**SIZES), config()).phases if "rounding" in phase.name]
        heads = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        assert rounded == [f"{head}: rounding" for head in heads]
        opt = OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32)
        rounded = [phase.name for phase in plan(opt, config()).phases if "rounding" in phase.name]
        assert rounded == [f"{head}: rounding" for head in ("self_attn.k_proj", "self_attn.out_proj", "fc1", "fc2")]

    def test_one_block_of_a_large_model_is_on_the_device(self):
        made = plan(LARGE, D2QuantConfig.paper(rotation=None, device="cuda", offload="disk"))
        block = 2 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672 + 2 * 8192)
        outside = 2 * (2 * 128256 * 8192 + 8192)
        assert made.model_bytes == made.mapped_bytes == outside + 4 * block
        down = phase(made, "mlp.down_proj: rounding")
        assert down.device["block"] == block and down.device["embeddings and head"] == outside
        assert down.device["H and D"] == 2 * 4 * 28672**2
        stream = 2 * 128 * 2048 * 8192
        assert down.disk["hidden states"] == 2 * stream
        full = phase(made, "full-precision pass")
        assert full.disk["inputs in full precision"] == stream * (3 + 28672 / 8192)
        assert "hidden states" not in full.host and "model" not in full.device
        # It fits an accelerator of 24 GB, whatever the number of blocks.
        assert made.device_bytes < 24e9

    @pytest.mark.slow
    def test_documented_sizes_are_those_of_the_plan(self):
        large = LlamaConfig(**LARGE.to_dict() | {"num_hidden_layers": 80})
        page = (Path(__file__).parents[2] / "docs" / "large_models.md").read_text(encoding="utf-8")
        for name, epochs in (("`tune_epochs=0`", 0), ("with the tuning", 3)):
            settings = {"num_samples": 128, "seq_length": 2048, "device": "cuda", "offload": "disk"}
            made = plan(large, D2QuantConfig(**settings, tune_epochs=epochs))
            sizes = (made.device_bytes, made.host_bytes, made.disk_bytes, made.mapped_bytes)
            assert f"| {name} | {' | '.join(f'{size / 2**30:.1f} GiB' for size in sizes)} |" in page

    def test_where_the_model_is_loaded_is_where_it_stays(self):
        there = plan(LARGE, D2QuantConfig(tune_epochs=0), loaded_on="cuda")
        assert all(phase.device["model"] == there.model_bytes for phase in there.phases[:-1])
        assert there.mapped_bytes == 0
        waiting = plan(LARGE, D2QuantConfig(tune_epochs=0, offload="cpu"), loaded_on="cuda")
        assert all("model" not in phase.device for phase in waiting.phases[:-1])
        assert all("blocks" in phase.host for phase in waiting.phases[:-1])

    def test_on_a_cpu_all_memory_is_one(self):
        made = plan(LARGE, D2QuantConfig(tune_epochs=0))
        assert made.host_bytes > made.device_bytes > 0

    def test_operations_follow_the_tokens(self):
        once, twice = (plan(LlamaConfig(**SIZES), config(samples)) for samples in (8, 16))
        for name in ("full-precision pass", "mlp.down_proj: statistics", "quantized pass"):
            assert phase(twice, name).flops == 2 * phase(once, name).flops > 0
        rounding = "mlp.down_proj: rounding"
        assert phase(twice, rounding).flops == phase(once, rounding).flops > 0
        weights = 2 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 384)
        assert phase(once, "quantized pass").flops == 8 * 32 * (2 * weights + 2 * 4 * 32 * 128)

    def test_seconds_follow_the_speeds(self):
        made = plan(LlamaConfig(**SIZES), config())
        assert made.seconds(2e9) == pytest.approx(made.flops / 2e9)
        slow = sum(phase.flops for phase in made.phases if phase.in_float32)
        assert 0 < slow < made.flops
        assert made.seconds(2e9, 1e9) == pytest.approx((made.flops + slow) / 2e9)

    def test_other_things_are_refused(self):
        with pytest.raises(TypeError, match=r"`PreTrainedConfig`, got str. Load one with `AutoConfig"):
            plan("meta-llama", D2QuantConfig())

    def test_text_has_every_phase(self):
        made = plan(LlamaConfig(**SIZES), config())
        lines = made.lines()
        assert [line.split("  ")[0] for line in lines[1:-1]] == [phase.name for phase in made.phases]
        assert "of the model's" in lines[-1]
