"""
    python -m tests.faults --json docs/results/faults.json --page docs/reliability.md

makes the tries of all scenarios, two at a time, writes each finished row at once, and ends with a table and with 1 if
anything was lost. `--resume` goes on with the rows that the JSON file lacks.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gopd_step import environment
from tests.faults.harness import SCENARIOS, run
from trl_gopd.files import written_whole


ROOT = Path(__file__).parent.parent.parent
AREAS = tuple(
    sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if not path.stem.startswith(("__", "test_", "soak")) and path.stem not in ("harness", "processes", "disks")
    )
)
MARKS = ("<!-- faults: begin -->", "<!-- faults: end -->")


def load(areas: tuple[str, ...] = AREAS) -> None:
    """Registers the scenarios of these areas."""
    for area in areas:
        importlib.import_module(f"tests.faults.{area}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=AREAS, default=list(AREAS), metavar="AREA", help=f"of {AREAS}")
    parser.add_argument("--fault", metavar="TEXT", default="", help="only scenarios whose name contains this")
    parser.add_argument("--short", action="store_true", help="as few tries as in `make test`")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where rows go, one after the other")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page whose table is written anew")
    parser.add_argument("--one", metavar="AREA:FAULT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return _one(args.one, short=args.short, seed=args.seed)

    load(tuple(args.only))
    chosen = [
        scenario
        for scenario in SCENARIOS
        if scenario.area in args.only
        and args.fault in scenario.name
        and (scenario.short if args.short else scenario.tries)
    ]
    known = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.resume and args.json.exists() else []
    rows = {(row["area"], row["fault"]): row for row in known if row["seed"] == args.seed}
    rest = [scenario for scenario in chosen if (scenario.area, scenario.name) not in rows]
    start = time.perf_counter()

    def work(scenario):
        # A process of its own: what one scenario breaks in memory does not reach the next.
        command = [sys.executable, "-m", "tests.faults", "--one", f"{scenario.area}:{scenario.name}"]
        command += ["--seed", str(args.seed)] + (["--short"] if args.short else [])
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in child.stdout.splitlines() if line.startswith('{"area"')]
        if not lines:
            failure = f"The process ended with {child.returncode}.\n{child.stderr[-3000:]}"
            counts = {"tries": 1, "lost": 1, "intact": 0, "recovered": 0, "refused": 0}
            row = {"area": scenario.area, "fault": scenario.name, **counts, "seconds": 0.0, "failures": [failure]}
        else:
            row = json.loads(lines[-1])
        row |= {"seed": args.seed, "commit": facts["commit"]}
        rows[scenario.area, scenario.name] = row
        print(
            f"{row['area']}: {row['fault']}: {row['tries']} tries, {row['lost']} lost, {row['seconds']} s", flush=True
        )
        for failure in row["failures"]:
            print(failure, flush=True)
        if args.json:
            _write_json(args.json, list(rows.values()), facts)

    facts = environment(sys.argv[1:]) | {"command": "make faults", "seed": args.seed}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, sorted(rest, key=lambda s: s.area != "ranks")))  # the longest first
    order = {(scenario.area, scenario.name): number for number, scenario in enumerate(chosen)}
    table = [rows[key] for key in sorted(order, key=order.__getitem__)]
    lost = sum(row["lost"] for row in table)
    tries = sum(row["tries"] for row in table)
    if args.json:
        _write_json(args.json, table, facts)
    print(render(table))
    print(f"{len(table)} scenarios, {tries} tries, {lost} lost, {time.perf_counter() - start:.0f} s")
    if args.page:
        before, rest_of_page = args.page.read_text(encoding="utf-8").split(MARKS[0])
        after = rest_of_page.split(MARKS[1])[1]
        args.page.write_text(f"{before}{MARKS[0]}\n{render(table)}\n{MARKS[1]}{after}", encoding="utf-8")
    return int(lost > 0)


def _one(name: str, *, short: bool, seed: int) -> int:
    import torch

    torch.set_num_threads(1)
    area, _, fault = name.partition(":")
    load((area,))
    scenario = next(s for s in SCENARIOS if (s.area, s.name) == (area, fault))
    result = run(scenario, tries=scenario.short if short else scenario.tries, seed=seed)
    sys.stdout.flush()
    print(json.dumps(result.row()), flush=True)
    os._exit(0)  # whatever threads a scenario has left


def _write_json(path: Path, rows: list[dict], facts: dict) -> None:
    with written_whole(path) as part:
        part.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def render(rows: list[dict]) -> str:
    """The table of a page."""
    columns = ("area", "fault", "tries", "lost", "intact", "recovered", "refused")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows]
    total = [str(sum(row[column] for row in rows)) for column in columns[2:]]
    return "\n".join([*lines, f"| all | | {' | '.join(total)} |"])


if __name__ == "__main__":
    sys.exit(main())
