"""
What is read is what was written, bit for bit; a row is known by its ids alone, however it is padded, ordered and
batched; a file belongs to one model and temperature; it survives its writers, several at once and killed ones; and the
model sees missing rows only.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gopd.harness import logged, read
from tests.tiny import build_model
from trl_gopd.gopd.frozen import cache_file as room
from trl_gopd.gopd.frozen import cached as scoring
from trl_gopd.gopd.frozen.cache_file import LogprobCache, network_file_system, row_key
from trl_gopd.gopd.frozen.cached import CachedScorer, precompute
from trl_gopd.gopd.frozen.local import LocalScorer
from trl_gopd.gopd.frozen.routed import RoutedScorer


MODEL = {"name": "org/teacher", "revision": "abc", "weights": "0123abcd"}
EPS = torch.finfo(torch.float32).eps

ids = st.lists(st.integers(0, 5), min_size=1, max_size=4)
rows = st.lists(st.tuples(ids, ids), min_size=1, max_size=5)
paddings = st.tuples(st.integers(0, 3), st.integers(0, 3))


class Fake:
    """A model whose log-probabilities are a checksum of all ids so far, and which remembers what it was given."""

    context = 64

    def __init__(self, identity=MODEL, is_sharded=False):
        self.is_sharded, self._identity, self.calls = is_sharded, identity, []

    def identity(self):
        return self._identity

    def score(self, sequences):
        self.calls.append((sequences.input_ids, sequences.attention_mask))
        sums = ((sequences.input_ids + 1) * sequences.attention_mask).cumsum(1)[:, -sequences.num_tokens :]
        return -torch.sin(sums.float()).abs().masked_fill(~sequences.scored, torch.nan)

    @property
    def num_rows(self):
        return sum(len(input_ids) for input_ids, _ in self.calls)


def batch(pairs, left=0, right=0, pad_id=9):
    """`input_ids`, `attention_mask`, `completion_ids` of pairs of prompt and completion, padded by some more."""
    prompt_length = max(len(prompt) for prompt, _ in pairs) + left
    length = max(len(completion) for _, completion in pairs) + right
    input_ids = torch.full((len(pairs), prompt_length + length), pad_id)
    mask = torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(pairs):
        seen = slice(prompt_length - len(prompt), prompt_length + len(completion))
        input_ids[row, seen] = torch.tensor([*prompt, *completion])
        mask[row, seen] = 1
    return input_ids, mask, input_ids[:, prompt_length:]


def tokens(logps, pairs):
    """Without padding, by row."""
    return [row[: len(completion)].tolist() for row, (_, completion) in zip(logps, pairs, strict=True)]


def expected(pairs):
    return [tokens(Fake().score(read(*batch([pair]))), [pair])[0] for pair in pairs]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "teacher model?.sqlite3"  # a name that has to be quoted in a URI


@pytest.fixture
def cached(path):
    return CachedScorer(Fake(), path, temperature=1.0)


@pytest.fixture(scope="module")
def new_path(tmp_path_factory):
    """For property tests: a path that is not there, whenever it is called."""
    folder = tmp_path_factory.mktemp("caches")
    return lambda: Path(tempfile.mkdtemp(dir=folder), "cache.sqlite3")


@contextlib.contextmanager
def write_protected(path, permissions=0o444):
    """For the body, a copy of a cache in a folder that this process may only read, even if it is root's."""
    folder = Path(tempfile.mkdtemp())
    copied = folder / path.name
    try:
        if path.exists():
            shutil.copyfile(path, copied)
            copied.chmod(permissions)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield copied
        finally:
            if is_root:
                os.seteuid(0)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


class TestRowKey:
    @settings(derandomize=True, deadline=None, max_examples=200)
    @given(first=st.tuples(ids, ids), second=st.tuples(ids, ids))
    def test_tells_rows_apart(self, first, second):
        assert (row_key(*first) == row_key(*second)) == (first == second)

    def test_border_of_prompt_and_completion_counts(self):
        keys = {row_key([1, 2], [3]), row_key([1], [2, 3]), row_key([1, 2, 3], []), row_key([], [1, 2, 3])}
        assert len(keys) == 4

    def test_is_the_same_in_every_process(self):
        """Another key would make every stored row a miss: it needs another `FORMAT`."""
        numbers = [2, 1, *[1, 2], *[151_643]]
        want = hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in numbers)).digest()
        assert row_key([1, 2], [151_643]) == want and room.FORMAT == 2


class TestLogprobCache:
    def test_round_trip_is_exact(self, path, generator):
        values = [
            -torch.rand(37, generator=generator),
            torch.tensor([-torch.inf, -0.0, 0.0, -1e-45, torch.finfo(torch.float32).min]),
        ]
        LogprobCache(path, temperature=1.0, identity=MODEL).write(dict(zip([b"a", b"b"], values, strict=True)))
        read, damaged = LogprobCache(path, temperature=1.0).read({b"b": 5, b"c": 1, b"a": 37})
        assert list(read) == [b"b", b"a"] and not damaged
        for value, got in zip(values, (read[b"a"], read[b"b"]), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got.view(torch.int32), value.view(torch.int32))

    def test_first_value_stays(self, path):
        cache = LogprobCache(path, temperature=1.0, identity=MODEL)
        cache.write({b"a": torch.tensor([-1.0])})
        cache.write({b"a": torch.tensor([-2.0]), b"b": torch.tensor([-3.0])})
        rows, _ = cache.read({b"a": 1, b"b": 1})
        assert {key: value.item() for key, value in rows.items()} == {b"a": -1.0, b"b": -3.0}
        assert len(cache) == 2

    def test_nan_is_refused_with_all_that_came_along(self, path):
        cache = LogprobCache(path, temperature=1.0, identity=MODEL)
        with pytest.raises(ValueError, match="1 of 2 rows for .* have NaN .* wider dtype"):
            cache.write({b"a": torch.tensor([-1.0]), b"b": torch.tensor([-1.0, torch.nan])})
        assert len(cache) == 0

    def test_without_a_model_it_is_not_written(self, path):
        LogprobCache(path, temperature=1.0, identity=MODEL)
        with pytest.raises(PermissionError, match="opened without a model.* Pass `identity`"):
            LogprobCache(path, temperature=1.0).write({b"a": torch.zeros(1)})


class TestIdentity:
    @pytest.mark.parametrize(
        ("change", "temperature"),
        [
            ({"weights": "ffffffff"}, 1.0),
            ({"weights": None, "name": "org/other"}, 1.0),
            ({"weights": None, "revision": "def"}, 1.0),
            ({"weights": None, "adapter": "math"}, 1.0),
            ({}, 0.7),
        ],
    )
    def test_another_one_is_refused(self, path, change, temperature):
        LogprobCache(path, temperature=1.0, identity=MODEL).write({b"a": torch.zeros(1)})
        before = path.read_bytes()
        with pytest.raises(ValueError) as info:
            LogprobCache(path, temperature=temperature, identity=MODEL | change)
        holds, asked = f"holds {MODEL} at temperature 1.0", f"{MODEL | change} at temperature {temperature} was asked"
        for part in (str(path), holds, asked, "Give another path"):
            assert part in str(info.value)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("change", [{"name": "/elsewhere", "revision": None}, {"weights": None}])
    def test_the_same_weights_or_the_same_name_will_do(self, path, change):
        LogprobCache(path, temperature=1.0, identity=MODEL)
        assert LogprobCache(path, temperature=1.0, identity=MODEL | change).identity == MODEL

    def test_temperature_counts_without_a_model_too(self, path):
        LogprobCache(path, temperature=1.0, identity=MODEL)
        assert LogprobCache(path, temperature=1.0).identity == MODEL
        with pytest.raises(ValueError, match="at temperature 1.0, and any model at temperature 0.5 was asked for"):
            LogprobCache(path, temperature=0.5)

    def test_nameless(self, path):
        with pytest.raises(ValueError, match="must have a name or a checksum of the weights, got {'name': ''"):
            LogprobCache(path, temperature=1.0, identity={"name": "", "revision": None, "weights": None})
        assert not path.exists()

    @pytest.mark.parametrize("temperature", [0.0, -1.0, torch.inf, torch.nan])
    def test_no_temperature(self, path, temperature):
        with pytest.raises(ValueError, match="must be finite and > 0, got"):
            LogprobCache(path, temperature=temperature, identity=MODEL)
        assert not path.exists()


class TestFile:
    def test_absent(self, path):
        with pytest.raises(FileNotFoundError, match="no log-probability cache .* Fill one with `precompute`"):
            LogprobCache(path, temperature=1.0)
        assert not path.parent.exists()

    @pytest.mark.parametrize("identity", [MODEL, None])
    @pytest.mark.parametrize("content", [b"text, not a data base" * 99, b"SQLite format 3\0" + b"\xff" * 4096])
    def test_of_another_kind(self, path, content, identity):
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(OSError, match="cannot be used: .* (delete it and score anew|Look at the disk)"):
            LogprobCache(path, temperature=1.0, identity=identity)
        assert path.read_bytes() == content

    def test_damaged(self, cached, path):
        cached.score(read(*batch([([1], [2] * 5000)])))
        content = bytearray(path.read_bytes())
        content[4096:] = b"\xff" * (len(content) - 4096)
        path.write_bytes(content)
        with pytest.raises(OSError, match="malformed. It is damaged: delete it and score anew"):
            CachedScorer(Fake(), path, temperature=1.0)

    @pytest.mark.parametrize("identity", [MODEL, None])
    def test_of_another_program(self, path, identity):
        path.parent.mkdir()
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE logps (key, value)")
        with pytest.raises(ValueError, match=r"has the application id and format \(0, 0\), expected .* another path"):
            LogprobCache(path, temperature=1.0, identity=identity)

    def test_empty_is_a_new_one(self, path):
        """What a process that was killed while it created the file may leave."""
        path.parent.mkdir()
        path.touch()
        with pytest.raises(ValueError, match="no log-probability cache of this version"):
            LogprobCache(path, temperature=1.0)
        assert len(LogprobCache(path, temperature=1.0, identity=MODEL)) == 0

    def test_damaged_where_a_message_quotes_it(self, cached, path):
        """Then the message of SQLite need not be UTF-8."""
        content = path.read_bytes()
        path.write_bytes(content.replace(b"identity TEXT NOT NULL", b"identity TEXT NOT NU\xffL"))
        with pytest.raises(OSError, match="cannot be used: .* if it is damaged, delete it and score anew"):
            CachedScorer(Fake(), path, temperature=1.0)

    def test_folder_in_its_place(self, path):
        path.mkdir(parents=True)
        with pytest.raises(OSError, match="unable to open.* It must be a file in a folder that is writable"):
            LogprobCache(path, temperature=1.0, identity=MODEL)

    def test_file_in_the_place_of_its_folder(self, path):
        path.parent.touch()
        with pytest.raises(OSError, match="folder of the log-probability cache .* cannot be made: .* Give a path"):
            LogprobCache(path, temperature=1.0, identity=MODEL)

    @pytest.mark.parametrize("permissions", [0o444, 0o666])
    def test_write_protected_is_read_only(self, cached, path, permissions):
        pair = ([1, 2], [3, 4])
        want = cached.score(read(*batch([pair])))
        with write_protected(path, permissions) as copied:
            assert torch.equal(CachedScorer(None, copied, temperature=1.0).score(read(*batch([pair]))), want)
            with pytest.raises(OSError, match="readonly database. It must be writable .* open it without a model"):
                CachedScorer(Fake(), copied, temperature=1.0)

    def test_write_protected_folder(self, path):
        with write_protected(path) as absent:
            with pytest.raises(OSError, match="unable to open.* It must be a file in a folder that is writable"):
                LogprobCache(absent, temperature=1.0, identity=MODEL)

    def test_locked(self, cached, path, monkeypatch):
        monkeypatch.setattr(room, "LOCK_SECONDS", 0.01)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            with pytest.raises(OSError, match="is locked. Another process has locked it"):
                cached.score(read(*batch([([1], [2])])))
        assert cached.score(read(*batch([([1], [2])]))).shape == (1, 1)


def run(code, path):
    """Starts a process that runs `code`, which finds a cache at `path`."""
    start = f"""
import os, signal, torch
from trl_gopd.gopd.frozen.cache_file import LogprobCache
cache = LogprobCache({str(path)!r}, temperature=1.0, identity={MODEL!r})
"""
    return subprocess.Popen([sys.executable, "-c", start + code])


def kill_writer(path):
    """Has a process write to a cache and kills it when half of its transaction is in the file."""
    code = """
with cache._transaction() as connection:
    connection.execute("PRAGMA cache_size = 1")
    connection.executemany("INSERT INTO logps VALUES (?, ?, 0)", [(bytes([i, 0]), bytes(9000)) for i in range(99)])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    size = path.stat().st_size
    assert run(code, path).wait(120) == -signal.SIGKILL
    assert path.stat().st_size > size


class TestProcesses:
    def test_several_write_at_once(self, path):
        """From the creation of the file on."""
        code = """
for number in range(20):
    cache.write({{f"{name}{{number}}".encode(): torch.full((5,), -float(number)), b"shared": torch.tensor([-7.0])}})
"""
        workers = [run(code.format(name=name), path) for name in "ab"]
        assert [worker.wait(120) for worker in workers] == [0, 0]
        cache = LogprobCache(path, temperature=1.0)
        assert len(cache) == 41
        read, _ = cache.read({f"{name}{number}".encode(): 5 for name in "ab" for number in range(20)})
        assert [row.tolist() for row in read.values()] == [[-float(number)] * 5 for number in range(20)] * 2

    @pytest.mark.parametrize("identity", [MODEL, None])
    def test_killed_writer_leaves_what_was_whole(self, path, identity):
        rows = {b"a": torch.full((5,), -2.0), b"b": torch.zeros(3)}
        LogprobCache(path, temperature=1.0, identity=MODEL).write(rows)
        kill_writer(path)
        cache = LogprobCache(path, temperature=1.0, identity=identity)
        assert len(cache) == 2
        rows, damaged = cache.read({b"a": 5, bytes([0, 0]): 2250})
        assert {key: row.tolist() for key, row in rows.items()} == {b"a": [-2.0] * 5} and not damaged

    def test_killed_writer_does_not_stop_the_others(self, cached, path):
        cached.score(read(*batch([([1], [2])])))
        kill_writer(path)
        pairs = [([1], [2]), ([1], [3])]
        assert tokens(cached.score(read(*batch(pairs))), pairs) == expected(pairs)
        assert (cached.hits, cached.misses) == (1, 2)


class TestCachedScorer:
    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(first=rows, second=rows, padding=paddings, other=paddings)
    def test_rows_are_known_however_they_are_padded_and_batched(self, new_path, first, second, padding, other):
        path = new_path()
        cached = CachedScorer(Fake(), path, temperature=1.0)
        assert tokens(cached.score(read(*batch(first, *padding))), first) == expected(first)
        again = [*reversed(second), *first]
        assert tokens(cached.score(read(*batch(again, *other, pad_id=3))), again) == expected(again)
        distinct = {(tuple(p), tuple(c)) for p, c in [*first, *second]}
        assert cached.wrapped.num_rows == cached.misses == len(cached.cache) == len(distinct)
        assert cached.hits == 2 * len(first) + len(second) - len(distinct)
        offline = CachedScorer(None, path, temperature=1.0)
        assert tokens(offline.score(read(*batch(again))), again) == expected(again)

    def test_model_sees_missing_rows_with_their_padding(self, cached):
        pairs = [([1, 2], [3]), ([4], [5, 1, 2]), ([1], [2, 3]), ([4], [5, 1, 2])]
        cached.score(read(*batch(pairs[:1])))
        cached.wrapped.calls.clear()
        arguments = batch(pairs, left=2, right=1)
        result = cached.score(read(*arguments))
        ((input_ids, mask),) = cached.wrapped.calls
        assert sorted(input_ids.tolist()) == sorted(arguments[0][[1, 2]].tolist())
        assert sorted(mask.tolist()) == sorted(arguments[1][[1, 2]].tolist())
        assert tokens(result, pairs) == expected(pairs)
        assert (cached.hits, cached.misses) == (2, 3)

    def test_padding_is_zero_on_hits_and_misses(self, cached):
        pairs = [([1, 2], [3]), ([4], [5, 1, 2])]
        ids, mask, completion_ids = batch(pairs, right=2)
        results = [cached.score(read(ids, mask, completion_ids)) for _ in range(2)]
        assert torch.equal(*results) and results[0].dtype == torch.float32
        assert torch.equal(results[0] != 0, mask[:, 2:].bool())

    def test_rows_without_tokens_are_never_missing(self, cached, path):
        """GRPO masks all of a truncated completion, if it is told to."""
        cached.score(read(*batch([([1], [2])])))
        ids, mask, completion_ids = batch([([1], [2]), ([1, 2], [3, 4])])
        mask[1, 2:] = 0
        offline = CachedScorer(None, path, temperature=1.0)
        assert offline.score(read(ids, mask, completion_ids)).tolist() == [
            [*expected([([1], [2])])[0], 0.0],
            [0.0, 0.0],
        ]
        assert (offline.hits, offline.misses) == (1, 0)

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
    def test_nothing_to_score(self, cached, shape):
        ids = torch.ones(shape[0], shape[1] + 2, dtype=torch.long)
        assert cached.score(read(ids, ids, ids[:, 2:])).shape == shape
        assert cached.wrapped.calls == [] and (cached.hits, cached.misses) == (0, 0)

    def test_without_a_model_a_miss_is_an_error(self, cached, path):
        cached.score(read(*batch([([1], [2])])))
        offline = CachedScorer(None, path, temperature=1.0)
        assert (offline.identity(), offline.is_sharded, offline.context) == (MODEL, False, None)
        with pytest.raises(ValueError, match="2 of 3 rows are not among the 1 in .* Score them first .* or pass the"):
            offline.score(read(*batch([([1], [2]), ([1], [3]), ([2], [3])])))

    def test_stands_for_its_model(self, cached):
        assert (cached.identity(), cached.is_sharded, cached.context) == (MODEL, False, 64)

    def test_another_model_is_refused(self, cached, path):
        with pytest.raises(ValueError, match="was asked for. Give another path"):
            CachedScorer(Fake(MODEL | {"weights": "ffffffff"}), path, temperature=1.0)

    @pytest.mark.parametrize("seen", [[1, 1, 0, 1, 1], [1, 1, 1, 0, 1], [1, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    def test_a_gap_would_move_tokens(self, cached, seen):
        ids = torch.arange(10).view(2, 5)
        mask = torch.tensor([[1] * 5, seen])
        with pytest.raises(ValueError, match=r"Rows \[1\] of `attention_mask` have a gap.* padded left"):
            cached.score(read(ids, mask, ids[:, 3:]))
        assert cached.wrapped.calls == [] and len(cached.cache) == 0

    def test_what_is_nan_is_not_kept(self, cached, monkeypatch):
        monkeypatch.setattr(cached.wrapped, "score", lambda sequences: sequences.completion_ids * torch.nan)
        with pytest.raises(ValueError, match="1 of 1 rows"):
            cached.score(read(*batch([([1], [2])])))
        assert len(cached.cache) == 0


class TestSharded:
    """Every rank calls the model whenever one has to, with the rows that it misses."""

    PAIRS = [([1], [2]), ([1], [3])]

    @pytest.fixture
    def scorer(self, monkeypatch):
        return lambda path, others: self.build(monkeypatch, path, others)

    def build(self, monkeypatch, path, others):
        asked = []

        def gather(count):  # of this rank and another one
            asked.append(count.tolist())
            return torch.cat([count, torch.tensor([others])])

        monkeypatch.setattr(scoring, "gather", gather)
        return CachedScorer(Fake(is_sharded=True), path, temperature=1.0), asked

    @pytest.mark.parametrize(
        ("stored", "others", "calls"), [(2, 0, 0), (2, 1, 1), (1, 0, 1), (1, 1, 1), (0, 0, 1), (0, 2, 1)]
    )
    def test_in_step(self, scorer, path, stored, others, calls):
        if stored:
            CachedScorer(Fake(), path, temperature=1.0).score(read(*batch(self.PAIRS[:stored])))
        cached, asked = scorer(path, others)
        arguments = batch(self.PAIRS, left=1)
        assert tokens(cached.score(read(*arguments)), self.PAIRS) == expected(self.PAIRS)
        assert asked == [[2 - stored]]
        assert [call[0].tolist() for call in cached.wrapped.calls] == [arguments[0][stored:].tolist()] * calls
        assert (cached.hits, cached.misses, len(cached.cache)) == (stored, 2 - stored, 2)

    def test_asks_the_others_even_with_nothing_to_score(self, scorer, path):
        cached, asked = scorer(path, others=1)
        ids = torch.ones(2, 3, dtype=torch.long)
        mask = torch.tensor([[1, 1, 0]] * 2)
        assert cached.score(read(ids, mask, ids[:, 2:])).tolist() == [[0.0]] * 2
        assert asked == [[0]] and [len(ids) for ids, _ in cached.wrapped.calls] == [0]


class TestPrecompute:
    PAIRS = [([1, 2], [3]), ([4], [5, 1, 2]), ([1], [2, 3]), ([2, 2, 2], [1] * 7), ([4], [5, 1, 2])]

    def rollouts(self):
        return [{"prompt_ids": prompt, "completion_ids": completion} for prompt, completion in self.PAIRS]

    @pytest.mark.parametrize("kind", [list, Dataset.from_list])
    @pytest.mark.parametrize("batch_size", [1, 2, 99])
    def test_all_are_stored(self, path, kind, batch_size):
        assert precompute(Fake(), path, kind(self.rollouts()), temperature=0.7, batch_size=batch_size) == 4
        offline = CachedScorer(None, path, temperature=0.7)
        assert tokens(offline.score(read(*batch(self.PAIRS))), self.PAIRS) == expected(self.PAIRS)

    def test_goes_on_where_it_was_interrupted(self, path):
        class Interrupted(Fake):
            def score(self, *arguments):
                if self.calls:
                    raise KeyboardInterrupt
                return super().score(*arguments)

        with pytest.raises(KeyboardInterrupt):
            precompute(Interrupted(), path, self.rollouts(), temperature=1.0, batch_size=2)
        assert precompute(Fake(), path, self.rollouts(), temperature=1.0, batch_size=2) == 2
        assert precompute(Fake(), path, self.rollouts(), temperature=1.0) == 0

    def test_longest_come_first(self, path):
        fake = Fake()
        precompute(fake, path, self.rollouts(), temperature=1.0, batch_size=2)
        lengths = [mask.sum(1).max().item() for _, mask in fake.calls]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] == 10

    def test_no_rows(self, path):
        assert precompute(Fake(), path, [], temperature=1.0) == 0

    @pytest.mark.parametrize("row", [{"prompt_ids": [1]}, {"prompt_ids": [], "completion_ids": [1]}])
    def test_bad_row(self, path, row):
        fake = Fake()
        with pytest.raises(ValueError, match="must be a list of at least one token id.* row 5 has"):
            precompute(fake, path, [*self.rollouts(), row], temperature=1.0)
        assert fake.calls == [] and not path.exists()

    def test_bad_batch_size(self, path):
        with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
            precompute(Fake(), path, self.rollouts(), temperature=1.0, batch_size=0)


class TestRealModel:
    PAIRS = [([7, 8, 9], [3, 4]), ([5], [9, 30, 200, 4]), ([1, 2], [258])]

    @pytest.fixture
    def accelerator(self):
        return Accelerator(cpu=True)

    @pytest.fixture
    def frozen(self, tokenizer, accelerator):
        def build(seed):
            model = build_model(tokenizer, seed=seed)
            options = {"accelerator": accelerator, "batch_size": 2, "chunk_size": 3}
            return LocalScorer(model, temperature=0.7, role="teacher_model", **options)

        return build

    def test_cached_is_scored(self, frozen, path):
        """Exactly, when the batch is the same; up to rounding, when it was padded otherwise."""
        teacher = frozen(1)
        ids, mask, completion_ids = batch(self.PAIRS, pad_id=0)
        want = teacher.score(read(ids, mask, completion_ids))
        cached = CachedScorer(teacher, path, temperature=0.7)
        for _ in range(2):
            assert tokens(cached.score(read(ids, mask, completion_ids)), self.PAIRS) == tokens(want, self.PAIRS)
        assert (cached.hits, cached.misses) == (3, 3)
        offline = CachedScorer(None, path, temperature=0.7)
        padded = batch(self.PAIRS, left=3, right=2, pad_id=0)
        # rotary positions move with the padding; two layers, each with products and sums over at most 64 numbers
        bound = 2 * 64 * EPS * want.abs().max()
        for got, exact in zip(
            tokens(offline.score(read(*padded)), self.PAIRS),
            tokens(teacher.score(read(*padded)), self.PAIRS),
            strict=True,
        ):
            assert torch.tensor(got).sub(torch.tensor(exact)).abs().max() < bound

    def test_panel_takes_it_for_its_model(self, frozen, tmp_path):
        teachers = [frozen(1), frozen(2)]
        owners = torch.tensor([1, 0, 1])
        arguments = batch(self.PAIRS, pad_id=0)
        mask = arguments[1][:, 3:].bool()
        want = RoutedScorer(teachers).score(owners, read(*arguments))
        cached = [CachedScorer(each, tmp_path / f"{i}.sqlite3", temperature=0.7) for i, each in enumerate(teachers)]
        for scorers in (cached, [CachedScorer(None, each.cache.path, temperature=0.7) for each in cached]):
            got = RoutedScorer(scorers).score(owners, read(*arguments))
            assert torch.equal(got[mask], want[mask])
            assert [each.hits + each.misses for each in scorers] == [1, 2]

    def test_other_weights_are_another_model(self, frozen, path):
        CachedScorer(frozen(1), path, temperature=0.7)
        with pytest.raises(ValueError, match="Give another path"):
            CachedScorer(frozen(2), path, temperature=0.7)


class TestDamage:
    """A row that is no longer what was written is never believed."""

    PAIRS = [([1, 2], [3, 4, 5]), ([1], [2]), ([4], [1, 1])]
    OTHER = row_key(*PAIRS[1])

    @pytest.fixture
    def filled(self, cached):
        cached.score(read(*batch(self.PAIRS)))
        cached.hits = cached.misses = 0
        cached.wrapped.calls.clear()
        return cached

    def spoil(self, path, statement, *values):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            assert connection.execute(statement, values).rowcount == 1

    @pytest.mark.parametrize(
        ("numbers", "checksum"),
        [
            pytest.param([-1.0, -2.0, -3.5], None, id="another number"),
            pytest.param([-1.0], True, id="one number for three"),
            pytest.param([-1.0, -2.0, -3.0, -4.0], True, id="a number too many"),
            pytest.param(bytes(11), None, id="part of a number"),
            pytest.param(b"", None, id="nothing"),
            pytest.param([-1.0, float("nan"), -3.0], True, id="NaN"),
            pytest.param([-1.0, float("inf"), -3.0], True, id="+inf"),
            pytest.param([-1.0, 5.0, -3.0], True, id="+5"),
            pytest.param([-1.0, -2.0, -3.0], OTHER, id="those of another row"),
            pytest.param([-1.0, -2.0, -3.0], b"", id="no checksum"),
            pytest.param([-1.0, -2.0, -3.0], 7, id="a number for a checksum"),
            pytest.param("x" * 12, None, id="text"),
            pytest.param(b"\xff" * 12, "x", id="text for a checksum"),
            pytest.param(123456789012, None, id="an integer"),
            pytest.param(bytes(10**8), None, id="a hundred megabytes"),
        ],
    )
    def test_is_scored_anew_and_replaced(self, filled, path, caplog, numbers, checksum):
        """`checksum`: `True` for the right one, a key for that of another row, `None` for what was stored."""
        key = row_key(*self.PAIRS[0])
        logps = torch.tensor(numbers).numpy().tobytes() if isinstance(numbers, list) else numbers
        if checksum is True or checksum == self.OTHER:
            checksum = room._row_checksum(key if checksum is True else checksum, logps)
        self.spoil(
            path, "UPDATE logps SET logps = ?, checksum = ifnull(?, checksum) WHERE key = ?", logps, checksum, key
        )
        for _ in range(2):
            assert tokens(filled.score(read(*batch(self.PAIRS))), self.PAIRS) == expected(self.PAIRS)
        assert filled.wrapped.num_rows == 1 and (filled.hits, filled.misses, filled.damaged) == (5, 1, 1)
        assert sum("1 of 3 rows in" in text and "scored anew and replaced" in text for text in caplog.messages) == 1
        assert len(filled.cache) == 3
        offline = CachedScorer(None, path, temperature=1.0)
        assert tokens(offline.score(read(*batch(self.PAIRS))), self.PAIRS) == expected(self.PAIRS)

    def test_without_a_model_is_one_error(self, filled, path):
        self.spoil(path, "UPDATE logps SET checksum = ? WHERE key = ?", b"", row_key(*self.PAIRS[0]))
        offline = CachedScorer(None, path, temperature=1.0)
        with pytest.raises(OSError, match="1 of 3 rows in .* are damaged: .* no model to score them. Score them anew"):
            offline.score(read(*batch(self.PAIRS)))
        rows = read(*batch(self.PAIRS[1:]))
        assert tokens(offline.score(rows), self.PAIRS[1:]) == expected(self.PAIRS[1:])

    def test_is_reported_once(self, filled, path, caplog):
        for _ in range(3):
            self.spoil(path, "UPDATE logps SET checksum = ? WHERE key = ?", b"", row_key(*self.PAIRS[0]))
            filled.score(read(*batch(self.PAIRS)))
        assert filled.damaged == 3 and sum("are damaged" in text for text in caplog.messages) == 1

    def test_of_a_row_that_another_process_has_replaced(self, filled, path):
        key = row_key(*self.PAIRS[0])
        filled.cache.write({key: torch.tensor([-7.0] * 3)}, {key})  # which is whole
        assert filled.cache.read({key: 3})[0][key].tolist() == expected(self.PAIRS[:1])[0]

    @pytest.mark.parametrize(
        ("statement", "value"),
        [
            ("UPDATE model SET identity = ?", "{}"),
            ("UPDATE model SET identity = ?", '{"name": "org/teachfr", "revision": "abc", "weights": "0123abcd"}'),
            ("UPDATE model SET identity = ?", b"\xff\xfe"),
            ("UPDATE model SET temperature = ?", 0.5),
            ("UPDATE model SET temperature = ?", "warm"),
            ("UPDATE model SET checksum = ?", 0),
            ("DELETE FROM model WHERE 1 = ?", 1),
            ("INSERT INTO model SELECT * FROM model WHERE 1 = ?", 1),
        ],
    )
    @pytest.mark.parametrize("identity", [MODEL, None])
    def test_of_what_the_file_says_it_holds(self, filled, path, identity, statement, value):
        self.spoil(path, statement, value)
        with pytest.raises(OSError, match="does not tell which model it holds. It is damaged: delete it and score"):
            LogprobCache(path, temperature=1.0, identity=identity)

    @pytest.mark.parametrize(
        "statements",
        [
            ["DROP TABLE logps"],
            ["DROP TABLE model", "CREATE TABLE model (identity, temperature, checksum)"],
            # as reading it would never end
            [
                "DROP TABLE logps",
                "CREATE VIEW logps AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) "
                "SELECT n AS key, n AS logps, n AS checksum FROM r",
            ],
            ["CREATE TRIGGER t AFTER INSERT ON logps BEGIN DELETE FROM logps; END"],
        ],
    )
    def test_other_tables_than_were_made_are_refused(self, filled, path, statements):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)
        for identity in (MODEL, None):
            with pytest.raises(OSError, match="does not tell which model it holds"):
                LogprobCache(path, temperature=1.0, identity=identity)

    @pytest.mark.parametrize("identity", [MODEL, None])
    def test_of_an_earlier_version(self, path, identity):
        path.parent.mkdir()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA application_id = {room.APPLICATION_ID}")
            connection.execute("PRAGMA user_version = 1")
            connection.execute("CREATE TABLE model (identity TEXT NOT NULL, temperature REAL NOT NULL)")
            connection.execute("CREATE TABLE logps (key BLOB PRIMARY KEY, logps BLOB NOT NULL)")
        with pytest.raises(ValueError, match="by an earlier version, whose rows had no checksums.* delete it and"):
            LogprobCache(path, temperature=1.0, identity=identity)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
    def test_what_is_no_log_probability_is_not_stored(self, filled, value):
        with pytest.raises(ValueError, match="1 of 2 rows for .* have NaN or numbers above 0"):
            filled.cache.write({b"a": torch.tensor([-1.0]), b"b": torch.tensor([-1.0, value])})
        assert len(filled.cache) == 3

    def test_is_counted_in_training(self, make, tmp_path, caplog):
        options = {"logprob_cache_dir": str(tmp_path / "cache")}
        first = make(**options)
        first.train()
        assert logged(first, "gopd/cache_damaged_rows") == [0.0]
        statement = "UPDATE logps SET checksum = ? WHERE key = (SELECT min(key) FROM logps)"
        self.spoil(tmp_path / "cache" / "teacher.sqlite3", statement, b"")
        second = make(**options)
        second.train()
        assert second.losses == pytest.approx(first.losses, rel=1e-4)  # one row was scored in another batch
        assert logged(second, "gopd/cache_damaged_rows") == [1.0]
        assert logged(second, "gopd/cache_hit_share") == [7 / 8]  # of the teacher and of the reference
        assert sum("are damaged" in text for text in caplog.messages) == 1


class TestNetworkFileSystem:
    """Of several nodes, each needs a file on a disk of its own."""

    @pytest.fixture
    def mounted(self, monkeypatch, tmp_path):
        def mount(kind, device=None):
            number = tmp_path.stat().st_dev if device is None else device
            mounts = tmp_path / "mountinfo"
            mounts.write_text(
                "21 28 0:19 / /proc rw,nosuid shared:12 - proc proc rw\n"
                f"36 28 {os.major(number)}:{os.minor(number)} / /a\\040b rw shared:1 master:2 - {kind} host:/b rw\n"
                "broken\n"
            )
            monkeypatch.setattr(room, "MOUNTS", mounts)

        return mount

    @pytest.mark.parametrize(
        "kind", ["nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse.sshfs"]
    )
    def test_is_not_written_to(self, mounted, path, kind):
        mounted(kind)
        with pytest.raises(OSError, match=rf"on a network file system \({kind}\), .* each node needs a file of its"):
            CachedScorer(Fake(), path, temperature=1.0)
        assert not path.parent.exists()

    def test_may_be_read(self, cached, mounted, path):
        want = cached.score(read(*batch([([1], [2])])))
        mounted("nfs4")
        assert torch.equal(CachedScorer(None, path, temperature=1.0).score(read(*batch([([1], [2])]))), want)

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "fuseblk", "fuse.fuse-overlayfs"])
    def test_disks_are_none(self, mounted, path, kind):
        mounted(kind)
        assert network_file_system(path) is None

    def test_another_mount_does_not_count(self, mounted, path):
        mounted("nfs4", device=os.makedev(0, 9999))
        assert network_file_system(path) is None

    def test_where_it_is_not_known(self, monkeypatch, tmp_path):
        monkeypatch.setattr(room, "MOUNTS", tmp_path / "missing")
        assert network_file_system(tmp_path) is None

    def test_here(self, tmp_path):
        assert network_file_system(tmp_path / "a" / "b") is None
