"""
Laws of the rotation, on tiny models in float64 with random norms and biases:

- fused norms and rotations of any width leave the logits as they were, and the residual stream is `hQ`;
- the matrix is orthogonal and flat;
- products are rounded once, and a model that is refused is not touched.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.d2quant.test_topology import FAMILIES, assert_rounds_to, build_family, build_mixture, logits
from trl_gopd.d2quant.rotation import fuse_norms, rotate, rotation_matrix
from trl_gopd.d2quant.topology import find_topology


FAMILIES["nanochat"] = ("NanoChatConfig", {})  # norms without a weight
FAMILIES["bitnet"] = ("BitNetConfig", {})  # a norm inside the MLP
EXACT = [
    "llama",
    "llama-biases",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "phi3",
    "glm",
    "gemma",
    "nanochat",
]
REFUSED = {
    "gemma2": "`model.layers.0.post_attention_layernorm` does not stand between",
    "gemma3": "`model.layers.0.post_attention_layernorm` does not stand between",
    "olmo2": "`model.layers.0.post_attention_layernorm` does not stand between",
    "olmo": "`model.layers.0.input_layernorm` is a OlmoLayerNorm",
    "cohere": "`model.layers.0.input_layernorm` is a CohereLayerNorm",
    "gpt-neox": "`gpt_neox.layers.0.input_layernorm` is a LayerNorm",
    "starcoder2": "`model.layers.0.input_layernorm` is a LayerNorm",
    "nemotron": "`model.layers.0.input_layernorm` is a NemotronLayerNorm1P",
    "opt": "`model.decoder.embed_positions.weight` belongs to none",
    "mixtral": "`model.layers.0.post_attention_layernorm` does not stand between",
    "bitnet": "`model.layers.0.mlp.ffn_sub_norm` does not stand between",
    "qwen2-moe": "`model.layers.0.post_attention_layernorm` does not stand between",
}


@pytest.fixture
def float64_norms(monkeypatch):
    """Norms of transformers compute in float32, whatever the model: that would hide errors below its rounding."""
    to = torch.Tensor.to

    def stay(tensor, *args, **kwargs):
        return tensor if args[:1] == (torch.float32,) else to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)


def fused(family: str, **config):
    model = build_family(family, **config)
    topology = find_topology(model)
    fuse_norms(model, topology)
    return model, topology


@pytest.mark.usefixtures("float64_norms")
class TestFuseNorms:
    @pytest.mark.parametrize("family", EXACT)
    def test_logits_stay(self, family):
        expected = logits(build_family(family))
        assert_rounds_to(logits(fused(family)[0]), expected)

    @pytest.mark.parametrize("family, neutral", [("llama", 1.0), ("gemma", 0.0)])
    def test_scales_of_norms_become_neutral(self, family, neutral):
        model, _ = fused(family)
        weights = {name: weight for name, weight in model.named_parameters() if name.endswith("norm.weight")}
        assert len(weights) == 5
        assert all(torch.all(weight == neutral) for weight in weights.values())

    def test_twice_is_once(self):
        model, topology = fused("gemma")
        before = copy.deepcopy(model.state_dict())
        fuse_norms(model, topology)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_tied_head_gets_its_own_matrix(self, tmp_path, recwarn):
        model = build_family("gemma", tie_word_embeddings=True)
        expected = logits(model)
        embeddings = model.model.embed_tokens.weight.clone()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        topology = find_topology(model)
        fuse_norms(model, topology)
        assert torch.equal(model.model.embed_tokens.weight, embeddings)
        assert model.lm_head.weight.requires_grad
        assert model.all_tied_weights_keys == {}
        rotate(model, topology)
        assert_rounds_to(logits(model), expected)
        model.save_pretrained(tmp_path)
        reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
        assert not any(info.values())
        assert reloaded.config.tie_word_embeddings is False
        assert torch.equal(logits(reloaded), logits(model))
        assert not [str(warning.message) for warning in recwarn]

    def test_products_are_rounded_once(self):
        model = build_family("gemma", dtype=torch.bfloat16)
        mlp, norm = model.model.layers[0].mlp, model.model.layers[0].post_attention_layernorm
        expected = (mlp.up_proj.weight.double() * (1 + norm.weight.double())).bfloat16()
        fuse_norms(model, find_topology(model))
        assert torch.equal(mlp.up_proj.weight, expected)

    def test_untied_head_stays_as_it_is(self):
        model = build_family("llama")
        head = model.lm_head.weight
        fuse_norms(model, find_topology(model))
        assert model.lm_head.weight is head


class TestRotate:
    @pytest.mark.usefixtures("float64_norms")
    @pytest.mark.parametrize("size", [None, 8, 4, 1])
    @pytest.mark.parametrize("family", EXACT)
    def test_logits_stay(self, family, size):
        expected = logits(build_family(family))
        model, topology = fused(family)
        rotate(model, topology, size=size, seed=3)
        assert_rounds_to(logits(model), expected)

    @pytest.mark.parametrize("family", EXACT)
    def test_logits_stay_in_float32(self, family):
        model = build_family(family, dtype=torch.float32)
        expected = logits(model)
        topology = find_topology(model)
        fuse_norms(model, topology)
        rotate(model, topology)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    @pytest.mark.usefixtures("float64_norms")
    @pytest.mark.parametrize("size", [None, 8])
    @pytest.mark.parametrize("family", ["llama-biases", "granite", "gemma"])
    @torch.no_grad()
    def test_residual_stream_is_rotated(self, family, size):
        model, topology = fused(family)
        tokens = torch.tensor([[7, 1, 30]])
        # The last of the hidden states has passed the final norm.
        before = model(input_ids=tokens, output_hidden_states=True).hidden_states[:-1]
        rotate(model, topology, size=size, seed=3)
        after = model(input_ids=tokens, output_hidden_states=True).hidden_states[:-1]
        matrix = torch.block_diag(*[rotation_matrix(size or 24, seed=3)] * (24 // (size or 24)))
        for turned, plain in zip(after, before, strict=True):
            assert_rounds_to(turned, plain @ matrix)

    def test_topology_still_holds(self):
        model, topology = fused("llama-biases")
        rotate(model, topology)
        for one, other in zip(find_topology(model).blocks, topology.blocks, strict=True):
            assert vars(one) == vars(other)

    @pytest.mark.usefixtures("float64_norms")
    def test_inputs_of_o_and_down_are_not_rotated(self):
        model, topology = fused("llama")
        mlp = model.model.layers[0].mlp
        read = []
        mlp.down_proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        logits(model)
        rotate(model, topology)
        logits(model)
        assert_rounds_to(read[1], read[0])

    def test_products_are_rounded_once(self):
        model = build_family("llama-biases", dtype=torch.bfloat16)
        exact = copy.deepcopy(model).double()
        for each in (model, exact):
            fuse_norms(each, find_topology(each))
        exact.load_state_dict(model.state_dict())  # so that only the rounding of `rotate` differs
        for each in (model, exact):
            rotate(each, find_topology(each))
        assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
        for name, value in model.named_parameters():
            assert torch.equal(value, exact.get_parameter(name).bfloat16()), name

    def test_seed_alone_decides(self):
        results = []
        for seed in (0, 0, 1):
            model, topology = fused("llama")
            torch.manual_seed(len(results))
            state = torch.get_rng_state()
            rotate(model, topology, seed=seed)
            assert torch.equal(torch.get_rng_state(), state)
            results.append(model.model.embed_tokens.weight)
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    def test_gradients_stay_as_they_were(self):
        model, topology = build_family("llama"), None
        model.lm_head.requires_grad_(False)
        topology = find_topology(model)
        fuse_norms(model, topology)
        rotate(model, topology)
        assert all(parameter.is_leaf and parameter.grad is None for parameter in model.parameters())
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert frozen == ["lm_head.weight"]

    @pytest.mark.slow
    @torch.no_grad()
    def test_smollm2(self):
        smollm2 = pytest.importorskip("trl_gopd.demo.smollm2")
        path = smollm2.smollm2_path()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokens = AutoTokenizer.from_pretrained(path)("Gravity pulls the apple to the ground.", return_tensors="pt")
        expected = model(**tokens).logits
        topology = find_topology(model)
        fuse_norms(model, topology)
        rotate(model, topology, size=64)
        scale = expected.abs().max().item()
        torch.testing.assert_close(model(**tokens).logits, expected, rtol=0, atol=1e-5 * scale)
        rotate(model, topology)
        torch.testing.assert_close(model(**tokens).logits, expected, rtol=0, atol=1e-5 * scale)


class TestRotationMatrix:
    SIZES = [1, 2, 3, 8, 15, 24, 37, 64, 576]

    @pytest.mark.parametrize("size", SIZES)
    def test_is_orthogonal(self, size):
        matrix = rotation_matrix(size, seed=5)
        # Sums of `size` products of entries up to √2/√size, and angles up to 2π·size² that cost another `size` eps.
        atol = 4 * size * torch.finfo(torch.float64).eps
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=atol)

    @pytest.mark.parametrize("size", SIZES)
    def test_no_entry_is_large(self, size):
        bound = (2 / size) ** 0.5 if size & (size - 1) else (1 / size) ** 0.5
        assert rotation_matrix(size).abs().max() <= bound * (1 + size * torch.finfo(torch.float64).eps)

    def test_of_two_channels(self):
        # Sylvester's matrix up to signs of rows
        matrix = rotation_matrix(2, seed=0) * 2**0.5
        expected = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        assert torch.allclose(matrix * matrix[:, :1].sign(), expected, rtol=1e-15)

    def test_spreads_an_outlier(self):
        stream = torch.zeros(576, dtype=torch.float64)
        stream[17] = 100.0
        assert (stream @ rotation_matrix(576)).abs().max() <= 100 * (2 / 576) ** 0.5 * (1 + 1e-12)

    def test_signs_differ(self):
        assert not torch.equal(rotation_matrix(64, seed=0), rotation_matrix(64, seed=1))


class TestErrors:
    @pytest.mark.parametrize("family", REFUSED)
    def test_refused_families_are_not_touched(self, family):
        model = build_family(family)
        topology = find_topology(model)
        before = copy.deepcopy(model.state_dict())
        for transform in (fuse_norms, rotate):
            with pytest.raises(ValueError, match=f"{REFUSED[family]}.*Use `rotation=None`"):
                transform(model, topology)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_mixture_of_linears(self):
        model = build_mixture()
        with pytest.raises(ValueError, match="post_attention_layernorm` does not stand between"):
            fuse_norms(model, find_topology(model))

    def test_linear_beside_the_norm(self):
        class Shortcut(torch.nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.mlp, self.scale = layer.mlp, torch.nn.Linear(24, 40, dtype=torch.float64)
                layer.post_attention_layernorm.register_forward_pre_hook(self.keep)

            def keep(self, module, args):
                self.stream = args[0]

            def forward(self, hidden_states):
                gate = self.mlp.act_fn(self.mlp.gate_proj(hidden_states)) * self.scale(self.stream)
                return self.mlp.down_proj(gate * self.mlp.up_proj(hidden_states))

        model = build_family("llama")
        model.model.layers[1].mlp = Shortcut(model.model.layers[1])
        with pytest.raises(ValueError, match="`model.layers.1.mlp.scale` may read the residual stream"):
            fuse_norms(model, find_topology(model))

    def test_attention_without_a_norm(self):
        model = build_family("llama")
        model.model.layers[1].input_layernorm = torch.nn.Identity()
        with pytest.raises(ValueError, match="`model.layers.1.self_attn.q_proj` may read the residual stream"):
            fuse_norms(model, find_topology(model))

    def test_stream_that_is_scaled(self):
        model = build_family("llama")
        model.model.layers[1].register_forward_hook(lambda module, args, output: output * torch.linspace(0.5, 1.5, 24))
        with pytest.raises(ValueError, match="`model.layers.1` adds more to the residual stream"):
            fuse_norms(model, find_topology(model))

    def test_base_model(self):
        model = build_family("llama").model
        with pytest.raises(ValueError, match="a base model has no `lm_head`"):
            fuse_norms(model, find_topology(model))

    def test_norms_that_are_not_fused(self):
        model = build_family("gemma")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="scale of `model.layers.0.input_layernorm` must be 1.*`fuse_norms`"):
            rotate(model, find_topology(model))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("size", [0, -8, 7, 48])
    def test_size_that_does_not_divide(self, size):
        model, topology = fused("llama")
        with pytest.raises(ValueError, match=f"must divide the hidden size 24, got {size}. Use `None`"):
            rotate(model, topology, size=size)
