"""
Products with packed weights in machine code: `native.cpp`, compiled for this machine at its first use, a library for
each width.

It takes a few seconds with GCC or Clang, once: the libraries stay in the user's cache (`$XDG_CACHE_HOME/trl_gopd`,
`~/.cache/trl_gopd` by default). Without a compiler everything is computed by torch, which is logged once.
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
FEW_ROWS = 32  # for more of them, slices of the weight are rebuilt for a matrix product
SLICE = 2**20  # numbers of such a slice, which stay in the second cache
PARALLEL = 2**18  # weights from which on threads are worth their start
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

logger = logging.getLogger(__name__)


class _Weight(ctypes.Structure):
    _fields_ = [
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zero_points", ctypes.c_void_p),
        ("zero_point", ctypes.c_float),
        ("scale_type", ctypes.c_int32),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
    ]


class Settings:
    """Whether machine code is used in this process, for tests and comparisons."""

    enabled = True


def serves(packed: Packed) -> bool:
    """
    Whether there is machine code for a weight: on a CPU, with scales in at most 32 bits, of an affine or mid-rise
    grid whose groups consist of whole blocks of 32 columns or of all columns. Compiles it, if that is to be done.
    """
    is_whole = packed.group_size % BLOCK == 0 or packed.group_size >= packed.in_features
    return (
        Settings.enabled
        and not torch.compiler.is_compiling()
        and packed.weight.device.type == "cpu"
        and packed.grid != "bitplane"
        and is_whole
        and packed.weight_scale.dtype in SCALE_TYPES
        and packed.in_features > 0
        and _library(packed.bits) is not None
    )


def products(x: Tensor, packed: Packed) -> Tensor:
    """
    Products of at most `FEW_ROWS` rows, with sums in float32 and weights that are never rounded.

    Args:
        x (`torch.Tensor`): `(M, in_features)` in float32, bfloat16 or float16.
        packed ([`Packed`]): A weight that [`serves`] accepts.

    Returns:
        `torch.Tensor`: `(M, out_features)` in float32.
    """
    rows = x.detach().to(torch.float32).contiguous()
    y = rows.new_empty(x.shape[0], packed.weight.shape[1])
    weight, _kept = _describe(packed)
    _library(packed.bits).d2quant_products(
        ctypes.byref(weight),
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(x.shape[0]),
        ctypes.c_int(x.dtype == torch.bfloat16),
        ctypes.c_void_p(y.data_ptr()),
        ctypes.c_int(_threads(packed)),
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
        _library(packed.bits).d2quant_slice(
            ctypes.byref(weight),
            ctypes.c_void_p(memory.data_ptr()),
            ctypes.c_int(dtype == torch.bfloat16),
            ctypes.c_int64(start),
            ctypes.c_int64(stop),
            ctypes.c_int(_threads(packed)),
        )
        yield slice(start, stop), memory[: (stop - start) * width].view(width, stop - start).T


def _describe(packed: Packed) -> tuple[_Weight, list[Tensor]]:
    """The structure of native.cpp, and what has to stay in memory while it is used."""
    words, scales = packed.weight.detach().contiguous(), packed.weight_scale.detach().contiguous()
    zero_points = None if packed.weight_zero_point is None else packed.weight_zero_point.detach().contiguous()
    is_one_group = packed.group_size >= packed.in_features
    group_size = -(-packed.in_features // BLOCK) * BLOCK if is_one_group else packed.group_size
    weight = _Weight(
        words.data_ptr(),
        scales.data_ptr(),
        None if zero_points is None else zero_points.data_ptr(),
        (2**packed.bits - 1) / 2,
        SCALE_TYPES[scales.dtype],
        packed.in_features,
        words.shape[1],
        group_size,
    )
    return weight, [words, scales] if zero_points is None else [words, scales, zero_points]


def _threads(packed: Packed) -> int:
    return torch.get_num_threads() if packed.weight.shape[1] * packed.in_features >= PARALLEL else 1


@functools.cache
def _library(bits: int) -> Any:
    """The library of a width; `None` if it cannot be compiled or loaded."""
    try:
        _share_threads()
        return ctypes.CDLL(str(_compiled(bits)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "Packed weights of %d bits are multiplied by torch, which is slower, since native.cpp cannot be compiled "
            "or loaded (%s). Install a C++ compiler (g++ or clang++), or name one in the environment variable CXX.",
            bits,
            error,
        )
        return None


def _compiled(bits: int) -> Path:
    """The file of a library, which is made if it is not there."""
    key = "\0".join((SOURCE.read_text(encoding="utf-8"), *OPTIONS, platform.platform(), _processor()))
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
