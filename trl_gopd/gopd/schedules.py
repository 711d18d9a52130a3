"""
How the λ of [G-OPD](https://huggingface.co/papers/2602.12125) varies. The paper keeps it constant.

λ − 1 weighs the extrapolation, and everything here only shrinks that weight. The λ of a step lies between 1, which is
plain on-policy distillation, and the configured λ, which may be one number or one a row, above 1 or below it.

- [`LambdaSchedule`] shrinks it for the whole batch, by the step, by the student's distance from the teacher, and by
  what the completions look like.
- `gate_lambda` sets λ to 1 for the tokens at which extrapolation is not trusted.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .monitors import CompletionSummary
from .objective import per_token


KINDS = ("constant", "linear", "adaptive")
# The mean length of this many first batches is what later batches are compared with; that of one batch is noisy.
START_BATCHES = 10


@dataclass(frozen=True)
class BackOff:
    """
    Limits on what completions may look like. A batch beyond one of them is an alarm, and multiplies λ − 1 by `factor`.
    A batch without an alarm adds 1/`recovery` of the configured λ − 1 back. So λ − 1 falls fast while alarms last, and
    is restored at most `recovery` batches after the last one.

    Args:
        max_truncated_share (`float`, *optional*):
            Alarm when a greater fraction of the completions is truncated. `None` ignores it.
        max_repetition (`float`, *optional*):
            Alarm when the mean fraction of repeated 4-grams is greater. `None` ignores it.
        max_length_change (`float`, *optional*):
            Alarm when the mean length has grown, or shrunk, by more than this factor since the first 10 batches.
            `None` ignores it.
        factor (`float`, *optional*, defaults to `0.5`):
            Factor of λ − 1 at an alarm. `0` is plain distillation from the first alarm on.
        recovery (`int`, *optional*, defaults to `100`):
            Number of batches without an alarm after which λ = 1 has become the configured λ again.
    """

    max_truncated_share: float | None = None
    max_repetition: float | None = None
    max_length_change: float | None = None
    factor: float = 0.5
    recovery: int = 100

    def __post_init__(self) -> None:
        for name in ("max_truncated_share", "max_repetition"):
            limit = getattr(self, name)
            if limit is not None and not 0 <= limit < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {limit}. Use None to ignore it.")
        if self.max_length_change is not None and not 1 < self.max_length_change < math.inf:
            raise ValueError(
                f"`max_length_change` must be finite and > 1, got {self.max_length_change}. Use None to ignore it."
            )
        if self.max_truncated_share is None and self.max_repetition is None and self.max_length_change is None:
            raise ValueError(
                "`BackOff` needs one of `max_truncated_share`, `max_repetition` and `max_length_change`, got None for "
                "all. Set one, or use no `BackOff`."
            )
        if not 0 <= self.factor < 1:
            raise ValueError(f"`factor` must be in [0, 1), got {self.factor}. Use 0.5.")
        if self.recovery < 1:
            raise ValueError(f"`recovery` must be at least 1 batch, got {self.recovery}. Use 100.")

    def alarms(self, summary: CompletionSummary, start_length: float | None) -> list[str]:
        """The limits that `summary` exceeds, in words. `start_length` is `None` until it is known."""
        found = [
            f"{name} {value:.3g} > {limit:.3g}"
            for name, value, limit in (
                ("truncated share", summary.truncated_share, self.max_truncated_share),
                ("repetition", summary.repetition, self.max_repetition),
            )
            if limit is not None and value > limit
        ]
        limit = self.max_length_change
        if limit is not None and start_length is not None:
            if not start_length / limit <= summary.mean_length <= start_length * limit:
                found.append(f"mean length {summary.mean_length:.4g}, {start_length:.4g} at the start")
        return found


@dataclass
class LambdaSchedule:
    """
    The λ of a step, from the configured one.

    `"adaptive"` is the rule of [A-G-OPD](https://github.com/Hongy-Wang/A-G-OPD), λ = clip(1 + a·ρ, 1, λ_max) with
    ρ = RMS(log π* − log π) / RMS(log π* − log π_ref), where λ_max is the configured λ. Below 1 it is mirrored:
    λ = clip(1 − a·ρ, λ_min, 1). The nearer the student is to its teacher, the less it extrapolates.

    What is observed takes effect at the next call of `at`. Observe once, at the end of each optimizer step, with sums
    over micro-batches and ranks: then λ does not depend on how a batch is divided, and a resumed run needs only
    `state_dict` and the step. ρ is that of the step before. At first it is 1, its value when the student starts as the
    reference.

    Args:
        kind (`str`, *optional*, defaults to `"constant"`):
            `"constant"` (the paper), `"linear"` from 1 at step 0 to λ at `warmup_steps`, or `"adaptive"`.
        warmup_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps of `"linear"`; 0 for the others.
        gain (`float`, *optional*, defaults to `0.25`):
            a of `"adaptive"`.
        back_off ([`BackOff`], *optional*):
            Limits on what completions may look like, with any `kind`.

    Raises:
        `ValueError`: If a value is out of its range.

    Example:

    ```python
    >>> from trl_gopd.gopd.schedules import LambdaSchedule
    >>> schedule = LambdaSchedule("linear", warmup_steps=4)
    >>> [schedule.at(step, 1.5) for step in range(6)]
    [1.0, 1.125, 1.25, 1.375, 1.5, 1.5]

    ```
    """

    kind: str = "constant"
    warmup_steps: int = 0
    gain: float = 0.25
    back_off: BackOff | None = None
    _ratio: float = field(default=1.0, init=False)
    _trust: float = field(default=1.0, init=False)
    _start_lengths: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"`kind` must be one of {list(KINDS)}, got {self.kind!r}. Use 'constant' for the paper's."
            )
        if self.kind == "linear" and self.warmup_steps < 1:
            raise ValueError(
                f"`warmup_steps` must be at least 1 for 'linear', got {self.warmup_steps}. Use 'constant' for none."
            )
        if self.kind != "linear" and self.warmup_steps != 0:
            raise ValueError(
                f"`warmup_steps` must be 0 for {self.kind!r}, got {self.warmup_steps}. Use 'linear' for a warm-up."
            )
        if not 0 < self.gain < math.inf:
            raise ValueError(f"`gain` must be finite and > 0, got {self.gain}. Use 0.25.")

    def at(self, step: int, gopd_lambda: float | Tensor) -> float | Tensor:
        """
        λ of the optimizer step that comes after `step` completed ones.

        Args:
            step (`int`):
                Completed optimizer steps, `TrainerState.global_step`.
            gopd_lambda (`float` or `torch.Tensor`):
                The configured λ: one for all, or a tensor of any shape, such as one a row.

        Returns:
            `float` or `torch.Tensor`: of the type and shape of `gopd_lambda`; equal to it, bit for bit, where nothing
            shrinks it.
        """
        max_deviation = self.gain * self._ratio if self.kind == "adaptive" else math.inf
        fraction = self._trust * (min(step / self.warmup_steps, 1.0) if self.kind == "linear" else 1.0)
        lowest, highest = 1 - max_deviation, 1 + max_deviation
        if isinstance(gopd_lambda, Tensor):
            bounded: float | Tensor = gopd_lambda.clamp(lowest, highest)
        else:
            bounded = min(max(gopd_lambda, lowest), highest)
        # 1 + (λ − 1) is not λ below 0.5 and above 2, where λ − 1 is rounded.
        return bounded if fraction == 1 else 1 + fraction * (bounded - 1)

    def observe_deviations(self, squares: Tensor) -> None:
        """
        Sets ρ of `"adaptive"`. If no token had an implicit reward, λ made no difference, and ρ is left as it was.

        Args:
            squares (`torch.Tensor` of shape `(2,)`):
                `deviation_squares`, summed over the micro-batches and ranks of a step.

        Raises:
            `ValueError`: If a sum is not finite.
        """
        distillation, reward = squares.tolist()
        if not math.isfinite(distillation + reward):
            raise ValueError(
                f"`squares` must be finite, got {[distillation, reward]}. Mask the tokens that some model gives the "
                "probability 0."
            )
        if reward > 0:
            self._ratio = math.sqrt(distillation / reward)

    def observe_completions(self, summary: CompletionSummary) -> list[str]:
        """
        Moves λ towards 1 if a limit of `back_off` is exceeded, and a little back towards the configured λ if none is.

        Args:
            summary ([`CompletionSummary`]):
                Of one batch of completions, over all ranks.

        Returns:
            `list[str]`: the alarms in words, to be logged.
        """
        if self.back_off is None:
            return []
        is_started = len(self._start_lengths) == START_BATCHES
        start_length = math.fsum(self._start_lengths) / START_BATCHES if is_started else None
        if not is_started:
            self._start_lengths.append(summary.mean_length)
        alarms = self.back_off.alarms(summary, start_length)
        if alarms:
            self._trust *= self.back_off.factor
        else:
            self._trust = min(self._trust + 1 / self.back_off.recovery, 1.0)
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """What was observed, as numbers and lists that JSON keeps exactly. The settings are not included."""
        return {"ratio": self._ratio, "trust": self._trust, "start_lengths": list(self._start_lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restores what was observed; settings may differ.

        Raises:
            `ValueError`: If `state` is not what `state_dict` returns. Nothing is changed in that case.
        """
        names = list(self.state_dict())
        if sorted(state) != sorted(names):
            raise ValueError(
                f"`state` must have the keys {names}, got {list(state)}. Pass what `state_dict` returned."
            )
        ratio, trust, lengths = (state[name] for name in names)
        are_numbers = isinstance(lengths, list) and all(
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            for value in (ratio, trust, *lengths)
        )
        if not are_numbers or trust > 1 or len(lengths) > START_BATCHES:
            raise ValueError(
                f"`state` must have `ratio` >= 0, `trust` in [0, 1] and at most {START_BATCHES} `start_lengths` >= 0, "
                f"all of them finite numbers, got {state}. Pass what `state_dict` returned."
            )
        self._ratio, self._trust, self._start_lengths = float(ratio), float(trust), [float(n) for n in lengths]


def deviation_squares(
    *, student_logps: Tensor, teacher_logps: Tensor, reference_logps: Tensor, mask: Tensor
) -> Tensor:
    """
    Σ (log π* − log π)² and Σ (log π* − log π_ref)², to be summed over micro-batches and ranks. Both sums run over the
    same tokens, so their number cancels in the ratio of the root mean squares.

    Args:
        student_logps (`torch.Tensor` of shape `(B, T)`):
            Nats of the sampled tokens under the student.
        teacher_logps (`torch.Tensor` of shape `(B, T)`):
            The same under the teacher.
        reference_logps (`torch.Tensor` of shape `(B, T)`):
            The same under the reference.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token is trained on and every model has its id.

    Returns:
        `torch.Tensor` of shape `(2,)`: float32, detached.
    """
    deviations = _deviations(student_logps, teacher_logps, reference_logps)
    # not a product: padding may hold -inf or NaN
    return deviations.masked_fill(mask == 0, 0.0).square().flatten(1).sum(1)


def gate_lambda(
    gopd_lambda: float | Tensor,
    *,
    student_logps: Tensor,
    teacher_logps: Tensor,
    reference_logps: Tensor,
    deterministic_above: float | None = None,
    needs_agreement: bool = False,
) -> Tensor:
    """
    λ of each token: 1 where a gate is closed, `gopd_lambda` elsewhere.

    Where the teacher is nearly certain, λ > 1 can lose the format of structured text
    ([2605.08737](https://huggingface.co/papers/2605.08737)). That calls for λ = 1 at a state with max_v π*(v) > p.
    Only the sampled token's π* is known here, and `deterministic_above` compares that with p. The gate is open at all
    other states; at such a state and for p ≥ 0.5, it is closed for the likeliest token alone, and a token that was
    sampled although the teacher was certain of another one keeps its λ. Where the maximum over the vocabulary is
    known, give it as `teacher_logps`; then the gate is one of the state.

    Gates on the sampled token change what is optimised, as a clip does: at each state the reward of an id counts only
    if its own gate is open, and the optimum is not π*^λ·π_ref^(1−λ). `extrapolated_divergence` takes one λ a state,
    because one that depended on the token sampled there would give it a random target.

    Args:
        gopd_lambda (`float` or `torch.Tensor` of shape `(B,)`, `(B, 1)` or `(B, T)`):
            λ where the gates are open.
        student_logps (`torch.Tensor` of shape `(B, T)`):
            Nats of the sampled tokens under the student.
        teacher_logps (`torch.Tensor` of shape `(B, T)`):
            The same under the teacher.
        reference_logps (`torch.Tensor` of shape `(B, T)`):
            The same under the reference.
        deterministic_above (`float`, *optional*):
            Probability p under the teacher above which λ is 1. `None` keeps this gate open.
        needs_agreement (`bool`, *optional*, defaults to `False`):
            Whether λ is 1 unless log π* − log π and log π* − log π_ref have one sign. Where they differ, the two terms
            of an advantage with λ > 1 oppose each other. Not what
            [2607.15161](https://huggingface.co/papers/2607.15161) does, which centres both over the vocabulary first.

    Returns:
        `torch.Tensor` of shape `(B, T)`: float32, detached.

    Raises:
        `ValueError`: If `deterministic_above` is not a probability.
    """
    is_open = torch.ones_like(teacher_logps, dtype=torch.bool)
    if deterministic_above is not None:
        if not 0 < deterministic_above < 1:
            raise ValueError(
                f"`deterministic_above` must be between 0 and 1, got {deterministic_above}. Use None for no gate."
            )
        is_open &= teacher_logps.float() <= math.log(deterministic_above)
    if needs_agreement:
        distillation, rewards = _deviations(student_logps, teacher_logps, reference_logps).sign()
        is_open &= distillation == rewards
    return torch.where(is_open, per_token(gopd_lambda, teacher_logps), 1.0)


def _deviations(student_logps: Tensor, teacher_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """log π* − log π and log π* − log π_ref, stacked, float32."""
    return teacher_logps.detach().float() - torch.stack([student_logps, reference_logps]).detach().float()
