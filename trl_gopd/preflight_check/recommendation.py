"""The rule by which a preflight recommends a λ."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Literal

from .findings import Decoded, LambdaEffect


# These are rules of thumb, which are not taken from a paper.
MAX_OFF_TEACHER_MASS = 0.01
MAX_DETERMINISTIC_FLIPS = 0.001
LENGTH_ALARM = 1.25  # factor by which the probability of ending may change before the report mentions it
IDENTICAL_KL = 1e-6  # nats; a teacher and a reference that are closer than this are treated as one model


def recommend(
    effects: Sequence[LambdaEffect],
    decoded: Sequence[Decoded] = (),
    *,
    max_off_teacher_mass: float = MAX_OFF_TEACHER_MASS,
    max_deterministic_flips: float = MAX_DETERMINISTIC_FLIPS,
    same_as_student: Literal["teacher", "reference"] | None = None,
) -> tuple[float, list[str]]:
    """
    Returns a λ of the grid by the rule that [`preflight`] states, and the reasons in words.

    If teacher and reference are one model, every λ has the same target, and the only recommendation is λ = 1.

    Args:
        effects (`Sequence[LambdaEffect]`):
            One entry for each λ, ascending. λ = 1 must be among them.
        decoded (`Sequence[Decoded]`, *optional*):
            One entry for each λ, ascending.
        max_off_teacher_mass (`float`, *optional*, defaults to `0.01`):
            Limit on the off-teacher mass of q_λ beyond that of the teacher itself.
        max_deterministic_flips (`float`, *optional*, defaults to `0.001`):
            Limit on the fraction of near-certain positions at which the most likely id changes.
        same_as_student (`"teacher"` or `"reference"`, *optional*):
            Which of the two is known to be the same model as the student.

    Returns:
        `tuple[float, list[str]]`: λ, and one or more sentences for each reason.
    """
    by_lambda = {effect.gopd_lambda: effect for effect in effects}
    teacher = by_lambda[1.0]
    if teacher.renyi < IDENTICAL_KL:
        return 1.0, [_nothing_to_learn(teacher.renyi, same_as_student)]
    largest, reasons = _largest_within(effects, max_off_teacher_mass, max_deterministic_flips)
    if same_as_student == "teacher":
        reasons.insert(
            0,
            "The student is the teacher, so training with λ = 1 would not change it. Any other λ moves it away from "
            "the teacher.",
        )
    recommended = largest
    if decoded:
        recommended, reason = _best_reward(decoded)
        reasons.append(reason)
        if recommended > largest:
            reasons.append(f"Caution: this is above λ = {largest:g}, the largest value within the limits.")
    elif largest == effects[-1].gopd_lambda:
        reasons.append(f"λ = {largest:g} is the largest value measured, so nothing is known about larger ones.")
    before, after = teacher.eos_probability, by_lambda[recommended].eos_probability
    if before > 0 and not 1 / LENGTH_ALARM <= after / before <= LENGTH_ALARM:
        reasons.append(
            f"With λ = {recommended:g} the probability that a token ends the completion is {after:.2g}, and with the "
            f"teacher it is {before:.2g}, so completions would become {'shorter' if after > before else 'longer'}."
        )
    return recommended, reasons


def _nothing_to_learn(kl: float, same_as_student: str | None) -> str:
    """Returns the reason for λ = 1 if teacher and reference are one model."""
    measured = f"at the measured states (KL(T ‖ R) = {kl:.1g} nats per token)"
    if same_as_student is not None:
        return (
            f"There is nothing to learn: student, teacher and reference agree {measured}, so the student is already "
            "at the target, and training would not change it with any λ. Pass another teacher."
        )
    return (
        f"Nothing can be learned about λ from these models: teacher and reference agree {measured}, so the target is "
        "the teacher for every λ. λ = 1 is recommended only because it needs no reference. Pass the model from which "
        "the teacher was trained as the reference, if the teacher is to be extrapolated."
    )


def _largest_within(
    effects: Sequence[LambdaEffect], max_off_teacher_mass: float, max_deterministic_flips: float
) -> tuple[float, list[str]]:
    """Returns the last λ, going up from 1, before the first that exceeds a limit, and a sentence for each λ."""
    own_mass = next(effect.off_teacher_mass for effect in effects if effect.gopd_lambda == 1)
    largest, reasons = 1.0, []
    for effect in effects:
        if effect.gopd_lambda <= 1:
            continue
        extra, flips = effect.off_teacher_mass - own_mass, effect.deterministic_flips or 0.0
        is_within = extra <= max_off_teacher_mass and flips <= max_deterministic_flips
        reasons.append(
            f"λ = {effect.gopd_lambda:g} {'stays within' if is_within else 'exceeds'} the limits: it moves "
            f"{extra:+.4f} of probability to ids that the teacher finds unlikely (limit {max_off_teacher_mass:g}) and "
            f"changes {flips:.3%} of its near-certain choices (limit {max_deterministic_flips:.3%})."
        )
        if not is_within:  # a larger λ that is within the limits again would be so by chance
            break
        largest = effect.gopd_lambda
    return largest, reasons


def _best_reward(decoded: Sequence[Decoded]) -> tuple[float, str]:
    """Returns the λ with the best mean reward, or one nearer to 1 that is as good within one standard error."""
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
                f"{said}, but λ = {each.gopd_lambda:g} is nearer to 1 and within one standard error of it: the "
                f"difference is {gain:.4g} ± {error:.2g}."
            )
    return best.gopd_lambda, f"{said}, and no λ nearer to 1 is within one standard error of it."
