"""
Laws of storage: bits per weight count every tensor that is stored, once; those of decoder blocks count every tensor of
their quantized linears and nothing else.
"""

import copy

import pytest
import torch
from torch import nn

from tests.tiny import build_model
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.evaluation import storage
from trl_gopd.evaluation.size import weight_file_bytes


class PackedLinear(nn.Linear):
    """A layer of 2 bits with float16 scales and 8-bit zero points in groups of 16, as any packed format has them."""

    def __init__(self, in_features, out_features, bias):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        groups = in_features // 16
        self.weight = nn.Parameter(torch.zeros(out_features, in_features * 2 // 32, dtype=torch.int32), False)
        self.weight_scale = nn.Parameter(torch.ones(out_features, groups, dtype=torch.float16), False)
        self.register_buffer("weight_zero_point", torch.zeros(out_features, groups, dtype=torch.uint8))
        self.register_buffer("scratch", torch.zeros(1000), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None


@pytest.fixture
def plain(tokenizer):
    return build_model(tokenizer, seed=1, tie_word_embeddings=True)  # hidden size 32, intermediate size 64


def packed(model, bias=False):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.up_proj = PackedLinear(32, 64, bias)
    return model


class TestBitsPerWeight:
    def test_counts_words_scales_and_zero_points(self, plain):
        result = storage(packed(plain))
        assert result.block_bits_per_weight == 2 + 16 / 16 + 8 / 16
        assert (result.quantized_layers, result.quantized_weights) == (2, 2 * 32 * 64)

    def test_counts_a_bias(self, plain):
        assert storage(packed(plain, bias=True)).block_bits_per_weight == 2 + 16 / 16 + 8 / 16 + 32 / 32

    def test_of_a_d2quant_layer(self):
        # 2 bits; in groups of 16, a float16 scale and a zero point of 2 bits
        layer = D2QuantLinear(32, 64, bits=2, group_size=16)
        assert storage(layer).block_bits_per_weight == 2 + 16 / 16 + 2 / 16

    def test_of_a_model_in_floats(self, plain):
        result = storage(plain.bfloat16())
        assert (result.bits_per_weight, result.block_bits_per_weight, result.quantized_layers) == (16, None, 0)
        assert storage(nn.Identity()).bits_per_weight is None

    def test_counts_what_is_not_quantized(self, plain):
        weights = plain.num_parameters()
        quantized = 2 * 32 * 64
        bits = 32 * (weights - quantized) + (2 + 16 / 16 + 8 / 16) * quantized
        assert storage(packed(plain)).bits_per_weight == pytest.approx(bits / weights, rel=1e-12)

    @pytest.mark.parametrize("tied", [True, False])
    def test_counts_embedding_and_head(self, tokenizer, tied):
        model = build_model(tokenizer, seed=1, hidden_size=64, tie_word_embeddings=tied)
        plain = storage(model)
        tokens = torch.arange(64).view(2, 32)
        settings = {"dataset": tokens, "num_samples": 2, "seq_length": 32, "tune_epochs": 0, "embedding_bits": 4}
        quantize_model(model, None, D2QuantConfig(2, 16, **settings))
        result = storage(model)
        matrices = 1 if tied else 2
        vocabulary = len(tokenizer)
        blocks = result.quantized_weights - matrices * vocabulary * 64
        assert result.quantized_layers == 14 + matrices
        assert result.quantized_weights + result.parameters_left == plain.parameters_left
        assert result.block_bits_per_weight == 2 + 16 / 16 + 2 / 16
        # four groups a row, with scales of 16 bits; zero points of 4 bits, padded to 32 tokens; a float for all rows
        bits = matrices * (vocabulary * 64 * 4 + 4 * (vocabulary * 16 + -(-vocabulary // 32) * 32 * 4)) + 32
        stored = bits + blocks * result.block_bits_per_weight + 32 * result.parameters_left
        assert result.bits_per_weight == pytest.approx(stored / plain.parameters_left, rel=1e-12)


class TestParametersLeft:
    def test_are_all_for_a_model_in_floats(self, plain):
        assert storage(plain).parameters_left == plain.num_parameters()  # which counts tied weights once

    def test_exclude_quantized_layers_with_their_biases(self, plain):
        left = plain.num_parameters() - 2 * 32 * 64
        assert storage(packed(plain)).parameters_left == storage(packed(plain, bias=True)).parameters_left == left


class TestFolder:
    def test_counts_weight_files_only(self, plain, tokenizer, tmp_path):
        plain.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        size = (tmp_path / "model.safetensors").stat().st_size
        assert storage(plain, tmp_path).file_bytes == size > 4 * plain.num_parameters()

    def test_adds_shards_and_old_files(self, tmp_path):
        for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "tokenizer.json"):
            (tmp_path / name).write_bytes(b"abc")
        assert weight_file_bytes(tmp_path) == 6

    def test_is_optional(self, plain):
        assert storage(plain).file_bytes is None

    def test_without_weights(self, tmp_path):
        with pytest.raises(ValueError, match=r"must hold weight files \(.safetensors, .bin\), got .*without"):
            weight_file_bytes(tmp_path)
