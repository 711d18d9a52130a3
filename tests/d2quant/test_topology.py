"""
Laws of a topology, on tiny models of each family, in float64 and with random norms and biases:

- a column scale moved from a consumer to its producer leaves the logits as they were;
- a shift of the norm before the MLP equals biases of the linears that read it;
- linears of a stage read one tensor, which only earlier stages change; every matrix is in a stage or has a reason;
- looking leaves no trace in the model.
"""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, BartConfig, PretrainedConfig

from trl_gopd.d2quant.exact_transforms import ScalePair
from trl_gopd.d2quant.topology import find_blocks, find_topology


SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OPT = {"ffn_dim": 40, "word_embed_proj_dim": 24}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}

# Family: its config, and the settings that differ.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "granite": ("GraniteConfig", GRANITE),
    "phi3": ("Phi3Config", {}),
    "glm": ("GlmConfig", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "opt": ("OPTConfig", OPT),
    "opt-350m": ("OPTConfig", OPT | {"do_layer_norm_before": False}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neox-sequential": ("GPTNeoXConfig", {"use_parallel_residual": False}),
    "starcoder2": ("Starcoder2Config", {}),
    "nemotron": ("NemotronConfig", {}),
    "cohere": ("CohereConfig", {}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "qwen2-moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 20}),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS | {"mlp_only_layers": [1]}),
}
# Families whose MLP is no GLU, and what no scale passes through.
NO_PAIR = {
    "gpt-neox": "GELUActivation",
    "gpt-neox-sequential": "GELUActivation",
    "starcoder2": "GELUTanh",
    "nemotron": "ReLUSquaredActivation",
}
NO_SHIFT = {
    "olmo2": "no norm stands right before its MLP",
    "opt-350m": "`self_attn_layer_norm` is read by more than linears",
    "gpt-neox": "parallel",
    "cohere": "parallel",
    "mixtral": "router",
    "qwen2-moe": "router",
    "qwen3-moe": "router",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = torch.tensor([[5, 11, 3, 36, 8, 8, 20], [2, 9, 30, 1, 17, 4, 6]])


def build_family(family: str, dtype: torch.dtype = torch.float64, **config):
    """Tiny decoder with random norms and biases: what starts as 1 or 0 would hide a scale or a bias left behind."""
    torch.manual_seed(0)
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**SIZES | settings | config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.2)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def assert_rounds_to(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Two layers of four products each, sums of at most 40 terms: 320 roundings on the longest path.
    atol = 320 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class Experts(nn.Module):
    """A mixture whose experts are modules in a list, as in models with code of their own."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        config = copy.deepcopy(config)
        self.gate = nn.Linear(config.hidden_size, 5, bias=False)
        self.experts = nn.ModuleList(transformers.models.llama.modeling_llama.LlamaMLP(config) for _ in range(5))

    def forward(self, hidden_states):
        weight, chosen = self.gate(hidden_states).softmax(-1).max(-1, keepdim=True)
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).squeeze(-1)
            if rows.any():
                output[rows] = expert(hidden_states[rows])
        return output * weight


def build_mixture():
    model = build_family("llama")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = Experts(model.config).double()
    return model


def build(family: str):
    return build_mixture() if family == "mixture" else build_family(family)


ALL = [*FAMILIES, "mixture"]


class TestScalePair:
    @pytest.mark.parametrize("family", ALL)
    def test_absorbed_scale_leaves_logits_as_they_were(self, family, generator):
        model = build(family)
        expected, count = logits(model), 0
        for block in find_topology(model).blocks:
            for pair in block.scale_pairs:
                producer, consumer = map(block.module.get_submodule, (pair.producer, pair.consumer))
                scales = torch.rand(consumer.in_features, generator=generator, dtype=torch.float64) + 0.5
                consumer.weight.data /= scales
                producer.weight.data[pair.rows] *= scales[:, None]
                if producer.bias is not None:
                    producer.bias.data[pair.rows] *= scales
                count += 1
        assert count == {"mixture": 10, "mixtral": 0, "qwen3-moe": 1}.get(family, 0 if family in NO_PAIR else 2)
        assert_rounds_to(logits(model), expected)

    def test_gate_is_never_the_producer(self):
        for block in find_topology(build_family("llama")).blocks:
            assert block.scale_pairs == (ScalePair("mlp.up_proj", "mlp.down_proj", slice(0, 40)),)

    def test_only_the_up_half_of_a_fused_pair(self):
        for block in find_topology(build_family("phi3")).blocks:
            assert block.scale_pairs == (ScalePair("mlp.gate_up_proj", "mlp.down_proj", slice(40, 80)),)

    def test_relu_passes_scales(self):
        for block in find_topology(build_family("opt")).blocks:
            assert block.scale_pairs == (ScalePair("fc1", "fc2", slice(0, 40)),)

    def test_layers_called_by_a_module_above(self):
        class Outer(nn.Module):
            def __init__(self, mlp):
                super().__init__()
                self.inner = mlp

            def forward(self, hidden_states):
                up = self.inner.up_proj(hidden_states)
                return self.inner.down_proj(self.inner.act_fn(self.inner.gate_proj(hidden_states)) * up)

        model = build_family("llama")
        model.model.layers[0].mlp = Outer(model.model.layers[0].mlp)
        block = find_topology(model).blocks[0]
        assert block.scale_pairs == (ScalePair("mlp.inner.up_proj", "mlp.inner.down_proj", slice(0, 40)),)

    @pytest.mark.parametrize("family", NO_PAIR)
    def test_other_activations_are_named(self, family):
        for block in find_topology(build_family(family)).blocks:
            assert block.scale_pairs == ()
            (reason,) = block.scale_reasons.values()
            assert NO_PAIR[family] in reason

    @pytest.mark.parametrize("scale", [1e-12, 1e6])
    def test_weights_that_make_gelu_linear_do_not_deceive(self, scale):
        # GELU(x) is x/2 to rounding at 0, and x or 0 far from it: both pass scales.
        model = build_family("gpt-neox", dtype=torch.float32)
        for block in model.gpt_neox.layers:
            block.mlp.dense_h_to_4h.weight.data *= scale
            block.mlp.dense_h_to_4h.bias.data.zero_()
        assert all(not block.scale_pairs for block in find_topology(model).blocks)

    @pytest.mark.parametrize(
        "dtype, change, count",
        [
            *((dtype, lambda up: -up, 2) for dtype in DTYPES),
            *((dtype, lambda up: up.clamp(-10, 10), 0) for dtype in DTYPES),
            *((dtype, lambda up: up.clamp(max=200), 0) for dtype in DTYPES),
            *((dtype, lambda up: up.clamp(max=1e6), 0) for dtype in DTYPES[:2]),
            *((dtype, lambda up: torch.where(up.abs() < 1e-3, 0, up), 0) for dtype in DTYPES[:2]),
        ],
    )
    def test_clamps_and_thresholds_are_seen(self, dtype, change, count):
        class Clamped(transformers.models.llama.modeling_llama.LlamaMLP):
            def forward(self, hidden_states):
                up = change(self.up_proj(hidden_states))
                return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * up)

        model = build_family("llama", dtype=dtype)
        for layer in model.model.layers:
            layer.mlp.__class__ = Clamped
        assert sum(len(block.scale_pairs) for block in find_topology(model).blocks) == count

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_found_in_every_dtype(self, dtype):
        topology = find_topology(build_family("llama-biases", dtype=dtype))
        assert [len(block.scale_pairs) for block in topology.blocks] == [1, 1]
        assert [len(block.shift_linears) for block in topology.blocks] == [2, 2]


class TestShift:
    @pytest.mark.parametrize("family", ALL)
    def test_biases_equal_a_shift_of_the_norm(self, family, generator):
        model = build(family)
        shifted, folded = copy.deepcopy(model), model
        count = 0
        for block, twin in zip(find_topology(folded).blocks, find_topology(shifted).blocks, strict=True):
            if block.shift_reason is None:
                count += 1
                shift = torch.randn(24, generator=generator, dtype=torch.float64)
                norm = twin.module.get_submodule(twin.mlp_norm)
                norm.register_forward_hook(lambda module, args, output, shift=shift: output + shift)
                for name in block.shift_linears:
                    linear = block.module.get_submodule(name)
                    bias = linear.weight @ shift
                    linear.bias = nn.Parameter(bias if linear.bias is None else bias + linear.bias)
        assert count == {"qwen3-moe": 1, "mixture": 0}.get(family, 0 if family in NO_SHIFT else 2)
        assert_rounds_to(logits(folded), logits(shifted))

    @pytest.mark.parametrize("family", NO_SHIFT)
    def test_reason_of_no_site(self, family):
        block = find_topology(build_family(family)).blocks[0]
        assert NO_SHIFT[family] in block.shift_reason
        assert block.shift_linears == ()

    @pytest.mark.parametrize(
        "family, norm",
        [("llama", "post_attention_layernorm"), ("gemma2", "pre_feedforward_layernorm"), ("opt", "final_layer_norm")],
    )
    def test_site_is_the_norm_before_the_mlp(self, family, norm):
        assert {block.mlp_norm for block in find_topology(build_family(family)).blocks} == {norm}

    def test_reader_that_is_no_linear_is_noticed(self):
        class Scored(nn.Module):
            def __init__(self, mlp):
                super().__init__()
                self.mlp, self.score = mlp, nn.Parameter(torch.randn(24, dtype=torch.float64))

            def forward(self, hidden_states):
                return self.mlp(hidden_states) * (hidden_states @ self.score).sigmoid()[..., None]

        model = build_family("llama")
        model.model.layers[1].mlp = Scored(model.model.layers[1].mlp)
        assert [block.shift_reason is None for block in find_topology(model).blocks] == [True, False]


def record_inputs(block) -> dict[str, torch.Tensor]:
    """What each linear of the block read in the last forward pass."""
    inputs = {}
    for stage in block.stages:
        for name in stage.linears:

            def record(module, args, name=name):
                inputs[name] = args[0]

            block.module.get_submodule(name).register_forward_pre_hook(record)
    return inputs


class TestStages:
    @pytest.mark.parametrize("family", ALL)
    def test_linears_of_a_stage_read_one_tensor(self, family):
        model = build(family)
        for block in find_topology(model).blocks:
            inputs = record_inputs(block)
            logits(model)
            for stage in block.stages:
                values = [inputs[name] for name in stage.linears if name in inputs]
                assert len(values) in (len(stage.linears), 0)  # an expert may get no token
                assert all(torch.equal(value, values[0]) for value in values)

    @pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "opt", "gpt-neox", "cohere", "qwen2-moe"])
    def test_a_stage_changes_the_input_of_later_stages_alone(self, family):
        model = build_family(family)
        block = find_topology(model).blocks[0]
        inputs = record_inputs(block)
        logits(model)
        for index, stage in enumerate(block.stages):
            before = dict(inputs)
            for name in stage.linears:
                block.module.get_submodule(name).weight.data *= 1.5
            logits(model)
            for other in block.stages[: index + 1]:
                assert all(torch.equal(inputs[name], before[name]) for name in other.linears)

    def test_order_is_that_of_the_forward_pass(self):
        for block in find_topology(build_family("qwen3")).blocks:
            assert [[name.split(".")[-1] for name in stage.linears] for stage in block.stages] == [
                ["q_proj", "k_proj", "v_proj"],
                ["o_proj"],
                ["gate_proj", "up_proj"],
                ["down_proj"],
            ]

    @pytest.mark.parametrize("family", ALL)
    def test_every_matrix_is_in_one_stage_or_has_a_reason(self, family):
        for block in find_topology(build(family)).blocks:
            staged = [f"{name}.weight" for stage in block.stages for name in stage.linears]
            matrices = [name for name, parameter in block.module.named_parameters() if parameter.ndim > 1]
            assert sorted([*staged, *block.full_precision]) == sorted(matrices)

    def test_fused_experts_and_routers_stay_in_full_precision(self):
        block = find_topology(build_family("mixtral")).blocks[0]
        assert "3-D parameter of MixtralExperts" in block.full_precision["mlp.experts.down_proj"]
        assert "MixtralTopKRouter" in block.full_precision["mlp.gate.weight"]

    def test_gate_of_a_shared_expert_stays_in_full_precision(self):
        block = find_topology(build_family("qwen2-moe")).blocks[0]
        assert "weighs experts" in block.full_precision["mlp.shared_expert_gate.weight"]

    def test_experts_in_a_list_are_described_without_tokens(self):
        model = build_mixture()
        for layer in model.model.layers:
            layer.mlp.gate.weight.data.zero_()  # all tokens go to the first expert
        for block in find_topology(model).blocks:
            assert [stage.linears for stage in block.stages[2:]] == [
                names
                for index in range(5)
                for expert in [f"mlp.experts.{index}"]
                for names in [(f"{expert}.gate_proj", f"{expert}.up_proj"), (f"{expert}.down_proj",)]
            ]
            assert [pair.producer for pair in block.scale_pairs] == [f"mlp.experts.{i}.up_proj" for i in range(5)]
            assert "router" in block.shift_reason
            assert list(block.full_precision) == ["mlp.gate.weight"]


class TestFindTopology:
    def test_names_of_a_causal_model(self):
        topology = find_topology(build_family("llama"))
        assert (topology.blocks_name, topology.embeddings) == ("model.layers", "model.embed_tokens")
        assert (topology.final_norm, topology.lm_head) == ("model.norm", "lm_head")
        assert [block.name for block in topology.blocks] == ["model.layers.0", "model.layers.1"]

    def test_names_of_a_base_model(self):
        model = build_family("llama")
        topology = find_topology(model.model)
        assert (topology.blocks_name, topology.embeddings) == ("layers", "embed_tokens")
        assert (topology.final_norm, topology.lm_head) == ("norm", None)
        assert [block.module for block in topology.blocks] == list(model.model.layers)

    def test_decoder_without_final_norm(self):
        assert find_topology(build_family("opt")).final_norm == "model.decoder.final_layer_norm"
        assert find_topology(build_family("opt-350m")).final_norm is None

    def test_other_lists_of_the_same_length(self):
        model = build_family("llama")
        model.model.embed_tokens.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        assert find_blocks(model)[0] == "model.layers"

    def test_dropout_is_off(self):
        config = {"dropout": 0.5, "attention_dropout": 0.5}
        model = build_family("opt", **config).train()
        for one, other in zip(find_topology(model).blocks, find_topology(build_family("opt")).blocks, strict=True):
            assert (one.scale_pairs, one.shift_linears) == (other.scale_pairs, other.shift_linears)
            assert one.residual_writers == other.residual_writers != ()

    @pytest.mark.parametrize("stray", [lambda h: h * torch.linspace(0.5, 1.5, 24), torch.tanh, torch.cos])
    def test_no_writers_if_something_else_changes_the_stream(self, stray):
        class Stray(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self, hidden_states, **kwargs):
                return self.layer(hidden_states, **kwargs) + stray(hidden_states)

        model = build_family("llama")
        model.model.layers[1] = Stray(model.model.layers[1])
        assert [len(block.residual_writers) for block in find_topology(model).blocks] == [2, 0]

    @pytest.mark.parametrize(
        "family, writers",
        [
            ("qwen3", ("self_attn.o_proj", "mlp.down_proj")),
            ("opt", ("self_attn.out_proj", "fc2")),
            ("gemma2", ()),  # norms stand between the branches and the residual stream
            ("olmo2", ()),
        ],
    )
    def test_writers_of_the_residual_stream(self, family, writers):
        assert {block.residual_writers for block in find_topology(build_family(family)).blocks} == {writers}

    def test_leaves_no_trace(self):
        model = build_mixture().train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        weights = copy.deepcopy(model.state_dict())
        state = torch.get_rng_state()
        find_topology(model)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks

    def test_modes_and_hooks_are_restored_after_an_error(self):
        model = build_family("llama").train()
        model.model.layers[1].mlp.forward = lambda hidden_states: 1 / 0
        with pytest.raises(ZeroDivisionError):
            find_topology(model)
        assert all(module.training and not module._forward_hooks for module in model.modules())

    def test_same_description_twice(self):
        model = build_family("gemma3")
        first, second = find_topology(model), find_topology(model)
        for one, other in zip(first.blocks, second.blocks, strict=True):
            assert vars(one) == vars(other)


class TestErrors:
    def test_matrices_that_are_no_linears(self):
        model = build_family("llama")
        model.model.layers = nn.ModuleList(nn.Conv1d(24, 24, 1) for _ in range(2))
        with pytest.raises(ValueError, match=r"got LlamaForCausalLM .*`model.layers` in Conv1d.*another family"):
            find_topology(model)

    def test_encoder_decoder(self):
        config = BartConfig(vocab_size=37, d_model=24, encoder_attention_heads=2, decoder_attention_heads=2)
        with pytest.raises(ValueError, match="got BartModel, an encoder-decoder.*decoder-only"):
            find_topology(AutoModel.from_config(config))

    def test_no_blocks(self):
        model = build_family("llama")
        model.model.layers = nn.ModuleList(model.model.layers[:1])
        with pytest.raises(ValueError, match="got LlamaForCausalLM without one of 2"):
            find_blocks(model)

    def test_not_a_pretrained_model(self):
        with pytest.raises(TypeError, match=r"got Sequential.*merge_and_unload"):
            find_topology(nn.Sequential())

    def test_weights_not_loaded(self):
        with torch.device("meta"):
            model = build_family("llama")
        assert find_blocks(model)[0] == "model.layers"
        with pytest.raises(ValueError, match="meta device. Load them"):
            find_topology(model)
