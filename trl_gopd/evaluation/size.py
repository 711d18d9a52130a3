"""Storage of a model: bits per quantized weight, counted from the stored tensors, and bytes on disk."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


WEIGHT_FILES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Storage:
    """
    Storage that the weights of a model need.

    Args:
        bits_per_weight (`float`, *optional*):
            Bits of all stored tensors of the quantized layers, including scales, zero points and biases, divided by
            `quantized_weights`; `None` if no layer is quantized.
        quantized_layers (`int`): number of quantized linear layers.
        quantized_weights (`int`): number of weights that these layers represent, `in_features · out_features` each.
        parameters_left (`int`): number of parameters of all other layers, with tied parameters counted once.
        file_bytes (`int`, *optional*): size of the weight files; `None` if no folder was given.
    """

    bits_per_weight: float | None
    quantized_layers: int
    quantized_weights: int
    parameters_left: int
    file_bytes: int | None


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a module is a linear layer whose `weight` holds integers, as packed formats do."""
    return isinstance(module, nn.Linear) and not (
        module.weight.dtype.is_floating_point or module.weight.dtype.is_complex
    )


def storage(model: nn.Module, folder: str | os.PathLike[str] | None = None) -> Storage:
    """
    Measures the storage of a model. Quantized layers are recognised as subclasses of `torch.nn.Linear` whose `weight`
    holds integers, whichever method quantized them.

    Args:
        model (`torch.nn.Module`):
            Model to measure.
        folder (`str` or `os.PathLike`, *optional*):
            Folder in which the model is saved.

    Returns:
        [`Storage`].

    Raises:
        `ValueError`: if `folder` holds no weight files.
    """
    layers: list[Any] = [module for module in model.modules() if is_quantized(module)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = sum(
        8 * tensor.element_size() * tensor.numel() for layer in layers for tensor in layer.state_dict().values()
    )
    theirs = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return Storage(
        bits_per_weight=bits / weights if weights else None,
        quantized_layers=len(layers),
        quantized_weights=weights,
        parameters_left=sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in theirs),
        file_bytes=None if folder is None else weight_file_bytes(folder),
    )


def weight_file_bytes(folder: str | os.PathLike[str]) -> int:
    """Returns the total size of the `*.safetensors` and `*.bin` files of a folder."""
    files = [file for file in Path(folder).iterdir() if file.suffix in WEIGHT_FILES]
    if not files:
        raise ValueError(f"`folder` must hold weight files ({', '.join(WEIGHT_FILES)}), got {str(folder)!r} without.")
    return sum(file.stat().st_size for file in files)
