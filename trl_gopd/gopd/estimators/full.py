"""The exact expectation of the paper's estimator over the vocabulary."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..batch import Batch, Scores
from ..divergence import DivergenceOutput, extrapolated_divergence
from ..frozen.build import FrozenModels
from ..objective import LogitTransform
from .protocol import Estimate, StudentForward
from .vocabulary import estimate_over_vocabulary, head_arguments


@dataclass(frozen=True)
class FullEstimator:
    """
    KL(π ‖ q_λ) of every state over the whole vocabulary. It is taken under the current student, so neither an older
    policy nor another sampler has to be corrected for.

    Args:
        frozen ([`FrozenModels`]):
            Teachers and references, whose logits are needed in the loss.
        transform ([`LogitTransform`]):
            What the student does to its raw logits.
        mixes_lambda (`bool`):
            Whether rows may differ in λ; those at λ = 1 are not shown to the reference then.
        discount (`float`):
            γ of later advantages.
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref|.
        chunk_size (`int`):
            Tokens whose logits exist at a time.
    """

    frozen: FrozenModels
    transform: LogitTransform
    mixes_lambda: bool = False
    discount: float = 0.0
    extrapolation_clip: float | None = None
    chunk_size: int = 256

    @property
    def needs_old_logps(self) -> bool:
        """Only what comes after a token depends on which token was sampled."""
        return self.discount > 0

    def scores(self, batch: Batch) -> Scores:
        """Nothing: frozen models are asked in the loss."""
        return Scores()

    def estimate(self, student: StudentForward, batch: Batch, scores: Scores, gopd_lambda: Tensor) -> Estimate:
        """The estimate of a micro-batch; see [`Estimator.estimate`]."""
        frozen, tokens = self.frozen, batch.loss_mask.bool()
        heads = frozen.teacher.heads
        teachers = frozen.teacher.targets(batch.teacher_index, batch.read_by_teacher)
        references = None
        if frozen.reference is not None:
            needed = batch.gopd_lambda != 1 if self.mixes_lambda else None
            references = frozen.reference.targets(batch.teacher_index, batch.read_by_student, needed)
            heads = heads + frozen.reference.heads

        def target_logits(chunk: slice) -> tuple[Tensor, Tensor | None]:
            teacher = teachers.logits(chunk)
            # Where λ is 1 the reference cancels, and the teacher stands in for it.
            return teacher, None if references is None else references.logits(chunk, default=teacher)

        def divergence(hidden: Tensor, head: nn.Module) -> tuple[DivergenceOutput, dict[str, Tensor]]:
            output = extrapolated_divergence(
                hidden,
                **head_arguments(head, heads, hidden.dtype),
                labels=batch.completion_ids[tokens],
                target_logits=target_logits,
                gopd_lambda=gopd_lambda.expand(tokens.shape)[tokens],
                transform=self.transform,
                extrapolation_clip=self.extrapolation_clip,
                chunk_size=self.chunk_size,
            )
            return output, {}

        return estimate_over_vocabulary(
            student,
            batch,
            gopd_lambda,
            divergence,
            discount=self.discount,
            has_reference=(batch.gopd_lambda != 1).unsqueeze(1) if self.mixes_lambda else None,
        )
