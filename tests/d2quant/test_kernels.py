"""
Products with a packed weight are those with the dense one, forward and backward, for every grid, width and dtype; what
is kept for the backward pass is packed; and machine code is used where it may be, and equals what torch computes.
"""

import hashlib
import logging
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.d2quant.test_linear import every_part, random_weight
from trl_gopd.d2quant import kernels
from trl_gopd.d2quant.grids import GRIDS
from trl_gopd.d2quant.kernels import native
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


def bound(x, layer, terms):
    """Bound on the rounding where codes and zero points are summed apart: that of weights as large as their codes."""
    largest = layer.weight_scale.abs().max().item() * 2**layer.bits
    return (terms + 3) * EPS * largest * x.abs().sum(-1).max().item()


@pytest.fixture
def without_native(monkeypatch):
    """A function that computes something with torch alone."""

    def compute(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native.Settings, "enabled", False)
            return function(*args)

    return compute


@pytest.fixture
def calls(monkeypatch):
    """Which functions of the machine code were used."""
    calls = []
    for name in ("products", "slices"):
        original = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))[1]
        )
    return calls


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="needs a C++ compiler"
)


@needs_compiler
class TestNative:
    LAYER = {"in_features": 192, "group_size": 64, "out_features": 150}  # 150 are nine vectors of 16, and six
    SHAPES = [
        LAYER,
        {
            "in_features": 200,
            "group_size": 96,
            "out_features": 33,
        },  # a shorter last group, and a block of eight columns
        {"in_features": 45, "group_size": 45, "out_features": 16},  # one group
        {"in_features": 45, "group_size": 128, "out_features": 5},
        {"in_features": 64, "group_size": 32, "out_features": 300},  # more than one tile
    ]

    @pytest.fixture(autouse=True)
    def small_slices(self, monkeypatch):
        monkeypatch.setattr(native, "SLICE", 2**13)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("grid", ["affine", "midrise"])
    @pytest.mark.parametrize("bits", BITS)
    def test_products_are_those_of_the_dense_weight(self, bits, grid, shape, calls, generator):
        layer = packed_layer(bits, grid, **shape)
        weight = layer.dequantize().double()
        for rows in (1, 2, 4, 5, 9, 17):
            x = torch.randn(rows, shape["in_features"], generator=generator)
            exact = F.linear(x.double(), weight, layer.bias.double())
            torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=bound(x, layer, shape["in_features"]))
        assert calls.count("products") == 6

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("grid", ["affine", "midrise"])
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_are_rebuilt_bit_for_bit(self, dtype, bits, grid, shape, calls, without_native):
        for scale_dtype in native.TYPES:
            layer = packed_layer(bits, grid, **shape, scale_dtype=scale_dtype)
            assert torch.equal(layer.dequantize(dtype), without_native(layer.dequantize, dtype))
        assert calls == ["slices"] * 3

    def test_the_smallest_scales_are_exact(self, without_native):
        layer = packed_layer(4, **self.LAYER)
        tiny = torch.finfo(torch.float16).smallest_normal
        layer.weight_scale.data.copy_(torch.linspace(-tiny, 2 * tiny, layer.weight_scale.numel()).view(3, -1))
        assert torch.equal(layer.dequantize(), without_native(layer.dequantize))

    @pytest.mark.parametrize("rows", [1, 4, 8, 31, 40])
    @pytest.mark.parametrize("dtype", LOW_PRECISION)
    def test_low_precision_is_as_good_as_dense(self, dtype, rows, generator):
        layer = packed_layer(**self.LAYER)
        x = torch.randn(rows, 192, generator=generator).to(dtype)
        exact = F.linear(x.double(), layer.dequantize().double(), layer.bias.double())
        y = layer(x)
        assert y.dtype == dtype
        assert (y - exact).abs().max() <= 2 * (layer.to_dense(dtype)(x) - exact).abs().max()

    def test_many_rows_are_a_matrix_product(self, calls, generator):
        layer = packed_layer(**self.LAYER)
        few = native._library(layer.bits).few_rows[torch.bfloat16]
        for rows, expected in ((few, ["products"]), (few + 1, ["slices"])):
            x = torch.randn(rows, 192, generator=generator).bfloat16()
            exact = F.linear(x.double(), layer.dequantize(torch.bfloat16).double(), layer.bias.double())
            calls.clear()
            y = layer(x)
            assert calls == expected
            error = (layer.to_dense(torch.bfloat16)(x) - exact).abs().max()
            assert (y - exact).abs().max() <= 2 * error

    def test_rows_beyond_a_slab_are_right(self, generator):
        layer = packed_layer(2, in_features=32, group_size=32, out_features=32)
        x = torch.randn(512 + 9, 32, generator=generator)
        y = native.products(x, layer.packed, layer.bias)
        torch.testing.assert_close(y, layer.to_dense()(x), rtol=0, atol=bound(x, layer, 32))

    def test_threads_change_nothing(self, monkeypatch, generator):
        monkeypatch.setattr(native, "PARALLEL", 1)
        layer = packed_layer(3, in_features=192, group_size=64, out_features=1000)
        xs = [torch.randn(rows, 192, generator=generator) for rows in (1, 8, 40)]
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append([layer(xs[0]), layer(xs[1]), layer.dequantize()])
        finally:
            torch.set_num_threads(before)
        for others in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))

    @pytest.mark.parametrize("rows", [1, 8, 40])
    def test_gradients_are_those_of_torch(self, rows, calls, generator, without_native):
        layer = packed_layer(**self.LAYER, scale_dtype=torch.float32)
        x = torch.randn(rows, 192, generator=generator, requires_grad=True)
        grad = torch.randn(rows, 150, generator=generator)

        def gradients():
            tensors = [x, layer.bias.requires_grad_(), layer.weight_scale.requires_grad_(rows == 8)]
            return torch.autograd.grad(layer(x), tensors[: 3 if rows == 8 else 2], grad)

        ours = gradients()
        assert calls
        for one, other in zip(ours, without_native(gradients), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=(192 + 150) * EPS * other.abs().max().item())

    @pytest.mark.parametrize("value", [torch.inf, torch.nan])
    def test_what_is_not_finite_stays_so(self, value):
        for rows in (1, 4, 8):
            x = torch.ones(rows, 192).bfloat16()
            x[0, 3] = value
            y = packed_layer(**self.LAYER)(x)
            assert not y[0].isfinite().any() and y[1:].isfinite().all()

    @pytest.mark.parametrize("options", [{"grid": "bitplane"}, {"group_size": 48}, {"scale_dtype": torch.float64}])
    def test_other_layers_are_those_of_torch(self, options, calls):
        packed_layer(**{**self.LAYER, **options})(torch.ones(1, 192))
        assert calls == []

    def test_wrong_width_of_inputs_fails(self, calls):
        with pytest.raises(RuntimeError, match="128"):
            packed_layer(**self.LAYER)(torch.ones(1, 128))
        assert "products" not in calls

    def test_output_made_in_inference_mode_may_be_trained_on(self):
        layer = packed_layer(**self.LAYER)
        with torch.inference_mode():
            y = layer(torch.ones(1, 192))
        assert y.shape == (1, 150)

    def test_words_that_are_not_contiguous_are_read_right(self, generator):
        layer = packed_layer(**self.LAYER)
        x = torch.randn(1, 192, generator=generator)
        y = layer(x)
        layer.weight.data = layer.weight.data.T.contiguous().T
        layer.weight_scale.data = layer.weight_scale.data.T.contiguous().T
        assert torch.equal(layer(x), y)


@needs_compiler
class TestRoundedInputs:
    """With `set_activation_bits(8)`."""

    WHOLE = [shape for shape in TestNative.SHAPES if shape["out_features"] % 16 == 0] + [
        {"in_features": 320, "group_size": 160, "out_features": 48},  # groups of a chunk of 128 columns and one of 32
    ]

    @pytest.fixture(autouse=True)
    def eight_bits(self):
        kernels.set_activation_bits(8)
        yield
        kernels.set_activation_bits(None)

    @staticmethod
    def chunks(in_features, group_size):
        for group in range(0, in_features, group_size):
            end = min(group + group_size, in_features)
            yield from ((start, min(start + 128, end)) for start in range(group, end, 128))

    @pytest.mark.parametrize("shape", WHOLE)
    @pytest.mark.parametrize("grid", ["affine", "midrise"])
    @pytest.mark.parametrize("bits", BITS)
    def test_products_are_those_of_rounded_inputs(self, bits, grid, shape, generator):
        layer = packed_layer(bits, grid, **shape)
        weight = layer.dequantize().double()
        for rows in (1, 3, 8, 17):
            x = torch.randn(rows, shape["in_features"], generator=generator)
            rounded = torch.empty_like(x)
            for begin, end in self.chunks(shape["in_features"], shape["group_size"]):
                part = x[:, begin:end]
                step = part.abs().amax(1, keepdim=True) / 127
                rounded[:, begin:end] = (part * (1 / step)).round() * step
            exact = F.linear(rounded.double(), weight, layer.bias.double())
            torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=bound(x, layer, shape["in_features"]))

    @pytest.mark.parametrize("shape", TestNative.SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_error_is_within_half_a_step(self, dtype, shape, generator):
        layer = packed_layer(3, **shape)
        x = torch.randn(2, 3, shape["in_features"], generator=generator).to(dtype)
        weight = layer.dequantize().double()
        exact = F.linear(x.double(), weight, layer.bias.to(dtype).double())
        most = bound(x.float().view(6, -1), layer, shape["in_features"]) + torch.finfo(dtype).eps * exact.abs()
        for begin, end in self.chunks(shape["in_features"], shape["group_size"]):
            half_step = x[..., begin:end].double().abs().amax(-1, keepdim=True) / 254
            most = most + half_step * weight[:, begin:end].abs().sum(1)
        y = layer(x)
        assert y.dtype == dtype
        assert ((y - exact).abs() <= most).all()

    @pytest.mark.parametrize("rows", [1, 2, 9])
    def test_nothing_but_the_bias_is_left_of_zeros(self, rows):
        layer = packed_layer(**TestNative.LAYER)
        assert torch.equal(layer(torch.zeros(rows, 192)), layer.bias.expand(rows, -1))

    @pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
    def test_what_is_not_finite_stays_so(self, value):
        x = torch.ones(9, 192)
        x[0, 3] = value
        y = packed_layer(**TestNative.LAYER)(x)
        assert not y[0].isfinite().any() and y[1:].isfinite().all()

    def test_any_number_of_rows_is_rounded(self, calls, generator):
        packed_layer(**TestNative.LAYER)(torch.randn(100, 192, generator=generator).bfloat16())
        assert calls == ["products"]

    def test_gradients_are_those_of_unrounded_products(self, generator):
        layer = packed_layer(**TestNative.LAYER, scale_dtype=torch.float32)
        x = torch.randn(3, 192, generator=generator, requires_grad=True)
        grad = torch.randn(3, 150, generator=generator)
        tensors = [x, layer.weight_scale.requires_grad_()]
        rounded = torch.autograd.grad(layer(x), tensors, grad)
        kernels.set_activation_bits(None)
        unrounded = torch.autograd.grad(layer(x), tensors, grad)
        assert all(torch.equal(one, other) for one, other in zip(rounded, unrounded, strict=True))

    def test_other_widths_are_refused(self):
        with pytest.raises(ValueError, match="8 or None, got 4"):
            kernels.set_activation_bits(4)
        assert native.Settings.activation_bits == 8


@needs_compiler
class TestCompiling:
    @pytest.fixture(autouse=True)
    def nothing_compiled(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        native._library.cache_clear()
        yield
        native._library.cache_clear()

    def test_is_done_once_a_machine(self, tmp_path, monkeypatch):
        layer = packed_layer(2, **TestNative.LAYER)
        y = layer(torch.ones(1, 192))
        (path,) = (tmp_path / "cache" / "trl_gopd").iterdir()
        assert path.name.endswith("-2.so")
        native._library.cache_clear()
        monkeypatch.setattr(native.subprocess, "run", None)
        assert torch.equal(layer(torch.ones(1, 192)), y)

    @pytest.mark.slow
    def test_processes_that_start_together_do_not_meet(self, tmp_path):
        code = "from trl_gopd.d2quant.kernels import native; assert native._library(2) is not None"
        processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        assert [process.wait(300) for process in processes] == [0, 0]
        (path,) = (tmp_path / "cache" / "trl_gopd").iterdir()
        assert path.name.endswith("-2.so")

    def test_another_processor_has_another_library(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        seen = []
        monkeypatch.setattr(native.hashlib, "sha256", lambda key: seen.append(key) or hashlib.md5(key))
        for flags in ("avx2", "avx512f"):
            monkeypatch.setattr(native, "_processor", lambda flags=flags: flags)
            with pytest.raises(OSError, match="no no-such-compiler"):
                native._compiled(2)
        assert seen[0] != seen[1]

    def test_without_a_compiler_torch_computes_and_says_so_once(self, monkeypatch, caplog, without_native):
        monkeypatch.setenv("CXX", "no-such-compiler")
        layer = packed_layer(2, **TestNative.LAYER)
        x = torch.ones(1, 192)
        with caplog.at_level(logging.WARNING, native.__name__):
            outputs = layer(x), layer(x)
        (message,) = [record.getMessage() for record in caplog.records]
        assert "there is no no-such-compiler" in message and "Install a C++ compiler" in message
        expected = without_native(layer, x)
        assert all(torch.equal(y, expected) for y in outputs)

    def test_a_compiler_that_lacks_options_is_asked_with_fewer(self, tmp_path, monkeypatch):
        compiler = tmp_path / "compiler"
        compiler.write_text(
            '#!/bin/sh\nfor option in "$@"; do case $option in -march=native|-fopenmp) exit 1;; esac; done\n'
            'exec c++ "$@" -O0\n'
        )
        compiler.chmod(0o700)
        monkeypatch.setenv("CXX", str(compiler))
        self.check(3)

    @pytest.mark.slow
    @pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 processor")
    @pytest.mark.parametrize("processor", ["haswell", "x86-64-v2"])  # with AVX2, and with vectors of four numbers
    @pytest.mark.parametrize("bits", BITS)
    def test_other_processors_compute_the_same(self, bits, processor, monkeypatch):
        monkeypatch.setattr(native, "VARIANTS", ((f"-march={processor}",),))
        self.check(bits)

    @staticmethod
    def check(bits):
        """Products and weights of the library of this width, with rounded inputs, too."""
        assert native._library(bits) is not None
        generator = torch.Generator().manual_seed(0)
        layer = packed_layer(bits, **TestNative.LAYER)
        dense = layer.dequantize()
        native.Settings.enabled = False
        try:
            assert torch.equal(dense, layer.dequantize())
        finally:
            native.Settings.enabled = True
        for rows in (1, 3, 9):
            x = torch.randn(rows, 192, generator=generator)
            exact = F.linear(x, dense, layer.bias)
            for dtype, eps in ((torch.float32, 0), (torch.bfloat16, torch.finfo(torch.bfloat16).eps)):
                y = native.products(x.to(dtype), layer.packed, layer.bias.to(dtype))
                # In bfloat16 the inputs, the bias and the result are rounded.
                low = 2 * eps * (x.abs() @ dense.abs().T + layer.bias.abs()).max().item()
                torch.testing.assert_close(y.float(), exact, rtol=0, atol=bound(x, layer, 192) + low)
            kernels.set_activation_bits(8)
            try:
                y = native.products(x, layer.packed, layer.bias)
            finally:
                kernels.set_activation_bits(None)
            half_step = x.abs().max().item() / 254
            assert (y - exact).abs().max() <= half_step * dense.abs().sum(1).max() + bound(x, layer, 192)

    def test_a_failed_compilation_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(native, "SOURCE", tmp_path / "wrong.cpp")
        native.SOURCE.write_text("this is no program")
        with pytest.raises(OSError, match="error"):
            native._compiled(2)
        assert not list((tmp_path / "cache" / "trl_gopd").iterdir())
