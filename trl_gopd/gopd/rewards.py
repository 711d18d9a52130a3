"""GRPO wants a reward function, and distillation has none: one that always gives 0, and leaves no trace."""

from collections.abc import MutableMapping
from typing import Any


def null_reward(prompts: list[Any], environments: list[Any] | None = None, **kwargs: Any) -> list[float | None]:
    """A reward of 0 for each completion; it has no say where an environment gives the reward."""
    environments = environments or [None] * len(prompts)
    return [None if hasattr(environment, "get_reward") else 0.0 for environment in environments]


def drop_null_reward(
    metrics: MutableMapping[str, Any], rewards: MutableMapping[str, Any], *, has_others: bool
) -> None:
    """
    Removes what GRPO logged of `null_reward`.

    Args:
        metrics (`MutableMapping[str, Any]`):
            GRPO's metrics by name.
        rewards (`MutableMapping[str, Any]`):
            The rewards in GRPO's table of completions, by the name of the function.
        has_others (`bool`):
            Whether there are other rewards, whose sums stay.
    """
    own = f"rewards/{null_reward.__name__}/"
    sums = () if has_others else ("reward", "reward_std", "frac_reward_zero_std")
    for name in [name for name in metrics if name.startswith(own) or name in sums]:
        del metrics[name]
    rewards.pop(null_reward.__name__, None)
