"""The benchmark of checksums: its tensors and its sums. No time is asserted."""

import pytest
import torch

from benchmarks import gopd_identity
from benchmarks.gopd_identity import Setting


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("megabytes", [1, 65])
def test_tensors_have_the_size_that_was_asked_for(dtype, megabytes):
    named = gopd_identity.build(Setting(megabytes, dtype))
    assert sum(tensor.numel() * tensor.element_size() for tensor in named.values()) == megabytes * 2**20
    assert len(named) == 1 + (megabytes > 64) and {tensor.dtype for tensor in named.values()} == {
        getattr(torch, dtype)
    }


def test_every_contestant_is_measured_in_every_round():
    result = gopd_identity.measure(Setting(1, warmup=1, repeats=3))
    assert result["bytes"] == 2**20
    assert {name: len(speeds) for name, speeds in result["gigabytes_per_second"].items()} == dict.fromkeys(
        ("copy", "xxh3", "digest", "crc32"), 3
    )


def test_summary_and_table_by_hand():
    summary = gopd_identity.summarize({"gigabytes_per_second": {"copy": [4.0, 8.0, 2.0], "digest": [2.0, 2.0, 2.0]}})
    assert summary[0] == {"contestant": "copy", "median": 4.0, "min": 2.0, "max": 8.0, "of_copy": 1.0}
    assert summary[1]["of_copy"] == 0.5
    assert gopd_identity.table(summary).splitlines()[-1] == "| digest | 2.0 (2.0–2.0) | 0.50 |"


@pytest.mark.parametrize("argv", [["--megabytes", "0"], ["--repeats", "0"], ["--dtype", "int8"]])
def test_what_cannot_run_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        gopd_identity.parse_args(argv)
    assert argv[0] in capsys.readouterr().err
