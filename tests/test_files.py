"""A file is there whole or not at all, and what stood there before stays until then."""

import errno
import os
import signal
from pathlib import Path

import pytest
import xxhash

from trl_gopd import files
from trl_gopd.files import written_whole


def test_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "report.tar.json"
    path.write_text("old")
    with written_whole(path) as part:
        assert part.parent == tmp_path and part.suffix == ".json"
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, "old"])
def test_leaves_nothing_by_half(tmp_path, before):
    path = tmp_path / "report.json"
    if before is not None:
        path.write_text(before)
    with pytest.raises(OSError, match="disk is full"), written_whole(path) as part:
        part.write_text("ne")
        raise OSError("the disk is full")
    assert [file.read_text() for file in tmp_path.iterdir()] == ([] if before is None else [before])


def test_errors_of_native_writers_are_os_errors(tmp_path):
    with pytest.raises(OSError, match="No space left.*model") as caught, written_whole(tmp_path / "model"):
        raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="another"), written_whole(tmp_path / "model"):
        raise ValueError("another")


def test_a_folder_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "packed.v1"
    with written_whole(path) as part:
        part.mkdir()
        (part / "config.json").write_text("{}")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["config.json"] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("makes_folder", [False, True])
def test_a_failed_writer_leaves_no_folder(tmp_path, makes_folder):
    with pytest.raises(OSError, match="full"), written_whole(tmp_path / "packed") as part:
        if makes_folder:
            part.mkdir()
            (part / "half").write_text("ha")
        raise OSError("full")
    assert not list(tmp_path.iterdir())


def test_two_writers_do_not_mix(tmp_path):
    path = tmp_path / "report.json"
    with written_whole(path) as first, written_whole(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]  # which ended last


def test_what_killed_writers_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "report.json"
    child = os.fork()
    if not child:
        writer = written_whole(path)
        writer.__enter__().write_text("ha")
        with written_whole(tmp_path / "other.json") as other:
            other.write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    alive = tmp_path / next(tmp_path.glob(".report.*")).name.replace(f"-{child}-", f"-{os.getppid()}-")
    alive.write_text("of a process that runs")
    with written_whole(path) as part:
        part.write_text("new")
    assert sorted(file.name[:7] for file in tmp_path.iterdir()) == sorted([alive.name[:7], ".other.", "report."])
    assert alive.exists()


def test_the_disk_has_a_file_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def syncing(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replacing(part, path):
        events.append(("rename", str(part)))
        return replace(part, path)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    with written_whole(tmp_path / "packed") as part:
        part.mkdir()
        (part / "file").write_text("x")
    assert events == [
        ("sync", str(part / "file")),
        ("sync", str(part)),
        ("rename", str(part)),
        ("sync", str(tmp_path)),
    ]


def test_the_checksum_is_that_of_the_whole_content(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "READ_BYTES", 3)
    (tmp_path / "file").write_bytes(b"0123456789")
    assert files.checksum(tmp_path / "file") == xxhash.xxh3_128(b"0123456789").hexdigest()
