"""
The objective of [G-OPD](https://huggingface.co/papers/2602.12125), on tensors alone.

At a state s the student π is rewarded with λ·(log π* − log π_ref) under a KL penalty of weight 1 towards π_ref, where
π* is the teacher. Up to a constant of the state this is

    KL(π ‖ q_λ),    log q_λ = log π* + (λ − 1)·(log π* − log π_ref) − log Z_λ

so λ = 1 is plain on-policy distillation, in which π_ref cancels, and λ > 1 extrapolates past the teacher. Three
estimators of the same gradient:

- `token_advantages`: one sampled token (the paper's). Its expectation over π is the second one.
- `extrapolated_divergence`: the whole vocabulary, without the noise of the sampled action.
- `stratified_divergence`: k ids of the vocabulary exactly, the others by the sampled token. Same expectation.

All treat the state distribution as given (discount 0), as the paper does.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
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
        scale = per_token(gopd_lambda, advantages) - 1
        rewards = implicit_rewards(
            teacher_logps=teacher_logps, reference_logps=reference_logps, extrapolation_clip=extrapolation_clip
        )
        # `where`, since a row at λ = 1 may meet an infinite reward, and 0 * inf is NaN.
        advantages = advantages + torch.where(scale == 0, 0.0, scale * rewards)
    # Not a product: padding may hold -inf or NaN, and NaN * 0 is NaN.
    return advantages.masked_fill(mask == 0, 0.0)


def discounted_advantages(advantages: Tensor, mask: Tensor, discount: float) -> Tensor:
    """
    Credit of each token, G_t = A_t + γ·G_{t+1}, over the tokens that are trained on. The paper has γ = 0. With γ = 1,
    E[Σ_t G_t ∇ log π] is the gradient of the objective of whole sequences, whose variance grows with their length.

    Args:
        advantages (`torch.Tensor` of shape `(B, T)`):
            What `token_advantages` returned: 0 where `mask` is.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token is trained on. The others are passed over, and do not discount.
        discount (`float`):
            γ, between 0 and 1.

    Returns:
        `torch.Tensor` of shape `(B, T)`: float32, detached; 0 where `mask` is.
    """
    credits, later = torch.zeros_like(advantages), advantages.new_zeros(len(advantages))
    for step in reversed(range(advantages.size(1))):
        counts = mask[:, step] != 0
        later = torch.where(counts, advantages[:, step] + discount * later, later)
        credits[:, step] = torch.where(counts, later, 0.0)
    return credits


def lambda_is_one(gopd_lambda: float | Tensor) -> bool:
    """Whether every λ is exactly 1, so that the reference is neither needed nor read."""
    return bool((gopd_lambda == 1).all()) if isinstance(gopd_lambda, Tensor) else gopd_lambda == 1


def per_token(gopd_lambda: float | Tensor, like: Tensor) -> Tensor:
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
    # For a chunk of n tokens, z (n, V) the student's tempered logits, π = softmax(z), V the shared vocabulary:
    #   log q = log_softmax(log π* + (λ − 1)·clip(log π* − log π_ref))
    #   g = log π − log q,   KL = Σ π g,   ∂KL/∂z = π (g − KL)
    # The "+1" of ∂(π log π) drops out since the entries of ∂π sum to 0.

    def log_probs(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | Tensor]:
        return _log_probs(logits, *target_logits(rows), _rows_of(gopd_lambda, rows), extrapolation_clip)

    def values(rows: slice, logits: Tensor) -> tuple[Tensor | None, ...]:
        student, log_q, log_t, log_r, log_z = log_probs(rows, logits)
        probs, label = student.exp(), labels[rows].unsqueeze(1)
        divergence = expectation(probs, student - log_q)
        return (
            divergence,
            _gather_ids(student, label).squeeze(1),
            _gather_ids(log_t, label).squeeze(1),
            None if log_r is None else _gather_ids(log_r, label).squeeze(1),
            -expectation(probs, student),
            divergence if log_q is log_t else expectation(probs, student - log_t),
            log_z - divergence,
        )

    def gradient(rows: slice, logits: Tensor, of_divergence: Tensor, of_logps: Tensor | None) -> Tensor:
        student, log_q, *_ = log_probs(rows, logits)
        probs = student.exp()
        gap = (student - log_q).masked_fill(probs == 0, 0.0)
        grad = probs * (gap - (probs * gap).sum(-1, keepdim=True)) * of_divergence
        return grad if of_logps is None else _add_of_label(grad, probs, labels[rows].unsqueeze(1), of_logps)

    outputs = _OfLogits.apply(  # type: ignore[no-untyped-call]
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


@dataclass(frozen=True)
class StratifiedOutput:
    """
    What `stratified_divergence` returns; every field is `(N,)` float32, in nats but for the last, and the first two
    have a gradient.

    Args:
        divergence (`torch.Tensor`): Estimate of KL(π ‖ q_λ), whose gradient is the estimator.
        student_logps (`torch.Tensor`): Log-probabilities of `labels` under the student.
        teacher_logps (`torch.Tensor`): The same under the teacher.
        reference_logps (`torch.Tensor` or `None`): The same under the reference, when there is one.
        entropy (`torch.Tensor`): Entropy of the student, exact.
        reverse_kl (`torch.Tensor`): Unbiased estimate of KL(π ‖ π*).
        expected_advantage (`torch.Tensor`): Unbiased estimate Ê[A].
        coverage (`torch.Tensor`): Probability of S under the student, 0 to 1.
    """

    divergence: Tensor
    student_logps: Tensor
    teacher_logps: Tensor
    reference_logps: Tensor | None
    entropy: Tensor
    reverse_kl: Tensor
    expected_advantage: Tensor
    coverage: Tensor


def stratified_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    target_logps: Callable[[slice, Tensor], tuple[Tensor, Tensor | None]],
    gopd_lambda: float | Tensor,
    top_k: int | None = None,
    ids: Tensor | None = None,
    transform: LogitTransform | None = None,
    extrapolation_clip: float | None = None,
    importance_weights: Tensor | None = None,
    chunk_size: int = 256,
    gather: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> StratifiedOutput:
    """
    Estimate of KL(π ‖ q_λ) for every token, from k ids S of each state and the sampled token y. Its gradient is that
    of

        −Σ_{v ∈ S} sg(π_v (A_v − b)) log π_v  −  1{y ∉ S}·w·sg(A_y − b) log π_y

    with A of `token_advantages`, sg for a detached factor and w an importance weight. Its expectation over y ~ π is
    the gradient of `extrapolated_divergence`, whatever S and b are as long as they depend on the state alone; with all
    ids in S it is that gradient itself. b is the advantage of "not in S" as a single outcome,

        b = log π*(S̄)/π(S̄) + (λ − 1)·clip(log π*(S̄)/π_ref(S̄)),    S̄ the ids outside S

    so that y corrects no more than what this lumping gets wrong. A mass of S̄ below 2⁻²³ counts as 2⁻²³, which keeps b
    finite. Not in the paper.

    As in `extrapolated_divergence`, logits of the student exist for one chunk of tokens at a time, and are made again
    in the backward pass. Of the frozen models k + 1 log-probabilities a token are read.

    The value is −Ê[A] + log Ẑ. Ê[A] = Σ_S π_v A_v + π(S̄)·b + 1{y ∉ S}·w·(A_y − b) is unbiased. log Ẑ has the
    gradient 0 and is the log Z_λ of S and S̄ as a single outcome: exact if λ is 1 or S has all ids, otherwise too small
    for λ > 1 and too large for λ < 1, as long as nothing is clipped.

    An id that a frozen model does not have (padded vocabularies) has the log-probability -inf. In S it is taken out of
    the student's distribution and gets no gradient, as in `extrapolated_divergence`. As a label it adds no correction,
    and has -inf in `student_logps`: leave such tokens out, as `token_advantages` asks for. Elsewhere it is part of S̄.

    Args:
        hidden (`torch.Tensor` of shape `(N, D)`):
            Last hidden states of the student, with gradient.
        weight (`torch.Tensor` of shape `(V, D)`):
            Output head of the student; receives a gradient if it requires one.
        bias (`torch.Tensor` of shape `(V,)` or `None`):
            Bias of the head.
        labels (`torch.Tensor` of shape `(N,)`):
            The sampled ids y.
        target_logps (`Callable`):
            Given a slice of n tokens and ids `(n, k + 1)`, S and then the label, returns their log-probabilities
            `(n, k + 1)` under the teacher and under the reference, tempered and normalised over the whole vocabulary,
            -inf for ids that the model does not have. `None` for the reference when every λ is 1. Called once a chunk,
            in the forward pass.
        gopd_lambda (`float` or `torch.Tensor` of shape `(N,)`):
            Reward scale λ.
        top_k (`int`, *optional*):
            S are the k likeliest ids under the student. Give either this or `ids`.
        ids (`torch.Tensor` of shape `(N, k)`, *optional*):
            S itself, for instance the likeliest ids under the teacher: int64, no id twice in a row. It must not
            depend on `labels`: a server's answer to "top k and the sampled one" has to be cut to the top k.
        transform (`LogitTransform`, *optional*):
            What the student does to its raw logits.
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref|. Not in the paper.
        importance_weights (`torch.Tensor` of shape `(N,)`, *optional*):
            w = π(y)/μ(y) if the labels were sampled from another policy μ. The sum over S needs none.
        chunk_size (`int`, *optional*, defaults to `256`):
            Tokens a chunk.
        gather (`Callable`, *optional*):
            Returns a context in which `weight` and the heads behind `target_logps` are whole (ZeRO-3).

    Returns:
        [`StratifiedOutput`].

    Raises:
        `ValueError`: If not exactly one of `top_k` and `ids` is given, `top_k` is not within 1 and V, a tensor has
            another shape than stated, `ids` are not distinct non-negative integers, or some λ differs from 1 and there
            is no reference.
    """
    choice = _check_choice(labels, top_k, ids)
    if importance_weights is not None and importance_weights.shape != labels.shape:
        raise ValueError(
            f"`importance_weights` must have the shape {tuple(labels.shape)} of `labels`, got "
            f"{tuple(importance_weights.shape)}. Give one weight a token."
        )
    # With a_v = A_v in S and b outside, the gradient is that of the whole vocabulary, π (Ê[A] − a), and a spike at y:
    #   ∂/∂z_v = π_v (Ê[A] − a_v) − 1{v = y ∉ S}·w·(A_y − b)
    # What is needed for it is kept by chunk: k numbers a token, beside V logits.
    kept: dict[int, tuple[Tensor, ...]] = {}

    def values(rows: slice, logits: Tensor) -> tuple[Tensor | None, ...]:
        stratum = _top_ids(logits, choice) if isinstance(choice, int) else choice[rows]
        label = labels[rows].unsqueeze(1)
        asked = torch.cat([stratum, label], 1)
        log_t, log_r = target_logps(rows, asked)
        _check_target(log_t, log_r, asked)
        inside = asked < logits.size(-1)
        known = inside & ~log_t.isneginf()
        if log_r is not None:
            known &= ~log_r.isneginf()
        address = asked.masked_fill(~inside, 0)  # where an id is not, 0 is added to another
        barrier = torch.where((inside & ~known)[:, :-1], -math.inf, 0.0).to(logits.dtype)
        student = logits.scatter_add(1, address[:, :-1], barrier).log_softmax(-1)

        own, teacher = _with_rest(_gather_ids(student, asked), known), _with_rest(log_t, known)
        reference = None if log_r is None else _with_rest(log_r, known)
        advantages = token_advantages(
            student_logps=own,
            teacher_logps=teacher,
            reference_logps=reference,
            mask=~own.isneginf(),
            gopd_lambda=_rows_of(gopd_lambda, rows),
            extrapolation_clip=extrapolation_clip,
        )
        sampled = (known[:, -1:] & (stratum != label).all(-1, keepdim=True)).float()
        if importance_weights is not None:
            sampled = sampled * importance_weights[rows].detach().float().unsqueeze(1)

        def estimate(x: Tensor) -> Tensor:
            """Of Σ_v π_v x_v, from x `(n, k + 2)`."""
            correction = sampled * (x[:, -1:] - x[:, -2:-1])
            return (own[:, :-1].exp() * x[:, :-1]).sum(-1, keepdim=True) + correction

        mean, rest = estimate(advantages), advantages[:, -2:-1]
        above_rest = (advantages[:, :-2] - rest).masked_fill(~known[:, :-1], 0.0)
        spike = sampled * (advantages[:, -1:] - rest)
        kept[rows.start] = (address, barrier, mean - rest, above_rest, spike)
        log_z = (own + advantages)[:, :-1].logsumexp(-1)
        return (
            log_z - mean.squeeze(1),
            own[:, -1],
            teacher[:, -1],
            None if reference is None else reference[:, -1],
            -expectation(student.exp(), student),
            estimate((own - teacher).masked_fill(own.isneginf(), 0.0)).squeeze(1),
            mean.squeeze(1),
            own[:, :-2].exp().sum(-1),
        )

    def gradient(rows: slice, logits: Tensor, of_divergence: Tensor, of_logps: Tensor | None) -> Tensor:
        address, barrier, mean_above_rest, above_rest, spike = kept[rows.start]
        stratum, label = address[:, :-1], address[:, -1:]
        probs = logits.scatter_add(1, stratum, barrier).softmax(-1)
        grad = probs * mean_above_rest
        grad.scatter_add_(1, stratum, -probs.gather(1, stratum) * above_rest)
        grad = grad.scatter_add_(1, label, -spike) * of_divergence
        return grad if of_logps is None else _add_of_label(grad, probs, labels[rows].unsqueeze(1), of_logps)

    outputs = _OfLogits.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        values,
        gradient,
        len(fields(StratifiedOutput)),
        transform or LogitTransform(),
        chunk_size,
        gather,
    )
    return StratifiedOutput(*outputs)


def log_probs_at(logits: Tensor, ids: Tensor) -> Tensor:
    """
    Log-probabilities of some ids, as `stratified_divergence` asks for them.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): Tempered logits.
        ids (`torch.Tensor` of shape `(n, m)`): Non-negative ids.

    Returns:
        `torch.Tensor` of shape `(n, m)`: float32 nats; -inf for ids that are not among the V.
    """
    logits = logits.float()
    return _gather_ids(logits, ids) - logits.logsumexp(-1, keepdim=True)


def _check_choice(labels: Tensor, top_k: int | None, ids: Tensor | None) -> int | Tensor:
    """How many ids S has, or the ids themselves."""
    if ids is None and top_k is not None:
        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}. For no id at all there is `token_advantages`.")
        return top_k
    if ids is None or top_k is not None:
        raise ValueError(f"Give either `top_k` or `ids`, got {'neither' if ids is None else 'both'}.")
    if ids.dim() != 2 or len(ids) != len(labels) or ids.size(1) == 0 or ids.dtype != torch.int64:
        raise ValueError(
            f"`ids` must be int64 of shape ({len(labels)}, k) with k at least 1, got {ids.dtype} of shape "
            f"{tuple(ids.shape)}. Give k ids for each of the labels."
        )
    ordered = ids.sort(-1).values
    if bool((ordered[:, 0] < 0).any()) or bool((ordered.diff() == 0).any()):
        raise ValueError("`ids` must be non-negative and distinct within a row, got some that are not. Remove them.")
    return ids


def _top_ids(logits: Tensor, k: int) -> Tensor:
    if k > logits.size(-1):
        raise ValueError(f"`top_k` must be at most the size of the vocabulary, {logits.size(-1)}, got {k}.")
    return logits.topk(k).indices


def _check_target(teacher: Tensor, reference: Tensor | None, ids: Tensor) -> None:
    for name, logps in (("teacher", teacher), ("reference", reference)):
        if logps is not None and logps.shape != ids.shape:
            raise ValueError(
                f"`target_logps` must return a log-probability of the {name} for each of the ids it is given, "
                f"{tuple(ids.shape)}, got {tuple(logps.shape)}. `log_probs_at` picks them from logits."
            )


def _with_rest(logps: Tensor, known: Tensor) -> Tensor:
    """`[S, S̄, y]` `(n, k + 2)` from `[S, y]` `(n, k + 1)`: S̄ as a single outcome, and -inf for what is not known."""
    logps = logps.detach().float()
    mass = 1 - logps[:, :-1].exp().sum(-1, keepdim=True)  # rounded, so it may be negative
    rest = mass.clamp(min=torch.finfo(torch.float32).eps).log()
    logps = logps.masked_fill(~known, -math.inf)
    return torch.cat([logps[:, :-1], rest, logps[:, -1:]], 1)


class _OfLogits(torch.autograd.Function):
    # Per-token values of the student's tempered logits, which exist for one chunk of tokens at a time:
    #   values(rows, logits)            a tuple of (n,) tensors or None, of which the first two have a gradient,
    #   gradient(rows, logits, *grads)  (n, V') with respect to the first V' logits, in the backward pass, where grads
    #                                   are (n, 1), those of the first two values; the second may be None.

    @staticmethod
    @no_type_check
    def forward(ctx, hidden, weight, bias, values, gradient, num_values, transform, chunk_size, gather):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.args = (gradient, transform, chunk_size, gather)
        with gather(), _no_autocast(hidden):
            head = _head_like(hidden, weight, bias)
            slices = chunk_slices(len(hidden), chunk_size)
            chunks = [values(rows, transform(F.linear(hidden[rows], *head))) for rows in slices]
        outputs = tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True))
        if not chunks:  # no token: zeros of length 0 that still hang in the graph
            outputs = tuple(hidden.new_zeros(0, dtype=torch.float32) for _ in range(num_values))
        ctx.mark_non_differentiable(*[output for output in outputs[2:] if output is not None])
        ctx.set_materialize_grads(False)  # who has no use for that of the labels does not pay for it
        return outputs

    @staticmethod
    @no_type_check
    def backward(ctx, grad_output, grad_logps, *_):
        hidden, weight, bias = ctx.saved_tensors
        gradient, transform, chunk_size, gather = ctx.args
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if grad_output is None:
            grad_output = torch.zeros(len(hidden), device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        with gather(), _no_autocast(hidden):
            head = _head_like(hidden, weight, bias)
            # float32 sums: many small chunks added in bfloat16 would stop moving the total
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
            for rows in chunk_slices(len(hidden), chunk_size):
                logits = transform(F.linear(hidden[rows], *head))
                of_logps = None if grad_logps is None else grad_logps[rows].float().unsqueeze(1)
                grad = gradient(rows, logits, grad_output[rows].float().unsqueeze(1), of_logps)
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
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _add_of_label(grad: Tensor, probs: Tensor, label: Tensor, of_logps: Tensor) -> Tensor:
    """Adds ∂ log π_y/∂z = 1{v = y} − π_v, times its factor `(n, 1)`; nothing where the student cannot have y."""
    inside = label < probs.size(1)
    address = label.masked_fill(~inside, 0)
    factor = torch.where(inside & (probs.gather(1, address) > 0), of_logps, 0.0)
    return (grad - probs * factor).scatter_add_(1, address, factor)


def _no_autocast(hidden: Tensor) -> AbstractContextManager[Any]:
    # The backward pass runs outside autocast, so the dtypes are written out in both.
    return torch.autocast(hidden.device.type, enabled=False)


def _head_like(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head in the dtype of the hidden states, as autocast would cast it."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _log_probs(
    student: Tensor, teacher: Tensor, reference: Tensor | None, gopd_lambda: float | Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | Tensor]:
    """
    Log-probabilities `(n, V)` of student, q_λ, teacher and reference over the ids that all of them have, and log Z_λ.
    """
    shared = min(x.size(-1) for x in (student, teacher, reference) if x is not None)
    log_s = student[:, :shared].log_softmax(-1)
    log_t = teacher[:, :shared].float().log_softmax(-1)
    log_r = None if reference is None else reference[:, :shared].float().log_softmax(-1)
    if lambda_is_one(gopd_lambda):
        return log_s, log_t, log_t, log_r, 0.0
    if log_r is None:
        raise ValueError(f"`gopd_lambda={gopd_lambda}` needs the logits of a reference, got None. Pass it, or use 1.")
    rewards = implicit_rewards(teacher_logps=log_t, reference_logps=log_r, extrapolation_clip=clip)
    log_q = log_t + (per_token(gopd_lambda, log_t) - 1) * rewards
    log_z = log_q.logsumexp(-1, keepdim=True)
    return log_s, log_q - log_z, log_t, log_r, log_z.squeeze(-1)


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Σ_v probs·values, where an id of probability 0 counts 0 even if its value is infinite."""
    return (probs * values.masked_fill(probs == 0, 0.0)).sum(-1)


def _gather_ids(logps: Tensor, ids: Tensor) -> Tensor:
    """Entries of `logps` `(n, V)` at `ids` `(n, m)`; -inf for ids that are not among the V."""
    outside = ids >= logps.size(-1)
    return logps.gather(-1, ids.masked_fill(outside, 0)).masked_fill(outside, -math.inf)


def _rows_of(gopd_lambda: float | Tensor, rows: slice) -> float | Tensor:
    return gopd_lambda[rows] if isinstance(gopd_lambda, Tensor) and gopd_lambda.dim() else gopd_lambda


def chunk_slices(length: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]
