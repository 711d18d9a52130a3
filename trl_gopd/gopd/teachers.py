"""The frozen models of a run: where they come from, where they live, and how they are called."""

import copy
import logging
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file, is_peft_available

from ._trl import (
    create_model_from_path,
    disable_gradient_checkpointing,
    gather_heads,
    prepare_deepspeed,
    prepare_fsdp,
    use_adapter,
)
from .scoring import FrozenModel, evaluation_mode, logit_transform, project, score


if is_peft_available():
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel


logger = logging.getLogger(__name__)


def load(
    model: str | nn.Module,
    *,
    role: str,
    option: str,
    init_kwargs: dict[str, Any] | None,
    revision: str | None,
    args,
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
        return model
    kwargs = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, **(init_kwargs or {})}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"].startswith("torch."):
        kwargs["dtype"] = kwargs["dtype"].removeprefix("torch.")
    if revision is not None:
        kwargs.setdefault("revision", revision)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # "auto" would spread every rank's copy over all devices
    if is_adapter(model, revision):
        return AutoPeftModelForCausalLM.from_pretrained(model, **kwargs)
    return create_model_from_path(model, **kwargs)


def copy_start(model: nn.Module) -> nn.Module:
    """A frozen copy of the student as it is in memory, which a path may no longer hold."""
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        raise ValueError(
            "The student is already sharded by ZeRO-3, so it cannot be copied as the reference. Pass the path of the "
            "student instead of an instance, or pass `ref_model`, or use `gopd_lambda=1`."
        )
    return copy.deepcopy(model)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module, *, role: str) -> None:
    """
    Raises `ValueError` unless the model reads the student's token ids: the same tokenizer, and room for all its ids.

    The widths of padded vocabularies may differ. Where a model comes without a tokenizer this is logged.
    """
    width = model.config.get_text_config().vocab_size
    if width < len(tokenizer):
        raise ValueError(
            f"`{role}` has a vocabulary of {width} ids, but the student's tokenizer has {len(tokenizer)}. Token ids "
            f"are scored as they are, so give a `{role}` with the student's tokenizer."
        )
    check_vocabulary(tokenizer, model.config._name_or_path, role=role)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, source: str, *, role: str) -> None:
    """Raises `ValueError` if the tokenizer that is found at `source` has other ids; logs it if none is found."""
    try:
        if not source:
            raise OSError("no path")
        other = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("The tokenizer of `%s` could not be compared with the student's: %s", role, error)
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    ids, their_ids = ({index: token for token, index in vocab.items()} for vocab in (ours, theirs))
    index = min(i for i in ids.keys() | their_ids.keys() if ids.get(i) != their_ids.get(i))
    raise ValueError(
        f"`{role}` ({source}) has another tokenizer than the student: id {index} is {their_ids.get(index)!r} there "
        f"and {ids.get(index)!r} in the student's. Token ids are scored as they are; use a model of the same family."
    )


class Scorer(ABC):
    """What scores completions and is never trained."""

    @property
    @abstractmethod
    def is_sharded(self) -> bool:
        """Whether all ranks have to call it together."""

    @property
    @abstractmethod
    def context(self) -> int | None:
        """How many tokens it can read, if that is known."""

    @abstractmethod
    def score(self, input_ids: Tensor, attention_mask: Tensor, completion_ids: Tensor) -> Tensor:
        """Log-probabilities `(B, T)` in float32 nats of `completion_ids`, the last `T` columns of `input_ids`."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this model from another one, as JSON can hold it: its name, its revision, and a checksum."""


class LocalScorer(Scorer):
    """
    A [`Scorer`] whose hidden states and logits are here.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed.
        batch_size (`int`):
            Rows a forward.
        chunk_size (`int`):
            Tokens whose logits exist at a time.
    """

    def __init__(self, *, accelerator, batch_size: int, chunk_size: int):
        self.accelerator = accelerator
        self.batch_size, self.chunk_size = batch_size, chunk_size

    @property
    @abstractmethod
    def config(self) -> Any:
        """The model's configuration."""

    @property
    def context(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        """Width of the logits, padding included."""
        return int(self.config.get_text_config().vocab_size)

    @property
    @abstractmethod
    def head(self) -> nn.Module:
        """Output head, whose weight may have to be gathered."""

    @abstractmethod
    def hidden(self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
        """Hidden states `(B, num_tokens, D)` from which the last `num_tokens` ids are predicted."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits `(N, V)` of hidden states `(N, D)`."""

    def score(self, input_ids: Tensor, attention_mask: Tensor, completion_ids: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return score(
                self.hidden,
                self,
                input_ids,
                attention_mask,
                completion_ids,
                batch_size=self.batch_size,
                chunk_size=self.chunk_size,
                gather=gather_heads,
            ).to(completion_ids.device)


class Frozen(LocalScorer):
    """
    A model of its own, placed for the run.

    Args:
        model (`torch.nn.Module`):
            The model. Put in evaluation mode; its parameters stop requiring gradients.
        temperature (`float`):
            Sampling temperature.
        role (`str`):
            For messages.
        offload (`bool`, *optional*, defaults to `False`):
            Keep the weights in CPU memory, and have them on the device while a batch is scored. Models that are
            quantized, placed by a device map or sharded stay where they are.
        **kwargs:
            Of [`LocalScorer`].
    """

    def __init__(self, model: nn.Module, *, temperature: float, role: str, offload: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.inner = FrozenModel(model, temperature)
        base, accelerator = self.inner.base, self.accelerator
        is_placed = getattr(base, "is_quantized", False) or len(getattr(base, "hf_device_map", {}) or {}) > 1
        self._is_sharded = not is_placed and is_sharded(accelerator)
        self._offload = offload and not is_placed and not self._is_sharded
        if not is_placed and not self._is_sharded:
            self.inner.to("cpu" if self._offload else accelerator.device)
        if self._is_sharded:
            prepare = prepare_fsdp if _is_fsdp(accelerator) else prepare_deepspeed
            self.call = prepare(self.inner, accelerator)
        else:
            self._check_head(role)
            self.call = self.inner

    def score(self, input_ids: Tensor, attention_mask: Tensor, completion_ids: Tensor) -> Tensor:
        with self._on_device():
            return super().score(input_ids, attention_mask, completion_ids)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if not self._offload:
            yield
            return
        tensors = [*self.inner.parameters(), *self.inner.buffers()]
        parked = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.accelerator.device)
            yield
        finally:  # nothing was written, so nothing has to be copied back
            for tensor, data in zip(tensors, parked, strict=True):
                tensor.data = data

    @property
    def is_sharded(self) -> bool:
        return self._is_sharded

    @property
    def config(self) -> Any:
        return self.inner.config

    @property
    def head(self) -> nn.Module:
        return self.inner.head

    def logits(self, hidden: Tensor) -> Tensor:
        return self.inner.logits(hidden)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
        with self.accelerator.autocast():
            return self.call(input_ids, attention_mask, num_tokens)

    @torch.no_grad()
    def _check_head(self, role: str) -> None:
        # A family may do something to its logits that its configuration does not say. Better to refuse than to distil
        # from other numbers than the model's own.
        device = self.inner.base.get_input_embeddings().weight.device
        ids = torch.arange(3, device=device).unsqueeze(0) % self.inner.vocab_size
        mask = torch.ones_like(ids)
        want = (
            self.inner.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            / self.inner.transform.temperature
        )
        got = self.inner.logits(self.inner(ids, mask, 2).flatten(0, 1)).view_as(want)
        # the same two numbers up to the rounding of the model's dtype, which a quantized head may use twice
        tolerance = 32 * torch.finfo(self.inner.base.dtype).eps * want.abs().max().clamp(min=1)
        if (got - want).abs().max() > tolerance:
            raise ValueError(
                f"The logits of `{role}` ({type(self.inner.base).__name__}) are not a linear head followed by the "
                "scale and soft cap of its configuration, so they cannot be computed in chunks. Use "
                "another model family."
            )

    def identity(self) -> dict[str, Any]:
        base = self.inner.base
        return {
            "name": base.config._name_or_path or type(base).__name__,
            "revision": getattr(base.config, "_commit_hash", None),
            "weights": None if self.is_sharded else weights_digest(self.inner.model),
        }


class StudentAdapter(LocalScorer):
    """
    The student under another of its adapters, or under none: a frozen model that costs no weights.

    Its forward must take `with_hidden_states`, as `expose_hidden_states` makes it.

    Args:
        student (`Callable`):
            Returns the student as training holds it at the moment.
        adapter (`str` or `None`):
            Name of the adapter to switch on; `None` switches all of them off.
        temperature (`float`):
            Sampling temperature.
        checkpointing_kwargs (`dict`, *optional*):
            Of gradient checkpointing, which is off meanwhile.
        **kwargs:
            Of [`LocalScorer`].
    """

    def __init__(
        self,
        student: Callable[[], nn.Module],
        adapter: str | None,
        *,
        temperature: float,
        checkpointing_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
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
        return is_sharded(self.accelerator)

    @property
    def config(self) -> Any:
        return self._base.config

    @property
    def head(self) -> nn.Module:
        return self._base.get_output_embeddings()

    def logits(self, hidden: Tensor) -> Tensor:
        return self.transform(project(self.head, hidden))

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

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
        with self.switched() as model, self.accelerator.autocast():
            return model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                with_hidden_states=lambda hidden, head: hidden[:, -num_tokens - 1 : -1],
            )

    def identity(self) -> dict[str, Any]:
        base = self._base
        facts = {"name": base.config._name_or_path, "revision": getattr(base.config, "_commit_hash", None)}
        if self.adapter is None:
            return facts | {"adapter": None}
        parameters = {n: p for n, p in self._peft.named_parameters() if f".{self.adapter}." in n}
        digest = None if self.is_sharded else _digest(parameters)
        return facts | {"adapter": self.adapter, "weights": digest}


def is_sharded(accelerator) -> bool:
    """Whether a model that is prepared for this run is split over ranks."""
    plugin = accelerator.state.deepspeed_plugin
    return _is_fsdp(accelerator) or plugin is not None and plugin.zero_stage == 3


def _is_fsdp(accelerator) -> bool:
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def weights_digest(model: nn.Module) -> str:
    """Checksum of the beginning of every parameter: cheap, and another for any other training of the same model."""
    return _digest(dict(model.named_parameters()))


def _digest(parameters: Mapping[str, Tensor]) -> str:
    value = 0
    for _, parameter in sorted(parameters.items()):
        start = parameter.detach().flatten()[:64].cpu().contiguous()
        value = zlib.crc32(start.view(torch.uint8).numpy(), value)
    return f"{value:08x}"


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
def without_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """A body that saves a PEFT model does not see these adapters: they are not the run's to save."""
    configs = {name: model.peft_config.pop(name) for name in names}
    try:
        yield
    finally:
        if configs:
            model.peft_config.update(configs)


def add_reference_adapter(model: nn.Module) -> None:
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
