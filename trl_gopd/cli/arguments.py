"""Argument types and checks that several sub-commands share."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


DTYPES = ("auto", "float32", "bfloat16", "float16")


def at_least(minimum: int) -> Callable[[str], int]:
    """Returns an argparse type that accepts whole numbers greater than or equal to `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return parse


def above_zero(example: str) -> Callable[[str], float]:
    """Returns an argparse type that accepts finite numbers greater than 0, and whose error suggests `example`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}; try {example}")
        return value

    return parse


def reward_scale(text: str) -> float:
    """Argparse type of a reward scale λ: a finite number greater than or equal to 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"λ must be a finite number of at least 0, got {text!r}; try 1.25")
    return value


@contextmanager
def refusals_in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the command with an error of one line where the body raises for what it was given, or cannot read."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


def check_models(parser: argparse.ArgumentParser, models: Mapping[str, str | None]) -> None:
    """
    Ends the command with an error if a value looks like a local path but holds no model.

    Args:
        parser (`argparse.ArgumentParser`): Parser whose `error` method is called.
        models (`Mapping[str, str | None]`): Names or paths of models by the option that gave them. `None` is skipped.
    """
    for option, given in models.items():
        if given is None:
            continue
        path = Path(given)
        is_path = path.exists() or path.is_absolute() or given.startswith(".") or given.count("/") > 1
        if is_path and not any((path / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            state = "has no config.json" if path.is_dir() else "does not exist"
            parser.error(
                f"{option} {given}: the folder {state}; name one that `save_pretrained` wrote, or a model of the Hub"
            )


def check_folders(parser: argparse.ArgumentParser, outputs: Mapping[str, Path | None]) -> None:
    """
    Ends the command with an error if the parent folder of an output does not exist.

    Args:
        parser (`argparse.ArgumentParser`): Parser whose `error` method is called.
        outputs (`Mapping[str, Path | None]`): Paths of outputs by the option that gave them. `None` is skipped.
    """
    for option, path in outputs.items():
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{option} {path}: the folder {path.parent} does not exist; make it or name another")


def torch_device(parser: argparse.ArgumentParser, name: str | None) -> str:
    """Returns `name` if torch can use that device, and `cuda` or `cpu` if `name` is `None`."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)  # allocating also detects a build without CUDA and a GPU index that does not exist
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: cannot be used ({str(error).splitlines()[0]}); try cpu")
    return name
