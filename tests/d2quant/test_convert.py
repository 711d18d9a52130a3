"""A packed linear in the place of a dense one has its shape, dtype, bias, mode and accelerate's hook."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.convert import empty_packed, pack_linear, replace_module
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.rounding import round_weight


CONFIG = D2QuantConfig(bits=3, group_size=4, scale_dtype="bfloat16")


@pytest.fixture
def parent():
    torch.manual_seed(0)
    return nn.ModuleDict({"mlp": nn.ModuleDict({"down": nn.Linear(10, 6), "up": nn.Linear(10, 6, bias=False)})})


@pytest.mark.parametrize("name", ["down", "up"])
def test_empty_one_has_the_layout_of_a_packed_one(parent, name):
    linear = parent.mlp[name].double()
    weight = round_weight(linear.weight.detach(), bits=3, group_size=4, grid="midrise").weight
    for input_scale in (None, torch.ones(10)):
        packed = pack_linear(linear, weight, CONFIG, input_scale=input_scale)
        empty = empty_packed(linear, CONFIG, grid="midrise", bias=name == "down", input_scale=input_scale is not None)
        layouts = [{n: (p.shape, p.dtype) for n, p in m.state_dict().items()} for m in (packed, empty)]
        assert layouts[0] == layouts[1]
        empty.load_state_dict(packed.state_dict())
        assert torch.equal(empty.dequantize(), packed.dequantize())
        assert packed.weight_scale.dtype == torch.bfloat16
        if name == "down":
            assert torch.equal(packed.bias, linear.bias) and packed.bias.dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_hook_are_taken_over(parent, training):
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    linear = parent.mlp.down
    linear.train(training)
    packed = pack_linear(
        linear, round_weight(linear.weight.detach(), bits=3, group_size=4).weight, CONFIG, input_scale=None
    )
    x = torch.ones(1, 10)
    plain = packed(x)
    add_hook_to_module(linear, Doubling())
    replace_module(parent, "mlp.down", packed)
    assert isinstance(parent.mlp.down, D2QuantLinear)
    assert parent.mlp.down.training is training
    assert torch.equal(parent.mlp.down(x), 2 * plain)
