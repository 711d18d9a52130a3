"""
What the estimators over the vocabulary have in common: the divergence of every state is a negated advantage that has
a gradient. The inherited loss is given detached log-probabilities, so ratio × advantage is the divergence alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._trl import dense_head, gather_heads
from ..batch import Batch
from ..divergence import DivergenceOutput
from ..objective import later_credit
from ..stratified import StratifiedOutput
from .protocol import Estimate, StudentForward


# Of hidden states (N, D) and the student's head: what is known of the N states, and further values for the metrics.
Divergence = Callable[[Tensor, nn.Module], tuple[DivergenceOutput | StratifiedOutput, dict[str, Tensor]]]


def estimate_over_vocabulary(
    student: StudentForward,
    batch: Batch,
    gopd_lambda: Tensor,
    divergence: Divergence,
    *,
    discount: float,
    has_reference: Tensor | None = None,
) -> Estimate:
    """
    The estimate of a micro-batch from the divergences of its states.

    With a discount γ, what comes after a token is credited to it by its score, γ·G_{t+1}·∇ log π(y_t), as for sampled
    advantages, but G are expected advantages: they are what an exact baseline would leave of sampled ones.

    Args:
        student ([`StudentForward`]):
            The forward of the student.
        batch ([`Batch`]):
            The micro-batch.
        gopd_lambda (`torch.Tensor` of shape `(B, 1)`):
            λ of the rows at this step.
        divergence (`Callable`):
            Called inside the student's forward, see [`Divergence`].
        discount (`float`):
            γ of later advantages.
        has_reference (`torch.Tensor` of shape `(B, 1)`, *optional*):
            Which rows the reference was asked about, if not all.
    """
    mask, tokens = batch.loss_mask, batch.loss_mask.bool()
    names: list[str] = []

    def values(hidden: Tensor, head: nn.Module) -> tuple[Tensor | None, ...]:
        output, means = divergence(hidden[tokens], head)
        names.extend(means)
        return (
            output.divergence,
            # a gradient that nobody asks for may leave the hooks of a sharded student waiting
            output.student_logps if discount else output.student_logps.detach(),
            output.expected_advantage,
            output.teacher_logps,
            output.reference_logps,
            output.entropy,
            output.reverse_kl,
            *means.values(),
        )

    def scatter(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.new_zeros(mask.shape).masked_scatter(tokens, value)

    outputs, aux_loss = student.over_hidden(values)
    divergences, student_logps, expected, teacher_logps, reference_logps, entropy, reverse_kl, *others = map(
        scatter, outputs
    )
    assert divergences is not None and student_logps is not None and expected is not None
    assert teacher_logps is not None and reverse_kl is not None
    known = mask * ~(teacher_logps.isneginf() | student_logps.isneginf())
    student_logps = student_logps.masked_fill(student_logps.isneginf(), 0.0)
    credits = -divergences
    if discount:
        later = later_credit(expected, mask, discount=discount, weights=batch.token_ratio) * known
        later = later if batch.ratio is None else later * batch.ratio
        credits = credits + later * (student_logps - student_logps.detach())
    return Estimate(
        logps=student_logps.detach(),
        credits=credits,
        advantages=-divergences.detach(),
        known=known,
        gopd_lambda=gopd_lambda,
        student_logps=student_logps.detach(),
        teacher_logps=teacher_logps,
        reverse_kl=reverse_kl,
        reference_logps=reference_logps,
        has_reference=has_reference,
        entropy=entropy,
        aux_loss=aux_loss,
        means={name: value for name, value in zip(names, others, strict=True) if value is not None},
    )


def head_arguments(head: Any, others: Sequence[nn.Module], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """
    How a divergence is given the student's head: `weight` and `bias`, whole where FSDP2 has split them and, in
    `dtype`, dense where they are quantized; and `gather`, which makes a context in which this head and those of frozen
    models are whole under ZeRO-3. The student's own head may be among the latter.
    """
    head = dense_head(head, dtype)
    weight, bias = head.weight, getattr(head, "bias", None)
    if hasattr(weight, "full_tensor"):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    heads = list(dict.fromkeys([head, *others]))
    return {"weight": weight, "bias": bias, "gather": lambda: gather_heads(*heads)}
