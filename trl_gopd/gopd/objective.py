"""
The objective of [G-OPD](https://huggingface.co/papers/2602.12125), on tensors alone.

At a state s the student π is rewarded with λ·(log π* − log π_ref) under a KL penalty of weight 1 towards π_ref, where
π* is the teacher. Up to a constant of the state this is

    KL(π ‖ q_λ),    log q_λ = log π* + (λ − 1)·(log π* − log π_ref) − log Z_λ

so λ = 1 is plain on-policy distillation, in which π_ref cancels, and λ > 1 extrapolates past the teacher. There are
three estimators of the same gradient:

- `token_advantages`, here, uses the sampled token alone, as the paper does. Its expectation over π is the second one.
- `divergence.extrapolated_divergence` sums over the whole vocabulary, so the sampled token adds no noise.
- `stratified.stratified_divergence` sums over k ids of the vocabulary and samples the others. Its expectation is the
  same.

All of them treat the state distribution as given (discount 0), as the paper does.
"""

import math
from dataclasses import dataclass

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
        advantages = advantages + _extrapolation(teacher_logps, reference_logps, gopd_lambda, extrapolation_clip)
    # Not a product: padding may hold -inf or NaN, and NaN * 0 is NaN.
    return advantages.masked_fill(mask == 0, 0.0)


def credit(advantages: Tensor, mask: Tensor, *, discount: float, weights: Tensor | None = None) -> Tensor:
    """
    Credit of each sampled token: its own advantage and those of the tokens that it led to,

        G_t = A_t + γ·w_{t+1}·G_{t+1}

    over the tokens that are trained on. The paper has γ = 0, so that G is A. With γ = 1 and tokens of the student,
    E[Σ_t G_t ∇ log π(y_t)] is the gradient of the objective of whole sequences; its variance grows with their length.

    If the tokens were sampled from another policy μ, each needs the weight w_t = π(y_t)/μ(y_t). The weights of later
    tokens are part of G_t, and its own is left out: the gradient at the states that μ visited is
    E[Σ_t w_t·G_t ∇ log π(y_t)]. Multiply by `weights`, unless the loss does so itself, as that of
    [`~trl.GRPOTrainer`] does for completions of vLLM. A weight of the whole sequence holds for all of its tokens, and
    belongs in the loss alone.

    Args:
        advantages (`torch.Tensor` of shape `(B, T)`):
            What `token_advantages` returned, 0 where `mask` is. Detached, in nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token is trained on. The other tokens get no credit, do not discount, and weigh nothing.
        discount (`float`):
            γ, between 0 and 1.
        weights (`torch.Tensor` of shape `(B, T)`, *optional*):
            Importance weights w of the tokens, 0 or greater. `None` if the student sampled the tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`: detached, in the dtype of `advantages`; 0 where `mask` is. At γ = 0 it is
        `advantages` itself.

    Raises:
        `ValueError`: If `weights` do not have the shape of `advantages`.

    Example:

    ```python
    >>> import torch
    >>> from trl_gopd.gopd.objective import credit
    >>> credit(torch.tensor([[1.0, 0.0, 2.0, 4.0]]), torch.tensor([[1, 0, 1, 1]]), discount=0.5)
    tensor([[3., 0., 4., 4.]])

    ```
    """
    if discount == 0:
        return advantages
    terms = advantages if weights is None else advantages * weights
    return advantages + later_credit(terms, mask, discount=discount, weights=weights)


def later_credit(
    expected_advantages: Tensor, mask: Tensor, *, discount: float, weights: Tensor | None = None
) -> Tensor:
    """
    Credit of each sampled token for the states that it led to, beside an estimator that already has the expected
    advantage at the token's own state:

        L_t = γ·(E_{t+1} + w_{t+1}·L_{t+1})

    over the tokens that are trained on. With E[A] of `extrapolated_divergence` or `stratified_divergence`,
    Σ_t (∇E_t + w_t·L_t ∇ log π(y_t)) has the same expectation as the Σ_t w_t·G_t ∇ log π(y_t) of `credit`, and less
    noise: expected advantages are what an exact baseline would leave of sampled ones.

    Args:
        expected_advantages (`torch.Tensor` of shape `(B, T)`):
            E[A] over the student at each state, or an unbiased estimate of it, in nats.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 where a token is trained on. The other tokens get no credit, do not discount, and weigh nothing.
        discount (`float`):
            γ, between 0 and 1.
        weights (`torch.Tensor` of shape `(B, T)`, *optional*):
            Importance weights w of the tokens, 0 or greater. `None` if the student sampled the tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`: detached, in the dtype of `expected_advantages`; 0 where `mask` is.

    Raises:
        `ValueError`: If `weights` do not have the shape of `expected_advantages`.
    """
    if weights is not None and weights.shape != expected_advantages.shape:
        raise ValueError(
            f"`weights` must have the shape {tuple(expected_advantages.shape)} of the advantages, got "
            f"{tuple(weights.shape)}. Give one weight a token; leave out a weight of the whole sequence."
        )
    is_left_out = mask == 0
    factors = torch.full_like(expected_advantages, discount) if weights is None else discount * weights.detach()
    # A token that is left out hands on what comes after it. Not products: it may hold -inf or NaN.
    terms = expected_advantages.detach().masked_fill(is_left_out, 0.0)
    totals = _reverse_scan(terms, factors.masked_fill(is_left_out, 1.0))
    return (discount * _shift_left(totals, 1)).masked_fill(is_left_out, 0.0)


def _reverse_scan(terms: Tensor, factors: Tensor) -> Tensor:
    """
    x_t = terms_t + factors_t·x_{t+1} along the rows of `(B, T)`, with x_T = 0 and factors of 0 or greater.

    Each pass doubles how many terms every x_t has gathered, so T positions take log2(T) passes (Hillis and Steele,
    Data parallel algorithms, 1986).
    """
    span = 1
    while span < terms.size(1):
        terms = terms + factors * _shift_left(terms, span)
        # Many weights above 1 may overflow, and inf * 0 is NaN.
        factors = (factors * _shift_left(factors, span)).clamp(max=torch.finfo(factors.dtype).max)
        span *= 2
    return terms


def _shift_left(x: Tensor, steps: int) -> Tensor:
    """Moves the entries of each row to the left, and fills up with zeros."""
    return F.pad(x[:, steps:], (0, min(steps, x.size(1))))


def extrapolate(
    *,
    teacher_logps: Tensor,
    reference_logps: Tensor | None,
    gopd_lambda: float | Tensor,
    extrapolation_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """
    The target q_λ = π*^λ·π_ref^(1−λ) / Z_λ of eq. 12 of [G-OPD](https://huggingface.co/papers/2602.12125) at each
    state.

    Args:
        teacher_logps (`torch.Tensor` of shape `(..., V)`):
            Normalised log-probabilities under the teacher, nats. An id to which the teacher gives the probability 0
            has none under q_λ either, at every λ.
        reference_logps (`torch.Tensor` of shape `(..., V)` or `None`):
            Normalised log-probabilities under the reference, nats. May be `None` only when every λ is 1.
        gopd_lambda (`float` or `torch.Tensor` of shape `(N,)`):
            Reward scale λ: one for all states, or one for each of the N rows of `(N, V)`.
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref| for every id of the vocabulary. Not in the paper.

    Returns:
        `tuple` of `torch.Tensor`: log q_λ `(..., V)` and log Z_λ `(...)`, float32 nats, detached. When every λ is 1,
        the former is the teacher itself and the latter is 0.

    Raises:
        `ValueError`: If some λ differs from 1 and `reference_logps` is `None`.

    Example:

    ```python
    >>> import torch
    >>> from trl_gopd.gopd.objective import extrapolate
    >>> teacher, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    >>> logps, _ = extrapolate(teacher_logps=teacher.log(), reference_logps=reference.log(), gopd_lambda=1.25)
    >>> logps.exp()
    tensor([0.5780, 0.2758, 0.1462])

    ```
    """
    teacher = teacher_logps.detach().float()
    if lambda_is_one(gopd_lambda):  # exact, where a sum of exponentials would leave a rounding error
        return teacher, teacher.new_zeros(teacher.shape[:-1])
    joint = teacher + _extrapolation(teacher, reference_logps, gopd_lambda, extrapolation_clip)
    # Where both models give the probability 0, the reward is NaN.
    joint = joint.masked_fill(teacher.isneginf(), -math.inf)
    log_z = joint.logsumexp(-1, keepdim=True)
    return joint - log_z, log_z.squeeze(-1)


def _extrapolation(
    teacher_logps: Tensor, reference_logps: Tensor | None, gopd_lambda: float | Tensor, clip: float | None
) -> Tensor:
    """(λ − 1)·(log π* − log π_ref), which is 0 where λ is 1, whatever the reference holds there."""
    if reference_logps is None:
        raise ValueError(f"`gopd_lambda={gopd_lambda}` needs `reference_logps`, got None. Pass it, or use 1.")
    rewards = implicit_rewards(teacher_logps=teacher_logps, reference_logps=reference_logps, extrapolation_clip=clip)
    scale = per_token(gopd_lambda, rewards) - 1
    # A row at λ = 1 may meet an infinite reward, and 0 * inf is NaN.
    return torch.where(scale == 0, 0.0, scale * rewards)


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Σ_v probs·values over the last dimension, where an id of probability 0 adds 0 even to an infinite value."""
    return (probs * values.masked_fill(probs == 0, 0.0)).sum(-1)


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
