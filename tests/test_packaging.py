"""
What the package promises before any of its code runs.

- Importing it is quiet and light, and its public names appear when first used.
- The dependency rule: `gopd` and `d2quant` never import each other, the pure rooms import torch only, and one file
  alone knows TRL's private modules.
- The version, the entry point and the type marker are what the metadata says.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import trl_gopd


PACKAGE = Path(trl_gopd.__file__).parent
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "peft")
PURE = ("trl_gopd.gopd.objective", "trl_gopd.gopd.schedules")
TRL_SEAM = "trl_gopd.gopd._trl"
# Modules of TRL that it moves and renames between minor versions. Names that `trl` itself exports are public.
TRL_PRIVATE = ("trl.trainer", "trl.models", "trl.distributed", "trl.kernels")


def heavy_modules_after(statement: str) -> subprocess.CompletedProcess[str]:
    """Runs `statement` in a fresh interpreter, warnings as errors; it exits with the heavy modules it loaded."""
    code = f"{statement}\nimport sys\nsys.exit(' '.join(m for m in {HEAVY!r} if m in sys.modules) or 0)"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120
    )


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yields line and dotted name of every import in a file, at any depth and under `TYPE_CHECKING` too."""
    package = module_name(path, root).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from a import b` may import the module a.b, so both the module and the name within it are looked at.
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def breaches(root: Path) -> list[str]:
    """Returns one line for each import below `root` (a package folder) that breaks the dependency rule."""
    found = []
    for path in sorted(root.rglob("*.py")):
        module = module_name(path, root)
        for line, name in imported_names(path, root):
            reason = None
            for ours, other in (("gopd", "d2quant"), ("d2quant", "gopd")):
                if is_within(module, f"trl_gopd.{ours}") and is_within(name, f"trl_gopd.{other}"):
                    reason = f"{ours} must not import {other}"
            top = name.split(".")[0]
            if module in PURE and top != "torch" and top not in sys.stdlib_module_names:
                reason = "a pure room imports torch and the standard library only"
            if module != TRL_SEAM and any(is_within(name, private) for private in TRL_PRIVATE):
                reason = f"only {TRL_SEAM} may import a private module of TRL"
            if reason:
                found.append(f"{path.relative_to(root.parent).as_posix()}:{line}: {name}: {reason}")
    return found


class TestImport:
    def test_is_light_and_silent(self):
        result = heavy_modules_after("import trl_gopd")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    @pytest.mark.parametrize(
        ("statement", "complaint"),
        [("import trl_gopd, torch", "torch"), ("import warnings; warnings.warn('loud')", "loud")],
    )
    def test_check_can_fail(self, statement, complaint):
        result = heavy_modules_after(statement)
        assert result.returncode != 0
        assert complaint in result.stderr

    def test_public_names_are_listed_without_being_loaded(self):
        result = heavy_modules_after("import trl_gopd; assert set(trl_gopd.__all__) <= set(dir(trl_gopd))")
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.parametrize("name", [name for name in trl_gopd.__all__ if not name.startswith("__")])
    def test_public_name_is_the_object_of_its_module(self, name):
        value = getattr(trl_gopd, name)
        assert value.__name__ == name
        assert value is getattr(sys.modules[value.__module__], name)
        assert value.__module__.startswith("trl_gopd.")

    def test_unknown_attribute_is_named(self):
        with pytest.raises(AttributeError, match="'trl_gopd' has no attribute 'GOPDTrainr'"):
            _ = trl_gopd.GOPDTrainr


class TestDependencyRule:
    def test_package_keeps_it(self):
        assert breaches(PACKAGE) == []

    @pytest.mark.parametrize(
        ("file", "source", "reason"),
        [
            ("gopd/trainer.py", "from trl_gopd.d2quant import grids", "gopd must not import d2quant"),
            ("gopd/trainer.py", "def f():\n    from ..d2quant.grids import fit", "gopd must not import d2quant"),
            ("gopd/trainer.py", "from .. import d2quant", "gopd must not import d2quant"),
            ("gopd/__init__.py", "from ..d2quant import grids", "gopd must not import d2quant"),
            ("d2quant/grids.py", "import trl_gopd.gopd.objective", "d2quant must not import gopd"),
            ("gopd/objective.py", "import numpy", "a pure room"),
            ("gopd/objective.py", "from . import scoring", "a pure room"),
            ("gopd/schedules.py", "from transformers import TrainerCallback", "a pure room"),
            ("gopd/trainer.py", "from trl.trainer.utils import pad", "only trl_gopd.gopd._trl"),
            ("gopd/trainer.py", "from trl import trainer", "only trl_gopd.gopd._trl"),
            ("cli/train.py", "from importlib import import_module\nimport_module('trl.models')", "only trl_gopd.gopd"),
        ],
    )
    def test_breach_is_found(self, tmp_path, file, source, reason):
        path = tmp_path / "trl_gopd" / file
        path.parent.mkdir(parents=True)
        path.write_text(source + "\n")
        (breach,) = breaches(tmp_path / "trl_gopd")
        assert breach.startswith(f"trl_gopd/{file}:{len(source.splitlines())}: ")
        assert reason in breach

    @pytest.mark.parametrize(
        ("file", "source"),
        [
            ("gopd/_trl.py", "from trl.trainer.utils import pad"),
            ("gopd/trainer.py", "from trl import GRPOTrainer"),
            ("gopd/trainer.py", "from trl_gopd.gopd import objective"),
            ("gopd/objective.py", "import math\nfrom torch.nn import functional"),
            ("cli/train.py", "from trl_gopd import d2quant, gopd"),
        ],
    )
    def test_allowed_import_is_not(self, tmp_path, file, source):
        path = tmp_path / "trl_gopd" / file
        path.parent.mkdir(parents=True)
        path.write_text(source + "\n")
        assert breaches(tmp_path / "trl_gopd") == []


class TestMetadata:
    @pytest.fixture
    def installed(self):
        try:
            return distribution("trl-gopd")
        except PackageNotFoundError:
            pytest.skip("needs trl-gopd installed, `pip install -e .`")

    def test_version_is_the_installed_one(self, installed):
        assert trl_gopd.__version__ == installed.version

    def test_command_is_declared(self, installed):
        (script,) = installed.entry_points.select(group="console_scripts", name="trl-gopd")
        assert script.value == "trl_gopd.cli:main"

    def test_types_ship(self):
        assert (PACKAGE / "py.typed").is_file()
