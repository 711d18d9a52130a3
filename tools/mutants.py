"""
Summary of a run of mutmut: how many mutants of each module the tests notice, and those that they do not.

    python tools/mutants.py --json docs/results/mutants.json

`make mutants` runs mutmut first. A mutant is killed when a test fails or runs into mutmut's time limit. A mutant that
no test calls has survived.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).parent.parent
COMMAND = "make mutants"


def outcomes(folder: Path) -> dict[str, dict[str, str]]:
    """What became of each mutant, by module, from the files that mutmut keeps in its folder."""
    from mutmut.stats import status_by_exit_code

    modules = {}
    for path in sorted(folder.glob("trl_gopd/**/*.meta")):
        codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        if codes:
            module = ".".join(path.relative_to(folder).with_suffix("").with_suffix("").parts)
            modules[module] = {name: status_by_exit_code[code] for name, code in codes.items()}
    return modules


def summarize(statuses: dict[str, str]) -> dict[str, int | float]:
    """Counts of one module, and the percentage of its mutants that is killed."""
    counts = Counter(statuses.values())
    unchecked = counts["not checked"] + counts["check was interrupted by user"]
    killed = counts["killed"] + counts["timeout"] + counts["segfault"]
    checked = len(statuses) - unchecked
    percent = round(100 * killed / checked, 1) if checked else 0.0
    return {
        "mutants": len(statuses),
        "killed": killed,
        "survived": checked - killed,
        "unchecked": unchecked,
        "percent": percent,
    }


def change(name: str) -> list[str]:
    """The lines that a mutant removes and adds."""
    run = subprocess.run(
        [sys.executable, "-m", "mutmut", "show", name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line for line in run.stdout.splitlines() if line.startswith(("+ ", "- "))]


def table(summaries: dict[str, dict[str, int | float]]) -> str:
    """The summaries as Markdown."""
    lines = ["| module | mutants | killed | % |", "| --- | ---: | ---: | ---: |"]
    for name, row in summaries.items():
        lines.append(f"| `{name}` | {row['mutants']} | {row['killed']} | {row['percent']} |")
    return "\n".join(lines)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def report(modules: dict[str, dict[str, str]]) -> dict[str, object]:
    """All that is written to the JSON file."""
    survivors = {
        name: change(name)
        for statuses in modules.values()
        for name, status in statuses.items()
        if status in ("survived", "no tests", "suspicious")
    }
    return {
        "command": COMMAND,
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", "trl_gopd", "tests")),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("mutmut", "torch")}},
        "machine": {"cpus": os.cpu_count()},
        "modules": {module: summarize(statuses) for module, statuses in modules.items()},
        "survivors": survivors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the summary and the survivors go")
    args = parser.parse_args()
    modules = outcomes(ROOT / "mutants")
    if not modules:
        parser.error("there are no mutants in mutants/; run `make mutants`")
    result = report(modules)
    print(table(result["modules"]))
    for name, lines in result["survivors"].items():
        print(f"\n{name}", *lines, sep="\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
