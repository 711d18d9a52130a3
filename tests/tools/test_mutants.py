"""The summary of mutation testing counts every mutant once, from files as mutmut writes them."""

import json

import pytest

from tools import mutants


pytest.importorskip("mutmut")


def write(folder, module, codes):
    path = folder / "trl_gopd" / "gopd" / f"{module}.py.meta"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"exit_code_by_key": codes}))


def test_counts(tmp_path):
    """Failed, out of time, passed, called by no test, not run yet."""
    write(tmp_path, "objective", {"a": 1, "b": -24, "c": 0, "d": 33, "e": None})
    write(tmp_path, "trainer", {})
    (module,) = mutants.outcomes(tmp_path).items()
    assert module[0] == "trl_gopd.gopd.objective"
    row = mutants.summarize(module[1])
    assert row == {"mutants": 5, "killed": 2, "survived": 2, "unchecked": 1, "percent": 50.0}
    assert mutants.table({module[0]: row}).splitlines()[-1] == "| `trl_gopd.gopd.objective` | 5 | 2 | 50.0 |"


def test_nothing_checked(tmp_path):
    write(tmp_path, "objective", {"a": None})
    (statuses,) = mutants.outcomes(tmp_path).values()
    assert mutants.summarize(statuses)["percent"] == 0.0
