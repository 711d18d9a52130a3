"""
What a frozen model reads to score a batch whose lengths have a heavy tail, and how long that takes.

    python -m benchmarks.gopd_scoring --json docs/results/gopd_scoring.json   # five to nine minutes on two cores
    python -m benchmarks.gopd_scoring --rows 16 --repeats 1 --median 6        # to see that it works

SmolLM2-135M-Instruct scores random completions of random prompts. The lengths of the completions are drawn from a
Pareto distribution, and the longest is at least eight times the median, as among answers of which a few never end. Two
contestants take turns, in an order that is reversed from round to round:

- `padded` takes rows in their order, `per_device_train_batch_size` at a time, padded to the longest of the batch, and
  applies the head to all columns of the completions;
- `grouped` is what `GOPDTrainer` does: groups of like length, cut to what has to be read, and the head on scored
  tokens.

Tokens to be read are all but the last of each row, which predicts nothing. Targets: at most 1.15 positions a token and
half the time.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.gopd_step import SEED, _spread, environment
from trl_gopd.gopd.batch import Sequences
from trl_gopd.gopd.divergence import chunk_slices
from trl_gopd.gopd.frozen.local import LocalScorer
from trl_gopd.gopd.stratified import log_probs_at


CONTESTANTS = ("padded", "grouped")
TARGETS = {"positions": 1.15, "seconds": 0.5}  # at most, a token that has to be read and of the time of `padded`
CHUNK_SIZE = 256
TAIL = 1.1  # exponent of the Pareto distribution, whose variance is infinite below 2


@dataclass(frozen=True)
class Setting:
    """
    Args:
        rows (`list[int]`): Completions of each batch.
        median (`int`): Tokens of a completion in the middle of the distribution.
        longest (`int`): Tokens of a completion at most, in medians. The longest of a batch has at least 8.
        prompt (`int`): Tokens of the longest prompt; the others have half as many and more.
        batch_size (`int`): Rows a forward.
        threads (`int`): Threads of torch.
        warmup (`int`): Rounds before the first that is timed.
        repeats (`int`): Timed rounds.
    """

    rows: list[int]
    median: int = 12
    longest: int = 10
    prompt: int = 16
    batch_size: int = 4
    threads: int = 2
    warmup: int = 1
    repeats: int = 5


def draw_batch(rows: int, setting: Setting, vocab_size: int) -> Sequences:
    """Prompts padded left and completions padded right, to the longest of the batch."""
    gen = torch.Generator().manual_seed(SEED)
    # Quantiles of the Pareto distribution, one a row, so that a batch has the shape of the distribution.
    quantiles = (torch.arange(rows) + 0.5) / rows
    least = setting.median / 2 ** (1 / TAIL)
    lengths = (least * (1 - quantiles) ** (-1 / TAIL)).round().long().clamp(1, setting.longest * setting.median)
    lengths[-1] = max(int(lengths[-1]), 8 * int(lengths.median()))
    lengths = lengths[torch.randperm(rows, generator=gen)]
    prompts = torch.randint(setting.prompt // 2, setting.prompt + 1, (rows,), generator=gen)
    columns = torch.arange(setting.prompt + int(lengths.max())) - setting.prompt
    mask = (columns >= -prompts.unsqueeze(1)) & (columns < lengths.unsqueeze(1))
    ids = torch.randint(3, vocab_size, mask.shape, generator=gen)
    return Sequences.of(ids.masked_fill(~mask, 0), mask.long(), int(lengths.max()))


def build_scorer(setting: Setting) -> LocalScorer:
    """SmolLM2 in float32 as a run has it."""
    from contextlib import nullcontext

    from transformers import AutoModelForCausalLM

    from trl_gopd.demo.smollm2 import smollm2_path

    model = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)
    alone = SimpleNamespace(
        device=torch.device("cpu"), state=SimpleNamespace(deepspeed_plugin=None), autocast=nullcontext
    )
    return LocalScorer(
        model,
        accelerator=alone,
        temperature=1.0,
        role="teacher_model",
        batch_size=setting.batch_size,
        chunk_size=CHUNK_SIZE,
    )


@torch.no_grad()
def score_padded(scorer: LocalScorer, sequences: Sequences, batch_size: int) -> Tensor:
    """Log-probabilities `(B, T)`, with all the padding of the batch."""
    logps, inner = torch.zeros(sequences.scored.shape), scorer.inner
    for rows in chunk_slices(len(sequences), batch_size):
        part = sequences[rows]
        hidden = inner.base.base_model(
            input_ids=part.input_ids, attention_mask=part.attention_mask, use_cache=False
        ).last_hidden_state[:, -part.num_tokens - 1 : -1]
        hidden, labels = hidden.flatten(0, 1), part.completion_ids.flatten().unsqueeze(1)
        picked = [log_probs_at(inner.logits(hidden[c]), labels[c]) for c in chunk_slices(len(hidden), CHUNK_SIZE)]
        logps[rows] = torch.cat(picked).view(part.scored.shape).masked_fill(~part.scored, 0.0)
    return logps


def measure(scorer: LocalScorer, rows: int, setting: Setting) -> dict:
    """What each contestant reads of one batch, and the seconds of each round."""
    sequences = draw_batch(rows, setting, scorer.vocab_size)
    functions: dict[str, Callable[[], Tensor]] = {
        "padded": lambda: score_padded(scorer, sequences, setting.batch_size),
        "grouped": lambda: scorer.score(sequences),
    }
    shapes: list[tuple[int, ...]] = []
    hook = scorer.inner.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    completions = sequences.scored.sum(1)
    result: dict = {
        "rows": rows,
        "tokens": int((sequences.lengths - 1).sum()),
        "median": int(completions.median()),
        "longest": int(completions.max()),
        "contestants": {name: {"seconds": []} for name in CONTESTANTS},
    }
    values = {}
    for number in range(setting.warmup + setting.repeats):
        for name in CONTESTANTS if number % 2 == 0 else reversed(CONTESTANTS):
            shapes.clear()
            started = time.perf_counter()
            values[name] = functions[name]()
            seconds, of = time.perf_counter() - started, result["contestants"][name]
            if number >= setting.warmup:
                of["seconds"].append(seconds)
            of["forwards"], of["positions"] = len(shapes), sum(count * width for count, width in shapes)
        print(f"{rows} rows, round {number + 1} of {setting.warmup + setting.repeats}", file=sys.stderr)
    hook.remove()
    result["difference"] = float((values["padded"] - values["grouped"]).abs().max())
    return result


def summarize(results: list[dict]) -> list[dict]:
    """For each batch and contestant positions a token, seconds, and their ratio to those of `padded`."""
    rows = []
    for result in results:
        base = result["contestants"]["padded"]["seconds"]
        for name, each in result["contestants"].items():
            ratios = [ours / theirs for ours, theirs in zip(each["seconds"], base, strict=True)]
            rows.append(
                {
                    "rows": result["rows"],
                    "contestant": name,
                    "forwards": each["forwards"],
                    "positions": each["positions"],
                    "per_token": each["positions"] / result["tokens"],
                    "seconds": _spread(each["seconds"]),
                    "ratio": _spread(ratios),
                }
            )
    return rows


def table(summary: list[dict]) -> str:
    """Markdown."""
    columns = ("rows", "scoring", "forwards", "positions", "positions a token", "seconds", "of padded")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for each in summary:
        seconds, ratio = ("{median:.2f} ({min:.2f}–{max:.2f})".format(**each[name]) for name in ("seconds", "ratio"))
        cells = (each["rows"], each["contestant"], each["forwards"], each["positions"], f"{each['per_token']:.2f}")
        lines.append(f"| {' | '.join(map(str, (*cells, seconds, ratio)))} |")
    return "\n".join(lines)


def missed(summary: list[dict]) -> list[str]:
    """The targets that `grouped` misses, in words."""
    found = []
    for each in (row for row in summary if row["contestant"] == "grouped"):
        for name, value in (("positions", each["per_token"]), ("seconds", each["ratio"]["median"])):
            if value > TARGETS[name]:
                found.append(f"{each['rows']} rows: {name} {value:.2f}, target {TARGETS[name]:.2f}")
    return found


def parse_args(argv: list[str] | None = None) -> tuple[Setting, Path | None]:
    """What is measured, and where the JSON goes."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64], help="batches (default: %(default)s)")
    for name in ("median", "longest", "prompt", "batch_size", "threads", "warmup", "repeats"):
        default = getattr(Setting, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all times go")
    args = vars(parser.parse_args(argv))
    file = args.pop("json")
    for name, value in args.items():
        if any(number < (0 if name == "warmup" else 1) for number in (value if name == "rows" else [value])):
            parser.error(f"--{name.replace('_', '-')} is too small: {value}")
    return Setting(**args), file


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    setting, file = parse_args(argv)
    torch.set_num_threads(setting.threads)
    report = environment(argv) | {"command": shlex.join(["python", "-m", "benchmarks.gopd_scoring", *argv])}
    report |= {"model": "SmolLM2-135M-Instruct", "setting": asdict(setting)}
    scorer = build_scorer(setting)
    report["results"] = [measure(scorer, rows, setting) for rows in setting.rows]
    report["summary"] = summarize(report["results"])
    print(table(report["summary"]))
    print("\nMedian (least–largest) of the rounds; ratios are to `padded` in the same round.")
    for result in report["results"]:
        print(
            f"{result['rows']} rows of {statistics.mean([result['tokens'] / result['rows']]):.0f} tokens on average; "
            f"completions of {result['median']} in the middle, {result['longest']} at most; the contestants differ by "
            f"{result['difference']:.1e} nats at most."
        )
    print("\n".join(["Missed:", *missed(report["summary"])]) if missed(report["summary"]) else "All targets are met.")
    print(f"commit {report['commit']}{', and changes on top of it' if report['dirty'] else ''}")
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
