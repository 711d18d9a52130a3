"""Where hidden states wait until they are used: CPU memory, or files on a disk."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_gopd.d2quant.config import D2QuantConfig


ALIGNMENT = 64  # bytes; a tensor must begin at a multiple of the size of its numbers


class Store:
    """
    Keeps copies of tensors off the device that computes.

    Args:
        folder (`pathlib.Path`, *optional*):
            Where files are written. They have no name there from then on, and their space is free again once the
            tensors are. Without a folder, tensors are kept in CPU memory.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    @classmethod
    @contextmanager
    def open(cls, config: D2QuantConfig) -> Iterator["Store"]:
        """As `offload` of `config` says. Files are in `work_dir`, or in the system's folder for temporary files."""
        if config.offload != "disk":
            yield cls()
            return
        if config.work_dir is not None:
            os.makedirs(config.work_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="d2quant-", dir=config.work_dir, ignore_cleanup_errors=True) as folder:
            yield cls(Path(folder))

    def keep(self, tensor: Tensor) -> Tensor:
        """The same numbers on the CPU, without gradient; a file that is mapped into memory if there is a folder."""
        return self.keep_all({"": tensor})[""]

    def keep_all(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[`keep`] for several tensors, in one file."""
        kept = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        size = sum(_padded(tensor.nbytes) for tensor in kept.values())
        if self.folder is None or size == 0:
            return kept
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            # Written, and then mapped: a full disk raises here, while writing to a map would end the process.
            for tensor in kept.values():
                content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
                file.write(content)
                file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))
        mapped, start = torch.from_file(file.name, shared=False, size=size, dtype=torch.uint8), 0
        with suppress(PermissionError):  # where a file that is mapped cannot be removed, it goes with the folder
            os.unlink(file.name)
        for name, tensor in kept.items():
            kept[name] = mapped[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += _padded(tensor.nbytes)
        return kept


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
