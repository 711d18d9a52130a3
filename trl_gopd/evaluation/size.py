"""Storage of a model: bits per weight, counted from the stored tensors, and bytes on disk."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn


WEIGHT_FILES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Storage:
    """
    Storage that the weights of a model need. What is tied counts once.

    Args:
        bits_per_weight (`float`, *optional*):
            Bits of everything that is stored, whatever its precision, divided by the number of weights that it stands
            for; `None` of a module without parameters.
        block_bits_per_weight (`float`, *optional*):
            The same for the quantized linear layers of the decoder blocks alone, including their scales, zero points
            and biases: the number that the literature compares methods by. `None` if no layer is quantized.
        quantized_layers (`int`): number of quantized layers: linears, and embeddings.
        quantized_weights (`int`): number of weights that these layers represent.
        parameters_left (`int`): number of parameters of all other layers.
        file_bytes (`int`, *optional*): size of the weight files; `None` if no folder was given.
    """

    bits_per_weight: float | None
    block_bits_per_weight: float | None
    quantized_layers: int
    quantized_weights: int
    parameters_left: int
    file_bytes: int | None


def is_quantized(module: nn.Module) -> bool:
    """Returns whether a linear or embedding layer has a `weight` that holds integers, as packed formats do."""
    return isinstance(module, (nn.Linear, nn.Embedding)) and not (
        module.weight.dtype.is_floating_point or module.weight.dtype.is_complex
    )


def storage(model: nn.Module, folder: str | os.PathLike[str] | None = None) -> Storage:
    """
    Measures the storage of a model. Quantized layers are recognised as subclasses of `torch.nn.Linear` and
    `torch.nn.Embedding` whose `weight` holds integers, whichever method quantized them.

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
    quantized: list[Any] = [layer for layer in model.modules() if is_quantized(layer)]
    layers = list({id(layer.weight): layer for layer in quantized}.values())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    in_blocks = [layer for layer in layers if isinstance(layer, nn.Linear) and layer is not head]
    theirs = {id(parameter) for layer in quantized for parameter in layer.parameters()}
    left = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in theirs)
    weights, of_blocks = _weights(layers), _weights(in_blocks)
    return Storage(
        bits_per_weight=_bits([model]) / (weights + left) if weights + left else None,
        block_bits_per_weight=_bits(in_blocks) / of_blocks if of_blocks else None,
        quantized_layers=len(layers),
        quantized_weights=weights,
        parameters_left=left,
        file_bytes=None if folder is None else weight_file_bytes(folder),
    )


def _weights(layers: list[Any]) -> int:
    shapes = [
        (layer.out_features, layer.in_features)
        if isinstance(layer, nn.Linear)
        else (layer.num_embeddings, layer.embedding_dim)
        for layer in layers
    ]
    return sum(rows * columns for rows, columns in shapes)


def _bits(modules: list[Any]) -> int:
    """Bits of all tensors that are stored of some modules."""
    tensors = {id(tensor): tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()}
    return sum(8 * tensor.element_size() * tensor.numel() for tensor in tensors.values())


def weight_file_bytes(folder: str | os.PathLike[str]) -> int:
    """Returns the total size of the `*.safetensors` and `*.bin` files of a folder."""
    files = [file for file in Path(folder).iterdir() if file.suffix in WEIGHT_FILES]
    if not files:
        raise ValueError(f"`folder` must hold weight files ({', '.join(WEIGHT_FILES)}), got {str(folder)!r} without.")
    return sum(file.stat().st_size for file in files)
