"""What the model card says of a distilled student: its teachers, references, λ, estimator and the paper."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .config import GOPDConfig


# As [`~trl.GRPOTrainer`] wants it
PAPER = {
    "title": "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
    "id": "2602.12125",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{yang2026learning,
            author = {Wenkai Yang and Weijie Liu and Ruobing Xie and Kai Yang and Saiyong Yang and Yankai Lin},
            title  = {{Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation}},
            year   = 2026,
            eprint = {arXiv:2602.12125},
        }"""),
}


def describe(
    path: Path,
    *,
    student: str,
    identities: Mapping[str, Mapping[str, Mapping[str, Any]]],
    args: GOPDConfig,
    lambdas: Mapping[str, float],
) -> None:
    """
    Adds a section on the distillation to a model card that TRL wrote, and its base model, if TRL did not know it.

    Args:
        path (`Path`):
            The card.
        student (`str`):
            Name or path of the student as it was before training.
        identities (`Mapping`):
            What tells frozen models from others, by role (`"teachers"`, `"references"`) and teacher id.
        args ([`GOPDConfig`]):
            Configuration of the run.
        lambdas (`Mapping[str, float]`):
            λ by teacher id.
    """
    card: Any = ModelCard.load(str(path))
    named = f"[{student}](https://huggingface.co/{student})" if card.data.base_model else f"`{student}`"
    card.text = card.text.replace("[None](https://huggingface.co/None)", named)
    rows = [("Student", "", student)]
    for key, identity in identities["teachers"].items():
        rows.append(("Teacher", key, _name(identity)))
    if not identities["references"]:
        rows.append(("Reference", "", "none, since every λ is 1"))
    for key, identity in identities["references"].items():
        rows.append(("Reference", key, _name(identity)))
    rows += [("λ", key, f"{value:g}, {args.gopd_lambda_schedule}") for key, value in lambdas.items()]
    rows.append(("Estimator", "", args.gopd_estimator))
    table = ["## Distillation", "", "| | teacher id | |", "|---|---|---|"]
    table += [f"| {role} | {key} | {value} |" for role, key, value in rows]
    before, heading, after = card.text.partition("### Framework versions")
    card.text = before + "\n".join(table) + "\n\n" + heading + after
    card.save(str(path))


def _name(identity: Mapping[str, Any]) -> str:
    """A frozen model in words: its name, and what of it is more than that name."""
    revision, adapter = identity.get("revision"), identity.get("adapter")
    parts = [f"`{identity.get('name') or 'a model in memory'}`"]
    if revision:
        parts.append(f"revision {revision}")
    if "adapter" in identity:
        parts.append("the student's base" if adapter is None else f"adapter `{adapter}`")
    return ", ".join(parts)
