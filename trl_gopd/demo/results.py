"""Results of a scene: means over seeds with standard errors, and the contents of the JSON file."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import mean, stdev
from typing import Any


Row = dict[str, Any]


def summarize(rows: Sequence[Row], *, by: Sequence[str], teacher_of: Callable[[Row], Row]) -> list[Row]:
    """
    Averages rows over seeds. Rows that agree in the columns `by` form one group and differ in their seed only.

    With several seeds, the standard error is that of the mean over seeds. With one seed, it is the binomial standard
    error of the sampled answers. `gain_over_teacher` is the mean of the accuracy differences to the teacher of the
    same seed, and its standard error is computed from these paired differences.

    Args:
        rows (`Sequence[dict]`): Rows with `seed`, `accuracy`, `n`, `kl_to_teacher`, `length` and the columns `by`.
        by (`Sequence[str]`): Names of the columns that identify a group.
        teacher_of (`Callable`): Maps a row to the row of its teacher. A teacher's row is mapped to itself.

    Returns:
        `list[dict]`: One row for each group, in the order in which the groups first appear.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    summary: list[Row] = []
    for key, group in groups.items():
        teachers = [teacher_of(row) for row in group]
        gains = [row["accuracy"] - teacher["accuracy"] for row, teacher in zip(group, teachers, strict=True)]
        binomial = [_binomial_variance(row) for row in group]
        both = [v + _binomial_variance(teacher) for v, teacher in zip(binomial, teachers, strict=True)]
        divergences = [row["kl_to_teacher"] for row in group if row["kl_to_teacher"] is not None]
        is_teacher = teachers[0] is group[0]
        summary.append(
            {
                **dict(zip(by, key, strict=True)),
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


def _binomial_variance(row: Row) -> float:
    accuracy: float = row["accuracy"]
    return accuracy * (1 - accuracy) / int(row["n"])


def _standard_error(values: list[float], variances: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.sqrt(variances[0])


def report(*, settings: dict[str, Any], start: float, rows: list[Row], summary: list[Row]) -> Row:
    """
    Returns the contents of the JSON file: rows and summary, with command, versions, settings and duration.

    `start` is the value of `time.perf_counter()` at the start of the run.
    """
    return {
        "command": " ".join(["trl-gopd", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "trl-gopd")},
        "settings": settings,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "summary": summary,
    }


def with_error(value: float, standard_error: float, *, signed: bool = False) -> str:
    """Formats a mean and its standard error for tables."""
    return f"{value:{'+' if signed else ''}.3f} ± {standard_error:.3f}"
