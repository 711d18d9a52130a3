"""The accuracy benchmark: every row is a valid configuration, and the summary is the arithmetic it says it is."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import d2quant_accuracy as benchmark
from trl_gopd.d2quant.config import D2QuantConfig


DOCS = Path(__file__).parents[2] / "docs"


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


def test_documented_table_is_that_of_the_result():
    result = json.loads((DOCS / "results" / "d2quant_accuracy.json").read_text())
    assert result["summary"] == benchmark.summarize(result["rows"])
    assert benchmark.table(result["summary"]) in (DOCS / "d2quant.md").read_text()


def test_documented_claims():
    """What the text says of the default: at both widths, for each seed, it beats its rivals at their bits a weight."""
    rows = json.loads((DOCS / "results" / "d2quant_accuracy.json").read_text())["rows"]
    by_key = {(row["row"], row["bits"], row["seed"]): row for row in rows}
    limits = {2: 0.80, 3: 0.90}
    pairs = [(bits, seed) for name, bits, seed in by_key if name == benchmark.OURS]
    assert {bits for bits, _ in pairs} == set(limits) and len(pairs) == 4
    for bits, seed in pairs:
        ours, baseline = (by_key[name, bits, seed] for name in (benchmark.OURS, benchmark.BASELINE))
        assert ours["bits_per_weight"] <= baseline["bits_per_weight"]
        assert ours["perplexity"] <= limits[bits] * baseline["perplexity"]
        assert ours["kl"] < baseline["kl"]
        rival = by_key[benchmark.AUTOROUND, bits, seed]
        assert ours["perplexity"] < rival["perplexity"] and ours["kl"] < rival["kl"]


def test_readme_quotes_the_result():
    result = json.loads((DOCS / "results" / "d2quant_accuracy.json").read_text())
    quoted = {row["row"]: row for row in result["summary"] if row["bits"] == 2}
    text = " ".join((DOCS.parent / "README.md").read_text().split())
    for name in (benchmark.OURS, benchmark.AUTOROUND, benchmark.BASELINE):
        row = quoted[name]
        assert f"{row['perplexity']:.1f} ± {row['perplexity_standard_error']:.1f}" in text
    assert f"and {result['rows'][0]['perplexity_original']:.1f} in full precision" in text


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
