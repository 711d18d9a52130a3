"""
What each part of `D2QuantConfig` brings on SmolLM2-135M-Instruct, beside GPTQ, GPTAQ and AutoRound.

    python benchmarks/d2quant_accuracy.py --calibration valid.txt --evaluation test.txt --json accuracy.json

Without texts, the two halves of the embedded one are used. A row is one setting at one width and calibration seed;
each runs in a process of its own, one after the other, on the same windows, so that memory and seconds are its own.
Every finished row is written to `--json`; those found there are not run again.

AutoRound wants other versions of its own: name a Python that has it, and it is run on the same windows too.

    python -m venv ar && ar/bin/pip install torch==2.13.0 auto-round==0.16.1
    python benchmarks/d2quant_accuracy.py --autoround-python ar/bin/python ...
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trl_gopd.files import written_whole


GROUP_SIZE = 64
SAMPLES = 16
SEQ_LENGTH = 512
EVALUATED = 12
AUTOROUND = "AutoRound, 200 iterations"
AUTOROUND_ITERATIONS = 200
AUTOROUND_BATCH = 4  # its default of 8 takes twice as long on a CPU

# Every row starts from this, which is GPTAQ with group-aware order as its authors and the release have it.
GPTAQ = {"hessian_weights": False, "iterations": 0, "tune_epochs": 0}
ROWS = {
    "round to nearest": {**GPTAQ, "rounding": "rtn", "clip": False},
    "GPTQ": {**GPTAQ, "rounding": "gptq"},
    "GPTAQ": GPTAQ,
    "GPTAQ, rotation": {**GPTAQ, "rotation": "group"},
    "+ alternation": {**GPTAQ, "iterations": 15},
    "+ Hessian weights": {"iterations": 0, "tune_epochs": 0},
    "+ both": {"tune_epochs": 0},
    "+ both, rotation": {"tune_epochs": 0, "rotation": "group"},
    "+ both, column scale": {"tune_epochs": 0, "column_scale": True},
    "+ both, mean shift": {"tune_epochs": 0, "mean_shift": True},
    "+ both, mid-rise": {"tune_epochs": 0, "grid": "midrise"},
    "+ both, mid-rise, column scale": {"tune_epochs": 0, "grid": "midrise", "column_scale": True},
    "+ both, bit-planes": {"tune_epochs": 0, "grid": "bitplane"},
    "paper": {"preset": "paper"},
    "release": {"preset": "release"},
    "GPTAQ, tuned": {"hessian_weights": False, "iterations": 0},
    "default, rate 1e-2": {"tune_learning_rate": 1e-2},  # what it is at 2 bits
    "default": {},
    "default, codes": {"tune_codes": 1.0},
}
BASELINE, OURS = "GPTAQ", "default"
# What a row may lack, because the machine was not idle, with its digits in the table.
MEASURED = {"seconds": 0, "peak_over_model": 2}


def windows(path: Path | None, part: str):
    """All windows `(n, SEQ_LENGTH)` of a text, or of a part of the embedded one."""
    from transformers import AutoTokenizer

    from trl_gopd.d2quant.calibration import embedded_text, read_text, token_windows
    from trl_gopd.demo.smollm2 import smollm2_path

    text = embedded_text(part) if path is None else read_text(path)
    return token_windows(text, AutoTokenizer.from_pretrained(smollm2_path()), SEQ_LENGTH)


def run_row(row: str, bits: int, seed: int, args: argparse.Namespace) -> dict:
    """One row, in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from trl_gopd.d2quant.config import D2QuantConfig
    from trl_gopd.d2quant.quantize import quantize_model
    from trl_gopd.demo.smollm2 import smollm2_path
    from trl_gopd.evaluation import compare, measure, storage

    torch.set_num_threads(args.threads)
    calibration, evaluation = windows(args.calibration, "calibration"), windows(args.evaluation, "evaluation")
    with measure() as before:  # weights are mapped from their file, and come into memory when they are used
        model = AutoModelForCausalLM.from_pretrained(smollm2_path())
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    result: dict = {"row": row, "bits": bits, "seed": seed}
    if row == AUTOROUND:
        result["seconds"] = _autoround(model, calibration, bits, seed, args)
        # a scale in half precision and a packed zero point for each group
        result["bits_per_weight"] = bits + (16 + bits) / GROUP_SIZE
    else:
        settings = dict(ROWS[row])
        build = getattr(D2QuantConfig, settings.pop("preset", ""), D2QuantConfig)
        # AutoRound leaves the embedding as it is; what a packed one changes is the question of d2quant_size.py
        sizes = {"group_size": GROUP_SIZE, "num_samples": SAMPLES, "seq_length": SEQ_LENGTH, "embedding_bits": None}
        config = build(bits=bits, **sizes, dataset=calibration, seed=seed, **settings)
        with measure() as used:
            quantize_model(model, None, config)
        result["seconds"] = used.seconds
        result["peak_over_model"] = (used.peak_memory_bytes - before.peak_memory_bytes) / model_bytes
        result["bits_per_weight"] = storage(model).block_bits_per_weight
    original = AutoModelForCausalLM.from_pretrained(smollm2_path())
    agreement = compare(model, original, evaluation[:EVALUATED])
    return result | {
        "perplexity": agreement.model.value,
        "perplexity_original": agreement.reference.value,
        "kl": agreement.kl,
        "kl_standard_error": agreement.kl_standard_error,
        "top1": agreement.top1,
    }


def _autoround(model, calibration, bits: int, seed: int, args: argparse.Namespace) -> float:
    """Replaces the weights of `model` by those that AutoRound, run by another Python, makes of them."""
    import torch

    from trl_gopd.demo.smollm2 import smollm2_path

    drawn = calibration[torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))[:SAMPLES]]
    script = Path(__file__).with_name("autoround_peer.py")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(drawn, Path(folder, "windows.pt"))
        settings = [bits, seed, GROUP_SIZE, AUTOROUND_ITERATIONS, AUTOROUND_BATCH, args.threads]
        start = time.perf_counter()
        subprocess.run([args.autoround_python, script, smollm2_path(), folder, *map(str, settings)], check=True)
        seconds = time.perf_counter() - start
        model.load_state_dict(torch.load(Path(folder, "weights.pt")))
    return seconds


def summarize(rows: list[dict]) -> list[dict]:
    """Means over seeds for each row and width, with standard errors, and perplexity relative to the baseline's."""
    summary = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        baseline = {row["seed"]: row["perplexity"] for row in rows if (row["row"], row["bits"]) == (BASELINE, bits)}
        for name in dict.fromkeys(row["row"] for row in rows if row["bits"] == bits):
            group = [row for row in rows if (row["row"], row["bits"]) == (name, bits)]
            ratios = [row["perplexity"] / baseline[row["seed"]] for row in group if row["seed"] in baseline]
            entry: dict = {"row": name, "bits": bits, "seeds": len(group)}
            for key in ("bits_per_weight", "perplexity", "kl", "top1", "seconds", "peak_over_model"):
                values = [row[key] for row in group if key in row]
                entry[key] = statistics.mean(values) if values else None
            entry["perplexity_standard_error"] = _standard_error([row["perplexity"] for row in group])
            entry["ratio"] = statistics.mean(ratios) if ratios else None
            entry["ratio_standard_error"] = _standard_error(ratios)
            summary.append(entry)
    return summary


def _standard_error(values: list[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def table(summary: list[dict]) -> str:
    """The summary in Markdown."""
    columns = ["bits", "row", "seeds", "bits a weight", "perplexity", "of GPTAQ's", "KL, nats", "same top token"]
    columns += ["seconds", "memory"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for entry in summary:
        cells = [
            entry["bits"],
            entry["row"],
            entry["seeds"],
            f"{entry['bits_per_weight']:.3f}",
            _with_error(entry["perplexity"], entry["perplexity_standard_error"], 2),
            _with_error(entry["ratio"], entry["ratio_standard_error"], 3),
            f"{entry['kl']:.3f}",
            f"{entry['top1']:.1%}",
            *("" if entry[key] is None else f"{entry[key]:.{digits}f}" for key, digits in MEASURED.items()),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def draw(rows: list[dict], path: Path) -> None:
    """Perplexity of each row, a dot for each seed; a panel for each width."""
    from matplotlib.figure import Figure

    widths = list(dict.fromkeys(row["bits"] for row in rows))
    figure = Figure(figsize=(8, 0.6 + 0.24 * len({(row["row"], row["bits"]) for row in rows})), layout="constrained")
    ratios = [len({row["row"] for row in rows if row["bits"] == bits}) for bits in widths]
    panels = figure.subplots(len(widths), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for bits, panel in zip(widths, panels, strict=True):
        group = [row for row in rows if row["bits"] == bits]
        names = list(dict.fromkeys(row["row"] for row in group))
        names.sort(key=lambda name: -statistics.mean(row["perplexity"] for row in group if row["row"] == name))
        right = 1.5 * max(row["perplexity"] for row in group if row["row"] in (BASELINE, OURS))
        for row in group:
            color = {OURS: "C1", AUTOROUND: "C2"}.get(row["row"], "C0")
            beyond = row["perplexity"] > right  # rounding to nearest is, by orders of magnitude
            place = min(row["perplexity"], right), names.index(row["row"])
            panel.plot(*place, ">" if beyond else "o", color=color, alpha=0.8, clip_on=False)
            if beyond:
                panel.annotate(f"{row['perplexity']:,.0f}", place, (-8, -3), textcoords="offset points", ha="right")
        panel.axvline(group[0]["perplexity_original"], color="black", linestyle=":", linewidth=1)
        panel.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4))
        if any(row["perplexity"] > right for row in group):
            panel.set_xlim(right=right)
        panel.set_title(f"{bits} bits; dotted: full precision", fontsize="medium")
        panel.grid(axis="y", linewidth=0.3)
    panels[-1].set_xlabel("perplexity")
    figure.savefig(path, dpi=150)


def commit() -> str | None:
    """Commit of this checkout, if it is one."""
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return run.stdout.strip() or None


def environment(argv: list[str]) -> dict:
    """What a reader needs to run it again."""
    names = ("torch", "transformers")
    return {
        "command": shlex.join(["python", "benchmarks/d2quant_accuracy.py", *argv]),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "processors": os.cpu_count(),
    }


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="text to measure on")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, AUTOROUND], help="default: all of ours")
    parser.add_argument("--autoround-python", type=Path, metavar="PYTHON", help="adds AutoRound")
    parser.add_argument("--threads", type=int, default=2, help="of a row (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("d2quant_accuracy.json"), help="all rows")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="drawn from all rows, with matplotlib")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a row in this very process
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the rows that are not there yet, and prints the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    names = args.rows or [*ROWS, *([AUTOROUND] if args.autoround_python else [])]
    if args.one:
        (name,), (bits,), (seed,) = names, args.bits, args.seeds
        print(json.dumps(run_row(name, bits, seed, args)))
        return
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    done = {(row["row"], row["bits"], row["seed"]) for row in rows}
    for key in itertools.product(names, args.bits, args.seeds):
        if key in done:
            continue
        print("{}, {} bits, seed {}".format(*key), file=sys.stderr, flush=True)
        name, bits, seed = key
        one = ["--one", "--rows", name, "--bits", str(bits), "--seeds", str(seed)]
        for option in ("calibration", "evaluation", "autoround_python", "threads"):
            one += _given(args, option)
        run = subprocess.run([sys.executable, __file__, *one], stdout=subprocess.PIPE, text=True, check=True)
        rows.append({**json.loads(run.stdout.splitlines()[-1]), "threads": args.threads, "commit": commit()})
        rows.sort(key=lambda row: (row["bits"], [*ROWS, AUTOROUND].index(row["row"]), row["seed"]))
        with written_whole(args.json) as part:
            result = {**environment(argv), "summary": summarize(rows), "rows": rows}
            part.write_text(json.dumps(result, indent=1) + "\n")
    print(table(summarize(rows)))
    if args.figure:
        draw(rows, args.figure)


def _given(args: argparse.Namespace, option: str) -> list[str]:
    value = getattr(args, option)
    return [] if value is None else [f"--{option.replace('_', '-')}", str(value)]


if __name__ == "__main__":
    main()
