"""Which modules of a model a list of names and patterns means."""

import difflib
import re
from collections.abc import Iterable

from torch import nn


def is_named(name: str, entries: Iterable[str] | None) -> bool:
    """
    Whether the module that is called `name` in its model is one of `entries`, or a part of one. An entry is

    - a name, or a part of it between dots: of the module itself or of one that contains it;
    - a regular expression, if it has other characters than names have. As in transformers, it has to match from the
      start of the name to its end, or to that of a module that contains it.

    Example:

    ```python
    >>> name = "model.layers.3.mlp.down_proj"
    >>> [is_named(name, [entry]) for entry in ("down_proj", "layers.3", "mlp", r".*\\.(up|down)_proj")]
    [True, True, True, True]
    >>> [is_named(name, [entry]) for entry in ("own_proj", "layers.33", "lm_head")]
    [False, False, False]

    ```
    """
    return any(_means(entry, name) for entry in entries or ())


def check_entries(entries: Iterable[str] | None, model: nn.Module) -> None:
    """Raises a `ValueError` that names the first of `entries` that means no module and no parameter of `model`."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for entry in entries or ():
        if not any(_means(entry, name) for name in names):
            parts = entry.strip(".").count(".") + 1
            split = [name.split(".") for name in names]
            runs = {".".join(name[i : i + parts]) for name in split for i in range(len(name) - parts + 1)}
            nearest = difflib.get_close_matches(entry, sorted(runs or names), n=1, cutoff=0)
            raise ValueError(
                f"`modules_to_not_convert` names what nothing in the model is called, {entry!r}. The nearest name "
                f"is {nearest[0]!r}. Pass names of modules, parts of them between dots such as 'layers.0' or "
                "'mlp.down_proj', or regular expressions for names from their start, such as '.*down_proj'."
            )


def check_patterns(entries: Iterable[str] | None) -> None:
    """Raises a `ValueError` that names the first of `entries` that is neither a name nor a regular expression."""
    for entry in entries or ():
        try:
            re.compile(entry)
        except re.error as error:
            raise ValueError(
                f"`modules_to_not_convert` must hold names or regular expressions, got {entry!r}, which is none: "
                f"{error}. Write '.*' for any characters."
            ) from error


def _means(entry: str, name: str) -> bool:
    part = entry.strip(".")
    # In a base model, names lack the prefix that they have in a model with a head: an entry may be the longer.
    if f".{part}." in f".{name}." or f".{part}".endswith(f".{name}"):
        return True
    is_pattern = re.search(r"[^\w.-]", entry) is not None  # a dot alone is that of a name
    return is_pattern and re.fullmatch(rf"(?:{entry})(?:(?:(?<=\.)|\.).*)?", name) is not None


def is_listed(name: str, listed: Iterable[str] | None) -> bool:
    """
    Whether the linear that is called `name` in its model is one of those `listed` by the end of their names.

    Example:

    ```python
    >>> is_listed("model.layers.3.mlp.down_proj", ["down_proj"])
    True
    >>> is_listed("model.layers.13.mlp.down_proj", ["layers.3.mlp.down_proj"])
    False

    ```
    """
    # In a base model, names lack the prefix that they have in a model with a head: a listed name may be the longer.
    return any(f".{name}".endswith(f".{end}") or f".{end}".endswith(f".{name}") for end in listed or ())
