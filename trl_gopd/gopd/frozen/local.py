"""
Frozen models in this process, and log-probabilities of sampled tokens under them: `(B, T)` floats, never `(B, T, V)`
logits.

The backbone runs once on whole sequences; the output head is applied to the hidden states of scored tokens, a chunk of
tokens at a time.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._trl import gather_heads, prepare_deepspeed, prepare_fsdp
from ..batch import Sequences
from ..divergence import chunk_slices
from ..stratified import log_probs_at
from .head import check_head, logit_transform
from .identity import config_digest, is_sharded, uses_fsdp, weights_digest
from .protocols import LogitScorer


def context_of(config: Any) -> int | None:
    """How many tokens a model of this configuration can read, if it says so."""
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context


def vocab_size_of(config: Any) -> int:
    """Width of the logits of a model of this configuration, padding included."""
    return int(config.get_text_config().vocab_size)


def project(head: nn.Module, hidden: Tensor) -> Tensor:
    """
    Raw logits `(N, V)` of hidden states `(N, D)`.

    A plain linear head is applied as a function, so that its weight can be gathered once for many chunks (ZeRO-3
    and FSDP2, where ranks hold different numbers of chunks); any other head (quantized, adapted) is called.
    """
    if type(head) is nn.Linear:
        weight, bias = getattr(head, "whole", (head.weight, head.bias))
        return F.linear(hidden.to(weight.dtype), weight, bias)
    raw: Tensor = head(hidden)
    return raw


class FrozenModel(nn.Module):
    """
    A causal language model that is only ever scored: no gradient, no dropout, untouched otherwise.

    It is a module, so that DeepSpeed and FSDP can shard it, and the model inside is not patched.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. It is put in evaluation mode and its parameters stop requiring gradients.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature that divides the logits.
    """

    model: Any  # to a type checker, every method of a module may be a tensor
    config: Any

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.transform = logit_transform(model.config, temperature)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model under a PEFT wrapper, or the model itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def head(self) -> nn.Module:
        """Output head."""
        head: nn.Module = self.base.get_output_embeddings()
        return head

    @property
    def vocab_size(self) -> int:
        """Width of the logits, padding included."""
        return vocab_size_of(self.config)

    def logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits `(N, V)` of hidden states `(N, D)`."""
        return self.transform(project(self.head, hidden))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
        """Hidden states `(B, num_tokens, D)` from which the last `num_tokens` ids are predicted."""
        # An id that only the student's padded vocabulary has would be out of range here; it scores -inf later.
        input_ids = input_ids.masked_fill(input_ids >= self.vocab_size, 0)
        # The backbone of the base model runs the adapters too: PEFT puts its layers inside it.
        hidden: Tensor = self.base.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return hidden[:, -num_tokens - 1 : -1]


class LocalScorer:
    """
    A frozen model of its own, placed for the run.

    Args:
        model (`torch.nn.Module`):
            The model. Put in evaluation mode; its parameters stop requiring gradients.
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed.
        temperature (`float`):
            Sampling temperature.
        role (`str`):
            For messages.
        batch_size (`int`):
            Rows a forward.
        chunk_size (`int`):
            Tokens whose logits exist at a time.
        offload (`bool`, *optional*, defaults to `False`):
            Keep the weights in CPU memory, and have them on the device while a batch is scored. Models that are
            quantized, placed by a device map or sharded stay where they are.

    Raises:
        `ValueError`: If the logits of the model cannot be computed from its hidden states and its configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        accelerator: Any,
        temperature: float,
        role: str,
        batch_size: int,
        chunk_size: int,
        offload: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.batch_size, self.chunk_size = batch_size, chunk_size
        self.inner = FrozenModel(model, temperature)
        base = self.inner.base
        is_placed = getattr(base, "is_quantized", False) or len(getattr(base, "hf_device_map", {}) or {}) > 1
        self._is_sharded = not is_placed and is_sharded(accelerator)
        self._offload = offload and not is_placed and not self._is_sharded
        if not is_placed and not self._is_sharded:
            self.inner.to("cpu" if self._offload else accelerator.device)
        self.call: Any = self.inner
        if self._is_sharded:
            prepare = prepare_fsdp if uses_fsdp(accelerator) else prepare_deepspeed
            self.call = prepare(self.inner, accelerator)
        else:
            head = functools.partial(project, self.inner.head)
            check_head(model, base, project=head, transform=self.inner.transform, role=role, hidden=self.inner.forward)

    @property
    def is_sharded(self) -> bool:
        """Whether all ranks have to call it together."""
        return self._is_sharded

    @property
    def context(self) -> int | None:
        """How many tokens it can read, if that is known."""
        return context_of(self.inner.config)

    @property
    def vocab_size(self) -> int:
        """Width of the logits, padding included."""
        return self.inner.vocab_size

    @property
    def head(self) -> nn.Module:
        """Output head, whose weight may have to be gathered."""
        return self.inner.head

    def score(self, sequences: Sequences) -> Tensor:
        """Log-probabilities `(B, T)` of the scored tokens in float32 nats; 0 for the other tokens."""
        with self._on_device(), self.accelerator.autocast():
            return score_in_chunks(self, sequences, batch_size=self.batch_size, chunk_size=self.chunk_size)

    @torch.no_grad()
    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states `(N, D)` from which the N scored tokens are predicted, row by row."""
        with self.accelerator.autocast():
            hidden = self.call(sequences.input_ids, sequences.attention_mask, sequences.num_tokens)
        states: Tensor = hidden[sequences.scored.to(hidden.device)]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Tempered float32 logits `(N, V)` of hidden states `(N, D)`."""
        return self.inner.logits(hidden)

    def identity(self) -> dict[str, Any]:
        """Name, revision, and checksums of the weights and of the configuration."""
        base = self.inner.base
        return {
            "name": base.config._name_or_path or type(base).__name__,
            "revision": getattr(base.config, "_commit_hash", None),
            "weights": None if self.is_sharded else weights_digest(self.inner.model),
            "config": config_digest(base.config),
        }

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


@torch.no_grad()
def score_in_chunks(scorer: LogitScorer, sequences: Sequences, *, batch_size: int, chunk_size: int = 256) -> Tensor:
    """
    Log-probabilities of the scored tokens under a model in this process.

    Args:
        scorer ([`LogitScorer`]):
            The model.
        sequences ([`Sequences`]):
            What it reads, B rows with completions of T columns.
        batch_size (`int`):
            Rows a forward.
        chunk_size (`int`, *optional*, defaults to `256`):
            Tokens whose logits exist at a time.

    Returns:
        `torch.Tensor` of shape `(B, T)`: float32 nats; -inf for ids that the model does not have, 0 for tokens that
        are not scored.
    """
    logps = torch.zeros(sequences.scored.shape, dtype=torch.float32, device=sequences.input_ids.device)
    for rows in chunk_slices(len(sequences), batch_size):
        part = sequences[rows]
        everything = Sequences(part.input_ids, part.attention_mask, torch.ones_like(part.scored))
        hidden, labels = scorer.hidden(everything), part.completion_ids.flatten().unsqueeze(1)
        with gather_heads(scorer.head):
            picked = [
                log_probs_at(scorer.logits(hidden[chunk]).to(labels.device), labels[chunk])
                for chunk in chunk_slices(len(hidden), chunk_size)
            ]
        if picked:
            logps[rows] = torch.cat(picked).view(part.scored.shape).masked_fill(~part.scored, 0.0)
    return logps


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the body; every submodule gets its own mode back, after errors too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
