"""What each token of the logged completions was rewarded with, gathered from the losses without a further forward."""

import math
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import torch

from ..files import written_whole
from .batch import Batch
from .estimators.protocol import Estimate
from .monitors import token_table
from .objective import token_advantages
from .visualize import advantages_html


COLUMN = "gopd_advantage"  # of TRL's table of completions
SHOWN_COMPLETIONS = 8  # in the page of coloured tokens


class CompletionLog:
    """
    Advantages of the sampled tokens of one generation batch, as far as its micro-batches have been trained on.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Gathers over ranks, which all have to call `begin` and `fill` together.
        has_rewards (`bool`):
            Whether TRL's table holds the advantages of task rewards. Those of the distillation then get a column of
            their own, and take the place of these otherwise.
        extrapolation_clip (`float`, *optional*):
            Bound on |log π* − log π_ref| in the objective.
    """

    def __init__(self, accelerator: Any, *, has_rewards: bool, extrapolation_clip: float | None) -> None:
        self._accelerator, self._has_rewards, self._clip = accelerator, has_rewards, extrapolation_clip
        self._means = torch.zeros(0)
        self._shown: dict[int, dict[str, Any]] = {}

    def begin(self, num_rows: int, logs: MutableMapping[str, Any]) -> None:
        """Begins a generation batch of `num_rows` rows on this process, which TRL has just put into its `logs`."""
        self._means = torch.full((num_rows,), torch.nan)
        self._shown = {}
        if self._has_rewards:
            logs["extra"][COLUMN].extend([math.nan] * num_rows * self._accelerator.num_processes)

    def fill(self, logs: MutableMapping[str, Any]) -> None:
        """
        Puts each completion's mean advantage into TRL's `logs`; NaN for rows that have not been trained on yet.
        """
        if not len(self._means):
            return
        rows = self._accelerator.gather(self._means.to(self._accelerator.device)).tolist()
        column = logs["extra"][COLUMN] if self._has_rewards else logs["advantages"]
        for _ in range(min(len(rows), len(column))):
            column.pop()
        column.extend(rows)

    @torch.no_grad()
    def add(self, batch: Batch, estimate: Estimate) -> None:
        """Takes up the rows of a micro-batch; a row that was there already is replaced."""
        if not len(self._means):  # sampled before the checkpoint that the run was resumed from
            return
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

    def write_page(self, folder: Path, *, step: int, decode: Callable[[int], str]) -> None:
        """Writes the first completions as a page of coloured tokens; `decode` makes a token of its id."""
        rows = self.token_rows(decode)
        if rows:
            with written_whole(folder / f"advantages_{step:05d}.html") as part:
                part.write_text(advantages_html(rows, title=f"Advantages, step {step}"), encoding="utf-8")

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
