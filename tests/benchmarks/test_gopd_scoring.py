"""The benchmark of scoring: its batches, what it counts, and its sums. No time is asserted."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gopd_scoring
from benchmarks.gopd_scoring import Setting


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def tiny(models, monkeypatch):
    monkeypatch.setattr("trl_gopd.demo.smollm2.smollm2_path", lambda: models / "student")


@pytest.mark.parametrize("rows", [16, 64])
def test_batches_have_a_heavy_tail(rows):
    batch = gopd_scoring.draw_batch(rows, Setting([rows]), 100)
    lengths = batch.scored.sum(1)
    assert lengths.max() >= 8 * lengths.median() and lengths.min() >= 1
    assert torch.equal(batch.lengths, gopd_scoring.draw_batch(rows, Setting([rows]), 100).lengths)


@pytest.mark.parametrize("rows", [16, 64])
def test_both_score_the_same_and_the_target_of_positions_is_met(tiny, rows):
    setting = Setting([rows], median=5, prompt=9, warmup=0, repeats=1)
    result = gopd_scoring.measure(gopd_scoring.build_scorer(setting), rows, setting)
    # a few dozen float32 roundings of logits below 64
    assert result["difference"] <= 40 * torch.finfo(torch.float32).eps * 64
    padded, grouped = gopd_scoring.summarize([result])
    assert padded["positions"] == rows * (9 + result["longest"]) and padded["forwards"] == rows // 4
    assert 1 <= grouped["per_token"] <= gopd_scoring.TARGETS["positions"] < 2 < padded["per_token"]


def test_summary_and_table_by_hand():
    each = {"padded": ([4.0, 8.0, 2.0], 50), "grouped": ([1.0, 4.0, 1.0], 24)}
    contestants = {
        name: {"seconds": seconds, "positions": positions, "forwards": 3}
        for name, (seconds, positions) in each.items()
    }
    summary = gopd_scoring.summarize([{"rows": 2, "tokens": 20, "contestants": contestants}])
    assert summary[1]["ratio"] == {"median": 0.5, "min": 0.25, "max": 0.5} and summary[1]["per_token"] == 1.2
    assert gopd_scoring.table(summary).splitlines()[-1] == (
        "| 2 | grouped | 3 | 24 | 1.20 | 1.00 (1.00–4.00) | 0.50 (0.25–0.50) |"
    )
    assert gopd_scoring.missed(summary) == ["2 rows: positions 1.20, target 1.15"]


@pytest.mark.parametrize("argv", [["--rows", "0"], ["--repeats", "0"], ["--median", "x"]])
def test_what_cannot_run_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        gopd_scoring.parse_args(argv)
    assert argv[0] in capsys.readouterr().err


def test_report_says_how_to_run_it_again(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    argv = ["--rows", "4", "--median", "3", "--prompt", "4", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    gopd_scoring.main(argv)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["command"].startswith("python -m benchmarks.gopd_scoring --rows 4")
    assert {"commit", "versions", "machine", "dtype", "seed", "setting", "summary"} <= report.keys()
    assert "| 4 | grouped |" in capsys.readouterr().out


def test_documented_table_is_that_of_the_result():
    path = DOCS / "results" / "gopd_scoring.json"
    if not path.exists():
        pytest.skip("not measured yet")
    report = json.loads(path.read_text())
    assert gopd_scoring.table(report["summary"]) in (DOCS / "benchmarks.md").read_text()
    assert gopd_scoring.missed(report["summary"]) == []


def test_seconds_are_read_from_the_clock(tiny, monkeypatch):
    """Which contestant is first changes from round to round."""
    order = []
    monkeypatch.setattr(gopd_scoring, "score_padded", lambda *args: order.append("padded") or torch.zeros(4, 24))
    scorer = gopd_scoring.build_scorer(Setting([4]))
    scorer.score = lambda sequences: order.append("grouped") or torch.zeros(4, 24)
    monkeypatch.setattr(gopd_scoring, "time", SimpleNamespace(perf_counter=iter(range(99)).__next__))
    setting = Setting([4], median=3, prompt=4, warmup=1, repeats=2)
    result = gopd_scoring.measure(scorer, 4, setting)
    assert order == ["padded", "grouped", "grouped", "padded", "padded", "grouped"]
    assert all(each["seconds"] == [1, 1] for each in result["contestants"].values())
