"""
Preflight: what each reward scale λ would do with a teacher and a reference, measured before any training.

The package is not named `preflight`, because an import of `trl_gopd.preflight` as a package would replace the public
function `trl_gopd.preflight` by a module.
"""

from .prompts import load_prompts
from .report import PreflightReport
from .run import preflight
from .sampling import ExtrapolatedLogitsProcessor


__all__ = ["ExtrapolatedLogitsProcessor", "PreflightReport", "load_prompts", "preflight"]
