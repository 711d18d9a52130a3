"""The benchmark of packed layers: what it runs, and its sums. No time is asserted."""

import json
from pathlib import Path

import torch

from benchmarks import d2quant_speed
from benchmarks.d2quant_speed import BASELINE
from trl_gopd.d2quant.kernels import native


DOCS = Path(__file__).parents[2] / "docs"


def test_writes_all_that_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(d2quant_speed, "CACHED", 1)
    monkeypatch.setattr(d2quant_speed, "bandwidth", lambda: 1e9)
    used = []
    products = native.products
    monkeypatch.setattr(native, "products", lambda x, packed: used.append(x.dtype) or products(x, packed))
    threads = torch.get_num_threads()
    d2quant_speed.main(
        "--shapes 64x32 --rows 1 2 --bits 2 --threads 1 --repeats 1 --json".split() + [str(tmp_path / "speed.json")]
    )
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "speed.json").read_text())
    names = [row["contestant"] for row in report["summary"]]
    assert names[:5] == ["dense float32", BASELINE, "2 bits, float32", "2 bits, bfloat16", "2 bits, torch alone"]
    assert (
        len(names) == 10 and used.count(torch.float32) == used.count(torch.bfloat16) == 4
    )  # two rounds of two inputs
    assert native.Settings.enabled


def test_ratios_are_those_of_the_same_round():
    shared = {"shape": "8x8", "threads": 1, "rows": 1}
    results = [
        shared | {"contestant": BASELINE, "bytes": 2e6, "seconds": [0.004, 0.008, 0.004]},
        shared | {"contestant": "2 bits, float32", "bytes": 1e6, "seconds": [0.002, 0.002, 0.004]},
    ]
    base, packed = d2quant_speed.summarize(results, 1e9)
    assert base["times"]["median"] == 1 and packed["times"] == {"median": 2, "min": 1, "max": 4}
    assert packed["bound"] == 0.5 and packed["milliseconds"]["median"] == 2
    *head, line = d2quant_speed.table([base, packed]).splitlines()
    assert head[0] == f"| layer | threads | rows | {BASELINE}, ms | 2 bits, float32 |" and len(head) == 2
    assert line == "| 8x8 | 1 | 1 | 4.00 | 2.00 |"


def test_documented_table_is_the_committed_result():
    report = json.loads((DOCS / "results" / "d2quant_speed.json").read_text(encoding="utf-8"))
    assert d2quant_speed.table(report["summary"]) in (DOCS / "d2quant.md").read_text(encoding="utf-8")
