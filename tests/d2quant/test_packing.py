"""
Packed codes: unpacking undoes packing at every width and for sizes that divide nothing, and the words are those that
GPTQ (v2) and AutoRound checkpoints hold.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gopd.d2quant.packing import BITS, pack, unpack, unpack_rows


@st.composite
def matrices(draw):
    bits = draw(st.sampled_from(BITS))
    shape = draw(st.integers(0, 70)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8), bits


class TestPack:
    @settings(derandomize=True, deadline=None)
    @given(matrices())
    def test_unpack_undoes_it(self, matrix):
        codes, bits = matrix
        words = pack(codes, bits)
        assert (words.dtype, words.shape) == (torch.int32, (-(-codes.shape[0] // 32) * bits, codes.shape[1]))
        unpacked = unpack(words, bits, codes.shape[0])
        assert unpacked.dtype == torch.uint8
        assert torch.equal(unpacked, codes)

    @settings(derandomize=True, deadline=None)
    @given(matrices())
    def test_words_are_the_little_endian_bit_stream(self, matrix):
        codes, bits = matrix
        words = pack(codes, bits)
        for column, stored in zip(codes.T.tolist(), words.T.tolist(), strict=True):
            stream = sum(code << bits * position for position, code in enumerate(column))
            assert sum((word & 0xFFFFFFFF) << 32 * position for position, word in enumerate(stored)) == stream

    def test_three_bits_straddle_words(self):
        codes = torch.zeros(33, 2, dtype=torch.uint8)
        codes[10, 0] = 0b101  # bits 30, 31 of word 0 and bit 0 of word 1
        codes[21, 1] = 0b110  # bit 31 of word 1 and bits 0, 1 of word 2
        codes[32, 1] = 0b011  # the 33rd code starts word 3
        words = [[0b01 << 30, 0], [0b1, 0], [0, 0b11], [0, 0b011], [0, 0], [0, 0]]
        assert pack(codes, 3).tolist() == words

    def test_sign_bit_belongs_to_a_code(self):
        codes = torch.zeros(32, 1, dtype=torch.uint8)
        codes[15] = 0b11  # bits 30, 31 of word 0 at two bits
        assert pack(codes, 2).tolist() == [[-(2**30)], [0]]

    @pytest.mark.parametrize("bits", [1, 5, 16])
    def test_other_widths_are_named(self, bits):
        with pytest.raises(ValueError, match=rf"`bits` must be one of \(2, 3, 4, 8\), got {bits}"):
            pack(torch.zeros(1, 1, dtype=torch.uint8), bits)
        with pytest.raises(ValueError, match=rf"got {bits}"):
            unpack(torch.zeros(1, 1, dtype=torch.int32), bits, 1)

    @pytest.mark.parametrize("codes", [torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2).byte()])
    def test_other_codes_are_named(self, codes):
        with pytest.raises(ValueError, match=f"uint8 with two axes, got {codes.dtype} with {codes.dim()}"):
            pack(codes, 2)

    def test_code_out_of_range_is_named(self):
        with pytest.raises(ValueError, match="below 2\\^3 = 8, got 8. Use more bits"):
            pack(torch.tensor([[7], [8]], dtype=torch.uint8), 3)


class TestUnpack:
    @pytest.mark.parametrize("words", [torch.zeros(2, 1), torch.zeros(3, 1).int(), torch.zeros(2).int()])
    def test_words_of_another_size_are_named(self, words):
        with pytest.raises(ValueError, match=r"of 20 codes must be int32 with two axes, the first of 2, got torch"):
            unpack(words, 2, 20)


class TestUnpackRows:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
    def test_is_unpack_along_the_other_axis(self, bits, dtype, generator):
        words = torch.randint(-(2**31), 2**31, (5, 2 * bits), generator=generator, dtype=torch.int64).int()
        codes = unpack_rows(words, bits, dtype)
        assert codes.dtype == dtype
        assert torch.equal(codes, unpack(words.T.contiguous(), bits, 64).T.to(dtype))

    @pytest.mark.parametrize("rows", [slice(0, 0), slice(4, 5), slice(1, 4)])
    def test_takes_views(self, rows, generator):
        words = torch.randint(-(2**31), 2**31, (6, 5), generator=generator, dtype=torch.int64).int()
        assert torch.equal(unpack_rows(words[:, rows].T, 3), unpack(words, 3, 64).T[rows])
