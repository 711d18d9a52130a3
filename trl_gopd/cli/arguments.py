"""What several sub-commands read from their command lines."""

import argparse
from collections.abc import Callable


DTYPES = ("auto", "float32", "bfloat16", "float16")


def at_least(minimum: int) -> Callable[[str], int]:
    """Type of an argument that is a whole number and no less than `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return parse


def reward_scale(text: str) -> float:
    """λ, finite and at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"λ must be a finite number of at least 0, got {text!r}; try 1.25")
    return value


def torch_device(parser: argparse.ArgumentParser, name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)  # also finds a build without CUDA, and a GPU that is not there
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: cannot be used ({str(error).splitlines()[0]}); try cpu")
    return name
