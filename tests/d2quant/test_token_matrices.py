"""
Packed embeddings and heads in models: one matrix stays one however the model is saved, loaded, copied or moved; logits
are those of the dense twin; what would not compute the same stays dense, with the reason; and the calibration sees the
packed matrices where the quantized model does.
"""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny import build_model
from trl_gopd.d2quant import integrity, pipeline, refine
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.embedding import D2QuantEmbedding
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.d2quant.token_matrices import round_rows


TOKENS = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
PARTS = ("weight", "weight_scale", "weight_zero_point")
FILE = "model.safetensors"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}


def config(**settings):
    data = {"dataset": TOKENS, "num_samples": 2, "seq_length": 16}
    return D2QuantConfig(
        **{"bits": 2, "group_size": 16, "rounding": "rtn", "iterations": 1, "tune_epochs": 0, **data, **settings}
    )


def quantize(model, **settings):
    report = quantize_model(model, None, config(**settings))
    return model, report


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def model(tokenizer, tied):
    return quantize(build_model(tokenizer, seed=1, tie_word_embeddings=tied), embedding_bits=4)[0]


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def assert_shared(model, tied):
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, D2QuantEmbedding) and isinstance(head, D2QuantLinear)
    assert [getattr(embedding, part) is getattr(head, part) for part in PARTS] == [tied] * 3


def assert_same(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    for (name, tensor), (other_name, other_tensor) in pairs:
        assert (name, tensor.dtype) == (other_name, other_tensor.dtype)
        assert torch.equal(tensor, other_tensor), name


class TestTransformers:
    def test_comes_back(self, model, tied, tmp_path):
        assert_shared(model, tied)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_shared(loaded, tied)
        assert_same(loaded, model)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.dtype == torch.float32
        with safe_open(tmp_path / FILE, framework="pt") as file:
            stored = set(file.keys())
        assert {f"model.embed_tokens.{part}" for part in PARTS} <= stored
        assert any(name.startswith("lm_head") for name in stored) is not tied  # one matrix is stored once
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()

    def test_configuration_states_it(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert (stored["embedding_bits"], stored["modules_to_not_convert"]) == (4, [])

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: copy.deepcopy(model),
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: model.to(torch.bfloat16),
            lambda model: model.to("cpu"),
            lambda model: model.tie_weights() or model,
        ],
        ids=["deepcopy", "pickle", "bfloat16", "device", "tie_weights"],
    )
    def test_stays_one_matrix(self, model, tied, change, tmp_path):
        want = logits(copy.deepcopy(model))
        model = change(model)
        assert_shared(model, tied)
        if model.dtype == torch.float32:
            assert torch.equal(logits(model), want)
        else:
            assert logits(model).dtype == torch.bfloat16
            assert model.lm_head.weight_scale.dtype == model.model.embed_tokens.weight_scale.dtype == torch.float16
        model.save_pretrained(tmp_path)
        assert_shared(AutoModelForCausalLM.from_pretrained(tmp_path), tied)

    def test_other_dtype(self, model, tied, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert_shared(loaded, tied)
        assert (loaded.dtype, loaded.lm_head.weight_scale.dtype) == (torch.bfloat16, torch.float16)
        assert loaded.model.embed_tokens(TOKENS).dtype == torch.bfloat16
        dense = copy.deepcopy(loaded).dequantize()
        assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}

    def test_shards(self, model, tied, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_shared(loaded, tied)
        assert_same(loaded, model)

    @pytest.mark.parametrize("device_map", ["auto", "cpu"])
    def test_device_map(self, model, tied, device_map, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        assert_shared(loaded, tied)
        assert_same(loaded, model)

    def test_on_disk(self, model, tied, tmp_path):
        model.save_pretrained(tmp_path)
        device_map = dict.fromkeys(("model.embed_tokens", "lm_head"), "disk") | {"model.rotary_emb": "cpu"}
        device_map |= dict.fromkeys(("model.layers", "model.norm"), "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "o")
        assert loaded.model.embed_tokens.weight.is_meta
        assert torch.equal(logits(loaded), logits(model))
        with pytest.raises(ValueError, match="must be in memory, and `model.embed_tokens` is offloaded"):
            loaded.dequantize()

    def test_base_model_and_other_heads(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        assert_same(AutoModel.from_pretrained(tmp_path), model.model)
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
        assert_same(classifier.model, model.model)

    def test_damaged_embedding_is_refused(self, model, tmp_path):
        model.save_pretrained(tmp_path / "whole")
        model.model.embed_tokens.weight.data[0, 0] ^= 1
        model.save_pretrained(tmp_path / "damaged")
        (tmp_path / "whole" / FILE).write_bytes((tmp_path / "damaged" / FILE).read_bytes())
        with pytest.raises(ValueError, match="`model.embed_tokens.weight` in .* is not what was saved"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "whole")

    def test_checkpoint_from_before(self):
        settings = config(embedding_bits=None).to_dict()
        assert D2QuantConfig.from_dict(settings).embedding_bits is None
        del settings["embedding_bits"]
        assert D2QuantConfig.from_dict(settings).embedding_bits == 8
        settings["integrity"] = {"model_config": {}, "tensors": {}}
        settings["integrity"]["checksum"] = integrity._checksum(settings)
        assert D2QuantConfig.from_dict(settings).embedding_bits is None

    def test_resizing_is_refused(self, model, tied):
        with pytest.raises(
            ValueError, match="cannot be changed while the embedding .* is packed. Resize the original"
        ):
            model.resize_token_embeddings(300)
        dense = model.dequantize()
        assert dense.resize_token_embeddings(300).num_embeddings == 300
        assert (dense.lm_head.weight is dense.model.embed_tokens.weight) is tied

    def test_generation_is_that_of_the_dense_model(self, model, tied):
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        dense = copy.deepcopy(model).dequantize()
        assert (dense.lm_head.weight is dense.model.embed_tokens.weight) is tied
        assert torch.equal(model.generate(TOKENS, **options), dense.generate(TOKENS, **options))
        # float32 in another order of summation: at most a few dozen roundings in a row
        gap = (logits(model) - logits(dense)).abs().max()
        assert gap <= 64 * torch.finfo(torch.float32).eps * logits(dense).abs().max()
        assert all(parameter.requires_grad for parameter in dense.parameters())


class TestFamilies:
    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("gemma3_text", {"head_dim": 16}),  # tied, rows scaled
            ("gpt_neox", {}),
            ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.0}),  # tied, below a decoder
            ("phi", {}),  # its head has a bias
            ("cohere", {"eos_token_id": 1, "bos_token_id": 2}),  # tied, logits scaled
            ("granite", {"embedding_multiplier": 3.0}),
        ],
    )
    @pytest.mark.parametrize("bits", [3, 8])
    def test_comes_back_and_dense_again(self, tmp_path, family, options, bits):
        torch.manual_seed(0)
        sizes = {**SIZES, "vocab_size": 97, "num_hidden_layers": 2, **options}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
        kind, tied = type(model.get_input_embeddings()), model.config.tie_word_embeddings
        _, report = quantize(model, embedding_bits=bits)
        assert report.notes == []
        assert_shared(model, tied)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_shared(loaded, tied)
        assert_same(loaded, model)
        assert torch.equal(logits(loaded), logits(model))
        dense = loaded.dequantize()
        assert type(dense.get_input_embeddings()) is kind
        gap = (logits(model) - logits(dense)).abs().max()
        assert gap <= 64 * torch.finfo(torch.float32).eps * logits(dense).abs().max()


class Normed(nn.Embedding):
    def forward(self, input):
        return nn.functional.normalize(super().forward(input), dim=-1)


class TestWhatStaysDense:
    def dense(self, model, **settings):
        return [
            name for name, module in self.matrices(quantize(model, **settings)[0]) if "D2Quant" not in repr(module)
        ]

    def matrices(self, model):
        return [("embedding", model.get_input_embeddings()), ("head", model.get_output_embeddings())]

    def test_none_are_packed_unless_asked_for(self, tokenizer, tied, tmp_path):
        model = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
        before = model.model.embed_tokens.weight.clone()
        assert self.dense(model, embedding_bits=None) == ["embedding", "head"]
        assert torch.equal(model.model.embed_tokens.weight, before)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same(loaded, model)
        assert loaded.config.quantization_config.embedding_bits is None

    @pytest.mark.parametrize(("name", "kept"), [("lm_head", ["head"]), ("embed_tokens", ["embedding"])])
    def test_those_that_are_named(self, tokenizer, tied, name, kept, tmp_path):
        model = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
        dense = self.dense(model, modules_to_not_convert=[name])
        assert dense == (["embedding", "head"] if tied else kept)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same(loaded, model)
        if not tied:
            full_name = "lm_head" if name == "lm_head" else "model.embed_tokens"
            assert loaded.config.quantization_config.modules_to_not_convert == [full_name]

    def test_embedding_that_does_more_than_look_up(self, tokenizer, tied):
        model = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
        model.model.embed_tokens.__class__ = Normed
        _, report = quantize(model)
        assert type(model.model.embed_tokens) is Normed
        assert isinstance(model.lm_head, D2QuantLinear) is not tied
        assert "model.embed_tokens stays in full precision: Normed does more than look up a row" in report.notes[0]
        assert len(report.notes) == (2 if tied else 1)  # a tied head stays, too

    def test_head_of_another_kind(self, tokenizer):
        model = build_model(tokenizer, seed=1)
        model.lm_head.__class__ = type("Special", (nn.Linear,), {})
        _, report = quantize(model)
        assert report.notes == [
            "lm_head stays in full precision: Special is no `torch.nn.Linear` or `torch.nn.Embedding`"
        ]

    def test_tied_head_with_a_bias(self, tokenizer):
        """Transformers would cut the bias to the length of the packed words when it ties them."""
        model = build_model(tokenizer, seed=1, tie_word_embeddings=True)
        model.lm_head.bias = nn.Parameter(torch.ones(model.lm_head.out_features))
        _, report = quantize(model)
        assert "has a bias" in report.notes[0] and len(report.notes) == 2

    def test_rows_shorter_than_a_group(self):
        sizes = {**SIZES, "vocab_size": 97, "num_hidden_layers": 1, "word_embed_proj_dim": 8, "ffn_dim": 64}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **sizes)).eval()
        _, report = quantize(model)
        assert "its rows have 8 channels, less than a group of 16" in report.notes[0]

    def test_model_that_reads_the_weight(self, tmp_path):
        """Mamba casts hidden states to the dtype of its head's weight: to integers, if that were packed."""
        sizes = {"hidden_size": 32, "vocab_size": 97, "num_hidden_layers": 2, "state_size": 8}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
        _, report = quantize(model)
        assert "lm_head stays in full precision: MambaForCausalLM reads its weight" in report.notes
        assert isinstance(model.get_input_embeddings(), nn.Embedding) and logits(model).isfinite().all()
        model.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("factor", [1e-12, 1e12])
    def test_scales_that_vanish_or_overflow(self, tokenizer, factor):
        model = build_model(tokenizer, seed=1)
        model.lm_head.weight.data *= factor
        with pytest.raises(ValueError, match="got 'float16' and `lm_head` with weights up to .*Use 'bfloat16'"):
            quantize(model)
        assert type(model.model.embed_tokens) is nn.Embedding  # nothing was changed
        quantize(model, modules_to_not_convert=["lm_head"])


class TestRounding:
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_chunks_of_rows_change_nothing(self, bits, monkeypatch):
        weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
        whole = round_rows(weight, config(embedding_bits=bits))
        monkeypatch.setattr("trl_gopd.d2quant.token_matrices.CHUNK_ROWS", 7)
        parts = round_rows(weight, config(embedding_bits=bits))
        for one, other in zip(vars(whole).values(), vars(parts).values(), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    def test_rows_of_zeros_stay_zero(self):
        weight = torch.randn(5, 32)
        weight[2] = 0
        for bits in (2, 3, 4, 8):
            assert not round_rows(weight, config(embedding_bits=bits)).dequantize()[2].any()

    @pytest.mark.parametrize("rounding", ["gptq", "gptaq"])
    def test_head_is_rounded_for_its_inputs(self, tokenizer, tied, rounding):
        """It loses less of its output than by rounding to nearest; an embedding of its own is rounded to nearest."""
        original = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
        with torch.no_grad():
            hidden = original.model(TOKENS).last_hidden_state
        errors, embeddings = [], []
        for settings in ({"rounding": "rtn"}, {"rounding": rounding}):
            model = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
            quantize(model, embedding_bits=3, **settings)
            difference = model.lm_head.dequantize() - original.lm_head.weight.data
            errors.append(float((hidden @ difference.T).square().mean()))
            embeddings.append(model.model.embed_tokens.dequantize())
        assert errors[1] < 0.9 * errors[0]
        assert torch.equal(*embeddings) is not tied

    def test_eight_bits_are_rounded_to_nearest(self, tokenizer, tied):
        matrices = []
        for rounding in ("rtn", "gptaq"):
            model = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
            quantize(model, embedding_bits=8, rounding=rounding)
            matrices.append(model.lm_head.dequantize())
        assert torch.equal(*matrices)

    def test_look_up_has_a_share_in_the_hessian_of_a_tied_matrix(self, tokenizer):
        """Without it, a channel that the head never reads would be 0 in the embedding."""
        model = build_model(tokenizer, seed=1, tie_word_embeddings=True)
        with torch.no_grad():
            model.model.norm.weight[5] = 0
        before = model.model.embed_tokens.weight[:, 5].clone()
        quantize(model, embedding_bits=4, rounding="gptq")
        after = model.model.embed_tokens.dequantize()[:, 5]
        assert (after - before).abs().max() < 0.5 * before.abs().max()

    def test_more_bits_come_closer(self, tokenizer, tied):
        original = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
        want, gaps = logits(original), []
        for bits in (2, 4, 8):
            model = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
            quantize(model, bits=8, embedding_bits=bits)
            gaps.append(float((logits(model) - want).square().mean()))
        assert gaps == sorted(gaps, reverse=True) and gaps[0] > 10 * gaps[2]


class TestCalibration:
    def test_quantized_stream_begins_at_the_packed_embedding(self, tokenizer, monkeypatch):
        model, streams = build_model(tokenizer, seed=1), []
        dense = copy.deepcopy(model.model.embed_tokens)
        original = pipeline.quantize_block

        def keep(block, calls, seen, settings):
            streams.append((seen.full[0].clone(), seen.quantized[0].clone(), seen.start[0].clone()))
            return original(block, calls, seen, settings)

        monkeypatch.setattr(pipeline, "quantize_block", keep)
        windows = TOKENS[:1]
        quantize(model, dataset=windows, num_samples=1, embedding_bits=2, tune_epochs=1)
        full, quantized, start = streams[0]
        assert torch.equal(full, dense(windows))
        assert torch.equal(quantized, model.model.embed_tokens(windows)) and torch.equal(start, quantized)
        assert not torch.equal(full, quantized)

    @pytest.mark.parametrize("tune_epochs", [0, 2])
    def test_eight_bits_leave_the_blocks_as_with_a_dense_embedding(self, tokenizer, tied, tune_epochs):
        states = []
        for bits in (None, 8):
            model = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
            quantize(model, embedding_bits=bits, tune_epochs=tune_epochs, rounding="gptaq")
            states.append({name: value for name, value in model.state_dict().items() if ".layers." in name})
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        assert isinstance(model.lm_head, D2QuantLinear)

    def test_first_loss_of_the_refinement_is_the_divergence_of_the_packed_model(self, tokenizer, tied):
        def build():
            return build_model(tokenizer, seed=1, tie_word_embeddings=tied)

        rounded, _ = quantize(build(), embedding_bits=2)
        _, report = quantize(build(), embedding_bits=2, tune_epochs=1, tune_learning_rate=1e-12)
        log_p, log_q = logits(build()).log_softmax(-1), logits(rounded).log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        # Products are in bfloat16 where the machine has instructions for it: 8 bits, in a mean over many tokens.
        assert report.refinement.training[0] == pytest.approx(float(expected), rel=1e-2)

    def test_refinement_leaves_both_as_they_are(self, tokenizer, tied):
        rounded, _ = quantize(build_model(tokenizer, seed=1, tie_word_embeddings=tied))
        tuned, _ = quantize(build_model(tokenizer, seed=1, tie_word_embeddings=tied), tune_epochs=2)
        assert_shared(tuned, tied)
        for name, tensor in rounded.state_dict().items():
            if "layers" not in name:
                assert torch.equal(tensor, tuned.state_dict()[name]), name

    def test_head_of_the_model_is_its_own_again(self, tokenizer, monkeypatch):
        model = build_model(tokenizer, seed=1)
        monkeypatch.setattr(refine, "_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(model, embedding_bits=4, tune_epochs=1)
        assert isinstance(model.lm_head, D2QuantLinear) and "forward" not in vars(model.lm_head)

    def test_interrupted_run_goes_on_to_the_same_bytes(self, tokenizer, tied, tmp_path, monkeypatch):
        def run(**settings):
            model = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
            return quantize(model, tune_epochs=1, rounding="gptaq", embedding_bits=3, **settings)[0]

        whole, original = run(), pipeline.quantize_block

        def killed(block, *arguments):
            if block.name.endswith("1"):
                raise KeyboardInterrupt
            return original(block, *arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipeline, "quantize_block", killed)
            run(work_dir=str(tmp_path))
        assert_same(run(work_dir=str(tmp_path)), whole)

    @pytest.mark.parametrize("rotation", ["full", "group"])
    def test_rotated_model(self, tokenizer, tied, rotation):
        """A rotation unties the head, so that both are packed."""
        original = build_model(tokenizer, seed=1, tie_word_embeddings=tied)
        model, _ = quantize(copy.deepcopy(original), bits=8, rotation=rotation)
        assert_shared(model, False)
        want = logits(original)
        assert (logits(model) - want).square().mean() < 1e-3 * want.square().mean()


class TestAdapters:
    def test_all_linears_of_peft_leave_the_head_out(self, model):
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        wrapped = {name.rpartition(".base_layer")[0] for name, _ in adapted.named_modules() if "base_layer" in name}
        assert len(wrapped) == 14 and not any("lm_head" in name or "embed" in name for name in wrapped)

    def test_adapter_on_the_embedding_learns(self, model, tied):
        want = logits(model)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
        assert torch.equal(logits(adapted), want)  # it begins at zero
        adapted(TOKENS, labels=TOKENS).loss.backward()
        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        assert sorted(name.split(".")[-2] for name in gradients) == ["lora_embedding_A", "lora_embedding_B"]
        assert any(gradient.abs().sum() > 0 for gradient in gradients.values())

    def test_training_the_head_whole_fails_loudly(self, model):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))

    def test_gradients_reach_the_first_block_under_checkpointing(self, model):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.train()
        adapted(TOKENS, labels=TOKENS).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
