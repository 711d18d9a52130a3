"""
Scene "quantize" of the demo: quantizes SmolLM2-135M-Instruct to three and to two bits, saves and reloads it, measures
it and asks it questions.

The calibration text is one part of the Python language reference, which is included in every Python installation. The
evaluation text is the other part.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_gopd.d2quant.calibration import embedded_text, token_windows
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.hf_quantizer import save_quantized
from trl_gopd.demo.results import Row
from trl_gopd.demo.smollm2 import smollm2_path
from trl_gopd.evaluation import compare, storage
from trl_gopd.evaluation.size import weight_file_bytes


BITS = (3, 2)
WINDOWS = 12
SEQ_LENGTH = 512
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "Name three fruits.")


def run(output_dir: Path, bits: Sequence[int] = BITS, **settings: Any) -> Row:
    """
    Quantizes the model to each bit width, reloads it and measures it.

    Args:
        output_dir (`pathlib.Path`):
            Parent of the quantized folders, which are named `smollm2-3bit` and so on.
        bits (`Sequence[int]`, *optional*, defaults to `(3, 2)`):
            Bit widths.
        settings:
            Further fields of [`D2QuantConfig`].

    Returns:
        `dict`: `rows` with size, quality and answers, one for each model, the full-precision model first; and
        `seconds`, the duration.
    """
    start = time.perf_counter()
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows = token_windows(embedded_text("evaluation"), tokenizer, SEQ_LENGTH)[:WINDOWS]
    original = AutoModelForCausalLM.from_pretrained(path)
    rows = [_row(original, original, tokenizer, windows, path, bits=None, seconds=None)]
    for width in bits:
        print(f"Quantizing SmolLM2-135M-Instruct to {width} bits")
        config = D2QuantConfig(bits=width, **settings)
        folder = folder_of(output_dir, width)
        started = time.perf_counter()
        quantized = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
        seconds = time.perf_counter() - started
        shutil.rmtree(folder, ignore_errors=True)  # removes the result of an earlier run
        save_quantized(quantized, folder, tokenizer=tokenizer)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        rows.append(_row(reloaded, original, tokenizer, windows, folder, bits=width, seconds=seconds))
    return {"rows": rows, "seconds": time.perf_counter() - start}


def folder_of(output_dir: Path, bits: int) -> Path:
    """Returns the folder of the model with a given bit width."""
    return output_dir / f"smollm2-{bits}bit"


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int = 40) -> str:
    """Returns the greedy answer to one question that is asked through the chat template."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def chat(folder: Path) -> None:
    """Reads questions from the terminal and answers them. An empty line ends the chat."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    while question := input("you> ").strip():
        print(answer(model, tokenizer, question, max_new_tokens=120))


def _row(
    model: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    folder: Path,
    *,
    bits: int | None,
    seconds: float | None,
) -> Row:
    agreement = compare(model, original, windows)
    return {
        "bits": bits,
        "bits_per_weight": None if bits is None else storage(model).bits_per_weight,
        "file_mb": weight_file_bytes(folder) / 1e6,
        "perplexity": agreement.model.value,
        "kl": agreement.kl,
        "top1": agreement.top1,
        "seconds": seconds,
        "answers": {question: answer(model, tokenizer, question) for question in QUESTIONS},
    }


def print_table(result: Row) -> None:
    """Prints a table of the rows, followed by the answers of the models."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"SmolLM2-135M-Instruct, {WINDOWS} × {SEQ_LENGTH} tokens of the Python reference")
    for name in (
        "model",
        "bits a weight",
        "file, MB",
        "perplexity",
        "KL to the original",
        "same top token",
        "seconds",
    ):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in result["rows"]:
        table.add_row(
            _name(row),
            "32" if row["bits"] is None else f"{row['bits_per_weight']:.2f}",
            f"{row['file_mb']:.0f}",
            f"{row['perplexity']:.1f}",
            f"{row['kl']:.3f}",
            f"{row['top1']:.0%}",
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
        )
    console = Console(width=max(120, Console().width))
    console.print(table)
    for question in QUESTIONS:
        console.print(f"\n{question}", style="bold", markup=False)
        for row in result["rows"]:
            console.print(f"  {_name(row):9} {row['answers'][question]}", markup=False)


def draw(result: Row, path: Path) -> None:
    """Draws perplexity against size of the weight files."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in result["rows"]:
        axes.plot(row["file_mb"], row["perplexity"], "o")
        axes.annotate(_name(row), (row["file_mb"], row["perplexity"]), xytext=(6, 6), textcoords="offset points")
    axes.set(xlabel="weight files, MB", ylabel="perplexity", yscale="log", xlim=(0, None))
    axes.set_title("SmolLM2-135M-Instruct", fontsize="medium")
    figure.savefig(path, dpi=150)


def _name(row: Row) -> str:
    return "original" if row["bits"] is None else f"{row['bits']} bits"
