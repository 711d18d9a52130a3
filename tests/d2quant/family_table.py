"""
What D²Quant does with each decoder family, found out with tiny models, as the table of docs/families.md.

    python -m tests.d2quant.family_table --page docs/families.md
"""

import argparse
import logging
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from tests.d2quant.families import FAMILIES, build
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.names import is_listed
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.d2quant.topology import find_blocks


BEGIN, END = "<!-- table of families: begin -->\n", "<!-- table of families: end -->\n"
HEAD = ["| family | model | decoder blocks | in full precision, or why it is refused |", "|---|---|---|---|"]
TOKENS = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(0))
CALIBRATION = {"dataset": TOKENS, "num_samples": 8, "seq_length": 16}
CONFIG = {"bits": 3, "group_size": 16, "iterations": 3, "tune_epochs": 1, **CALIBRATION}
NEAREST = {"rounding": "rtn", "iterations": 0, "clip": False, "tune_epochs": 0}


@dataclass
class Outcome:
    """
    What became of one family.

    Args:
        family (`str`), model (`str`): its name, and the class of the model.
        refusal (`str`, *optional*): the error, if it was refused.
        full_precision (`dict[str, list[str]]`): names of matrices that were not packed, by reason.
        errors (`list[str]`): what is wrong, which should be nothing.
    """

    family: str
    model: str
    refusal: str | None = None
    full_precision: dict[str, list[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Row of the table."""
        if self.errors:
            return f"| {self.family} | `{self.model}` | **wrong** | {'; '.join(self.errors)} |"
        if self.refusal is not None:
            return f"| {self.family} | `{self.model}` | refused | {self.refusal} |"
        kept = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in self.full_precision.items())
        return f"| {self.family} | `{self.model}` | quantized | {kept or 'nothing'} |"


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def examine(family: str) -> Outcome:
    """Quantizes a tiny model of the family in both ways, saves and loads it, and says what came out."""
    model = build(family)
    outcome = Outcome(family, type(model).__name__)
    before, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks, modules = find_blocks(model)
    matrices = {f"{blocks}.{name}": p.numel() for name, p in modules.named_parameters() if p.ndim > 1}
    try:
        report = quantize_model(model, None, D2QuantConfig(**CONFIG))
    except ValueError as error:
        outcome.refusal = str(error)
        after = model.state_dict()
        if list(after) != list(state) or not all(torch.equal(after[name], state[name]) for name in state):
            outcome.errors.append("it is refused after it was changed")
        if not outcome.refusal.startswith(outcome.model):
            outcome.errors.append(f"it is refused without its name: {error}")
        return outcome
    for note in report.notes:
        name, _, reason = note.partition(" stays in full precision: ")
        reason = re.sub(r" \(\d+ blocks, the first .*\)$", "", reason)
        outcome.full_precision.setdefault(reason, []).append(f"`{name}`")
    outcome.errors += _wrong_matrices(model, matrices, report.notes)
    outcome.errors += _wrong_logits(family, model, before)
    outcome.errors += _wrong_copies(family, model, state)
    return outcome


def _wrong_matrices(model: PreTrainedModel, matrices: dict[str, int], notes: list[str]) -> list[str]:
    """Whether each matrix of the blocks is packed, or is named in the report and in `config.json`."""
    config, wrong = model.config.quantization_config, []
    blocks, modules = find_blocks(model)
    packed = sum(m.in_features * m.out_features for m in modules.modules() if isinstance(m, D2QuantLinear))
    dense = [
        f"{blocks}.{name}"
        for name, parameter in modules.named_parameters()
        if parameter.ndim > 1 and not isinstance(modules.get_submodule(name.rpartition(".")[0]), D2QuantLinear)
    ]
    if packed + sum(matrices[name] for name in dense) != sum(matrices.values()):
        wrong.append("some matrices are neither packed nor dense")
    for name in dense:
        in_block = name.removeprefix(f"{blocks}.").partition(".")[2]
        if not any(note.startswith(f"{in_block} stays in full precision: ") for note in notes):
            wrong.append(f"the report does not name `{in_block}`")
        if not is_listed(name.removesuffix(".weight"), config.modules_to_not_convert):
            wrong.append(f"config.json does not name `{in_block}`")
    return wrong


def _wrong_logits(family: str, model: PreTrainedModel, before: Tensor) -> list[str]:
    """Whether logits are finite and closer to those of the original than with rounding to nearest."""
    nearest = build(family)
    quantize_model(nearest, None, D2QuantConfig(**CONFIG | NEAREST))
    error, nearest_error = ((logits(each) - before).square().mean() for each in (model, nearest))
    return [] if error < nearest_error else [f"its error is {error:.3g}, and {nearest_error:.3g} rounded to nearest"]


def _wrong_copies(family: str, model: PreTrainedModel, state: dict[str, Tensor]) -> list[str]:
    """Whether saved and loaded, quantized while it is loaded, and dequantized models are the same."""
    wrong, cls = [], type(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = cls.from_pretrained(folder)
    if not _same(loaded, model):
        wrong.append("it changes when it is saved and loaded")
    with tempfile.TemporaryDirectory() as folder:
        build(family).save_pretrained(folder)
        quantized = cls.from_pretrained(folder, quantization_config=D2QuantConfig(**CONFIG))
    if not _same(quantized, model):
        wrong.append("`from_pretrained` quantizes it in another way")
    expected = logits(loaded)
    loaded.dequantize()
    after = loaded.state_dict()
    if {name: tensor.shape for name, tensor in after.items()} != {
        name: tensor.shape for name, tensor in state.items()
    }:
        wrong.append("`dequantize` does not give back the kinds of its layers")
    elif not torch.allclose(logits(loaded), expected, rtol=0, atol=1e-3 * float(expected.abs().max())):
        wrong.append("it changes when it is dequantized")
    return wrong


def _same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    state, expected = one.state_dict(), other.state_dict()
    return (
        state.keys() == expected.keys()
        and all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        and torch.equal(logits(one), logits(other))
    )


def main() -> None:
    """Writes the table into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("families", nargs="*", help="print the rows of these alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    lines = [examine(family).line() for family in args.families or FAMILIES]
    if args.families:
        print("\n".join(lines))
        return
    text = args.page.read_text(encoding="utf-8")
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    args.page.write_text(text[:start] + "\n".join([*HEAD, *lines]) + "\n" + text[stop:], encoding="utf-8")


if __name__ == "__main__":
    main()
