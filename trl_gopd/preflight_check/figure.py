"""The figure of a preflight report: four panels, three of them over λ."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .findings import Decoded, LambdaEffect, LogRatios


FORMATS = (".png", ".svg", ".pdf")


def draw(
    path: Path,
    *,
    effects: Sequence[LambdaEffect],
    decoded: Sequence[Decoded],
    log_ratios: Mapping[str, LogRatios | None],
    settings: Mapping[str, Any],
    recommended_lambda: float,
) -> None:
    """
    Draws the divergence, the log-ratios, the quantities that have limits, and the outcome: rewards if there are any,
    otherwise entropy and distance of q_λ.

    Args:
        path (`pathlib.Path`):
            File to write, whose ending decides the format.
        effects (`Sequence[LambdaEffect]`):
            One entry for each λ, ascending.
        decoded (`Sequence[Decoded]`):
            One entry for each λ, ascending, or none.
        log_ratios (`Mapping[str, LogRatios | None]`):
            Distributions of log T/R with their labels. `None` is left out.
        settings (`Mapping[str, Any]`):
            Settings of the report, for the two limits.
        recommended_lambda (`float`):
            The λ that is marked with a dashed line.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing a report needs matplotlib. Run `pip install matplotlib`.") from error
    figure = Figure(figsize=(10, 7), layout="constrained")
    (divergence, ratios), (limits, outcome) = figure.subplots(2, 2)
    _draw_divergence(divergence, effects)
    _draw_log_ratios(ratios, log_ratios)
    _draw_limits(limits, effects, settings)
    if decoded:
        _draw_rewards(outcome, decoded)
    else:
        _draw_target(outcome, effects)
    for axes in (divergence, limits, outcome):
        axes.axvline(recommended_lambda, color="gray", linestyle="--", linewidth=1)
        axes.set_xlabel("reward scale λ (dashed: recommended)")
    for axes in (divergence, ratios, limits, outcome):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_divergence(axes: Any, effects: Sequence[LambdaEffect]) -> None:
    lambdas = [effect.gopd_lambda for effect in effects]
    axes.plot(lambdas, [effect.renyi for effect in effects], marker="o", label="$D_λ(T ‖ R)$")
    axes.plot(lambdas, [effect.log_z for effect in effects], marker="o", label="$\\log Z_λ$")
    axes.set(title="Divergence of teacher and reference", ylabel="nats per token")


def _draw_log_ratios(axes: Any, log_ratios: Mapping[str, LogRatios | None]) -> None:
    for label, part in log_ratios.items():
        if part is not None:
            levels = list(map(float, part.quantiles))
            axes.plot(list(part.quantiles.values()), levels, marker="o", label=f"{label} ({part.count})")
    axes.axvline(0, color="gray", linewidth=1)
    axes.set(title="Sampled tokens", xlabel="log T/R, nats", ylabel="quantile")


def _draw_limits(axes: Any, effects: Sequence[LambdaEffect], settings: Mapping[str, Any]) -> None:
    lambdas = [effect.gopd_lambda for effect in effects]
    own = next(effect.off_teacher_mass for effect in effects if effect.gopd_lambda == 1)
    certain = [math.nan if effect.deterministic_flips is None else effect.deterministic_flips for effect in effects]
    extra = [effect.off_teacher_mass - own for effect in effects]
    for color, label, values, limit in (
        ("C0", "flips at near-certain positions", certain, settings["max_deterministic_flips"]),
        ("C1", "off-teacher mass beyond the teacher's own", extra, settings["max_off_teacher_mass"]),
        ("C2", "all flips", [effect.flips for effect in effects], None),
    ):
        axes.plot(lambdas, values, marker="o", color=color, label=label)
        if limit is not None:
            axes.axhline(limit, color=color, linestyle=":")
    axes.set(title="Changes relative to the teacher (dotted: limits)", ylabel="fraction")


def _draw_rewards(axes: Any, decoded: Sequence[Decoded]) -> None:
    axes.errorbar(
        [each.gopd_lambda for each in decoded],
        [each.reward for each in decoded],
        [each.standard_error for each in decoded],
        marker="o",
        capsize=3,
        label="decoded from $q_λ$, ± one standard error",
    )
    axes.set(title="Reward", ylabel="mean reward")


def _draw_target(axes: Any, effects: Sequence[LambdaEffect]) -> None:
    lambdas = [effect.gopd_lambda for effect in effects]
    axes.plot(lambdas, [effect.entropy for effect in effects], marker="o", label="entropy of $q_λ$")
    axes.plot(lambdas, [effect.kl_to_teacher for effect in effects], marker="o", label="$KL(q_λ ‖ T)$")
    axes.set(title="Target distribution $q_λ$", ylabel="nats per token")
