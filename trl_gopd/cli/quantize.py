"""`trl-gopd quantize`: quantize a model to 2, 3, 4 or 8 bits and save it in a folder."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gopd.files import written_whole

from .arguments import DTYPES, above_zero, check_folders, check_models, refusals_in_one_line, torch_device


if TYPE_CHECKING:
    from trl_gopd.d2quant.config import D2QuantConfig


PRESETS = ("default", "paper", "release")


def _setting(text: str) -> tuple[str, Any]:
    """Argparse type of `NAME=VALUE`, where the value is JSON or, if it is not valid JSON, a plain string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}; try alpha=0.5 or grid=midrise")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # so that strings can be given without quotes


def _embedding_bits(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `trl-gopd quantize`."""
    parser = argparse.ArgumentParser("trl-gopd quantize", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of the model, or its name on the Hub")
    parser.add_argument("-o", "--output-dir", metavar="DIR", type=Path, help="folder to save to; new or empty")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what the run would need and take, from the model's config.json, and quantize nothing",
    )
    parser.add_argument(
        "--tflops",
        metavar="RATE",
        type=above_zero("0.1"),
        help="with --plan: speed of --device in TFLOP/s (default: measured here in a second)",
    )
    parser.add_argument("--preset", choices=PRESETS, default="default", help="set of options to start from (default)")
    parser.add_argument("--bits", type=int, default=2, help="bits of a weight: 2, 3, 4 or 8 (2)")
    parser.add_argument(
        "--embedding-bits",
        metavar="N",
        type=_embedding_bits,
        default=argparse.SUPPRESS,
        help="bits of a weight of embedding and head: 2, 3, 4, 8, or none to leave them as they are (8)",
    )
    parser.add_argument(
        "--group-size", metavar="N", type=int, help="number of columns that share a scale; -1: one group a row"
    )
    parser.add_argument("--dataset", help="calibration text: a file, or wikitext2 (default: an embedded text)")
    parser.add_argument("--num-samples", metavar="N", type=int, help="number of calibration windows")
    parser.add_argument("--seq-length", metavar="N", type=int, help="tokens of a calibration window")
    parser.add_argument("--seed", metavar="N", type=int, help="seed that selects the calibration windows")
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="folder that keeps finished blocks, so that an interrupted run can be resumed",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="any other field of D2QuantConfig, such as alpha=0.5; may be repeated",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the layers that are not quantized (default: as saved)",
    )
    parser.add_argument("--device", help="torch device, such as cpu or cuda:1 (default: cuda if available, else cpu)")
    parser.add_argument(
        "--offload",
        choices=("cpu", "disk"),
        help="bring one block at a time to --device; the others wait in CPU memory, or in the files of the model",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="file for the report in JSON")
    parser.add_argument(
        "--figure", metavar="FILE", type=Path, help="file for the figure of the report: .png, .svg or .pdf"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Checks the arguments before any model is loaded, then quantizes the model and saves it."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    check_models(parser, {"MODEL": args.model})
    check_folders(parser, {"--output-dir": args.output_dir, "--json": args.json, "--figure": args.figure})
    if args.output_dir is None and not args.plan:
        parser.error("-o DIR: name a new folder to save to, or pass --plan")
    out = args.output_dir
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--output-dir {out}: is there already and not empty; remove it or name another")

    # These imports take seconds, so they come after the checks that do not need them.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_gopd.d2quant.hf_quantizer import save_quantized
    from trl_gopd.d2quant.quantize import quantize_model
    from trl_gopd.evaluation import storage

    config = _config(parser, args)
    if args.plan:
        return _print_plan(parser, args, config)
    device = torch_device(parser, args.device)
    with refusals_in_one_line(parser):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        if args.offload is not None:
            config.device, device = device, "cpu"
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, device_map=device)
        report = quantize_model(model, tokenizer, config)
        save_quantized(model, args.output_dir, tokenizer=tokenizer)
        for path in filter(None, (args.json, args.figure)):
            report.save(path)
    for note in report.notes:
        print(note)
    size = storage(model, args.output_dir)
    print(
        f"{report.seconds:.0f} s; {size.block_bits_per_weight:.3f} bits a weight in decoder blocks, "
        f"{size.bits_per_weight:.3f} in all, {(size.file_bytes or 0) / 1e6:.1f} MB; wrote {args.output_dir}"
    )
    return 0


def _print_plan(parser: argparse.ArgumentParser, args: argparse.Namespace, config: "D2QuantConfig") -> int:
    """Prints the plan. The device need not be there if its speed is given."""
    import torch
    from transformers import AutoConfig

    from trl_gopd.d2quant.plan import plan
    from trl_gopd.evaluation.resources import flops_per_second

    device = args.device if args.device and args.tflops else torch_device(parser, args.device)
    if args.offload is not None:
        config.device = device
    made = plan(
        AutoConfig.from_pretrained(args.model),
        config,
        loaded_on=device if args.offload is None else "cpu",
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
    )
    dtypes = (getattr(torch, made.dtype), torch.float32)
    speeds = [flops_per_second(device, dtype) if args.tflops is None else 1e12 * args.tflops for dtype in dtypes]
    print("\n".join(made.lines()))
    stated = " and ".join(f"{speed / 1e12:.3g}" for speed in dict.fromkeys(speeds))
    print(f"About {made.seconds(*speeds):.0f} s at {stated} TFLOP/s, within a factor of two.")
    if args.json:
        with written_whole(args.json) as part:
            part.write_text(json.dumps(asdict(made) | {"seconds": made.seconds(*speeds)}, indent=1) + "\n")
    return 0


def _config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> "D2QuantConfig":
    """Builds the configuration, and ends the command with an error if a setting is not valid."""
    from trl_gopd.d2quant.config import D2QuantConfig

    names = ("group_size", "dataset", "num_samples", "seq_length", "seed", "work_dir", "offload")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if hasattr(args, "embedding_bits"):  # None is a choice here
        settings["embedding_bits"] = args.embedding_bits
    build = D2QuantConfig if args.preset == "default" else getattr(D2QuantConfig, args.preset)
    try:
        config: D2QuantConfig = build(bits=args.bits, **{**settings, **dict(args.set)})
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return config
