"""
Transforms of a block that do not change its output: moving a column scale, moving a shift of a norm, and rotating the
residual stream.

Each transform is tried on the block itself, and accepted only if the output stays the same in every bit.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .recording import Call, first_tensor, noise_like


@dataclass(frozen=True)
class ScalePair:
    """
    A producer into which the column scale `c` of a consumer is absorbed exactly, for every `c > 0`:

        consumer.weight /= c;   producer.weight[rows] *= c[:, None];   producer.bias[rows] *= c

    Args:
        producer (`str`): linear whose rows are scaled, relative to the block: `mlp.up_proj`; `fc1` before a ReLU.
        consumer (`str`): linear whose columns are divided: `mlp.down_proj`.
        rows (`slice`): output rows of the producer, as many as the consumer has columns; the up half of a fused pair.
    """

    producer: str
    consumer: str
    rows: slice


def find_scale_pairs(
    calls: Mapping[str, Call], linears: Mapping[str, Call]
) -> tuple[tuple[ScalePair, ...], dict[str, str]]:
    """Pairs among the linears of an MLP, and why the other second layers have none."""
    pairs, reasons = [], {}
    for index, (consumer, call) in enumerate(linears.items()):
        size, parent = call.module.in_features, consumer.rpartition(".")[0]
        producers = {
            name: linear.module
            for name, linear in list(linears.items())[:index]
            if name.rpartition(".")[0] == parent
            and linear.reads != call.reads
            and linear.module.out_features in (size, 2 * size)
        }
        candidates = [
            ScalePair(name, consumer, slice(start, start + size))
            for name, producer in producers.items()
            for start in range(0, producer.out_features, size)
        ]
        while parent not in calls:  # its parts are called one by one, by a module above
            parent = parent.rpartition(".")[0]
        exact = [pair for pair in candidates if _scale_passes(calls[parent], pair, producers, call.module)]
        if exact:
            pairs.append(exact[-1])
        elif candidates:
            between = [type(m).__name__ for m in calls[parent].module.children() if not list(m.parameters())]
            between = [name for name in between if "Dropout" not in name]
            reasons[consumer] = f"no scale of its input passes through {' or '.join(between) or 'its activation'}"
    return tuple(pairs), reasons


def find_expert_pairs(
    calls: Mapping[str, Call], producers: tuple[str, ...], consumers: tuple[str, ...]
) -> tuple[tuple[ScalePair, ...], dict[str, str]]:
    """
    The same for experts that were one parameter: `producers[i]` and `consumers[i]` are linears of one expert. All of
    them run the same code, and one that is called is tried.
    """
    parent = producers[0].rsplit(".", 3)[0]
    called = [pair for pair in zip(producers, consumers, strict=True) if pair[0] in calls and pair[1] in calls]
    if parent != consumers[0].rsplit(".", 3)[0] or parent not in calls or not called:
        return (), {}
    (name, consumer), mlp = called[0], calls[parent]
    producer, linear = calls[name].module, calls[consumer].module
    size = linear.in_features
    for start in reversed(range(0, producer.out_features, size)):
        rows = slice(start, start + size)
        if _scale_passes(mlp, ScalePair(name, consumer, rows), {name: producer}, linear):
            return tuple(ScalePair(*names, rows) for names in zip(producers, consumers, strict=True)), {}
    return (), dict.fromkeys(consumers, f"no scale of its input passes through {type(mlp.module).__name__}")


def _scale_passes(mlp: Call, pair: ScalePair, producers: Mapping[str, nn.Module], consumer: nn.Linear) -> bool:
    """
    Whether moving scales from `pair.consumer` to `pair.producer` leaves the output as it is. The scales are powers of
    two, so an exact transform changes no bit. The outputs of the producers are replaced by noise, because with very
    small or large weights a GELU would look linear. That of `pair.producer` is then also given all magnitudes, where a
    clamp or a threshold shows that lies outside of what a model commonly computes.
    """
    # Float16 has exact powers of two and products in a narrow range only.
    exponents = (4, 9) if consumer.weight.dtype == torch.float16 else (-24, 25)
    scales = torch.exp2(noise_like(consumer.weight.new_empty(consumer.in_features)).sign())

    def outcome(scales: Tensor | float, exponents: tuple[int, int]) -> tuple[Tensor, Tensor]:
        inputs = []

        def produce(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = noise_like(output, seed=1)
            if module is producers[pair.producer]:
                generator = torch.Generator().manual_seed(2)
                magnitudes = torch.randint(*exponents, output[..., pair.rows].shape, generator=generator)
                output[..., pair.rows] *= torch.exp2(magnitudes.to(output)) * scales
            return output

        def consume(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs.append(args[0] / scales)
            return (inputs[-1], *args[1:])

        with ExitStack() as hooks:
            for producer in producers.values():
                hooks.callback(producer.register_forward_hook(produce).remove)
            hooks.callback(consumer.register_forward_pre_hook(consume).remove)
            return mlp.repeat(), inputs[-1]

    return all(all(map(torch.equal, outcome(1.0, e), outcome(scales, e))) for e in ((0, 1), exponents))


def shift_passes(calls: Mapping[str, Call], norm: str, readers: tuple[str, ...]) -> bool:
    """Whether shifting the output of `norm` and shifting the inputs of `readers` have the same effect."""

    def shift(values: Tensor) -> Tensor:
        return values + noise_like(values[..., :1, :])

    with ExitStack() as hooks:
        hook = calls[norm].module.register_forward_hook(lambda module, args, output: shift(output))
        hooks.callback(hook.remove)
        expected = calls[""].repeat()
    with ExitStack() as hooks:
        for reader in readers:
            hook = calls[reader].module.register_forward_pre_hook(lambda module, args: (shift(args[0]), *args[1:]))
            hooks.callback(hook.remove)
        return torch.equal(calls[""].repeat(), expected)


def find_residual_writers(calls: Mapping[str, Call], linears: Mapping[str, Call]) -> tuple[str, ...]:
    """
    Linears that add a multiple of their output to the block's input. To find them, the input and the outputs of all
    other candidates are set to zero: flipping the output of the linear and scaling it by powers of two must then do
    the same to the block's output. With the outputs of all of them set to zero, the block must return its input.
    """
    block = calls[""]
    hidden_states = first_tensor(block.args)
    if hidden_states is None:
        return ()
    candidates = {n: c.module for n, c in linears.items() if c.module.out_features == hidden_states.shape[-1]}
    scales = torch.exp2(noise_like(hidden_states[..., :1, :]).sign())

    def run(hidden_states: Tensor, outputs: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        with ExitStack() as hooks:
            for name, output_of in outputs.items():
                hook = candidates[name].register_forward_hook(
                    lambda m, args, output, f=output_of: f(noise_like(output))
                )
                hooks.callback(hook.remove)
            output = first_tensor(block.module(hidden_states, *block.args[1:], **block.kwargs))
        assert output is not None
        return output

    writers, silent = [], dict.fromkeys(candidates, torch.zeros_like)
    for name in candidates:
        plain = run(torch.zeros_like(hidden_states), silent | {name: lambda noise: noise})
        moved = run(torch.zeros_like(hidden_states), silent | {name: lambda noise: noise.flip(-1) * scales})
        if plain.any() and torch.equal(moved, plain.flip(-1) * scales):
            writers.append(name)
    is_complete = torch.equal(run(hidden_states, dict.fromkeys(writers, torch.zeros_like)), hidden_states)
    return tuple(writers) if is_complete else ()
