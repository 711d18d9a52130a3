"""A report is saved completely or not at all, as JSON or as a figure."""

import json
import math
from dataclasses import replace

import pytest

from tests.preflight_check.harness import run, vowels


class TestReport:
    def test_json(self, models, tmp_path):
        report = run(models, reward_funcs=vowels)
        report.save(tmp_path / "report.json")
        assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
        assert report.settings["reward_funcs"] == ["vowels"]
        assert report.settings["teacher_model"] == str(models / "teacher")
        assert set(report.settings["versions"]) == {"trl_gopd", "torch", "transformers"}

    @pytest.mark.parametrize("rewards", [None, vowels])
    def test_figure(self, models, tmp_path, rewards):
        pytest.importorskip("matplotlib")
        run(models, reward_funcs=rewards, max_completion_length=2).save(tmp_path / "report.svg")
        drawn = (tmp_path / "report.svg").read_text()
        assert drawn.lstrip().startswith("<?xml") and drawn.rstrip().endswith("</svg>")
        assert [path.name for path in tmp_path.iterdir()] == ["report.svg"]

    def test_nan_is_not_written(self, models, tmp_path):
        broken = replace(run(models), length=math.nan)
        with pytest.raises(ValueError, match="not JSON compliant"):
            broken.save(tmp_path / "report.json")
        assert not (tmp_path / "report.json").exists()

    def test_figure_without_matplotlib(self, models, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match="needs matplotlib. Run `pip install matplotlib`"):
            run(models).save(tmp_path / "report.png")
        assert not (tmp_path / "report.png").exists()
