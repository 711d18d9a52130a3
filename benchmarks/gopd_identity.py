"""
How fast the checksum is by which frozen models are told apart.

    python -m benchmarks.gopd_identity --json docs/results/gopd_identity.json   # half a minute on one core
    python -m benchmarks.gopd_identity --megabytes 8 --repeats 2               # to see that it works

Tensors of a language model's shapes are read whole. Four contestants take turns, in an order that is reversed from
round to round:

- `copy` copies the tensors, the least that reading and writing them can take;
- `xxh3` is the checksum of the bytes alone, as one block;
- `digest` is what `trl_gopd` does: names, shapes, dtypes and all numbers, tensor by tensor;
- `crc32` is the checksum of zlib.

Target: `digest` has at least half the speed of `copy`.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from benchmarks.gopd_step import SEED, environment
from trl_gopd.gopd.frozen.identity import parameters_digest


TARGET = 0.5  # of the speed of `copy`
HIDDEN = 1024  # numbers in a row of each matrix
LARGEST = 64 * 2**20  # bytes of one tensor, about those of a layer of a model with four billion parameters


@dataclass(frozen=True)
class Setting:
    """
    Args:
        megabytes (`int`): Of all tensors together, in 2**20 bytes.
        dtype (`str`): Of the tensors.
        warmup (`int`): Rounds before the first that is timed.
        repeats (`int`): Timed rounds.
    """

    megabytes: int = 1024
    dtype: str = "bfloat16"
    warmup: int = 1
    repeats: int = 5


def build(setting: Setting) -> dict[str, Tensor]:
    """Random matrices by name."""
    generator = torch.Generator().manual_seed(SEED)
    dtype = getattr(torch, setting.dtype)
    left, named = setting.megabytes * 2**20, {}
    while left > 0:
        rows = max(min(left, LARGEST) // (HIDDEN * dtype.itemsize), 1)
        named[f"layers.{len(named)}.weight"] = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
        left -= rows * HIDDEN * dtype.itemsize
    return named


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def contestants(named: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    into = {name: torch.empty_like(tensor) for name, tensor in named.items()}
    return {
        "copy": lambda: [into[name].copy_(tensor) for name, tensor in named.items()],
        "xxh3": lambda: [xxhash.xxh3_128(_bytes(tensor)).digest() for tensor in named.values()],
        "digest": lambda: parameters_digest(named),
        "crc32": lambda: [zlib.crc32(_bytes(tensor)) for tensor in named.values()],
    }


def measure(setting: Setting) -> dict:
    """GB/s of each contestant in each round."""
    named = build(setting)
    size = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    functions = contestants(named)
    speeds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(setting.warmup + setting.repeats):
        for name in functions if number % 2 == 0 else reversed(functions):
            started = time.perf_counter()
            functions[name]()
            seconds = time.perf_counter() - started
            if number >= setting.warmup:
                speeds[name].append(size / 1e9 / seconds)
    return {"bytes": size, "tensors": len(named), "gigabytes_per_second": speeds}


def summarize(result: dict) -> list[dict]:
    """Median, least and largest speed of each contestant, and its median share of that of `copy` in the same round."""
    speeds = result["gigabytes_per_second"]
    return [
        {
            "contestant": name,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "of_copy": statistics.median(own / base for own, base in zip(values, speeds["copy"], strict=True)),
        }
        for name, values in speeds.items()
    ]


def table(summary: list[dict]) -> str:
    """Markdown."""
    lines = ["| contestant | GB/s | of copy |", "|---|---|---|"]
    for each in summary:
        spread = "{median:.1f} ({min:.1f}–{max:.1f})".format(**each)
        lines.append(f"| {each['contestant']} | {spread} | {each['of_copy']:.2f} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> tuple[Setting, Path | None]:
    """What is measured, and where the JSON goes."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    for name in ("megabytes", "warmup", "repeats"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setting, name), help="(default: %(default)s)")
    parser.add_argument(
        "--dtype", default=Setting.dtype, choices=("float32", "bfloat16"), help="(default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all speeds go")
    args = vars(parser.parse_args(argv))
    file = args.pop("json")
    for name in ("megabytes", "warmup", "repeats"):
        if args[name] < (name != "warmup"):
            parser.error(f"--{name} is too small: {args[name]}")
    return Setting(**args), file


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    setting, file = parse_args(argv)
    torch.set_num_threads(1)
    report = environment(argv) | {"command": shlex.join(["python", "-m", "benchmarks.gopd_identity", *argv])}
    report |= {"setting": asdict(setting), "result": measure(setting)}
    report["summary"] = summarize(report["result"])
    print(table(report["summary"]))
    print("\nMedian (least–largest) of the rounds; shares are of `copy` in the same round.")
    own = next(each for each in report["summary"] if each["contestant"] == "digest")
    print(f"{'The target is met' if own['of_copy'] >= TARGET else 'Missed'}: {own['of_copy']:.2f}, target {TARGET}.")
    print(f"commit {report['commit']}{', and changes on top of it' if report['dirty'] else ''}")
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
