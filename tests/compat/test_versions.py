"""
The range of TRL: checked before anything private of it is imported, stated once, and run at both ends of each minor
version.
"""

import configparser
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.compat import matrix
from trl_gopd.gopd import _trl


ROOT = Path(__file__).parents[2]


def import_seam():
    """A fresh copy of the seam, imported with the TRL that is in `sys.modules`."""
    spec = importlib.util.spec_from_file_location("a_copy_of_the_seam", _trl.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestCheckAtImport:
    @pytest.mark.parametrize("version", ["1.13.0", "1.14.0.dev0", "1.17.0.dev0", "1.17.0", "2.0.1"])
    def test_another_version_is_refused_before_its_names_are_looked_up(self, version, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("trl.")]:
            monkeypatch.delitem(sys.modules, name)
        fake = types.ModuleType("trl")  # has no modules of its own, so an import of one fails in another way
        fake.__version__ = version
        monkeypatch.setitem(sys.modules, "trl", fake)
        with pytest.raises(ImportError) as caught:
            import_seam()
        for fragment in (f"TRL {version}", "`trl>=1.14,<1.17`", "pip install 'trl>=1.14,<1.17'"):
            assert fragment in str(caught.value)

    @pytest.mark.parametrize("version", ["1.14.0", "1.14.9", "1.15.0", "1.16.1.dev0", "1.16.3"])
    def test_versions_within_are_accepted(self, version, monkeypatch):
        monkeypatch.setattr("trl.__version__", version)
        assert import_seam().ACCEPTED == _trl.ACCEPTED


class TestCheckOfTheDevice:
    def test_fused_head_without_a_path_for_the_cpu_is_refused(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr("trl.__version__", "1.15.0")
        with pytest.raises(ValueError) as caught:
            _trl.check_device(torch.device("cpu"))
        for fragment in ("TRL 1.15.0", "cpu", "CUDA", "'trl>=1.14,<1.17,!=1.15.*'"):
            assert fragment in str(caught.value)

    @pytest.mark.parametrize(
        ("version", "device", "interpreted"),
        [
            ("1.14.2", "cpu", "0"),
            ("1.16.0", "cpu", "0"),
            ("1.15.0", "cuda", "0"),
            ("1.15.0", "xpu", "0"),
            ("1.15.0", "cpu", "1"),
        ],
    )
    def test_the_rest_is_accepted(self, version, device, interpreted, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        monkeypatch.setattr("trl.__version__", version)
        _trl.check_device(torch.device(device))

    def test_constructor_asks(self, models, monkeypatch, tmp_path):
        """Before any model is loaded: there is none of this name."""
        from trl_gopd import GOPDConfig, GOPDTrainer

        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr("trl.__version__", "1.15.0")
        args = GOPDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
        with pytest.raises(ValueError, match="TRL 1.15.0"):
            GOPDTrainer(model=str(tmp_path / "none"), teacher_model=str(tmp_path / "none"), args=args)


class TestRangeIsStatedOnce:
    @pytest.fixture(scope="class")
    def declared(self):
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg", encoding="utf-8")
        lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
        requirements = [Requirement(line) for block in lines for line in block.split("\n") if line.strip()]
        return [each.specifier for each in requirements if each.name == "trl"]

    def test_metadata_declare_the_range_that_is_checked(self, declared):
        assert declared == [SpecifierSet(_trl.ACCEPTED)] * 2  # of the package, and of its extra `vllm`

    def test_pinned_version_is_run(self):
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        assert f"trl=={matrix.PINNED}" in pins and matrix.PINNED in matrix.VERSIONS

    def test_each_minor_version_is_run_and_no_other(self):
        accepted = SpecifierSet(_trl.ACCEPTED)
        assert all(version in accepted for version in matrix.VERSIONS)
        minors = {Version(version).release[:2] for version in matrix.VERSIONS}
        assert minors == {(1, minor) for minor in range(100) if f"1.{minor}.0" in accepted}


class TestDocumentedTable:
    @pytest.fixture(scope="class")
    def report(self):
        return json.loads((ROOT / "docs/results/compatibility.json").read_text())

    def test_is_that_of_the_result(self, report):
        assert matrix.table(report["rows"]) in (ROOT / "docs/compatibility.md").read_text()

    def test_result_has_every_version_and_no_failure(self, report):
        rows = report["rows"]
        assert [row["trl"] for row in rows] == list(matrix.VERSIONS)
        assert [row["trl"] for row in rows if not matrix.is_good(row, matrix.pinned_row(rows))] == []


class TestMatrix:
    """What `make compat` makes of the runs; the runs themselves are its own."""

    XML = """<testsuites><testsuite tests="3">
    <testcase classname="tests.contract.test_trl" name="a"/>
    <testcase classname="tests.contract.test_trl" name="b"><failure message="moved"/></testcase>
    <testcase classname="tests.compat.test_smoke" name="c"><properties>
      <property name="trl" value="1.14.0"/><property name="losses" value="[1.0, 2.0]"/></properties></testcase>
    </testsuite></testsuites>"""

    def row(self, **changes):
        return {
            "trl": "1.14.0",
            "unmet": [],
            "contract": {"passed": 2, "failed": []},
            "smoke": {"passed": 1, "failed": []},
            "losses": {"c": [1.0, 2.0]},
            **changes,
        }

    def test_report_of_pytest_is_read(self, tmp_path):
        (tmp_path / "report.xml").write_text(self.XML)
        got = matrix.read_report(tmp_path / "report.xml", "1.14.0")
        assert got["contract"] == {"passed": 1, "failed": ["b"]}
        assert got["smoke"] == {"passed": 1, "failed": []}
        assert got["losses"] == {"c": [1.0, 2.0]}

    def test_tests_that_ran_with_another_version_are_refused(self, tmp_path):
        (tmp_path / "report.xml").write_text(self.XML)
        with pytest.raises(RuntimeError, match="1.14.0.*1.15.0"):
            matrix.read_report(tmp_path / "report.xml", "1.15.0")

    def test_largest_difference(self):
        other = {"c": [1.0, 2.5]}
        assert matrix.largest_difference({"c": [1.25, 2.0]}, other) == 0.5
        with pytest.raises(RuntimeError, match="other runs"):
            matrix.largest_difference({"d": [1.0]}, other)

    @pytest.mark.parametrize(
        "changes",
        [
            {"unmet": ["transformers<5"]},
            {"contract": {"passed": 0, "failed": []}},
            {"contract": {"passed": 2, "failed": ["b"]}},
            {"smoke": {"passed": 0, "failed": []}},
            {"smoke": {"passed": 1, "failed": ["c"]}},
            {"losses": {"c": [1.0, 2.0 + 2 * matrix.TOLERANCE]}},
        ],
    )
    def test_what_is_not_good(self, changes):
        assert matrix.is_good(self.row(), self.row()) and not matrix.is_good(self.row(**changes), self.row())

    def test_table(self):
        pinned = self.row(trl=matrix.PINNED)
        bad = self.row(trl="1.15.0", unmet=["transformers<5"], smoke={"passed": 0, "failed": ["c"]}, losses={})
        rows = [self.row(losses={"c": [1.0, 2.5]}), bad, pinned]
        assert matrix.table(rows).splitlines()[2:] == [
            "| 1.14.0 | met | 2 passed | 1 passed | 5.0e-01 |",
            "| 1.15.0, Triton interpreted | needs transformers<5 | 2 passed | 0 passed, 1 failed |  |",
            f"| {matrix.PINNED}, pinned | met | 2 passed | 1 passed | 0 |",
        ]

    def test_unmet_requirements(self, tmp_path):
        info = tmp_path / "trl-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: trl\nVersion: 0\nRequires-Dist: torch>=2\nRequires-Dist: torch<1\n"
            "Requires-Dist: nobody>1\nRequires-Dist: nobody>1; extra == 'all'\n"
        )
        assert matrix.unmet(tmp_path) == ["torch<1", "nobody>1"]
