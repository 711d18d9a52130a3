"""The benchmark of experts' memory: its documented table, and what it is for."""

import json
from pathlib import Path

from benchmarks import gopd_adapters


DOCS = Path(__file__).parents[2] / "docs"


def test_documented_table_is_that_of_the_result():
    runs = json.loads((DOCS / "results" / "gopd_adapters.json").read_text())["runs"]
    assert gopd_adapters.table(runs) in (DOCS / "benchmarks.md").read_text()
    peaks = {(run["kind"], run["experts"]): run["peak_gib"] for run in runs}
    assert list(peaks) == list(gopd_adapters.RUNS)
    assert peaks["shared", 4] <= 1.15 * peaks["shared", 0]  # four experts for the memory of one model


def test_one_run_in_this_process(models, tokenizer, tmp_path, monkeypatch):
    """The four experts of a tiny student share its weights, and each has its rows."""
    monkeypatch.setattr("trl_gopd.demo.smollm2.smollm2_path", lambda: models / "student")
    for index in range(4):
        gopd_adapters.make_adapter(tmp_path / f"expert{index}", seed=index)
    assert gopd_adapters.run("shared", 4, tmp_path)["peak_gib"] > 0
