"""
Which teacher, reference and λ a row has, and the models of one role as a panel of which each scores its own rows.

Under ZeRO-3 and FSDP a frozen model is sharded, and every rank must call it equally often. That holds for one that
scores all rows, since batches and micro-batches have the same number of rows on all ranks. One that scores some of the
rows is given as many on every rank as on the rank that has most.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .teachers import Scorer


class Routing:
    """
    Which teacher, reference and λ a row has.

    Args:
        teacher_model, ref_model:
            What the user gave: a name or a model, or for several teachers a mapping from their ids; `ref_model` may be
            `None`, as may be its entries, for the student's start.
        args ([`GOPDConfig`]):
            Configuration of the run.

    Raises:
        `TypeError`, `ValueError`: if the ids do not fit together.
    """

    def __init__(self, teacher_model, ref_model, args):
        several = isinstance(teacher_model, Mapping)
        self.teachers: dict[str | None, Any] = dict(teacher_model) if several else {None: teacher_model}
        if several and not (
            teacher_model and all(isinstance(key, str) and key and "/" not in key for key in teacher_model)
        ):
            raise TypeError(
                f"`teacher_model` must map teacher ids, strings without a slash, to models, got the keys "
                f"{list(teacher_model)}."
            )
        self._ids = list(self.teachers)
        if isinstance(ref_model, Mapping):
            if set(ref_model) != set(self._ids):
                raise ValueError(
                    f"`ref_model` has the keys {list(ref_model)} and `teacher_model` "
                    f"{list(teacher_model) if several else 'none'}. Give the same keys to both, or one reference for "
                    "all; None stands for the student's start."
                )
            self.references = {key: ref_model[key] for key in self._ids}
        else:
            self.references = dict.fromkeys(self._ids, ref_model)
        for name in ("gopd_lambda_by_teacher", "gopd_weight_by_teacher"):
            self._check_ids(name, getattr(args, name) or {})
        by_teacher = args.gopd_lambda_by_teacher or {}
        self.lambdas = torch.tensor([float(by_teacher.get(key, args.gopd_lambda)) for key in self._ids])
        self.weights = None
        if args.gopd_weight_by_teacher:
            self.weights = torch.tensor([float(args.gopd_weight_by_teacher.get(key, 1.0)) for key in self._ids])
        self._id_column, self._lambda_column = args.teacher_id_column, args.lambda_column
        self._has_lambda_column = False

    def by_teacher(self, name: str, given: Any) -> dict[str | None, Any]:
        """An option of the teachers by their ids: one for all, or a mapping that may leave some out."""
        if not isinstance(given, Mapping):
            return {} if given is None else dict.fromkeys(self._ids, given)
        self._check_ids(name, given)
        return dict(given)

    def _check_ids(self, name: str, given: Mapping[str, Any]) -> None:
        unknown = sorted(set(given) - set(self._ids))
        if unknown:
            raise ValueError(f"`{name}` names {unknown}, but the teachers are {self._names}.")

    @property
    def _names(self) -> str:
        return "one without an id" if self._ids == [None] else str(self._ids)

    @property
    def varies(self) -> bool:
        """Whether rows may differ in λ."""
        return self._has_lambda_column or len(set(self.lambdas.tolist())) > 1

    @property
    def uses_reference(self) -> bool:
        """Whether some λ may differ from 1."""
        return self._has_lambda_column or not bool((self.lambdas == 1).all())

    @property
    def given(self) -> list[Any]:
        """The teachers, and the references if they are used, as the user gave them."""
        return [*self.teachers.values(), *(self.references.values() if self.uses_reference else ())]

    @property
    def uses_start(self) -> bool:
        """Whether the student's start is a reference."""
        return self.uses_reference and any(given is None for given in self.references.values())

    def check_dataset(self, dataset, name: str) -> None:
        """Raises `ValueError` for a row without a known teacher or with a λ that is none, where that can be seen."""
        columns = getattr(dataset, "column_names", None)
        if not isinstance(columns, list):
            return
        self._has_lambda_column |= self._lambda_column in columns
        if self._ids != [None] and self._id_column not in columns:
            raise ValueError(
                f"`{name}` needs a column `{self._id_column}`, which says which of the teachers {self._ids} scores a "
                f"row; it has {columns}. Add it, or set `teacher_id_column`."
            )
        if hasattr(dataset, "__len__"):
            if self._ids != [None]:
                for number, value in enumerate(dataset[self._id_column]):
                    self._owner(value, f"row {number} of `{name}`")
            if self._lambda_column in columns:
                for number, value in enumerate(dataset[self._lambda_column]):
                    self._lambda(value, f"row {number} of `{name}`")

    def rows(self, inputs: Sequence[Mapping[str, Any]], device=None) -> tuple[Tensor, Tensor]:
        """Index of the teacher, int64, and λ, float32, of each row: both of shape `(B,)`."""
        owners, lambdas = [], []
        for row in inputs:
            where = f"the row with the prompt {row['prompt']!r}"
            owners.append(0 if self._ids == [None] else self._owner(row.get(self._id_column), where))
            own = row.get(self._lambda_column) if self._lambda_column in row else float(self.lambdas[owners[-1]])
            lambdas.append(self._lambda(own, where))
            if lambdas[-1] != 1 and not self.uses_reference:
                raise ValueError(
                    f"λ is {own} in {where}, but no reference was loaded, since `gopd_lambda` is 1 and the data set "
                    f"does not say that it has a column `{self._lambda_column}`. Set `gopd_lambda` to the usual value."
                )
        return torch.tensor(owners, device=device), torch.tensor(lambdas, dtype=torch.float32, device=device)

    def _owner(self, value: Any, where: str) -> int:
        if value not in self._ids:
            raise ValueError(
                f"`{self._id_column}` is {value!r} in {where}, but the teachers are {self._ids}. Correct the row, or "
                "add the teacher."
            )
        return self._ids.index(value)

    def _lambda(self, value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"`{self._lambda_column}` must be a finite number >= 0, got {value!r} in {where}.")
        return float(value)


class Panel:
    """
    The frozen models in one role. Each row of a batch belongs to one of them, and is scored by that alone.

    Args:
        scorers (`Sequence[Scorer]`):
            The models by owner; one that is there several times is called once.
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed.
    """

    def __init__(self, scorers: Sequence[Scorer], accelerator):
        self.scorers = list(dict.fromkeys(scorers))
        self._index = torch.tensor([self.scorers.index(scorer) for scorer in scorers])
        self.accelerator = accelerator

    @property
    def heads(self) -> list[nn.Module]:
        """Output heads of all models."""
        return [scorer.head for scorer in self.scorers]

    def _groups(self, owners: Tensor) -> Iterator[tuple[Scorer, Tensor, int]]:
        """Models that have to be called, the rows to call them with, and how many of these are their own."""
        if len(self.scorers) == 1:
            yield self.scorers[0], torch.arange(len(owners), device=owners.device), len(owners)
            return
        index = self._index.to(owners.device)[owners]
        for number, scorer in enumerate(self.scorers):
            rows = (index == number).nonzero().squeeze(1)
            count = called = len(rows)
            if scorer.is_sharded:
                called = int(self.accelerator.gather(rows.new_tensor([count])).max())
            if called:
                # Any row will do to keep in step with the rank that has most.
                yield scorer, torch.cat([rows, rows.new_zeros(called - count)]), count

    def score(self, owners: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_ids: Tensor) -> Tensor:
        """
        Log-probabilities of the completions.

        Args:
            owners (`torch.Tensor` of shape `(B,)`):
                Which of the models a row belongs to.
            input_ids (`torch.Tensor` of shape `(B, L)`), attention_mask (`torch.Tensor` of shape `(B, L)`):
                Prompts, padded left, and completions, padded right.
            completion_ids (`torch.Tensor` of shape `(B, T)`):
                The last `T` columns of `input_ids`.

        Returns:
            `torch.Tensor` of shape `(B, T)`: float32 nats.
        """
        result = torch.empty(completion_ids.shape, dtype=torch.float32, device=completion_ids.device)
        for scorer, rows, count in self._groups(owners):
            logps = scorer.score(input_ids[rows], attention_mask[rows], completion_ids[rows])
            result[rows[:count]] = logps[:count]
        return result

    def score_top(
        self, owners: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`ServedScorer.score_top` of rows that belong to models on servers; arguments as for `score`."""
        groups = list(self._groups(owners))
        parts = [s.score_top(input_ids[rows], attention_mask[rows], completion_ids[rows]) for s, rows, _ in groups]
        back = torch.cat([rows for _, rows, _ in groups]).argsort()
        logps, ids, top_logps = (torch.cat(part)[back] for part in zip(*parts, strict=True))
        return logps, ids, top_logps

    def targets(
        self, owners: Tensor, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor
    ) -> Callable[[slice], Tensor]:
        """
        The distributions of the models at the tokens of a batch.

        Args:
            owners, input_ids, attention_mask:
                As for `score`.
            tokens (`torch.Tensor` of shape `(B, T)`):
                Which of the last `T` tokens are meant, N of them.

        Returns:
            `Callable`: from a slice of the N tokens, in the order of `tokens`, to tempered float32 logits `(n, V)`
            over the ids that all models have.
        """
        numbers = torch.zeros(tokens.shape, dtype=torch.long, device=tokens.device)
        numbers[tokens] = torch.arange(int(tokens.sum()), device=tokens.device)
        parts = []
        for scorer, rows, count in self._groups(owners):
            own = rows[:count]
            hidden = scorer.hidden(input_ids[rows], attention_mask[rows], tokens.size(1))[:count]
            parts.append((scorer, hidden[tokens[own]], numbers[own][tokens[own]]))
        width = min(scorer.vocab_size for scorer in self.scorers)

        def logits(rows: slice) -> Tensor:
            pieces, places = [], []
            for scorer, hidden, positions in parts:  # positions ascend, so those of a slice are neighbours
                first, last = torch.searchsorted(positions, positions.new_tensor([rows.start, rows.stop])).tolist()
                if first < last:
                    pieces.append(scorer.logits(hidden[first:last])[:, :width])
                    places.append(positions[first:last] - rows.start)
            if len(pieces) == 1:
                return pieces[0]
            return torch.cat(pieces)[torch.cat(places).argsort()]

        return logits
