"""
Experts of a mixture, which transformers keeps as one 3-D parameter for all of them, as one linear for each.

What a family does with its experts stays its own code: how tokens are routed, the activation, clamps, biases. It takes
the matrix of an expert out of the parameter, `self.gate_up_proj[expert]`, and multiplies by it. In the place of the
parameter stands an object whose elements do the product with a linear layer, so that hooks see what each expert reads,
and a packed linear takes the place of a dense one as it does everywhere else.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_gopd.d2quant.recording import Call, first_tensor, is_close


# Where the linears are, in the module that had the parameters. Conversions of checkpoints look for the parameters by
# the names of the two, one after the other, and do not find them.
LINEARS = "linears"


class ExpertLinears(nn.Module):
    """
    The matrices of all experts, in the place of a 3-D parameter.

    Args:
        linears (`Iterable[torch.nn.Linear]`): One for each expert, without biases.
        transposed (`bool`): Whether the parameter is `(experts, in_features, out_features)`.
    """

    def __init__(self, linears: Iterable[nn.Linear], transposed: bool):
        super().__init__()
        for index, linear in enumerate(linears):
            # PEFT tells linears by the last part of their names, and would take a number for any block.
            self.add_module(f"expert_{index}", linear)
        self.transposed = transposed

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int | Tensor) -> "_Matrix":
        return _Matrix(self.get_submodule(f"expert_{int(index)}"), self.transposed)

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        linear = self.get_submodule("expert_0")
        sizes = (linear.out_features, linear.in_features)
        return torch.Size((len(self), *(reversed(sizes) if self.transposed else sizes)))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        """A batched product, of as many rows for each expert."""
        if func is not torch.bmm or kwargs or not isinstance(args[1], cls) or not args[1].transposed:
            raise TypeError(f"The matrices of experts are no operand of {func}.")
        rows, experts = args
        return torch.stack([experts[index].product(part) for index, part in enumerate(rows)])


class _Matrix:
    """The matrix of one expert, in `F.linear(x, matrix)`, or in `x @ matrix` if it is transposed."""

    def __init__(self, linear: nn.Module, transposed: bool):
        self.product, self.transposed = linear, transposed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        kinds = (torch.matmul, Tensor.matmul, Tensor.__matmul__) if args[1].transposed else (F.linear,)
        if func not in kinds or kwargs or isinstance(args[0], cls):
            raise TypeError(f"The matrix of an expert is no operand of {func}.")
        rows, matrix, *bias = args
        output: Tensor = matrix.product(rows)
        return output if not bias or bias[0] is None else output + bias[0]


def expert_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Modules with 3-D parameters, which may be experts: names in `root`, modules, and names of the parameters."""
    for name, module in root.named_modules():
        if "Conv" not in type(module).__name__:
            names = [key for key, p in module.named_parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]
            if names:
                yield name, module, names


def find_layout(module: nn.Module, names: list[str], call: Call) -> bool | None:
    """
    Whether the experts of `module` are transposed; `None` if they are no experts, or do not work as linears.

    Args:
        module (`torch.nn.Module`): With 3-D parameters. It is as before when this returns.
        names (`list[str]`): Names of its 3-D parameters.
        call ([`Call`]): A call of it, which is repeated with linears.
    """
    expected = first_tensor(call.result)
    if expected is None or hasattr(module, LINEARS):
        return None
    for transposed in (False, True):
        undo = split_experts(module, dict.fromkeys(names, transposed))
        try:
            output = first_tensor(module(*call.args, **call.kwargs))
        except (TypeError, AttributeError, RuntimeError, ValueError, IndexError):
            continue  # whatever a family's code makes of a parameter that is no tensor
        finally:
            undo()
        # A grouped product and a loop over experts differ by the order of sums.
        if output is not None and is_close(output, expected):
            return transposed
    return None


def split_experts(module: nn.Module, layouts: Mapping[str, bool]) -> "Undo":
    """
    Replaces 3-D parameters of a module by [`ExpertLinears`], whose weights are views of them.

    Args:
        module (`torch.nn.Module`): The module, changed in place. Its parameters may be on the meta device.
        layouts (`Mapping[str, bool]`): Names of parameters, and whether they are transposed.

    Returns:
        `Undo`: puts the same parameters back, while the linears are dense and as they were.
    """
    undo = Undo(module, {name: module._parameters[name] for name in layouts}, getattr(module, "config", None))
    linears = nn.ModuleDict()
    for name, transposed in layouts.items():
        parameter = module._parameters.pop(name)
        assert parameter is not None
        matrices = parameter.detach().unbind()
        linears[name] = ExpertLinears((_linear(m.T if transposed else m, parameter) for m in matrices), transposed)
        # Not registered a second time: the name would be that of the parameter, see `LINEARS`.
        vars(module)[name] = linears[name]
    module.add_module(LINEARS, linears.train(module.training))
    if undo.config is not None:
        config = copy.deepcopy(undo.config)
        config._experts_implementation = "eager"  # other implementations index the parameter by all experts at once
        module.config = config
    # transformers would draw new values for the parameters that it knows
    module._is_hf_initialized = True  # type: ignore[assignment]
    return undo


class Undo:
    """Puts back what [`split_experts`] has replaced."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter | None], config: Any):
        self.module, self.parameters, self.config = module, parameters, config

    def __call__(self) -> None:
        _remove_linears(self.module)
        for name, parameter in self.parameters.items():
            self.module.register_parameter(name, parameter)
        if self.config is not None:
            self.module.config = self.config


def join_experts(module: nn.Module, config: Any) -> None:
    """
    Replaces the [`ExpertLinears`] of a module by 3-D parameters, if all of them are dense.

    Args:
        module (`torch.nn.Module`): The module, changed in place.
        config ([`~transformers.PretrainedConfig`], *optional*): The configuration that it shares with its model.
    """
    holders: dict[str, Any] = dict(module.get_submodule(LINEARS).items())  # type: ignore[operator]
    linears = [linear for holder in holders.values() for linear in holder.children()]
    if any(type(linear) is not nn.Linear for linear in linears):  # packed, or with an adapter
        return
    _remove_linears(module)
    for name, holder in holders.items():
        matrices = [linear.weight.T if holder.transposed else linear.weight for linear in holder.children()]
        trainable = all(linear.weight.requires_grad for linear in holder.children())
        parameter = nn.Parameter(torch.stack([matrix.detach() for matrix in matrices]), requires_grad=trainable)
        module.register_parameter(name, parameter)
    if config is not None:
        module.config = config


def _remove_linears(module: nn.Module) -> None:
    for name in module.get_submodule(LINEARS)._modules:
        del vars(module)[name]
    delattr(module, LINEARS)
    del module._is_hf_initialized


def _linear(matrix: Tensor, parameter: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=parameter.requires_grad)
    return linear
