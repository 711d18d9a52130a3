"""
Makes `import trl_gopd` enough for transformers to know `"quant_method": "d2quant"`, without importing transformers.

transformers has no plugins: what it knows stands in two tables of `transformers.quantizers.auto`, and a method it does
not know is skipped with a warning. Importing that module takes seconds, so it is waited for: a finder on
`sys.meta_path` lets the others find it, and adds our entries right after it has run, each time that it runs.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


TABLES = "transformers.quantizers.auto"


def install() -> None:
    """Registers the quantizer as soon as transformers' tables are there: now, or once they are imported."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    # Looked up after the finder is in place, so that no import by another thread falls in between.
    if TABLES in sys.modules:
        import_module(TABLES)  # waits for such a thread
        _register()


def _register() -> None:
    # The module registers itself when it is first imported. If that import is what brought us here, it is not done.
    getattr(import_module("trl_gopd.d2quant.hf_quantizer"), "register", lambda: None)()


class _Finder:
    """Finds the tables as the finders after it do, and watches them run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Runs a module with its own loader, which it hands back before, and then registers."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()


_FINDER: Any = _Finder()
