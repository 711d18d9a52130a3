"""The benchmark of sizes: rows are added and kept as it says, and the documentation has its table and its claims."""

import json
from pathlib import Path

import pytest

from benchmarks import d2quant_size as benchmark


DOCS = Path(__file__).parents[2] / "docs"


def row(bits, embedding_bits, **more):
    return {
        "bits": bits,
        "embedding_bits": embedding_bits,
        "bits_per_weight": 3.5,
        "block_bits_per_weight": 2.25,
        "memory_bytes": 60_000_000,
        "file_bytes": 61_000_000,
        **more,
    }


def test_only_missing_rows_are_run(tmp_path, monkeypatch):
    out, asked = tmp_path / "out.json", []

    def run(bits, embedding_bits, args):
        asked.append((bits, embedding_bits))
        return row(bits, embedding_bits, **({} if args.sizes else {"perplexity": 40.0, "perplexity_original": 30.0}))

    monkeypatch.setattr(benchmark, "run_row", run)
    rows = ["--bits", "none", "2", "--embedding-bits", "none", "8", "--json", str(out)]
    benchmark.main([*rows, "--sizes"])
    assert asked == [(None, None), (None, 8), (2, None), (2, 8)]
    benchmark.main([*rows, "--sizes"])
    assert len(asked) == 4  # they are there
    benchmark.main(rows)
    assert asked[4:] == [(None, 8), (2, None), (2, 8)]  # with the quality this time, but of the original
    stored = json.loads(out.read_text())["rows"]
    assert [(entry["bits"], entry["embedding_bits"]) for entry in stored] == asked[:4]
    assert ["perplexity" in entry for entry in stored] == [False, True, True, True]


def test_change_is_that_of_the_embedding():
    of_original = {"perplexity_original": 30.0}
    rows = [row(None, None), row(None, 8, perplexity=30.3, **of_original), row(2, None, perplexity=50.0)]
    rows += [row(2, 8, perplexity=50.5), row(3, 8, file_bytes=None)]
    lines = benchmark.table(rows).splitlines()[2:]
    assert lines == [
        "| float32 | float32 | 3.50 | 60.0 | 61.0 | 30.00 |  |",
        "| float32 | 8 bits | 3.50 | 60.0 | 61.0 | 30.30 | +1.00% |",
        "| 2 bits | float32 | 3.50 | 60.0 | 61.0 | 50.00 |  |",
        "| 2 bits | 8 bits | 3.50 | 60.0 | 61.0 | 50.50 | +1.00% |",
        "| 3 bits | 8 bits | 3.50 | 60.0 |  |  |  |",
    ]


@pytest.fixture
def result():
    return json.loads((DOCS / "results" / "d2quant_size.json").read_text())


def test_table_in_the_documentation(result):
    assert benchmark.table(result["rows"]) in (DOCS / "d2quant.md").read_text()


def test_documented_claims(result):
    """At 2 bits, with the embedding that is the default, within 65 MB and one percent of perplexity."""
    by_key = {(entry["bits"], entry["embedding_bits"]): entry for entry in result["rows"]}
    assert max(by_key[2, 8]["memory_bytes"], by_key[2, 8]["file_bytes"]) <= 65_000_000
    assert by_key[None, 8]["perplexity"] <= 1.01 * by_key[None, 8]["perplexity_original"]
