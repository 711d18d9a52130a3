"""Which teacher, which reference and which λ a row has."""

import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


LARGEST = torch.finfo(torch.float32).max  # λ


class Routing:
    """
    Which teacher, reference and λ a row has.

    Args:
        teacher_model, ref_model:
            What the user gave: a name or a model, or for several teachers a mapping from their ids; what `args` names
            in place of `None`. `ref_model` may then still be `None`, as may be its entries, for the student's start.
        args ([`GOPDConfig`]):
            Configuration of the run.

    Raises:
        `TypeError`, `ValueError`: if the ids do not fit together.
    """

    def __init__(self, teacher_model: Any, ref_model: Any, args: Any) -> None:
        if teacher_model is None:
            teacher_model = args.teacher_models or args.teacher_model_name_or_path
        if ref_model is None:
            ref_model = args.ref_models or args.ref_model_name_or_path
        if teacher_model is None:
            raise ValueError(
                "No teacher: `teacher_model` and `args.teacher_model_name_or_path` are both None. Pass one of them."
            )
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
    def gives_reference(self) -> bool:
        """Whether the user gave a reference."""
        return any(given is not None for given in self.references.values())

    @property
    def lambda_by_teacher(self) -> dict[str, float]:
        """λ of each teacher's rows that do not have one of their own."""
        return {key or "": value for key, value in zip(self._ids, self.lambdas.tolist(), strict=True)}

    @property
    def varies(self) -> bool:
        """Whether rows may differ in λ."""
        return self._has_lambda_column or len(set(self.lambdas.tolist())) > 1

    @property
    def uses_reference(self) -> bool:
        """Whether some λ may differ from 1."""
        return self._has_lambda_column or not bool((self.lambdas == 1).all())

    @property
    def uses_start(self) -> bool:
        """Whether the student's start is a reference."""
        return self.uses_reference and any(given is None for given in self.references.values())

    def check_dataset(self, dataset: Any, name: str) -> None:
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

    def rows(self, inputs: Sequence[Mapping[str, Any]], device: Any = None) -> tuple[Tensor, Tensor]:
        """Index of the teacher, int64, and λ, float32, of each row: both of shape `(B,)`."""
        owners, lambdas = [], []
        for row in inputs:
            where = f"the row with the prompt {row.get('prompt')!r}"
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
        # A greater one is infinite in float32, and a whole number may be greater than any float.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST:
            raise ValueError(
                f"`{self._lambda_column}` must be a finite number >= 0, got {reprlib.repr(value)} in {where}. Correct "
                "the row, or leave it out."
            )
        return float(value)


def as_name(given: Any) -> Any:
    """What the user gave as a model, with paths as strings, in a dictionary too."""
    if isinstance(given, Mapping):
        return {key: as_name(value) for key, value in given.items()}
    return os.fspath(given) if isinstance(given, os.PathLike) else given
