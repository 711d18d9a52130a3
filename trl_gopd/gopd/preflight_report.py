"""What `preflight` found: numbers, a recommendation with its reasons, JSON, a figure. Nothing here runs a model."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..files import written_whole


CLIPS = (1.0, 2.0, 5.0, 10.0)  # nats, candidates for `gopd_extrapolation_clip`
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Rules of thumb from here on; no paper gives them.
MAX_OFF_TEACHER_MASS = 0.01
MAX_DETERMINISTIC_FLIPS = 0.001
LENGTH_ALARM = 1.25  # factor by which the chance of ending may change without a word
IDENTICAL_KL = 1e-6  # nats; teacher and reference closer than this are taken for one model

FIGURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class LambdaEffect:
    """
    What one λ does, averaged over the tokens of all completions. Distributions are tempered.

    Args:
        gopd_lambda (`float`): λ.
        renyi (`float`):
            Rényi divergence D_λ(T ‖ R) = log Σ T^λ R^(1−λ) / (λ − 1), nats; at λ = 1 its limit KL(T ‖ R). Rounding
            adds about 1e-5/|λ − 1|.
        log_z (`float`): log Z_λ = (λ − 1)·D_λ, nats: what the whole-sequence objective pays for one more token.
        kl_to_teacher (`float`): KL(q_λ ‖ T), nats.
        entropy (`float`): Entropy of q_λ, nats.
        eos_probability (`float`): Probability that q_λ ends the completion.
        flips (`float`): Share of positions at which q_λ and T have another most likely id.
        deterministic_flips (`float` or `None`): The same among positions where max T > 0.9; `None` without any.
        off_teacher_mass (`float`): Probability that q_λ puts on ids to which T gives less than 1e-3.
    """

    gopd_lambda: float
    renyi: float
    log_z: float
    kl_to_teacher: float
    entropy: float
    eos_probability: float
    flips: float
    deterministic_flips: float | None
    off_teacher_mass: float


@dataclass(frozen=True)
class LogRatios:
    """
    Distribution of log T/R over sampled tokens, in nats.

    Args:
        count (`int`): Tokens.
        mean (`float`): Mean.
        quantiles (`dict[str, float]`): Value at each of `QUANTILES`.
        beyond (`dict[str, float]`): Share of tokens with |log T/R| > c, for each c of `CLIPS`.
    """

    count: int
    mean: float
    quantiles: dict[str, float]
    beyond: dict[str, float]


@dataclass(frozen=True)
class Decoded:
    """
    Completions sampled from q_λ, and what the reward functions say of them.

    Args:
        gopd_lambda (`float`): λ.
        rewards (`list[float | None]`): Sum over reward functions for each completion; `None` where all gave `None`.
        reward (`float`): Mean.
        standard_error (`float`): Of the mean, over completions.
        length (`float`): Mean tokens, the end included.
        truncated (`float`): Share of completions that reached the limit without an end.
    """

    gopd_lambda: float
    rewards: list[float | None]
    reward: float
    standard_error: float
    length: float
    truncated: float


@dataclass(frozen=True)
class PreflightReport:
    """
    What `preflight` returns.

    Args:
        settings (`dict[str, Any]`): Models, options and versions behind the numbers.
        completions (`int`): Sampled completions.
        tokens (`int`): Their tokens, ends included.
        length (`float`): Mean tokens of a completion.
        truncated (`float`): Share of completions without an end.
        deterministic (`float`): Share of positions where max T > 0.9.
        log_ratios ([`LogRatios`]): log T/R of all sampled tokens.
        eos_log_ratios ([`LogRatios`] or `None`): log T/R of the ends alone; `None` if no completion ended.
        effects (`list[LambdaEffect]`): One entry a λ, ascending.
        decoded (`list[Decoded]`): One entry a λ, ascending; empty without reward functions.
        recommended_lambda (`float`): λ.
        reasons (`list[str]`): Why, in words.
        seconds (`float`): Wall-clock time.
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
        """Everything as plain numbers, strings, lists and dictionaries."""
        return asdict(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON, or as a figure if `path` ends in .png, .svg or .pdf (needs matplotlib)."""
        path = Path(path)
        with written_whole(path) as part:
            if path.suffix in FIGURES:
                _draw(self, part)
            else:
                part.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def recommend(
    effects: Sequence[LambdaEffect],
    decoded: Sequence[Decoded] = (),
    *,
    max_off_teacher_mass: float = MAX_OFF_TEACHER_MASS,
    max_deterministic_flips: float = MAX_DETERMINISTIC_FLIPS,
) -> tuple[float, list[str]]:
    """
    A λ of the grid by the rule that `preflight` states, and the reasons in words.

    Args:
        effects (`Sequence[LambdaEffect]`):
            One entry a λ, ascending, with λ = 1 among them.
        decoded (`Sequence[Decoded]`, *optional*):
            One entry a λ, ascending.
        max_off_teacher_mass (`float`, *optional*, defaults to `0.01`):
            Bound on off-teacher mass beyond the teacher's own.
        max_deterministic_flips (`float`, *optional*, defaults to `0.001`):
            Bound on flips among near-certain positions.

    Returns:
        `tuple[float, list[str]]`: λ, and one sentence or more a reason.
    """
    by_lambda = {effect.gopd_lambda: effect for effect in effects}
    teacher = by_lambda[1.0]
    reasons = []
    if teacher.renyi < IDENTICAL_KL:
        reasons.append(
            f"Teacher and reference agree at these states (KL {teacher.renyi:.1g} nats), so λ changes nothing. Is the "
            "reference the one you mean?"
        )
    largest = 1.0
    for effect in effects:
        if effect.gopd_lambda <= 1:
            continue
        extra, flips = effect.off_teacher_mass - teacher.off_teacher_mass, effect.deterministic_flips or 0.0
        is_within = extra <= max_off_teacher_mass and flips <= max_deterministic_flips
        reasons.append(
            f"λ = {effect.gopd_lambda:g} {'stays within' if is_within else 'exceeds'} the limits: it moves "
            f"{extra:+.4f} of probability to ids that the teacher finds unlikely (limit {max_off_teacher_mass:g}) and "
            f"overturns {flips:.3%} of its near-certain choices (limit {max_deterministic_flips:.3%})."
        )
        if not is_within:  # a larger one that is within again would be luck
            break
        largest = effect.gopd_lambda
    recommended = largest
    if decoded:
        recommended, reason = _best_reward(decoded)
        reasons.append(reason)
        if recommended > largest:
            reasons.append(f"Beware: that is beyond λ = {largest:g}, the largest within the limits.")
    elif largest == effects[-1].gopd_lambda:
        reasons.append(f"λ = {largest:g} is the largest of the grid; nothing is known of larger ones.")
    before, after = teacher.eos_probability, by_lambda[recommended].eos_probability
    if before > 0 and not 1 / LENGTH_ALARM <= after / before <= LENGTH_ALARM:
        reasons.append(
            f"Length: at λ = {recommended:g} the chance of ending at a token is {after:.2g} instead of the teacher's "
            f"{before:.2g}, so completions would get {'shorter' if after > before else 'longer'}."
        )
    return recommended, reasons


def _best_reward(decoded: Sequence[Decoded]) -> tuple[float, str]:
    best = max(decoded, key=lambda each: (each.reward, -abs(each.gopd_lambda - 1)))
    said = f"λ = {best.gopd_lambda:g} has the best mean reward, {best.reward:.4g} ± {best.standard_error:.2g}"
    for each in sorted(decoded, key=lambda each: abs(each.gopd_lambda - 1)):
        if each is best:
            break
        pairs = zip(best.rewards, each.rewards, strict=True)
        gains = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        if len(gains) < 2:
            continue
        gain, error = mean(gains), stdev(gains) / math.sqrt(len(gains))
        if gain <= error:
            return each.gopd_lambda, (
                f"{said}, but λ = {each.gopd_lambda:g}, nearer to 1, is within one standard error: the difference is "
                f"{gain:.4g} ± {error:.2g}."
            )
    return best.gopd_lambda, f"{said}, and none nearer to 1 is within one standard error of it."


def _draw(report: PreflightReport, path: Path) -> None:
    """Divergence, log-ratios, the two limits, and rewards or, without them, what q_λ looks like; against λ."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing a report needs matplotlib. Run `pip install matplotlib`.") from error
    lambdas = [effect.gopd_lambda for effect in report.effects]
    figure = Figure(figsize=(10, 7), layout="constrained")
    (divergence, ratios), (limits, outcome) = figure.subplots(2, 2)
    for label, values in (
        ("$D_λ(T ‖ R)$", [effect.renyi for effect in report.effects]),
        ("$\\log Z_λ$", [effect.log_z for effect in report.effects]),
    ):
        divergence.plot(lambdas, values, marker="o", label=label)
    divergence.set(title="Teacher against reference", ylabel="nats a token")

    for label, part in (("all tokens", report.log_ratios), ("ends", report.eos_log_ratios)):
        if part is not None:
            ratios.plot(list(part.quantiles.values()), list(QUANTILES), marker="o", label=f"{label} ({part.count})")
    ratios.axvline(0, color="gray", linewidth=1)
    ratios.set(title="Sampled tokens", xlabel="log T/R, nats", ylabel="quantile")

    own = next(effect.off_teacher_mass for effect in report.effects if effect.gopd_lambda == 1)
    certain = [
        math.nan if effect.deterministic_flips is None else effect.deterministic_flips for effect in report.effects
    ]
    for color, label, values, limit in (
        ("C0", "near-certain flips", certain, report.settings["max_deterministic_flips"]),
        (
            "C1",
            "off-teacher mass, less the teacher's own",
            [effect.off_teacher_mass - own for effect in report.effects],
            report.settings["max_off_teacher_mass"],
        ),
        ("C2", "all flips", [effect.flips for effect in report.effects], None),
    ):
        limits.plot(lambdas, values, marker="o", color=color, label=label)
        if limit is not None:
            limits.axhline(limit, color=color, linestyle=":")
    limits.set(title="What the teacher would not do; dotted: limits", ylabel="share")

    if report.decoded:
        outcome.errorbar(
            [each.gopd_lambda for each in report.decoded],
            [each.reward for each in report.decoded],
            [each.standard_error for each in report.decoded],
            marker="o",
            capsize=3,
            label="decoded from $q_λ$, ± one standard error",
        )
        outcome.set(title="Reward", ylabel="mean reward")
    else:
        outcome.plot(lambdas, [effect.entropy for effect in report.effects], marker="o", label="entropy of $q_λ$")
        outcome.plot(lambdas, [effect.kl_to_teacher for effect in report.effects], marker="o", label="$KL(q_λ ‖ T)$")
        outcome.set(title="Target", ylabel="nats a token")
    for axes in (divergence, limits, outcome):
        axes.axvline(report.recommended_lambda, color="gray", linestyle="--", linewidth=1)
        axes.set_xlabel("reward scale λ; dashed: recommended")
    for axes in (divergence, ratios, limits, outcome):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
