"""
The packed layer: its dense weight is that of the quantized weight with rounded scales, for every grid and width; it
survives copies, checkpoints and casts; it cannot be taken for a dense layer; and adapters train on top of it.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.tiny import build_model
from trl_gopd.d2quant.grids import GRIDS, QuantizedWeight
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.packing import BITS


def random_weight(bits, grid="affine", *, out_features=33, in_features=37, group_size=5, seed=0, dtype=torch.float32):
    """Random codes, scales and zero points: 33 rows, and 37 columns in 7 groups of five and one of two."""
    generator = torch.Generator().manual_seed(seed)
    groups, planes = -(-in_features // group_size), bits if grid == "bitplane" else 1
    zero_points = torch.randint(2**bits, (out_features, groups), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(
        codes=torch.randint(2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scales=torch.randn(planes, out_features, groups, generator=generator).to(dtype) / 2**bits,
        zero_points=zero_points if grid == "affine" else None,
        bits=bits,
        group_size=group_size,
        grid=grid,
    )


def every_part(**options):
    """A layer with all the tensors it can have."""
    weight = random_weight(3, **options)
    return D2QuantLinear.from_quantized(weight, bias=torch.randn(33), input_scale=torch.rand(37) + 0.5)


def same(first, second):
    """Whether two layers have equal settings, and tensors of equal dtype and value."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return repr(first) == repr(second) and all(
        name == other and value.dtype == copied.dtype and torch.equal(value, copied)
        for (name, value), (other, copied) in pairs
    )


class TestFromQuantized:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_unpack_returns_it_with_rounded_scales(self, bits, grid, scale_dtype):
        weight = random_weight(bits, grid)
        unpacked = D2QuantLinear.from_quantized(weight, scale_dtype=scale_dtype).unpack()
        assert torch.equal(unpacked.codes, weight.codes)
        assert torch.equal(unpacked.scales, weight.scales.to(scale_dtype).float())
        if grid == "affine":
            assert torch.equal(unpacked.zero_points, weight.zero_points)
        assert (unpacked.bits, unpacked.group_size, unpacked.grid) == (bits, 5, grid)

    def test_layout_is_that_of_gptq(self):
        weight = QuantizedWeight(
            codes=torch.tensor([[1, 2, 3], [3, 0, 1]], dtype=torch.uint8),
            scales=torch.tensor([[[0.5, 1.0], [2.0, 4.0]]]),
            zero_points=torch.tensor([[1, 3], [2, 0]], dtype=torch.uint8),
            bits=2,
            group_size=2,
            grid="affine",
        )
        layer = D2QuantLinear.from_quantized(weight)
        assert layer.weight.tolist() == [[0b11_10_01, 0b01_00_11], [0, 0]]
        assert layer.weight_scale.tolist() == [[0.5, 2.0], [1.0, 4.0]]
        assert layer.weight_zero_point.tolist() == [[0b10_01, 0], [0b00_11, 0]]
        assert layer.dequantize().tolist() == [[0.0, 0.5, 0.0], [2.0, -4.0, 4.0]]

    def test_size_is_that_of_codes_scales_and_zero_points(self):
        layer = D2QuantLinear.from_quantized(random_weight(2, out_features=64, in_features=256, group_size=128))
        bits = 8 * sum(parameter.nbytes for parameter in layer.parameters())
        assert bits / (64 * 256) == 2 + (16 + 2) / 128

    @pytest.mark.parametrize("value", [7e4, -7e4, float("inf"), float("nan")])
    def test_scale_that_is_not_finite_is_named(self, value):
        weight = random_weight(2)
        weight.scales[0, 3, 2] = value
        with pytest.raises(ValueError, match=f"finite in `scale_dtype` torch.float16, got {value:g}"):
            D2QuantLinear.from_quantized(weight)

    def test_wider_scale_dtype_holds_it(self):
        weight = random_weight(2)
        weight.scales[0, 3, 2] = 2.0**17
        assert D2QuantLinear.from_quantized(weight, scale_dtype=torch.bfloat16).weight_scale[2, 3] == 2.0**17

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"bias": torch.zeros(1)}, r"`bias` of D2QuantLinear.* must be \(33,\), got \(1,\)"),
            ({"input_scale": torch.ones(33)}, r"`input_scale` of .* must be \(37,\), got \(33,\)"),
            ({"scale_dtype": torch.int8}, r"`scale_dtype` must be a floating-point dtype, got torch.int8"),
        ],
    )
    def test_wrong_option_is_named(self, options, complaint):
        with pytest.raises(ValueError, match=complaint):
            D2QuantLinear.from_quantized(random_weight(2), **options)

    def test_missing_zero_points_are_named(self):
        weight = random_weight(2, "midrise")
        with pytest.raises(ValueError, match=r"`weight_zero_point` of .* got None"):
            D2QuantLinear.from_quantized(QuantizedWeight(**{**vars(weight), "grid": "affine"}))


class TestD2QuantLinear:
    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"bits": 5}, "`bits` must be one of .* got 5"),
            ({"group_size": 0}, "`group_size` must be at least 1, got 0"),
            ({"grid": "nf4"}, "`grid` must be one of .* got 'nf4'"),
        ],
    )
    def test_wrong_setting_is_named(self, options, complaint):
        with pytest.raises(ValueError, match=complaint):
            D2QuantLinear(8, 8, **{"bits": 2, "group_size": 4, **options})

    @pytest.mark.parametrize("grid", GRIDS)
    def test_checkpoint_fills_an_empty_layer(self, grid):
        layer = every_part(grid=grid)
        with torch.device("meta"):
            empty = D2QuantLinear(37, 33, bits=3, group_size=5, grid=grid, bias=True, input_scale=True)
        assert list(empty.state_dict()) == list(layer.state_dict())
        empty.load_state_dict(layer.state_dict(), assign=True)
        assert same(empty, layer)

    def test_nothing_requires_a_gradient(self):
        assert not any(parameter.requires_grad for parameter in every_part().parameters())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copy_is_equal_and_apart(self, copied):
        layer = every_part()
        twin = copied(layer)
        assert same(twin, layer)
        twin.weight.data.zero_()
        assert not same(twin, layer)

    def test_cast_changes_the_bias_alone(self):
        layer = every_part()
        dtypes = {name: value.dtype for name, value in copy.deepcopy(layer).to(torch.bfloat16).state_dict().items()}
        assert dtypes == {
            "weight": torch.int32,
            "weight_scale": torch.float16,
            "weight_zero_point": torch.int32,
            "bias": torch.bfloat16,
            "input_scale": torch.float16,
        }

    def test_initialization_leaves_values(self, tokenizer):
        model = build_model(tokenizer, seed=0)
        layer = D2QuantLinear.from_quantized(random_weight(2, out_features=64, in_features=32), bias=torch.ones(64))
        before = copy.deepcopy(layer)
        model.model.layers[0].mlp.up_proj = layer
        model.initialize_weights()
        layer.reset_parameters()
        assert same(layer, before)

    def test_repr_names_its_settings(self):
        assert repr(every_part()) == (
            "D2QuantLinear(in_features=37, out_features=33, bits=3, group_size=5, grid=affine, bias=True, "
            "input_scale=True)"
        )


class TestDequantize:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("group_size", [1, 5, 37, 128])
    def test_is_the_quantized_weight_with_rounded_scales(self, bits, grid, group_size):
        layer = D2QuantLinear.from_quantized(random_weight(bits, grid, group_size=group_size))
        expected = layer.unpack().dequantize()
        # One product, and the sums of planes in the same order: nothing to round differently.
        assert torch.equal(layer.dequantize(), expected)
        assert torch.equal(layer.dequantize(torch.bfloat16), expected.bfloat16())

    def test_scale_of_inputs_is_in_the_columns(self):
        layer = every_part()
        expected = layer.unpack().dequantize() * layer.input_scale.float()
        assert torch.equal(layer.dequantize(), expected)
        assert torch.equal(layer.dequantize(torch.bfloat16), expected.bfloat16())

    def test_does_not_depend_on_the_dtype_of_equal_scales(self):
        layer = D2QuantLinear.from_quantized(random_weight(3))
        wide = copy.deepcopy(layer).float()
        assert torch.equal(wide.dequantize(torch.bfloat16), layer.dequantize(torch.bfloat16))


class TestToDense:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_is_a_plain_frozen_layer(self, dtype):
        layer = every_part().eval()
        dense = layer.to_dense(dtype)
        assert (type(dense), dense.training) == (nn.Linear, False)
        assert torch.equal(dense.weight, layer.dequantize(dtype))
        assert torch.equal(dense.bias, layer.bias.to(dtype or torch.float32))
        assert dense.bias.data_ptr() != layer.bias.data_ptr()
        assert not any(parameter.requires_grad for parameter in dense.parameters())

    def test_without_bias(self):
        assert D2QuantLinear.from_quantized(random_weight(2)).to_dense().bias is None


class TestAdapter:
    @pytest.fixture
    def model(self, tokenizer):
        model = build_model(tokenizer, seed=0)
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        weight = random_weight(
                            2, out_features=child.out_features, in_features=child.in_features, group_size=24
                        )
                        setattr(parent, name, D2QuantLinear.from_quantized(weight))
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))

    def test_it_trains_and_the_base_stays(self, model):
        base = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
        adapters = [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), nn.Linear)]
        assert len(adapters) == 14
        assert all(isinstance(module.base_layer, D2QuantLinear) for module in adapters)
        ids = torch.arange(3, 43).view(4, 10)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        assert all((module.lora_B["default"].weight != 0).any() for module in adapters)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())

    def test_merging_fails(self, model):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="cannot be merged into packed weights.* `model.dequantize"):
            model.merge_and_unload()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_it_merges_into_the_dense_layer(self, model):
        for module in model.modules():
            if hasattr(module, "lora_B"):
                nn.init.normal_(module.lora_B["default"].weight, std=0.1)
        ids = torch.arange(3, 13)[None]
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            for module in list(model.modules()):
                if hasattr(module, "lora_B"):
                    module.base_layer = module.base_layer.to_dense()
            merged = model.merge_and_unload()(input_ids=ids).logits
        # Two blocks of seven layers, whose longest sum has 64 terms.
        tolerance = 14 * 64 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert F.l1_loss(merged, expected, reduction="none").max() < tolerance
