"""
Generalized On-Policy Distillation (https://huggingface.co/papers/2602.12125) for TRL, and D2Quant
(https://huggingface.co/papers/2602.02546) for transformers.

The public names below are loaded when they are first used, so that `import trl_gopd` imports neither torch,
transformers nor TRL. Importing the package also arranges for the D2Quant quantizer to be registered with transformers
as soon as transformers itself is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_gopd.d2quant.registration import install as _register_with_transformers


if TYPE_CHECKING:
    from trl_gopd.d2quant.config import D2QuantConfig
    from trl_gopd.d2quant.quantize import quantize_model
    from trl_gopd.gopd.config import GOPDConfig
    from trl_gopd.gopd.trainer import GOPDTrainer
    from trl_gopd.preflight_check import preflight

__version__ = "0.1.0"

__all__ = ["D2QuantConfig", "GOPDConfig", "GOPDTrainer", "__version__", "preflight", "quantize_model"]

_MODULE_OF = {
    "D2QuantConfig": "trl_gopd.d2quant.config",
    "GOPDConfig": "trl_gopd.gopd.config",
    "GOPDTrainer": "trl_gopd.gopd.trainer",
    "preflight": "trl_gopd.preflight_check",
    "quantize_model": "trl_gopd.d2quant.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # later accesses find the name in the module and no longer call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register_with_transformers()
