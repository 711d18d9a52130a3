"""The head of a model, apart from its backbone, for families whose heads read more than hidden states."""

import pytest
import torch

from tests.d2quant.families import VOCABULARY, build
from trl_gopd.evaluation.logits import OutputHead, backbone, logits_in_chunks


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
