"""Two runs do not write into one folder, and nothing is left of one that has ended, in whatever way."""

import logging
import os
import signal
from types import SimpleNamespace

import pytest

from tests.faults.processes import forked
from trl_gopd.gopd.sole_writer import NAME, sole_writer


MAIN_PROCESS = SimpleNamespace(is_main_process=True)


def enter(folder):
    with sole_writer(folder, MAIN_PROCESS):
        return True


def test_another_process_is_refused_and_told_who_is_there(tmp_path):
    with sole_writer(tmp_path, MAIN_PROCESS):
        error = forked(enter, tmp_path).error
        assert isinstance(error, ValueError)
        assert f"Process {os.getpid()} on " in str(error) and f"is training in {tmp_path}" in str(error)
        assert "or use another `output_dir`" in str(error)
    assert not list(tmp_path.iterdir()) and forked(enter, tmp_path).value


def test_after_an_error(tmp_path):
    with pytest.raises(KeyError), sole_writer(tmp_path / "new", MAIN_PROCESS):
        raise KeyError
    assert forked(enter, tmp_path / "new").value


def test_after_a_kill(tmp_path):
    def die(folder):
        with sole_writer(folder, MAIN_PROCESS):
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(die, tmp_path).was_killed
    assert (tmp_path / NAME).exists() and enter(tmp_path)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with caplog.at_level(logging.WARNING, "trl_gopd"):
        assert enter(tmp_path)
    assert "Nothing keeps another run from writing into" in caplog.text


def test_only_the_first_rank_locks(tmp_path):
    with sole_writer(tmp_path, SimpleNamespace(is_main_process=False)):
        assert not list(tmp_path.iterdir())
