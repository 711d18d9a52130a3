"""
How long a packed linear layer takes beside a dense one on a CPU.

    python -m benchmarks.d2quant_speed --json docs/results/d2quant_speed.json   # about ten minutes on two idle cores
    python -m benchmarks.d2quant_speed --shapes 256x512 --rows 1 --repeats 2    # to see that it works

Contestants are a dense layer in float32 and in bfloat16, the packed layer in machine code with inputs in float32 and
in bfloat16, and the packed layer in torch alone. They take turns within a round. Each has so many copies of its
weights that none is in a cache when its turn comes. `bound` is the share of the time that reading the weights alone
would take, at the bandwidth that a sum of 256 MiB reaches on one thread.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks.gopd_step import SEED, _spread, environment
from trl_gopd.d2quant.kernels import native
from trl_gopd.d2quant.linear import D2QuantLinear


BASELINE = "dense bfloat16"
CACHED = 96 * 2**20  # bytes of weights of each contestant at least
GROUP_SIZE = 64


@dataclass(frozen=True)
class Setting:
    """
    Args:
        shapes (`list[str]`): Layers, inputs x outputs.
        rows (`list[int]`): Rows of the input.
        bits (`list[int]`): Widths.
        threads (`list[int]`): Threads of torch.
        repeats (`int`): Timed rounds.
    """

    shapes: list[str] = field(default_factory=lambda: ["2048x8192", "4096x11008"])
    rows: list[int] = field(default_factory=lambda: [1, 4, 16, 512])
    bits: list[int] = field(default_factory=lambda: [2, 3, 4])
    threads: list[int] = field(default_factory=lambda: [1, 2])
    repeats: int = 9


def packed_layer(inputs: int, outputs: int, bits: int, generator: torch.Generator) -> D2QuantLinear:
    """A layer of random words and scales."""
    layer = D2QuantLinear(inputs, outputs, bits=bits, group_size=GROUP_SIZE)
    assert layer.weight_zero_point is not None
    for words in (layer.weight, layer.weight_zero_point):
        words.data.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.weight_scale.data.uniform_(0.001, 0.01, generator=generator)
    return layer


def turns(make: Callable[[], nn.Module], size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that applies one of several copies of a layer of `size` bytes after the other."""
    copies = [make() for _ in range(max(2, -(-CACHED // size)))]
    number = 0

    def apply(x: torch.Tensor) -> torch.Tensor:
        nonlocal number
        number += 1
        return copies[number % len(copies)](x)

    return apply


def without_machine_code(apply: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def computed(x: torch.Tensor) -> torch.Tensor:
        native.Settings.enabled = False
        try:
            return apply(x)
        finally:
            native.Settings.enabled = True

    return computed


@torch.no_grad()
def measure(shape: str, bits: list[int], rows: list[int], threads: list[int], repeats: int) -> list[dict]:
    """Seconds of each contestant for one layer."""
    inputs, outputs = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(outputs, inputs, generator=generator)

    def dense(dtype: torch.dtype) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.to(dtype, copy=True))
        return layer

    contestants = {
        "dense float32": (turns(lambda: dense(torch.float32), 4 * weight.numel()), torch.float32, None),
        BASELINE: (turns(lambda: dense(torch.bfloat16), 2 * weight.numel()), torch.bfloat16, None),
    }
    for width in bits:
        apply = turns(lambda width=width: packed_layer(inputs, outputs, width, generator), weight.numel() * width // 8)
        contestants[f"{width} bits, float32"] = apply, torch.float32, width
        contestants[f"{width} bits, bfloat16"] = apply, torch.bfloat16, width
        contestants[f"{width} bits, torch alone"] = without_machine_code(apply), torch.bfloat16, width
    results = []
    for count in threads:
        torch.set_num_threads(count)
        for number in rows:
            x = torch.randn(number, inputs, generator=generator)
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for turn in range(repeats + 1):
                for name in list(contestants) if turn % 2 else reversed(list(contestants)):
                    apply, dtype, _ = contestants[name]
                    given = x.to(dtype)
                    start = time.perf_counter()
                    apply(given)
                    if turn:  # the first round warms up
                        seconds[name].append(time.perf_counter() - start)
            print(f"{shape}, {count} threads, {number} rows", file=sys.stderr)
            for name, (_, dtype, width) in contestants.items():
                size = weight.numel() * (dtype.itemsize if width is None else width / 8 + 2 / GROUP_SIZE)
                facts = {"shape": shape, "threads": count, "rows": number, "contestant": name, "bytes": size}
                results.append(facts | {"seconds": seconds[name]})
    return results


def bandwidth() -> float:
    """Bytes read a second by a sum of 256 MiB on one thread."""
    torch.set_num_threads(1)
    memory, best = torch.ones(2**26), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - start)
    return memory.nbytes / best


def summarize(results: list[dict], bytes_a_second: float) -> list[dict]:
    """Milliseconds, how many times as fast as `BASELINE`, and the share of the time that reading takes."""
    rows = []
    for each in results:
        key = ("shape", "threads", "rows")
        base = next(r for r in results if r["contestant"] == BASELINE and all(r[k] == each[k] for k in key))
        ratios = [theirs / ours for ours, theirs in zip(each["seconds"], base["seconds"], strict=True)]
        spread = _spread([1000 * value for value in each["seconds"]])
        bound = each["bytes"] / bytes_a_second / (spread["median"] / 1000) if each["threads"] == 1 else None
        named = {name: each[name] for name in (*key, "contestant")}
        rows.append({**named, "milliseconds": spread, "times": _spread(ratios), "bound": bound})
    return rows


def table(summary: list[dict]) -> str:
    """Markdown: a line for each layer, number of threads and rows, with how many times as fast each contestant is."""
    names = list(dict.fromkeys(each["contestant"] for each in summary if each["contestant"] != BASELINE))
    lines = [f"| layer | threads | rows | {BASELINE}, ms | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for key in dict.fromkeys((each["shape"], each["threads"], each["rows"]) for each in summary):
        of = {each["contestant"]: each for each in summary if (each["shape"], each["threads"], each["rows"]) == key}
        cells = [*map(str, key), f"{of[BASELINE]['milliseconds']['median']:.2f}"]
        cells += [f"{of[name]['times']['median']:.2f}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    for name, value in asdict(Setting()).items():
        many = {"nargs": "+"} if isinstance(value, list) else {}
        kind = str if name == "shapes" else int
        parser.add_argument(f"--{name}", type=kind, default=value, help="(default: %(default)s)", **many)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all times go")
    args = vars(parser.parse_args(argv))
    file = args.pop("json")
    setting = Setting(**args)
    report = environment(argv) | {"command": shlex.join(["python", "-m", "benchmarks.d2quant_speed", *argv])}
    report |= {"setting": asdict(setting), "bytes_a_second": bandwidth(), "results": []}
    for shape in setting.shapes:
        report["results"] += measure(shape, setting.bits, setting.rows, setting.threads, setting.repeats)
    report["summary"] = summarize(report["results"], report["bytes_a_second"])
    print(table(report["summary"]))
    print(f"\nHow many times as fast as `{BASELINE}` in the same round, medians of the rounds.")
    print(f"Reading memory: {report['bytes_a_second'] / 1e9:.1f} GB/s on one thread.")
    print(f"commit {report['commit']}{', and changes on top of it' if report['dirty'] else ''}")
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
