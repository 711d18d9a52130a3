"""[`GOPDTrainer`]: wires objective, scoring and frozen models into TRL's [`~trl.GRPOTrainer`]."""

import functools
import json
import logging
import os
import textwrap
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import torch
import trl
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import is_peft_available
from trl import GRPOTrainer

from ..files import written_whole
from . import routing, teachers
from ._trl import (
    ACCEPTED,
    check_device,
    check_head,
    disable_gradient_checkpointing,
    eos_token_ids,
    gather_heads,
    get_config_model_id,
)
from .cache import CachedScorer
from .config import GOPDConfig
from .monitors import completion_rows, is_eos, summarize_completions, token_table, topk_overlap
from .objective import (
    discounted_advantages,
    extrapolated_divergence,
    implicit_rewards,
    log_probs_at,
    stratified_divergence,
    token_advantages,
)
from .prompts import TeacherPrompts
from .rollouts import stored_completions
from .schedules import deviation_squares, gate_lambda
from .scoring import logit_transform
from .served import ServedScorer, is_url
from .state import read_state
from .visualize import advantages_html


if is_peft_available():
    from peft import PeftConfig, PeftModel, PromptLearningConfig


logger = logging.getLogger(__name__)

STATE = "gopd_state.json"
CACHE_SUFFIX = ".sqlite3"
SHOWN_COMPLETIONS = 8  # in the page of coloured tokens
PER_TEACHER = ("reverse_kl", "teacher_logp", "advantage_mean", "implicit_reward", "clip_share", "lambda")


class _EndOfStep(TrainerCallback):
    """Tells the trainer that an optimizer step has ended, before anything is saved."""

    def __init__(self, trainer: "GOPDTrainer"):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._end_step()


def _null_reward(prompts, **kwargs) -> list[float]:
    """GRPO wants a reward function; distillation has none."""
    return [0.0] * len(prompts)


class GOPDTrainer(GRPOTrainer):
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
    _paper = {
        "title": "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation",
        "id": "2602.12125",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{yang2026learning,
                author = {Wenkai Yang and Weijie Liu and Ruobing Xie and Kai Yang and Saiyong Yang and Yankai Lin},
                title  = {{Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation}},
                year   = 2026,
                eprint = {arXiv:2602.12125},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        teacher_model: "str | PreTrainedModel | PeftModel | None" = None,
        args: GOPDConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config: "PeftConfig | None" = None,
        tools=None,
        ref_model: "str | PreTrainedModel | PeftModel | None" = None,
        reward_funcs=None,
        teacher_prompt=None,
        teacher_processing_class=None,
        **grpo_kwargs,
    ):
        # A path is a name to everything below, in TRL too.
        model, teacher_model, ref_model = map(_as_name, (model, teacher_model, ref_model))
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GOPDConfig(f"{name.split('/')[-1]}-GOPD")
        if not isinstance(args, GOPDConfig):
            raise TypeError(
                f"`args` must be a `GOPDConfig`, got {type(args).__name__}. Build one with the same fields."
            )
        check_device(args.device)
        if teacher_model is None:
            teacher_model = args.teacher_models or args.teacher_model_name_or_path
        if ref_model is None:
            ref_model = args.ref_models or args.ref_model_name_or_path
        if teacher_model is None:
            raise ValueError(
                "No teacher: `teacher_model` and `args.teacher_model_name_or_path` are both None. Pass one of them."
            )
        self._routing = routing.Routing(teacher_model, ref_model, args)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            parts = {f"{name}[{key!r}]": part for key, part in dataset.items()} if isinstance(dataset, dict) else {}
            for part_name, part in (parts or {name: dataset}).items():
                _check_dataset(part, part_name)
                self._routing.check_dataset(part, part_name)
        if args.use_stored_completions and (tools or grpo_kwargs.get("environment_factory") is not None):
            raise ValueError("`use_stored_completions` samples nothing, so there is no turn for tools. Drop them.")
        self._has_rewards = bool(reward_funcs) or grpo_kwargs.get("environment_factory") is not None
        if self._has_rewards and args.num_generations < 2:
            raise ValueError(
                "`reward_funcs` with `num_generations=1` have no effect, since GRPO compares the completions of one "
                "prompt. Use `num_generations` of at least 2, or drop `reward_funcs`."
            )
        if self._has_rewards and args.gopd_estimator != "sampled":
            raise ValueError(
                "`reward_funcs` act on the log-probabilities of the sampled tokens, which "
                f"`gopd_estimator={args.gopd_estimator!r}` does not train. Use 'sampled'."
            )
        self._asks_top = self._check_served(args)
        if ref_model is not None and not self._routing.uses_reference:
            warnings.warn(
                "`ref_model` is not loaded: with `gopd_lambda=1` it cancels out of the objective.", stacklevel=2
            )
        # What the reference is by default has to be settled before GRPO wraps, and changes, the student.
        start = self._student_start(model, args, peft_config) if self._routing.uses_start else None

        set_seed(args.seed)  # TRL before 1.15 does so only after it has drawn a new adapter
        super().__init__(
            model=model,
            reward_funcs=reward_funcs if self._has_rewards else _null_reward,
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
        self._check_student()
        # Only then are the weights under the student's adapter known to be those of their name.
        self._is_plain_base = isinstance(model, str) and not getattr(self._student_base, "is_quantized", False)
        self._shared_adapters: list[str] = []
        self._scorers: dict[tuple, teachers.Scorer] = {}
        self.teachers = {
            key: self._scorer(
                given,
                key,
                role="teacher_model",
                init_kwargs=args.teacher_model_init_kwargs,
                revision=args.teacher_model_revision,
            )
            for key, given in self._routing.teachers.items()
        }
        self.references = {}
        if self._routing.uses_reference:
            self.references = {
                key: self._start_scorer(start)
                if given is None
                else self._scorer(
                    given,
                    key,
                    role="ref_model",
                    init_kwargs=args.ref_model_init_kwargs,
                    revision=args.ref_model_revision,
                )
                for key, given in self._routing.references.items()
            }
        self._teacher_prompts = TeacherPrompts(
            self._routing.by_teacher("teacher_prompt", teacher_prompt),
            self._routing.by_teacher("teacher_processing_class", teacher_processing_class),
            column=args.teacher_prompt_column,
            tokenizer=self._tokenizer,
            template_options={
                "chat_template": self.chat_template,
                "tools": self.tools or None,
                **self.chat_template_kwargs,
            },
            contexts={key: scorer.context for key, scorer in self.teachers.items()},
            drops_overlong=args.overlong_teacher_prompts == "drop",
        )
        self._caches: list[CachedScorer] = []
        if args.logprob_cache_dir is not None:
            self._cache_scorers(Path(args.logprob_cache_dir))
        self._teacher_panel = routing.Panel(list(self.teachers.values()), self.accelerator)
        self._reference_panel = (
            routing.Panel(list(self.references.values()), self.accelerator) if self.references else None
        )
        if args.gopd_estimator != "sampled" or any(
            isinstance(scorer, teachers.StudentAdapter) for scorer in self._scorers.values()
        ):
            _expose_hidden_states(self._student_base)
        self._schedule = args.build_lambda_schedule()
        self._deviations = None  # what the adaptive schedule has seen of this step
        self.add_callback(_EndOfStep(self))
        self._token_rows: list[dict] = []
        self._pending = None  # the micro-batch whose log-probabilities the inherited loss is about to ask for
        # Loading frozen models may draw random numbers; what the student samples must not depend on it.
        set_seed(args.seed, device_specific=True)

    # Frozen models

    def _check_served(self, args: GOPDConfig) -> bool:
        """Whether the ids of "stratified" are those that servers find likeliest; raises for what none can answer."""
        if args.gopd_estimator == "sampled":
            return False
        given = list(self._routing.teachers.values())
        references = self._routing.references.values() if self._routing.uses_reference else ()
        for url in filter(is_url, [*references, *(given if args.gopd_estimator == "full" else ())]):
            raise ValueError(
                f"`gopd_estimator={args.gopd_estimator!r}` needs log-probabilities of ids that {url} cannot be asked "
                "for: a server tells those of the sampled tokens and of its own likeliest ids. Use 'sampled', or "
                "'stratified' with served teachers and a reference that is here, or give the model by its name."
            )
        teacher_urls = [is_url(teacher) for teacher in given]
        if any(teacher_urls) and not all(teacher_urls):
            raise ValueError(
                "`gopd_estimator='stratified'` takes its ids either from the servers of all teachers or from the "
                "student, got teachers of both kinds. Serve all of them, or use 'sampled'."
            )
        return any(teacher_urls)

    def _student_start(self, model, args: GOPDConfig, peft_config) -> "str | nn.Module | None":
        """The default reference: a path or a model to freeze, or `None` when an adapter is switched instead."""
        self._start_adapter = None  # all of them off
        if peft_config is not None:
            return None
        if is_peft_available() and isinstance(model, PeftModel):
            if not teachers.is_fresh_adapter(model):
                self._start_adapter = "ref"
                if args.beta == 0:  # otherwise GRPO adds the same copy itself
                    teachers.add_reference_adapter(model)
            return None
        return model if isinstance(model, str) else teachers.copy_start(model)

    def _start_scorer(self, start: "str | nn.Module | None") -> teachers.Scorer:
        if start is None:
            return self._student_adapter(self._start_adapter)
        kwargs = self.args.model_init_kwargs if isinstance(start, str) else None
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "dtype"}
        return self._scorer(start, None, role="ref_model", init_kwargs=kwargs, revision=None)

    def _scorer(self, given, teacher_id: str | None, *, role: str, init_kwargs, revision):
        """What scores with a model that the user gave; the same one for the same model."""
        source = (given if isinstance(given, str) else id(given), revision, repr(init_kwargs))
        if source in self._scorers:
            return self._scorers[source]
        label = role if teacher_id is None else f"{role}[{teacher_id!r}]"
        student = self.accelerator.unwrap_model(self.model)
        shares = isinstance(given, str) and self._is_plain_base and not init_kwargs
        if isinstance(given, str) and given.endswith(CACHE_SUFFIX):
            scorer = self._stored(given, label)
        elif is_url(given):
            scorer = self._served(given, label, role, init_kwargs, revision)
        elif shares and teachers.is_base_of(given, student, revision):
            scorer = self._student_adapter(None)
        elif shares and teachers.fits_student(given, student, revision):
            name = role if teacher_id is None else f"{role}_{teacher_id.replace('.', '_')}"
            teachers.put_on_student(given, student, name=name, role=label, revision=revision)
            self._shared_adapters.append(name)
            scorer = self._student_adapter(name)
        else:
            scorer = self._frozen(given, label, role, init_kwargs, revision)
        self._scorers[source] = scorer
        return scorer

    def _student_adapter(self, name: str | None) -> teachers.Scorer:
        if ("student", name) not in self._scorers:
            self._scorers["student", name] = teachers.StudentAdapter(
                lambda: self.model,
                name,
                temperature=self.temperature,
                checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
                **self._scorer_options,
            )
        return self._scorers["student", name]

    def _frozen(self, given, label: str, role: str, init_kwargs, revision) -> teachers.Scorer:
        model = teachers.load(
            given, role=label, option=role, init_kwargs=init_kwargs, revision=revision, args=self.args
        )
        if model is self.model or model is self._student_base:
            raise ValueError(
                f"`{label}` is the student itself, which training changes. Pass a path or another instance of it."
            )
        teachers.check_tokenizer(self._tokenizer, model, role=label)
        return teachers.Frozen(
            model,
            temperature=self.temperature,
            role=label,
            offload=self.args.offload_frozen_models,
            **self._scorer_options,
        )

    def _served(self, url: str, label: str, role: str, init_kwargs, revision) -> teachers.Scorer:
        if init_kwargs or revision:
            raise ValueError(
                f"`{role}_init_kwargs={init_kwargs}` and `{role}_revision={revision!r}` cannot act on {url}, whose "
                "server has loaded the model already. Drop them, and start the server with what they say."
            )
        scorer = ServedScorer(
            url,
            temperature=self.temperature,
            role=label,
            batch_size=self.args.per_device_train_batch_size,
            timeout=self.args.served_teacher_timeout,
            top_k=self.args.gopd_top_k if self._asks_top else 1,
        )
        teachers.check_vocabulary(self._tokenizer, scorer.source, role=label)
        return scorer

    def _stored(self, path: str, label: str) -> CachedScorer:
        """Scores that a model left behind in a cache, without the model."""
        if self.args.gopd_estimator != "sampled":
            raise ValueError(
                f"`{label}` is a cache of log-probabilities of sampled tokens ({path}), and `gopd_estimator="
                f"{self.args.gopd_estimator!r}` needs those of others. Use 'sampled'."
            )
        return CachedScorer(None, path, temperature=self.temperature)

    def _cache_scorers(self, folder: Path):
        """Puts a cache before every frozen model that is not the student's own base."""
        folder.mkdir(parents=True, exist_ok=True)
        cached: dict[teachers.Scorer, CachedScorer] = {}
        for role, scorers in (("teacher", self.teachers), ("reference", self.references)):
            for key, scorer in scorers.items():
                if isinstance(scorer, CachedScorer | teachers.StudentAdapter):
                    continue
                if scorer not in cached:
                    name = role if key is None else f"{role}-{quote(key, safe='')}"
                    path = folder / f"{name}{CACHE_SUFFIX}"
                    cached[scorer] = CachedScorer(scorer, path, temperature=self.temperature)
                scorers[key] = cached[scorer]
        self._caches = list(cached.values())

    @property
    def _scorer_options(self) -> dict:
        return {
            "accelerator": self.accelerator,
            "batch_size": self.args.per_device_train_batch_size,
            "chunk_size": self.args.gopd_chunk_size,
        }

    @property
    def _student_base(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _check_student(self):
        if not is_peft_available() or not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            return
        model = self.accelerator.unwrap_model(self.model)
        check_head(model)
        if self.args.gopd_estimator != "sampled" and isinstance(model.active_peft_config, PromptLearningConfig):
            raise ValueError(
                f"Prompt-learning adapters are not supported by `gopd_estimator={self.args.gopd_estimator!r}`, which "
                "calls the backbone. Use 'sampled', or a LoRA adapter."
            )

    # Checkpoints

    def _save(self, output_dir=None, state_dict=None):
        with teachers.without_adapters(self.accelerator.unwrap_model(self.model), self._shared_adapters):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            state = {**self._models, "lambda_schedule": self._schedule.state_dict()}
            with written_whole(folder / STATE) as part:
                part.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    @functools.cached_property  # they never change, and checksums read every parameter
    def _models(self) -> dict:
        roles = {"teachers": self.teachers, "references": self.references}
        return {
            role: {key or "": scorer.identity() for key, scorer in scorers.items()} for role, scorers in roles.items()
        }

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            state = read_state(Path(folder, STATE), self._models)
            if state is not None:
                self._schedule.load_state_dict(state["lambda_schedule"])
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # One generation batch

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self.args.use_stored_completions:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return stored_completions(self._rows, max_length=self.max_completion_length)

    @torch.no_grad()
    def _weigh_stored(self, output, inputs):
        """Importance weights of the tokens of stored completions, if it is known what their sampler gave them."""
        _, sampled = stored_completions(inputs, max_length=self.max_completion_length)
        if sampled is None:
            return
        mask = output["completion_mask"]
        sampler_logps = torch.zeros(mask.shape, device=mask.device)
        for number, logps in enumerate(sampled):
            sampler_logps[number, : len(logps)] = torch.tensor(logps)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            student_logps = self._student_logps(*_read_by_student(output), mask.size(1)).float()
        weights = ((student_logps - sampler_logps) * mask).exp()
        output["importance_weights"] = weights.clamp(max=self.args.vllm_importance_sampling_clip_max)

    def _generate_and_score_completions(self, inputs):
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        if self.args.use_stored_completions:
            self._weigh_stored(output, inputs)
        if "pixel_values" in output:  # from a tool, or from rows without column names
            raise NotImplementedError("Rows with images are not supported: frozen models score text only.")
        owners, lambdas = self._routing.rows(inputs, device=output["completion_ids"].device)
        output.update(teacher_index=owners, gopd_lambda=lambdas)
        output.update(
            self._teacher_prompts(
                inputs,
                [list(self.teachers)[owner] for owner in owners.tolist()],
                prompt_ids=output["prompt_ids"],
                prompt_mask=output["prompt_mask"],
                completion_mask=output["completion_mask"],
            )
        )
        self._observe_completions(output)
        scores = self._score(output)
        if self.args.log_completions and not self._has_rewards:
            self._log_row_advantages(output, scores)
        if self.args.gopd_estimator == "sampled" or self._asks_top:
            output.update(scores)
        if not self._has_rewards:
            self._drop_null_reward()
        return output

    def _score(self, output) -> dict[str, Tensor]:
        """
        Log-probabilities `(B, T)` of the completions under teachers and, if they are used, references; only those that
        are needed before the loss, where other estimators than "sampled" get what they need.
        """
        owners, completion_ids = output["teacher_index"], output["completion_ids"]
        is_needed = self.args.gopd_estimator == "sampled" or self.args.log_completions
        scores: dict[str, Tensor] = {}
        if self._asks_top:
            names = ("teacher_logps", "teacher_top_ids", "teacher_top_logps")
            top = self._teacher_panel.score_top(owners, *_read_by_teacher(output), completion_ids)
            scores.update(zip(names, top, strict=True))
        elif is_needed:
            scores["teacher_logps"] = self._teacher_panel.score(owners, *_read_by_teacher(output), completion_ids)
        if is_needed and self._reference_panel is not None:
            scores["reference_logps"] = self._reference_panel.score(owners, *_read_by_student(output), completion_ids)
        if self._caches:
            self._log_cache_hits()
        return scores

    def _log_cache_hits(self):
        counts = torch.tensor([[cache.hits, cache.misses] for cache in self._caches], device=self.accelerator.device)
        hits, misses = self.accelerator.reduce(counts.sum(0).float(), reduction="sum").tolist()
        if hits + misses:
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["gopd/cache_hit_share"].append(hits / (hits + misses))
        for cache in self._caches:
            cache.hits = cache.misses = 0

    def _student_logps(self, ids: Tensor, seen: Tensor, num_tokens: int) -> Tensor:
        return super()._get_per_token_logps_and_entropies(
            self.model, ids, seen, num_tokens, batch_size=self.args.per_device_train_batch_size
        )[0]

    @torch.no_grad()
    def _log_row_advantages(self, output, scores):
        """Puts each completion's mean token advantage in the logged table, where GRPO puts that of its reward."""
        mask = self._loss_mask(output)
        student_logps = output.get("old_per_token_logps")
        if student_logps is None:
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                student_logps = self._student_logps(*_read_by_student(output), mask.size(1))
        advantages, _, _ = self._sampled_advantages(output | scores, student_logps, mask)
        if self.accelerator.is_main_process and self.model.training:
            shown = slice(SHOWN_COMPLETIONS)
            self._token_rows = token_table(
                [[self._tokenizer.decode([i]) for i in ids] for ids in output["completion_ids"][shown].tolist()],
                student_logps=student_logps[shown],
                teacher_logps=scores["teacher_logps"][shown],
                reference_logps=None if self._reference_panel is None else scores["reference_logps"][shown],
                advantages=advantages[shown],
                mask=mask[shown],
            )
        rows = self.accelerator.gather(advantages.sum(1) / mask.sum(1).clamp(min=1)).tolist()
        for _ in range(min(len(rows), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(rows)

    def _observe_completions(self, output):
        """Logs what the completions look like; in training they may move λ."""
        rows = completion_rows(output["completion_ids"], output["completion_mask"], eos_token_ids(self))
        summary = summarize_completions(self.accelerator.gather(rows))
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["completions/p95_length"].append(summary.p95_length)
        self._metrics[mode]["completions/repetition"].append(summary.repetition)
        if self.model.training:
            for alarm in self._schedule.observe_completions(summary):
                logger.warning("λ moves towards 1 after step %d: %s.", self.state.global_step, alarm)

    def _end_step(self):
        if self._deviations is not None:
            self._schedule.observe_deviations(self.accelerator.reduce(self._deviations, reduction="sum"))
            self._deviations = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self._token_rows:
            step = self.state.global_step
            path = Path(self.args.output_dir, "completions", f"advantages_{step:05d}.html")
            with written_whole(path) as part:
                part.write_text(advantages_html(self._token_rows, title=f"Advantages, step {step}"), encoding="utf-8")
            self._token_rows = []

    def _drop_null_reward(self):
        for metrics in self._metrics.values():
            for name in ("reward", "reward_std", "frac_reward_zero_std"):
                metrics.pop(name, None)
            for name in [name for name in metrics if name.startswith(f"rewards/{_null_reward.__name__}/")]:
                del metrics[name]
        self._logs["rewards"].pop(_null_reward.__name__, None)

    # One micro-batch

    def _compute_loss(self, model, inputs):
        self._pending = inputs = dict(inputs)
        if self.args.gopd_estimator != "sampled":
            # The expectation over the vocabulary is taken under the current student, so neither an older policy nor
            # the sampler has to be corrected for, but in the one sampled token of "stratified".
            inputs.pop("old_per_token_logps", None)
            if "importance_sampling_ratio" in inputs:
                inputs["importance_weights"] = inputs["importance_sampling_ratio"]
                inputs["importance_sampling_ratio"] = torch.ones_like(inputs["importance_sampling_ratio"])
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            missed, self._pending = self._pending is not None, None
        if missed:
            raise RuntimeError(
                f"TRL {trl.__version__} computed the loss without asking for log-probabilities first, so the "
                f"distillation advantages were never set. Use trl{ACCEPTED}."
            )
        return loss

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._pending is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        inputs, self._pending = self._pending, None
        mask = self._loss_mask(inputs)
        if self.args.gopd_estimator != "sampled":
            return self._over_vocabulary(model, inputs, mask, *args)
        results = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        student_logps = inputs.get("old_per_token_logps")
        student_logps = results[0].detach() if student_logps is None else student_logps
        advantages, known, lambdas = self._sampled_advantages(inputs, student_logps, mask)
        self._observe(
            inputs,
            known,
            mask=mask,
            student_logps=student_logps,
            teacher_logps=inputs["teacher_logps"],
            reference_logps=inputs.get("reference_logps"),
            reverse_kl=student_logps.float() - inputs["teacher_logps"],
            advantages=advantages,
            lambdas=lambdas,
        )
        if "importance_weights" in inputs:
            advantages = advantages * inputs["importance_weights"]
        if self.args.gopd_discount:
            advantages = discounted_advantages(advantages, known, self.args.gopd_discount)
        # GRPO's own advantages are zero without `reward_funcs`.
        inputs["advantages"] = self._weighted(inputs, advantages + inputs["advantages"].unsqueeze(1) * mask)
        return results

    def _loss_mask(self, inputs) -> Tensor:
        """
        `(B, T)`, 1 for the tokens that are trained on: those the student wrote itself, without padding and answers of
        tools, in rows that their teacher could read, after the first ones if they are skipped.
        """
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        if "is_readable" in inputs:
            mask = mask * inputs["is_readable"].unsqueeze(1)
        if self.args.num_loss_tokens_to_skip:
            mask = mask * (mask.cumsum(1) > self.args.num_loss_tokens_to_skip)
        return mask

    @property
    def _varies(self) -> bool:
        """Whether λ may differ between rows, tokens or steps."""
        args = self.args
        is_scheduled = self._schedule.kind != "constant" or self._schedule.back_off is not None
        is_gated = args.gopd_deterministic_above is not None or args.gopd_needs_agreement
        return self._routing.varies or is_scheduled or is_gated

    def _weighted(self, inputs, advantages: Tensor) -> Tensor:
        weights = self._routing.weights
        return advantages if weights is None else advantages * weights.to(advantages)[inputs["teacher_index"], None]

    def _lambdas(self, batch) -> Tensor:
        """λ `(B, 1)` of the rows at this step."""
        lambdas = self._schedule.at(self.state.global_step, batch["gopd_lambda"].unsqueeze(1))
        assert isinstance(lambdas, Tensor)
        return lambdas

    def _sampled_advantages(self, scores, student_logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages `(B, T)`, `mask` without the ids that a frozen model does not have, and λ, `(B, 1 or T)`."""
        teacher_logps, reference_logps = scores["teacher_logps"], scores.get("reference_logps")
        # An id that only the student's padded vocabulary has: its teacher cannot say anything about it.
        is_known = ~teacher_logps.isneginf()
        if reference_logps is not None:
            is_known &= ~reference_logps.isneginf()
        known = mask * is_known
        lambdas = self._lambdas(scores)
        if reference_logps is not None and (self.args.gopd_deterministic_above or self.args.gopd_needs_agreement):
            lambdas = gate_lambda(
                lambdas,
                student_logps=student_logps,
                teacher_logps=teacher_logps,
                reference_logps=reference_logps,
                deterministic_above=self.args.gopd_deterministic_above,
                needs_agreement=self.args.gopd_needs_agreement,
            )
        advantages = token_advantages(
            student_logps=student_logps,
            teacher_logps=teacher_logps,
            reference_logps=reference_logps,
            mask=known,
            gopd_lambda=lambdas,
            extrapolation_clip=self.args.gopd_extrapolation_clip,
        )
        return advantages, known, lambdas

    def _over_vocabulary(self, model, inputs, mask: Tensor, input_ids, attention_mask, num_tokens: int):
        """
        What the inherited loss asks for, with the divergence as a negated advantage that carries the gradient: the
        log-probabilities are detached, so ratio × advantage is the divergence alone.

        With a discount γ, what comes after a token is credited to it by its score, γ·G_{t+1}·∇ log π(y_t), as in
        `discounted_advantages`, but of expected advantages: they are what an exact baseline would leave of sampled
        ones.
        """
        tokens = mask.bool()
        owners = inputs["teacher_index"]
        reference_logits = served = top_ids = None
        heads: list[nn.Module] = []
        if self._asks_top:
            top_ids = inputs["teacher_top_ids"][tokens]
            served = torch.cat([inputs["teacher_top_logps"], inputs["teacher_logps"].unsqueeze(-1)], -1)[tokens]
        else:
            teacher_logits = self._teacher_panel.targets(owners, *_read_by_teacher(inputs), tokens)
            heads += self._teacher_panel.heads
        if self._reference_panel is not None:
            reference_logits = self._reference_panel.targets(owners, input_ids, attention_mask, tokens)
            heads += self._reference_panel.heads
        lambdas = self._lambdas(inputs)
        weights = inputs.get("importance_weights")
        options = {
            "labels": inputs["completion_ids"][tokens],
            "gopd_lambda": lambdas.expand(mask.shape)[tokens],
            "transform": logit_transform(self._student_base.config, self.temperature),
            "extrapolation_clip": self.args.gopd_extrapolation_clip,
            "chunk_size": self.args.gopd_chunk_size,
        }
        overlaps: list[Tensor] = []

        def target_logits(rows: slice) -> tuple[Tensor, Tensor | None]:
            return teacher_logits(rows), None if reference_logits is None else reference_logits(rows)

        def target_logps(rows: slice, ids: Tensor) -> tuple[Tensor, Tensor | None]:
            reference = None if reference_logits is None else log_probs_at(reference_logits(rows), ids)
            if served is not None:
                return served[rows], reference
            teacher = teacher_logits(rows)
            count = min(ids.size(1) - 1, teacher.size(1))
            overlaps.append(topk_overlap(ids[:, :count], teacher.topk(count).indices))
            return log_probs_at(teacher, ids), reference

        def divergence(hidden: Tensor, head: nn.Module) -> tuple[Tensor | None, ...]:
            weight, bias = head.weight, head.bias
            if hasattr(weight, "full_tensor"):  # FSDP2
                weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
            whole = list(dict.fromkeys([head, *heads]))  # the student's own may be there twice
            arguments = (hidden[:, -num_tokens - 1 : -1][tokens], weight, bias)
            options["gather"] = lambda: gather_heads(*whole)
            others: tuple[Tensor, ...] = ()
            if self.args.gopd_estimator == "full":
                output = extrapolated_divergence(*arguments, target_logits=target_logits, **options)
            else:
                output = stratified_divergence(
                    *arguments,
                    target_logps=target_logps,
                    importance_weights=None if weights is None else weights.expand(mask.shape)[tokens],
                    top_k=None if self._asks_top else self.args.gopd_top_k,
                    ids=top_ids,
                    **options,
                )
                others = (output.coverage,)
                if served is None:
                    others += (torch.cat([output.coverage.new_zeros(0), *overlaps]),)
            return (
                output.divergence,
                # a gradient that nobody asks for may leave the hooks of a sharded student waiting
                output.student_logps if self.args.gopd_discount else output.student_logps.detach(),
                output.expected_advantage,
                output.teacher_logps,
                None if reference_logits is None else output.reference_logps,
                output.entropy,
                output.reverse_kl,
                *others,
            )

        values = model(input_ids=input_ids, attention_mask=attention_mask, with_hidden_states=divergence)

        def scatter(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return value.new_zeros(mask.shape).masked_scatter(tokens, value)

        divergences, student_logps, expected, *values = map(scatter, values)
        teacher_logps, reference_logps, entropy, reverse_kl, *others = values
        known = mask * ~(teacher_logps.isneginf() | student_logps.isneginf())
        student_logps = student_logps.masked_fill(student_logps.isneginf(), 0.0)
        advantages = -divergences
        if self.args.gopd_discount:
            later = discounted_advantages(expected, mask, self.args.gopd_discount) - expected
            later = later * known if weights is None else later * known * weights
            advantages = advantages + later * (student_logps - student_logps.detach())
        student_logps = student_logps.detach()
        inputs["advantages"] = self._weighted(inputs, advantages)
        self._observe(
            inputs,
            known,
            mask=mask,
            student_logps=student_logps,
            teacher_logps=teacher_logps,
            reference_logps=reference_logps,
            reverse_kl=reverse_kl,
            advantages=-divergences.detach(),
            lambdas=lambdas,
            **dict(zip(("top_k_coverage", "top_k_overlap"), others, strict=False)),
        )
        return student_logps, entropy, None

    # Metrics

    @torch.no_grad()
    def _observe(
        self,
        inputs,
        known,
        *,
        mask,
        student_logps,
        teacher_logps,
        reference_logps,
        reverse_kl,
        advantages,
        lambdas,
        **others: Tensor | None,
    ):
        """
        Logs token means over all ranks, each from one sum and one count; of several teachers, also of each one. In
        training, the schedule of λ sees how far the student is from its teacher.
        """
        outside = mask * (1 - known.to(mask.dtype))
        mask = known.bool()
        advantages = advantages.masked_fill(~mask, 0.0)
        means = {
            "reverse_kl": reverse_kl,
            "teacher_logp": teacher_logps,
            "advantage_mean": advantages,
            "advantage_square": advantages.square(),
            "advantage_positive_share": (advantages > 0).float(),
            **{name: value for name, value in others.items() if value is not None},
        }
        ends = is_eos(inputs["completion_ids"], mask, eos_token_ids(self))
        end_means = {"eos_advantage": advantages}
        if self._varies:
            means["lambda"] = lambdas.expand(mask.shape)
        if reference_logps is not None:
            clip = self.args.gopd_extrapolation_clip
            logps = {"teacher_logps": teacher_logps, "reference_logps": reference_logps}
            rewards = implicit_rewards(**logps)
            extrapolation = (lambdas - 1) * implicit_rewards(**logps, extrapolation_clip=clip)
            means |= {
                "implicit_reward": rewards,
                "extrapolation": extrapolation,
                "extrapolation_abs": extrapolation.abs(),
                "distillation_abs": reverse_kl.abs(),
            }
            end_means["eos_implicit_reward"] = rewards
            if clip is not None:
                means["clip_share"] = (rewards.abs() > clip).float()
            if self._schedule.kind == "adaptive" and self.model.training:
                squares = deviation_squares(student_logps=student_logps, **logps, mask=mask)
                self._deviations = squares if self._deviations is None else self._deviations + squares
        sums = [value.float().masked_fill(~mask, 0.0).sum(1) for value in means.values()]
        sums += [value.float().masked_fill(~ends, 0.0).sum(1) for value in end_means.values()]
        values = torch.stack(sums)
        counts = torch.stack([ends.sum(1).float(), mask.sum(1).float(), outside.sum(1).float()])
        rows = torch.cat([values, counts])  # (names, B)
        owners = torch.arange(len(self.teachers), device=rows.device) == inputs["teacher_index"].unsqueeze(1)
        totals = self.accelerator.reduce(rows @ owners.float(), reduction="sum")  # (names, teachers)
        largest = self.accelerator.gather(
            advantages.abs().max().reshape(1) if advantages.numel() else rows.new_zeros(1)
        )
        *sums, end_count, count, left_out = totals.sum(1).tolist()
        if count == 0:
            return
        mean = {name: total / count for name, total in zip(means, sums, strict=False)}
        if end_count:
            mean |= {name: total / end_count for name, total in zip(end_means, sums[len(means) :], strict=True)}
        variance = max(mean.pop("advantage_square") - mean["advantage_mean"] ** 2, 0.0)
        metrics = {**mean, "advantage_std": variance**0.5, "advantage_abs_max": largest.max().item()}
        if "extrapolation_abs" in mean:
            parts = metrics.pop("extrapolation_abs"), metrics.pop("distillation_abs")
            metrics["extrapolation_share"] = parts[0] / max(sum(parts), torch.finfo(torch.float32).tiny)
        if left_out:
            metrics["outside_vocabulary_share"] = left_out / (count + left_out)
        if len(self.teachers) > 1:
            for key, (*own_sums, _, own, _) in zip(self.teachers, totals.T.tolist(), strict=True):
                metrics[f"{key}/token_share"] = own / count
                for name, total in zip(means, own_sums, strict=False):
                    if own and name in PER_TEACHER:
                        metrics[f"{key}/{name}"] = total / own
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][f"gopd/{name}"].append(value)


def _as_name(given):
    """A path as a string, in a dictionary too."""
    if isinstance(given, Mapping):
        return {key: _as_name(value) for key, value in given.items()}
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _read_by_student(batch) -> tuple[Tensor, Tensor]:
    """Ids and mask `(B, P + T)` of prompts and completions; of the latter, answers of tools are seen too."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def _read_by_teacher(batch) -> tuple[Tensor, Tensor]:
    """The same with the teachers' prompts, where they have their own."""
    if "teacher_prompt_ids" not in batch:
        return _read_by_student(batch)
    own = {"prompt_ids": batch["teacher_prompt_ids"], "prompt_mask": batch["teacher_prompt_mask"]}
    return _read_by_student({**batch, **own})


def _check_dataset(dataset, name: str) -> None:
    columns = getattr(dataset, "column_names", None)
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. Give at least one row with a `prompt`.")
    if isinstance(columns, list) and "prompt" not in columns:
        raise ValueError(f"`{name}` needs a column `prompt`, a string or a list of messages; it has {columns}.")
    for column in ("image", "images"):
        if isinstance(columns, list) and column in columns:
            raise ValueError(f"`{name}` has the column `{column}`, but frozen models score text only. Drop it.")


def _expose_hidden_states(model: PreTrainedModel) -> None:
    """
    Lets `model(..., with_hidden_states=f)` return `f(hidden states, output head)`.

    It has to be reached through the model's own forward, so that DDP, DeepSpeed and FSDP see the call.
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def forward(self, *args, with_hidden_states=None, **kwargs):
        if with_hidden_states is None:
            return original_forward(*args, **kwargs)
        kwargs.pop("labels", None)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return with_hidden_states(hidden, self.get_output_embeddings())

    model.forward = types.MethodType(forward, model)
