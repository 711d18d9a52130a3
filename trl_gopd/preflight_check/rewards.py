"""Completions that are sampled from q_λ, and what reward functions return for them."""

import inspect
import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerState

from .findings import Decoded
from .models import name_of
from .sampling import Sampler


RewardFunction = Callable[..., Sequence[float | None]]


def check_rewards(reward_funcs: RewardFunction | Sequence[RewardFunction] | None) -> list[RewardFunction]:
    """Returns the reward functions as a list, and raises `TypeError` for anything but a plain function."""
    given: Any = [] if reward_funcs is None else reward_funcs
    functions: list[RewardFunction] = list(given) if isinstance(given, list | tuple) else [given]
    for function in functions:
        if not callable(function) or isinstance(function, nn.Module) or inspect.iscoroutinefunction(function):
            raise TypeError(
                f"`reward_funcs` must be plain functions of prompts and completions, got {function!r:.100}. Wrap a "
                "reward model or a coroutine in a function."
            )
    return functions


def decode(sampler: Sampler, gopd_lambda: float, rows: Dataset, reward_funcs: Sequence[RewardFunction]) -> Decoded:
    """
    Samples completions from q_λ and scores them.

    Args:
        sampler ([`Sampler`]):
            Samples one completion for each row.
        gopd_lambda (`float`):
            λ.
        rows ([`~datasets.Dataset`]):
            The prompts with their other columns.
        reward_funcs (`Sequence[Callable]`):
            Reward functions, whose values are added.

    Raises:
        `ValueError`: If fewer than two completions have a reward, or a function returns a wrong number of them.
        `RuntimeError`: If a reward function raises.
    """
    completions = sampler.sample(sampler.models.teacher, f"Decoding λ = {gopd_lambda:g}", gopd_lambda)
    rewards = total_rewards(sampler.models.tokenizer, rows, completions, reward_funcs)
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        raise ValueError(
            f"At λ = {gopd_lambda:g} the reward functions returned a reward for {len(scored)} of {len(rewards)} "
            "completions, and a standard error needs at least 2. Check that the prompts have the columns which the "
            "functions read."
        )
    return Decoded(
        gopd_lambda=gopd_lambda,
        rewards=rewards,
        reward=mean(scored),
        standard_error=stdev(scored) / math.sqrt(len(scored)),
        length=mean(map(len, completions)),
        truncated=sampler.truncated(completions),
    )


def total_rewards(
    tokenizer: Any, rows: Dataset, completions: list[list[int]], reward_funcs: Sequence[RewardFunction]
) -> list[float | None]:
    """
    Returns the sum of the reward functions for each completion, `None` where all of them returned `None` or NaN. The
    functions are called with the arguments with which [`~trl.GRPOTrainer`] calls them.
    """
    prompts = list(rows["prompt"])
    texts: list[Any] = tokenizer.batch_decode(completions, skip_special_tokens=True)
    if not isinstance(prompts[0], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    kind = "strings" if isinstance(texts[0], str) else "messages"
    columns = {name: list(rows[name]) for name in rows.column_names if name not in ("prompt", "completion")}
    ignored = {"trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    totals: list[float | None] = [None] * len(texts)
    for function in reward_funcs:
        try:
            values = function(prompts=prompts, completions=texts, completion_ids=completions, **columns, **ignored)
        except Exception as error:  # a function of the user may raise anything
            raise RuntimeError(
                f"The reward function {name_of(function)!r} raised {type(error).__name__}: {error}. It was called "
                f"as GRPO calls it, with prompts, completions ({kind}, like the prompts), completion_ids "
                f"and the columns {list(columns)}."
            ) from error
        if len(values) != len(texts):
            raise ValueError(
                f"The reward function {name_of(function)!r} returned {len(values)} rewards for {len(texts)} "
                "completions. It must return one for each, which may be `None`."
            )
        for index, value in enumerate(values):
            if value is not None and not math.isnan(value):
                totals[index] = (totals[index] or 0.0) + float(value)
    return totals
