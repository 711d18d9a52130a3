"""Calls of modules during a forward pass, recorded so that they can be told apart and repeated."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """
    One call of a module. `reads` and `writes` identify its first argument and its result. The arguments and the result
    are kept alive, because the address of a tensor is used again once it is freed.
    """

    name: str
    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    reads: tuple[int, int, int] | None
    writes: tuple[int, int, int] | None

    def repeat(self) -> Tensor:
        """Calls the module again, with the same arguments; returns the first tensor of its result."""
        result = first_tensor(self.module(*self.args, **self.kwargs))
        assert result is not None
        return result


def record_calls(root: nn.Module, run: Callable[[], Any]) -> list[Call]:
    """Calls of `root` and all modules in it during `run`, in the order in which they return."""
    calls: list[Call] = []
    with ExitStack() as hooks:
        for name, module in root.named_modules():

            def record(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, name: str = name
            ) -> None:
                calls.append(Call(name, module, args, kwargs, result, _identity(args), _identity(result)))

            hooks.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        run()
    return calls


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor of what a module takes or returns; `None` if there is none."""
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if isinstance(values, (tuple, list)):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return values if isinstance(values, Tensor) else None


def _identity(values: Any) -> tuple[int, int, int] | None:
    """Equal for a tensor and its views of full size, different for other tensors and after a change in place."""
    tensor = first_tensor(values)
    return None if tensor is None else (tensor.data_ptr(), tensor._version, tensor.numel())


def noise_like(like: Tensor, seed: int = 0) -> Tensor:
    """Normal tensor of the shape, dtype and device of `like`; it leaves the global random state alone."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding at most; `True` for numbers that are not finite, named elsewhere."""
    scale = float(other.abs().max())
    return not math.isfinite(scale) or float((one.float() - other.float()).abs().max()) <= 1e-2 * scale


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the body. Afterwards every module has its own mode back, or that of the one it replaced."""
    # By name: a reference to a module would keep the dense weights of a replaced linear alive.
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
