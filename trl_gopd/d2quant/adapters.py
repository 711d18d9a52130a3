"""
Merging an adapter into packed weights is refused.

PEFT's adapters compute a new weight from `base_layer.weight`. For packed words, shapes make most of them fail, but OFT
and HRA multiply the words of a square layer as if they were weights, and store the result. PEFT has no registry of
quantized layers, so the module that gets a packed layer as its `base_layer` is given a `merge` that raises.
"""

import functools
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


BASE_LAYER = "base_layer"


@functools.cache
def refuse_merging(packed: type[nn.Module]) -> None:
    """From now on, what has a `base_layer` of the type `packed` refuses to merge into it."""

    def hook(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if name != BASE_LAYER:
            return
        if isinstance(submodule, packed):
            module.merge = _refuse  # type: ignore[assignment]
        elif vars(module).get("merge") is _refuse:
            del module.merge

    register_module_module_registration_hook(hook)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "An adapter cannot be merged into packed weights. Call `model.dequantize()` on the quantized model first, or "
        "save the adapter alone with its own `save_pretrained`."
    )
