"""The benchmark of caches: what it writes it finds, and its sums. No time is asserted."""

import json

import pytest

from benchmarks import gopd_cache
from benchmarks.gopd_cache import Setting


def test_finds_what_it_has_written_and_nothing_else(tmp_path):
    result = gopd_cache.measure(Setting(rows=50, tokens=3, batch=8, reads=20), tmp_path)
    assert result["rows"] == 50 and result["found"] == {"read": 20, "miss": 0}
    # numbers, key twice (once in the index), and checksum
    assert result["bytes"] > 50 * (3 * 4 + 2 * 32 + 8)


def test_sums_by_hand():
    result = {"bytes": 4000, "seconds": {"write": 2.0, "read": 0.5, "miss": 0.25}}
    assert gopd_cache.summarize(result, Setting(rows=10, tokens=50, reads=4)) == {
        "bytes a token": 8.0,
        "bytes a row": 400.0,
        "write rows a second": 5.0,
        "read rows a second": 8.0,
        "miss rows a second": 16.0,
    }


def test_json(tmp_path, capsys):
    file = tmp_path / "report.json"
    arguments = ["--rows", "20", "--tokens", "2", "--reads", "5", "--folder", str(tmp_path), "--json", str(file)]
    gopd_cache.main(arguments)
    report = json.loads(file.read_text())
    assert report["setting"] == {"rows": 20, "tokens": 2, "batch": 512, "reads": 5}
    assert f"| bytes a row | {report['summary']['bytes a row']:,.1f} |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("argv", [["--rows", "0"], ["--batch", "-1"], ["--tokens", "x"]])
def test_what_cannot_run_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        gopd_cache.parse_args(argv)
    assert argv[0] in capsys.readouterr().err
