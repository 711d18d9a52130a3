"""
Laws of the packed embedding: a look-up gives the rows of the dense matrix, bit for bit, in the dtype and with the
scale of the embedding that it replaces; it unpacks only the rows that are asked for; it shares tensors with a head.
"""

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from trl_gopd.d2quant import embedding as embedding_module
from trl_gopd.d2quant.embedding import D2QuantEmbedding, look_up
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.rounding import round_weight


TOKENS, CHANNELS, GROUP = 97, 40, 16  # neither fills whole words, and the last group is shorter


def build(bits=4, *, scale_dtype=torch.float16, grid="affine", **options):
    torch.manual_seed(0)
    rounded = round_weight(torch.randn(TOKENS, CHANNELS), bits=bits, group_size=GROUP, grid=grid, iterations=1)
    linear = D2QuantLinear.from_quantized(rounded.weight, scale_dtype=scale_dtype)
    return D2QuantEmbedding(linear, **options), linear


class TestLookUp:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("grid", ["affine", "midrise"])
    def test_rows_are_those_of_the_dense_matrix(self, bits, grid):
        embedding, linear = build(bits, grid=grid)
        ids = torch.tensor([[0, 96, 31], [32, 5, 5]])
        assert torch.equal(embedding(ids), linear.dequantize()[ids])
        assert torch.equal(embedding.dequantize(), linear.dequantize())

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 4)])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
    def test_shapes(self, shape, dtype):
        embedding, linear = build()
        ids = torch.randint(0, TOKENS, shape, dtype=dtype)
        assert torch.equal(embedding(ids), linear.dequantize()[ids.long()])

    @pytest.mark.parametrize("wrong", [-1, TOKENS])
    def test_token_that_is_not_there(self, wrong):
        with pytest.raises(IndexError):
            build()[0](torch.tensor([wrong]))

    def test_only_the_rows_asked_for_are_unpacked(self, monkeypatch):
        unpacked, unpack_rows = [], embedding_module.unpack_rows

        def counted(words, bits, *arguments):
            unpacked.append(words.shape[0] * words.shape[1] * 32 // bits)
            return unpack_rows(words, bits, *arguments)

        monkeypatch.setattr(embedding_module, "unpack_rows", counted)
        build()[0](torch.tensor([7, 60]))
        # 64 codes for each row, padding included, and for each of its three groups a block of 32 zero points
        assert unpacked == [2 * 64, 2 * 3 * 32]

    def test_scales_in_float64_are_not_rounded(self):
        embedding, linear = build(scale_dtype=torch.float64)
        assert look_up(embedding.packed, torch.arange(3)).dtype == torch.float64

    def test_compiles_in_one_piece(self):
        embedding, _ = build()
        ids = torch.tensor([[3, 90]])
        compiled = torch.compile(copy.deepcopy(embedding), fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids), embedding(ids))


class TestModule:
    def test_shares_the_tensors_of_the_head(self):
        embedding, linear = build()
        for name in ("weight", "weight_scale", "weight_zero_point"):
            assert getattr(embedding, name) is getattr(linear, name)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [1.0, 5.6568])
    def test_computes_what_the_scaled_embedding_of_a_family_does(self, dtype, scale):
        embedding, linear = build(embed_scale=scale, dtype=dtype)
        dense = Gemma3TextScaledWordEmbedding(TOKENS, CHANNELS, 0, embed_scale=scale)
        dense.weight = nn.Parameter(linear.dequantize(dtype))
        ids = torch.arange(TOKENS)
        assert embedding(ids).dtype == dtype
        assert torch.equal(embedding(ids), dense(ids))

    def test_dtype_follows_a_cast_of_the_model(self):
        embedding, linear = build(embed_scale=3.0)
        embedding.embed_scale.data = embedding.embed_scale.to(torch.bfloat16)
        assert torch.equal(embedding(torch.tensor([1])), 3 * linear.dequantize(torch.bfloat16)[[1]])
        # transformers takes a model's dtype from its first floating-point parameter
        assert next(p for p in embedding.parameters() if p.is_floating_point()) is embedding.embed_scale

    def test_dense_again(self):
        embedding, linear = build(embed_scale=3.0)
        with torch.device("meta"):
            like = Gemma3TextScaledWordEmbedding(TOKENS, CHANNELS, 7, embed_scale=3.0)
        dense = embedding.to_dense(like)
        assert dense.padding_idx == 7 and not dense.weight.requires_grad
        assert torch.equal(dense.weight, linear.dequantize())
        assert torch.equal(dense(torch.arange(TOKENS)), embedding(torch.arange(TOKENS)))

    def test_nothing_requires_a_gradient(self):
        embedding, _ = build(padding_idx=3)
        assert embedding.padding_idx == 3
        assert not any(parameter.requires_grad for parameter in embedding.parameters())
        before = {name: tensor.clone() for name, tensor in embedding.state_dict().items()}
        embedding.reset_parameters()
        assert all(torch.equal(tensor, before[name]) for name, tensor in embedding.state_dict().items())

    def test_repr(self):
        assert repr(build()[0]) == "D2QuantEmbedding(97, 40, bits=4, group_size=16, grid=affine)"
