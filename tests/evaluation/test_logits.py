"""Laws of the chunks in which logits are computed: their number of tokens follows from bytes."""

import pytest

from trl_gopd.evaluation.logits import ACCELERATOR_LOGITS_BYTES, CPU_LOGITS_BYTES, tokens_per_chunk


class TestTokensPerChunk:
    @pytest.mark.parametrize("vocab_size", [1, 37, 49_152, 262_144])
    @pytest.mark.parametrize(("device", "budget"), [("cpu", CPU_LOGITS_BYTES), ("cuda:1", ACCELERATOR_LOGITS_BYTES)])
    def test_as_many_as_fit(self, vocab_size, device, budget):
        tokens = tokens_per_chunk(vocab_size, device)
        assert 4 * tokens * vocab_size <= budget < 4 * (tokens + 1) * vocab_size

    def test_one_at_least(self):
        assert tokens_per_chunk(CPU_LOGITS_BYTES) == 1

    def test_chunks_on_a_cpu_stay_below_what_glibc_maps_anew(self):
        assert CPU_LOGITS_BYTES < 32 * 2**20  # M_MMAP_THRESHOLD at most, on 64 bits
