"""Configuration of [`GOPDTrainer`]."""

import copy
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ._trl import allow_one_generation
from .config_checks import EOS_MISMATCHES, ESTIMATORS, NONFINITE, check_grpo_options, check_objective
from .frozen.address import redacted
from .schedules import KINDS, BackOff, LambdaSchedule


# Options that may hold the addresses of servers
ADDRESS_FIELDS = ("teacher_model_name_or_path", "teacher_models", "ref_model_name_or_path", "ref_models")


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
        gopd_score_batch_tokens (`int`, *optional*):
            Positions, padding included, of one forward of a frozen model. Rows of like length are scored together
            until it is full; a longer row is scored alone. By default `per_device_train_batch_size` times the longest
            row of the batch, which needs the memory of that many of these. A larger number gathers a sharded model
            less often: it is called as seldom as the rows of all ranks allow.
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
            What becomes of a row whose prompt and completion exceed the context of its teacher or of its reference:
            `"raise"`, or `"drop"` to leave it out of the loss. Nothing is ever truncated.
        gopd_eos_mismatch (`str`, *optional*, defaults to `"raise"`):
            What becomes of a teacher or reference that ends its answers with another token than the student, such as
            a base model beside a chat model. `"raise"` refuses it if the two have no end token in common, and warns if
            only the first ones differ. `"map"` lets it read and score the student's end token as its own. `"keep"`
            scores the student's end token as it is: if the model never ends with it, the student learns not to end.
        logprob_cache_dir (`str`, *optional*):
            Folder for the log-probabilities of frozen models, one SQLite file each. A completion that one of them has
            scored after the same prompt is not scored again, in this run or another; a file can stand for its model.
            All processes of one machine may share it. Network file systems such as NFS and Lustre are refused, since
            their locks are unreliable: give each node a folder on a disk of its own. Only with
            `gopd_estimator="sampled"`.
        use_stored_completions (`bool`, *optional*, defaults to `False`):
            Whether completions are read from a column `completion_ids` instead of being sampled. Where there is a
            column `sampling_per_token_logps`, their tokens are weighed by what the student and their sampler gave
            them, at most by `vllm_importance_sampling_clip_max`. Needs `num_generations=1`.
        offload_frozen_models (`bool`, *optional*, defaults to `False`):
            Whether teachers and references wait in CPU memory, and are on the device only while they score. Not with
            other estimators than `"sampled"`, which need their heads in the loss.
        shard_frozen_models (`bool`, *optional*, defaults to `False`):
            Whether DeepSpeed shards teachers and references by ZeRO-3 where it trains the student with another stage,
            such as ZeRO-2. With ZeRO-3 and FSDP they are always sharded as the student is.
        served_teacher_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds within which the server of a teacher or reference has to have answered a request as a whole.
        served_teacher_patience (`float`, *optional*, defaults to `600.0`):
            Seconds for which a request is repeated while the server cannot be reached or answers with HTTP 429, 500,
            502, 503 or 504, so that it may be restarted during training. `0` repeats none. Before training it is
            waited for at most 20 seconds, since the address may be wrong.
        served_teacher_api_key_variable (`str`, *optional*, defaults to `"GOPD_SERVED_API_KEY"`):
            Name of the environment variable with the key of the servers, such as that of `vllm serve --api-key`. It
            is sent to each server whose address has no user, if it is set, and is stored nowhere.
        served_teacher_ca_bundle (`str`, *optional*):
            File or folder with the certificates of those who may sign that of a server. By default the usual ones.
        served_teacher_client_certificate (`str`, *optional*):
            PEM file with the certificate and the unencrypted key by which servers know this client.
        served_teacher_verify (`bool`, *optional*, defaults to `True`):
            Whether the certificates of servers are checked.
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
    gopd_score_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Positions of one forward of a frozen model; by default `per_device_train_batch_size` of the "
            "longest rows."
        },
    )
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
            "help": "What becomes of a row that exceeds the context of its teacher or of its reference.",
            "choices": ["raise", "drop"],
        },
    )
    gopd_eos_mismatch: str = field(
        default="raise",
        metadata={
            "help": "What becomes of a teacher or reference that ends its answers with another token than the "
            "student: 'raise', 'map' to score the student's end token as its own, or 'keep' to score it as it is.",
            "choices": list(EOS_MISMATCHES),
        },
    )
    logprob_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder where log-probabilities of frozen models are kept. Not on a network file system: each "
            "node needs a folder on a disk of its own."
        },
    )
    use_stored_completions: bool = field(
        default=False, metadata={"help": "Whether completions are read from a column instead of being sampled."}
    )
    offload_frozen_models: bool = field(
        default=False, metadata={"help": "Whether frozen models wait in CPU memory while they do not score."}
    )
    shard_frozen_models: bool = field(
        default=False,
        metadata={"help": "Whether frozen models are sharded by ZeRO-3 where the student is not."},
    )
    served_teacher_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds within which a served model has to have answered a request as a whole."},
    )
    served_teacher_patience: float = field(
        default=600.0,
        metadata={"help": "Seconds for which a request is repeated while a server is away, overloaded or failing."},
    )
    served_teacher_api_key_variable: str = field(
        default="GOPD_SERVED_API_KEY",
        metadata={"help": "Name of the environment variable with the API key of the servers."},
    )
    served_teacher_ca_bundle: str | None = field(
        default=None, metadata={"help": "File or folder with the certificates that may sign those of servers."}
    )
    served_teacher_client_certificate: str | None = field(
        default=None, metadata={"help": "PEM file with the certificate and key by which servers know this client."}
    )
    served_teacher_verify: bool = field(
        default=True, metadata={"help": "Whether the certificates of servers are checked."}
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
        check_objective(self)
        check_grpo_options(self)

    # Addresses of servers may hold secrets, which no text and no file made of a configuration may have. A copy that
    # stays in memory is complete.

    def to_dict(self) -> dict[str, Any]:
        """As in [`~transformers.TrainingArguments`], without the secrets of addresses."""
        return self._without_secrets(super().to_dict())

    def __str__(self) -> str:
        shown = copy.copy(self)
        shown.__dict__ = self._without_secrets(self.__dict__)
        return str(super(GOPDConfig, shown).__str__())

    __repr__ = __str__

    def __getstate__(self) -> dict[str, Any]:
        return self._without_secrets(self.__dict__)

    def __copy__(self) -> "GOPDConfig":
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "GOPDConfig":
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    @staticmethod
    def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
        return {name: redacted(value) if name in ADDRESS_FIELDS else value for name, value in values.items()}

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
