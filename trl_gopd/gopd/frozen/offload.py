"""Weights that wait in CPU memory and are on the device while they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Offload:
    """
    The weights of a module whose home is CPU memory. Nothing writes to them, so they are copied one way only.

    On a GPU their memory is pinned and the copies run on a stream of their own, beside whatever the device computes.

    Args:
        module (`torch.nn.Module`):
            The module, in CPU memory.
        device (`torch.device`):
            Where it is needed.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = torch.device(device)
        self._tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
        self._stream: Any = None
        self._fetched: list[Tensor] | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            for tensor in self._tensors:
                tensor.data = tensor.data.pin_memory()
        self._parked = [tensor.data for tensor in self._tensors]

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(data.numel() * data.element_size() for data in self._parked)

    def prefetch(self) -> None:
        """Begins to copy the weights, if the device is a GPU that has room for twice as much."""
        if self._stream is None or self._fetched is not None:
            return
        if torch.cuda.mem_get_info(self.device)[0] >= 2 * self.num_bytes:
            self._fetched = self._copies()

    def _copies(self) -> list[Tensor]:
        if self._stream is None:
            return [data.to(self.device) for data in self._parked]
        with torch.cuda.stream(self._stream):
            return [data.to(self.device, non_blocking=True) for data in self._parked]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are on the device for the body, and in CPU memory afterwards, after errors too."""
        copies, self._fetched = self._fetched or self._copies(), None
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            for copy in copies:  # of the other stream, which may not use their memory again before this one is done
                copy.record_stream(current)
        try:
            for tensor, copy in zip(self._tensors, copies, strict=True):
                tensor.data = copy
            yield
        finally:
            for tensor, data in zip(self._tensors, self._parked, strict=True):
                tensor.data = data
