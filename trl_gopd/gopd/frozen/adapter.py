"""
Frozen models that share the student's weights: the student under another of its adapters, under none, or as it was
before training.
"""

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available

from ...digests import parameters_digest
from .._trl import disable_gradient_checkpointing, gather_parameters, through_forward, use_adapter
from ..batch import Sequences
from .head import logit_transform
from .identity import is_sharded
from .local import context_of, evaluation_mode, project, score_groups, vocab_size_of
from .spread import Budget, over_groups
from .start import StudentStart, output_head


if is_peft_available():
    from peft import PeftConfig, PeftModel, PeftType
    from peft.utils import ModulesToSaveWrapper


logger = logging.getLogger(__name__)

LORA_MATRICES = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
LORA_ZEROS = {"lora_B", "lora_embedding_A"}  # those that are zero when LoRA changes nothing
PLAIN_INITIALISATIONS = ("gaussian", "orthogonal", "eva")  # others change the weights under the adapter
WAY_OUT = "pass `ref_model`, or use `gopd_lambda=1`"


def is_peft(model: object) -> bool:
    """Whether a model is a `PeftModel`."""
    return is_peft_available() and isinstance(model, PeftModel)


def copy_start(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of a student without an adapter as it is in memory, which a path may no longer hold."""
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        raise ValueError(
            "The student is already sharded by ZeRO-3, so it cannot be copied as the reference. Pass the path of the "
            "student instead of an instance, or pass `ref_model`, or use `gopd_lambda=1`."
        )
    return copy.deepcopy(model)


def refuse_anchor_name(model: object, args: Any) -> None:
    """Raises `ValueError` for a student with an adapter that GRPO would take for the anchor of its KL penalty."""
    if args.beta != 0 and "ref" in getattr(model, "peft_config", {}):
        raise ValueError(
            "The student has an adapter named 'ref', which GRPO would take for the anchor of its KL penalty "
            f"(`beta={args.beta}`). Rename it, or use `beta=0`."
        )


def is_fresh_adapter(model: Any) -> bool:
    """
    Whether a PEFT model computes what its base computes, and what will be trained can be switched off.

    That is so if only the matrices of LoRA and the copies of `modules_to_save` are trained, one factor of every
    product of matrices is zero and every copy equals its original. Initialisations that change the base (PiSSA,
    OLoRA, CorDA, LoftQ, LoRA-GA) leave no factor at zero.
    """
    zeros = []
    for name, parameter in model.named_parameters():
        parts = set(name.split("."))
        if parts & LORA_ZEROS:
            zeros.append(parameter)
        elif parameter.requires_grad and not parts & (LORA_MATRICES | {"modules_to_save"}):
            return False
    if not zeros or any(bool(parameter.detach().any()) for parameter in zeros):
        return False
    return all(_is_unchanged(m) for m in model.modules() if isinstance(m, ModulesToSaveWrapper))


def _is_unchanged(wrapper: Any) -> bool:
    originals = dict(wrapper.original_module.named_parameters())
    for name in wrapper.active_adapters:
        copies = dict(wrapper.modules_to_save[name].named_parameters())
        with gather_parameters(*originals.values(), *copies.values()):
            if any(not torch.equal(copies[key], original) for key, original in originals.items()):
                return False
    return True


def check_adapted_student(model: Any, *, estimator: str, needs_start: bool, accelerator: Any) -> None:
    """Raises `ValueError` for a student with an adapter that cannot be trained or whose start cannot be scored."""
    if not is_peft(model):
        return
    _check_packing(model, already=True)
    kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    head = output_head(model.get_base_model())
    trains_head = any(parameter.requires_grad for parameter in head.parameters())
    if trains_head and plugin is not None:
        # PEFT has it sharded by itself, and TRL gathers the weight beside FSDP, which then reduces no gradient.
        raise ValueError(
            "`modules_to_save` of the student has the output head, whose gradient would not be summed over ranks "
            "under FSDP. Leave it out, or use DDP or ZeRO-3."
        )
    if trains_head and not isinstance(head, nn.Linear):
        raise ValueError(
            f"The student's output head is trained as a {type(head).__name__}, as it is by `trainable_token_indices` "
            "where the head is tied to the embedding, and TRL computes losses from the weight and bias of a linear "
            "layer. Untie the head, or train it whole with `modules_to_save=['lm_head']`."
        )
    is_prompt = model.active_peft_config.is_prompt_learning
    if is_prompt and estimator != "sampled":
        raise ValueError(
            f"The student's adapter is of the type {kind}, and `gopd_estimator={estimator!r}` does not support "
            "prompt learning, since it calls the backbone. Use 'sampled', or a LoRA adapter."
        )
    if not needs_start:
        return
    if is_prompt or model.active_peft_config.is_adaption_prompt:
        raise ValueError(
            f"The student's adapter is of the type {kind}, and the student's start is the reference by default, "
            f"which cannot be scored exactly for prompt learning. Use a LoRA adapter, or {WAY_OUT} with `beta=0`."
        )
    if plugin is not None and plugin.fsdp_version != 2 and not is_fresh_adapter(model):
        raise ValueError(
            f"The student's adapter ({kind}) does not start as its base model, so a copy of its start is needed, "
            f"which FSDP 1 cannot exchange. Set `fsdp_version: 2`, or {WAY_OUT} with `beta=0`."
        )


def _check_packing(model: Any, *, already: bool = False) -> None:
    # In evaluation mode, bitsandbytes packs 4-bit weights on CPUs with AVX512-BF16 for a kernel without a gradient,
    # and never unpacks them: from then on, nothing below the last layer learns.
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu") or module.weight.device.type != "cpu":
            continue
        is_packed = getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
        if is_packed or module.support_avx512bf16_for_cpu and not already:
            raise ValueError(
                f"The student is quantized to 4 bits, and bitsandbytes {'has packed' if is_packed else 'would pack'} "
                f"its weights ({name}) for a CPU kernel without a gradient when the student is evaluated, as it is "
                "where it is its own reference or teacher: the adapter would not learn. Load the student again and "
                "set `module.support_avx512bf16_for_cpu = False` for each `bitsandbytes.nn.Linear4bit` of it, or "
                "quantize it to 8 bits, or use `gopd_lambda=1` or pass `ref_model`, and a teacher that is a model of "
                "its own."
            )


class AdapterScorer:
    """
    The student under another of its adapters, under none, or at its start: a frozen model that costs few weights.

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
        start ([`StudentStart`], *optional*):
            Score the student at this start, under its own adapter; `adapter` is then not read.
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
        start: StudentStart | None = None,
        checkpointing_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.budget, self.chunk_size = Budget(batch_size, batch_tokens), chunk_size
        self.student, self.adapter, self.start = student, adapter, start
        self.checkpointing_kwargs = checkpointing_kwargs
        self.transform = logit_transform(self._base.config, temperature)
        _check_packing(self._peft)

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
        # It is applied to hidden states when the student is itself again, which may train its head.
        if self.start is not None:
            at_start: nn.Module = self.start.head(self.student())
            return at_start
        head = self._base.get_output_embeddings()
        original: nn.Module = getattr(head, "original_module", head)
        return original

    def logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits `(N, V)` of hidden states `(N, D)`."""
        return self.transform(project(self.head, hidden))

    def score(self, sequences: Sequences) -> Tensor:
        """Log-probabilities `(B, T)` of the scored tokens in float32 nats; 0 for the other tokens."""
        with self.accelerator.autocast():
            return score_groups(self, sequences, self.budget, self._states, chunk_size=self.chunk_size)

    @contextmanager
    def switched(self) -> Iterator[nn.Module]:
        """The student without dropout and gradients, as this model; afterwards as it was."""
        model: Any = self.student()
        with (
            torch.no_grad(),
            evaluation_mode(model),
            disable_gradient_checkpointing(model, self.checkpointing_kwargs),
            use_adapter(self._peft, self.adapter) if self.start is None else self.start.restored(model),
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
        """Name and revision of the base; for an adapter or a start also a name and a checksum of its weights."""
        base = self._base
        facts = {"name": base.config._name_or_path, "revision": getattr(base.config, "_commit_hash", None)}
        if self.start is not None:
            return facts | {"adapter": "the student's start", "weights": self.start.digest()}
        if self.adapter is None:
            return facts | {"adapter": None}
        parameters = {n: p for n, p in self._peft.named_parameters() if f".{self.adapter}." in n}
        digest = None if self.is_sharded else parameters_digest(parameters)
        return facts | {"adapter": self.adapter, "weights": digest}


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


def fits_student(given: str, student: Any, revision: str | None) -> bool:
    """
    Whether a name or path holds an adapter that can be put beside the student's own: a LoRA on the same base, inside
    the backbone, that leaves the weights of the base alone.
    """
    if not is_adapter(given, revision) or not is_peft(student):
        return False
    config: Any = PeftConfig.from_pretrained(given, revision=revision)
    base: Any = student.get_base_model()
    return (
        is_same_model(config.base_model_name_or_path, base.config._name_or_path)
        and config.peft_type == PeftType.LORA
        and config.bias == "none"  # the base's own biases otherwise
        and config.init_lora_weights in (True, False, *PLAIN_INITIALISATIONS)
        and not config.modules_to_save
        and not config.trainable_token_indices
        and not _targets_head(config.target_modules)
    )


def _targets_head(target_modules: str | Sequence[str] | None) -> bool:
    if isinstance(target_modules, str):  # a regular expression for whole names
        return re.fullmatch(target_modules, "lm_head") is not None
    return any("lm_head" in name for name in target_modules or ())


def put_on_student(given: str, student: Any, *, name: str, role: str, revision: str | None) -> None:
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
