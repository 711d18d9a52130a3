"""The report of a preflight, which can be saved as JSON or as a figure."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import written_whole
from .figure import FORMATS, draw
from .findings import Decoded, LambdaEffect, LogRatios


@dataclass(frozen=True)
class PreflightReport:
    """
    What [`preflight`] returns.

    Args:
        settings (`dict[str, Any]`):
            Models, options and versions with which the numbers were obtained.
        completions (`int`):
            Number of sampled completions.
        tokens (`int`):
            Number of their tokens, end-of-sequence tokens included.
        length (`float`):
            Mean number of tokens of a completion.
        truncated (`float`):
            Fraction of completions that reached the maximum length without an end-of-sequence token.
        deterministic (`float`):
            Fraction of positions with max T > 0.9.
        log_ratios ([`LogRatios`]):
            log T/R of all sampled tokens.
        eos_log_ratios ([`LogRatios`] or `None`):
            log T/R of the end-of-sequence tokens alone; `None` if no completion ended.
        effects (`list[LambdaEffect]`):
            One entry for each λ, ascending.
        decoded (`list[Decoded]`):
            One entry for each λ, ascending; empty without reward functions.
        recommended_lambda (`float`):
            The recommended λ.
        reasons (`list[str]`):
            The reasons for the recommendation, in words.
        seconds (`float`):
            Wall-clock time.
    """

    settings: dict[str, Any]
    completions: int
    tokens: int
    length: float
    truncated: float
    deterministic: float
    log_ratios: LogRatios
    eos_log_ratios: LogRatios | None
    effects: list[LambdaEffect]
    decoded: list[Decoded]
    recommended_lambda: float
    reasons: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain numbers, strings, lists and dictionaries."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as a figure if `path` ends in .png, .svg or .pdf (needs matplotlib), else as JSON."""
        path = Path(path)
        with written_whole(path) as part:
            if path.suffix in FORMATS:
                draw(
                    part,
                    effects=self.effects,
                    decoded=self.decoded,
                    log_ratios={"all tokens": self.log_ratios, "end-of-sequence tokens": self.eos_log_ratios},
                    settings=self.settings,
                    recommended_lambda=self.recommended_lambda,
                )
            else:
                part.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
