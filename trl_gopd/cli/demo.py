"""`trl-gopd demo`: the paper's claim on this machine, in minutes."""

import argparse
from pathlib import Path


def _lambda(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"λ must be a finite number of at least 0, got {text!r}; try 1.25")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Parser of the sub-command."""
    parser = argparse.ArgumentParser("trl-gopd demo", description=__doc__)
    scenes = parser.add_subparsers(dest="scene", required=True)
    distill = scenes.add_parser("distill", help="distil a small teacher at several λ and compare")
    distill.add_argument("--seeds", type=_positive, default=1, help="how many seeds to run (default: 1)")
    distill.add_argument("--lambdas", type=_lambda, nargs="+", help="reward scales (default: 0.5 1 1.25 1.5)")
    distill.add_argument("--estimators", nargs="+", choices=("sampled", "full"), help="estimators (default: both)")
    distill.add_argument("--output-dir", type=Path, default=Path("demo_out"), help="models and figure (demo_out)")
    distill.add_argument("--json", type=Path, help="where the result goes (default: distill.json in --output-dir)")
    distill.add_argument("--workers", type=_positive, default=2, help="processes, one thread each (default: 2)")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the scene that the arguments ask for."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    json_path = args.json or args.output_dir / "distill.json"
    # before minutes of training, not after
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not json_path.parent.is_dir():
        parser.error(f"--json {json_path}: the folder {json_path.parent} does not exist; make it or name another")

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
    return 0
