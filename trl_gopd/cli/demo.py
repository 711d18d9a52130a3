"""`trl-gopd demo`: demonstrate distillation past a teacher, merging of experts, and quantization on this machine."""

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from ..files import written_whole
from .arguments import at_least, check_folders, reward_scale


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `trl-gopd demo`, which has one sub-parser for each scene."""
    parser = argparse.ArgumentParser("trl-gopd demo", description=__doc__)
    scenes = parser.add_subparsers(dest="scene", required=True)
    for name, summary, lambdas in (
        ("distill", "distill a small teacher at several λ and compare the students", "0.5 1 1.25 1.5"),
        ("merge", "merge two small experts into their base, by distillation and by averaging weights", "1 1.25 1.5"),
    ):
        scene = scenes.add_parser(name, help=summary)
        scene.add_argument("--seeds", type=at_least(1), default=1, help="number of seeds to run (default: 1)")
        scene.add_argument("--lambdas", type=reward_scale, nargs="+", help=f"reward scales (default: {lambdas})")
        scene.add_argument("--estimators", nargs="+", choices=("sampled", "full"), help="estimators (default: both)")
        scene.add_argument(
            "--workers", type=at_least(1), default=2, help="number of processes, each with one thread (default: 2)"
        )
    quantize = scenes.add_parser(
        "quantize", help="quantize SmolLM2-135M-Instruct, measure the result and ask it questions"
    )
    quantize.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4, 8), help="bit widths (default: 3 2)")
    quantize.add_argument(
        "--chat", action="store_true", help="afterwards chat with the smallest model; an empty line ends the chat"
    )
    for name, scene in scenes.choices.items():
        scene.add_argument(
            "--output-dir",
            type=Path,
            default=Path("demo_out"),
            help="folder for models and figure (default: demo_out)",
        )
        scene.add_argument("--json", type=Path, help=f"file for the result (default: {name}.json in --output-dir)")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the scene that the arguments select and returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    json_path = args.json or args.output_dir / f"{args.scene}.json"
    # Paths are checked here so that a mistake does not cost minutes of training.
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_folders(parser, {"--json": json_path})
    scene = _quantize if args.scene == "quantize" else _train
    scene(args, json_path)
    return 0


def _train(args: argparse.Namespace, json_path: Path) -> None:
    scene = importlib.import_module(f"trl_gopd.demo.{args.scene}")
    result = scene.run(
        seeds=args.seeds,
        output_dir=args.output_dir,
        lambdas=args.lambdas or scene.LAMBDAS,
        estimators=args.estimators or scene.ESTIMATORS,
        workers=args.workers,
    )
    _show(scene, result, args, json_path)


def _quantize(args: argparse.Namespace, json_path: Path) -> None:
    from trl_gopd.demo import quantize

    bits = args.bits or quantize.BITS
    result = quantize.run(args.output_dir, bits)
    _show(quantize, result, args, json_path)
    if args.chat:
        quantize.chat(quantize.folder_of(args.output_dir, min(bits)))


def _show(scene: ModuleType, result: dict[str, Any], args: argparse.Namespace, json_path: Path) -> None:
    figure = args.output_dir / f"{args.scene}.png"
    with written_whole(json_path) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    scene.draw(result, figure)
    scene.print_table(result)
    print(f"{result['seconds']:.0f} s; wrote {json_path} and {figure}")
