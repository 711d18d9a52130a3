"""Checks of a configuration: each refused value ends in one error that says what to use instead."""

import math
import re
import warnings
from typing import Any


ESTIMATORS = ("sampled", "stratified", "full")
# Aggregations whose token term is ratio × advantage, so that an advantage with a gradient passes through unchanged.
FULL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
SAMPLED_LOSS_TYPES = (*FULL_LOSS_TYPES, "cispo", "sapo", "vespo")
NONFINITE = ("raise", "skip")
EOS_MISMATCHES = ("raise", "map", "keep")
# Values with which the options of a sampler leave the distribution as it is
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0, None),
    "top_k": (0, -1, None),
    "min_p": (None, 0.0),
    "typical_p": (1.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "repetition_penalty": (1.0, None),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
    "no_repeat_ngram_size": (0, None),
    "do_sample": (True,),
    "num_beams": (1, None),
}


def check_objective(config: Any) -> None:
    # the chained comparisons also refuse NaN
    if not 0 <= config.gopd_lambda < math.inf:
        raise ValueError(f"`gopd_lambda` must be finite and >= 0, got {config.gopd_lambda}. Use 1.0 for plain OPD.")
    for name in ("gopd_lambda_by_teacher", "gopd_weight_by_teacher"):
        for teacher, value in (getattr(config, name) or {}).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must hold finite numbers >= 0, got {value!r} for {teacher!r}.")
    if config.offload_frozen_models and config.gopd_estimator != "sampled":
        raise ValueError(
            f"`offload_frozen_models` cannot be used with `gopd_estimator={config.gopd_estimator!r}`, which needs "
            "the heads of the frozen models in the loss. Use 'sampled'."
        )
    if config.gopd_estimator not in ESTIMATORS:
        raise ValueError(
            f"`gopd_estimator` must be one of {list(ESTIMATORS)}, got {config.gopd_estimator!r}. Use 'sampled' for "
            "the paper's."
        )
    if config.gopd_nonfinite not in NONFINITE:
        raise ValueError(f"`gopd_nonfinite` must be one of {list(NONFINITE)}, got {config.gopd_nonfinite!r}.")
    if config.overlong_teacher_prompts not in ("raise", "drop"):
        raise ValueError(
            f"`overlong_teacher_prompts` must be 'raise' or 'drop', got {config.overlong_teacher_prompts!r}."
        )
    if config.gopd_eos_mismatch not in EOS_MISMATCHES:
        raise ValueError(
            f"`gopd_eos_mismatch` must be one of {list(EOS_MISMATCHES)}, got {config.gopd_eos_mismatch!r}. Use "
            "'raise' to be told of a mismatch."
        )
    clip = config.gopd_extrapolation_clip
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"`gopd_extrapolation_clip` must be positive and finite, got {clip}. Use None for no clip.")
    for name, least, usual in (
        ("gopd_chunk_size", 1, 256),
        ("gopd_top_k", 1, 64),
        ("num_loss_tokens_to_skip", 0, 0),
        ("gopd_max_skipped_steps", 1, 10),
    ):
        if getattr(config, name) < least:
            raise ValueError(f"`{name}` must be at least {least}, got {getattr(config, name)}. Use {usual}.")
    if config.gopd_score_batch_tokens is not None and config.gopd_score_batch_tokens < 1:
        raise ValueError(
            f"`gopd_score_batch_tokens` must be at least 1, got {config.gopd_score_batch_tokens}. Use None for "
            "`per_device_train_batch_size` of the longest rows."
        )
    if config.shard_frozen_models and config.offload_frozen_models:
        raise ValueError(
            "`shard_frozen_models` and `offload_frozen_models` exclude each other: sharded models stay where they "
            "are. Use one of them, or `offload_param` in the DeepSpeed configuration."
        )
    if not 0 < config.served_teacher_timeout < math.inf:
        raise ValueError(
            f"`served_teacher_timeout` must be positive and finite, got {config.served_teacher_timeout}. Use 600."
        )
    if not 0 <= config.served_teacher_patience < math.inf:
        raise ValueError(
            f"`served_teacher_patience` must be finite and >= 0, got {config.served_teacher_patience}. Use 600, or 0 "
            "to ask every server once."
        )
    if config.served_teacher_ca_bundle is not None and not config.served_teacher_verify:
        raise ValueError(
            f"`served_teacher_ca_bundle={config.served_teacher_ca_bundle!r}` has no meaning with "
            "`served_teacher_verify=False`, which accepts every certificate. Use one of them."
        )
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", config.served_teacher_api_key_variable):
        # which is not shown: it may be the key itself
        raise ValueError(
            "`served_teacher_api_key_variable` must be the name of an environment variable, of letters, digits and "
            "underscores. Put the key itself into that variable."
        )
    if not 0 <= config.gopd_discount <= 1:
        raise ValueError(
            f"`gopd_discount` must be between 0 and 1, got {config.gopd_discount}. Use 0 for the paper's."
        )
    if config.gopd_deterministic_above is not None and not 0 < config.gopd_deterministic_above < 1:
        raise ValueError(
            f"`gopd_deterministic_above` must be between 0 and 1, got {config.gopd_deterministic_above}. Use None "
            "for no gate."
        )
    if config.gopd_estimator != "sampled":
        for name in ("gopd_deterministic_above", "gopd_needs_agreement", "logprob_cache_dir"):
            if getattr(config, name):
                raise ValueError(
                    f"`{name}={getattr(config, name)!r}` is about the sampled tokens alone and needs "
                    f"`gopd_estimator='sampled'`, got {config.gopd_estimator!r}."
                )
    if config.use_stored_completions and (config.num_generations != 1 or config.use_vllm):
        raise ValueError(
            "`use_stored_completions` has one completion a row and samples none: use `num_generations=1` and "
            f"`use_vllm=False`, got {config.num_generations} and {config.use_vllm}."
        )
    config.build_lambda_schedule()  # which refuses what does not fit together


def check_grpo_options(config: Any) -> None:
    refused = {
        "importance_sampling_level": (
            config.importance_sampling_level != "token",
            "advantages differ from token to token, so one ratio a sequence would mix them. Use 'token'.",
        ),
        "multi_objective_aggregation": (
            config.multi_objective_aggregation != "sum_then_normalize",
            "it normalises over the group of a prompt. Use 'sum_then_normalize'.",
        ),
        "sync_ref_model": (
            config.sync_ref_model,
            "the reference of G-OPD is fixed, since the reward is measured from it. Use False.",
        ),
        "loss_type": (
            config.loss_type not in SAMPLED_LOSS_TYPES,
            f"it must be one of {list(SAMPLED_LOSS_TYPES)}.",
        ),
    }
    if config.gopd_estimator != "sampled":
        no_action = f"the loss of `gopd_estimator={config.gopd_estimator!r}` is not one of the sampled token"
        refused |= {
            "loss_type": (config.loss_type not in FULL_LOSS_TYPES, f"{no_action}. Use {list(FULL_LOSS_TYPES)}."),
            "beta": (config.beta != 0, f"{no_action}; λ already sets the pull to the reference. Use 0."),
            "entropy_coef": (config.entropy_coef != 0, f"{no_action}. Use 0."),
            "use_adaptive_entropy": (config.use_adaptive_entropy, f"{no_action}. Use False."),
            "off_policy_mask_threshold": (config.off_policy_mask_threshold is not None, f"{no_action}. Use None."),
        }
    if config.gopd_estimator == "stratified" or config.gopd_estimator == "full" and config.gopd_discount:
        discounted = f" and `gopd_discount={config.gopd_discount}`" if config.gopd_estimator == "full" else ""
        reused = f"a rollout is used for one step with `gopd_estimator={config.gopd_estimator!r}`{discounted}"
        other = "`gopd_discount=0`" if discounted else "'full'"
        refused |= {
            "num_iterations": (config.num_iterations != 1, f"{reused}. Use 1, or {other}."),
            "steps_per_generation": (
                config.steps_per_generation != config.gradient_accumulation_steps,
                f"{reused}. Use `gradient_accumulation_steps={config.gradient_accumulation_steps}`, or {other}.",
            ),
        }
    for name, (is_refused, reason) in refused.items():
        if is_refused:
            raise ValueError(f"`{name}={getattr(config, name)!r}` has no meaning in G-OPD: {reason}")
    given = {name: getattr(config, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    if isinstance(config.generation_kwargs, dict):
        given |= config.generation_kwargs
    neutral = {**NEUTRAL_SAMPLING, "temperature": (config.temperature,)}
    changed = {name: value for name, value in given.items() if value not in neutral.get(name, (value,))}
    if changed:
        warnings.warn(
            f"Sampling with {changed} draws from another distribution than the student that is scored, which "
            f"biases the estimate of the gradient. Use { {name: neutral[name][0] for name in changed} }.",
            UserWarning,
            stacklevel=4,  # past this method, `__post_init__` and the generated `__init__`
        )
