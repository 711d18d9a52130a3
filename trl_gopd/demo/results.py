"""The result of a scene: its rows, one for each model judged, their means over seeds, and the file that holds them."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import mean, stdev
from typing import Any


def summarize(rows: Sequence[dict], *, by: Sequence[str], teacher_of: Callable[[dict], dict]) -> list[dict]:
    """
    Means over seeds of the rows of one kind, with standard errors.

    With several seeds the standard error is that of the mean over seeds; with one it is the binomial one of the
    sampled answers. `gain_over_teacher` is the mean of the differences within a seed, and its standard error is that
    of those differences.

    Args:
        rows (`Sequence[dict]`): With `seed`, `accuracy`, `n`, `kl_to_teacher`, `length` and the columns `by`.
        by (`Sequence[str]`): Columns that make up a kind.
        teacher_of (`Callable`): The row that a row is compared with; a teacher's own is itself.

    Returns:
        `list[dict]`: One for each kind, in the order in which they come first.
    """
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[name] for name in by), []).append(row)
    summary = []
    for kind, group in kinds.items():
        teachers = [teacher_of(row) for row in group]
        gains = [row["accuracy"] - teacher["accuracy"] for row, teacher in zip(group, teachers, strict=True)]
        binomial = [_binomial_variance(row) for row in group]
        both = [v + _binomial_variance(teacher) for v, teacher in zip(binomial, teachers, strict=True)]
        divergences = [row["kl_to_teacher"] for row in group if row["kl_to_teacher"] is not None]
        is_teacher = teachers[0] is group[0]
        summary.append(
            {
                **dict(zip(by, kind, strict=True)),
                "seeds": len(group),
                "n": sum(row["n"] for row in group),
                "accuracy": mean(row["accuracy"] for row in group),
                "standard_error": _standard_error([row["accuracy"] for row in group], binomial),
                "gain_over_teacher": None if is_teacher else mean(gains),
                "gain_standard_error": None if is_teacher else _standard_error(gains, both),
                "kl_to_teacher": mean(divergences) if divergences else None,
                "length": mean(row["length"] for row in group),
            }
        )
    return summary


def _binomial_variance(row: dict) -> float:
    return row["accuracy"] * (1 - row["accuracy"]) / row["n"]


def _standard_error(values: list[float], variances: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.sqrt(variances[0])


def report(*, settings: dict[str, Any], start: float, rows: list[dict], summary: list[dict]) -> dict:
    """What the JSON file holds: rows and summary, and how they came about. `start` is of `time.perf_counter()`."""
    return {
        "command": " ".join(["trl-gopd", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "trl-gopd")},
        "settings": settings,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "summary": summary,
    }


def with_error(value: float, standard_error: float, *, signed: bool = False) -> str:
    """A mean and its standard error, as tables show them."""
    return f"{value:{'+' if signed else ''}.3f} ± {standard_error:.3f}"
