"""Makes the frozen models of a run of what the user gave: names, paths, models, adapters, servers and caches."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .._trl import create_model_from_path
from ..config import GOPDConfig
from . import adapter
from .address import is_url, redacted
from .cache_file import CACHE_SUFFIX
from .cached import CachedScorer
from .http import ClientOptions
from .local import LocalScorer, vocab_size_of
from .protocols import Scorer
from .routed import RoutedScorer
from .routing import Routing
from .served import ServedScorer
from .sharding import check_sharding, sharded_loading
from .start import StudentStart
from .tokenizers import EndTokens, check_tokenizer, check_vocabulary, end_ids, stored_end_ids


if is_peft_available():
    from peft import AutoPeftModelForCausalLM


logger = logging.getLogger(__name__)


@dataclass
class FrozenModels:
    """
    The frozen models of a run.

    Args:
        teachers (`dict[str | None, Scorer]`):
            By teacher id, which is `None` for a single one without.
        references (`dict[str | None, Scorer]`):
            The same; empty when every λ is 1.
        shared_adapters (`list[str]`):
            Names under which the student holds adapters that are frozen models of the run.
        caches (`list[CachedScorer]`):
            Caches of log-probabilities that stand before frozen models.
    """

    teachers: dict[str | None, Scorer]
    references: dict[str | None, Scorer]
    accelerator: Any
    shared_adapters: list[str] = field(default_factory=list)
    caches: list[CachedScorer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.teacher = RoutedScorer(list(self.teachers.values()))
        self.reference = RoutedScorer(list(self.references.values())) if self.references else None

    def prefetch(self) -> None:
        """
        Begins to copy the teacher's weights to the device, if they wait in CPU memory and there is room. Of several
        teachers, or of one behind a cache, it is not known before completions are there which of them is called.
        """
        if len(self.teacher.scorers) == 1:
            scorer = self.teacher.scorers[0]
            inner = getattr(scorer, "scorer", scorer)  # under exchanged ids
            if isinstance(inner, LocalScorer):
                inner.prefetch()

    def modules(self, role: str) -> Any:
        """
        The models of a role, `"teachers"` or `"references"`, as modules by teacher id, or the one of a single model
        without an id; `None` for one without a module of its own.
        """
        scorers: dict[str | None, Scorer] = getattr(self, role)
        modules = {key: getattr(getattr(scorer, "inner", None), "model", None) for key, scorer in scorers.items()}
        return modules[None] if list(modules) == [None] else modules

    def cache_hits(self) -> dict[str, float]:
        """
        `cache_hit_share` of the rows since the last call, and `cache_damaged_rows`, how many of the others were
        stored but damaged, over all ranks and caches; empty if there were no rows. It has to be called by all ranks
        together.
        """
        if not self.caches:
            return {}
        rows = [[cache.hits, cache.misses, cache.damaged] for cache in self.caches]
        counts = torch.tensor(rows, device=self.accelerator.device).sum(0).float()
        hits, misses, damaged = self.accelerator.reduce(counts, reduction="sum").tolist()
        for cache in self.caches:
            cache.hits = cache.misses = cache.damaged = 0
        if not hits + misses:
            return {}
        return {"cache_hit_share": hits / (hits + misses), "cache_damaged_rows": damaged}

    def identities(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What tells the models from others, by role and teacher id, as JSON can hold it."""
        roles = {"teachers": self.teachers, "references": self.references}
        return {
            role: {key or "": scorer.identity() for key, scorer in scorers.items()} for role, scorers in roles.items()
        }


def asks_servers(routing: Routing, estimator: str) -> bool:
    """
    Whether the ids of the estimator "stratified" are those that servers of the teachers find likeliest.

    Raises:
        `ValueError`: If an estimator needs log-probabilities that a server cannot be asked for.
    """
    if estimator == "sampled":
        return False
    given = list(routing.teachers.values())
    references = routing.references.values() if routing.uses_reference else ()
    for url in filter(is_url, [*references, *(given if estimator == "full" else ())]):
        raise ValueError(
            f"`gopd_estimator={estimator!r}` needs log-probabilities of ids that {redacted(url)} cannot be asked "
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


class FrozenBuilder:
    """
    Builds frozen models, one [`Scorer`] for each model however often it was given.

    Args:
        args ([`GOPDConfig`]):
            Configuration of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed.
        student (`Callable`):
            Returns the student as training holds it at the moment.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        is_plain_base (`bool`):
            Whether the weights under the student's adapter are those that its name stands for, so that other adapters
            on that name may share them.
        asks_servers (`bool`):
            Whether servers are asked for their likeliest ids.
    """

    def __init__(
        self,
        args: GOPDConfig,
        *,
        accelerator: Any,
        student: Callable[[], Any],
        tokenizer: Any,
        is_plain_base: bool,
        asks_servers: bool,
    ) -> None:
        self.args, self.accelerator, self.student, self.tokenizer = args, accelerator, student, tokenizer
        self.is_plain_base, self.asks_servers = is_plain_base, asks_servers
        if args.shard_frozen_models:
            check_sharding(accelerator)
        generation_config = self.accelerator.unwrap_model(student()).generation_config
        self.ends = EndTokens(tokenizer, generation_config, mismatch=args.gopd_eos_mismatch)
        self.shared_adapters: list[str] = []
        self._built: dict[tuple[Any, ...], Scorer] = {}

    def build(self, routing: Routing, start: "str | nn.Module | StudentStart | None") -> FrozenModels:
        """
        All frozen models of a run.

        Args:
            routing ([`Routing`]):
                Knows the teachers and references that the user gave.
            start (`str` or `torch.nn.Module` or [`StudentStart`], *optional*):
                The student's start, for references that were not given; `None` for the student without its adapter.
        """
        args: Any = self.args  # the dictionaries that a user may give as text are dictionaries by now
        teachers = {
            key: self._build(given, key, "teacher_model", args.teacher_model_init_kwargs, args.teacher_model_revision)
            for key, given in routing.teachers.items()
        }
        references = {}
        if routing.uses_reference:
            references = {
                key: self._start(start)
                if given is None
                else self._build(given, key, "ref_model", args.ref_model_init_kwargs, args.ref_model_revision)
                for key, given in routing.references.items()
            }
        caches: list[CachedScorer] = []
        if args.logprob_cache_dir is not None:
            caches = self._cache(Path(args.logprob_cache_dir), teachers, references)
        teachers, references = (
            {key: self.ends.apply(scorer) for key, scorer in scorers.items()} for scorers in (teachers, references)
        )
        return FrozenModels(teachers, references, self.accelerator, self.shared_adapters, caches)

    def _build(
        self, given: Any, teacher_id: str | None, role: str, init_kwargs: dict[str, Any] | None, revision: str | None
    ) -> Scorer:
        source = (given if isinstance(given, str) else id(given), revision, repr(init_kwargs))
        if source in self._built:
            return self._built[source]
        label = role if teacher_id is None else f"{role}[{teacher_id!r}]"
        student = self.accelerator.unwrap_model(self.student())
        shares = isinstance(given, str) and self.is_plain_base and not init_kwargs
        if isinstance(given, str) and given.endswith(CACHE_SUFFIX):
            scorer: Scorer = self._stored(given, label)
        elif is_url(given):
            scorer = self._served(given, label, role, init_kwargs, revision)
        elif shares and adapter.is_base_of(given, student, revision):
            scorer = self._adapter(None)
        elif shares and adapter.fits_student(given, student, revision):
            name = role if teacher_id is None else f"{role}_{teacher_id.replace('.', '_')}"
            adapter.put_on_student(given, student, name=name, role=label, revision=revision)
            self.shared_adapters.append(name)
            scorer = self._adapter(name)
        else:
            scorer = self._local(given, label, role, init_kwargs, revision)
        self._built[source] = scorer
        return scorer

    def _start(self, start: "str | nn.Module | StudentStart | None") -> Scorer:
        if start is None or isinstance(start, StudentStart):
            return self._adapter(None, start)
        kwargs = self.args.model_init_kwargs if isinstance(start, str) else None
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "dtype"}
        return self._build(start, None, "ref_model", kwargs, None)

    def _adapter(self, name: str | None, start: StudentStart | None = None) -> Scorer:
        key = ("student", name, start)
        if key not in self._built:
            self._built[key] = adapter.AdapterScorer(
                self.student,
                name,
                accelerator=self.accelerator,
                temperature=self.args.temperature,
                batch_size=self.args.per_device_train_batch_size,
                chunk_size=self.args.gopd_chunk_size,
                batch_tokens=self.args.gopd_score_batch_tokens,
                start=start,
                checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            )
        return self._built[key]

    def _local(
        self, given: Any, label: str, role: str, init_kwargs: dict[str, Any] | None, revision: str | None
    ) -> Scorer:
        known = getattr(self.args, "hf_deepspeed_config", None)
        with sharded_loading(self.accelerator, known) if self.args.shard_frozen_models else nullcontext():
            model = load(given, role=label, option=role, init_kwargs=init_kwargs, revision=revision, args=self.args)
        student = self.accelerator.unwrap_model(self.student())
        if model is student or hasattr(student, "get_base_model") and model is student.get_base_model():
            raise ValueError(
                f"`{label}` is the student itself, which training changes. Pass a path or another instance of it."
            )
        tokenizer = check_tokenizer(self.tokenizer, model, role=label)
        scorer = LocalScorer(
            model,
            accelerator=self.accelerator,
            temperature=self.args.temperature,
            role=label,
            batch_size=self.args.per_device_train_batch_size,
            chunk_size=self.args.gopd_chunk_size,
            batch_tokens=self.args.gopd_score_batch_tokens,
            offload=self.args.offload_frozen_models,
            shard=self.args.shard_frozen_models,
        )
        self.ends.compare(scorer, end_ids(tokenizer, scorer.inner.base.generation_config), role=label)
        return scorer

    def _served(
        self, url: str, label: str, role: str, init_kwargs: dict[str, Any] | None, revision: str | None
    ) -> Scorer:
        if init_kwargs or revision:
            raise ValueError(
                f"`{role}_init_kwargs={init_kwargs}` and `{role}_revision={revision!r}` cannot act on "
                f"{redacted(url)}, whose server has loaded the model already. Drop them, and start the server with "
                "what they say."
            )
        args, config = self.args, self.accelerator.unwrap_model(self.student()).config
        scorer = ServedScorer(
            url,
            temperature=args.temperature,
            role=label,
            batch_size=args.per_device_train_batch_size,
            options=ClientOptions(
                timeout=args.served_teacher_timeout,
                patience=args.served_teacher_patience,
                api_key_variable=args.served_teacher_api_key_variable,
                ca_bundle=args.served_teacher_ca_bundle,
                client_certificate=args.served_teacher_client_certificate,
                verify=args.served_teacher_verify,
            ),
            top_k=args.gopd_top_k if self.asks_servers else 1,
            num_ids=vocab_size_of(config),
        )
        tokenizer = check_vocabulary(self.tokenizer, scorer.source, role=label)
        self.ends.compare(scorer, stored_end_ids(tokenizer, scorer.source), role=label)
        return scorer

    def _stored(self, path: str, label: str) -> CachedScorer:
        """Scores that a model left behind in a cache, without the model."""
        if self.args.gopd_estimator != "sampled":
            raise ValueError(
                f"`{label}` is a cache of log-probabilities of sampled tokens ({path}), and `gopd_estimator="
                f"{self.args.gopd_estimator!r}` needs those of others. Use 'sampled'."
            )
        return CachedScorer(None, path, temperature=self.args.temperature)

    def _cache(self, folder: Path, *roles: dict[str | None, Scorer]) -> list[CachedScorer]:
        """Puts a cache before every frozen model that does not share the student's weights."""
        folder.mkdir(parents=True, exist_ok=True)
        cached: dict[Scorer, CachedScorer] = {}
        for role, scorers in zip(("teacher", "reference"), roles, strict=True):
            for key, scorer in scorers.items():
                if isinstance(scorer, CachedScorer | adapter.AdapterScorer):
                    continue
                if scorer not in cached:
                    name = role if key is None else f"{role}-{quote(key, safe='')}"
                    path = folder / f"{name}{CACHE_SUFFIX}"
                    cached[scorer] = CachedScorer(scorer, path, temperature=self.args.temperature)
                scorers[key] = cached[scorer]
        return list(cached.values())


def load(
    model: str | nn.Module,
    *,
    role: str,
    option: str,
    init_kwargs: dict[str, Any] | None,
    revision: str | None,
    args: GOPDConfig,
) -> nn.Module:
    """
    The model itself, or the one loaded from a path in the dtype of its checkpoint.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What the user gave.
        role (`str`):
            What the user calls it, for messages.
        option (`str`):
            `"teacher_model"` or `"ref_model"`, with which its options begin.
        init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained`; refused for a model that is already there.
        revision (`str`, *optional*):
            Revision on the Hub.
        args ([`GOPDConfig`]):
            Configuration of the run.
    """
    if not isinstance(model, str):
        if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
            raise TypeError(
                f"`{role}` must be a name or path, a `PreTrainedModel` or a `PeftModel`, got {type(model).__name__}."
            )
        if init_kwargs:
            raise ValueError(
                f"`{option}_init_kwargs={init_kwargs}` cannot act on a `{role}` that is already instantiated. Pass "
                "its path, or drop them."
            )
        given: nn.Module = model
        return given
    kwargs = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, **(init_kwargs or {})}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"].startswith("torch."):
        kwargs["dtype"] = kwargs["dtype"].removeprefix("torch.")
    if revision is not None:
        kwargs.setdefault("revision", revision)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # "auto" would spread every rank's copy over all devices
    load_model = (
        AutoPeftModelForCausalLM.from_pretrained if adapter.is_adapter(model, revision) else create_model_from_path
    )
    loaded: nn.Module = load_model(model, **kwargs)
    return loaded
