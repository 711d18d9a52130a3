"""[`GOPDTrainer`]: TRL's hooks, through which estimators and frozen models act on [`~trl.GRPOTrainer`]."""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOTrainer

from . import batch as keys
from ._trl import (
    ACCEPTED,
    check_device,
    disable_gradient_checkpointing,
    get_config_model_id,
    tools_of_rows,
    without_reference_adapter,
)
from .assembly import assemble
from .batch import Batch, Scores
from .checkpoints import check_whole
from .checks import check_arguments, check_datasets, check_rewards, check_rows, check_token_ids, checked_rollouts
from .config import GOPDConfig
from .frozen.adapter import copy_start, is_peft, refuse_anchor_name, without_adapters
from .frozen.build import asks_servers
from .frozen.routing import Routing, as_name
from .generation_batch import route, weigh_stored
from .metrics import drop_nonfinite
from .model_card import PAPER, describe
from .observer import NONFINITE_SHARE, EndOfStep
from .ranks import together
from .rewards import drop_null_reward, null_reward
from .rollouts import stored_completions
from .state import RunState
from .student import Student


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)


class GOPDTrainer(GRPOTrainer):  # type: ignore[misc]
    """
    Trainer for Generalized On-Policy Distillation (G-OPD), and with λ > 1 for ExOPD, of the paper [Learning beyond
    Teacher](https://huggingface.co/papers/2602.12125).

    The student samples completions; every token is rewarded with λ·(log π* − log π_ref) under a KL penalty to π_ref.
    Generation, importance weights, clipping, aggregation and logging are those of [`~trl.GRPOTrainer`].

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl_gopd import GOPDConfig, GOPDTrainer

    >>> trainer = GOPDTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-1.7B",
    ...     teacher_model="Qwen/Qwen3-4B",
    ...     args=GOPDConfig(output_dir="out", gopd_lambda=1.25),
    ...     train_dataset=Dataset.from_dict({"prompt": ["What is 2+2?", "What is 3+5?"]}),
    ... )
    >>> trainer.train()  # doctest: +SKIP

    ```

    Args:
        model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        teacher_model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`] or `dict`, \
            *optional*):
            The teacher π*; may be quantized. Defaults to `args.teacher_model_name_or_path`. A name or path is loaded
            in the dtype of its checkpoint. It must have the student's tokenizer; padded vocabularies may differ. A
            dictionary holds several teachers by id; the column `teacher_id` says which of them scores a row, and it
            alone is run on it. If the student is given by name with a `peft_config`, its base and other adapters on
            that base, given by name, share the student's weights, unless these are quantized. The URL of a vLLM server
            has that score, and a file of `args.logprob_cache_dir` what the model behind it has scored.
        args ([`GOPDConfig`], *optional*):
            Configuration. Defaults to a plain one with the directory `{model}-GOPD`.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with a `prompt`, a string or a list of messages; with several teachers a `teacher_id`; and, if rows
            have a reward scale of their own, `lambda`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            The same, for evaluation.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to the student's.
        callbacks (`list[TrainerCallback]`, *optional*):
            As in [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*):
            As in [`~transformers.Trainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a student given by name; frozen models are never quantized with it.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train.
        tools (`list[Callable]`, *optional*):
            As in [`~trl.GRPOTrainer`].
        ref_model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`] or `dict`, \
            *optional*):
            The reference π_ref; the teacher's pre-RL model gives reward correction. Defaults to
            `args.ref_model_name_or_path`, then to the student's start: the adapter switched off if it is fresh, a
            frozen copy of it if it is trained, a frozen copy of the whole student without an adapter. A dictionary
            holds one for each teacher id. It may be served as a teacher may. Not used, and not loaded, when every λ
            is 1.
        reward_funcs (`Callable` or `str` or [`~transformers.PreTrainedModel`] or `list`, *optional*):
            Task rewards. Their group advantage, as GRPO computes it, is added to every token's.
        teacher_prompt (`Callable` or `dict[str, Callable]`, *optional*):
            Makes of a row the prompt, a string or messages, that the teacher reads instead of `prompt`; by teacher id,
            if the teachers differ in it. Defaults to the column `teacher_prompt`, where there is one.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`] or `dict`, *optional*):
            Tokenizer whose chat template renders the teacher's prompts, if it is not the student's; by teacher id, if
            the teachers differ in it.
        **grpo_kwargs:
            Further keyword arguments of [`~trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "gopd"]
    _name = "G-OPD"
    _paper = PAPER

    @together()
    def __init__(
        self,
        model: "str | os.PathLike[str] | PreTrainedModel | PeftModel",
        teacher_model: "str | os.PathLike[str] | PreTrainedModel | PeftModel | Mapping[str, Any] | None" = None,
        args: GOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable[..., Any]] | None = None,
        ref_model: "str | os.PathLike[str] | PreTrainedModel | PeftModel | Mapping[str, Any] | None" = None,
        reward_funcs: Any = None,
        teacher_prompt: Any = None,
        teacher_processing_class: Any = None,
        **grpo_kwargs: Any,
    ) -> None:
        # A path is a name to everything below, in TRL too.
        model, teacher_model, ref_model = map(as_name, (model, teacher_model, ref_model))
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GOPDConfig(f"{name.split('/')[-1]}-GOPD")
        has_environment = grpo_kwargs.get("environment_factory") is not None
        check_arguments(args, uses_tools=bool(tools) or has_environment)
        check_device(args.device)
        if reward_funcs:
            check_rewards(args, source="`reward_funcs`")
        self._routing = Routing(teacher_model, ref_model, args)
        check_datasets(
            {"train_dataset": train_dataset, "eval_dataset": eval_dataset},
            self._routing.check_dataset,
            needs_prompts=not has_environment,
        )
        asks = asks_servers(self._routing, args.gopd_estimator)
        if self._routing.gives_reference and not self._routing.uses_reference:
            warnings.warn("`ref_model` is not loaded: at `gopd_lambda=1` it cancels out.", stacklevel=2)
        if grpo_kwargs.get("rollout_func") is not None:
            grpo_kwargs["rollout_func"] = checked_rollouts(grpo_kwargs["rollout_func"])
        # What the reference is by default has to be settled before GRPO wraps, and changes, the student.
        has_adapter = peft_config is not None or is_peft(model)
        start: Any = None
        if self._routing.uses_start and not has_adapter:
            start = model if isinstance(model, str) else copy_start(model)
        refuse_anchor_name(model, args)

        set_seed(args.seed)  # TRL before 1.15 does so only after it has drawn a new adapter
        keeps_start = is_peft(model) and not args.sync_ref_model  # which TRL refuses under an adapter
        with without_reference_adapter(args) if keeps_start else nullcontext():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs or null_reward,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                **grpo_kwargs,
            )
        self.beta = args.beta
        self._has_rewards = any(function is not null_reward for function in self.reward_funcs)
        if self._has_rewards:
            check_rewards(args, source="The rewards of `reward_funcs` or of an environment's `get_reward`")
        run = assemble(
            self,
            routing=self._routing,
            start=start,
            is_named=isinstance(model, str),
            asks_servers=asks,
            teacher_prompt=teacher_prompt,
            teacher_processing_class=teacher_processing_class,
        )
        self._frozen, self._estimator, self._kept_start = run.frozen, run.estimator, run.kept_start
        self._teacher_prompts, self._schedule, self._guard = run.teacher_prompts, run.schedule, run.guard
        self._observer, self._completion_log = run.observer, run.completion_log
        self._run_state = RunState(self, run.schedule, run.guard, lambda: self._identities)
        self.add_callback(EndOfStep(self._observer))
        if args.beta == 0 and self.references:  # otherwise it is what GRPO's own KL penalty is measured from
            self.ref_model = self._frozen.modules("references")
        if not self._estimator.needs_old_logps:  # then nothing is corrected for the sampler either
            self.vllm_importance_sampling_correction = False
        self._prompts: list[Any] = []  # that the student reads
        self._rows: list[dict[str, Any]] = []  # of the data set, while their completions are generated
        # The micro-batch whose log-probabilities the inherited loss is about to ask for.
        self._pending: tuple[dict[str, Any], Batch, Scores] | None = None
        # Loading frozen models may draw random numbers; what the student samples must not depend on it.
        set_seed(args.seed, device_specific=True)

    @property
    def teachers(self) -> dict[str | None, Any]:
        """Teachers by teacher id, which is `None` for a single one without."""
        return self._frozen.teachers

    @property
    def references(self) -> dict[str | None, Any]:
        """References by teacher id; empty when every λ is 1."""
        return self._frozen.references

    @property
    def teacher_model(self) -> Any:
        """
        The teacher as a module, or a dictionary of several by teacher id. `None` stands for one without a module of
        its own: served, stored in a cache, or an adapter of the student.
        """
        return self._frozen.modules("teachers")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in [`~trl.GRPOTrainer`], with the student, the teachers, the references, λ and the estimator."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            describe(
                Path(self.args.output_dir, "README.md"),
                student=self._student_base.config._name_or_path or "a model in memory",
                identities=self._identities,
                args=self.args,
                lambdas=self._routing.lambda_by_teacher,
            )

    @property
    def _student_base(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _add_metrics(self, group: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][f"{group}/{name}"].append(value)

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with without_adapters(self.accelerator.unwrap_model(self.model), self._frozen.shared_adapters):
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in [`~transformers.Trainer`]; raises `FloatingPointError` for weights that are not finite."""
        self._guard.weights(self.model, step=self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._run_state.saved(Path(self._get_output_dir(trial=trial)), self._kept_start):
            super()._save_checkpoint(model, trial)

    def _load_best_model(self) -> None:
        check_whole(self.state.best_model_checkpoint, self.accelerator)
        super()._load_best_model()

    @functools.cached_property  # they never change, and checksums read every parameter
    def _identities(self) -> dict[str, dict[str, dict[str, Any]]]:
        return self._frozen.identities()

    @together()
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in [`~transformers.Trainer`], but `True` takes the newest whole checkpoint, other frozen models than its own
        raise, other options are logged, and no other run may save into the same folder at the same time.
        """
        with self._run_state.alone():
            return super().train(self._run_state.resume(resume_from_checkpoint, self._kept_start), *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # the run was over when it was resumed, and transformers would take another step before it looks
            self.control.should_training_stop = True

    # One generation batch

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        check_token_ids("prompt", prompt_ids, self._rows, self._student_base.config)
        if self.args.use_stored_completions:
            output: Any = stored_completions(self._rows, max_length=self.max_completion_length)
        else:
            output = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        check_token_ids("completion", output[0], self._rows, self._student_base.config)
        return output

    @together()
    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        check_rows(inputs)
        if self._completion_log is not None:
            self._completion_log.fill(self._logs)
        self._frozen.prefetch()
        self._rows = inputs
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if keys.IMAGES in output:  # from a tool, or from rows without column names
            raise NotImplementedError("Rows with images are not supported: frozen models score text only.")
        output[keys.ADVANTAGES] = self._guard.task_advantages(output[keys.ADVANTAGES])
        route(
            output,
            inputs,
            routing=self._routing,
            prompts=self._teacher_prompts,
            student_prompts=self._prompts,
            tools=tools_of_rows(self, len(inputs)),
            tokens_to_skip=self.args.num_loss_tokens_to_skip,
            add_over_ranks=lambda count: self.accelerator.gather(count).sum(),
        )
        ids, step, is_training = output[keys.COMPLETION_IDS], self.state.global_step, self.model.training
        metrics = self._observer.completions(ids, self._lengths, step=step, is_training=is_training)
        self._add_metrics("completions", metrics)
        if self.args.use_stored_completions and self._estimator.needs_old_logps:
            weigh_stored(output, inputs, args=self.args, student_logps=self._student_logps)
        batch = Batch.from_trl(output)
        if self._completion_log is not None:
            self._completion_log.begin(len(inputs), self._logs)
        output.update(self._guard.scores(lambda: self._estimator.scores(batch), batch, inputs).to_trl())
        self._add_metrics("gopd", self._frozen.cache_hits())
        drop_null_reward(self._metrics[self._mode], self._logs["rewards"], has_others=self._has_rewards)
        return output

    def _generate(self, prompts: list[Any]) -> Any:
        self._prompts = prompts  # to which an environment may have added
        generated = super()._generate(prompts)
        # TRL may mask truncated completions out, which makes them look empty.
        self._lengths = torch.tensor([len(ids) for ids in generated[1]], device=self.accelerator.device)
        return generated

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, *args, **kwargs)
        return self._guard.rewards(rewards, self.reward_func_names, inputs)

    def _student_logps(self, ids: Tensor, seen: Tensor, num_tokens: int) -> Tensor:
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps: Tensor = super()._get_per_token_logps_and_entropies(
                self.model, ids, seen, num_tokens, batch_size=self.args.per_device_train_batch_size
            )[0]
        return logps

    # One micro-batch

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        inputs = dict(inputs)
        self._pending = inputs, Batch.from_trl(inputs), Scores.from_trl(inputs)
        if self.args.gopd_estimator != "sampled":
            # The expectation is taken under the current student, and the estimator itself weighs what was sampled.
            inputs.pop(keys.OLD_LOGPS, None)
            if keys.SAMPLER_RATIO in inputs:
                inputs[keys.SAMPLER_RATIO] = torch.ones_like(inputs[keys.SAMPLER_RATIO])
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            missed, self._pending = self._pending is not None, None
        if missed:
            raise RuntimeError(
                f"TRL {trl.__version__} computed the loss without asking for log-probabilities first, so the "
                f"distillation advantages were never set. Use trl{ACCEPTED}."
            )
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        arguments = (model, input_ids, attention_mask, logits_to_keep)
        inherited = functools.partial(super()._get_per_token_logps_and_entropies, *arguments, **kwargs)
        if self._pending is None:
            if not self._estimator.needs_old_logps:  # GRPO asks for those of the policy that sampled
                return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
            # Without an adapter the student need not be what it was before training, the anchor of the KL penalty.
            with nullcontext() if self._kept_start is None else self._kept_start.instead_of_base(self.model):
                return inherited()  # type: ignore[no-any-return]
        inputs, batch, scores = self._pending
        self._pending = None
        student = Student(
            model,
            self._student_base,
            log_probs=inherited,
            inputs={"input_ids": input_ids, "attention_mask": attention_mask},
            num_tokens=logits_to_keep,
            autocast=self.accelerator.autocast,
            computes_aux_loss=kwargs.get("compute_aux_loss", False),
        )
        lambdas = self._schedule.at(self.state.global_step, batch.gopd_lambda.unsqueeze(1))
        assert isinstance(lambdas, Tensor)
        estimate = self._estimator.estimate(student, batch, scores, lambdas)
        # GRPO's own advantages are zero without `reward_funcs`.
        advantages = estimate.credits
        if self._has_rewards:
            advantages = advantages + batch.task_advantages.unsqueeze(1) * batch.loss_mask
        weights = self._routing.weights
        if weights is not None:
            advantages = advantages * weights.to(advantages)[batch.teacher_index, None]
        is_training = self.model.training
        metrics = self._observer.micro_batch(estimate, batch, advantages=advantages, is_training=is_training)
        self._add_metrics("gopd", metrics)
        if self._completion_log is not None and NONFINITE_SHARE not in metrics:
            self._completion_log.add(batch, estimate)
        inputs[keys.ADVANTAGES] = advantages
        return estimate.logps, estimate.entropy, estimate.aux_loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        metrics = self._guard.gradient(grad_norm, self.optimizer, step=self.state.global_step)
        self._metrics["train"].update(metrics)  # a count, of which no mean is taken
        return grad_norm

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in [`~transformers.Trainer`], finite numbers alone; with `log_completions`, also writes a page."""
        if self._completion_log is not None:
            self._completion_log.fill(self._logs)
        drop_nonfinite(logs, self._metrics[self._mode])
        super().log(logs, start_time)
        if self._completion_log is not None and self.accelerator.is_main_process and self.model.training:
            self._completion_log.write_page(
                Path(self.args.output_dir, "completions"),
                step=self.state.global_step,
                decode=lambda index: str(self._tokenizer.decode([index])),
            )
