"""`trl-gopd preflight`: measure, before any training, what each λ would do with a teacher and a reference."""

import argparse
import importlib
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DTYPES, above_zero, at_least, check_folders, check_models, reward_scale, torch_device


if TYPE_CHECKING:
    from trl_gopd.preflight_check.report import PreflightReport


REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def _fraction(text: str) -> float:
    """Argparse type of a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `trl-gopd preflight`."""
    parser = argparse.ArgumentParser("trl-gopd preflight", description=__doc__)
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="file with a column `prompt`, .txt file with one prompt per line, or dataset",
    )
    parser.add_argument("--teacher", metavar="MODEL", required=True, help="teacher model: folder or Hub name")
    parser.add_argument(
        "--student", metavar="MODEL", help="student model: folder or Hub name (default: the reference)"
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="reference model: folder or Hub name (default: the student)"
    )
    parser.add_argument("--split", default="train", help="split of the dataset (train)")
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of the dataset")
    parser.add_argument(
        "--lambdas", metavar="λ", type=reward_scale, nargs="+", help="values of λ to measure (0.5 1 1.1 1.25 1.5 2)"
    )
    parser.add_argument(
        "--sample-from",
        choices=("teacher", "student"),
        default="teacher",
        help="model that samples completions (teacher)",
    )
    parser.add_argument(
        "--num-samples", metavar="N", type=at_least(2), default=100, help="number of completions (100)"
    )
    parser.add_argument(
        "--max-completion-length",
        metavar="N",
        type=at_least(1),
        default=256,
        help="maximum tokens of a completion (256)",
    )
    parser.add_argument(
        "--temperature", metavar="T", type=above_zero("1.0"), default=1.0, help="temperature of the training run (1.0)"
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=at_least(0),
        default=0,
        help="seed that selects prompts and samples completions (0)",
    )
    parser.add_argument("--batch-size", metavar="N", type=at_least(1), default=8, help="rows in one forward pass (8)")
    parser.add_argument(
        "--chunk-size",
        metavar="N",
        type=at_least(1),
        default=256,
        help="number of tokens whose logits are held in memory at once (256)",
    )
    parser.add_argument(
        "--reward-funcs",
        metavar="NAME",
        nargs="+",
        default=[],
        help="also decode completions at each λ and score them with these reward functions: "
        f"{', '.join(REWARDS)}, or dotted paths such as my.rewards.exact",
    )
    parser.add_argument(
        "--max-off-teacher-mass",
        metavar="P",
        type=_fraction,
        help="limit on the probability that may move to ids which the teacher finds unlikely (0.01)",
    )
    parser.add_argument(
        "--max-deterministic-flips",
        metavar="P",
        type=_fraction,
        help="limit on the fraction of the teacher's near-certain choices that may change (0.001)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the models (default: as saved)")
    parser.add_argument("--device", help="torch device, such as cpu or cuda:1 (default: cuda if available, else cpu)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="file for the report in JSON")
    parser.add_argument(
        "--figure", metavar="FILE", type=Path, help="file for the figure of the report: .png, .svg or .pdf"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Checks the arguments before any model is loaded, measures every λ, and prints a recommendation."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    _check_arguments(parser, args)

    # These imports take seconds, so they come after the checks that do not need them.
    from trl_gopd.preflight_check import load_prompts, preflight

    optional = ("lambdas", "max_off_teacher_mass", "max_deterministic_flips")
    try:
        report = preflight(
            teacher_model=args.teacher,
            model=args.student,
            ref_model=args.reference,
            prompts=load_prompts(args.prompts, split=args.split, name=args.dataset_config),
            reward_funcs=[_reward(parser, name) for name in args.reward_funcs],
            sample_from=args.sample_from,
            num_samples=args.num_samples,
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            seed=args.seed,
            batch_size=args.batch_size,
            chunk_size=args.chunk_size,
            model_init_kwargs={"dtype": args.dtype, "device_map": torch_device(parser, args.device)},
            **{name: getattr(args, name) for name in optional if getattr(args, name) is not None},
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    print(_table(report))
    if args.json:
        report.settings["command"] = shlex.join(["trl-gopd", "preflight", *arguments])
    for path in filter(None, (args.json, args.figure)):
        report.save(path)
    return 0


def _check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.student is None and args.reference is None:
        parser.error(
            "no reference: name one with --reference, or the student with --student, which is then also the reference"
        )
    check_models(parser, {f"--{role}": getattr(args, role) for role in ("teacher", "reference", "student")})
    check_folders(parser, {"--json": args.json, "--figure": args.figure})
    if args.figure:
        if args.figure.suffix not in (".png", ".svg", ".pdf"):
            parser.error(f"--figure {args.figure}: must end in .png, .svg or .pdf")
        if find_spec("matplotlib") is None:
            parser.error("--figure: needs matplotlib; run `pip install matplotlib`, or leave the option out")


def _reward(parser: argparse.ArgumentParser, name: str) -> Any:
    """Returns a reward function by the name under which TRL's `grpo` script accepts it, or by its dotted path."""
    if name in REWARDS:
        from trl import rewards

        function = getattr(rewards, name)
        # The values are those that TRL's script passes.
        return function(max_completion_len=1280, soft_punish_cache=256) if name.startswith("get_") else function
    module, dot, attribute = name.rpartition(".")
    if not dot:
        parser.error(f"--reward-funcs {name}: must be one of {', '.join(REWARDS)}, or a dotted path")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        parser.error(f"--reward-funcs {name}: cannot be imported ({error}); run where {module} can be found")


def _table(report: "PreflightReport") -> str:
    """Formats the report for people: one line for each λ, the log-ratios of the sampled tokens, and the advice."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.3%}"

    header = ("λ", "D_λ(T‖R)", "log Z", "KL(q‖T)", "entropy", "flips", "near-certain", "off-teacher", "P(end)")
    rows: list[tuple[str, ...]] = [header]
    for effect in report.effects:
        nats = (effect.renyi, effect.log_z, effect.kl_to_teacher, effect.entropy)
        fractions = (effect.flips, effect.deterministic_flips, effect.off_teacher_mass, effect.eos_probability)
        rows.append((f"{effect.gopd_lambda:g}", *(f"{value:.4f}" for value in nats), *map(percent, fractions)))
    if report.decoded:
        judged = [
            (f"{each.reward:.4g} ± {each.standard_error:.2g}", f"{each.length:.1f}", f"{each.truncated:.0%}")
            for each in report.decoded
        ]
        rows = [(*row, *more) for row, more in zip(rows, [("reward", "tokens", "no end"), *judged], strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    title = (
        f"{report.completions} completions by the {report.settings['sample_from']}, {report.tokens} tokens, "
        f"{report.truncated:.0%} without an end; the teacher is near-certain at {report.deterministic:.0%} of them"
    )
    for name, part in (("all tokens", report.log_ratios), ("ends", report.eos_log_ratios)):
        if part is not None:
            low, middle, high = (part.quantiles[q] for q in ("0.05", "0.5", "0.95"))
            beyond = ", ".join(f"{value:.2%} beyond {clip}" for clip, value in part.beyond.items())
            lines.append(
                f"log T/R of {name}: mean {part.mean:+.3f} nats, median {middle:+.3f}, 90% from {low:+.3f} to "
                f"{high:+.3f}; {beyond}"
            )
    advice = [f"recommended: λ = {report.recommended_lambda:g}", *(f"- {reason}" for reason in report.reasons)]
    return "\n".join([title, *lines, *advice])
