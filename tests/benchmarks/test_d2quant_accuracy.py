"""The accuracy benchmark: every row is a valid configuration, and the summary is the arithmetic it says it is."""

import json
from types import SimpleNamespace

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
    line = "| 2 | default | 2 | 2.250 | 50.00 ± 10.00 | 0.700 ± 0.100 | 1.000 | 50.0% | 10 |  |"
    assert line in benchmark.table([baseline, ours])


def test_only_missing_rows_are_run(tmp_path, monkeypatch):
    out, asked = tmp_path / "out.json", []

    def run(arguments, **kwargs):
        asked.append(arguments[arguments.index("--rows") + 1])
        return SimpleNamespace(stdout="a line of a library\n" + json.dumps(row(asked[-1], 0, 60.0)))

    monkeypatch.setattr(benchmark, "commit", lambda: "abc")
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    out.write_text(json.dumps({"rows": [row("GPTAQ", 0, 100.0)]}))
    benchmark.main(["--rows", "default", "GPTAQ", "--bits", "2", "--seeds", "0", "--json", str(out)])
    result = json.loads(out.read_text())
    assert asked == ["default"]
    assert [(entry["row"], entry["ratio"]) for entry in result["summary"]] == [("GPTAQ", 1.0), ("default", 0.6)]
    assert result["rows"][1]["commit"] == "abc"


def test_figure(tmp_path):
    rows = [row(name, seed, 40.0 + seed, perplexity_original=30.0) for name in ("GPTAQ", "default") for seed in (0, 1)]
    benchmark.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
