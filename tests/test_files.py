"""A file is there whole or not at all, and what stood there before stays until then."""

import pytest

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
