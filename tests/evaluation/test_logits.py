"""
The head of a model, apart from its backbone, for families whose heads read more than hidden states; and laws of the
chunks in which logits are computed: their number of tokens follows from bytes.
"""

import pytest
import torch

from tests.d2quant.families import VOCABULARY, build
from trl_gopd.evaluation.logits import (
    ACCELERATOR_LOGITS_BYTES,
    CPU_LOGITS_BYTES,
    OutputHead,
    backbone,
    logits_in_chunks,
    tokens_per_chunk,
)


TOKENS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
EPS = torch.finfo(torch.float32).eps
# With image or audio features, caches, masks or router logits beside the hidden states.
FAMILIES = ["Gemma3 (vision)", "Mistral3", "Llava", "SmolVLM", "Idefics3", "PaliGemma", "Qwen2-Audio", "Llama4 (text)"]
FAMILIES += ["Mamba", "Mamba2", "FalconMamba", "Gemma4 (text)", "Mixtral", "OPT"]


class TestOutputHead:
    @pytest.mark.parametrize("family", FAMILIES)
    @torch.no_grad()
    def test_head_of_hidden_states_is_the_model(self, family):
        model = build(family)
        head, hidden = OutputHead(model), backbone(model)(input_ids=TOKENS, use_cache=False).last_hidden_state
        logits = model(input_ids=TOKENS, use_cache=False).logits
        assert logits.shape == (2, 7, VOCABULARY)
        assert torch.equal(head(hidden), logits)
        # A product over 32 numbers, in blocks that depend on the number of rows.
        tolerance = 32 * EPS * logits.abs().max().item()
        torch.testing.assert_close(head(hidden[:1, 3:5]), logits[:1, 3:5], rtol=0, atol=tolerance)
        chunks = torch.cat(list(logits_in_chunks(model, TOKENS, 5)))
        torch.testing.assert_close(chunks, logits[:, :-1].flatten(0, 1), rtol=0, atol=tolerance)

    def test_gradients_flow_to_the_hidden_states(self):
        hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        OutputHead(build("Gemma3 (vision)"))(hidden).sum().backward()
        assert hidden.grad.abs().min() > 0

    def test_model_without_a_backbone(self):
        with pytest.raises(TypeError, match="LlamaModel has none. Pass a causal"):
            OutputHead(build("Llama").model)


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
