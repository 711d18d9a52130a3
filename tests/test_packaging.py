"""
What the package promises before any of its code runs.

- Importing it is quiet and light, its public names appear when first used, and transformers knows its quantizer,
  whichever is imported first.
- The dependency rule: `gopd` and `d2quant` never import each other, `gopd` never imports `preflight_check`, the pure
  modules import torch and each other only, and one file alone knows TRL's private modules.
- The version, the entry point and the type marker are what the metadata says.
"""

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import trl_gopd
from trl_gopd.d2quant import registration


PACKAGE = Path(trl_gopd.__file__).parent
HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate", "peft")
# For each package, the rooms that import torch, the standard library and each other.
PURE = {
    "trl_gopd.gopd": ("objective", "divergence", "stratified", "monitors", "schedules", "visualize"),
    "trl_gopd.d2quant": ("grids", "packing", "rounding", "correction"),
}
# The first package of each pair never imports the second.
FORBIDDEN = (("gopd", "d2quant"), ("d2quant", "gopd"), ("gopd", "preflight_check"))
TRL_SEAM = "trl_gopd.gopd._trl"
# Modules of TRL that it moves and renames between minor versions. Names that `trl` itself exports are public.
TRL_PRIVATE = ("trl.trainer", "trl.models", "trl.distributed", "trl.kernels")


def heavy_modules_after(statement: str) -> subprocess.CompletedProcess[str]:
    """Runs `statement` in a fresh interpreter, warnings as errors; it exits with the heavy modules it loaded."""
    code = f"{statement}\nimport sys\nsys.exit(' '.join(m for m in {HEAVY!r} if m in sys.modules) or 0)"
    return run_in_process("-W", "error", "-c", code)


def run_in_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120
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


def may_be_in_pure_room(module: str, name: str) -> bool:
    package, _, room = module.rpartition(".")
    if room not in PURE.get(package, ()) or name.split(".")[0] in ("torch", *sys.stdlib_module_names):
        return True
    return any(is_within(name, f"{package}.{other}") for other in PURE[package])


def breaches(root: Path) -> list[str]:
    """Returns one line for each import below `root` (a package folder) that breaks the dependency rule."""
    found = []
    for path in sorted(root.rglob("*.py")):
        module = module_name(path, root)
        for line, name in imported_names(path, root):
            reason = None
            if not may_be_in_pure_room(module, name):
                reason = "a pure room imports torch, the standard library and the pure rooms beside it only"
            for ours, other in FORBIDDEN:
                if is_within(module, f"trl_gopd.{ours}") and is_within(name, f"trl_gopd.{other}"):
                    reason = f"{ours} must not import {other}"
            if module != TRL_SEAM and any(is_within(name, private) for private in TRL_PRIVATE):
                reason = f"only {TRL_SEAM} may import a private module of TRL"
            if reason:
                found.append(f"{path.relative_to(root.parent).as_posix()}:{line}: {name}: {reason}")
    return found


def circles(root: Path) -> list[list[str]]:
    """
    Returns the first circle of modules below `root` that import one another, at any depth, under `TYPE_CHECKING` too.
    `root` itself is left out: it names the public objects and loads them when they are first used.
    """
    files = {module_name(path, root): path for path in root.rglob("*.py") if path != root / "__init__.py"}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names = (name for _, name in imported_names(path, root))
        # `from a import b` is an import of the module a.b if that is one, and of a otherwise
        targets = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = {target for target in targets if target in files and target != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


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

    @pytest.mark.parametrize("name", trl_gopd.__all__)
    def test_no_module_shares_a_public_name(self, name):
        """The import of such a module would replace the public object by the module."""
        assert importlib.util.find_spec(f"trl_gopd.{name}") is None

    @pytest.mark.parametrize(
        "statement",
        [
            "import trl_gopd.preflight_check.report; from trl_gopd import preflight",
            "from trl_gopd import preflight; import trl_gopd.preflight_check.report, trl_gopd.cli.preflight",
        ],
    )
    def test_preflight_is_the_function_in_every_order_of_imports(self, statement):
        check = "import types; assert trl_gopd.preflight is preflight and type(preflight) is types.FunctionType"
        result = run_in_process("-c", f"import trl_gopd; {statement}; {check}")
        assert result.returncode == 0, result.stderr[-2000:]

    def test_unknown_attribute_is_named(self):
        with pytest.raises(AttributeError, match="'trl_gopd' has no attribute 'GOPDTrainr'"):
            _ = trl_gopd.GOPDTrainr


class TestRegistration:
    """
    With transformers imported after us. The other order is that of a checkpoint that brings its code along, which is
    tested with the quantizer.
    """

    CODE = """
import importlib, sys
import trl_gopd
assert "transformers" not in sys.modules
{then}
from transformers.quantizers import auto
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.hf_quantizer import D2QuantHfQuantizer

def known():
    tables = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    return [table.get("d2quant") for table in tables] == [D2QuantConfig, D2QuantHfQuantizer]

assert known()
assert type(auto.__spec__.loader).__module__ != "trl_gopd.d2quant.registration"
importlib.reload(auto)
assert known()
finders = list(sys.meta_path)
importlib.reload(trl_gopd)
assert known() and sys.meta_path == finders
"""

    @pytest.mark.parametrize(
        "then",
        [
            "from trl_gopd import D2QuantConfig; from transformers import PreTrainedModel",
            # which needs the tables, whose import needs it
            "import trl_gopd.d2quant.hf_quantizer",
        ],
    )
    def test_transformers_knows_the_quantizer(self, then):
        result = run_in_process("-c", self.CODE.format(then=then))
        assert result.returncode == 0, result.stderr[-2000:]

    def test_loader_is_asked_as_if_nobody_watched(self, tmp_path, monkeypatch):
        """With a module in the place of the tables: other finders come first and last, and one import runs it once."""
        (tmp_path / "tables_of_nobody.py").write_text("runs = globals().get('runs', 0) + 1\n")
        registered = []
        monkeypatch.setattr(registration, "TABLES", "tables_of_nobody")
        monkeypatch.setattr(registration, "_register", lambda: registered.append(sys.modules["tables_of_nobody"].runs))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
        registration.install()
        assert registered == []
        module = importlib.import_module("tables_of_nobody")
        assert registered == [1]
        assert (module.__spec__.loader, module.__file__) == (module.__loader__, str(tmp_path / "tables_of_nobody.py"))
        assert isinstance(module.__loader__, importlib.machinery.SourceFileLoader)
        importlib.reload(module)
        assert registered == [1, 2]
        registration.install()  # and now that it is there, at once
        assert registered == [1, 2, 2]
        with pytest.raises(ModuleNotFoundError, match="tables_of_no_one"):
            monkeypatch.setattr(registration, "TABLES", "tables_of_no_one")
            importlib.import_module("tables_of_no_one")
        del sys.modules["tables_of_nobody"]


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
            ("gopd/config.py", "from ..preflight_check import options", "gopd must not import preflight_check"),
            ("gopd/objective.py", "import numpy", "a pure room"),
            ("gopd/objective.py", "from . import scoring", "a pure room"),
            ("gopd/schedules.py", "from transformers import TrainerCallback", "a pure room"),
            ("gopd/monitors.py", "from .trainer import GOPDTrainer", "a pure room"),
            ("gopd/visualize.py", "from matplotlib import pyplot", "a pure room"),
            ("d2quant/grids.py", "from .linear import D2QuantLinear", "a pure room"),
            ("d2quant/packing.py", "import numpy", "a pure room"),
            ("d2quant/rounding.py", "from trl_gopd.d2quant.topology import Block", "a pure room"),
            ("d2quant/correction.py", "from . import pipeline", "a pure room"),
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
            ("gopd/schedules.py", "from .monitors import CompletionSummary"),
            ("d2quant/rounding.py", "from .grids import GroupGrid"),
            ("d2quant/rounding.py", "from trl_gopd.d2quant.grids import GroupGrid"),
            ("d2quant/linear.py", "from transformers import PreTrainedModel"),
            ("cli/train.py", "from trl_gopd import d2quant, gopd"),
        ],
    )
    def test_allowed_import_is_not(self, tmp_path, file, source):
        path = tmp_path / "trl_gopd" / file
        path.parent.mkdir(parents=True)
        path.write_text(source + "\n")
        assert breaches(tmp_path / "trl_gopd") == []


class TestCircles:
    def test_there_is_none(self):
        assert circles(PACKAGE) == []

    @pytest.mark.parametrize(
        "sources",
        [
            {"a": "from .b import x", "b": "from .a import y"},
            {"a": "from . import b", "b": "def f():\n    import trl_gopd.a"},
            {"a": "from .b import x", "b": "from .c import x", "c": "from trl_gopd.a import x"},
        ],
    )
    def test_one_is_found(self, tmp_path, sources):
        for name, source in {"__init__": "", **sources}.items():
            path = tmp_path / "trl_gopd" / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source + "\n")
        (found,) = circles(tmp_path / "trl_gopd")
        assert {f"trl_gopd.{name}" for name in sources} <= set(found)


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
