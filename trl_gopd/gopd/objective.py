"""
The objective of [G-OPD](https://huggingface.co/papers/2602.12125), on tensors alone.

At a state s the student π is rewarded with λ·(log π* − log π_ref) under a KL penalty of weight 1 towards π_ref, where
π* is the teacher. Up to a constant of the state this is

    KL(π ‖ q_λ),    log q_λ = log π* + (λ − 1)·(log π* − log π_ref) − log Z_λ

so λ = 1 is plain on-policy distillation, in which π_ref cancels, and λ > 1 extrapolates past the teacher. Two
estimators of the same gradient:

- `token_advantages`: one sampled token (the paper's). Its expectation over π is the second one.
- `extrapolated_divergence`: the whole vocabulary, without the noise of the sampled action.

Both treat the state distribution as given (discount 0), as the paper does.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor


def implicit_rewards(
    *, teacher_logps: Tensor, reference_logps: Tensor, extrapolation_clip: float | None = None
) -> Tensor:
    """
    Implicit reward log π* − log π_ref of eq. 10 of [G-OPD](https://huggingface.co/papers/2602.12125), in nats.

    Args:
        teacher_logps (`torch.Tensor`):
            Log-probabilities under the teacher, any shape.
        reference_logps (`torch.Tensor`):
            Log-probabilities under the reference, same shape.
        extrapolation_clip (`float`, *optional*):
            Bound c: rewards are clipped to [−c, c]. With it, |log q_λ/π*| ≤ 2·|λ − 1|·c. Not in the paper.

    Returns:
        `torch.Tensor`: float32, detached, same shape.
    """
    rewards = teacher_logps.detach().float() - reference_logps.detach().float()
    return rewards if extrapolation_clip is None else rewards.clamp(-extrapolation_clip, extrapolation_clip)


def token_advantages(
    *,
    student_logps: Tensor,
    teacher_logps: Tensor,
    reference_logps: Tensor | None,
    mask: Tensor,
    gopd_lambda: float | Tensor,
    extrapolation_clip: float | None = None,
) -> Tensor:
    """
    Per-token advantages A_t = (log π* − log π) + (λ − 1)·(log π* − log π_ref): the negated bracket of eq. 14 of
    [G-OPD](https://huggingface.co/papers/2602.12125), which minimises where we maximise.

    Args:
        student_logps (`torch.Tensor` of shape `(B, T)`):
            Nats of the sampled tokens under the student. No gradient flows through it.
        teacher_logps (`torch.Tensor` of shape `(B, T)`):
            Nats of the sampled tokens under the teacher.
        reference_logps (`torch.Tensor` of shape `(B, T)` or `None`):
            Nats of the sampled tokens under the reference. May be `None` only when every λ is 1.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token is trained on. Elsewhere the advantage is 0, whatever the other tensors hold.
        gopd_lambda (`float` or `torch.Tensor` of shape `(B,)`, `(B, 1)` or `(B, T)`):
            Reward scale λ: one for all, one a row, or one a token.
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref|, on the extrapolation term alone: λ = 1 is untouched by it. Not in the paper.

    Returns:
        `torch.Tensor` of shape `(B, T)`: float32, detached.

    Raises:
        `ValueError`: If some λ differs from 1 and `reference_logps` is `None`.

    Example:

    ```python
    >>> import torch
    >>> from trl_gopd.gopd.objective import token_advantages
    >>> token_advantages(
    ...     student_logps=torch.tensor([[-2.0]]),
    ...     teacher_logps=torch.tensor([[-1.0]]),
    ...     reference_logps=torch.tensor([[-3.0]]),
    ...     mask=torch.ones(1, 1),
    ...     gopd_lambda=1.5,
    ... )
    tensor([[2.]])

    ```
    """
    advantages = teacher_logps.detach().float() - student_logps.detach().float()
    if not lambda_is_one(gopd_lambda):  # at 1 the reference cancels and may not even be loaded
        if reference_logps is None:
            raise ValueError(f"`gopd_lambda={gopd_lambda}` needs `reference_logps`, got None. Pass it, or use 1.")
        scale = _per_token(gopd_lambda, advantages) - 1
        rewards = implicit_rewards(
            teacher_logps=teacher_logps, reference_logps=reference_logps, extrapolation_clip=extrapolation_clip
        )
        # `where`, since a row at λ = 1 may meet an infinite reward, and 0 * inf is NaN.
        advantages = advantages + torch.where(scale == 0, 0.0, scale * rewards)
    # Not a product: padding may hold -inf or NaN, and NaN * 0 is NaN.
    return advantages.masked_fill(mask == 0, 0.0)


def lambda_is_one(gopd_lambda: float | Tensor) -> bool:
    """Whether every λ is exactly 1, so that the reference is neither needed nor read."""
    return bool((gopd_lambda == 1).all()) if isinstance(gopd_lambda, Tensor) else gopd_lambda == 1


def _per_token(gopd_lambda: float | Tensor, like: Tensor) -> Tensor:
    """λ as a float32 tensor that broadcasts against `(B, T)`."""
    scale = torch.as_tensor(gopd_lambda, dtype=torch.float32, device=like.device)
    return scale.unsqueeze(1) if scale.dim() == 1 else scale


@dataclass(frozen=True)
class LogitTransform:
    """
    What a model does to the output of its head before the softmax, and the sampling temperature.

    Args:
        scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the raw logits (Cohere, Granite, Falcon-H1 and others).
        softcap (`float`, *optional*):
            Soft cap c of `c·tanh(z/c)`, applied after the scale (Gemma).
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits last.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        """Tempered logits in float32, from the raw output of the head, any shape."""
        logits = raw.float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient of the raw output, from that of the tempered logits and their value."""
        grad = grad * (self.scale / self.temperature)
        if self.softcap is not None:
            grad = grad * (1 - (logits * self.temperature / self.softcap).square())
        return grad


@dataclass(frozen=True)
class DivergenceOutput:
    """
    What `extrapolated_divergence` returns; every field is `(N,)` float32 in nats, and only the first has a gradient.

    Args:
        divergence (`torch.Tensor`): KL(π ‖ q_λ).
        student_logps (`torch.Tensor`): Log-probabilities of `labels` under the student.
        teacher_logps (`torch.Tensor`): The same under the teacher.
        reference_logps (`torch.Tensor` or `None`): The same under the reference, when there is one.
        entropy (`torch.Tensor`): Entropy of the student.
        reverse_kl (`torch.Tensor`): KL(π ‖ π*), exact.
    """

    divergence: Tensor
    student_logps: Tensor
    teacher_logps: Tensor
    reference_logps: Tensor | None
    entropy: Tensor
    reverse_kl: Tensor


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
    gather: Callable[[], AbstractContextManager[Any]] = nullcontext,
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
    outputs = _ExtrapolatedDivergence.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        labels,
        target_logits,
        gopd_lambda,
        transform or LogitTransform(),
        extrapolation_clip,
        chunk_size,
        gather,
    )
    return DivergenceOutput(*outputs)


class _ExtrapolatedDivergence(torch.autograd.Function):
    # For a chunk of n tokens, z (n, V) the student's tempered logits, π = softmax(z), V the shared vocabulary:
    #   log q = log_softmax(log π* + (λ − 1)·clip(log π* − log π_ref))
    #   g = log π − log q,   KL = Σ π g,   ∂KL/∂z = π (g − KL)
    # The "+1" of ∂(π log π) drops out since the entries of ∂π sum to 0.

    @staticmethod
    @no_type_check
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        labels,
        target_logits,
        gopd_lambda,
        transform,
        extrapolation_clip,
        chunk_size,
        gather,
    ):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.args = (target_logits, gopd_lambda, transform, extrapolation_clip, chunk_size, gather)
        columns: dict[str, list[Tensor]] = {}
        with gather(), _no_autocast(hidden):
            head = _head_like(hidden, weight, bias)
            for rows in _chunks(len(hidden), chunk_size):
                logits = transform(F.linear(hidden[rows], *head))
                teacher, reference = target_logits(rows)
                student, log_q, log_t, log_r = _log_probs(
                    logits, teacher, reference, _rows_of(gopd_lambda, rows), extrapolation_clip
                )
                probs = student.exp()
                divergence = _expectation(probs, student - log_q)
                values = {
                    "divergence": divergence,
                    "student_logps": _gather_ids(student, labels[rows]),
                    "teacher_logps": _gather_ids(log_t, labels[rows]),
                    "reference_logps": None if log_r is None else _gather_ids(log_r, labels[rows]),
                    "entropy": -_expectation(probs, student),
                    "reverse_kl": divergence if log_q is log_t else _expectation(probs, student - log_t),
                }
                for name, value in values.items():
                    if value is not None:
                        columns.setdefault(name, []).append(value)
        names = ("divergence", "student_logps", "teacher_logps", "reference_logps", "entropy", "reverse_kl")
        outputs = tuple(torch.cat(columns[name]) if name in columns else None for name in names)
        if not len(hidden):  # no token: zeros of length 0 that still hang in the graph
            outputs = tuple(hidden.new_zeros(0, dtype=torch.float32) for _ in names)
        ctx.mark_non_differentiable(*[output for output in outputs[1:] if output is not None])
        return outputs

    @staticmethod
    @no_type_check
    def backward(ctx, grad_divergence, *_):
        hidden, weight, bias = ctx.saved_tensors
        target_logits, gopd_lambda, transform, extrapolation_clip, chunk_size, gather = ctx.args
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        with gather(), _no_autocast(hidden):
            head = _head_like(hidden, weight, bias)
            # float32 sums: many small chunks added in bfloat16 would stop moving the total
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
            for rows in _chunks(len(hidden), chunk_size):
                logits = transform(F.linear(hidden[rows], *head))
                student, log_q, _, _ = _log_probs(
                    logits, *target_logits(rows), _rows_of(gopd_lambda, rows), extrapolation_clip
                )
                probs = student.exp()
                gap = (student - log_q).masked_fill(probs == 0, 0.0)
                grad = probs * (gap - (probs * gap).sum(-1, keepdim=True)) * grad_divergence[rows].float().unsqueeze(1)
                shared = grad.size(-1)
                raw = transform.backward(grad, logits[:, :shared]).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = raw @ head[0][:shared]
                if grad_weight is not None:
                    if raw.dtype == grad_weight.dtype:
                        grad_weight[:shared].addmm_(raw.t(), hidden[rows])  # half the time of a product and a sum
                    else:
                        grad_weight[:shared] += (raw.t() @ hidden[rows]).float()
                if grad_bias is not None:
                    grad_bias[:shared] += raw.float().sum(0)
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None, None


def _no_autocast(hidden: Tensor) -> AbstractContextManager[Any]:
    # The backward pass runs outside autocast, so the dtypes are written out in both.
    return torch.autocast(hidden.device.type, enabled=False)


def _head_like(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head in the dtype of the hidden states, as autocast would cast it."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _log_probs(
    student: Tensor, teacher: Tensor, reference: Tensor | None, gopd_lambda: float | Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Log-probabilities `(n, V)` of student, q_λ, teacher and reference over the ids that all of them have."""
    shared = min(x.size(-1) for x in (student, teacher, reference) if x is not None)
    log_s = student[:, :shared].log_softmax(-1)
    log_t = teacher[:, :shared].float().log_softmax(-1)
    log_r = None if reference is None else reference[:, :shared].float().log_softmax(-1)
    if lambda_is_one(gopd_lambda):
        return log_s, log_t, log_t, log_r
    if log_r is None:
        raise ValueError(f"`gopd_lambda={gopd_lambda}` needs the logits of a reference, got None. Pass it, or use 1.")
    rewards = implicit_rewards(teacher_logps=log_t, reference_logps=log_r, extrapolation_clip=clip)
    log_q = (log_t + (_per_token(gopd_lambda, log_t) - 1) * rewards).log_softmax(-1)
    return log_s, log_q, log_t, log_r


def _expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Σ_v probs·values, where an id of probability 0 counts 0 even if its value is infinite."""
    return (probs * values.masked_fill(probs == 0, 0.0)).sum(-1)


def _gather_ids(logps: Tensor, labels: Tensor) -> Tensor:
    """Entries of `logps` `(n, V)` at `labels` `(n,)`; -inf for ids that are not among the V."""
    outside = labels >= logps.size(-1)
    picked = logps.gather(-1, labels.masked_fill(outside, 0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(outside, -math.inf)


def _rows_of(gopd_lambda: float | Tensor, rows: slice) -> float | Tensor:
    return gopd_lambda[rows] if isinstance(gopd_lambda, Tensor) and gopd_lambda.dim() else gopd_lambda


def _chunks(length: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]
