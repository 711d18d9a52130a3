"""What a run of the quantizer reports: the error of each linear, and what was not quantized or not corrected."""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl_gopd.files import written_whole


@dataclass(frozen=True)
class LinearReport:
    """
    What happened to one linear. Errors are `tr(Δ H Δᵀ)/tr(W H Wᵀ)`, the share of the output's energy that is lost.
    They are measured on at most 256 rows of the weight, at equal distances, and `None` without a Hessian or with
    `report_errors=False`.

    Args:
        name (`str`): of the linear in its model.
        grid (`str`), bits (`int`), group_size (`int`): its format.
        nearest_error (`float`, *optional*): of rounding to nearest over the full range.
        error (`float`, *optional*): of what was stored.
        seconds (`float`): spent on rounding it.
    """

    name: str
    grid: str
    bits: int
    group_size: int
    nearest_error: float | None
    error: float | None
    seconds: float


@dataclass(frozen=True)
class BlockReport:
    """
    What happened to one block.

    Args:
        linears (`list[LinearReport]`): one for each quantized linear, in order.
        shift_explained (`float`, *optional*): share of the deviation's energy that DAC's mean removed; `None` where no
            mean shift was corrected.
    """

    linears: list[LinearReport]
    shift_explained: float | None


@dataclass
class Refinement:
    """
    What the refinement did. Losses are in nats a token; for a model without a head they are squared errors of the
    final hidden states, relative to their mean square.

    Args:
        training (`list[float]`): mean loss of each epoch over the windows trained on, each before its step.
        held_out (`list[float]`): loss on the windows held out, before the training and after each epoch.
        changed_codes (`float`): share of the codes that differ from those of the rounding.
    """

    training: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    changed_codes: float = 0.0


@dataclass
class Report:
    """
    What a run did.

    Args:
        config (`dict`): the configuration.
        linears (`list[LinearReport]`): one for each quantized linear, in order.
        shift_explained (`dict[str, float]`): per block, the share of the deviation's energy that DAC's mean removed.
        notes (`list[str]`): what was left in full precision or not corrected, and why.
        refinement ([`Refinement`], *optional*): losses of the refinement; `None` without one.
        seconds (`float`): of the whole run.
    """

    config: dict[str, Any]
    linears: list[LinearReport] = field(default_factory=list)
    shift_explained: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refinement: Refinement | None = None
    seconds: float = 0.0

    def add(self, block_name: str, block_report: BlockReport) -> None:
        """Appends what happened to the block of that name."""
        self.linears += block_report.linears
        if block_report.shift_explained is not None:
            self.shift_explained[block_name] = block_report.shift_explained

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, or as a figure if `path` ends in .png, .svg or .pdf (needs matplotlib)."""
        path = Path(path)
        with written_whole(path) as part:
            if path.suffix in (".png", ".svg", ".pdf"):
                _draw(self, part)
            else:
                part.write_text(json.dumps(asdict(self), indent=1) + "\n")


def _draw(report: Report, path: Path) -> None:
    """Output error of each kind of linear, block by block; of experts, the mean of all in a block."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing a report needs matplotlib. Run `pip install matplotlib`.") from error
    linears: dict[str, list[tuple[float, float]]] = {}  # those of all experts of a block together
    for entry in report.linears:
        if entry.error is not None and entry.nearest_error is not None:
            name = re.sub(r"\.expert_\d+$", "", entry.name)
            linears.setdefault(name, []).append((entry.nearest_error, entry.error))
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, pairs in linears.items():
        before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        kinds.setdefault(name.rpartition(".")[2], []).append((before, after))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (kind, errors) in enumerate(kinds.items()):
        color = f"C{index}"
        axes.semilogy([after for _, after in errors], color=color, label=kind)
        axes.semilogy([before for before, _ in errors], color=color, linestyle=":", linewidth=1)
    axes.set(xlabel="block", ylabel="share of the output's energy lost")
    axes.set_title(f"{report.config['bits']} bits; dotted: rounding to nearest", fontsize="medium")
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)
