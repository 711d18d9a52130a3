"""
How large a cache of log-probabilities gets, and how fast it is written and read.

    python -m benchmarks.gopd_cache --json docs/results/gopd_cache.json  # a million rows of 64 tokens
    python -m benchmarks.gopd_cache --rows 10000                         # to see that it works

Rows are written as training writes them, a batch a transaction that waits for the disk, with random numbers under
random keys. Then random rows are read, a batch at a time, each checked against its checksum; and some that are not
there are looked for. The file lies in `--folder`, on whose disk the figures depend, and is removed. What was read last
is still in memory, so that reading is measured without the disk.
"""

import argparse
import json
import random
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gopd_step import SEED, environment
from trl_gopd.gopd.frozen.cache_file import LogprobCache


@dataclass(frozen=True)
class Setting:
    """
    Args:
        rows (`int`): Completions to write.
        tokens (`int`): Of each.
        batch (`int`): Rows that are written, or read, at a time.
        reads (`int`): Rows to read, and to look for in vain.
    """

    rows: int = 1_000_000
    tokens: int = 64
    batch: int = 512
    reads: int = 200_000


def keys_of(numbers: range | list[int]) -> list[bytes]:
    """Keys as random as those of real rows, which are SHA-256."""
    return [random.Random(number).randbytes(32) for number in numbers]


def measure(setting: Setting, folder: Path) -> dict:
    """Sizes in bytes and times in seconds, and how many rows were found."""
    path = folder / "cache.sqlite3"
    cache = LogprobCache(path, temperature=1.0, identity={"name": "benchmark", "revision": None, "weights": None})
    generator = torch.Generator().manual_seed(SEED)
    seconds = {"write": 0.0, "read": 0.0, "miss": 0.0}
    for start in range(0, setting.rows, setting.batch):
        keys = keys_of(range(start, min(start + setting.batch, setting.rows)))
        values = -torch.rand(len(keys), setting.tokens, generator=generator)
        begin = time.perf_counter()
        cache.write(dict(zip(keys, values, strict=True)))
        seconds["write"] += time.perf_counter() - begin
    found = {"read": 0, "miss": 0}
    chance = random.Random(SEED)
    for kind, first in (("read", 0), ("miss", setting.rows)):
        for start in range(0, setting.reads, setting.batch):
            count = min(setting.batch, setting.reads - start)
            keys = keys_of([first + chance.randrange(setting.rows) for _ in range(count)])
            begin = time.perf_counter()
            rows, damaged = cache.read(dict.fromkeys(keys, setting.tokens))
            seconds[kind] += time.perf_counter() - begin
            if damaged:
                raise RuntimeError(f"{len(damaged)} rows are damaged.")
            found[kind] += sum(key in rows for key in keys)
    begin = time.perf_counter()
    opened = LogprobCache(path, temperature=1.0)
    seconds["open"] = time.perf_counter() - begin
    return {"bytes": path.stat().st_size, "rows": len(opened), "seconds": seconds, "found": found}


def summarize(result: dict, setting: Setting) -> dict[str, float]:
    """Bytes a token and a row, and rows a second."""
    rates = {"write": setting.rows, "read": setting.reads, "miss": setting.reads}
    return {
        "bytes a token": result["bytes"] / (setting.rows * setting.tokens),
        "bytes a row": result["bytes"] / setting.rows,
        **{f"{name} rows a second": count / result["seconds"][name] for name, count in rates.items()},
    }


def table(summary: dict[str, float]) -> str:
    """For people."""
    return "\n".join(["| figure | value |", "|---|---|", *(f"| {k} | {v:,.1f} |" for k, v in summary.items())])


def parse_args(argv: list[str] | None = None) -> tuple[Setting, Path | None, Path | None]:
    """What is measured, in which folder, and where the JSON goes."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    for name, default in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--folder", type=Path, help="where the file lies meanwhile (default: that of temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    args = vars(parser.parse_args(argv))
    file, folder = args.pop("json"), args.pop("folder")
    for name, value in args.items():
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return Setting(**args), folder, file


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    setting, folder, file = parse_args(argv)
    report = environment(argv) | {"command": shlex.join(["python", "-m", "benchmarks.gopd_cache", *argv])}
    report["setting"] = asdict(setting)
    with tempfile.TemporaryDirectory(prefix="gopd_cache_", dir=folder) as place:
        report["result"] = measure(setting, Path(place))
    report["summary"] = summarize(report["result"], setting)
    print(table(report["summary"]))
    print(f"commit {report['commit']}{', and changes on top of it' if report['dirty'] else ''}")
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
