"""
    python -m tests.faults.soak --json docs/results/soak.json --figure docs/images/soak.png

trains thousands of steps with each estimator, quantizes and reloads a model hundreds of times, two processes at a
time, and draws memory and open files over time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gopd_step import environment
from tests.faults.training import ESTIMATORS


ROOT = Path(__file__).parents[2]
SETTLED = 0.2  # of a run, after which caches and pools of memory have their size


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Memory and open files at the end against those once the run has settled."""
    start, end = rows[int(SETTLED * len(rows))], rows[-1]
    return {
        "memory_mib": round(end["memory_mib"], 1),
        "memory_growth_mib": round(end["memory_mib"] - start["memory_mib"], 1),
        "open_files": end["open_files"],
        "open_files_growth": end["open_files"] - start["open_files"],
    }


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Memory and open files of each run over its course, one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for name, rows in runs.items():
        course = [100 * (number + 1) / len(rows) for number in range(len(rows))]
        above.plot(course, [row["memory_mib"] for row in rows], label=name)
        below.plot(course, [row["open_files"] for row in rows], label=name)
    above.set_ylabel("resident memory, MiB")
    below.set_ylabel("open files")
    below.set_xlabel("share of the run, %")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    above.legend(frameon=False, loc="lower right")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000, help="of each estimator (default: %(default)s)")
    parser.add_argument("--cycles", type=int, default=500, help="of quantizing and reloading (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all rows go")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="where the figure goes")
    args = parser.parse_args()
    commands = {
        f"{args.steps} steps, {name}": ["tests.faults.soak_training", "--steps", str(args.steps), "--estimators", name]
        for name in ESTIMATORS
    }
    cycles = ["tests.faults.soak_quantizer", "--cycles", str(args.cycles)]
    commands[f"{args.cycles} times quantized, saved and reloaded"] = cycles

    def work(name: str) -> list[dict[str, Any]]:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", *commands[name], "--json", file.name]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            rows: list[dict[str, Any]] = json.loads(Path(file.name).read_text(encoding="utf-8"))
        print(f"{name}: {growth(rows)}", flush=True)
        return rows

    facts = environment(sys.argv[1:]) | {"command": "make soak"}
    with ThreadPoolExecutor(2) as pool:
        order = sorted(commands, key=lambda name: "quantized" not in name)  # the longest first
        runs = dict(zip(order, pool.map(work, order), strict=True))
    report = {**facts, "growth": {name: growth(rows) for name, rows in runs.items()}, "runs": runs}
    if args.json:
        args.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
