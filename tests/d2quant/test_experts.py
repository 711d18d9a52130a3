"""
Laws of experts that transformers keeps in one parameter:

- split into linears, they compute what they did, in every bit, and are put back as they were;
- the statistics of an expert are those of the tokens that reach it, and of all experts where few do;
- packed, they can be excluded, resumed, and given an absorbed column scale.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.d2quant.families import build
from trl_gopd.d2quant import stages
from trl_gopd.d2quant.as_linears import find_expert_parameters, make_linears
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.experts import ExpertLinears
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.d2quant.rounding import inverse_factor
from trl_gopd.d2quant.topology import find_topology


TOKENS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
# Family: whether its experts' matrices are transposed in their parameter.
FUSED = {
    "Mixtral": False,
    "Qwen3-MoE": False,
    "OLMoE": False,
    "GptOss": True,
    "DeepSeek-V3": False,
    "Qwen3-Next": False,
    "Llama4 (text)": True,
    "Jamba": False,
    "Gemma4 (experts)": False,
}


def config(**settings):
    defaults = {"bits": 3, "group_size": 16, "iterations": 2, "tune_epochs": 0, "num_samples": 4, "seq_length": 16}
    return D2QuantConfig(**{"dataset": TOKENS, **defaults, **settings})


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


class TestMakeLinears:
    @pytest.mark.parametrize("family", FUSED)
    def test_experts_compute_what_they_did(self, family):
        model = build(family)
        model.set_experts_implementation("eager")
        expected, before = logits(model), dict(model.named_parameters())
        undo = make_linears(model, config())
        found = find_expert_parameters(model)
        assert set(found.values()) == {FUSED[family]}
        assert not any("experts." in name and p.ndim == 3 for name, p in model.named_parameters())
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(copy.deepcopy(model)), expected)
        undo()
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
        assert torch.equal(logits(model), expected)
        assert not hasattr(model.config, "_is_quantized")

    def test_linears_share_memory_with_the_parameter(self):
        model = build("GptOss")
        parameter = model.model.layers[0].mlp.experts.down_proj
        make_linears(model, config())
        linear = model.model.layers[0].mlp.experts.down_proj[2].product
        assert linear.weight.data_ptr() == parameter[2].data_ptr()
        assert torch.equal(linear.weight, parameter[2].T)

    def test_parameter_that_is_used_otherwise_stays(self):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)))

            def forward(self, hidden):
                return torch.einsum("bti,eio->bto", hidden, self.weight)

        model = build("Llama")
        model.model.layers[1].mlp = Mixed()
        make_linears(model, config())
        assert find_expert_parameters(model) == {}
        reason = find_topology(model).blocks[1].full_precision["mlp.weight"]
        assert "3-D parameter of Mixed" in reason

    def test_layers_of_gpt2_are_put_back(self):
        model = build("GPT-2")
        expected, before = logits(model), dict(model.named_modules())
        undo = make_linears(model, config())
        assert not any(isinstance(module, Conv1D) for module in model.modules())
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        undo()
        assert dict(model.named_modules()) == before

    @pytest.mark.parametrize("family", ["GPT-2", "Mixtral"])
    def test_is_undone_when_data_are_refused(self, family):
        model = build(family)
        before = dict(model.named_parameters())
        with pytest.raises(ValueError, match="5 windows"):
            quantize_model(model, None, config(num_samples=5))
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


class TestExpertLinears:
    def test_other_products_are_refused(self):
        experts = ExpertLinears([nn.Linear(4, 3, bias=False) for _ in range(2)], transposed=False)
        rows = torch.ones(5, 4)
        assert experts.shape == (2, 3, 4)
        assert torch.equal(nn.functional.linear(rows, experts[1]), experts.expert_1(rows))
        with pytest.raises(TypeError, match="operand"):
            rows @ experts[0]
        with pytest.raises(TypeError, match="no operand"):
            torch.bmm(torch.ones(2, 5, 4), experts)


class ToyBlock:
    """Three experts of which each token reaches the one that its first channel names."""

    name, routed = "layers.0", frozenset({"experts.0", "experts.1", "experts.2"})

    def __init__(self):
        self.module = nn.Module()
        self.module.experts = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def linear(self, name):
        return self.module.get_submodule(name)


class ToyCalls:
    def of_window(self, index):
        return self

    def run_and_capture(self, block, hidden, names):
        chosen = hidden[0, :, 0]
        rows = {name: hidden[0][chosen == int(name[-1])] for name in names}
        return {name: part for name, part in rows.items() if len(part)}, hidden


class ToyStreams:
    def __init__(self, windows):
        self.quantized = windows


class TestExpertStatistics:
    NAMES = ("experts.0", "experts.1", "experts.2")

    def windows(self, generator, experts):
        windows = []
        for chosen in experts:
            hidden = torch.randn(1, len(chosen), 6, generator=generator)
            hidden[0, :, 0] = torch.tensor(chosen, dtype=torch.float32)
            windows.append(hidden)
        return windows

    def test_mean_of_all_counts_as_many_tokens_as_there_are_columns(self, generator):
        windows = self.windows(generator, [[0, 0, 1, 0], [0, 1, 0, 0]])
        found = stages.expert_statistics(ToyBlock(), self.NAMES, ToyCalls(), ToyStreams(windows))
        rows = torch.cat([window[0] for window in windows]).double()
        mean = rows.T @ rows / len(rows)
        for index, name in enumerate(self.NAMES):
            own = rows[rows[:, 0] == index]
            expected = 2 * (own.T @ own + 6 * mean) / (len(own) + 6)
            # eight products and a sum: twelve roundings of numbers below the largest one
            atol = 12 * torch.finfo(torch.float32).eps * float(expected.abs().max())
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=atol)

    def test_few_tokens_can_be_inverted(self, generator):
        windows = self.windows(generator, [[0] * 20 + [1]])
        found = stages.expert_statistics(ToyBlock(), self.NAMES, ToyCalls(), ToyStreams(windows))
        assert all(torch.isfinite(inverse_factor(hessian, 1e-4)).all() for hessian in found.values())

    def test_no_tokens_at_all(self, generator):
        windows = self.windows(generator, [[7, 7]])
        found = stages.expert_statistics(ToyBlock(), self.NAMES, ToyCalls(), ToyStreams(windows))
        assert found == dict.fromkeys(self.NAMES)


class TestQuantize:
    def test_all_experts_are_packed_though_a_router_leaves_some_out(self):
        model = build("Mixtral", num_local_experts=8, num_experts=8, num_experts_per_tok=1)
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[4:] = 0
            layer.mlp.gate.weight.data[:4] *= 4
        report = quantize_model(model, None, config())
        packed = [name for name, module in model.model.named_modules() if isinstance(module, D2QuantLinear)]
        assert sum(".experts." in name for name in packed) == 2 * 2 * 8
        assert len(report.linears) == len(packed)
        assert all(entry.error < entry.nearest_error for entry in report.linears if ".experts." in entry.name)

    def test_statistics_are_held_for_some_experts_at_a_time(self, monkeypatch):
        sizes, statistics = [], stages.expert_statistics

        def observe(block, names, *others):
            sizes.append(len(names))
            return statistics(block, names, *others)

        monkeypatch.setattr(stages, "EXPERT_STATISTICS", 3 * 4 * 32**2)
        monkeypatch.setattr(stages, "expert_statistics", observe)
        quantize_model(build("OLMoE", num_hidden_layers=1), None, config())
        assert sizes == [3, 1, 1, 1, 1, 1]  # of 32 columns, then of 64

    def test_excluded_parameter_stays_one(self, tmp_path):
        model = build("Mixtral")
        down = [layer.mlp.experts.down_proj.clone() for layer in model.model.layers]
        quantize_model(model, None, config(modules_to_not_convert=["experts.down_proj"]))
        for layer, expected in zip(model.model.layers, down, strict=True):
            assert torch.equal(layer.mlp.experts.down_proj, expected)
        described = model.config.quantization_config
        assert described.expert_parameters == {"mlp.experts.gate_up_proj": False}
        assert described.modules_to_not_convert == ["mlp.experts.down_proj", "mlp.gate"]
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))

    def test_backbone_of_a_checkpoint(self, tmp_path):
        model = build("OLMoE")
        quantize_model(model, None, config())
        model.save_pretrained(tmp_path)
        loaded = type(model.model).from_pretrained(tmp_path)
        with torch.no_grad():
            states = [each(TOKENS, use_cache=False).last_hidden_state for each in (loaded, model.model)]
        assert torch.equal(*states)
        assert not model.hf_quantizer.is_compileable

    @pytest.mark.parametrize("family, pairs", [("Mixtral", 4), ("Llama4 (text)", 4), ("GptOss", 0)])
    def test_column_scale_is_absorbed_where_that_is_exact(self, family, pairs):
        model = build(family)
        make_linears(model, config())
        block = find_topology(model).blocks[-1]
        experts = [pair for pair in block.scale_pairs if ".linears." in pair.consumer]
        assert len(experts) == pairs
        assert [pair.rows.start for pair in experts] == [pair.rows.stop // 2 for pair in experts]  # the half of `up`
        reasons = {reason for name, reason in block.scale_reasons.items() if ".linears." in name}
        assert reasons == (set() if pairs else {"no scale of its input passes through GptOssExperts"})

    def test_run_is_resumed(self, tmp_path):
        whole, resumed = build("Mixtral"), build("Mixtral")
        quantize_model(whole, None, config(work_dir=str(tmp_path)))
        next(tmp_path.glob("*/block-0002.safetensors")).unlink()
        quantize_model(resumed, None, config(work_dir=str(tmp_path)))
        assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in whole.state_dict().items())

    def test_scales_of_experts_are_tuned(self):
        rounded, tuned = build("Mixtral"), build("Mixtral")
        quantize_model(rounded, None, config())
        quantize_model(tuned, None, config(tune_epochs=1))
        scales = [name for name in rounded.state_dict() if ".experts." in name and name.endswith("weight_scale")]
        moved = [name for name in scales if not torch.equal(rounded.state_dict()[name], tuned.state_dict()[name])]
        assert len(moved) == len(scales) == 16

    def test_adapters_train_on_experts(self):
        model = build("Mixtral", num_hidden_layers=1)
        quantize_model(model, None, config())
        expected = logits(model)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
        assert torch.equal(logits(adapted), expected)
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        trained = [n for n, p in adapted.named_parameters() if "lora_B" in n and p.grad is not None and p.grad.any()]
        assert sum(".experts." in name for name in trained) == 8

    def test_figure_has_one_line_for_all_experts(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        from matplotlib.axes import Axes

        labels, draw = [], Axes.semilogy

        def observe(axes, values, *args, **kwargs):
            labels.append((kwargs.get("label"), len(values)))
            return draw(axes, values, *args, **kwargs)

        monkeypatch.setattr(Axes, "semilogy", observe)
        quantize_model(build("Mixtral"), None, config()).save(tmp_path / "report.png")
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
        assert [each for each in labels if each[0]] == [(kind, 2) for kind in kinds]
