"""`trl-gopd demo`: the paper's claim on this machine, in minutes."""

import argparse
from pathlib import Path

from .arguments import at_least, reward_scale


def build_parser() -> argparse.ArgumentParser:
    """Parser of the sub-command."""
    parser = argparse.ArgumentParser("trl-gopd demo", description=__doc__)
    scenes = parser.add_subparsers(dest="scene", required=True)
    distill = scenes.add_parser("distill", help="distil a small teacher at several λ and compare")
    distill.add_argument("--seeds", type=at_least(1), default=1, help="how many seeds to run (default: 1)")
    distill.add_argument("--lambdas", type=reward_scale, nargs="+", help="reward scales (default: 0.5 1 1.25 1.5)")
    distill.add_argument("--estimators", nargs="+", choices=("sampled", "full"), help="estimators (default: both)")
    distill.add_argument("--output-dir", type=Path, default=Path("demo_out"), help="models and figure (demo_out)")
    distill.add_argument("--json", type=Path, help="where the result goes (default: distill.json in --output-dir)")
    distill.add_argument("--workers", type=at_least(1), default=2, help="processes, one thread each (default: 2)")
    quantize = scenes.add_parser("quantize", help="quantize SmolLM2-135M-Instruct, measure it and ask it questions")
    quantize.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4, 8), help="code widths (default: 3 2)")
    quantize.add_argument("--output-dir", type=Path, default=Path("demo_out"), help="models and figure (demo_out)")
    quantize.add_argument("--json", type=Path, help="where the result goes (default: quantize.json in --output-dir)")
    quantize.add_argument("--chat", action="store_true", help="then talk to the smallest, until an empty line")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the scene that the arguments ask for."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    json_path = args.json or args.output_dir / f"{args.scene}.json"
    # before minutes of training, not after
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not json_path.parent.is_dir():
        parser.error(f"--json {json_path}: the folder {json_path.parent} does not exist; make it or name another")
    scene = _distill if args.scene == "distill" else _quantize
    scene(args, json_path)
    return 0


def _distill(args: argparse.Namespace, json_path: Path) -> None:
    from trl_gopd.demo import distill

    result = distill.run(
        seeds=args.seeds,
        output_dir=args.output_dir,
        lambdas=args.lambdas or distill.LAMBDAS,
        estimators=args.estimators or distill.ESTIMATORS,
        workers=args.workers,
    )
    distill.write_json(result, json_path)
    distill.draw(result, args.output_dir / "distill.png")
    distill.print_table(result)
    print(f"{result['seconds']:.0f} s; wrote {json_path} and {args.output_dir / 'distill.png'}")


def _quantize(args: argparse.Namespace, json_path: Path) -> None:
    from trl_gopd.demo import distill, quantize

    bits = args.bits or quantize.BITS
    result = quantize.run(args.output_dir, bits)
    distill.write_json(result, json_path)
    quantize.draw(result, args.output_dir / "quantize.png")
    quantize.print_table(result)
    print(f"{result['seconds']:.0f} s; wrote {json_path} and {args.output_dir / 'quantize.png'}")
    if args.chat:
        quantize.chat(quantize.folder_of(args.output_dir, min(bits)))
