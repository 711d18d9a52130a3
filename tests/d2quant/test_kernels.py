"""
Products with a packed weight are those with the dense one, forward and backward, for every grid, width and dtype; what
is kept for the backward pass is packed; and the compiled kernel is used where it may be, and equals the others.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.d2quant.test_linear import every_part, random_weight
from trl_gopd.d2quant import kernels
from trl_gopd.d2quant.grids import GRIDS
from trl_gopd.d2quant.kernels import enable_compiled
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.packing import BITS


EPS = torch.finfo(torch.float32).eps
LOW_PRECISION = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def slices_of_five_rows(monkeypatch):
    """33 rows are then 7 slices, the last of three."""
    monkeypatch.setattr(kernels, "_SLICE", 5 * 37 + 36)


@pytest.fixture
def x(generator):
    return torch.randn(2, 3, 37, generator=generator)


def packed_layer(bits=3, grid="affine", *, bias=True, **options):
    scale_dtype = options.pop("scale_dtype", torch.float16)
    weight = random_weight(bits, grid, **options)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(len(weight.codes), generator=generator) if bias else None
    return D2QuantLinear.from_quantized(weight, bias=bias, scale_dtype=scale_dtype)


def rounding(x, weight, terms):
    """Bound on the rounding of sums of `terms` products of `x` and `weight`, in float32."""
    return terms * EPS * (x.abs() @ weight.abs().T).max().item()


class TestForward:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("grid", GRIDS)
    def test_is_that_of_the_dense_layer(self, bits, grid, x):
        layer = packed_layer(bits, grid)
        dense = layer.to_dense()
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=rounding(x, dense.weight, 37 + 1))

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    @pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
    def test_low_precision_is_as_good_as_dense(self, dtype, scale_dtype, x):
        layer, x = packed_layer(scale_dtype=scale_dtype), x.to(dtype)
        exact = F.linear(x.double(), layer.dequantize(dtype).double(), layer.bias.to(dtype).double())
        y = layer(x)
        assert y.dtype == dtype
        error = (layer.to_dense(dtype)(x) - exact).abs().max()
        assert (y - exact).abs().max() <= 2 * error

    @pytest.mark.parametrize("shape", [(37,), (1, 37), (0, 37), (2, 0, 37), (2, 1, 3, 37)])
    def test_keeps_leading_axes(self, shape, generator):
        layer = packed_layer()
        x = torch.randn(shape, generator=generator)
        assert torch.equal(layer(x), layer(x.reshape(-1, 37)).view(*shape[:-1], 33))

    def test_without_bias(self, x):
        layer = packed_layer(bias=False)
        weight = layer.dequantize()
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=rounding(x, weight, 37))

    def test_scale_of_inputs_is_in_the_dense_layer(self, x):
        layer = every_part()
        dense = layer.to_dense()
        # One more rounding of each input here, and of each weight there.
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=rounding(x, dense.weight, 37 + 3))

    def test_autocast_is_that_of_a_linear_layer(self, x):
        layer = packed_layer()
        with torch.autocast("cpu", torch.bfloat16):
            y, reference = layer(x), layer.to_dense()(x)
        assert y.dtype == reference.dtype == torch.bfloat16
        assert torch.equal(y, layer(x.bfloat16()))

    def test_upcast_scales_change_nothing(self, x):
        layer = packed_layer()
        y = layer(x.bfloat16())
        for parameter in layer.parameters():  # what `prepare_model_for_kbit_training` does
            if parameter.dtype in LOW_PRECISION:
                parameter.data = parameter.data.float()
        assert torch.equal(layer(x.bfloat16()), y)

    def test_wrong_width_of_inputs_fails(self):
        with pytest.raises(RuntimeError, match="36"):
            packed_layer()(torch.zeros(2, 36))

    @pytest.mark.parametrize("grid", GRIDS)
    def test_whole_graph_compiles(self, grid, x):
        layer = packed_layer(grid=grid)
        x.requires_grad_()
        y = layer(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        dense = layer.dequantize()
        torch.testing.assert_close(compiled(x), y, rtol=0, atol=rounding(x, dense, 37 + 1))
        (compiled_grad,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(compiled_grad, grad, rtol=0, atol=33 * EPS * dense.abs().sum(0).max().item())


class TestBackward:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("bits", [2, 3])
    def test_gradients_are_right(self, bits, grid, generator, monkeypatch):
        shape = {"out_features": 7, "in_features": 11, "group_size": 4}  # groups of 4, 4 and 3 columns
        layer = packed_layer(bits, grid, **shape, scale_dtype=torch.float64, dtype=torch.float64).double()
        monkeypatch.setattr(kernels, "_SLICE", 3 * 11)
        x = torch.randn(3, 11, generator=generator, dtype=torch.float64, requires_grad=True)
        tensors = x, layer.bias.requires_grad_(), layer.weight_scale.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, *_: layer(x), tensors)

    @pytest.mark.parametrize("grid", GRIDS)
    def test_gradients_are_those_of_the_dense_weight(self, grid, x):
        layer = packed_layer(grid=grid, scale_dtype=torch.float32)
        x.requires_grad_(), layer.bias.requires_grad_(), layer.weight_scale.requires_grad_()
        layer(x).square().sum().backward()

        other = x.detach().clone().requires_grad_()
        unpacked = layer.unpack()
        scales, bias = unpacked.scales.detach().requires_grad_(), layer.bias.detach().clone().requires_grad_()
        weight = type(unpacked)(**{**vars(unpacked), "scales": scales}).dequantize()
        F.linear(other, weight, bias).square().sum().backward()
        for ours, dense in (
            (x.grad, other.grad),
            (layer.bias.grad, bias.grad),
            (layer.weight_scale.grad.view(-1, 8, 33), scales.grad.mT),
        ):
            # Two products with 33 and 37 terms; sums of six rows and of groups of five columns on top.
            torch.testing.assert_close(ours, dense, rtol=0, atol=(33 + 37 + 11) * EPS * dense.abs().max().item())

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision_is_as_good_as_dense(self, dtype, x, generator):
        layer = packed_layer()
        grad = torch.randn(2, 3, 33, generator=generator).to(dtype)
        x = x.to(dtype).requires_grad_()
        (ours,) = torch.autograd.grad(layer(x), x, grad)
        (plain,) = torch.autograd.grad(layer.to_dense(dtype)(x), x, grad)
        exact = grad.double() @ layer.dequantize(dtype).double()
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()

    @pytest.mark.parametrize("trained", [(), ("bias",), ("bias", "weight_scale")])
    def test_keeps_only_what_is_there_anyway(self, trained, x):
        layer = packed_layer()
        for name in trained:
            getattr(layer, name).requires_grad_()
        x.requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            y = layer(x)
        there = [layer.weight, layer.weight_scale, layer.weight_zero_point]
        if "weight_scale" in trained:
            there.append(x)
        assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in there}
        y.sum().backward()
        assert x.grad is not None
        assert all(getattr(layer, name).grad is not None for name in trained)

    def test_nothing_is_kept_without_a_gradient(self, x):
        layer = packed_layer()
        assert layer(x).grad_fn is None
        with torch.no_grad():
            assert layer(x.requires_grad_()).grad_fn is None

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_changes_nothing(self, use_reentrant, x):
        first, second = packed_layer(out_features=37), packed_layer(2)
        x.requires_grad_()
        (expected,) = torch.autograd.grad(second(first(x)).square().sum(), x)
        checkpoint(lambda x: second(first(x)), x, use_reentrant=use_reentrant).square().sum().backward()
        assert torch.equal(x.grad, expected)

    def test_autocast_reaches_the_input(self, x):
        layer = packed_layer()
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        low = x.detach().bfloat16().requires_grad_()
        layer(low).sum().backward()
        assert x.grad.dtype == torch.float32
        assert torch.equal(x.grad, low.grad.float())


class TestEnableCompiled:
    LAYER = {"in_features": 192, "group_size": 64, "out_features": 33}

    @pytest.fixture(autouse=True)
    def on(self):
        enable_compiled()
        yield
        enable_compiled(False)

    @pytest.fixture
    def calls(self, monkeypatch):
        """The kernels run as they are, uncompiled, and the numbers of outputs of their calls are collected."""
        calls = []

        def uncompiled(function, **_):
            def counted(x, words, *others):
                calls.append(words.shape[1])
                return function(x, words, *others)

            return counted

        monkeypatch.setattr(torch, "compile", uncompiled)
        return calls

    @pytest.mark.parametrize("grid", ["affine", "midrise"])
    @pytest.mark.parametrize("bits", BITS)
    def test_is_the_dense_product(self, bits, grid, calls, generator):
        layer = packed_layer(bits, grid, **self.LAYER)
        x = torch.randn(2, 1, 192, generator=generator)
        y, dense = layer(x), layer.to_dense()
        assert len(calls) == 2
        # Codes and zero points are summed apart, so the bound is that of weights as large as their codes.
        largest = layer.weight_scale.abs().max() * 2**bits
        atol = (192 + 3) * EPS * largest * x.abs().sum(-1).max()
        torch.testing.assert_close(y, dense(x), rtol=0, atol=float(atol))

    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision_is_as_good_as_dense(self, dtype, calls, generator):
        layer = packed_layer(**self.LAYER)
        x = torch.randn(1, 192, generator=generator).to(dtype)
        exact = F.linear(x.double(), layer.dequantize().double(), layer.bias.double())
        y = layer(x)
        assert (y.dtype, len(calls)) == (dtype, 1)
        assert (y - exact).abs().max() <= 2 * (layer.to_dense(dtype)(x) - exact).abs().max()

    def test_is_for_few_rows_without_gradient(self, calls):
        layer = packed_layer(**self.LAYER)
        x = torch.ones(5, 192)
        layer(x)
        layer(x[:0])
        layer(x[:1].double())
        layer(x[:1].clone().requires_grad_())
        layer.bias.requires_grad_()
        layer(x[:1])
        assert calls == []
        with torch.no_grad():
            y = layer(x[:4])
        assert calls == [33] * 4
        assert not y.requires_grad

    def test_output_made_in_inference_mode_may_be_trained_on(self, calls):
        with torch.inference_mode():
            y = packed_layer(**self.LAYER)(torch.ones(1, 192))
        assert calls == [33]
        assert not y.is_inference()

    @pytest.mark.parametrize("options", [{"grid": "bitplane"}, {"group_size": 48}, {"group_size": 128}])
    def test_other_layers_are_not_affected(self, options, calls):
        layer = packed_layer(**{**self.LAYER, **options})
        x = torch.ones(1, 192)
        y = layer(x)
        assert calls == []
        enable_compiled(False)
        assert torch.equal(layer(x), y)

    def test_wrong_width_of_inputs_leaves_it_on(self, calls):
        with pytest.raises(RuntimeError, match="128"):
            packed_layer(**self.LAYER)(torch.ones(1, 128))
        assert calls == []
        packed_layer(**self.LAYER)(torch.ones(1, 192))
        assert calls == [33]

    def test_is_off_unless_asked_for(self, calls):
        enable_compiled(False)
        packed_layer(**self.LAYER)(torch.ones(1, 192))
        assert calls == []

    def test_without_a_compiler_warns_once(self, monkeypatch, caplog):
        def fails(*_):
            raise RuntimeError("no C++ compiler")

        monkeypatch.setattr(torch, "compile", lambda function, **_: fails)
        layer = packed_layer(**self.LAYER)
        x = torch.ones(1, 192)
        with caplog.at_level(logging.WARNING, kernels.__name__):
            outputs = layer(x), layer(x)
        assert [record.getMessage() for record in caplog.records] == [
            "The kernel cannot be compiled, and stays off: no C++ compiler"
        ]
        enable_compiled(False)
        assert all(torch.equal(y, layer(x)) for y in outputs)

    @pytest.mark.slow
    def test_one_kernel_serves_all_shapes(self, generator):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        for in_features, out_features in ((192, 33), (256, 64), (512, 96)):
            layer = packed_layer(in_features=in_features, out_features=out_features, group_size=64)
            dense = layer.to_dense()
            x = torch.randn(2, in_features, generator=generator)
            largest = layer.weight_scale.abs().max() * 2**3
            atol = (in_features + 3) * EPS * largest * x.abs().sum(-1).max()
            with torch.autocast("cpu", torch.bfloat16):
                layer(x)
            with torch.inference_mode(out_features == 64):
                y = layer(x)
            torch.testing.assert_close(y, dense(x), rtol=0, atol=float(atol))
        assert kernels._compiled, "it fell back"
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
