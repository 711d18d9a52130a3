"""The accuracy benchmark: every row is a valid configuration, and the summary is the arithmetic it says it is."""

import json

import pytest

from benchmarks import d2quant_accuracy as benchmark
from trl_gopd.d2quant.config import D2QuantConfig


def row(name, seed, perplexity, **more):
    return {
        "row": name,
        "bits": 2,
        "seed": seed,
        "perplexity": perplexity,
        "kl": 1.0,
        "top1": 0.5,
        "seconds": 10.0,
        "bits_per_weight": 2.25,
        **more,
    }


def test_rows_are_configurations():
    for name, settings in benchmark.ROWS.items():
        settings = dict(settings)
        preset = settings.pop("preset", None)
        build = getattr(D2QuantConfig, preset) if preset else D2QuantConfig
        assert build(bits=2, **settings).bits == 2, name
    assert {benchmark.BASELINE, benchmark.OURS} <= benchmark.ROWS.keys()


def test_summary_pairs_seeds():
    rows = [row("GPTAQ", 0, 100.0), row("GPTAQ", 1, 50.0), row("default", 0, 60.0), row("default", 1, 40.0)]
    baseline, ours = benchmark.summarize(rows)
    assert (baseline["perplexity"], baseline["ratio"], baseline["ratio_standard_error"]) == (75.0, 1.0, 0.0)
    assert ours["perplexity"] == 50.0
    assert ours["ratio"] == pytest.approx((0.6 + 0.8) / 2)
    assert ours["ratio_standard_error"] == pytest.approx(0.1)  # half the difference of two
    assert ours["peak_over_model"] is None
    assert "| 2 | default | 2.250 | 50.00 ± 10.00 | 0.700 | 1.000 | 50.0% | 10 |" in benchmark.table([baseline, ours])


def test_finished_rows_are_not_run_again(tmp_path, monkeypatch):
    for name, value in (("GPTAQ", 100.0), ("default", 60.0)):
        (tmp_path / f"2-0-{name}.json").write_text(json.dumps(row(name, 0, value)))
    monkeypatch.setattr(benchmark, "environment", lambda argv: {"command": "here"})
    monkeypatch.setattr(benchmark.subprocess, "run", None)
    out = tmp_path / "out.json"
    arguments = ["--rows", "GPTAQ", "default", "--bits", "2", "--seeds", "0", "--work-dir", str(tmp_path)]
    benchmark.main([*arguments, "--json", str(out)])
    result = json.loads(out.read_text())
    assert [entry["ratio"] for entry in result["summary"]] == [1.0, 0.6]
    assert len(result["rows"]) == 2
