"""Frozen models that are the student itself, under another of its adapters or under none."""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import find_adapter_config_file, is_peft_available

from .._trl import disable_gradient_checkpointing, through_forward, use_adapter
from ..batch import Sequences
from .head import logit_transform
from .identity import is_sharded, parameters_digest
from .local import context_of, evaluation_mode, project, score_groups, vocab_size_of
from .spread import Budget, over_groups


if is_peft_available():
    from peft import PeftConfig, PeftModel


logger = logging.getLogger(__name__)


class AdapterScorer:
    """
    The student under another of its adapters, or under none: a frozen model that costs no weights.

    Args:
        student (`Callable`):
            Returns the student as training holds it at the moment.
        adapter (`str` or `None`):
            Name of the adapter to switch on; `None` switches all of them off.
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed.
        temperature (`float`):
            Sampling temperature.
        batch_size (`int`):
            Rows a forward, if all were as long as the longest.
        chunk_size (`int`):
            Tokens whose logits exist at a time.
        batch_tokens (`int`, *optional*):
            Positions a forward, instead of `batch_size`.
        checkpointing_kwargs (`dict`, *optional*):
            Of gradient checkpointing, which is off meanwhile.
    """

    def __init__(
        self,
        student: Callable[[], nn.Module],
        adapter: str | None,
        *,
        accelerator: Any,
        temperature: float,
        batch_size: int,
        chunk_size: int,
        batch_tokens: int | None = None,
        checkpointing_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.budget, self.chunk_size = Budget(batch_size, batch_tokens), chunk_size
        self.student, self.adapter = student, adapter
        self.checkpointing_kwargs = checkpointing_kwargs
        self.transform = logit_transform(self._base.config, temperature)

    @property
    def _peft(self) -> Any:
        return self.accelerator.unwrap_model(self.student())

    @property
    def _base(self) -> Any:
        return self._peft.get_base_model()

    @property
    def is_sharded(self) -> bool:
        """Whether all ranks have to call it together."""
        return is_sharded(self.accelerator)

    @property
    def context(self) -> int | None:
        """How many tokens it can read, if that is known."""
        return context_of(self._base.config)

    @property
    def vocab_size(self) -> int:
        """Width of the logits, padding included."""
        return vocab_size_of(self._base.config)

    @property
    def head(self) -> nn.Module:
        """Output head, whose weight may have to be gathered."""
        head: nn.Module = self._base.get_output_embeddings()
        return head

    def logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits `(N, V)` of hidden states `(N, D)`."""
        return self.transform(project(self.head, hidden))

    def score(self, sequences: Sequences) -> Tensor:
        """Log-probabilities `(B, T)` of the scored tokens in float32 nats; 0 for the other tokens."""
        with self.accelerator.autocast():
            return score_groups(self, sequences, self.budget, self._states, chunk_size=self.chunk_size)

    @contextmanager
    def switched(self) -> Iterator[nn.Module]:
        """The student without dropout and gradients, under this adapter; afterwards as it was."""
        model = self.student()
        with (
            torch.no_grad(),
            evaluation_mode(model),
            disable_gradient_checkpointing(model, self.checkpointing_kwargs),
            use_adapter(self._peft, self.adapter),
        ):
            yield model

    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states `(N, D)` from which the N scored tokens are predicted, row by row."""
        return over_groups(self._states, sequences, self.budget, is_sharded=self.is_sharded)

    def _states(self, group: Sequences) -> Tensor:
        """Hidden states `(n, D)` from which the scored tokens of rows that begin at the first column are predicted."""

        def backbone(**inputs: Any) -> Tensor:
            inputs.pop("labels", None)
            states: Tensor = self._base.base_model(use_cache=False, **inputs).last_hidden_state
            return states[group.scored]

        # Nothing sees what comes after it, so padding on the right needs no mask.
        with self.switched() as model, self.accelerator.autocast():
            states: Tensor = through_forward(model, self._base, backbone, input_ids=group.input_ids[:, :-1])
        return states

    def identity(self) -> dict[str, Any]:
        """Name and revision of the base; for an adapter also its name and a checksum of its weights."""
        base = self._base
        facts = {"name": base.config._name_or_path, "revision": getattr(base.config, "_commit_hash", None)}
        if self.adapter is None:
            return facts | {"adapter": None}
        parameters = {n: p for n, p in self._peft.named_parameters() if f".{self.adapter}." in n}
        digest = None if self.is_sharded else parameters_digest(parameters)
        return facts | {"adapter": self.adapter, "weights": digest}


@dataclass(frozen=True)
class AdapterStart:
    """The student's start as an adapter of the student: `name` of one, or `None` for none switched on."""

    name: str | None


def student_start(model: Any, *, has_peft_config: bool, keeps_reference: bool) -> "str | nn.Module | AdapterStart":
    """
    The default reference, the student as it is before training.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student as the user gave it, before GRPO wraps and changes it.
        has_peft_config (`bool`):
            Whether GRPO will put a new adapter on it.
        keeps_reference (`bool`):
            Whether GRPO itself will keep a copy of a trained adapter.

    Returns:
        A path or a model to freeze, or an [`AdapterStart`] if an adapter is switched instead.
    """
    if has_peft_config:
        return AdapterStart(None)
    if is_peft_available() and isinstance(model, PeftModel):
        if is_fresh_adapter(model):
            return AdapterStart(None)
        if not keeps_reference:
            add_reference_adapter(model)
        return AdapterStart("ref")
    return model if isinstance(model, str) else copy_start(model)


def copy_start(model: nn.Module) -> nn.Module:
    """A frozen copy of the student as it is in memory, which a path may no longer hold."""
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        raise ValueError(
            "The student is already sharded by ZeRO-3, so it cannot be copied as the reference. Pass the path of the "
            "student instead of an instance, or pass `ref_model`, or use `gopd_lambda=1`."
        )
    return copy.deepcopy(model)


def is_fresh_adapter(model: nn.Module) -> bool:
    """Whether a PEFT model's active adapters still change nothing: every LoRA B matrix is zero."""
    weights = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(weights) and all(not weight.detach().any() for weight in weights)


def is_same_model(name: str, other: str | None) -> bool:
    """Whether two names or paths mean one model."""
    if not other:
        return False
    return name == other or os.path.isdir(name) and os.path.realpath(name) == os.path.realpath(other)


def is_base_of(given: str, student: nn.Module, revision: str | None) -> bool:
    """Whether a name or path is that of the model under a student's adapter."""
    if not is_peft_available() or not isinstance(student, PeftModel) or revision is not None:
        return False
    return is_same_model(given, student.get_base_model().config._name_or_path)


def is_adapter(given: str, revision: str | None) -> bool:
    """Whether a name or path holds an adapter and not a model."""
    return is_peft_available() and find_adapter_config_file(given, revision=revision) is not None


def fits_student(given: str, student: nn.Module, revision: str | None) -> bool:
    """
    Whether a name or path holds an adapter that can be put beside the student's own: on the same base, inside the
    backbone, with no dense weights of its own.
    """
    if not is_adapter(given, revision) or not isinstance(student, PeftModel):
        return False
    config = PeftConfig.from_pretrained(given, revision=revision)
    base = student.get_base_model()
    return (
        is_same_model(config.base_model_name_or_path, base.config._name_or_path)
        and not config.is_prompt_learning
        and not getattr(config, "modules_to_save", None)
        and not any("lm_head" in name for name in getattr(config, "target_modules", None) or ())
    )


def put_on_student(given: str, student: "PeftModel", *, name: str, role: str, revision: str | None) -> None:
    """Loads an adapter beside the student's own, frozen, under `name`."""
    if name in student.peft_config:
        raise ValueError(
            f"`{role}` ({given}) would share the student's weights as its adapter {name!r}, but the student already "
            f"has one of that name. Rename the student's; it has {sorted(student.peft_config)}."
        )
    active = student.active_adapter
    student.load_adapter(given, adapter_name=name, is_trainable=False, revision=revision)
    student.set_adapter(active)
    logger.info("`%s` (%s) is an adapter on the student's base, and shares the student's weights.", role, given)


@contextmanager
def without_adapters(model: Any, names: Sequence[str]) -> Iterator[None]:
    """A body that saves a PEFT model does not see these adapters: they are not the run's to save."""
    configs = {name: model.peft_config.pop(name) for name in names}
    try:
        yield
    finally:
        if configs:
            model.peft_config.update(configs)


def add_reference_adapter(model: Any) -> None:
    """Adds a frozen copy of the adapter `default` under the name `ref`, where GRPO keeps its own."""
    if "ref" in model.peft_config:
        raise ValueError(
            "The student already has an adapter named 'ref', the name of the frozen copy of its start. Rename it, or "
            "pass `ref_model`, or use `gopd_lambda=1`."
        )
    if "default" not in model.peft_config:
        raise ValueError(
            f"The student's adapters are {sorted(model.peft_config)}; the trained one must be named 'default'."
        )
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            copied = model.get_parameter(name.replace(".default.", ".ref."))
            copied.data.copy_(parameter.data)
            copied.requires_grad_(False)
