"""
The frozen models of a run: where they come from, where they live, and how they are called.

Under ZeRO-3 and FSDP a frozen model is sharded, and every rank must call it equally often. That holds as long as every
rank calls it for every batch it holds, since batches and micro-batches have the same number of rows on all ranks.
"""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ._trl import create_model_from_path, gather_heads, prepare_deepspeed, prepare_fsdp
from .scoring import FrozenModel, score


logger = logging.getLogger(__name__)


def load(
    model: str | nn.Module, *, role: str, init_kwargs: dict[str, Any] | None, revision: str | None, args
) -> nn.Module:
    """
    The model itself, or the one loaded from a path in the dtype of its checkpoint.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What the user gave.
        role (`str`):
            `"teacher_model"` or `"ref_model"`, for messages.
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
                f"`{role}` must be a name or path, a `PreTrainedModel` or a `PeftModel`, got {type(model).__name__}. "
                "Several teachers in one run are not supported yet."
            )
        if init_kwargs:
            raise ValueError(
                f"`{role}_init_kwargs={init_kwargs}` cannot act on a `{role}` that is already instantiated. Pass "
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
    return create_model_from_path(model, **kwargs)


def copy_start(model: nn.Module) -> nn.Module:
    """A frozen copy of the student as it is in memory, which a path may no longer hold."""
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        raise ValueError(
            "The student is already sharded by ZeRO-3, so it cannot be copied as the reference. Pass the path of the "
            "student instead of an instance, or pass `ref_model`, or use `gopd_lambda=1`."
        )
    return copy.deepcopy(model)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, given: str | nn.Module, *, role: str
) -> None:
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
    source = given if isinstance(given, str) else model.config._name_or_path
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


class Frozen:
    """
    A frozen model, placed for the run.

    Args:
        model (`torch.nn.Module`):
            The model. Put in evaluation mode; its parameters stop requiring gradients.
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed.
        temperature (`float`):
            Sampling temperature.
        batch_size (`int`):
            Rows a forward.
        chunk_size (`int`):
            Tokens whose logits exist at a time.
        role (`str`):
            For messages.
    """

    def __init__(
        self, model: nn.Module, *, accelerator, temperature: float, batch_size: int, chunk_size: int, role: str
    ):
        self.inner = FrozenModel(model, temperature)
        self.accelerator = accelerator
        self.batch_size, self.chunk_size = batch_size, chunk_size
        base = self.inner.base
        is_placed = getattr(base, "is_quantized", False) or len(getattr(base, "hf_device_map", {}) or {}) > 1
        plugin = accelerator.state.deepspeed_plugin
        is_sharded = not is_placed and (plugin is not None and plugin.zero_stage == 3 or _is_fsdp(accelerator))
        if not is_placed and not is_sharded:
            self.inner.to(accelerator.device)
        if is_sharded:
            prepare = prepare_fsdp if _is_fsdp(accelerator) else prepare_deepspeed
            self.call = prepare(self.inner, accelerator)
        else:
            self._check_head(role)
            self.call = self.inner

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

    def score(self, input_ids: Tensor, attention_mask: Tensor, completion_ids: Tensor) -> Tensor:
        """Log-probabilities `(B, T)` in float32 nats of `completion_ids`, the last `T` columns of `input_ids`."""
        with self.accelerator.autocast():
            return score(
                self.call,
                self.inner,
                input_ids,
                attention_mask,
                completion_ids,
                batch_size=self.batch_size,
                chunk_size=self.chunk_size,
                gather=gather_heads,
            ).to(completion_ids.device)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
        """Hidden states `(B, num_tokens, D)` from which the last `num_tokens` ids are predicted."""
        with self.accelerator.autocast():
            return self.call(input_ids, attention_mask, num_tokens)


def _is_fsdp(accelerator) -> bool:
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def is_fresh_adapter(model: nn.Module) -> bool:
    """Whether a PEFT model's active adapters still change nothing: every LoRA B matrix is zero."""
    weights = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(weights) and all(not weight.detach().any() for weight in weights)


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
