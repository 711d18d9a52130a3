"""
Frozen models in this process, and log-probabilities of sampled tokens under them: `(B, T)` floats, never `(B, T, V)`
logits.

The backbone runs on groups of rows of like length, without those that have nothing to score; the output head is
applied to the hidden states of scored tokens, a chunk of tokens at a time.
"""

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...digests import config_digest
from .._trl import gather_heads
from ..batch import Sequences
from ..divergence import chunk_slices
from ..stratified import log_probs_at
from .head import check_head, logit_transform
from .identity import is_sharded, weights_digest
from .offload import Offload
from .protocols import LogitScorer
from .sharding import shard as shard_over_ranks
from .spread import Budget, GroupFunction, over_groups


logger = logging.getLogger(__name__)


def context_of(config: Any) -> int | None:
    """How many tokens a model of this configuration can read, if it says so."""
    config = config.get_text_config()
    context: int | None = getattr(config, "max_position_embeddings", None)
    if context is None:
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    # one dictionary, or one for each kind of layers
    for rope in (parameters, *parameters.values()):
        # These stretch the positions of a shorter context, of which `max_position_embeddings` may still be the length.
        if isinstance(rope, Mapping) and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            context = max(context, int(original * float(rope.get("factor") or 1.0)))
    return context


def vocab_size_of(config: Any) -> int:
    """Width of the logits of a model of this configuration, padding included."""
    return int(config.get_text_config().vocab_size)


def can_pack(config: Any) -> bool:
    """
    Whether rows may stand one after another in one sequence, told apart by their positions: with flash attention,
    which then reads no padding, and without layers that carry a state along. Other attention would pay for the mask.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return "flash" in (config._attn_implementation or "") and kinds <= {"full_attention", "sliding_attention"}


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

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states `(B, L, D)`. Rows begin at the first column, or several stand in one with their positions."""
        # An id that only the student's padded vocabulary has would be out of range here; it scores -inf later.
        input_ids = input_ids.masked_fill(input_ids >= self.vocab_size, 0)
        positions = {} if position_ids is None else {"position_ids": position_ids}
        # The backbone of the base model runs the adapters too: PEFT puts its layers inside it.
        hidden: Tensor = self.base.base_model(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
        return hidden


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
            Rows a forward, if all were as long as the longest.
        chunk_size (`int`):
            Tokens whose logits exist at a time.
        batch_tokens (`int`, *optional*):
            Positions a forward, instead of `batch_size`.
        offload (`bool`, *optional*, defaults to `False`):
            Keep the weights in CPU memory, and have them on the device while a batch is scored. Models that are
            quantized, placed by a device map or sharded stay where they are.
        shard (`bool`, *optional*, defaults to `False`):
            Shard the model by ZeRO-3 where DeepSpeed does not shard the student.

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
        batch_tokens: int | None = None,
        offload: bool = False,
        shard: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.chunk_size = chunk_size
        self.inner = FrozenModel(model, temperature)
        base = self.inner.base
        is_placed = getattr(base, "is_quantized", False) or len(getattr(base, "hf_device_map", {}) or {}) > 1
        self._is_sharded = not is_placed and (shard or is_sharded(accelerator))
        self._offload: Offload | None = None
        self.call: Any = self.inner
        if self._is_sharded:
            self.call = shard_over_ranks(self.inner, accelerator)
        else:
            if not is_placed:
                if offload:
                    self._offload = Offload(self.inner.to("cpu"), accelerator.device)
                else:
                    self.inner.to(accelerator.device)
            head = functools.partial(project, self.inner.head)
            check_head(model, base, project=head, transform=self.inner.transform, role=role, hidden=self._predicting)
        self.budget = Budget(batch_size, batch_tokens, is_packed=can_pack(self.inner.config) and self._packs(role))

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
            return score_groups(self, sequences, self.budget, self._states, chunk_size=self.chunk_size)

    @torch.no_grad()
    def hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states `(N, D)` from which the N scored tokens are predicted, row by row."""
        with self.accelerator.autocast():
            return over_groups(self._states, sequences, self.budget, is_sharded=self.is_sharded)

    def _states(self, group: Sequences) -> Tensor:
        """Hidden states `(n, D)` from which the scored tokens of rows that begin at the first column are predicted."""
        ids, scored = group.input_ids[:, :-1], group.scored
        if not self.budget.is_packed or len(group) == 1:
            # Nothing sees what comes after it, so padding on the right needs no mask.
            states: Tensor = self.call(ids)
            return states[scored.to(states.device)]
        read = group.attention_mask[:, 1:].bool()  # the last token of a row predicts nothing
        positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)[read]
        states = self.call(ids[read].unsqueeze(0), position_ids=positions.unsqueeze(0))[0]
        return states[scored[read].to(states.device)]

    def prefetch(self) -> None:
        """Begins to copy weights that wait in CPU memory to the device, if there is room."""
        if self._offload is not None:
            self._offload.prefetch()

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

    def _predicting(self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
        """Hidden states `(B, num_tokens, D)` from which the last ids of rows without padding are predicted."""
        states: Tensor = self.inner(input_ids)
        return states[:, -num_tokens - 1 : -1]

    def _on_device(self) -> AbstractContextManager[None]:
        return nullcontext() if self._offload is None else self._offload.on_device()

    @torch.no_grad()
    def _packs(self, role: str) -> bool:
        """Whether a row that stands after another in one sequence does not see it, which attention has to support."""
        device = self.accelerator.device
        length = 8
        positions = torch.arange(length, device=device).repeat(2).unsqueeze(0)
        states = []
        with self._on_device(), self.accelerator.autocast():
            for first in (0, length):
                ids = torch.arange(length, device=device).repeat(2)
                ids[:length] += first
                ids %= self.inner.vocab_size
                states.append(self.call(ids.unsqueeze(0), position_ids=positions)[0, length:].float())
        # The same operations on the same numbers; a mixture of experts may add them in another order.
        gap, tolerance = (states[0] - states[1]).abs().max(), 4 * torch.finfo(self.inner.base.dtype).eps
        is_apart = bool(gap <= tolerance * states[0].abs().max())
        if not is_apart:
            logger.warning(
                "`%s` (%s) does not keep rows apart that stand in one sequence, so they are padded instead.",
                role,
                type(self.inner.base).__name__,
            )
        return is_apart


def score_in_chunks(
    scorer: LogitScorer,
    sequences: Sequences,
    *,
    batch_size: int,
    chunk_size: int = 256,
    batch_tokens: int | None = None,
) -> Tensor:
    """
    Log-probabilities of the scored tokens under a model in this process.

    Args:
        scorer ([`LogitScorer`]):
            The model.
        sequences ([`Sequences`]):
            What it reads, B rows with completions of T columns.
        batch_size (`int`):
            Rows a forward, if all were as long as the longest.
        chunk_size (`int`, *optional*, defaults to `256`):
            Tokens whose logits exist at a time.
        batch_tokens (`int`, *optional*):
            Positions a forward, instead of `batch_size`.

    Returns:
        `torch.Tensor` of shape `(B, T)`: float32 nats; -inf for ids that the model does not have, 0 for tokens that
        are not scored.
    """
    return score_groups(scorer, sequences, Budget(batch_size, batch_tokens), scorer.hidden, chunk_size=chunk_size)


@torch.no_grad()
def score_groups(
    scorer: LogitScorer, sequences: Sequences, budget: Budget, states: GroupFunction, *, chunk_size: int
) -> Tensor:
    """
    As [`score_in_chunks`].

    Args:
        scorer ([`LogitScorer`]):
            The model.
        sequences ([`Sequences`]):
            What it reads, B rows with completions of T columns.
        budget ([`Budget`]):
            How much a forward holds.
        states (`Callable`):
            Hidden states from which the scored tokens of a group of rows are predicted.
        chunk_size (`int`):
            Tokens whose logits exist at a time.
    """

    def log_probs(group: Sequences) -> Tensor:
        hidden, labels = states(group), group.completion_ids[group.scored].unsqueeze(1)
        with gather_heads(scorer.head):
            picked = [
                log_probs_at(scorer.logits(hidden[chunk]).to(labels.device), labels[chunk]).squeeze(1)
                for chunk in chunk_slices(len(hidden), chunk_size)
            ]
        return torch.cat([torch.zeros(0, device=labels.device), *picked])

    values = over_groups(log_probs, sequences, budget, is_sharded=scorer.is_sharded)
    logps = torch.zeros(sequences.scored.shape, dtype=torch.float32, device=sequences.input_ids.device)
    logps[sequences.scored] = values
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
