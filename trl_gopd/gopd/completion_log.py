"""What each token of the logged completions was rewarded with, gathered from the losses without a further forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .estimators.protocol import Estimate
from .monitors import token_table
from .objective import token_advantages


SHOWN_COMPLETIONS = 8  # in the page of coloured tokens


class CompletionLog:
    """
    Advantages of the sampled tokens of one generation batch, as far as its micro-batches have been trained on.

    Args:
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref| in the objective.
    """

    def __init__(self, extrapolation_clip: float | None) -> None:
        self._clip = extrapolation_clip
        self._means = torch.zeros(0)
        self._shown: dict[int, dict[str, Any]] = {}

    def begin(self, num_rows: int) -> None:
        """Begins a generation batch of `num_rows` rows on this process."""
        self._means = torch.full((num_rows,), torch.nan)
        self._shown = {}

    @torch.no_grad()
    def add(self, batch: Batch, estimate: Estimate) -> None:
        """Takes up the rows of a micro-batch; a row that was there already is replaced."""
        mask = estimate.known
        advantages = token_advantages(
            student_logps=estimate.student_logps,
            teacher_logps=estimate.teacher_logps,
            reference_logps=estimate.reference_logps,
            mask=mask,
            gopd_lambda=estimate.gopd_lambda,
            extrapolation_clip=self._clip,
        )
        rows = batch.row.cpu()
        self._means[rows] = (advantages.sum(1) / batch.loss_mask.sum(1).clamp(min=1)).cpu()
        columns = {
            "completion_ids": batch.completion_ids,
            "student_logps": estimate.student_logps,
            "teacher_logps": estimate.teacher_logps,
            "reference_logps": estimate.reference_logps,
            "advantages": advantages,
            "mask": mask,
        }
        for place, row in enumerate(rows.tolist()):
            if row < SHOWN_COMPLETIONS:
                self._shown[row] = {
                    name: None if column is None else column[place].cpu() for name, column in columns.items()
                }

    @property
    def row_means(self) -> Tensor:
        """Mean advantage of each row's tokens `(B,)`; NaN for rows that have not been trained on yet."""
        return self._means

    def token_rows(self, decode: Callable[[int], str]) -> list[dict[str, int | float | str | None]]:
        """Rows of `token_table` for the first completions; `decode` makes a token of its id."""
        table: list[dict[str, int | float | str | None]] = []
        for number, shown in sorted(self._shown.items()):
            columns: dict[str, Any] = {
                name: None if column is None else column.unsqueeze(0)
                for name, column in shown.items()
                if name != "completion_ids"
            }
            rows = token_table([[decode(index) for index in shown["completion_ids"].tolist()]], **columns)
            table += [{**row, "completion": number} for row in rows]
        return table
