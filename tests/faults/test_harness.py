"""The harness notices what is lost: a scenario that goes wrong, hangs or crashes is counted, and kills hit files."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import strategies

from tests.faults import harness
from tests.faults.__main__ import load, render
from tests.faults.disks import small_disk
from tests.faults.harness import SCENARIOS, Ending, Trial
from tests.faults.processes import KILLED, KillAfter, KillAt, count_events, forked
from trl_gopd.files import written_whole


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def registered(monkeypatch):
    scenarios = []
    monkeypatch.setattr(harness, "SCENARIOS", scenarios)
    return scenarios


def test_what_is_lost_is_counted(registered):
    @harness.scenario("a fault", area="test", tries=5, short=1, seconds=0.2)
    def fault(trial: Trial) -> Ending:
        if trial.number == 1:
            time.sleep(5)
        if trial.number == 2:
            raise SystemExit
        assert trial.number != 3, "another model"
        (trial.folder / "file").write_text("x")
        return Ending.REFUSED if trial.number else Ending.INTACT

    result = harness.run(registered[0], tries=5, seed=0)
    row = result.row()
    assert (row["tries"], row["lost"], row["intact"], row["refused"], row["recovered"]) == (5, 3, 1, 1, 0)
    assert ["TooLong" in row["failures"][0], "SystemExit" in row["failures"][1]] == [True, True]
    assert "another model" in row["failures"][2] and "try 3" in row["failures"][2]
    assert "| test | a fault | 5 | 3 | 1 | 0 | 1 |" in render([row])


def test_tries_are_those_of_their_seed(registered):
    seen = []

    @harness.scenario("a fault", area="test", tries=2, short=1)
    def fault(trial: Trial) -> Ending:
        seen.append(trial.random.random())
        return Ending.INTACT

    for seed in (0, 0, 1):
        harness.run(registered[0], tries=2, seed=seed)
    assert seen[:2] == seen[2:4] and len(set(seen)) == 4


def test_every_example_is_a_try(registered):
    seen = []

    @harness.fuzzed("numbers", strategies.integers(), area="test", tries=50, short=5)
    def numbers(value: int, trial: Trial) -> Ending:
        seen.append(value)
        assert value != seen[0]
        return Ending.INTACT

    result = harness.run(registered[0], tries=50, seed=0)
    assert result.tries == len(seen) == 50 and result.lost == seen.count(seen[0])
    assert f"The value was '{seen[0]}'" in result.failures[0]


def careless(folder, content="new"):
    (folder / "part").write_text(content)
    os.replace(folder / "part", folder / "file")


def careful(folder, content="new"):
    with written_whole(folder / "file") as part:
        part.write_text(content)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


def test_a_child_returns_or_raises(tmp_path):
    assert forked(lambda: [1, 2]).value == [1, 2]
    ended = forked(lambda: 1 / 0)
    assert isinstance(ended.error, ZeroDivisionError) and "forked(lambda" in ended.text
    assert forked(os._exit, 3).code == 3


def test_a_child_dies_after_a_time():
    start = time.monotonic()
    assert forked(time.sleep, 20, kill=KillAfter(0.1)).code == KILLED
    assert forked(lambda: 1, kill=KillAfter(20)).value == 1
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("write", [careless, careful])
def test_a_child_dies_before_each_event(write, disk):
    assert count_events(write, disk, root=disk) == 2  # opened, renamed
    for event in range(2):
        (disk / "file").write_text("old")
        assert forked(write, disk, kill=KillAt(event, disk)).was_killed
        assert (disk / "file").read_text() == "old"
        for part in disk.glob("*part*"):
            part.unlink()  # or else the next writer does, which is one more event
    assert not forked(write, disk, kill=KillAt(2, disk)).was_killed and (disk / "file").read_text() == "new"


def test_native_writers_are_events(disk):
    from safetensors.torch import save_file

    assert count_events(lambda: torch.save({}, disk / "a.pt"), root=disk) == 1
    assert count_events(lambda: save_file({"a": torch.ones(1)}, disk / "a.safetensors"), root=disk) == 1
    assert count_events(lambda: torch.save({}, disk.parent / "b.pt"), root=disk) == 0


def test_a_torn_file_is_cut(disk):
    contents = set()
    for seed in range(20):
        assert forked(careless, disk, "content", kill=KillAt(1, disk, "torn", seed)).was_killed
        contents.add((disk / "part").read_text())
    assert len(contents) > 3 and all("content".startswith(content) for content in contents)


def test_a_power_failure_takes_what_was_not_synced(disk):
    def careless_and_on():
        careless(disk, "n" * 100)
        (disk / "next").write_text("")

    seen = set()
    for seed in range(20):
        assert forked(careless_and_on, kill=KillAt(2, disk, "power", seed)).was_killed
        seen.add((disk / "file").read_text())
        (disk / "file").write_text("old")
    assert "old" in seen and any(content and content != "n" * 100 for content in seen if content != "old")


def test_a_power_failure_takes_nothing_that_was_synced(disk):
    def careful_and_on():
        careful(disk, "n" * 100)
        (disk / "next").write_text("")

    for seed in range(10):
        assert forked(careful_and_on, kill=KillAt(2, disk, "power", seed)).was_killed
        assert (disk / "file").read_text() == "n" * 100


def test_a_small_disk_gets_full(tmp_path):
    with small_disk(tmp_path / "small", 2**16) as folder:
        (folder / "file").write_bytes(bytes(2**15))
        with pytest.raises(OSError):
            (folder / "file").write_bytes(bytes(2**18))
    (tmp_path / "large").write_bytes(bytes(2**18))


def test_the_documented_table_is_the_committed_result():
    rows = json.loads((DOCS / "results" / "faults.json").read_text(encoding="utf-8"))["rows"]
    assert render(rows) in (DOCS / "reliability.md").read_text(encoding="utf-8")
    assert len(rows) >= 30 and sum(row["lost"] for row in rows) == 0
    load()
    assert {(row["area"], row["fault"]) for row in rows} == {(s.area, s.name) for s in SCENARIOS}
