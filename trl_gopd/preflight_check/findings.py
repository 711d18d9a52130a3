"""The quantities that a preflight measures, as plain numbers."""

from dataclasses import dataclass


CLIPS = (1.0, 2.0, 5.0, 10.0)  # nats, candidates for `gopd_extrapolation_clip`
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class LambdaEffect:
    """
    What one λ does, averaged over the tokens of all completions. T is the distribution of the teacher, R that of the
    reference and q_λ the target, all of them at the sampling temperature.

    Args:
        gopd_lambda (`float`):
            λ.
        renyi (`float`):
            Rényi divergence D_λ(T ‖ R) = log Σ T^λ R^(1−λ) / (λ − 1), nats; at λ = 1 its limit KL(T ‖ R). Rounding
            adds about 1e-5/|λ − 1|.
        log_z (`float`):
            log Z_λ = (λ − 1)·D_λ, nats: the value of one more token under the whole-sequence objective.
        kl_to_teacher (`float`):
            KL(q_λ ‖ T), nats.
        entropy (`float`):
            Entropy of q_λ, nats.
        eos_probability (`float`):
            Probability under q_λ of the tokens that end a completion.
        flips (`float`):
            Fraction of positions at which q_λ and T have different most likely ids.
        deterministic_flips (`float` or `None`):
            The same fraction among positions with max T > 0.9; `None` if there are none.
        off_teacher_mass (`float`):
            Probability under q_λ of all ids whose probability under T is below 1e-3.
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
        count (`int`):
            Number of tokens.
        mean (`float`):
            Mean.
        quantiles (`dict[str, float]`):
            Value at each of `QUANTILES`.
        beyond (`dict[str, float]`):
            Fraction of tokens with |log T/R| > c, for each c of `CLIPS`.
    """

    count: int
    mean: float
    quantiles: dict[str, float]
    beyond: dict[str, float]


@dataclass(frozen=True)
class Decoded:
    """
    Completions that were sampled from q_λ, and their rewards.

    Args:
        gopd_lambda (`float`):
            λ.
        rewards (`list[float | None]`):
            Sum of the reward functions for each completion; `None` where all of them returned `None`.
        reward (`float`):
            Mean reward.
        standard_error (`float`):
            Standard error of the mean over completions.
        length (`float`):
            Mean number of tokens, the end-of-sequence token included.
        truncated (`float`):
            Fraction of completions that reached the maximum length without an end-of-sequence token.
    """

    gopd_lambda: float
    rewards: list[float | None]
    reward: float
    standard_error: float
    length: float
    truncated: float
