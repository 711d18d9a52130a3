"""
Products with packed weights in machine code: `native.cpp`, compiled for this machine at its first use, a library for
each width. Few rows of `x` are multiplied by the packed words themselves; for many, slices of the weight are rebuilt.

Compiling takes a few seconds with GCC or Clang, once: the libraries stay in the user's cache
(`$XDG_CACHE_HOME/trl_gopd`, `~/.cache/trl_gopd` by default). Without a compiler everything is computed by torch, which
is logged once.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import written_whole
from .packed import Packed


SOURCE = Path(__file__).with_name("native.cpp")
OPTIONS = ("-DNDEBUG", "-O3", "-std=c++17", "-shared", "-fPIC")
# Tried in this order: Apple's Clang has no OpenMP, and some compilers do not know their processor.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ())
BLOCK = 32  # codes that fill `bits` words; groups consist of whole blocks
SLICE = 2**20  # numbers of such a slice, which stay in the second cache
REBUILT = (torch.float32, torch.bfloat16)  # dtypes of slices
PARALLEL = 2**18  # products from which on threads are worth their start
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

logger = logging.getLogger(__name__)


class Settings:
    """How machine code is used in this process. [`set_activation_bits`] sets the second one."""

    enabled = True  # for tests and comparisons
    activation_bits: int | None = None


def serves(packed: Packed) -> bool:
    """
    Whether there is machine code for a weight: on a CPU, with scales in at most 32 bits, of an affine or mid-rise
    grid whose groups consist of whole blocks of 32 columns or of all columns. Compiles it, if that is to be done.
    """
    weight, scales, _, in_features, bits, group_size, grid = packed
    return (
        weight.is_cpu
        and Settings.enabled
        and (group_size % BLOCK == 0 or group_size >= in_features > 0)
        and grid != "bitplane"
        and scales.dtype in TYPES
        and not torch.compiler.is_compiling()
        and _library(bits) is not None
    )


def multiplies(x: Tensor, packed: Packed) -> bool:
    """Whether `products` takes these inputs: where there are more rows, slices are faster."""
    few, width = _library(packed.bits).few_rows.get(x.dtype), packed.in_features
    if few is None or not x.is_cpu or x.shape[-1] != width:
        return False
    return 0 < x.numel() and (x.numel() <= few * width or Settings.activation_bits is not None)


def products(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """
    Products of rows with weights that are never rounded, with sums in float32; with `Settings.activation_bits`, of
    rows that are rounded to eight bits.

    Args:
        x (`torch.Tensor`): `(..., in_features)` in float32, bfloat16 or float16.
        packed ([`Packed`]): A weight that [`serves`] accepts.
        bias (`torch.Tensor`, *optional*): `(out_features,)` in the dtype of `x`, added to the sums.

    Returns:
        `torch.Tensor`: `(..., out_features)` in the dtype of `x`.
    """
    if x.dtype == torch.float16:
        return products(x.float(), packed, None if bias is None else bias.float()).half()
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    weight, kept = _describe(packed)
    y = x.new_empty(*x.shape[:-1], kept[0].shape[1])
    rows = x.numel() // packed.in_features
    _library(packed.bits).d2quant_products(
        *weight,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        TYPES[x.dtype],
        rows,
        Settings.activation_bits is not None,
        _threads(packed, rows),
    )
    return y


def slices(packed: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """
    Yields slices of outputs and their weights `(outputs, in_features)`, as [`dequantize`] defines them, in float32 or
    bfloat16. A slice is valid until the next one is taken.
    """
    size, width = packed.weight.shape[1], packed.in_features
    step = max(16, SLICE // width // 16 * 16)
    memory = torch.empty(min(step, size) * width, dtype=dtype)
    weight, _kept = _describe(packed)
    for start in range(0, size, step):
        stop = min(start + step, size)
        _library(packed.bits).d2quant_slice(*weight, memory.data_ptr(), TYPES[dtype], start, stop, _threads(packed, 1))
        yield slice(start, stop), memory[: (stop - start) * width].view(width, stop - start).T


def _describe(packed: Packed) -> tuple[tuple[int | None, ...], tuple[Tensor, ...]]:
    """The arguments of native.cpp that are a weight, and what has to stay in memory while they are used."""
    weight, scales, zero_points, in_features, _, group_size, _ = packed
    weight, scales = weight.contiguous(), scales.contiguous()
    if zero_points is not None:
        zero_points = zero_points.contiguous()
    if group_size >= in_features:
        group_size = -(-in_features // BLOCK) * BLOCK
    arguments = (
        weight.data_ptr(),
        scales.data_ptr(),
        None if zero_points is None else zero_points.data_ptr(),
        TYPES[scales.dtype],
        in_features,
        weight.shape[1],
        group_size,
    )
    return arguments, (weight, scales) if zero_points is None else (weight, scales, zero_points)


def _threads(packed: Packed, rows: int) -> int:
    products = packed.weight.numel() * 32 // packed.bits * rows
    return torch.get_num_threads() if products >= PARALLEL else 1


@functools.cache
def _library(bits: int) -> Any:
    """The library of a width; `None` if it cannot be compiled or loaded."""
    try:
        _share_threads()
        library: Any = ctypes.CDLL(str(_compiled(bits)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "Packed weights of %d bits are multiplied by torch, which is slower, since native.cpp cannot be compiled "
            "or loaded (%s). Install a C++ compiler (g++ or clang++), or name one in the environment variable CXX.",
            bits,
            error,
        )
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    weight = (pointer, pointer, pointer, number, size, size, size)
    library.d2quant_products.argtypes = (*weight, pointer, pointer, pointer, number, size, number, number)
    library.d2quant_slice.argtypes = (*weight, pointer, number, size, size, number)
    library.d2quant_products.restype = library.d2quant_slice.restype = None
    library.few_rows = {dtype: library.d2quant_few_rows(TYPES[dtype]) for dtype in REBUILT}
    library.few_rows[torch.float16] = library.few_rows[torch.float32]  # which it is turned into
    logger.info("Packed weights of %d bits are multiplied by machine code on the CPU.", bits)
    return library


def _compiled(bits: int) -> Path:
    """The file of a library, which is made if it is not there."""
    sources = sorted(SOURCE.parent.glob("*.h")) + [SOURCE]
    texts = [source.read_text(encoding="utf-8") for source in sources]
    key = "\0".join((*texts, *OPTIONS, platform.platform(), _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "trl_gopd")
    path = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}-{bits}.so"
    if path.is_file():
        return path
    given = os.environ.get("CXX")
    compiler = shutil.which(given) if given else shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError(f"there is no {given}" if given else "there is no c++, g++ or clang++")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    logger.info("Compiling the products with packed weights of %d bits, once on this machine.", bits)
    with tempfile.TemporaryDirectory() as build:
        built = Path(build, path.name)
        for variant in VARIANTS:
            command = [compiler, f"-DBITS={bits}", *OPTIONS, *variant, "-o", str(built), str(SOURCE)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if run.returncode == 0:
                break
        else:
            said = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
            raise OSError(f"{compiler}: {said[0]}")
        with written_whole(path) as part:  # processes that compile at the same time do not meet
            shutil.copyfile(built, part)
    return path


def _processor() -> str:
    """What the code is compiled for: another machine with the same home may lack its instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    lines = re.findall(r"^(?:flags|Features|model name)\s*:.*$", text, re.MULTILINE)
    return "\n".join(sorted(set(lines)))


def _share_threads() -> None:
    """
    Lets libraries that are loaded next find the OpenMP that torch has loaded: with one of their own, the threads of
    two pools would compete for the cores.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return
    for path in sorted(set(re.findall(r"/\S*(?:libgomp|libomp|libiomp)\S*", maps))):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
