"""The expectation over the k likeliest tokens of each state, corrected by the sampled one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import Batch, Scores
from ..frozen.build import FrozenModels
from ..monitors import topk_overlap
from ..objective import LogitTransform
from ..stratified import StratifiedOutput, log_probs_at, stratified_divergence
from .protocol import Estimate, StudentForward
from .vocabulary import estimate_over_vocabulary, head_arguments


@dataclass(frozen=True)
class StratifiedEstimator:
    """
    An unbiased estimate of KL(π ‖ q_λ) of every state, exact on k ids. It is taken under the current student; only the
    one sampled token is corrected for another sampler.

    Args:
        frozen ([`FrozenModels`]):
            Teachers and references; the logits of those in this process are needed in the loss.
        transform ([`LogitTransform`]):
            What the student does to its raw logits.
        top_k (`int`, *optional*):
            The k likeliest ids under the student are exact. If `None`, those are that the servers of the teachers find
            likeliest.
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
    top_k: int | None
    mixes_lambda: bool = False
    discount: float = 0.0
    extrapolation_clip: float | None = None
    chunk_size: int = 256

    needs_old_logps = True

    def scores(self, batch: Batch) -> Scores:
        """The likeliest ids of served teachers; otherwise nothing, since frozen models are asked in the loss."""
        if self.top_k is not None:
            return Scores()
        logps, ids, top_logps = self.frozen.teacher.score_top(batch.teacher_index, batch.read_by_teacher)
        return Scores(teacher_logps=logps, top_ids=ids, top_logps=top_logps)

    def estimate(self, student: StudentForward, batch: Batch, scores: Scores, gopd_lambda: Tensor) -> Estimate:
        """The estimate of a micro-batch; see [`Estimator.estimate`]."""
        frozen, tokens = self.frozen, batch.loss_mask.bool()
        heads: list[nn.Module] = []
        teachers = references = top_ids = served = None
        if scores.top_ids is not None and scores.top_logps is not None and scores.teacher_logps is not None:
            top_ids = scores.top_ids[tokens]
            served = torch.cat([scores.top_logps, scores.teacher_logps.unsqueeze(-1)], -1)[tokens]
        else:
            teachers = frozen.teacher.targets(batch.teacher_index, batch.read_by_teacher)
            heads = frozen.teacher.heads
        if frozen.reference is not None:
            needed = batch.gopd_lambda != 1 if self.mixes_lambda else None
            references = frozen.reference.targets(batch.teacher_index, batch.read_by_student, needed)
            heads = heads + frozen.reference.heads
        overlaps: list[Tensor] = []

        def target_logps(chunk: slice, ids: Tensor) -> tuple[Tensor, Tensor | None]:
            if teachers is None:
                assert served is not None
                of_teacher = served[chunk]
            else:
                teacher = teachers.logits(chunk)
                count = min(ids.size(1) - 1, teacher.size(1))
                overlaps.append(topk_overlap(ids[:, :count], teacher.topk(count).indices))
                of_teacher = log_probs_at(teacher, ids)
            return of_teacher, None if references is None else references.log_probs(chunk, ids, of_teacher)

        def divergence(hidden: Tensor, head: nn.Module) -> tuple[StratifiedOutput, dict[str, Tensor]]:
            output = stratified_divergence(
                hidden,
                **head_arguments(head, heads, hidden.dtype),
                labels=batch.completion_ids[tokens],
                target_logps=target_logps,
                gopd_lambda=gopd_lambda.expand(tokens.shape)[tokens],
                importance_weights=None if batch.ratio is None else batch.ratio.expand(tokens.shape)[tokens],
                top_k=self.top_k,
                ids=top_ids,
                transform=self.transform,
                extrapolation_clip=self.extrapolation_clip,
                chunk_size=self.chunk_size,
            )
            means = {"top_k_coverage": output.coverage}
            if teachers is not None:
                means["top_k_overlap"] = torch.cat([output.coverage.new_zeros(0), *overlaps])
            return output, means

        return estimate_over_vocabulary(
            student,
            batch,
            gopd_lambda,
            divergence,
            discount=self.discount,
            has_reference=(batch.gopd_lambda != 1).unsqueeze(1) if self.mixes_lambda else None,
        )
