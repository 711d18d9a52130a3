"""
Predicting what λ does, before any training.

The target of G-OPD at each state is q_λ = softmax(λ·z* + (1 − λ)·z_ref), eq. 12 of
[G-OPD](https://huggingface.co/papers/2602.12125), which depends on the logits of the teacher and the reference alone.
`preflight` samples completions, measures at their states how q_λ differs from the teacher, and can also sample from
q_λ itself and score the completions with reward functions.

Training is not simulated: the states are those of the initial models, and a student need not reach q_λ.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

import trl_gopd

from .findings import Decoded
from .measure import DETERMINISTIC, Measurement, describe_log_ratios, mean_effects, measure
from .models import GivenModel, Models, is_student_the_teacher, load_models, load_tokenizer, name_of, restored
from .options import LAMBDAS, Options
from .prompts import choose, load_prompts, tokenize
from .recommendation import MAX_DETERMINISTIC_FLIPS, MAX_OFF_TEACHER_MASS, recommend
from .report import PreflightReport
from .rewards import RewardFunction, check_rewards, decode
from .sampling import Sampler


def preflight(
    *,
    teacher_model: GivenModel,
    prompts: Any,
    model: GivenModel | None = None,
    ref_model: GivenModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    sample_from: str = "teacher",
    num_samples: int = 100,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    chunk_size: int = 256,
    max_off_teacher_mass: float = MAX_OFF_TEACHER_MASS,
    max_deterministic_flips: float = MAX_DETERMINISTIC_FLIPS,
    model_init_kwargs: dict[str, Any] | None = None,
) -> PreflightReport:
    """
    Measures the target of each λ and recommends one of them.

    Without reward functions, the values of λ are examined in increasing order from 1, and the last value before the
    first one that exceeds a limit is recommended. With reward functions, completions are sampled from q_λ for each λ,
    and the λ with the best mean reward is recommended. If values nearer to 1 are within one standard error of it, the
    nearest of them is recommended; the standard error is that of the differences between completions of the same
    prompt. λ = 1 is always measured.

    Models that are given as instances stay on their devices and are left as they were. Only one process may run this.

    Args:
        teacher_model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The teacher T.
        prompts (`str` or `os.PathLike` or [`~datasets.Dataset`] or `list`):
            Anything that [`load_prompts`] accepts. Columns other than `prompt` are passed to the reward functions.
        model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The student before training. Defaults to the reference.
        ref_model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The reference R. Defaults to the student.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to that of the student.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions as [`~trl.GRPOTrainer`] accepts them, except asynchronous ones and models. Their rewards
            are added.
        lambdas (`Sequence[float]`, *optional*, defaults to `(0.5, 1, 1.1, 1.25, 1.5, 2)`):
            Values of λ to measure.
        sample_from (`str`, *optional*, defaults to `"teacher"`):
            The model that samples the completions at whose states λ is measured: `"teacher"` or `"student"`.
        num_samples (`int`, *optional*, defaults to `100`):
            Number of completions that are sampled, and again for each λ if there are reward functions. Prompts are
            drawn without repetition; if there are fewer, each is used about equally often.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of a completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of all models, in sampling and in scoring, as in training.
        seed (`int`, *optional*, defaults to `0`):
            Seed that selects prompts and samples completions. The global random state is left as it was.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows in one forward pass.
        chunk_size (`int`, *optional*, defaults to `256`):
            Number of tokens whose logits are held in memory at once.
        max_off_teacher_mass (`float`, *optional*, defaults to `0.01`):
            Limit on the probability that q_λ, beyond the teacher itself, puts on ids which the teacher finds unlikely.
        max_deterministic_flips (`float`, *optional*, defaults to `0.001`):
            Limit on the fraction of the teacher's near-certain choices that q_λ changes.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained` for models that are given by name. By default the dtype is that of
            the checkpoint, and the device is the GPU if there is one.

    Returns:
        [`PreflightReport`].

    Raises:
        `ValueError`, `TypeError`: Before anything is sampled, if an option, the prompts or the models cannot be used.
        `RuntimeError`: If a reward function raises.
    """
    start = time.perf_counter()
    options = Options(
        lambdas=tuple(lambdas),
        sample_from=sample_from,
        num_samples=num_samples,
        max_completion_length=max_completion_length,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        chunk_size=chunk_size,
        max_off_teacher_mass=max_off_teacher_mass,
        max_deterministic_flips=max_deterministic_flips,
    )
    rewards = check_rewards(reward_funcs)
    given = _roles(teacher_model, model, ref_model)
    rows = choose(load_prompts(prompts), num_samples, seed)
    tokenizer = load_tokenizer(given["model"]) if processing_class is None else processing_class
    prompt_ids = tokenize(tokenizer, rows)

    # The student is needed only if it samples.
    needed = {role: each for role, each in given.items() if role != "model" or sample_from == "student"}
    loaded = load_models(needed, model_init_kwargs)
    with restored(loaded.values()), torch.no_grad():
        models = Models.of(loaded, tokenizer, options)
        models.check_context(prompt_ids, max_completion_length)
        sampler = Sampler(models, prompt_ids, options)
        completions = sampler.sample(models.sampler, "Sampling")
        measurement = measure(models, prompt_ids, completions, options)
        decoded = [decode(sampler, gopd_lambda, rows, rewards) for gopd_lambda in options.grid if rewards]

    return _report(
        settings=_settings(given, options, rewards),
        sampler=sampler,
        completions=completions,
        measurement=measurement,
        decoded=decoded,
        # Nothing is known about a student that was not given. The reference stands in for it.
        same_as_student=None if model is None else _same_as_student(given, loaded),
        seconds=time.perf_counter() - start,
    )


def _report(
    *,
    settings: dict[str, Any],
    sampler: Sampler,
    completions: list[list[int]],
    measurement: Measurement,
    decoded: list[Decoded],
    same_as_student: Literal["teacher", "reference"] | None,
    seconds: float,
) -> PreflightReport:
    options = sampler.options
    effects = mean_effects(measurement, options.grid)
    recommended, reasons = recommend(
        effects,
        decoded,
        max_off_teacher_mass=options.max_off_teacher_mass,
        max_deterministic_flips=options.max_deterministic_flips,
        same_as_student=same_as_student,
    )
    is_end = torch.isin(measurement.labels, torch.tensor(sampler.models.eos_ids, dtype=torch.int64))
    return PreflightReport(
        settings=settings,
        completions=len(completions),
        tokens=len(measurement.labels),
        length=len(measurement.labels) / len(completions),
        truncated=sampler.truncated(completions),
        deterministic=float((measurement.top > DETERMINISTIC).double().mean()),
        log_ratios=describe_log_ratios(measurement.log_ratios),
        eos_log_ratios=describe_log_ratios(measurement.log_ratios[is_end]) if is_end.any() else None,
        effects=effects,
        decoded=decoded,
        recommended_lambda=recommended,
        reasons=reasons,
        seconds=seconds,
    )


def _roles(
    teacher_model: GivenModel, model: GivenModel | None, ref_model: GivenModel | None
) -> dict[str, str | nn.Module]:
    """Returns what was given for each role, where student and reference stand in for each other."""
    student, reference = (ref_model if model is None else model), (model if ref_model is None else ref_model)
    if student is None or reference is None:
        raise ValueError("`model` and `ref_model` are both None, and λ needs a reference. Pass one of them.")
    given = {"model": student, "teacher_model": teacher_model, "ref_model": reference}
    return {role: os.fspath(each) if isinstance(each, os.PathLike) else each for role, each in given.items()}


def _same_as_student(
    given: Mapping[str, str | nn.Module], loaded: Mapping[str, nn.Module]
) -> Literal["teacher", "reference"] | None:
    if is_student_the_teacher(given, loaded):
        return "teacher"
    return "reference" if given["model"] == given["ref_model"] else None


def _settings(
    given: Mapping[str, str | nn.Module], options: Options, rewards: Sequence[RewardFunction]
) -> dict[str, Any]:
    return {
        **{role: name_of(each) for role, each in given.items()},
        "lambdas": options.grid,
        "sample_from": options.sample_from,
        "num_samples": options.num_samples,
        "max_completion_length": options.max_completion_length,
        "temperature": options.temperature,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "reward_funcs": [name_of(each) for each in rewards],
        "max_off_teacher_mass": options.max_off_teacher_mass,
        "max_deterministic_flips": options.max_deterministic_flips,
        "versions": {each.__name__: str(each.__version__) for each in (trl_gopd, torch, transformers)},
    }
