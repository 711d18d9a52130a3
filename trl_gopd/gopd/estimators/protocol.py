"""What an estimator is given, and what it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from ..batch import Batch, Scores


@dataclass(frozen=True)
class Estimate:
    """
    What an estimator says of a micro-batch. All tensors are `(B, T)` float32 unless stated; what they hold where
    `known` is 0 is never read.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities of the sampled tokens under the student, as the inherited loss takes them: with their
            gradient, unless the gradient comes through `credits`.
        credits (`torch.Tensor`):
            What the inherited loss multiplies the ratio of probabilities with: advantages after weights and discount.
        advantages (`torch.Tensor`):
            Advantages of the tokens before both, detached. Expectations, for estimators over the vocabulary.
        known (`torch.Tensor`):
            1 for the tokens that are trained on and that every model has in its vocabulary.
        gopd_lambda (`torch.Tensor` of shape `(B, 1)` or `(B, T)`):
            λ of the tokens.
        student_logps, teacher_logps (`torch.Tensor`):
            Nats of the sampled tokens, detached.
        reverse_kl (`torch.Tensor`):
            log π − log π* of the sampled tokens, or its expectation.
        reference_logps (`torch.Tensor`, *optional*):
            Nats of the sampled tokens under the reference.
        has_reference (`torch.Tensor` of shape `(B, 1)`, *optional*):
            Boolean; which rows the reference was asked about, if not all.
        entropy (`torch.Tensor`, *optional*):
            Entropy of the student at each state.
        aux_loss (`torch.Tensor` of shape `()`, *optional*):
            Load-balancing loss of a mixture of experts, with its gradient.
        means (`Mapping[str, torch.Tensor]`):
            Further values of tokens whose means are logged.
    """

    logps: Tensor
    credits: Tensor
    advantages: Tensor
    known: Tensor
    gopd_lambda: Tensor
    student_logps: Tensor
    teacher_logps: Tensor
    reverse_kl: Tensor
    reference_logps: Tensor | None = None
    has_reference: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None
    means: Mapping[str, Tensor] = field(default_factory=dict)


class StudentForward(Protocol):
    """One forward of the student over a micro-batch. Only one of the two may be called, and once."""

    def log_probs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies `(B, T)` of the completions, and the auxiliary loss of experts."""

    def over_hidden(
        self, function: Callable[[Tensor, nn.Module], tuple[Tensor | None, ...]]
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """
        What a function returns, and the auxiliary loss. It is given the hidden states `(B, T, D)` from which the
        completions are predicted, and the output head, inside the forward of the model as training holds it.
        """


class Estimator(Protocol):
    """An estimator of the gradient of KL(π ‖ q_λ)."""

    @property
    def needs_old_logps(self) -> bool:
        """Whether the log-probabilities of the policy that sampled, or weights made of them, are read."""

    def scores(self, batch: Batch) -> Scores:
        """What frozen models have to say before the loss, once a generation batch."""

    def estimate(self, student: StudentForward, batch: Batch, scores: Scores, gopd_lambda: Tensor) -> Estimate:
        """
        The estimate of a micro-batch.

        Args:
            student ([`StudentForward`]):
                The forward of the student.
            batch ([`Batch`]):
                The micro-batch.
            scores ([`Scores`]):
                What `scores` returned for its rows.
            gopd_lambda (`torch.Tensor` of shape `(B, 1)`):
                λ of the rows at this step.
        """
