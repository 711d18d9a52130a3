"""
Quality of a language model on a text: its perplexity, and its agreement with a reference model on every next token.

Standard errors treat the windows of a text as independent samples. This is an approximation for neighbouring windows,
although no window sees the tokens of another one as context.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .logits import check_windows, evaluation_mode, logits_in_chunks


@dataclass(frozen=True)
class Perplexity:
    """
    Perplexity of a model on windows of text. The first token of each window is context; the others are predicted. Of a
    window that begins with BOS, all tokens of the text are predicted, of another one all but the first.

    Args:
        value (`float`): `exp(nats_per_token)`.
        nats_per_token (`float`): mean negative log-likelihood.
        standard_error (`float`, *optional*):
            Standard error of `nats_per_token` over windows; `None` for a single window. The standard error of `value`
            is `value` times this number.
        tokens (`int`): number of predicted tokens.
    """

    value: float
    nats_per_token: float
    standard_error: float | None
    tokens: int


@dataclass(frozen=True)
class Agreement:
    """
    Agreement of a model's next-token distributions with those of a reference model. Standard errors are over windows
    and are `None` for a single window.

    Args:
        kl (`float`): mean over tokens of `KL(reference ‖ model)`, nats.
        kl_standard_error (`float`, *optional*): its standard error.
        top1 (`float`): fraction of positions at which both models have the same most likely token.
        top1_standard_error (`float`, *optional*): its standard error.
        excess_nats (`float`): `model.nats_per_token − reference.nats_per_token`.
        excess_nats_standard_error (`float`, *optional*): its standard error, paired by window.
        model ([`Perplexity`]): perplexity of the model.
        reference ([`Perplexity`]): perplexity of the reference.
        tokens (`int`): number of predicted tokens.
    """

    kl: float
    kl_standard_error: float | None
    top1: float
    top1_standard_error: float | None
    excess_nats: float
    excess_nats_standard_error: float | None
    model: Perplexity
    reference: Perplexity
    tokens: int


def perplexity(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 1, chunk_size: int = 256) -> Perplexity:
    """
    Measures the perplexity of a model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model. The training flags of its modules are restored afterwards.
        windows (`torch.Tensor` of shape `(n, T)`):
            Integer token ids, without padding.
        batch_size (`int`, *optional*, defaults to `1`):
            Windows in one forward pass.
        chunk_size (`int`, *optional*, defaults to `256`):
            Number of tokens whose float32 logits are held in memory at once.

    Returns:
        [`Perplexity`].
    """
    check_windows(windows, model)
    nats = []
    with evaluation_mode(model):
        for batch in _batches(windows, batch_size, "perplexity"):
            labels = torch.split(batch[:, 1:].flatten(), chunk_size)
            logits = logits_in_chunks(model, batch.to(model.device), chunk_size)
            tokens = torch.cat([_nats(chunk.log_softmax(-1), ids) for chunk, ids in zip(logits, labels, strict=True)])
            nats.append(_window_means(tokens, batch))
    return _perplexity(torch.cat(nats), windows)


def compare(
    model: PreTrainedModel, reference: PreTrainedModel, windows: Tensor, *, batch_size: int = 1, chunk_size: int = 256
) -> Agreement:
    """
    Measures the agreement of a model with a reference that has the same vocabulary.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, for example a quantized one.
        reference ([`~transformers.PreTrainedModel`]):
            Model to compare with. It may be on another device.
        windows (`torch.Tensor` of shape `(n, T)`):
            Integer token ids, without padding.
        batch_size (`int`, *optional*, defaults to `1`):
            Windows in one forward pass.
        chunk_size (`int`, *optional*, defaults to `256`):
            Number of tokens whose float32 logits `(chunk_size, V)` are held in memory at once, for each model.

    Returns:
        [`Agreement`].
    """
    check_windows(windows, model)
    check_windows(windows, reference)
    sizes = [one.config.get_text_config().vocab_size for one in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`model` and `reference` must have vocabularies of one size, got {sizes[0]} and {sizes[1]}. Compare a "
            "model with what it was made from."
        )
    columns = []
    with evaluation_mode(model), evaluation_mode(reference):
        for batch in _batches(windows, batch_size, "agreement"):
            labels = torch.split(batch[:, 1:].flatten(), chunk_size)
            ours = logits_in_chunks(model, batch.to(model.device), chunk_size)
            theirs = logits_in_chunks(reference, batch.to(reference.device), chunk_size)
            tokens = torch.cat([_measure(*chunk) for chunk in zip(ours, theirs, labels, strict=True)])
            columns.append(_window_means(tokens, batch))
    kl, top1, nats, reference_nats = torch.cat(columns).unbind(1)
    return Agreement(
        *_mean(kl),
        *_mean(top1),
        *_mean(nats - reference_nats),
        model=_perplexity(nats, windows),
        reference=_perplexity(reference_nats, windows),
        tokens=_count(windows),
    )


def _measure(logits: Tensor, reference_logits: Tensor, labels: Tensor) -> Tensor:
    """
    Returns four numbers for each token, `(N, 4)`: the KL divergence in nats, whether both models have the same most
    likely token, and the negative log-likelihoods of the model and of the reference.
    """
    log_p, log_q = reference_logits.to(logits.device).log_softmax(-1), logits.log_softmax(-1)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
    # Tokens of probability 0 under the reference contribute nothing, but 0 · (−inf − …) would be NaN.
    kl = (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0).sum(-1)
    return torch.stack([kl, same, _nats(log_q, labels), _nats(log_p, labels)], dim=-1)


def _nats(log_probs: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(log_probs, labels.to(log_probs.device, torch.int64), reduction="none")


def _batches(windows: Tensor, batch_size: int, name: str) -> Iterable[Tensor]:
    # With `disable=None` the bar is shown on terminals only, and `delay` hides it for runs under a second.
    batches: Iterable[Tensor] = tqdm(torch.split(windows, batch_size), desc=name, unit="batch", disable=None, delay=1)
    return batches


def _window_means(tokens: Tensor, batch: Tensor) -> Tensor:
    """Averages values of predicted tokens `(B·(T − 1), …)` over each window: `(B, …)` in float64."""
    return tokens.view(len(batch), -1, *tokens.shape[1:]).double().mean(1).cpu()


def _count(windows: Tensor) -> int:
    return windows.shape[0] * (windows.shape[1] - 1)


def _mean(values: Tensor) -> tuple[float, float | None]:
    """Returns the mean of `(n,)` values, one for each window, and its standard error."""
    n = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else None


def _perplexity(nats: Tensor, windows: Tensor) -> Perplexity:
    mean, error = _mean(nats)
    return Perplexity(math.exp(mean) if mean < 709 else math.inf, mean, error, _count(windows))
