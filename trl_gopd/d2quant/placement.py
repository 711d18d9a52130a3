"""
Where the parts of a model are while it is quantized: one block at a time is on the device that computes.

What is outside of the blocks (embeddings, final norm, head, positions) is on that device for the whole run. A block
comes for its turn and goes back to where the blocks wait, which is CPU memory or, as long as nothing was written to
it, the checkpoint file that its weights are mapped from. At the end, everything is where it was.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.topology import Topology


class Placement:
    """
    Moves blocks to the device that computes, and back. In the body of its `with` statement, what is outside of the
    blocks is on that device.

    Args:
        model ([`~transformers.PreTrainedModel`]): on one device, if the next two differ.
        blocks (`list[torch.nn.Module]`): its decoder blocks.
        device (`torch.device`): where blocks are computed.
        waiting (`torch.device`): where they are before and after.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[nn.Module], device: torch.device, waiting: torch.device):
        self.blocks, self.device, self.waiting, self._origin = blocks, device, waiting, model.device
        inside = {module for block in blocks for module in block.modules()}
        self._outside = [module for module in model.modules() if module not in inside]

    @classmethod
    def of(cls, model: PreTrainedModel, topology: Topology, config: D2QuantConfig) -> Self:
        """
        As `device` and `offload` of `config` say.

        Raises:
            `ValueError`: if `device` cannot be used, or the model is not where the two need it.
        """
        origin = device = model.device
        if config.device is not None:
            try:
                device = torch.empty(0, device=config.device).device  # with its index, as tensors on it state it
            except (RuntimeError, AssertionError) as error:
                raise ValueError(
                    f"`device` must be one that torch can use, got {str(config.device)!r}: "
                    f"{str(error).splitlines()[0]} Use 'cpu', or leave it out to compute where the model is."
                ) from error
        if config.device is not None or config.offload is not None:
            places = sorted({str(tensor.device) for tensor in model.state_dict().values()})
            if len(places) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
                raise ValueError(
                    f"`device` and `offload` need a model on one device, got one on {' and '.join(places)}. Load it "
                    "with `device_map='cpu'`: its blocks are then moved one at a time."
                )
        if config.offload == "disk" and origin.type != "cpu":
            raise ValueError(
                f"`offload='disk'` leaves weights in the checkpoint's files until they are used, got a model on "
                f"{origin}. Load it with `device_map='cpu'`, which maps the files, and pass `device='{origin.type}'`."
            )
        waiting = origin if config.offload is None else torch.device("cpu")
        return cls(model, [block.module for block in topology.blocks], device, waiting)

    def __enter__(self) -> Self:
        try:
            _move(self._outside, self.device)
            for block in self.blocks:
                _move(block.modules(), self.waiting)
        except BaseException:  # such as no memory on the device
            self._move_back()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._move_back()

    def _move_back(self) -> None:
        _move(self._outside, self._origin)
        for block in self.blocks:
            _move(block.modules(), self._origin)

    @contextmanager
    def turn(self, block: nn.Module) -> Iterator[None]:
        """The block is on the device in the body, and may be changed there."""
        _move(block.modules(), self.device)
        try:
            yield
        finally:
            _move(block.modules(), self.waiting)

    @contextmanager
    def each_in_turn(self) -> Iterator[None]:
        """In the body, each block is on the device while it runs. Running must not change it."""
        blocks: list[Any] = self.blocks if self.device != self.waiting else []
        own = [vars(block).get("forward") for block in blocks]  # hooks of accelerate set it on the instance
        try:
            for block in blocks:
                block.forward = self._borrowing(block, block.forward)
            yield
        finally:
            for block, before in zip(blocks, own, strict=True):
                del block.forward
                if before is not None:
                    block.forward = before

    def _borrowing(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = _tensors(block.modules())
            _move(block.modules(), self.device)
            try:
                return forward(*args, **kwargs)
            finally:
                # What was there before, not a copy of it, which would no longer be mapped from a file.
                for owner, name, tensor, data in before:
                    tensor.data = data
                    setattr(owner, name, tensor)

        return run

    @contextmanager
    def all_blocks(self) -> Iterator[None]:
        """All blocks are on the device in the body, and may be changed there."""
        with ExitStack() as turns:
            for block in self.blocks:
                turns.enter_context(self.turn(block))
            yield


def _move(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Moves the tensors of `modules`, without those of their children. Tied ones stay tied."""
    replaced: dict[Tensor, nn.Parameter] = {}
    for owner, name, tensor, data in _tensors(modules):
        if tensor.device == device:
            continue
        if not isinstance(tensor, nn.Parameter):
            setattr(owner, name, data.to(device))
            continue
        if tensor not in replaced:
            there = data.to(device)
            try:
                tensor.data = there
                continue
            except RuntimeError:  # of another kind of device, to which torch cannot move a parameter in place
                replaced[tensor] = nn.Parameter(there, requires_grad=tensor.requires_grad)
        setattr(owner, name, replaced[tensor])


def _tensors(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Each parameter and buffer of `modules`: its owner, its name there, itself and its data."""
    return [
        (owner, name, tensor, tensor.data)
        for owner in modules
        for tensors in (owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
        for name, tensor in tensors
    ]
