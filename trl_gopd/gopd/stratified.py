"""
An estimate of the divergence KL(π ‖ q_λ) between the student and the target of G-OPD that sums over k ids of the
vocabulary and leaves the others to the sampled token.

The expectation of its gradient is that of the exact divergence. Of the frozen models it needs only k + 1
log-probabilities a token, which a server can return.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .divergence import ChunkedHeadLoss, add_label_gradient, gather_ids, rows_of
from .objective import LogitTransform, expectation, token_advantages


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
    the gradient of `extrapolated_divergence` for any S and b that depend on the state alone, and with all ids in S it
    is that gradient itself. b is the advantage of "not in S" as a single outcome,

        b = log π*(S̄)/π(S̄) + (λ − 1)·clip(log π*(S̄)/π_ref(S̄)),    S̄ the ids outside S

    so that the sampled y only corrects the error of treating S̄ as one outcome. A probability of S̄ below 2⁻²³ counts as
    2⁻²³, which keeps b finite. This estimator is not in the paper.

    As in `extrapolated_divergence`, logits of the student exist for one chunk of tokens at a time, and are made again
    in the backward pass. Of the frozen models, k + 1 log-probabilities a token are needed.

    The value is −Ê[A] + log Ẑ. Ê[A] = Σ_S π_v A_v + π(S̄)·b + 1{y ∉ S}·w·(A_y − b) is unbiased. log Ẑ has the
    gradient 0 and is the log Z_λ of S and S̄ as a single outcome: exact if λ is 1 or S has all ids, otherwise too small
    for λ > 1 and too large for λ < 1, as long as nothing is clipped.

    An id that a frozen model does not have (padded vocabularies) has the log-probability -inf. In S it is removed from
    the student's distribution and gets no gradient, as in `extrapolated_divergence`. As a label it adds no correction
    and has -inf in `student_logps`; mask such tokens. Any other such id is part of S̄.

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
            depend on `labels`, so cut a server's answer with the top k ids and the sampled one to the top k.
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
    # The gradient of the whole vocabulary, π (Ê[A] − a) with a_v = A_v in S and a_v = b outside of it, and beside it a
    # correction at the sampled token y:
    #   ∂/∂z_v = π_v (Ê[A] − a_v) − 1{v = y ∉ S}·w·(A_y − b)
    # All that it needs of a chunk is kept from the forward pass: k numbers a token, beside V logits.
    kept: dict[int, _BackwardState] = {}

    def values(rows: slice, logits: Tensor) -> tuple[Tensor | None, ...]:
        inside = _top_ids(logits, choice) if isinstance(choice, int) else choice[rows]
        asked = torch.cat([inside, labels[rows].unsqueeze(1)], 1)
        log_t, log_r = target_logps(rows, asked)
        _check_target(log_t, log_r, asked)
        outcomes = _lump(logits, asked, log_t, log_r)
        advantages = token_advantages(
            student_logps=outcomes.student,
            teacher_logps=outcomes.teacher,
            reference_logps=outcomes.reference,
            mask=~outcomes.student.isneginf(),
            gopd_lambda=rows_of(gopd_lambda, rows),
            extrapolation_clip=extrapolation_clip,
        )
        weights = None if importance_weights is None else importance_weights[rows]
        estimates, kept[rows.start] = _estimate(outcomes, advantages, asked, weights)
        return estimates

    def gradient(rows: slice, logits: Tensor, of_divergence: Tensor, of_logps: Tensor | None) -> Tensor:
        grad, probs = _gradient(logits, kept[rows.start])
        grad = grad * of_divergence
        return grad if of_logps is None else add_label_gradient(grad, probs, labels[rows].unsqueeze(1), of_logps)

    outputs = ChunkedHeadLoss.apply(  # type: ignore[no-untyped-call]
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


@dataclass(frozen=True)
class _Outcomes:
    """
    What the models say of a chunk of n tokens, with S̄ as a single outcome.

    Args:
        student (`torch.Tensor`): Log-probabilities `(n, k + 2)` of S, S̄ and the label, -inf for what is not known.
        teacher (`torch.Tensor`): The same under the teacher.
        reference (`torch.Tensor` or `None`): The same under the reference, when there is one.
        everything (`torch.Tensor`): Log-probabilities `(n, V)` under the student.
        known (`torch.Tensor`): Whether all models have an id of S or the label, `(n, k + 1)`.
        index (`torch.Tensor`): S and the label as indices into V, `(n, k + 1)`; 0 for what the student does not have.
        exclude (`torch.Tensor`): Added to the logits of S, `(n, k)`: -inf for ids that a frozen model lacks, else 0.
    """

    student: Tensor
    teacher: Tensor
    reference: Tensor | None
    everything: Tensor
    known: Tensor
    index: Tensor
    exclude: Tensor


@dataclass(frozen=True)
class _BackwardState:
    """
    What the backward pass needs of a chunk of n tokens.

    Args:
        index (`torch.Tensor`): As in `_Outcomes`.
        exclude (`torch.Tensor`): As in `_Outcomes`.
        mean_above_rest (`torch.Tensor`): Ê[A] − b, `(n, 1)`.
        above_rest (`torch.Tensor`): A_v − b for the ids of S, `(n, k)`; 0 for those that are not known.
        sampled_correction (`torch.Tensor`): 1{y ∉ S}·w·(A_y − b), `(n, 1)`.
    """

    index: Tensor
    exclude: Tensor
    mean_above_rest: Tensor
    above_rest: Tensor
    sampled_correction: Tensor


def _lump(logits: Tensor, asked: Tensor, log_t: Tensor, log_r: Tensor | None) -> _Outcomes:
    """Log-probabilities of S, of S̄ as a single outcome and of the label under the three models."""
    is_students = asked < logits.size(1)
    known = is_students & ~log_t.isneginf()
    if log_r is not None:
        known &= ~log_r.isneginf()
    # An id that the student does not have gets the index 0, to whose logit 0 is then added.
    index = asked.masked_fill(~is_students, 0)
    is_excluded = (is_students & ~known)[:, :-1]
    exclude = logits.new_zeros(is_excluded.shape).masked_fill(is_excluded, -math.inf)
    student = logits.scatter_add(1, index[:, :-1], exclude).log_softmax(1)
    return _Outcomes(
        student=_with_rest(gather_ids(student, asked), known),
        teacher=_with_rest(log_t, known),
        reference=None if log_r is None else _with_rest(log_r, known),
        everything=student,
        known=known,
        index=index,
        exclude=exclude,
    )


def _estimate(
    outcomes: _Outcomes, advantages: Tensor, asked: Tensor, weights: Tensor | None
) -> tuple[tuple[Tensor | None, ...], _BackwardState]:
    """The fields of [`StratifiedOutput`], and what the backward pass needs."""
    own, known = outcomes.student, outcomes.known
    is_outside = (asked[:, :-1] != asked[:, -1:]).all(1, keepdim=True)
    sampled = (known[:, -1:] & is_outside).float()
    if weights is not None:
        sampled = sampled * weights.detach().float().unsqueeze(1)

    def estimate(x: Tensor) -> Tensor:
        """Unbiased estimate `(n, 1)` of Σ_v π_v x_v, from x `(n, k + 2)`."""
        correction = sampled * (x[:, -1:] - x[:, -2:-1])
        return (own[:, :-1].exp() * x[:, :-1]).sum(1, keepdim=True) + correction

    mean, rest = estimate(advantages), advantages[:, -2:-1]
    log_z = (own + advantages)[:, :-1].logsumexp(1)
    estimates = (
        log_z - mean.squeeze(1),
        own[:, -1],
        outcomes.teacher[:, -1],
        None if outcomes.reference is None else outcomes.reference[:, -1],
        -expectation(outcomes.everything.exp(), outcomes.everything),
        estimate((own - outcomes.teacher).masked_fill(own.isneginf(), 0.0)).squeeze(1),
        mean.squeeze(1),
        own[:, :-2].exp().sum(1),
    )
    kept = _BackwardState(
        index=outcomes.index,
        exclude=outcomes.exclude,
        mean_above_rest=mean - rest,
        above_rest=(advantages[:, :-2] - rest).masked_fill(~known[:, :-1], 0.0),
        sampled_correction=sampled * (advantages[:, -1:] - rest),
    )
    return estimates, kept


def _gradient(logits: Tensor, kept: _BackwardState) -> tuple[Tensor, Tensor]:
    """Gradient of the estimate with respect to the logits, and the student's probabilities, both `(n, V)`."""
    inside, label = kept.index[:, :-1], kept.index[:, -1:]
    probs = logits.scatter_add(1, inside, kept.exclude).softmax(1)
    grad = probs * kept.mean_above_rest
    grad.scatter_add_(1, inside, -probs.gather(1, inside) * kept.above_rest)
    return grad.scatter_add_(1, label, -kept.sampled_correction), probs


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
    return gather_ids(logits, ids) - logits.logsumexp(1, keepdim=True)


def _check_choice(labels: Tensor, top_k: int | None, ids: Tensor | None) -> int | Tensor:
    """The number of ids in S, or the ids themselves, after a check."""
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
    ordered = ids.sort(1).values
    if bool((ordered[:, 0] < 0).any()) or bool((ordered.diff() == 0).any()):
        raise ValueError("`ids` must be non-negative and distinct within a row, got some that are not. Remove them.")
    return ids


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """The k likeliest ids of each row."""
    if k > logits.size(1):
        raise ValueError(f"`top_k` must be at most the size of the vocabulary, {logits.size(1)}, got {k}.")
    return logits.topk(k).indices


def _check_target(teacher: Tensor, reference: Tensor | None, ids: Tensor) -> None:
    """Refuses log-probabilities that are not those of the ids that were asked for."""
    for name, logps in (("teacher", teacher), ("reference", reference)):
        if logps is not None and logps.shape != ids.shape:
            raise ValueError(
                f"`target_logps` must return a log-probability of the {name} for each of the ids it is given, "
                f"{tuple(ids.shape)}, got {tuple(logps.shape)}. `log_probs_at` picks them from logits."
            )


def _with_rest(logps: Tensor, known: Tensor) -> Tensor:
    """
    Log-probabilities `(n, k + 2)` of S, S̄ and y from those `(n, k + 1)` of S and y, where S̄ is a single outcome; -inf
    for ids that are not known.
    """
    logps = logps.detach().float()
    mass = 1 - logps[:, :-1].exp().sum(1, keepdim=True)  # rounded, so it may be negative
    rest = mass.clamp(min=torch.finfo(torch.float32).eps).log()
    logps = logps.masked_fill(~known, -math.inf)
    return torch.cat([logps[:, :-1], rest, logps[:, -1:]], 1)
