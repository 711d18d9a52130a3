"""
Caches of log-probabilities whose files are damaged, whose writers die, and whose disk is full: scores are those of the
model, or one error names the file and what to do.
"""

import math
import os
import random
import shutil
import sqlite3
import struct
import time
from contextlib import closing
from functools import cache
from pathlib import Path

import torch
import xxhash
from hypothesis import strategies as st

from tests.faults.disks import small_disk
from tests.faults.harness import Ending, Trial, fuzzed, scenario
from tests.faults.processes import KillAfter, forked
from trl_gopd.gopd.batch import Sequences
from trl_gopd.gopd.frozen.cache_file import APPLICATION_ID, TABLES, LogprobCache, row_key
from trl_gopd.gopd.frozen.cached import CachedScorer


MODEL = {"name": "org/teacher", "revision": "abc", "weights": "xxh3_128:0123"}
ROWS = 120


class Model:
    """Its log-probabilities are a function of all ids so far."""

    is_sharded, context = False, 64

    def identity(self):
        return MODEL

    def score(self, sequences: Sequences) -> torch.Tensor:
        sums = ((sequences.input_ids + 1) * sequences.attention_mask).cumsum(1)[:, -sequences.num_tokens :]
        return (-torch.sin(sums.float()).abs()).masked_fill(~sequences.scored, 0.0)


def pairs(chance: random.Random, count: int) -> list[tuple[list[int], list[int]]]:
    lengths = [(chance.randint(1, 5), chance.randint(1, 30)) for _ in range(count)]
    return [tuple([chance.randrange(256) for _ in range(length)] for length in both) for both in lengths]


def batch(rows) -> Sequences:
    width, length = (max(len(part) for part in parts) for parts in zip(*rows, strict=True))
    ids = torch.zeros(len(rows), width + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        seen = slice(width - len(prompt), width + len(completion))
        ids[row, seen] = torch.tensor([*prompt, *completion])
        mask[row, seen] = 1
    return Sequences.of(ids, mask, length)


FILLED = pairs(random.Random(0), ROWS)


@cache
def filled() -> bytes:
    """The content of a file with all rows."""
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="trl_gopd_fault_"), "cache.sqlite3")
    for start in range(0, ROWS, 8):
        CachedScorer(Model(), path, temperature=1.0).score(batch(FILLED[start : start + 8]))
    content = path.read_bytes()
    shutil.rmtree(path.parent)
    return content


def looked_at(path: Path, rows=FILLED, model: Model | None = None) -> Ending:
    """Scores rows with a file that may be damaged, with or without the model."""
    sequences = batch(rows)
    try:
        scorer = CachedScorer(model, path, temperature=1.0)
        for _ in range(2):
            assert torch.equal(scorer.score(sequences), Model().score(sequences))
    except (OSError, ValueError) as error:  # a file that is whole may be one of another model, or lack rows
        assert type(error) in (OSError, ValueError) and str(path) in str(error), repr(error)
        remedies = ("delete it", "another path", "Score", "Look at the disk", "pass the model", "It must be")
        assert any(remedy in str(error) for remedy in remedies), error
        return Ending.REFUSED
    return Ending.RECOVERED if scorer.misses else Ending.INTACT


def damaged(trial: Trial, content: bytes) -> Ending:
    path = trial.folder / "cache.sqlite3"
    path.write_bytes(content)
    return looked_at(path, model=Model() if trial.random.random() < 0.7 else None)


# Damaged files


@scenario("a bit of a cache flips", area="caches", tries=600, short=12)
def flipped_bit(trial: Trial) -> Ending:
    content = bytearray(filled())
    content[trial.random.randrange(len(content))] ^= 1 << trial.random.randrange(8)
    return damaged(trial, bytes(content))


@scenario("some bytes of a cache are others", area="caches", tries=400, short=8)
def other_bytes(trial: Trial) -> Ending:
    content = bytearray(filled())
    for _ in range(trial.random.randint(1, 40)):
        content[trial.random.randrange(len(content))] = trial.random.randrange(256)
    return damaged(trial, bytes(content))


@scenario("a page of a cache is zero, or that of another place", area="caches", tries=200, short=5)
def other_page(trial: Trial) -> Ending:
    content, size = bytearray(filled()), 4096
    pages = len(content) // size
    page = trial.random.randrange(pages)
    source = trial.random.randrange(pages)
    new = trial.random.choice(
        [bytes(size), content[source * size : (source + 1) * size], trial.random.randbytes(size)]
    )
    content[page * size : (page + 1) * size] = new
    return damaged(trial, bytes(content))


@scenario("a cache is cut short", area="caches", tries=200, short=5)
def cut(trial: Trial) -> Ending:
    content = filled()
    length = trial.random.randrange(len(content))
    return damaged(trial, content[: length // 4096 * 4096 if trial.random.random() < 0.5 else length])


@scenario("bytes follow the end of a cache", area="caches", tries=50, short=2)
def longer(trial: Trial) -> Ending:
    return damaged(trial, filled() + trial.random.randbytes(trial.random.choice([1, 100, 4096, 10_000])))


@scenario("a journal of another file lies beside a cache", area="caches", tries=80, short=3)
def foreign_journal(trial: Trial) -> Ending:
    """SQLite takes back what an unfinished writer has done, by a file beside it."""
    path = trial.folder / "cache.sqlite3"
    journal = trial.folder / "cache.sqlite3-journal"
    other = trial.folder / "other.sqlite3"
    other.write_bytes(filled())
    with closing(sqlite3.connect(other, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT INTO logps VALUES (?, ?, ?)", [(bytes([i]), bytes(3000), b"") for i in range(20)]
        )
        content = bytearray(Path(f"{other}-journal").read_bytes())
        connection.execute("ROLLBACK")
    for _ in range(trial.random.choice([0, 1, 20])):
        content[trial.random.randrange(len(content))] = trial.random.randrange(256)
    journal.write_bytes(content)
    path.write_bytes(filled())
    return looked_at(path, model=Model())


@scenario("rows with NaN, infinity, +5 or the wrong length and a right checksum", area="caches", tries=150, short=5)
def sealed_rows(trial: Trial) -> Ending:
    path = trial.folder / "cache.sqlite3"
    path.write_bytes(filled())
    prompt, completion = trial.random.choice(FILLED)
    key, numbers = row_key(prompt, completion), [-1.0] * len(completion)
    kind = trial.random.choice(["number", "shorter", "longer", "one"])
    if kind == "number":
        numbers[trial.random.randrange(len(numbers))] = trial.random.choice([math.nan, math.inf, 5.0, 0.01])
    else:
        numbers = {"shorter": numbers[1:], "longer": [*numbers, -1.0], "one": [-1.0] if len(numbers) > 1 else []}[kind]
    logps = struct.pack(f"<{len(numbers)}f", *numbers)
    checksum = xxhash.xxh3_64(struct.pack("<q", len(logps)) + key + logps).digest()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE logps SET logps = ?, checksum = ? WHERE key = ?", (logps, checksum, key))
    model = Model() if trial.random.random() < 0.7 else None
    ending = looked_at(path, model=model)
    assert ending == (Ending.RECOVERED if model else Ending.REFUSED)
    return ending


@scenario("a finite row with a wrong checksum", area="caches", tries=150, short=3)
def unsealed_rows(trial: Trial) -> Ending:
    path = trial.folder / "cache.sqlite3"
    path.write_bytes(filled())
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for prompt, completion in trial.random.sample(FILLED, trial.random.randint(1, 20)):
            numbers = [trial.random.uniform(-5, 0) for _ in completion]
            logps = struct.pack(f"<{len(numbers)}f", *numbers)
            key = row_key(prompt, completion)
            connection.execute("UPDATE logps SET logps = ? WHERE key = ?", (logps, key))
    ending = looked_at(path, model=Model())
    assert ending == Ending.RECOVERED and looked_at(path) == Ending.INTACT  # it was written anew
    return ending


# Writers


def write(path: Path, rows, delay: float = 0.0) -> None:
    scorer = CachedScorer(Model(), path, temperature=1.0)
    for start in range(0, len(rows), 3):
        scorer.score(batch(rows[start : start + 3]))
        time.sleep(delay)


def write_side_by_side(trial: Trial, writers: int) -> Ending:
    """Several processes write overlapping rows to one file, and some of them are killed at some time."""
    path = trial.folder / "cache.sqlite3"
    rows = pairs(trial.random, 40)
    children = []
    for number in range(writers):
        child = os.fork()
        if child == 0:
            try:
                own = random.Random(number)
                write(path, own.sample(rows, 30), delay=0.002)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    doomed = children[: writers // 2]
    time.sleep(trial.random.uniform(0.0, 0.15))
    for child in doomed:
        os.kill(child, 9)
    codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    assert all(code == 0 or child in doomed and code == -9 for child, code in codes.items()), codes
    assert looked_at(path, rows, Model()) in (Ending.RECOVERED, Ending.INTACT)
    assert looked_at(path, rows) == Ending.INTACT
    return Ending.RECOVERED if -9 in codes.values() else Ending.INTACT


@scenario("one of two writers of a cache is killed", area="caches", tries=60, short=2)
def two_writers(trial: Trial) -> Ending:
    return write_side_by_side(trial, 2)


@scenario("two of four writers of a cache are killed", area="caches", tries=40, short=1)
def four_writers(trial: Trial) -> Ending:
    return write_side_by_side(trial, 4)


@scenario("the only writer of a cache is killed", area="caches", tries=80, short=3)
def killed(trial: Trial) -> Ending:
    path = trial.folder / "cache.sqlite3"
    rows = pairs(trial.random, 60)
    end = forked(write, path, rows, kill=KillAfter(trial.random.uniform(0.0, 0.25)))
    assert end.error is None, end.text
    ending = looked_at(path, rows, Model())
    assert ending in (Ending.RECOVERED, Ending.INTACT) and looked_at(path, rows) == Ending.INTACT
    return ending


@scenario("the disk of a cache is full", area="caches", tries=60, short=3)
def full_disk(trial: Trial) -> Ending:
    rows = pairs(trial.random, 400)
    before = pairs(trial.random, 8)
    folder = trial.folder / "disk"
    endings = []
    with small_disk(folder, trial.random.choice([4096, 20_480, 45_056, 65_536])):
        path = folder / "cache.sqlite3"
        try:
            write(path, before)
            write(path, rows)
        except OSError as error:
            assert str(path) in str(error) and any(text in str(error) for text in ("full", "Look at the disk")), error
            endings.append(Ending.REFUSED)
        kept = trial.folder / "cache.sqlite3"
        for name in ("cache.sqlite3", "cache.sqlite3-journal"):  # both are the file, if a writer was not finished
            if (folder / name).exists():
                shutil.copyfile(folder / name, trial.folder / name)
    assert endings  # or else the disk was too large to say anything
    # With room again, it goes on, and what was stored is there.
    if kept.exists():
        assert looked_at(kept, [*before, *rows], Model()) in (Ending.RECOVERED, Ending.INTACT)
        assert looked_at(kept, [*before, *rows]) == Ending.INTACT
    return Ending.REFUSED


@scenario("a model gives NaN, infinity or +5", area="caches", tries=40, short=2)
def broken_model(trial: Trial) -> Ending:
    class Broken(Model):
        def score(self, sequences):
            logps = super().score(sequences)
            row = trial.random.randrange(len(logps))
            logps[row, 0] = trial.random.choice([math.nan, math.inf, 5.0])
            return logps

    path = trial.folder / "cache.sqlite3"
    try:
        CachedScorer(Broken(), path, temperature=1.0).score(batch(FILLED[:8]))
    except ValueError as error:
        assert "1 of 8 rows" in str(error) and "none was stored" in str(error)
        assert len(LogprobCache(path, temperature=1.0)) == 0
        return Ending.REFUSED
    raise AssertionError("A number that is none was stored.")


# Fuzzing


cells = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=40) | st.binary(max_size=140)


@fuzzed("rows of a cache that are anything", st.tuples(cells, cells), area="caches", tries=1500, short=25)
def any_row(given, trial: Trial) -> Ending:
    path = trial.folder / "cache.sqlite3"
    path.write_bytes(filled())
    prompt, completion = trial.random.choice(FILLED)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        try:
            connection.execute(
                "UPDATE logps SET logps = ?, checksum = ? WHERE key = ?", (*given, row_key(prompt, completion))
            )
        except sqlite3.IntegrityError:  # a column may not be null
            return Ending.REFUSED
    ending = looked_at(path, [(prompt, completion)], Model())
    assert ending == Ending.RECOVERED
    return ending


names = st.sampled_from(["logps", "model", "key", "identity", "temperature", "checksum", "other"])
columns = st.lists(st.tuples(names, st.sampled_from(["BLOB", "TEXT", "REAL", "INTEGER PRIMARY KEY", ""])), max_size=4)
tables = st.lists(
    st.tuples(st.sampled_from(["TABLE", "VIEW", "TRIGGER"]), names, columns, st.lists(cells, max_size=4)), max_size=4
)


@fuzzed(
    "files of SQLite with any tables",
    st.tuples(tables, st.sampled_from([0, 1, 2, 3, -1]), st.booleans()),
    area="caches",
    tries=600,
    short=20,
)
def any_tables(given, trial: Trial) -> Ending:
    made, number, keeps = given
    path = trial.folder / "cache.sqlite3"
    if keeps:
        path.write_bytes(filled())
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {number}")
        for kind, name, parts, values in made:
            definitions = ", ".join(f"{part} {type_}" for part, type_ in parts) or "x"
            statements = {
                "TABLE": f"CREATE TABLE {name} ({definitions})",
                "VIEW": f"CREATE VIEW {name} AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n FROM r) "
                "SELECT n AS key, n AS logps, n AS checksum, n AS identity, n AS temperature FROM r",
                "TRIGGER": f"CREATE TRIGGER t_{name} AFTER INSERT ON {name} BEGIN DELETE FROM {name}; END",
            }
            try:
                if trial.random.random() < 0.5:
                    connection.execute(f"DROP TABLE {name}")
                connection.execute(statements[kind])
                if values:
                    connection.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(values))})", values)
            except (sqlite3.Error, OverflowError, UnicodeEncodeError):
                pass
    return looked_at(path, FILLED[:4], Model())


@fuzzed("files in the place of a cache", st.binary(max_size=300), area="caches", tries=400, short=8)
def any_file(content, trial: Trial) -> Ending:
    head = trial.random.choice([b"", b"SQLite format 3\0", filled()[:100], filled()[: trial.random.randrange(9000)]])
    path = trial.folder / "cache.sqlite3"
    path.write_bytes(head + content)
    return looked_at(path, FILLED[:4], Model() if trial.number % 2 else None)


assert set(TABLES) == {"logps", "model"}  # the tables that are tried above
