"""
Runs the contract tests and a smoke training with each supported version of TRL, and writes what came out.

    python -m tests.compat.matrix --json docs/results/compatibility.json --page docs/compatibility.md

Each version is installed once, alone, into a folder below `.compat/`, which goes before the environment that runs this
file: everything but TRL is shared with it. What a version requires of the shared packages is compared with what is
there.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".compat"
# The lowest and the highest patch version of each minor version.
VERSIONS = ("1.14.0", "1.14.2", "1.15.0", "1.16.0")
PINNED = "1.16.0"
# TRL 1.15 computes log-probabilities with Triton alone, whose interpreter does it without a GPU.
TRITON = "triton==3.7.1"
NEEDS_TRITON = ("1.15.0",)
TESTS = {"contract": "tests/contract/test_trl.py", "smoke": "tests/compat/test_smoke.py"}
# Of a loss after a few steps in float32: a hundred roundings of a number near 1.
TOLERANCE = 100 * 2**-23
SHARED = ("torch", "transformers", "accelerate", "peft", "datasets")
BEGIN, END = "<!-- result of make compat: begin -->\n", "<!-- result of make compat: end -->\n"


def install(requirement: str) -> Path:
    """The folder that holds one package without what it depends on; installed there the first time."""
    folder = FOLDER / requirement.replace("==", "-")
    if not folder.exists():
        print(f"Installing {requirement} into {folder.relative_to(ROOT)}", flush=True)
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(part), requirement], check=True)
        part.rename(folder)
    return folder


def unmet(folder: Path) -> list[str]:
    """The requirements of the TRL in `folder` that the shared packages do not meet."""
    (trl,) = importlib.metadata.distributions(name="trl", path=[str(folder)])
    missing = []
    for line in trl.requires or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier}")
    return missing


def read_report(path: Path, version: str) -> dict:
    """Counts, and losses by test, of pytest's report; raises if the tests ran with another version of TRL."""
    row: dict = {kind: {"passed": 0, "failed": []} for kind in TESTS} | {"losses": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        kind = "smoke" if "test_smoke" in case.get("classname", "") else "contract"
        properties = {each.get("name"): each.get("value") for each in case.iter("property")}
        if properties.get("trl", version) != version:
            raise RuntimeError(f"The tests imported TRL {properties['trl']} instead of {version}.")
        if case.find("failure") is not None or case.find("error") is not None:
            row[kind]["failed"].append(case.get("name"))
        elif case.find("skipped") is None:
            row[kind]["passed"] += 1
        if "losses" in properties:
            row["losses"][case.get("name")] = json.loads(properties["losses"])
    return row


def run(version: str) -> dict:
    """One row of the result."""
    folder = install(f"trl=={version}")
    paths, interpreter = [folder], {}
    if version in NEEDS_TRITON:
        paths.append(install(TRITON))
        interpreter["TRITON_INTERPRET"] = "1"
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **offline, **interpreter, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    print(f"Running the contract tests and the smoke training with TRL {version} (half a minute)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        report = Path(name, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", "--disable-warnings", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *TESTS.values()]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
        if not report.exists():
            raise RuntimeError(f"pytest did not start with TRL {version}.")
        return {"trl": version, "unmet": unmet(folder), **read_report(report, version)}


def is_good(row: dict, pinned: dict) -> bool:
    """Whether requirements are met, all tests ran and passed, and losses are those of the pinned version."""
    if row["unmet"] or any(row[kind]["failed"] or not row[kind]["passed"] for kind in TESTS):
        return False
    return largest_difference(row["losses"], pinned["losses"]) <= TOLERANCE


def largest_difference(losses: dict, other: dict) -> float:
    if losses.keys() != other.keys():
        raise RuntimeError(f"Losses of other runs are compared: {sorted(losses.keys() ^ other.keys())}.")
    return max(abs(a - b) for name in losses for a, b in zip(losses[name], other[name], strict=True))


def pinned_row(rows: list[dict]) -> dict:
    return next(row for row in rows if row["trl"] == PINNED)


def table(rows: list[dict]) -> str:
    """In Markdown, with the losses compared with those of the pinned version."""
    pinned = pinned_row(rows)
    lines = [
        f"| TRL | its requirements | contract tests | smoke training | largest difference of a loss from {PINNED} |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["trl"] + (", pinned" if row is pinned else "")
        name += ", Triton interpreted" if row["trl"] in NEEDS_TRITON else ""
        met = f"needs {', '.join(row['unmet'])}" if row["unmet"] else "met"
        counts = [
            f"{row[kind]['passed']} passed" + (f", {len(row[kind]['failed'])} failed" if row[kind]["failed"] else "")
            for kind in TESTS
        ]
        difference = ""
        if row["losses"] and not row["smoke"]["failed"]:
            largest = largest_difference(row["losses"], pinned["losses"])
            difference = f"{largest:.1e}" if largest else "0"
        lines.append(f"| {' | '.join([name, met, *counts, difference])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs all versions; 1 if one of them is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page whose table is replaced")
    args = parser.parse_args()
    rows = [run(version) for version in VERSIONS]
    print(table(rows))
    if args.json:
        versions = {"python": ".".join(map(str, sys.version_info[:3]))}
        versions |= {name: importlib.metadata.version(name) for name in SHARED}
        result = {"command": "make compat", "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.page:
        head, rest = args.page.read_text(encoding="utf-8").split(BEGIN)
        args.page.write_text(head + BEGIN + table(rows) + END + rest.split(END)[1], encoding="utf-8")
    return 0 if all(is_good(row, pinned_row(rows)) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
