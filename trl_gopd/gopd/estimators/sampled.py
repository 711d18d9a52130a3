"""The paper's estimator: the log-probability of the sampled token, weighed by its advantage."""

from dataclasses import dataclass

from torch import Tensor

from ..batch import Batch, Scores
from ..frozen.build import FrozenModels
from ..objective import credit, token_advantages
from ..schedules import gate_lambda
from .protocol import Estimate, StudentForward


@dataclass(frozen=True)
class SampledEstimator:
    """
    A·∇log π of the sampled token, eq. 14 of [G-OPD](https://huggingface.co/papers/2602.12125).

    Args:
        frozen ([`FrozenModels`]):
            Teachers and references.
        mixes_lambda (`bool`):
            Whether rows may differ in λ; those at λ = 1 are not shown to the reference then.
        discount (`float`):
            γ of later advantages.
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref|.
        deterministic_above (`float`, *optional*), needs_agreement (`bool`):
            Gates of λ, see `gate_lambda`.
    """

    frozen: FrozenModels
    mixes_lambda: bool = False
    discount: float = 0.0
    extrapolation_clip: float | None = None
    deterministic_above: float | None = None
    needs_agreement: bool = False

    needs_old_logps = True

    def scores(self, batch: Batch) -> Scores:
        """Log-probabilities of the sampled tokens under each row's teacher and reference."""
        teacher_logps = self.frozen.teacher.score(batch.teacher_index, batch.read_by_teacher)
        if self.frozen.reference is None:
            return Scores(teacher_logps)
        needed = batch.gopd_lambda != 1 if self.mixes_lambda else None
        return Scores(teacher_logps, self.frozen.reference.score(batch.teacher_index, batch.read_by_student, needed))

    def estimate(self, student: StudentForward, batch: Batch, scores: Scores, gopd_lambda: Tensor) -> Estimate:
        """The estimate of a micro-batch; see [`Estimator.estimate`]."""
        logps, entropy, aux_loss = student.log_probs()
        student_logps = logps.detach() if batch.old_logps is None else batch.old_logps
        teacher_logps, reference_logps = scores.teacher_logps, scores.reference_logps
        assert teacher_logps is not None
        # An id that only the student's padded vocabulary has: its teacher cannot say anything about it.
        is_known = ~teacher_logps.isneginf()
        if reference_logps is not None:
            is_known &= ~reference_logps.isneginf()
            if self.deterministic_above is not None or self.needs_agreement:
                gopd_lambda = gate_lambda(
                    gopd_lambda,
                    student_logps=student_logps,
                    teacher_logps=teacher_logps,
                    reference_logps=reference_logps,
                    deterministic_above=self.deterministic_above,
                    needs_agreement=self.needs_agreement,
                )
        known = batch.loss_mask * is_known
        advantages = token_advantages(
            student_logps=student_logps,
            teacher_logps=teacher_logps,
            reference_logps=reference_logps,
            mask=known,
            gopd_lambda=gopd_lambda,
            extrapolation_clip=self.extrapolation_clip,
        )
        credits = credit(advantages, known, discount=self.discount, weights=batch.token_ratio)
        if batch.stored_ratio is not None:  # by vLLM's weights TRL multiplies
            credits = credits * batch.stored_ratio
        return Estimate(
            logps=logps,
            credits=credits,
            advantages=advantages,
            known=known,
            gopd_lambda=gopd_lambda,
            student_logps=student_logps,
            teacher_logps=teacher_logps,
            reverse_kl=student_logps.float() - teacher_logps,
            reference_logps=reference_logps,
            has_reference=(batch.gopd_lambda != 1).unsqueeze(1) if self.mixes_lambda else None,
            entropy=entropy,
            aux_loss=aux_loss,
        )
