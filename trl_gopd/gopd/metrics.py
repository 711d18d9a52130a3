"""
What is logged of a micro-batch: means over tokens by name, each from a sum and a count that are added over ranks; with
several teachers, also of each one.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .estimators.protocol import Estimate
from .monitors import is_eos
from .objective import implicit_rewards


# Nats below which log-probabilities of a token are those of one model: what rounding leaves between two forwards of it
SAME = 1e-4
# Means that are also logged for each of several teachers
PER_TEACHER = ("reverse_kl", "teacher_logp", "advantage_mean", "implicit_reward", "clip_share", "lambda")


def token_values(
    estimate: Estimate,
    batch: Batch,
    *,
    eos_token_ids: int | Sequence[int],
    extrapolation_clip: float | None,
    varies: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """
    The values of tokens whose means are logged.

    Args:
        estimate ([`Estimate`]), batch ([`Batch`]):
            A micro-batch.
        eos_token_ids (`int` or `Sequence[int]`):
            The ids that end a sequence.
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref| in the objective.
        varies (`bool`):
            Whether λ may differ between rows, tokens or steps.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: by name, values `(B, T)` and a mask of those that count.
    """
    known = estimate.known.bool()
    advantages = estimate.advantages.masked_fill(~known, 0.0)
    ends = is_eos(batch.completion_ids, known, eos_token_ids)
    values = {
        "reverse_kl": (estimate.reverse_kl, known),
        "teacher_logp": (estimate.teacher_logps, known),
        "advantage_mean": (advantages, known),
        "advantage_square": (advantages.square(), known),
        "advantage_positive_share": ((advantages > 0).float(), known),
        "outside_vocabulary_share": ((~known).float(), batch.loss_mask.bool()),
        "eos_advantage": (advantages, ends),
        **{name: (value, known) for name, value in estimate.means.items()},
    }
    lambdas = estimate.gopd_lambda.expand(known.shape)
    if varies:
        values["lambda"] = (lambdas, known)
    if estimate.reference_logps is not None:
        shown = known if estimate.has_reference is None else known & estimate.has_reference
        rewards = implicit_rewards(teacher_logps=estimate.teacher_logps, reference_logps=estimate.reference_logps)
        clip = math.inf if extrapolation_clip is None else extrapolation_clip
        extrapolation = (lambdas - 1) * rewards.clamp(-clip, clip)
        values |= {
            "implicit_reward": (rewards, shown),
            "extrapolation": (extrapolation, shown),
            "extrapolation_abs": (extrapolation.abs(), shown),
            "distillation_abs": (estimate.reverse_kl.abs(), shown),
            "eos_implicit_reward": (rewards, ends & shown),
        }
        if extrapolation_clip is not None:
            values["clip_share"] = ((rewards.abs() > extrapolation_clip).float(), shown)
    return values


def means(
    values: Mapping[str, tuple[Tensor, Tensor]],
    teacher_index: Tensor,
    teacher_ids: Sequence[str | None],
    *,
    add_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """
    Means over all tokens that count, of all ranks.

    Args:
        values (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`):
            What `token_values` returned; the names are the same on all ranks.
        teacher_index (`torch.Tensor` of shape `(B,)`):
            Which of the teachers a row belongs to.
        teacher_ids (`Sequence[str | None]`):
            Ids of the teachers.
        add_over_ranks (`Callable`):
            Adds a tensor over ranks.

    Returns:
        `dict[str, float]`: means by name; a name of which no token counts is left out. Of several teachers also
        `"{id}/{name}"` for the names of `PER_TEACHER`, and `"{id}/token_share"`.
    """
    sums = [value.float().masked_fill(~mask, 0.0).sum(1) for value, mask in values.values()]
    counts = [mask.sum(1).float() for _, mask in values.values()]
    owners = torch.arange(len(teacher_ids), device=teacher_index.device) == teacher_index.unsqueeze(1)
    totals = add_over_ranks(torch.stack(sums + counts) @ owners.float())  # (2 names, teachers)
    total_sums, total_counts = totals[: len(values)], totals[len(values) :]
    result = {
        name: total / count
        for name, total, count in zip(values, total_sums.sum(1).tolist(), total_counts.sum(1).tolist(), strict=True)
        if count
    }
    if len(teacher_ids) > 1:
        tokens = total_counts[list(values).index("reverse_kl")]
        for number, key in enumerate(teacher_ids):
            result[f"{key}/token_share"] = float(tokens[number] / tokens.sum().clamp(min=1))
            for name, total, count in zip(
                values, total_sums[:, number].tolist(), total_counts[:, number].tolist(), strict=True
            ):
                if count and name in PER_TEACHER:
                    result[f"{key}/{name}"] = total / count
    return result


def nothing_to_learn(means: Mapping[str, float]) -> list[str]:
    """
    Why a run whose first micro-batch has these means cannot learn, in sentences; none for most runs.

    Args:
        means (`Mapping[str, float]`):
            What `means` returned.
    """
    reasons = []
    if means.get("advantage_square", 1.0) ** 0.5 < SAME:
        reasons.append(
            "Student and teacher give every sampled token the same probability, so all advantages are 0 and there is "
            "nothing to learn. Check that `teacher_model` is another model than the student."
        )
    if means.get("extrapolation_abs", 1.0) < SAME:
        reasons.append(
            "Teacher and reference give every sampled token the same probability, so λ changes nothing. Check that "
            "`ref_model` is another model than the teacher, or use `gopd_lambda=1`."
        )
    return reasons


def summarize(means: Mapping[str, float], largest_advantage: float) -> dict[str, float]:
    """
    What is logged: the means, without those of which only something else is shown.

    Args:
        means (`Mapping[str, float]`):
            What `means` returned.
        largest_advantage (`float`):
            The largest |A| of all ranks, in nats.
    """
    logged: dict[str, Any] = dict(means)
    if "advantage_square" not in logged:  # no token counts
        return {name: value for name, value in logged.items() if name == "outside_vocabulary_share" and value}
    # The variance E[A²] − E[A]² may be rounded below 0.
    variance = max(logged.pop("advantage_square") - logged["advantage_mean"] ** 2, 0.0)
    logged |= {"advantage_std": variance**0.5, "advantage_abs_max": largest_advantage}
    if "extrapolation_abs" in logged:
        parts = logged.pop("extrapolation_abs"), logged.pop("distillation_abs")
        logged["extrapolation_share"] = parts[0] / max(sum(parts), torch.finfo(torch.float32).tiny)
    if not logged.get("outside_vocabulary_share"):
        logged.pop("outside_vocabulary_share", None)
    return logged


def drop_nonfinite(logs: MutableMapping[str, Any], metrics: MutableMapping[str, list[Any]]) -> None:
    """
    Takes away numbers that are not finite, those of steps that were left out. JSON and most trackers know no others,
    and one would be the mean of all that it is averaged with.

    Args:
        logs (`MutableMapping[str, Any]`):
            What is about to be logged. Changed in place: TRL adds its metrics to it, which `evaluate` then returns.
        metrics (`MutableMapping[str, list]`):
            TRL's values since the last time, whose means are logged, too. Changed in place.
    """
    for name, values in list(metrics.items()):
        metrics[name] = [value for value in values if _is_finite(value)]
        if not metrics[name]:
            del metrics[name]
    for name in [name for name, value in logs.items() if not _is_finite(value)]:
        del logs[name]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
