"""Configuration of [`GOPDTrainer`]."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ._trl import allow_one_generation
from .schedules import KINDS, BackOff, LambdaSchedule


ESTIMATORS = ("sampled", "stratified", "full")
# Aggregations whose token term is ratio × advantage, so that an advantage with a gradient passes through unchanged.
FULL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
SAMPLED_LOSS_TYPES = (*FULL_LOSS_TYPES, "cispo", "sapo", "vespo")
NONFINITE = ("raise", "skip")
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


@dataclass
class GOPDConfig(GRPOConfig):  # type: ignore[misc]
    # docstyle-ignore
    r"""
    Configuration class for the [`GOPDTrainer`].

    This class includes only the parameters that are specific to G-OPD. For the others see [`~trl.GRPOConfig`] and
    [`~transformers.TrainingArguments`].

    > [!NOTE]
    > These defaults differ from [`~trl.GRPOConfig`] and follow the recipe of the paper and its released scripts:
    > - `num_generations`: `1` instead of `8`. Many prompts with one completion each; nothing is compared in a group.
    > - `learning_rate`: `1e-5` instead of `1e-6`; `lr_scheduler_type`: `"constant"`; `weight_decay`: `0.01`.
    > - `loss_type`: `"grpo"` instead of `"dapo"`. The released configuration says token mean, but takes it within
    >   micro-batches of one sequence, so what ran is the mean over sequences of each sequence's token mean.
    > - `scale_rewards`: `"none"`. There is no reward to scale unless `reward_funcs` are given.
    > - `vllm_importance_sampling_mode`: `"token_truncate"` with `vllm_importance_sampling_clip_max=5.0`.

    Parameters:
        > Parameters that control the objective

        gopd_lambda (`float`, *optional*, defaults to `1.25`):
            Reward scale λ of [G-OPD](https://huggingface.co/papers/2602.12125), eq. 11. `0` keeps the reference, `1`
            is plain on-policy distillation and loads no reference, above `1` extrapolates past the teacher. The paper
            uses `1.25` and reports `1.5` as unstable.
        gopd_estimator (`str`, *optional*, defaults to `"sampled"`):
            `"sampled"` weighs the log-probability of the sampled token by its advantage, as the paper does. `"full"`
            takes the expectation of the same gradient over the vocabulary: no noise from the sampled token, for the
            price of the three models' logits in the loss. It needs no importance weight, and takes no `reward_funcs`.
            `"stratified"` takes it over the student's `gopd_top_k` likeliest tokens and corrects with the sampled one:
            unbiased too, in between in noise, and k + 1 numbers of the frozen models a token. If the teachers are
            served, the tokens are those that the server finds likeliest. It takes no `reward_funcs` and no rollout
            twice.
        gopd_top_k (`int`, *optional*, defaults to `64`):
            k of `"stratified"`. A vLLM server tells at most its `--max-logprobs`, 20 by default.
        gopd_extrapolation_clip (`float`, *optional*):
            Bound c on |log π* − log π_ref| in the extrapolation term, which is unbounded otherwise. λ = 1 is
            untouched by it. Not in the paper.
        gopd_chunk_size (`int`, *optional*, defaults to `256`):
            Tokens whose logits exist at a time when frozen models are scored and in the loss of other estimators than
            `"sampled"`.
        num_loss_tokens_to_skip (`int`, *optional*, defaults to `0`):
            Tokens at the beginning of each completion that are not trained on. Not in the paper.
        gopd_discount (`float`, *optional*, defaults to `0.0`):
            γ between 0 and 1 with which a token is also credited with the advantages of those after it. `0` is the
            paper's. With `1` the gradient is that of the whole sequence, and much noisier. Less so with the estimators
            `"full"` and `"stratified"`, which credit expected advantages and not sampled ones; rollouts are then used
            for one step.

        > Parameters that control how λ varies (none of them in the paper)

        gopd_lambda_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`; `"linear"` from 1 to λ in `gopd_lambda_warmup_steps`; or `"adaptive"`, which extrapolates the
            less, the nearer the student is to its teacher.
        gopd_lambda_warmup_steps (`int`, *optional*, defaults to `0`):
            Steps of `"linear"`.
        gopd_lambda_gain (`float`, *optional*, defaults to `0.25`):
            Gain a of `"adaptive"`: λ = 1 + a·RMS(log π* − log π)/RMS(log π* − log π_ref), at most the λ asked for.
        gopd_back_off (`dict[str, float]` or `str`, *optional*):
            Limits on completions, beyond which λ moves towards 1: the fields of [`~gopd.schedules.BackOff`], such as
            `{"max_truncated_share": 0.3}`.
        gopd_deterministic_above (`float`, *optional*):
            Probability under the teacher above which a sampled token has λ = 1. Only with `gopd_estimator="sampled"`,
            as the next one.
        gopd_needs_agreement (`bool`, *optional*, defaults to `False`):
            Whether a token has λ = 1 unless the teacher prefers it to the student and to the reference alike, or
            neither.

        gopd_lambda_by_teacher (`dict[str, float]` or `str`, *optional*):
            λ of the rows of some of several teachers, by teacher id. The others have `gopd_lambda`.
        gopd_weight_by_teacher (`dict[str, float]` or `str`, *optional*):
            Factor of the loss of some teachers' rows, by teacher id. The others have 1.
        lambda_column (`str`, *optional*, defaults to `"lambda"`):
            Column of the data set that holds a row's own λ. It goes before everything else.

        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*):
            Teacher, when none is passed to the trainer: a name, a path, or the URL of a vLLM server, which can be
            used with `gopd_estimator="sampled"`.
        teacher_models (`dict[str, str]` or `str`, *optional*):
            Several teachers by teacher id, when none is passed to the trainer.
        teacher_id_column (`str`, *optional*, defaults to `"teacher_id"`):
            Column of the data set that says which of several teachers scores a row.
        teacher_prompt_column (`str`, *optional*, defaults to `"teacher_prompt"`):
            Column of the data set with the prompt, a string or messages, that the teacher reads instead of `prompt`
            before it scores the student's completion: the problem with its solution, for example. The reference reads
            `prompt`.
        overlong_teacher_prompts (`str`, *optional*, defaults to `"raise"`):
            What becomes of a row whose teacher's prompt and completion exceed the teacher's context: `"raise"`, or
            `"drop"` to leave it out of the loss. Nothing is ever truncated.
        logprob_cache_dir (`str`, *optional*):
            Folder for the log-probabilities of frozen models, one SQLite file each. A completion that one of them has
            scored after the same prompt is not scored again, in this run or another; a file can stand for its model.
            Only with `gopd_estimator="sampled"`.
        use_stored_completions (`bool`, *optional*, defaults to `False`):
            Whether completions are read from a column `completion_ids` instead of being sampled. Where there is a
            column `sampling_per_token_logps`, their tokens are weighed by what the student and their sampler gave
            them, at most by `vllm_importance_sampling_clip_max`. Needs `num_generations=1`.
        offload_frozen_models (`bool`, *optional*, defaults to `False`):
            Whether teachers and references wait in CPU memory, and are on the device only while they score. Not with
            other estimators than `"sampled"`, which need their heads in the loss.
        served_teacher_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds without an answer after which a request to the server of a teacher or reference has failed.
        teacher_model_revision (`str`, *optional*):
            Revision of the teacher on the Hub.
        teacher_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of `from_pretrained` for a teacher given by name. `dtype`, a string or a `torch.dtype`,
            defaults to the checkpoint's own.

        > Parameters that control the reference

        ref_model_name_or_path (`str`, *optional*):
            Reference π_ref, when none is passed to the trainer. Give the model that the teacher was trained from for
            reward correction. By default it is the student as it is when training starts.
        ref_models (`dict[str, str]` or `str`, *optional*):
            A reference for each of several teachers, by teacher id, when none is passed to the trainer.
        ref_model_revision (`str`, *optional*):
            Revision of the reference on the Hub.
        ref_model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments of `from_pretrained` for a reference given by name, as for the teacher.

        > Parameters that control what is done about numbers that are not finite

        gopd_nonfinite (`str`, *optional*, defaults to `"raise"`):
            What is done when a frozen model, the student, a task reward or the norm of the gradient gives NaN or an
            infinite number: `"raise"` stops the run with the row and the model at fault, `"skip"` leaves the optimizer
            step out on all ranks and logs `gopd/skipped_steps`. Weights, optimizer and learning rate are then as if
            there had been no such step. Not with DeepSpeed, which takes the step inside the backward pass.
        gopd_max_skipped_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps left out in a row with which `"skip"` stops the run. Steps that a float16 gradient scaler
            leaves out by itself are not counted.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + [
        "gopd_back_off",
        "gopd_lambda_by_teacher",
        "gopd_weight_by_teacher",
        "teacher_models",
        "teacher_model_init_kwargs",
        "ref_models",
        "ref_model_init_kwargs",
    ]

    # Defaults that differ from GRPOConfig
    num_generations: int | None = field(
        default=1, metadata={"help": "Completions a prompt. More than one is useful with `reward_funcs` only."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The scheduler type to use."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    loss_type: str = field(
        default="grpo",
        metadata={"help": "How token losses are averaged. 'grpo' is the mean over sequences of their token means."},
    )
    scale_rewards: str = field(
        default="none", metadata={"help": "How the advantages of `reward_funcs`, if there are any, are scaled."}
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={"help": "How the mismatch between vLLM and the training model is corrected."},
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=5.0, metadata={"help": "Upper bound of the importance weight."}
    )

    # Parameters that control the objective
    gopd_lambda: float = field(
        default=1.25,
        metadata={"help": "Reward scale. 0 keeps the reference, 1 is plain OPD, more extrapolates past the teacher."},
    )
    gopd_estimator: str = field(
        default="sampled",
        metadata={
            "help": "'sampled' scores the sampled token (the paper), 'full' the whole vocabulary (the same gradient "
            "in expectation, without the noise of the sampled token), 'stratified' the likeliest tokens and the "
            "sampled one.",
            "choices": list(ESTIMATORS),
        },
    )
    gopd_extrapolation_clip: float | None = field(
        default=None, metadata={"help": "Bound on |log teacher - log reference| in the extrapolation term."}
    )
    gopd_top_k: int = field(default=64, metadata={"help": "Likeliest tokens that 'stratified' scores."})
    gopd_chunk_size: int = field(default=256, metadata={"help": "Tokens whose logits exist at a time."})
    num_loss_tokens_to_skip: int = field(
        default=0, metadata={"help": "Tokens at the beginning of each completion that are not trained on."}
    )
    gopd_discount: float = field(
        default=0.0,
        metadata={"help": "Discount with which a token is credited with later advantages; 0 is the paper's."},
    )

    # Parameters that control how λ varies
    gopd_lambda_schedule: str = field(
        default="constant",
        metadata={"help": "How lambda varies with the step.", "choices": list(KINDS)},
    )
    gopd_lambda_warmup_steps: int = field(default=0, metadata={"help": "Steps from 1 to lambda of 'linear'."})
    gopd_lambda_gain: float = field(default=0.25, metadata={"help": "Gain of 'adaptive'."})
    gopd_back_off: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Limits on completions beyond which lambda moves towards 1."}
    )
    gopd_deterministic_above: float | None = field(
        default=None, metadata={"help": "Teacher's probability above which a sampled token has lambda 1."}
    )
    gopd_needs_agreement: bool = field(
        default=False, metadata={"help": "Whether lambda is 1 where its two terms have different signs."}
    )

    # Parameters of rows
    gopd_lambda_by_teacher: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Reward scale of the rows of some teachers, by teacher id."}
    )
    gopd_weight_by_teacher: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Factor of the loss of some teachers' rows, by teacher id."}
    )
    lambda_column: str = field(default="lambda", metadata={"help": "Column of the data set with a row's own lambda."})

    # Parameters that control the teacher
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Name or path of the teacher."})
    teacher_models: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Names or paths of several teachers, by teacher id."}
    )
    teacher_id_column: str = field(
        default="teacher_id", metadata={"help": "Column of the data set that says which teacher scores a row."}
    )
    teacher_prompt_column: str = field(
        default="teacher_prompt",
        metadata={"help": "Column of the data set with the prompt that the teacher reads instead of the student's."},
    )
    overlong_teacher_prompts: str = field(
        default="raise",
        metadata={
            "help": "What becomes of a row whose teacher's prompt and completion exceed the teacher's context.",
            "choices": ["raise", "drop"],
        },
    )
    logprob_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder where log-probabilities of frozen models are kept."}
    )
    use_stored_completions: bool = field(
        default=False, metadata={"help": "Whether completions are read from a column instead of being sampled."}
    )
    offload_frozen_models: bool = field(
        default=False, metadata={"help": "Whether frozen models wait in CPU memory while they do not score."}
    )
    served_teacher_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds without an answer after which a request to a served model has failed."},
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Revision of the teacher."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the teacher."}
    )

    # Parameters that control the reference
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Name or path of the reference, e.g. the model that the teacher was trained from."},
    )
    ref_models: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Names or paths of a reference for each of several teachers, by teacher id."}
    )
    ref_model_revision: str | None = field(default=None, metadata={"help": "Revision of the reference."})
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for the reference."}
    )

    # Parameters that control what is done about numbers that are not finite
    gopd_nonfinite: str = field(
        default="raise",
        metadata={
            "help": "What is done about NaN and infinite numbers: stop the run, or leave the optimizer step out.",
            "choices": list(NONFINITE),
        },
    )
    gopd_max_skipped_steps: int = field(
        default=10, metadata={"help": "Optimizer steps left out in a row with which 'skip' stops the run."}
    )

    def __post_init__(self) -> None:
        if self.num_generations is None or self.num_generations < 1:
            raise ValueError(f"`num_generations` must be at least 1, got {self.num_generations}. Use 1.")
        if self.num_generations == 1:
            with allow_one_generation(self):
                super().__post_init__()
        else:
            super().__post_init__()
        self._check_objective()
        self._check_grpo_options()

    def _check_objective(self) -> None:
        # the chained comparisons also refuse NaN
        if not 0 <= self.gopd_lambda < math.inf:
            raise ValueError(f"`gopd_lambda` must be finite and >= 0, got {self.gopd_lambda}. Use 1.0 for plain OPD.")
        for name in ("gopd_lambda_by_teacher", "gopd_weight_by_teacher"):
            for teacher, value in (getattr(self, name) or {}).items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                    raise ValueError(f"`{name}` must hold finite numbers >= 0, got {value!r} for {teacher!r}.")
        if self.offload_frozen_models and self.gopd_estimator != "sampled":
            raise ValueError(
                f"`offload_frozen_models` cannot be used with `gopd_estimator={self.gopd_estimator!r}`, which needs "
                "the heads of the frozen models in the loss. Use 'sampled'."
            )
        if self.gopd_estimator not in ESTIMATORS:
            raise ValueError(
                f"`gopd_estimator` must be one of {list(ESTIMATORS)}, got {self.gopd_estimator!r}. Use 'sampled' for "
                "the paper's."
            )
        if self.gopd_nonfinite not in NONFINITE:
            raise ValueError(f"`gopd_nonfinite` must be one of {list(NONFINITE)}, got {self.gopd_nonfinite!r}.")
        if self.overlong_teacher_prompts not in ("raise", "drop"):
            raise ValueError(
                f"`overlong_teacher_prompts` must be 'raise' or 'drop', got {self.overlong_teacher_prompts!r}."
            )
        clip = self.gopd_extrapolation_clip
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(
                f"`gopd_extrapolation_clip` must be positive and finite, got {clip}. Use None for no clip."
            )
        for name, least, usual in (
            ("gopd_chunk_size", 1, 256),
            ("gopd_top_k", 1, 64),
            ("num_loss_tokens_to_skip", 0, 0),
            ("gopd_max_skipped_steps", 1, 10),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}. Use {usual}.")
        if not 0 < self.served_teacher_timeout < math.inf:
            raise ValueError(
                f"`served_teacher_timeout` must be positive and finite, got {self.served_teacher_timeout}. Use 600."
            )
        if not 0 <= self.gopd_discount <= 1:
            raise ValueError(
                f"`gopd_discount` must be between 0 and 1, got {self.gopd_discount}. Use 0 for the paper's."
            )
        if self.gopd_deterministic_above is not None and not 0 < self.gopd_deterministic_above < 1:
            raise ValueError(
                f"`gopd_deterministic_above` must be between 0 and 1, got {self.gopd_deterministic_above}. Use None "
                "for no gate."
            )
        if self.gopd_estimator != "sampled":
            for name in ("gopd_deterministic_above", "gopd_needs_agreement", "logprob_cache_dir"):
                if getattr(self, name):
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` is about the sampled tokens alone and needs "
                        f"`gopd_estimator='sampled'`, got {self.gopd_estimator!r}."
                    )
        if self.use_stored_completions and (self.num_generations != 1 or self.use_vllm):
            raise ValueError(
                "`use_stored_completions` has one completion a row and samples none: use `num_generations=1` and "
                f"`use_vllm=False`, got {self.num_generations} and {self.use_vllm}."
            )
        self.build_lambda_schedule()  # which refuses what does not fit together

    def build_lambda_schedule(self) -> LambdaSchedule:
        """The schedule of λ that the fields describe."""
        back_off: Any = self.gopd_back_off  # text has been parsed by now
        try:
            return LambdaSchedule(
                self.gopd_lambda_schedule,
                warmup_steps=self.gopd_lambda_warmup_steps,
                gain=self.gopd_lambda_gain,
                back_off=None if back_off is None else BackOff(**back_off),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"The schedule of λ (`gopd_lambda_schedule`, `gopd_back_off`): {error}") from error

    def _check_grpo_options(self) -> None:
        refused = {
            "importance_sampling_level": (
                self.importance_sampling_level != "token",
                "advantages differ from token to token, so one ratio a sequence would mix them. Use 'token'.",
            ),
            "multi_objective_aggregation": (
                self.multi_objective_aggregation != "sum_then_normalize",
                "it normalises over the group of a prompt. Use 'sum_then_normalize'.",
            ),
            "sync_ref_model": (
                self.sync_ref_model,
                "the reference of G-OPD is fixed, since the reward is measured from it. Use False.",
            ),
            "loss_type": (
                self.loss_type not in SAMPLED_LOSS_TYPES,
                f"it must be one of {list(SAMPLED_LOSS_TYPES)}.",
            ),
        }
        if self.gopd_estimator != "sampled":
            no_action = f"the loss of `gopd_estimator={self.gopd_estimator!r}` is not one of the sampled token"
            refused |= {
                "loss_type": (self.loss_type not in FULL_LOSS_TYPES, f"{no_action}. Use {list(FULL_LOSS_TYPES)}."),
                "beta": (self.beta != 0, f"{no_action}; λ already sets the pull to the reference. Use 0."),
                "entropy_coef": (self.entropy_coef != 0, f"{no_action}. Use 0."),
                "use_adaptive_entropy": (self.use_adaptive_entropy, f"{no_action}. Use False."),
                "off_policy_mask_threshold": (self.off_policy_mask_threshold is not None, f"{no_action}. Use None."),
            }
        if self.gopd_estimator == "stratified" or self.gopd_estimator == "full" and self.gopd_discount:
            discounted = f" and `gopd_discount={self.gopd_discount}`" if self.gopd_estimator == "full" else ""
            reused = f"a rollout is used for one step with `gopd_estimator={self.gopd_estimator!r}`{discounted}"
            other = "`gopd_discount=0`" if discounted else "'full'"
            refused |= {
                "num_iterations": (self.num_iterations != 1, f"{reused}. Use 1, or {other}."),
                "steps_per_generation": (
                    self.steps_per_generation != self.gradient_accumulation_steps,
                    f"{reused}. Use `gradient_accumulation_steps={self.gradient_accumulation_steps}`, or {other}.",
                ),
            }
        for name, (is_refused, reason) in refused.items():
            if is_refused:
                raise ValueError(f"`{name}={getattr(self, name)!r}` has no meaning in G-OPD: {reason}")
        given = {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        if isinstance(self.generation_kwargs, dict):
            given |= self.generation_kwargs
        neutral = {**NEUTRAL_SAMPLING, "temperature": (self.temperature,)}
        changed = {name: value for name, value in given.items() if value not in neutral.get(name, (value,))}
        if changed:
            warnings.warn(
                f"Sampling with {changed} draws from another distribution than the student that is scored, which "
                f"biases the estimate of the gradient. Use { {name: neutral[name][0] for name in changed} }.",
                UserWarning,
                stacklevel=4,  # past this method, `__post_init__` and the generated `__init__`
            )
