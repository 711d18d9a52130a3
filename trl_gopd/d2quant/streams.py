"""
Hidden-state streams: what enters the next block, window by window, in full precision and with the blocks so far
quantized; how a block is run on them, and what its linears read meanwhile.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_gopd.d2quant.finite import is_finite
from trl_gopd.d2quant.flow import Arguments, copied, record_blocks
from trl_gopd.d2quant.store import Store
from trl_gopd.d2quant.topology import Block, Topology
from trl_gopd.evaluation.logits import forwards_replaced


class _Stop(Exception):
    """Ends a forward pass once what it was run for has been seen."""


@dataclass
class Streams:
    """
    Hidden states of each calibration window, `(1, tokens, hidden_size)` on the CPU, in memory or mapped from a file.

    Args:
        start (`list[torch.Tensor]`): before the first block, as the quantized model computes it.
        full (`list[torch.Tensor]`): before the next block, as the full-precision model computes it.
        quantized (`list[torch.Tensor]`): before the next block, as the blocks quantized so far compute it.
    """

    start: list[Tensor]
    full: list[Tensor]
    quantized: list[Tensor]

    @classmethod
    def before_first_block(cls, calls: "BlockCalls", windows: Tensor) -> "Streams":
        """The streams of `windows` `(samples, tokens)`, before any block has run."""
        start = [calls.first(window) for window in windows]
        return cls(start, list(start), list(start))

    def restart_quantized(self, calls: "BlockCalls", windows: Tensor) -> None:
        """Begins the quantized stream anew, now that the model's embedding is packed."""
        self.start = [calls.first(window) for window in windows]
        self.quantized = list(self.start)


@dataclass
class BlockCalls:
    """
    How to run one block, or everything before the first one, outside the model's own forward pass.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model.
        first_block (`torch.nn.Module`): its first decoder block.
        arguments (`dict`): positional and keyword arguments of each block but the hidden states, by its name.
        store ([`~trl_gopd.d2quant.store.Store`]): where streams and captured inputs are kept.
        own (`Sequence[dict]`, *optional*):
            The same for each window, where they depend on its tokens; see [`BlockCalls.of_window`].
    """

    model: PreTrainedModel
    first_block: nn.Module
    arguments: Mapping[str, Arguments]
    store: Store = field(default_factory=Store)
    own: Sequence[Mapping[str, Arguments]] = ()

    @classmethod
    def record(cls, model: PreTrainedModel, topology: Topology, windows: Tensor, store: Store | None = None) -> Self:
        """
        Records masks, positions and the like of each window. What is equal for all windows is kept once.

        They depend on no block, see [`~trl_gopd.d2quant.flow.check_flow`], so that blocks run for one window only.
        """
        blocks = {block.name: block.module for block in topology.blocks}
        passes = record_blocks(model, blocks, windows[:1].to(model.device))
        common = {name: block.arguments for name, block in passes.items()}

        def skipping(output: Any) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return forward

        skipped = {blocks[name]: skipping(block.output) for name, block in passes.items()}
        own = [common]
        with forwards_replaced(skipped):
            for window in windows[1:]:
                known: dict[tuple[int, int], bool] = {}
                of_window = record_blocks(model, blocks, window[None].to(model.device))
                own.append({n: _shared(block.arguments, common[n], known) for n, block in of_window.items()})
        is_common = all(arguments[name] is common[name] for arguments in own for name in common)
        return cls(model, topology.blocks[0].module, common, store or Store(), () if is_common else own)

    def of_window(self, index: int) -> Self:
        """How to run the blocks on the hidden states of a calibration window."""
        return replace(self, arguments=self.own[index], own=()) if self.own else self

    def first(self, window: Tensor) -> Tensor:
        """Hidden states `(1, tokens, hidden_size)` that enter the first block, kept in the store."""
        return self.store.keep(input_of(self.model, self.first_block, window))

    def run(self, block: Block, hidden: Tensor) -> Tensor:
        """Output of a block, `(1, tokens, hidden_size)` on the block's device."""
        assert not self.own, "its arguments depend on the window: use `of_window`"
        # Copied: a block may change containers that it is given.
        args, kwargs = copied(self.arguments[block.name])
        device = next(block.module.parameters()).device
        output = block.module(hidden.to(device), *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        assert isinstance(output, Tensor)
        return output

    def move(self, block: Block, stream: list[Tensor]) -> None:
        """Replaces what enters a block, window by window, by what leaves it, kept in the store."""
        for index, hidden in enumerate(stream):
            stream[index] = self.store.keep(self.of_window(index).run(block, hidden))

    def run_and_capture(self, block: Block, hidden: Tensor, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """
        Inputs `(tokens, features)` of the linears `names`, and the block's output, kept in the store. A linear that
        the block calls more than once has the tokens of all calls, and one that it does not call is missing.
        """
        captured: dict[str, Tensor] = {}

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                rows = _token_rows(args)
                captured[name] = torch.cat([captured[name], rows]) if name in captured else rows

            return hook

        with ExitStack() as hooks:
            for name in names:
                hooks.callback(block.linear(name).register_forward_pre_hook(hook_for(name)).remove)
            output = self.run(block, hidden)
        return self.store.keep_all(captured), self.store.keep(output)

    def capture_input(self, block: Block, hidden: Tensor, name: str) -> Tensor | None:
        """
        Input `(tokens, features)` of the linear `name` when the block first calls it, on the block's device, or `None`
        if the block does not call it. What comes after that call is not computed.
        """
        captured: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            captured.append(_token_rows(args))
            raise _Stop

        handle = block.linear(name).register_forward_pre_hook(stop)
        try:
            self.run(block, hidden)
        except _Stop:
            return captured[0]
        finally:
            handle.remove()
        return None


def input_of(model: PreTrainedModel, module: nn.Module, window: Tensor) -> Tensor:
    """What a block or the head of a model is given for a window `(tokens,)`: `(1, tokens, hidden_size)`."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(window[None].to(model.device), use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0].detach()


def check_stream(stream: list[Tensor], what: str) -> None:
    """Raises a `ValueError` that begins with `what` if the hidden states of a window are not finite."""
    for index, hidden in enumerate(stream):
        if not is_finite(hidden):
            raise ValueError(
                f"{what} are not finite, first for calibration window {index}. Does the model give finite logits for "
                "its tokens, in this dtype? Load it in bfloat16 or float32."
            )


def _shared(value: Any, common: Any, known: dict[tuple[int, int], bool]) -> Any:
    """`common` where `value` is equal to it, and else `value` with the parts of `common` that are equal to its own."""
    if isinstance(value, Tensor):
        pair = (id(value), id(common))  # a mask is passed to all blocks, and compared once
        if pair not in known:
            known[pair] = isinstance(common, Tensor) and value.shape == common.shape and torch.equal(value, common)
        return common if known[pair] else value
    if isinstance(value, MutableMapping) and isinstance(common, Mapping) and value.keys() == common.keys():
        parts = {key: _shared(part, common[key], known) for key, part in value.items()}
        if all(part is common[key] for key, part in parts.items()):
            return common
        mapping = copied(value)
        mapping.update(parts)
        return mapping
    if isinstance(value, (list, tuple)) and isinstance(common, (list, tuple)) and len(value) == len(common):
        items = [_shared(part, other, known) for part, other in zip(value, common, strict=True)]
        same = all(part is other for part, other in zip(items, common, strict=True))
        return common if same else type(value)(items)
    plain = value is None or isinstance(value, (bool, int, float, str))
    return common if value is common or plain and type(value) is type(common) and value == common else value


def _token_rows(args: tuple[Tensor, ...]) -> Tensor:
    """The first argument of a linear as `(tokens, features)`."""
    return args[0].detach().flatten(0, -2)
