"""
Families whose blocks depend on each other by more than hidden states are refused. That others are not is seen in
`test_families`.
"""

import pytest
import torch
from torch import nn

from tests.d2quant.families import build
from trl_gopd.d2quant.flow import check_flow, check_head
from trl_gopd.d2quant.topology import find_topology


REFUSED = {
    "Gemma3n (text)": r"Gemma3nForCausalLM.*`model.layers.0` must be given hidden states .* is given \(\d, 1, 4, 32\)",
    "Gemma4 (shared keys)": r"Gemma4ForCausalLM.*`model.layers.[1-3]` .* in its argument `shared_kv_states",
    "Zamba2 (shared blocks)": r"Zamba2ForCausalLM.*`model.layers.2` shares `shared_.* with `model.layers.0`",
}


class Changed(nn.Module):
    """A block in a model that does something to hidden states or arguments around it."""

    def __init__(self, block, change):
        super().__init__()
        self.block, self.change = block, change

    def forward(self, hidden_states, *args, **kwargs):
        return self.change(self.block, hidden_states, *args, **kwargs)


class TestCheckFlow:
    @pytest.mark.parametrize("family", REFUSED)
    def test_refuses_a_family(self, family):
        with pytest.raises(ValueError, match=REFUSED[family] + ".*another family"):
            check_flow(build(family))

    def test_hidden_states_that_change_on_their_way(self):
        model = build("Llama")
        model.model.layers[1].register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] * 1.01, *args[1:]), kwargs), with_kwargs=True, prepend=True
        )
        with pytest.raises(ValueError, match=r"`model.layers.1` must be given what `model.layers.0` returns"):
            check_flow(model)

    def test_block_that_remembers(self):
        model, seen = build("Llama"), []

        def remember(block, hidden_states, *args, **kwargs):
            seen.append(1)
            return block(hidden_states, *args, **kwargs) + len(seen)

        model.model.layers[0] = Changed(model.model.layers[0], remember)
        with pytest.raises(ValueError, match=r"`model.layers.0` must return the same when it runs by itself"):
            check_flow(model)

    def test_block_that_runs_twice(self):
        model = build("Llama")
        model.model.layers[1] = model.model.layers[0]
        with pytest.raises(ValueError, match=r"blocks must not share parameters"):
            check_flow(model)

    def test_leaves_no_trace(self):
        model = build("Gemma4 (text)").train()
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        check_flow(model)
        assert all(module.training and not module._forward_hooks for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


class TestCheckHead:
    def test_accepts_a_base_model(self):
        model = build("Llama").model
        check_head(model, find_topology(model))

    def test_projection_behind_the_last_block(self):
        model = build("OPT", word_embed_proj_dim=16)
        with pytest.raises(ValueError, match=r"OPTForCausalLM.*`final_layer_norm` alone.*`tune_epochs=0`"):
            check_head(model, find_topology(model))

    def test_head_that_reads_more_than_the_last_hidden_states(self):
        model = build("Llama")
        handle = model.lm_head.register_forward_hook(lambda module, args, output: output.tanh())
        check_head(model, find_topology(model))
        handle.remove()
        model.lm_head.register_forward_hook(lambda module, args, output: output + args[0].shape[1])
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.*logits.*`tune_epochs=0`"):
            check_head(model, find_topology(model))
