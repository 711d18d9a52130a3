"""
Micro-batches come back from the disk as they were, or not at all.

- What was written is read bit for bit, without the memory of what it was a slice of.
- A file that is cut, changed or another one ends in one error that names it and says what to do.
- Tensors that do not fit the run, or pretend to be larger than they are, are refused before they are copied.
"""

import pickle
import zipfile

import pytest
import torch

from trl_gopd.gopd.rollout_file import read_rollouts, write_rollouts


FITS = {"micro_batches": 2, "rows": 3, "vocab_size": 37, "num_teachers": 2}


def micro_batch(generator, tokens=5):
    def ids(*shape, end=37):
        return torch.randint(0, end, shape, generator=generator)

    return {
        "prompt_ids": ids(3, 4),
        "prompt_mask": ids(3, 4, end=2),
        "completion_ids": ids(6, tokens)[:3],  # a slice
        "completion_mask": ids(3, tokens, end=2),
        "advantages": torch.zeros(3),
        "gopd_teacher_index": ids(3, end=2),
        "gopd_lambda": torch.ones(3),
        "gopd_row": ids(3, end=6),
        "num_items_in_batch": torch.tensor(7),
        "old_per_token_logps": None,
        "gopd_teacher_logps": -torch.rand(3, tokens, generator=generator),
    }


@pytest.fixture
def stored(generator):
    return [micro_batch(generator), micro_batch(generator)]


def read(path, **changed):
    return read_rollouts(path, torch.device("cpu"), **{**FITS, **changed})


def test_what_was_written_is_read(stored, tmp_path):
    write_rollouts(tmp_path / "a.pt", stored)
    again = read(tmp_path / "a.pt")
    for before, after in zip(stored, again, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert value is after[name] is None or torch.equal(value, after[name])
    assert again[0]["completion_ids"].untyped_storage().nbytes() == 3 * 5 * 8


@pytest.mark.parametrize("name", ["missing.pt", "folder.pt"])
def test_there_is_no_such_file(tmp_path, name):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ValueError, match=f"{name} is missing.*Resume from another checkpoint"):
        read(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02.", pickle.dumps([{}]), b"x" * 999])
def test_other_files(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.pt is damaged \(.*Resume from another checkpoint"):
        read(tmp_path / "a.pt")


def test_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "evil").touch, ()

    torch.save([Evil()], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt is damaged"):
        read(tmp_path / "a.pt")
    assert not (tmp_path / "evil").exists()


def test_a_file_that_would_grow_in_memory(stored, tmp_path):
    write_rollouts(tmp_path / "a.pt", stored)
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("archive/zeros", bytes(10**6))
    with pytest.raises(ValueError, match="its entries are compressed"):
        read(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda stored: stored.pop(), "a list of 1 entries instead of 2"),
        (lambda stored: stored[1].clear(), "`prompt_ids` is a NoneType"),
        (lambda stored: stored[0].update(prompt_mask=torch.ones(3, 5, dtype=torch.int64)), "`prompt_mask` has the sh"),
        (lambda stored: stored[0].update(advantages=torch.ones(2)), "`advantages` has the shape"),
        (lambda stored: stored[1].update(gopd_teacher_logps=torch.ones(3, 1)), "`gopd_teacher_logps` has the shape"),
        (lambda stored: stored[1].update(gopd_lambda=torch.ones(3).long()), "`gopd_lambda` has the dtype"),
        (lambda stored: stored[1].update(prompt_ids=torch.ones(3, 4)), "`prompt_ids` has the dtype"),
        (
            lambda stored: stored[1]["completion_ids"].fill_(37),
            "`completion_ids` has numbers that",
        ),
        (lambda stored: stored[1]["completion_mask"].fill_(-1), "`completion_mask` has numbers"),
        (lambda stored: stored[1]["gopd_teacher_index"].fill_(2), "`gopd_teacher_index` has numbers"),
        (lambda stored: stored[1].update(prompt_ids=torch.ones(1, 1).long().expand(3, 4)), "not contiguous"),
        (lambda stored: stored[0].update(images=[1, 2]), "`images` has 2 rows"),
        (lambda stored: stored.__setitem__(0, "x"), "a micro-batch is a str"),
    ],
)
def test_what_does_not_fit(stored, tmp_path, change, message):
    change(stored)
    torch.save(stored, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt is damaged .*{message}"):
        read(tmp_path / "a.pt")


def test_every_byte_counts_or_changes_nothing(stored, tmp_path):
    write_rollouts(tmp_path / "a.pt", stored)
    content = (tmp_path / "a.pt").read_bytes()
    for place in range(0, len(content), 97):
        (tmp_path / "b.pt").write_bytes(content[:place])
        with pytest.raises(ValueError, match="b.pt is damaged"):
            read(tmp_path / "b.pt")
