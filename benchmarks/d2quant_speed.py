"""
How long a packed linear layer takes beside a dense one on a CPU, and a model of packed layers beside a dense one.

    python -m benchmarks.d2quant_speed --json docs/results/d2quant_speed.json \\
        --models-json docs/results/d2quant_speed_models.json --page docs/d2quant.md   # ten minutes on two idle cores
    python -m benchmarks.d2quant_speed --shapes 256x512 --rows 1 --repeats 2          # to see that it works

Contestants are a dense layer in float32 and in bfloat16, the packed layer in machine code with inputs in float32, in
bfloat16 and rounded to eight bits, the packed layer in torch alone, and `MatMulNBits` of onnxruntime, exact and with
inputs rounded to eight bits (accuracy levels 1 and 4), if it is installed:

    pip install --target ort onnx onnxruntime && PYTHONPATH=ort python -m benchmarks.d2quant_speed ...

They take turns within a round. Each has so many copies of its weights that none is in a cache when its turn comes.
With few rows, a call that is not timed goes first, so that its threads are awake, and the threads of others asleep.
`DRAM bound` is how many times as fast a layer would be that took no longer than reading its words, scales and zero
points does, at the bandwidth that a sum of 256 MiB reaches on as many threads.

With `--models-json`, `d2quant_speed_models` then times whole models.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from benchmarks import d2quant_speed_models
from benchmarks.d2quant_speed_models import GROUP_SIZE, packed_layer
from benchmarks.gopd_step import SEED, _spread, environment
from trl_gopd.d2quant.kernels import native, set_activation_bits


BASELINE = "dense bfloat16"
CACHED = 96 * 2**20  # bytes of weights of each contestant at least
FEW_ROWS = 16  # up to which threads are woken before a call is timed
MARKS = "<!-- layers: begin -->\n", "<!-- layers: end -->\n"


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
    repeats: int = 7


def turns(make: Callable[[], Callable[[torch.Tensor], Any]], size: float) -> Callable[[torch.Tensor], Any]:
    """A function that applies one of several copies of a layer of `size` bytes after the other."""
    copies = [make() for _ in range(max(2, math.ceil(CACHED / size)))]
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


def with_rounded_inputs(apply: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def computed(x: torch.Tensor) -> torch.Tensor:
        set_activation_bits(8)
        try:
            return apply(x)
        finally:
            set_activation_bits(None)

    return computed


def onnxruntime_layer(inputs: int, outputs: int, bits: int, level: int, threads: int) -> Callable[[torch.Tensor], Any]:
    """`MatMulNBits` with random codes, at an accuracy level."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    generator, groups = numpy.random.default_rng(SEED), inputs // GROUP_SIZE
    tensors = {
        "B": generator.integers(0, 256, (outputs, groups, GROUP_SIZE * bits // 8), dtype=numpy.uint8),
        "scales": generator.uniform(0.001, 0.01, outputs * groups).astype(numpy.float32),
        "zero_points": generator.integers(0, 256, outputs * -(-groups * bits // 8), dtype=numpy.uint8),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=inputs, N=outputs, bits=bits, block_size=GROUP_SIZE, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


@dataclass(frozen=True)
class Contestant:
    """
    Args:
        apply (`Callable`): Multiplies an input by the next copy of the weight.
        dtype (`torch.dtype`): Of the input.
        bytes (`float`): Of the weight.
    """

    apply: Callable[[torch.Tensor], Any]
    dtype: torch.dtype
    bytes: float


def contestants_of(inputs: int, outputs: int, bits: list[int], generator: torch.Generator) -> dict[str, Contestant]:
    """All but those of onnxruntime."""
    weight = torch.randn(outputs, inputs, generator=generator)

    def dense(dtype: torch.dtype) -> Contestant:
        def layer() -> nn.Linear:
            layer = nn.Linear(inputs, outputs, bias=False, device="meta")
            layer.weight = nn.Parameter(weight.to(dtype, copy=True))
            return layer

        size = weight.numel() * dtype.itemsize
        return Contestant(turns(layer, size), dtype, size)

    contestants = {"dense float32": dense(torch.float32), BASELINE: dense(torch.bfloat16)}
    for width in bits:
        size = packed_bytes(weight.numel(), width)
        apply = turns(lambda width=width: packed_layer(inputs, outputs, width, generator), weight.numel() * width // 8)
        contestants[f"{width} bits, float32"] = Contestant(apply, torch.float32, size)
        contestants[f"{width} bits, bfloat16"] = Contestant(apply, torch.bfloat16, size)
        contestants[f"{width} bits, rounded"] = Contestant(with_rounded_inputs(apply), torch.bfloat16, size)
        contestants[f"{width} bits, torch alone"] = Contestant(without_machine_code(apply), torch.bfloat16, size)
    return contestants


def onnxruntime_contestants(inputs: int, outputs: int, bits: list[int], threads: int) -> dict[str, Contestant]:
    contestants = {}
    for width in set(bits) & {2, 4, 8}:
        for level, name in ((1, "exact"), (4, "rounded")):
            size = packed_bytes(inputs * outputs, width)

            def make(width: int = width, level: int = level) -> Callable[[torch.Tensor], Any]:
                return onnxruntime_layer(inputs, outputs, width, level, threads)

            contestants[f"{width} bits, onnxruntime {name}"] = Contestant(turns(make, size), torch.float32, size)
    return contestants


def packed_bytes(weights: int, bits: int) -> float:
    """Of words, scales of 16 bits and zero points."""
    return weights * (bits + (16 + bits) / GROUP_SIZE) / 8


@torch.no_grad()
def measure(shape: str, setting: Setting) -> list[dict]:
    """Seconds of each contestant for one layer."""
    inputs, outputs = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(SEED)
    own = contestants_of(inputs, outputs, setting.bits, generator)
    results = []
    for threads in setting.threads:
        torch.set_num_threads(threads)
        contestants = dict(own)
        if importlib.util.find_spec("onnxruntime") is not None:
            contestants |= onnxruntime_contestants(inputs, outputs, setting.bits, threads)
        for rows in setting.rows:
            x = torch.randn(rows, inputs, generator=generator)
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for turn in range(setting.repeats + 1):
                for name in list(contestants) if turn % 2 else reversed(list(contestants)):
                    apply, given = contestants[name].apply, x.to(contestants[name].dtype)
                    if rows <= FEW_ROWS:
                        time.sleep(0.01)
                        apply(given)
                    start = time.perf_counter()
                    apply(given)
                    if turn:  # the first round warms up
                        seconds[name].append(time.perf_counter() - start)
            print(f"{shape}, {threads} threads, {rows} rows", file=sys.stderr)
            for name, contestant in contestants.items():
                facts = {"shape": shape, "threads": threads, "rows": rows, "contestant": name}
                results.append(facts | {"bytes": contestant.bytes, "seconds": seconds[name]})
    return results


def bandwidth(threads: int) -> float:
    """Bytes read a second by a sum of 256 MiB."""
    torch.set_num_threads(threads)
    memory, best = torch.ones(2**26), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        best = min(best, time.perf_counter() - start)
    return memory.nbytes / best


def summarize(results: list[dict], bytes_a_second: dict[str, float]) -> list[dict]:
    """Milliseconds, how many times as fast as `BASELINE`, and as what reading would take at most (by threads)."""
    rows = []
    for each in results:
        key = ("shape", "threads", "rows")
        base = next(r for r in results if r["contestant"] == BASELINE and all(r[k] == each[k] for k in key))
        ratios = [theirs / ours for ours, theirs in zip(each["seconds"], base["seconds"], strict=True)]
        bound = _spread(base["seconds"])["median"] * bytes_a_second[str(each["threads"])] / each["bytes"]
        named = {name: each[name] for name in (*key, "contestant")}
        spread = _spread([1000 * value for value in each["seconds"]])
        rows.append({**named, "milliseconds": spread, "times": _spread(ratios), "bound": bound})
    return rows


def table(summary: list[dict], bits: int) -> str:
    """Markdown of one width: how many times as fast as the baseline each contestant is."""
    ours = [f"{bits} bits, {name}" for name in ("float32", "bfloat16", "rounded", "torch alone")]
    theirs = [f"{bits} bits, onnxruntime {name}" for name in ("exact", "rounded")]
    there = {each["contestant"] for each in summary}
    names = [name for name in ("dense float32", *ours, *theirs) if name in there]
    heads = [name.removeprefix(f"{bits} bits, ") for name in names]
    lines = [f"| layer | threads | rows | {BASELINE}, ms | {' | '.join(heads)} | DRAM bound |"]
    lines.append("|---" * (5 + len(names)) + "|")
    for key in dict.fromkeys((each["shape"], each["threads"], each["rows"]) for each in summary):
        of = {each["contestant"]: each for each in summary if (each["shape"], each["threads"], each["rows"]) == key}
        cells = [*map(str, key), f"{of[BASELINE]['milliseconds']['median']:.2f}"]
        cells += [f"{of[name]['times']['median']:.2f}" for name in names]
        # With many rows, arithmetic takes longer than reading.
        cells.append(f"{of[ours[0]]['bound']:.1f}" if key[2] <= FEW_ROWS else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def section(report: dict) -> str:
    """What stands between the marks of a page."""
    parts = [f"**{bits} bits**\n\n{table(report['summary'], bits)}\n" for bits in report["setting"]["bits"]]
    return "\n" + "\n".join(parts) + "\n"


def insert(page: Path, marks: tuple[str, str], text: str) -> None:
    """Puts `text` between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(marks[0])
    page.write_text(before + marks[0] + text + marks[1] + rest.split(marks[1])[1], encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    for name, value in asdict(Setting()).items():
        many = {"nargs": "+"} if isinstance(value, list) else {}
        kind = str if name == "shapes" else int
        parser.add_argument(f"--{name}", type=kind, default=value, help="(default: %(default)s)", **many)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all times of layers go")
    parser.add_argument("--models-json", type=Path, metavar="FILE", help="time whole models, too; where that goes")
    parser.add_argument("--models", nargs="+", choices=d2quant_speed_models.MODELS, help="some of the models")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="text for perplexities (default: embedded)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page whose tables are replaced")
    args = vars(parser.parse_args(argv))
    file, models_file, models, text, page = (
        args.pop(name) for name in ("json", "models_json", "models", "evaluation", "page")
    )
    setting = Setting(**args)
    facts = environment(argv) | {"command": shlex.join(["python", "-m", "benchmarks.d2quant_speed", *argv])}
    if importlib.util.find_spec("onnxruntime") is not None:
        facts["versions"]["onnxruntime"] = importlib.metadata.version("onnxruntime")
    rates = {str(threads): bandwidth(threads) for threads in setting.threads}
    report = facts | {"setting": asdict(setting), "bytes_a_second": rates, "results": []}
    for shape in setting.shapes:
        report["results"] += measure(shape, setting)
    report["summary"] = summarize(report["results"], rates)
    print(section(report))
    print(f"How many times as fast as `{BASELINE}` in the same round, medians of the rounds.")
    for threads, rate in rates.items():
        print(f"Reading memory: {rate / 1e9:.1f} GB/s, {threads} threads.")
    write(file, report, page, MARKS, section(report))
    if models_file is not None:
        chosen = models or list(d2quant_speed_models.MODELS)
        report = facts | d2quant_speed_models.measure_all(chosen, setting.threads, text)
        print(d2quant_speed_models.section(report))
        write(models_file, report, page, d2quant_speed_models.MARKS, d2quant_speed_models.section(report))
    print(f"commit {report['commit']}{', and changes on top of it' if report['dirty'] else ''}")


def write(file: Path | None, report: dict, page: Path | None, marks: tuple[str, str], text: str) -> None:
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        insert(page, marks, text)


if __name__ == "__main__":
    main()
