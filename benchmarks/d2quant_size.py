"""
How large SmolLM2-135M-Instruct is on disk and in memory, by the bits of its linears and of its embedding, and what the
packed embedding costs.

    python -m benchmarks.d2quant_size --calibration valid.txt --evaluation test.txt --json size.json

Without texts, the two halves of the embedded one are used. A row without bits for the linears has the model in full
precision but for its embedding, which is tied to the head. Every finished row is written to `--json`; those found
there are not run again. With `--sizes`, packed tensors are left empty and no quality is measured, which takes seconds
and gives the same sizes.
"""

import argparse
import itertools
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.d2quant_accuracy import EVALUATED, GROUP_SIZE, SAMPLES, SEQ_LENGTH, commit, environment, windows
from trl_gopd.files import written_whole


BITS = (None, 2, 3, 4)
EMBEDDING_BITS = (None, 8, 4)


def run_row(bits: int | None, embedding_bits: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """Sizes of one model, and its quality unless `--sizes` is given."""
    import torch
    from transformers import AutoModelForCausalLM

    from trl_gopd.d2quant.calibration import calibration_windows
    from trl_gopd.d2quant.config import D2QuantConfig
    from trl_gopd.d2quant.pipeline import head_hessian
    from trl_gopd.d2quant.quantize import quantize_model
    from trl_gopd.d2quant.token_matrices import pack_token_matrices
    from trl_gopd.demo.smollm2 import smollm2_path
    from trl_gopd.evaluation import compare, measure, storage

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path()).eval()
    row: dict[str, Any] = {"bits": bits, "embedding_bits": embedding_bits, "file_bytes": None}
    config = D2QuantConfig(
        bits=bits or 2,
        group_size=GROUP_SIZE,
        embedding_bits=embedding_bits,
        dataset=windows(args.calibration, "calibration"),
        num_samples=SAMPLES,
        seq_length=SEQ_LENGTH,
        seed=args.seed,
        work_dir=args.work_dir,
    )
    with measure() as used:
        if args.sizes:
            pack_empty(model, bits, config)
        elif bits is None:
            sizes = {name: getattr(config, name) for name in ("num_samples", "seq_length", "seed")}
            drawn = calibration_windows(config.dataset, None, **sizes)
            pack_token_matrices(model, config, head_hessian(model, drawn, config))
        else:
            quantize_model(model, None, config)
    with tempfile.TemporaryDirectory() as folder:
        if bits is not None or embedding_bits is None:
            model.save_pretrained(folder)
            row["file_bytes"] = storage(model, folder).file_bytes
    size = storage(model)
    row |= {"block_bits_per_weight": size.block_bits_per_weight, "bits_per_weight": size.bits_per_weight}
    row["memory_bytes"] = model.get_memory_footprint()
    if not _measures_quality(bits, embedding_bits, args):
        return row
    original = AutoModelForCausalLM.from_pretrained(smollm2_path())
    agreement = compare(model, original, windows(args.evaluation, "evaluation")[:EVALUATED])
    return row | {
        "seconds": used.seconds,
        "perplexity": agreement.model.value,
        "perplexity_original": agreement.reference.value,
        "excess_nats": agreement.excess_nats,
        "excess_nats_standard_error": agreement.excess_nats_standard_error,
        "kl": agreement.kl,
    }


def pack_empty(model: Any, bits: int | None, config: Any) -> None:
    """Packs a model in place with tensors of zeros."""
    from torch import nn

    from trl_gopd.d2quant.convert import empty_packed, replace_module
    from trl_gopd.d2quant.hf_quantizer import mark_quantized
    from trl_gopd.d2quant.token_matrices import insert_empty_token_matrices
    from trl_gopd.d2quant.topology import find_blocks

    insert_empty_token_matrices(model, config)
    if bits is None:
        return
    for block in find_blocks(model)[1]:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                packed = empty_packed(linear, config, grid="affine", bias=linear.bias is not None, input_scale=False)
                replace_module(block, name, packed)
    mark_quantized(model, config)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown. "change" compares perplexity with that of a dense embedding and the same linears."""
    columns = ["linears", "embedding", "bits a weight", "in memory, MB", "on disk, MB", "perplexity", "change"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    original = next((row["perplexity_original"] for row in rows if "perplexity_original" in row), None)
    dense = {row["bits"]: row.get("perplexity") for row in rows if row["embedding_bits"] is None} | {None: original}
    for row in rows:
        without = dense.get(row["bits"])
        own = without if row["embedding_bits"] is None else row.get("perplexity")
        cells = [
            _bits(row["bits"]),
            _bits(row["embedding_bits"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['memory_bytes'] / 1e6:.1f}",
            "" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.1f}",
            "" if own is None else f"{own:.2f}",
            "" if own is None or without is None or row["embedding_bits"] is None else f"{own / without - 1:+.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _measures_quality(bits: int | None, embedding_bits: int | None, args: argparse.Namespace) -> bool:
    """The quality of the original is that which each other row compares itself with."""
    return not args.sizes and (bits, embedding_bits) != (None, None)


def _bits(bits: int | None) -> str:
    return "float32" if bits is None else f"{bits} bits"


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="text to measure on")
    parser.add_argument("--bits", type=_optional, nargs="+", default=BITS, help="of the linears; none for float32")
    parser.add_argument("--embedding-bits", type=_optional, nargs="+", default=EMBEDDING_BITS, help="none for float32")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration (0)")
    parser.add_argument("--sizes", action="store_true", help="leave the quality out")
    parser.add_argument("--work-dir", metavar="DIR", help="keeps finished blocks of an interrupted run")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("d2quant_size.json"), help="all rows")
    return parser


def _optional(text: str) -> int | None:
    return None if text == "none" else int(text)


def main(argv: list[str] | None = None) -> None:
    """Runs the rows that are not there yet, and prints the table."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    for bits, embedding_bits in itertools.product(args.bits, args.embedding_bits):
        mine = [row for row in rows if (row["bits"], row["embedding_bits"]) == (bits, embedding_bits)]
        if any("perplexity" in row or not _measures_quality(bits, embedding_bits, args) for row in mine):
            continue
        print(f"linears {_bits(bits)}, embedding {_bits(embedding_bits)}", file=sys.stderr, flush=True)
        row = run_row(bits, embedding_bits, args) | {"threads": args.threads, "commit": commit()}
        rows = [other for other in rows if other not in mine] + [row]
        rows.sort(key=lambda row: (row["bits"] or 0, -(row["embedding_bits"] or 32)))
        with written_whole(args.json) as part:
            command = shlex.join(["python", "-m", "benchmarks.d2quant_size", *argv])
            part.write_text(json.dumps({**environment(argv), "command": command, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
