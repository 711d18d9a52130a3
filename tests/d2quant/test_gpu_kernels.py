"""
The Triton kernels compute what the dense weight does, at every width, for groups and sizes that divide nothing.

They run on a GPU if there is one, and in Triton's interpreter on the CPU otherwise, which `tests/conftest.py` asks for
before Triton is imported. The interpreter cuts float32 to bfloat16 off instead of rounding it.
"""

import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.d2quant.test_kernels import bound, packed_layer
from trl_gopd.d2quant.kernels import gpu, native
from trl_gopd.d2quant.packing import BITS


pytest.importorskip("triton", reason="needs Triton: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = gpu.DTYPES
SHAPES = [
    {"in_features": 128, "group_size": 64, "out_features": 70},
    {"in_features": 96, "group_size": 32, "out_features": 33},
    {
        "in_features": 70,
        "group_size": 48,
        "out_features": 21,
    },  # groups that are no multiple of a tile, the last shorter
    {"in_features": 37, "group_size": 5, "out_features": 3},
    {"in_features": 45, "group_size": 128, "out_features": 16},
]


@pytest.fixture(autouse=True)
def interpreted_or_on_a_gpu():
    if DEVICE == "cpu":
        assert os.environ.get("TRITON_INTERPRET") == "1"


def layer_of(bits, grid="affine", **options):
    return packed_layer(bits, grid, **options).to(DEVICE)


def low_precision(x, weight, bias, dtype):
    """Twice what rounding inputs, weights, bias and result does at most; cutting off is twice as bad as rounding."""
    if dtype == torch.float32:
        return 0
    return 4 * torch.finfo(dtype).eps * ((x.double().abs() @ weight.abs().T) + bias.abs()).max().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 19])
def test_products_are_those_of_the_dense_weight(rows, bits, shape, generator):
    layer = layer_of(bits, **shape)
    x = torch.randn(rows, shape["in_features"], generator=generator).to(DEVICE)
    exact = F.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    y = gpu.products(x, layer.packed, layer.bias)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=bound(x, layer, shape["in_features"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_dtypes_are_kept(scale_dtype, rows, dtype, generator):
    layer = layer_of(3, "midrise", **SHAPES[1], scale_dtype=scale_dtype)
    x, bias = torch.randn(rows, 96, generator=generator).to(DEVICE, dtype), layer.bias.to(dtype)
    weight = layer.dequantize().double()
    y = gpu.products(x, layer.packed, bias)
    assert y.dtype == dtype
    atol = bound(x.float(), layer, 96) + low_precision(x, weight, bias.double(), dtype)
    torch.testing.assert_close(y.double(), F.linear(x.double(), weight, bias.double()), rtol=0, atol=atol)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_parts_of_the_columns_add_up(rows, parts, generator):
    layer = layer_of(2, in_features=200, group_size=64, out_features=21)
    x = torch.randn(rows, 200, generator=generator).to(DEVICE)
    y = gpu.products(x, layer.packed, layer.bias, parts=parts)
    torch.testing.assert_close(y, layer.to_dense()(x), rtol=0, atol=bound(x, layer, 200))


@pytest.mark.parametrize("rows", [64, 65])
def test_tiles_of_rows_are_right(rows, generator):
    layer = layer_of(4, in_features=64, group_size=64, out_features=16)
    x = torch.randn(rows, 64, generator=generator).to(DEVICE)
    y = gpu.products(x, layer.packed, layer.bias)
    torch.testing.assert_close(y, layer.to_dense()(x), rtol=0, atol=bound(x, layer, 64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", ["affine", "midrise"])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_rebuilt_bit_for_bit(bits, grid, shape, monkeypatch):
    layer = layer_of(bits, grid, **shape)
    monkeypatch.setattr(gpu, "SLICE", 13 * shape["in_features"])
    for dtype in DTYPES:
        expected = layer.dequantize(dtype)
        if dtype == torch.bfloat16 and DEVICE == "cpu":
            cut_off = layer.dequantize().view(torch.int32) & -(2**16)
            expected = cut_off.view(torch.float32).to(dtype)
        slices = list(range(0, shape["out_features"], 13))
        for (outputs, weight), start in zip(gpu.slices(layer.packed, dtype), slices, strict=True):
            assert outputs.start == start and torch.equal(weight, expected[outputs])


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Names of the kernels that layers used, as if they were on a GPU."""
    calls = []
    for name in ("products", "slices"):
        original = getattr(gpu, name)
        monkeypatch.setattr(
            gpu, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))[1]
        )
    if DEVICE == "cpu":
        monkeypatch.setattr(native.Settings, "enabled", False)
        monkeypatch.setattr(gpu, "serves", lambda packed: True)
    return calls


def test_layers_use_them(on_a_gpu, generator, monkeypatch):
    layer = layer_of(2, **SHAPES[0])
    x = torch.randn(2, 3, 128, generator=generator).to(DEVICE)
    monkeypatch.setattr(gpu, "FEW_ROWS", 6)
    dense = layer.to_dense()
    on_a_gpu.clear()
    for rows, expected in ((x, ["products"]), (x.repeat(2, 1, 1), ["slices"]), (x[:0], ["slices"])):
        y = layer(rows)
        assert on_a_gpu == expected
        torch.testing.assert_close(y, dense(rows), rtol=0, atol=bound(x.view(6, -1), layer, 128))
        on_a_gpu.clear()


def test_gradients_are_those_of_torch(on_a_gpu, generator, monkeypatch):
    layer = layer_of(2, **SHAPES[0], scale_dtype=torch.float32)
    x = torch.randn(3, 128, generator=generator).to(DEVICE).requires_grad_()
    grad = torch.randn(3, 70, generator=generator).to(DEVICE)

    def gradients():
        layer.bias.requires_grad_(), layer.weight_scale.requires_grad_(False)
        without_scales = torch.autograd.grad(layer(x), [x, layer.bias], grad)
        layer.weight_scale.requires_grad_()
        return *without_scales, *torch.autograd.grad(layer(x), [x, layer.weight_scale], grad)

    ours = gradients()
    assert on_a_gpu == ["products", "slices", "products"]
    monkeypatch.setattr(gpu, "serves", lambda packed: False)
    for one, other in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=(128 + 70) * 2**-23 * other.abs().max().item())


@pytest.mark.parametrize("change", ["grid", "scale_dtype", "empty"])
def test_other_layers_are_those_of_torch(change, monkeypatch):
    monkeypatch.setattr(gpu, "_works_on", lambda kind, index: True)
    packed = layer_of(2, **SHAPES[0]).packed
    packed = packed._replace(weight=packed.weight.to("meta"))
    assert gpu.serves(packed)
    others = {
        "grid": {"grid": "bitplane"},
        "scale_dtype": {"weight_scale": packed.weight_scale.double()},
        "empty": {"weight": packed.weight[:0]},
    }
    assert not gpu.serves(packed._replace(**others[change]))


def test_what_computes_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU of a test")
    gpu._works_on.cache_clear()
    try:
        with caplog.at_level(logging.INFO, gpu.__name__):
            assert gpu._works_on("cuda", 0) and gpu._works_on("cuda", 0) and not gpu._works_on("mps", 0)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
            assert not gpu._works_on("cuda", 1)
            monkeypatch.setattr(gpu, "triton", None)
            assert not gpu._works_on("xpu", 0)
    finally:
        gpu._works_on.cache_clear()
    fragments = ("Triton kernels", "GPU of a test is older", "Triton is not installed")
    for message, fragment in zip([record.getMessage() for record in caplog.records], fragments, strict=True):
        assert fragment in message


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl_gopd.d2quant.kernels import gpu, tiles

def compiled(kernel, target, types, constants):
    types = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constants)
    return triton.compile(source, target=target, options={"num_stages": 2}).metadata.shared

pointers = {"words": "*i32", "scales": "*fp16", "zero_points": "*i32"}
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for bits, dtype, rows, one_group in itertools.product((2, 3, 4, 8), ("fp32", "bf16"), (1, 64), (True, False)):
        types = pointers | {name: "*" + dtype for name in ("x", "bias", "y", "out")}
        m, n, k = gpu.tile_of(rows, 64 if one_group else 5, 4 if dtype == "fp32" else 2)
        constants = {"BITS": bits, "ONE_GROUP": one_group, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
        shared = compiled(tiles.products, target, types, constants | {"IS_ROW": rows == 1, "UPCAST": False})
        assert shared <= 64 * 1024, (target, bits, dtype, rows, shared)
        del constants["BLOCK_M"]
        compiled(tiles.rebuild, target, types, constants)
"""


@pytest.mark.slow
def test_they_compile_for_gpus(tmp_path):
    """Without one at hand, and within the memory that a block of every supported one shares (64 KiB on AMD's)."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
