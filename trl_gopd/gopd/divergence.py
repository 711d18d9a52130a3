"""
The exact divergence KL(π ‖ q_λ) between the student and the target of G-OPD, over the whole vocabulary.

The logits of all tokens are never held at once. [`ChunkedHeadLoss`] applies the student's output head to a few tokens
at a time, hands the logits to a function, and makes them again in the backward pass instead of keeping them.
`extrapolated_divergence` is one such function; `stratified.stratified_divergence` is the other.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .objective import LogitTransform, expectation, extrapolate, lambda_is_one


# What [`ChunkedHeadLoss`] calls for a slice of tokens.
Values = Callable[[slice, Tensor], tuple[Tensor | None, ...]]
Gradient = Callable[[slice, Tensor, Tensor, Tensor | None], Tensor]
Gather = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class DivergenceOutput:
    """
    What `extrapolated_divergence` returns; every field is `(N,)` float32 in nats, and the first two have a gradient.

    Args:
        divergence (`torch.Tensor`): KL(π ‖ q_λ).
        student_logps (`torch.Tensor`): Log-probabilities of `labels` under the student.
        teacher_logps (`torch.Tensor`): The same under the teacher.
        reference_logps (`torch.Tensor` or `None`): The same under the reference, when there is one.
        entropy (`torch.Tensor`): Entropy of the student.
        reverse_kl (`torch.Tensor`): KL(π ‖ π*), exact.
        expected_advantage (`torch.Tensor`): E[A] over π, with A of `token_advantages`: log Z_λ − KL(π ‖ q_λ).
    """

    divergence: Tensor
    student_logps: Tensor
    teacher_logps: Tensor
    reference_logps: Tensor | None
    entropy: Tensor
    reverse_kl: Tensor
    expected_advantage: Tensor


def extrapolated_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    target_logits: Callable[[slice], tuple[Tensor, Tensor | None]],
    gopd_lambda: float | Tensor,
    transform: LogitTransform | None = None,
    extrapolation_clip: float | None = None,
    chunk_size: int = 256,
    gather: Gather = nullcontext,
) -> DivergenceOutput:
    """
    KL(π ‖ q_λ) for every token, with q_λ = softmax(λ·z* + (1 − λ)·z_ref), the optimum (eq. 12) of
    [G-OPD](https://huggingface.co/papers/2602.12125) at one state. Its gradient is the expectation over π of the one
    that `token_advantages` estimates from a single token.

    Logits exist for one chunk of tokens at a time, and are made again in the backward pass instead of being kept.
    Where vocabularies are padded to different sizes, the distributions are those over the ids that all models share.

    Args:
        hidden (`torch.Tensor` of shape `(N, D)`):
            Last hidden states of the student, with gradient.
        weight (`torch.Tensor` of shape `(V, D)`):
            Output head of the student; receives a gradient if it requires one.
        bias (`torch.Tensor` of shape `(V,)` or `None`):
            Bias of the head.
        labels (`torch.Tensor` of shape `(N,)`):
            The sampled ids, for the log-probabilities in the output. An id outside the shared vocabulary gets -inf.
        target_logits (`Callable`):
            Given a slice of tokens, returns the tempered logits `(n, V*)` of the teacher and `(n, V_ref)` of the
            reference, or `None` for the latter when every λ is 1. Called once forward and once backward.
        gopd_lambda (`float` or `torch.Tensor` of shape `(N,)`):
            Reward scale λ.
        transform (`LogitTransform`, *optional*):
            What the student does to its raw logits.
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref| for every id of the vocabulary. Not in the paper.
        chunk_size (`int`, *optional*, defaults to `256`):
            Tokens a chunk.
        gather (`Callable`, *optional*):
            Returns a context in which `weight` and the heads behind `target_logits` are whole (ZeRO-3).

    Returns:
        [`DivergenceOutput`].
    """
    # For a chunk of n tokens, z (n, V) the student's tempered logits, π = softmax(z), V the shared vocabulary:
    #   log q = log_softmax(log π* + (λ − 1)·clip(log π* − log π_ref))
    #   g = log π − log q,   KL = Σ π g,   ∂KL/∂z = π (g − KL)
    # The "+1" of ∂(π log π) drops out since the entries of ∂π sum to 0.

    def target(rows: slice, log_t: Tensor, log_r: Tensor | None) -> tuple[Tensor, Tensor]:
        return extrapolate(
            teacher_logps=log_t,
            reference_logps=log_r,
            gopd_lambda=rows_of(gopd_lambda, rows),
            extrapolation_clip=extrapolation_clip,
        )

    def values(rows: slice, logits: Tensor) -> tuple[Tensor | None, ...]:
        student, log_t, log_r = _shared_log_probs(logits, *target_logits(rows))
        log_q, log_z = target(rows, log_t, log_r)
        probs, label = student.exp(), labels[rows].unsqueeze(1)
        divergence = expectation(probs, student - log_q)
        return (
            divergence,
            gather_ids(student, label).squeeze(1),
            gather_ids(log_t, label).squeeze(1),
            None if log_r is None else gather_ids(log_r, label).squeeze(1),
            -expectation(probs, student),
            divergence if lambda_is_one(rows_of(gopd_lambda, rows)) else expectation(probs, student - log_t),
            log_z - divergence,
        )

    def gradient(rows: slice, logits: Tensor, of_divergence: Tensor, of_logps: Tensor | None) -> Tensor:
        student, log_t, log_r = _shared_log_probs(logits, *target_logits(rows))
        log_q, _ = target(rows, log_t, log_r)
        probs = student.exp()
        gap = (student - log_q).masked_fill(probs == 0, 0.0)
        grad = probs * (gap - (probs * gap).sum(1, keepdim=True)) * of_divergence
        return grad if of_logps is None else add_label_gradient(grad, probs, labels[rows].unsqueeze(1), of_logps)

    outputs = ChunkedHeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        values,
        gradient,
        len(fields(DivergenceOutput)),
        transform or LogitTransform(),
        chunk_size,
        gather,
    )
    return DivergenceOutput(*outputs)


class ChunkedHeadLoss(torch.autograd.Function):
    """
    Per-token values of the student's tempered logits, which exist for one chunk of tokens at a time.

    Two functions say what the values are:

    - `values(rows, logits)` returns a tuple of `(n,)` tensors or `None`, from a slice of n tokens and their tempered
      logits `(n, V)`. The first two values have a gradient.
    - `gradient(rows, logits, of_first, of_second)` returns the gradient `(n, V')` of the first V' logits in the
      backward pass, where the factors `(n, 1)` are the gradients of the first two values. `of_second` is `None` when
      nothing depends on the second value.

    The head is applied in the dtype of the hidden states, or in that of autocast where it is enabled, as torch would
    apply a linear layer. The backward pass, which runs outside autocast, makes the same logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Values,
        gradient: Gradient,
        num_values: int,
        transform: LogitTransform,
        chunk_size: int,
        gather: Gather,
    ) -> tuple[Tensor | None, ...]:
        dtype = _product_dtype(hidden)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.arguments = (gradient, transform, chunk_size, gather, dtype)
        with gather(), torch.autocast(hidden.device.type, enabled=False):
            head = _cast_head(weight, bias, dtype)
            slices = chunk_slices(len(hidden), chunk_size)
            chunks = [values(rows, transform(F.linear(hidden[rows].to(dtype), *head))) for rows in slices]
        outputs = tuple(_joined(parts) for parts in zip(*chunks, strict=True))
        if not chunks:  # no token: zeros of length 0 that are still part of the graph
            outputs = tuple(hidden.new_zeros(0, dtype=torch.float32) for _ in range(num_values))
        ctx.mark_non_differentiable(*[output for output in outputs[2:] if output is not None])
        ctx.set_materialize_grads(False)  # a loss that does not use the second value should not pay for its gradient
        return outputs

    @staticmethod
    def backward(ctx: Any, of_first: Tensor | None, of_second: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        gradient, transform, chunk_size, gather, dtype = ctx.arguments
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if of_first is None:
            of_first = torch.zeros(len(hidden), device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        with gather(), torch.autocast(hidden.device.type, enabled=False):
            head = _cast_head(weight, bias, dtype)
            # float32 sums: many small chunks added in bfloat16 would stop moving the total
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
            for rows in chunk_slices(len(hidden), chunk_size):
                inputs = hidden[rows].to(dtype)
                logits = transform(F.linear(inputs, *head))
                second = None if of_second is None else of_second[rows].float().unsqueeze(1)
                grad = gradient(rows, logits, of_first[rows].float().unsqueeze(1), second)
                shared = grad.size(1)
                raw = transform.backward(grad, logits[:, :shared]).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = raw @ head[0][:shared]
                if grad_weight is not None:
                    _add_product(grad_weight[:shared], raw.t(), inputs)
                if grad_bias is not None:
                    grad_bias[:shared] += raw.float().sum(0)
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """One value of all chunks, or `None` if they do not have it."""
    whole = [part for part in parts if part is not None]
    return torch.cat(whole) if whole else None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a matrix product in place to a float32 total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)  # half the time of a product and a sum
    else:
        total += (left @ right).float()


def add_label_gradient(grad: Tensor, probs: Tensor, label: Tensor, of_logps: Tensor) -> Tensor:
    """
    Adds the gradient of the labels' log-probabilities, ∂ log π_y/∂z_v = 1{v = y} − π_v, times a factor `(n, 1)`. A
    label to which the student gives the probability 0 adds nothing.
    """
    inside = label < probs.size(1)
    index = label.masked_fill(~inside, 0)
    factor = torch.where(inside & (probs.gather(1, index) > 0), of_logps, 0.0)
    return (grad - probs * factor).scatter_add_(1, index, factor)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which torch would apply a linear layer to `hidden`; autocast leaves float64 as it is."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _cast_head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _shared_log_probs(
    student: Tensor, teacher: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities `(n, V)` of the three models over the ids that all of them have, from their logits."""
    shared = min(x.size(1) for x in (student, teacher, reference) if x is not None)
    log_s = student[:, :shared].log_softmax(1)
    log_t = teacher[:, :shared].float().log_softmax(1)
    log_r = None if reference is None else reference[:, :shared].float().log_softmax(1)
    return log_s, log_t, log_r


def gather_ids(logps: Tensor, ids: Tensor) -> Tensor:
    """Entries of `logps` `(n, V)` at `ids` `(n, m)`; -inf for ids that are not among the V."""
    outside = ids >= logps.size(1)
    return logps.gather(1, ids.masked_fill(outside, 0)).masked_fill(outside, -math.inf)


def rows_of(gopd_lambda: float | Tensor, rows: slice) -> float | Tensor:
    """λ of some rows; a λ that all rows share is returned as it is."""
    return gopd_lambda[rows] if isinstance(gopd_lambda, Tensor) and gopd_lambda.dim() else gopd_lambda


def chunk_slices(length: int, chunk_size: int) -> list[slice]:
    """Slices of at most `chunk_size` that cover `length` in order; the last one may be smaller."""
    return [slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]
