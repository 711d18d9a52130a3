"""The options of a preflight, with their checks."""

import math
from dataclasses import dataclass


LAMBDAS = (0.5, 1.0, 1.1, 1.25, 1.5, 2.0)
# The smallest value of each whole number. A standard error needs two samples.
MINIMA = {"num_samples": 2, "max_completion_length": 1, "batch_size": 1, "chunk_size": 1, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class Options:
    """
    Options of [`preflight`], which explains them. They are checked when an instance is created.

    Raises:
        `ValueError`: For the first option that is out of its range.
    """

    lambdas: tuple[float, ...]
    sample_from: str
    num_samples: int
    max_completion_length: int
    temperature: float
    seed: int
    batch_size: int
    chunk_size: int
    max_off_teacher_mass: float
    max_deterministic_flips: float

    def __post_init__(self) -> None:
        for name, minimum in MINIMA.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"`{name}` must be a whole number of at least {minimum}, got {value!r}.")
        for name in ("max_off_teacher_mass", "max_deterministic_flips"):
            fraction = getattr(self, name)
            if not 0 <= fraction <= 1:  # this form also refuses NaN
                raise ValueError(f"`{name}` must lie between 0 and 1, got {fraction}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be positive and finite, got {self.temperature}. Use 1.0.")
        for gopd_lambda in self.lambdas:
            if not 0 <= gopd_lambda < math.inf:
                raise ValueError(
                    f"`lambdas` must be finite and >= 0, got {gopd_lambda}. Use a grid such as {LAMBDAS}."
                )
        if self.sample_from not in ("teacher", "student"):
            raise ValueError(f"`sample_from` must be 'teacher' or 'student', got {self.sample_from!r}.")

    @property
    def grid(self) -> list[float]:
        """The values of λ that are measured: those of `lambdas` and 1, ascending."""
        return sorted({1.0, *map(float, self.lambdas)})
