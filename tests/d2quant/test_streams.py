"""
Streams: what a linear of a block reads is captured call by call, without a trace in the block, and what the model
passes to its blocks besides hidden states is passed on when they are run by themselves.
"""

import pytest
import torch
from torch import nn

from tests.d2quant.families import build
from tests.tiny import build_model
from trl_gopd.d2quant.streams import BlockCalls, Streams
from trl_gopd.d2quant.topology import find_topology


class Twice(nn.Module):
    """Calls one linear twice, and another one never."""

    def __init__(self):
        super().__init__()
        self.first, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden, scale, *, bias):
        return (self.first(self.first(hidden)) * scale + bias,)


class ToyDescription:
    name = "layers.0"

    def __init__(self):
        torch.manual_seed(0)
        self.module = Twice()

    def linear(self, name):
        return self.module.get_submodule(name)


@pytest.fixture
def block():
    return ToyDescription()


@pytest.fixture
def calls(block):
    return BlockCalls(None, block.module, {"layers.0": ((3.0,), {"bias": 2.0})})


class TestBlockCalls:
    @torch.no_grad()
    def test_run_passes_the_recorded_arguments(self, block, calls, generator):
        hidden, first = torch.randn(1, 5, 4, generator=generator), block.module.first
        assert torch.equal(calls.run(block, hidden), first(first(hidden)) * 3.0 + 2.0)

    @torch.no_grad()
    def test_all_calls_of_a_linear_are_captured(self, block, calls, generator):
        hidden, first = torch.randn(1, 5, 4, generator=generator), block.module.first
        captured, output = calls.run_and_capture(block, hidden, ["first", "unused"])
        assert list(captured) == ["first"]
        assert torch.equal(captured["first"], torch.cat([hidden[0], first(hidden)[0]]))
        assert torch.equal(output, calls.run(block, hidden))

    @torch.no_grad()
    def test_first_call_is_captured_and_ends_the_pass(self, block, calls, generator):
        hidden, ran = torch.randn(1, 5, 4, generator=generator), []
        block.module.first.register_forward_hook(lambda *arguments: ran.append(True))
        assert torch.equal(calls.capture_input(block, hidden, "first"), hidden[0])
        assert not ran
        assert calls.capture_input(block, hidden, "unused") is None
        assert len(ran) == 2

    def test_hooks_are_removed_after_an_error(self, block, calls):
        for capture in (calls.capture_input, lambda *args: calls.run_and_capture(*args[:2], [args[2]])):
            with pytest.raises(RuntimeError):
                capture(block, torch.ones(1, 5, 3), "unused")
            assert not block.module.unused._forward_pre_hooks

    @torch.no_grad()
    def test_blocks_run_by_themselves_are_the_model(self, tokenizer):
        model = build_model(tokenizer, seed=1)
        topology = find_topology(model)
        windows = torch.randint(0, 200, (3, 16), generator=torch.Generator().manual_seed(0))
        calls = BlockCalls.record(model, topology, windows)
        streams = Streams.before_first_block(calls, windows)
        assert streams.start is not streams.full and streams.full is not streams.quantized
        for window, hidden in zip(windows, streams.start, strict=True):
            expected = model.base_model(window[None], use_cache=False, output_hidden_states=True).hidden_states
            assert torch.equal(hidden, expected[0])
            first = calls.run(topology.blocks[0], hidden)
            assert torch.equal(first, expected[1])
            assert torch.equal(model.model.norm(calls.run(topology.blocks[1], first)), expected[2])
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("family", ["Gemma4 (text)", "Zamba2"])
    @torch.no_grad()
    def test_arguments_that_depend_on_tokens_are_those_of_the_window(self, family):
        model = build(family)
        topology = find_topology(model)
        windows = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(0))
        calls = BlockCalls.record(model, topology, windows)
        streams = Streams.before_first_block(calls, windows)
        for block in topology.blocks:
            calls.move(block, streams.full)
        norm = model.get_submodule(topology.final_norm)
        for window, hidden in zip(windows, streams.full, strict=True):
            assert torch.equal(norm(hidden), model.base_model(window[None], use_cache=False).last_hidden_state)
        with pytest.raises(AssertionError, match="of_window"):
            calls.run(topology.blocks[0], streams.start[0])

    @pytest.mark.parametrize("family", ["Llama", "Gemma3 (text)", "Gemma4 (text)"])
    def test_arguments_that_are_equal_for_all_windows_are_kept_once(self, family):
        windows = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(0))
        model = build(family)
        calls = BlockCalls.record(model, find_topology(model), windows)
        assert bool(calls.own) == (family == "Gemma4 (text)")
        of_windows = [kwargs for window in calls.own or [calls.arguments] for _, kwargs in window.values()]
        assert len({id(kwargs["position_ids"]) for kwargs in of_windows}) == 1
