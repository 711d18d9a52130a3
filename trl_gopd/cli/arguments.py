"""What several sub-commands read from their command lines."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path


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


def check_models(parser: argparse.ArgumentParser, models: Mapping[str, str | None]) -> None:
    """Ends with an error if a model, by the option that names it, is a path without a model."""
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
    """Ends with an error if the folder that an output goes to, by its option, does not exist."""
    for option, path in outputs.items():
        if path and not path.absolute().parent.is_dir():
            parser.error(f"{option} {path}: the folder {path.parent} does not exist; make it or name another")


def torch_device(parser: argparse.ArgumentParser, name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)  # also finds a build without CUDA, and a GPU that is not there
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: cannot be used ({str(error).splitlines()[0]}); try cpu")
    return name
