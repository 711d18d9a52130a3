"""Checks of the fields of a configuration. Each error says what was given, what is accepted and what to do."""

import math
from typing import Any


def check_choices(config: object, name: str, accepted: tuple[Any, ...]) -> None:
    """Raises a `ValueError` unless the field `name` is one of `accepted`, of the same type."""
    value = getattr(config, name)
    # The types are compared too, since True == 1 and 2.0 == 2.
    if not any(type(value) is type(choice) and value == choice for choice in accepted):
        raise ValueError(f"`{name}` must be one of {listed(accepted)}, got {value!r}. Choose one of these.")


def check_integer(config: object, name: str, lowest: int, remedy: str) -> None:
    """Raises a `TypeError` or a `ValueError` unless the field `name` is an integer, at least `lowest`."""
    value = getattr(config, name)
    if type(value) is not int:
        raise TypeError(f"`{name}` must be an integer, at least {lowest}, got {value!r}. {remedy}")
    if value < lowest:
        raise ValueError(f"`{name}` must be at least {lowest}, got {value}. {remedy}")


def check_number(
    config: object, name: str, start: float, stop: float, remedy: str, *, open_start: bool = False
) -> None:
    """Raises a `TypeError` or a `ValueError` unless the field `name` is a number in the interval."""
    value = getattr(config, name)
    interval = f"{'(' if open_start else '['}{start}, {stop}{')' if stop == math.inf else ']'}"
    if type(value) not in (int, float):
        raise TypeError(f"`{name}` must be a number in {interval}, got {value!r}. {remedy}")
    # The comparison is written so that NaN is refused.
    if not (start <= value <= stop and value < math.inf and not (open_start and value == start)):
        raise ValueError(f"`{name}` must be in {interval}, got {value}. {remedy}")


def listed(names: Any) -> str:
    """Names or values, quoted and separated by commas."""
    return ", ".join(repr(name) for name in names)
