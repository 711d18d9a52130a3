"""
Registers `"quant_method": "d2quant"` with transformers when `trl_gopd` is imported, without importing transformers.

transformers has no plugin mechanism. It looks up quantizers in two tables of `transformers.quantizers.auto`, and skips
a method that is not there with a warning. Importing that module takes seconds, so we wait until someone else does: a
finder on `sys.meta_path` wraps the module's loader, and adds our entries each time that the module has been executed.
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
    """Registers the quantizer now if transformers' tables are imported already, and otherwise once they are."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    # Looked up after the finder is in place, so that no import by another thread falls in between.
    if TABLES in sys.modules:
        import_module(TABLES)  # waits for such a thread
        _register()


def _register() -> None:
    # The module registers itself when it is first imported. During that import, it has no `register` yet.
    getattr(import_module("trl_gopd.d2quant.hf_quantizer"), "register", lambda: None)()


class _Finder:
    """Finds the tables with the other finders, and wraps their loader."""

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
    """Restores the module's own loader, executes the module with it, and then registers the quantizer."""

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
