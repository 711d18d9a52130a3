"""`trl-gopd evaluate`: measure the perplexity of a model, its agreement with another model, its size and its costs."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import written_whole
from .arguments import DTYPES, at_least, check_folders, check_models, refusals_in_one_line, torch_device


if TYPE_CHECKING:
    import torch

    from trl_gopd.evaluation import Perplexity, Resources


BOS_CHOICES = {"auto": None, "yes": True, "no": False}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `trl-gopd evaluate`."""
    parser = argparse.ArgumentParser("trl-gopd evaluate", description=__doc__)
    parser.add_argument("model", metavar="DIR", type=Path, help="folder of the model, quantized or not")
    parser.add_argument(
        "--perplexity", metavar="FILE", type=Path, help="text file in UTF-8 (default: an embedded text)"
    )
    parser.add_argument("--against", metavar="MODEL", help="folder or Hub name of a model to compare with")
    parser.add_argument("--seq-length", metavar="N", type=at_least(2), default=512, help="tokens of a window (512)")
    parser.add_argument(
        "--windows", metavar="N", type=at_least(1), help="measure only the first N windows (default: all)"
    )
    parser.add_argument(
        "--add-bos-token",
        choices=BOS_CHOICES,
        default="auto",
        help="whether every window begins with the beginning-of-sequence token (default: as the tokenizer does)",
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=at_least(1), default=1, help="windows in one forward pass (1)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the layers that are not quantized (default: as saved)",
    )
    parser.add_argument("--device", help="torch device, such as cpu or cuda:1 (default: cuda if available, else cpu)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="file for the result in JSON")
    return parser


def main(arguments: list[str]) -> int:
    """Checks the arguments before any model is loaded, then measures and prints a table."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    _check_paths(parser, args)

    # These imports take seconds, so they come after the checks that do not need them.
    import torch
    from transformers import AutoModelForCausalLM

    from trl_gopd.evaluation import compare, measure, perplexity, storage

    device = torch_device(parser, args.device)
    windows = _windows(parser, args)
    options: dict[str, Any] = {"dtype": args.dtype, "device_map": device}
    with refusals_in_one_line(parser):
        with measure() as load:
            model = AutoModelForCausalLM.from_pretrained(args.model, **options)
        quality: dict[str, Any] = {"perplexity": None, "agreement": None}
        if args.against is None:
            with measure() as evaluation:
                quality["perplexity"] = perplexity(model, windows, batch_size=args.batch_size)
        else:
            reference = AutoModelForCausalLM.from_pretrained(args.against, **options)
            with measure() as evaluation:
                quality["agreement"] = compare(model, reference, windows, batch_size=args.batch_size)
            quality["perplexity"] = quality["agreement"].model
        measured = {**quality, "storage": storage(model, args.model), "load": load, "evaluation": evaluation}

    print(_table(args, windows, measured))
    if args.json:
        _write_json(args, arguments, torch.device(device), windows, measured)
    return 0


def _check_paths(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not (args.model / "config.json").is_file():
        state = "has no config.json" if args.model.is_dir() else "does not exist"
        parser.error(f"DIR: the folder {args.model} {state}; name one that `save_pretrained` wrote")
    if args.perplexity and not args.perplexity.is_file():
        parser.error(f"--perplexity {args.perplexity}: there is no such file; name a text, or leave the option out")
    check_models(parser, {"--against": args.against})
    check_folders(parser, {"--json": args.json})


def _windows(parser: argparse.ArgumentParser, args: argparse.Namespace) -> "torch.Tensor":
    """Returns the windows of the text `(n, T)` after checking that both models have the same tokens and vocabulary."""
    import torch

    from trl_gopd.d2quant.calibration import check_ids, embedded_text, read_text, token_windows

    try:
        text = read_text(args.perplexity) if args.perplexity else embedded_text("evaluation")
        options = {"seq_length": args.seq_length, "add_bos_token": BOS_CHOICES[args.add_bos_token]}
        windows = token_windows(text, _load_from(parser, "tokenizer", args.model), **options)
        vocab_size = _load_from(parser, "config", args.model).get_text_config().vocab_size
        check_ids(windows, vocab_size)
        if args.against is not None:
            theirs = token_windows(text, _load_from(parser, "tokenizer", args.against), **options)
            their_size = _load_from(parser, "config", args.against).get_text_config().vocab_size
            remedy = "name the model that DIR was made from"
            if not torch.equal(windows, theirs):
                parser.error(f"--against {args.against}: its tokenizer gives other ids than that of DIR; {remedy}")
            if their_size != vocab_size:
                parser.error(f"--against {args.against}: it has {their_size} logits, DIR has {vocab_size}; {remedy}")
    except (ValueError, ImportError) as error:  # these messages already say what to do
        parser.error(str(error))
    if args.windows and args.windows > len(windows):
        parser.error(
            f"--windows {args.windows}: the text has {len(windows)} of {args.seq_length} tokens; lower --windows or "
            "--seq-length, or give a longer text"
        )
    return windows[: args.windows]


def _load_from(parser: argparse.ArgumentParser, what: str, model: Path | str) -> Any:
    """Loads the tokenizer or the configuration of a model, or ends the command with an error."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        return {"tokenizer": AutoTokenizer, "config": AutoConfig}[what].from_pretrained(model)
    except (
        OSError,
        ValueError,
    ) as error:  # transformers raises these for a missing or broken folder, and without the Hub
        parser.error(
            f"the {what} of {model} cannot be loaded ({str(error).splitlines()[0]}); name a folder that holds one, "
            f"`{what}.save_pretrained` writes it"
        )


def _table(args: argparse.Namespace, windows: "torch.Tensor", measured: dict[str, Any]) -> str:
    """Formats the result for people: one line for each quantity, with ± one standard error."""
    ours, agreement, storage = measured["perplexity"], measured["agreement"], measured["storage"]
    load, evaluation = measured["load"], measured["evaluation"]

    def pm(value: float, error: float | None, digits: int) -> str:
        return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    def ppl(perplexity: "Perplexity") -> str:
        error = perplexity.standard_error
        return pm(perplexity.value, None if error is None else perplexity.value * error, 3)

    rows = [("perplexity", ppl(ours))]
    if agreement:
        kl, kl_error = agreement.kl, agreement.kl_standard_error
        rows += [
            ("perplexity of the reference", ppl(agreement.reference)),
            ("excess nats per token", pm(agreement.excess_nats, agreement.excess_nats_standard_error, 4)),
            ("KL(reference ‖ model)", pm(kl, kl_error, 4) + " nats per token"),
            ("same most likely token", pm(agreement.top1, agreement.top1_standard_error, 4)),
        ]
    rows += [("bits per weight", f"{storage.bits_per_weight:.3f}, of everything")]
    if storage.block_bits_per_weight:
        counts = f"{storage.quantized_weights:,} weights in {storage.quantized_layers} layers, with embedding and head"
        rows += [("  in decoder blocks", f"{storage.block_bits_per_weight:.3f}"), ("quantized", counts)]
    rows += [
        ("parameters not quantized", f"{storage.parameters_left:,}"),
        ("weight files", f"{storage.file_bytes / 1e6:.1f} MB"),
        ("loading", _cost(load)),
        ("evaluation", _cost(evaluation)),
    ]
    text = args.perplexity or "the embedded evaluation text"
    against = f" against {args.against}" if args.against else ""
    title = f"{args.model}{against}: {len(windows)} windows of {args.seq_length} tokens of {text}"
    return "\n".join([title, *(f"  {name:28} {value}" for name, value in rows)])


def _cost(used: "Resources") -> str:
    gpu = "" if not used.peak_cuda_bytes else f", {used.peak_cuda_bytes / 2**30:.2f} GiB of GPU memory"
    return f"{used.seconds:.1f} s, at most {used.peak_memory_bytes / 2**30:.2f} GiB of memory{gpu}"


def _write_json(
    args: argparse.Namespace,
    arguments: list[str],
    device: "torch.device",
    windows: "torch.Tensor",
    measured: dict[str, Any],
) -> None:
    """Writes the result with command, versions and device, under a temporary name until it is complete."""
    import platform
    from dataclasses import asdict

    import torch
    import transformers

    from trl_gopd import __version__

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    versions = {"trl_gopd": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    result = {
        "command": shlex.join(["trl-gopd", "evaluate", *arguments]),
        "model": str(args.model),
        "against": args.against,
        "text": str(args.perplexity) if args.perplexity else "embedded",
        "windows": len(windows),
        "seq_length": args.seq_length,
        "add_bos_token": args.add_bos_token,
        "dtype": args.dtype,
        "device": str(device),
        "device_name": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
        **{name: value and asdict(value) for name, value in measured.items()},
    }
    with written_whole(args.json) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
