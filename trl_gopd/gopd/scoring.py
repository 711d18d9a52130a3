"""
Log-probabilities of the sampled tokens under a frozen model: `(B, T)` floats, never `(B, T, V)` logits.

The backbone runs once on whole sequences; the output head is applied to the completion's hidden states, a chunk of
tokens at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .objective import LogitTransform


def logit_transform(config: Any, temperature: float = 1.0) -> LogitTransform:
    """
    What a model does to the output of its head, read from its configuration.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model, or of its text part.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.

    Returns:
        [`LogitTransform`].
    """
    config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse, Falcon-H1
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        scaling = getattr(config, "logits_scaling", None)  # Granite divides by it, HyperCLOVA X multiplies
        if scaling is not None:
            scale = float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None), temperature)


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
    def base(self) -> Any:
        """The transformers model under a PEFT wrapper, or the model itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def head(self) -> Any:
        """Output head."""
        return self.base.get_output_embeddings()

    @property
    def vocab_size(self) -> int:
        """Width of the logits, padding included."""
        return int(self.config.get_text_config().vocab_size)

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


@torch.no_grad()
def score(
    frozen: Callable[..., Tensor],
    inner: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_ids: Tensor,
    *,
    batch_size: int,
    chunk_size: int = 256,
    gather: Callable[[nn.Module], AbstractContextManager[Any]] = lambda head: nullcontext(),
) -> Tensor:
    """
    Log-probabilities of `completion_ids` under a frozen model.

    Args:
        frozen (`Callable`):
            What to call for the hidden states: `inner`, or the engine that wraps it.
        inner ([`FrozenModel`]):
            The frozen model, or whatever has its `head` and `logits`.
        input_ids (`torch.Tensor` of shape `(B, L)`):
            Prompts, padded left, and completions, padded right.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            1 where a token is seen.
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            The last `T` columns of `input_ids`.
        batch_size (`int`):
            Rows a forward.
        chunk_size (`int`, *optional*, defaults to `256`):
            Tokens whose logits exist at a time.
        gather (`Callable`, *optional*):
            Given the head, returns a context in which its weight is whole.

    Returns:
        `torch.Tensor` of shape `(B, T)`: float32 nats; -inf for ids that the model does not have.
    """
    rows = []
    for start in range(0, len(input_ids), batch_size):
        part = slice(start, start + batch_size)
        hidden = frozen(input_ids[part], attention_mask[part], completion_ids.size(1))
        with gather(inner.head):
            rows.append(_token_log_probs(inner, hidden, completion_ids[part], chunk_size))
    return torch.cat(rows)


def _token_log_probs(inner: Any, hidden: Tensor, ids: Tensor, chunk_size: int) -> Tensor:
    flat, labels = hidden.flatten(0, 1), ids.flatten()
    picked = []
    for start in range(0, len(flat), chunk_size):
        logits = inner.logits(flat[start : start + chunk_size]).to(labels.device)
        label = labels[start : start + chunk_size]
        outside = label >= logits.size(-1)
        value = logits.gather(-1, label.masked_fill(outside, 0).unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        picked.append(value.masked_fill(outside, -torch.inf))
    return torch.cat(picked).view(ids.shape) if picked else hidden.new_zeros(ids.shape, dtype=torch.float32)


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
