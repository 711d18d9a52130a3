"""
A second device for machines without one: torch's hook for backends in Python, with numbers in CPU memory.

It behaves like an accelerator where that matters for the placement of tensors: they report another device, operators
refuse to mix devices, and numbers come and go by copies only. It is installed for the life of the process, and torch
then has an accelerator, so it belongs in a process of its own.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map


NAME = "fake"

# Operators whose operands may be on two devices: copies, and indices on the CPU.
MIXED = ("_copy_from", "copy_", "index", "index_put", "_index_put_impl", "_to_copy")

# Torch's own kernels of these compute with strides and offsets, which tensors on the device do not have.
VIEWS = (
    *("select.int", "slice.Tensor", "transpose.int", "t", "permute", "expand", "unsqueeze", "squeeze", "squeeze.dim"),
    *("diagonal", "split.Tensor", "split_with_sizes", "unbind.int", "unfold", "_reshape_alias", "view", "view.dtype"),
    "_unsafe_view",
    *("squeeze_", "squeeze_.dim", "unsqueeze_", "transpose_", "t_", "index.Tensor"),
)

# What tensors on the device hold, by the addresses of their storages, which aliases share; and the registration.
_numbers: dict[int, Tensor] = {}
_library: list[Any] = []


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Asked for when activations are computed again in the backward pass."""
        return [torch.bfloat16]


def install() -> None:
    """Makes `torch.device("fake")` usable in this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    _library.append(torch.library.Library("_", "IMPL"))
    _library[0].fallback(_run, "PrivateUse1")
    _library.append(torch.library.Library("aten", "IMPL"))
    for name in VIEWS:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        _library[1].impl(name, functools.partial(_run, operator), "PrivateUse1")
    _library[1].impl("as_strided", _refuse, "PrivateUse1")


def _refuse(tensor: Tensor, *args: Any) -> Any:
    raise NotImplementedError("A view of a tensor on the fake device: name its operator in `VIEWS`.")


def _is_fake(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _unwrap(value: Any) -> Any:
    return _numbers[value.untyped_storage()._cdata] if _is_fake(value) else value


def _wrap(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    wrapped = torch._C._acc.create_empty_tensor(value.shape, value.dtype)
    _numbers[wrapped.untyped_storage()._cdata] = value
    return wrapped


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operator on the numbers. Its operands are returned as they are if it changes them in place."""
    name = operator.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [tensor for tensor in tensors if _is_fake(tensor)]
    if name not in MIXED and any(not _is_fake(tensor) and tensor.dim() for tensor in tensors) and on_device:
        raise RuntimeError(f"Expected all tensors to be on the same device, got {NAME} and cpu in {operator}.")
    if name == "_copy_from":
        _unwrap(args[1]).copy_(_unwrap(args[0]))
        return args[1]
    # Numbers in the place of tensors arrive as plain ones.
    kinds = [str(argument.type) for argument in operator._schema.arguments]
    args = [
        torch.tensor(value) if kind == "Tensor" and isinstance(value, (bool, int, float)) else value
        for value, kind in zip(args, kinds, strict=False)
    ]
    plain_args, plain_kwargs = tree_map(_unwrap, (args, kwargs))
    if "device" in plain_kwargs:
        plain_kwargs["device"] = torch.device("cpu")
    if name in ("view", "_unsafe_view"):  # a tensor on the device says that it is contiguous, whatever its numbers are
        result = operator(plain_args[0].contiguous(), plain_args[1])
    else:
        result = operator(*plain_args, **plain_kwargs)
    operands = {}
    for tensor in on_device:
        numbers = _unwrap(tensor)
        if numbers.shape != tensor.shape:  # resized, as an empty `out`
            tensor.data = _wrap(numbers)
        operands[id(numbers)] = tensor
    return tree_map(lambda value: operands[id(value)] if id(value) in operands else _wrap(value), result)
