"""
Log-probabilities of completions under frozen models, kept on disk: a resumed run, another run, or one without any
teacher in memory reads them there.

A file holds those of one model at one temperature, in SQLite's format. Processes of one machine may share it, and a
row is there as a whole or not at all, whenever a writer dies. Network file systems lock files unreliably, so every
node needs a file of its own.

A row is known by its ids without padding, but its numbers are those of the batch in which it was first scored: another
padding or autocast dtype would have rounded differently. Models with learned positions see padding on the left, and
are not for caching.
"""

import hashlib
import json
import math
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor
from tqdm.auto import tqdm

from ..batch import Sequences
from ..rollouts import pad_ids, token_ids
from .identity import is_partial, is_same_identity
from .protocols import Scorer


CACHE_SUFFIX = ".sqlite3"
APPLICATION_ID = int.from_bytes(b"GOPD")
FORMAT = 1  # of the tables and keys below
LOCK_SECONDS = 60.0  # for which another process may hold the file
REMEDIES = {
    sqlite3.SQLITE_NOTADB: "It is another kind of file, or damaged: give another path, or delete it and score anew.",
    sqlite3.SQLITE_CORRUPT: "It is damaged: delete it and score anew.",
    sqlite3.SQLITE_READONLY: "It must be writable with its folder. To read it only, open it without a model.",
    sqlite3.SQLITE_CANTOPEN: "It must be a file in a folder that is writable, unless it is opened without a model.",
    sqlite3.SQLITE_BUSY: f"Another process has locked it for over {LOCK_SECONDS:.0f} seconds: end that, or wait.",
    sqlite3.SQLITE_FULL: "The disk is full: make room.",
}


def row_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """SHA-256 of both lengths and all ids, as int64: no two rows share it, wherever the prompt ends."""
    ids = [*prompt_ids, *completion_ids]
    return hashlib.sha256(struct.pack(f"<{2 + len(ids)}q", len(prompt_ids), len(completion_ids), *ids)).digest()


class LogprobCache:
    """
    A file with the log-probabilities of completions under one model at one temperature.

    It is opened for every call and closed after it, so an instance may be used in any process and thread.

    Args:
        path (`str` or `os.PathLike`):
            The file. Created, with its folders, if it is not there.
        temperature (`float`):
            Sampling temperature that divides the logits.
        identity (`dict[str, Any]`, *optional*):
            The model, as [`Scorer.identity`] describes it. The checksums of the weights decide
            where both are known, otherwise names, revisions and adapters: of a sharded model only these are, and new
            weights under an old name go unnoticed. If `None`, the file has to be there, is taken for whatever model it
            holds, and is never written to.

    Raises:
        `ValueError`: If the file holds another model or temperature, or is no such file.
        `FileNotFoundError`: If it is not there and `identity` is `None`.
        `OSError`: If it cannot be used, here or in any method.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, temperature: float, identity: Mapping[str, Any] | None = None
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be finite and > 0, got {temperature}. Give the sampler's.")
        self.path, self.temperature = Path(path), float(temperature)
        self.is_read_only = identity is None
        if identity is None:
            if not self.path.is_file():
                raise FileNotFoundError(
                    f"There is no log-probability cache {self.path}, and no model to score with. Fill one with "
                    "`precompute`, or correct the path."
                )
        else:
            if not (identity.get("weights") or identity.get("name")):
                raise ValueError(f"`identity` must have a name or a checksum of the weights, got {dict(identity)}.")
            self._create(identity)
        self.identity: dict[str, Any] = self._check(identity)
        if identity is not None:
            with self._transaction() as connection:  # what cannot be written fails here, not after the first batch
                connection.execute(f"PRAGMA user_version = {FORMAT}")

    def _create(self, identity: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"The folder of the log-probability cache {self.path} cannot be made: {error}. Give a path that is "
                "writable."
            ) from error
        with self._transaction("rwc") as connection:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                return
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.execute("CREATE TABLE model (identity TEXT NOT NULL, temperature REAL NOT NULL)")
            connection.execute("CREATE TABLE logps (key BLOB PRIMARY KEY, logps BLOB NOT NULL)")
            connection.execute("INSERT INTO model VALUES (?, ?)", (json.dumps(dict(identity)), self.temperature))

    def _check(self, identity: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the file says it holds, if that is what was asked for."""
        with self._connection() as connection:
            kind = tuple(
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if kind != (APPLICATION_ID, FORMAT):
                raise ValueError(
                    f"{self.path} is no log-probability cache of this version: it has the application id and format "
                    f"{kind}, expected {(APPLICATION_ID, FORMAT)}. Give another path, or delete it and score anew."
                )
            text, temperature = connection.execute("SELECT identity, temperature FROM model").fetchone()
        found: dict[str, Any] = json.loads(text)
        if is_partial(found) and identity is not None and not is_partial(identity) and identity.get("weights"):
            raise ValueError(
                f"The log-probability cache {self.path} was filled by an earlier version, whose checksum "
                f"{found['weights']!r} did not cover all weights, so it is not known whether {dict(identity)} is the "
                "model that it holds. Give another path to score anew, or open it without the model."
            )
        if temperature != self.temperature or identity is not None and not is_same_identity(found, identity):
            asked = "any model" if identity is None else dict(identity)
            raise ValueError(
                f"The log-probability cache {self.path} holds {found} at temperature {temperature}, and {asked} at "
                f"temperature {self.temperature} was asked for. Give another path for it."
            )
        return found

    @contextmanager
    def _connection(self, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        # "rw" is to read only where the file is write-protected. Elsewhere readers too undo what a dead writer left.
        # The journal is the default one: with WAL a cache on a read-only disk could not be opened.
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS, isolation_level=None)) as connection:
                yield connection
        except sqlite3.Error as error:
            remedy = REMEDIES.get((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF, "Look at the disk and file.")
            raise OSError(f"The log-probability cache {self.path} cannot be used: {error}. {remedy}") from error

    @contextmanager
    def _transaction(self, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        with self._connection(mode) as connection:
            connection.execute("BEGIN IMMEDIATE")  # one that began as a reader could not wait for the lock
            yield connection
            connection.execute("COMMIT")

    def __len__(self) -> int:
        """How many rows are stored."""
        with self._connection() as connection:
            return int(connection.execute("SELECT count(*) FROM logps").fetchone()[0])

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Tensor]:
        """Of the rows with these keys (`row_key`) those that are stored: float32 nats `(n,)`, one a token."""
        rows = {}
        with self._connection() as connection:
            for key in keys:
                row = connection.execute("SELECT logps FROM logps WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    rows[key] = torch.from_numpy(np.frombuffer(row[0], "<f4").copy())
        return rows

    def write(self, rows: Mapping[bytes, Tensor]) -> None:
        """
        Stores rows, all or none. Those that are there already stay as they are.

        Args:
            rows (`Mapping[bytes, torch.Tensor]`):
                By key, float32 nats `(n,)`, one a token. -inf is allowed.

        Raises:
            `ValueError`: If there is NaN among them.
            `PermissionError`: If the file was opened without a model.
        """
        if self.is_read_only:
            raise PermissionError(f"{self.path} was opened without a model, to be read only. Pass `identity`.")
        broken = sum(bool(logps.isnan().any()) for logps in rows.values())
        if broken:
            raise ValueError(
                f"{broken} of {len(rows)} rows for {self.path} have NaN among their log-probabilities, so none was "
                "stored. Check the model, or load it in a wider dtype."
            )
        values = [(key, logps.detach().cpu().numpy().astype("<f4").tobytes()) for key, logps in rows.items()]
        with self._transaction() as connection:
            connection.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?)", values)


class CachedScorer:
    """
    Scores like the model it wraps, but no row twice.

    Args:
        wrapped ([`Scorer`] or `None`):
            The model. `None` for none: then all rows have to be stored.
        path (`str` or `os.PathLike`), temperature (`float`):
            As for [`LogprobCache`].

    Attributes:
        hits (`int`):
            Rows answered without the model so far, on this rank. Rows without completion tokens are not counted.
        misses (`int`):
            Rows that the model had to score.
    """

    def __init__(self, wrapped: Scorer | None, path: str | os.PathLike[str], *, temperature: float) -> None:
        self.wrapped = wrapped
        identity = None if wrapped is None else wrapped.identity()
        self.cache = LogprobCache(path, temperature=temperature, identity=identity)
        self.hits = self.misses = 0

    @property
    def is_sharded(self) -> bool:
        """Whether all ranks have to call it together."""
        return self.wrapped is not None and self.wrapped.is_sharded

    @property
    def context(self) -> int | None:
        """How many tokens the model can read, if that is known."""
        return None if self.wrapped is None else self.wrapped.context

    def identity(self) -> dict[str, Any]:
        """What tells the model from another one."""
        return self.cache.identity if self.wrapped is None else self.wrapped.identity()

    def score(self, sequences: Sequences) -> Tensor:
        """
        Log-probabilities of the scored tokens.

        Only rows that are not stored go through the model, each with the padding that it has here, and then all
        tokens of their completions are scored and stored. As soon as one rank misses a row, a sharded model gets all
        rows of every rank, so that they stay in step.

        Args:
            sequences ([`Sequences`]):
                Prompts of at least one token, padded left, and completions, padded right.

        Returns:
            `torch.Tensor` of shape `(B, T)`: float32 nats; 0 for tokens that are not scored.

        Raises:
            `ValueError`: If a mask has a gap, or rows are missing and there is no model.
        """
        input_ids, mask, num_tokens = sequences.input_ids, sequences.attention_mask.bool().cpu(), sequences.num_tokens
        written = mask[:, input_ids.size(1) - num_tokens :]
        keys = _row_keys(input_ids.cpu(), mask, num_tokens)
        known = self.cache.read(key for key in keys if key is not None)
        missing = {key: row for row, key in enumerate(keys) if key is not None and key not in known}
        self.misses += len(missing)
        self.hits += sum(key is not None for key in keys) - len(missing)

        called = list(missing.values())
        if self.wrapped is not None and self.wrapped.is_sharded:
            counts = gather(torch.tensor([len(called)], device=input_ids.device))
            called = list(range(len(keys))) if bool(counts.any()) else []
        if called:
            if self.wrapped is None:
                raise ValueError(
                    f"{len(called)} of {len(keys)} rows are not among the {len(self.cache)} in {self.cache.path}, and "
                    "there is no model to score them. Score them first with `precompute`, given the very ids of "
                    "prompts (as the chat template renders them) and completions, or pass the model."
                )
            rows = torch.tensor(called, device=input_ids.device)
            logps = self.wrapped.score(Sequences.of(input_ids[rows], sequences.attention_mask[rows], num_tokens))
            scored = dict(zip(called, logps.float().cpu(), strict=True))
            fresh = {key: scored[row][written[row]] for key, row in missing.items()}
            self.cache.write(fresh)
            known |= fresh

        result = torch.zeros(sequences.scored.shape, dtype=torch.float32)
        for row, key in enumerate(keys):
            if key is not None:
                result[row, written[row]] = known[key]
        return result.to(input_ids.device).masked_fill(~sequences.scored, 0.0)


def precompute(
    scorer: Scorer,
    path: str | os.PathLike[str],
    rollouts: Sequence[Mapping[str, Any]],
    *,
    temperature: float,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> int:
    """
    Scores stored rollouts into a cache. What is there already is skipped, so an interrupted call can be repeated.

    Ranks may divide the rollouts among them (`Dataset.shard`), and may write to one file. If the model is sharded, all
    have to pass the same.

    Args:
        scorer ([`Scorer`]):
            The model.
        path (`str` or `os.PathLike`), temperature (`float`):
            As for [`LogprobCache`].
        rollouts ([`~datasets.Dataset`] or `Sequence[Mapping[str, Any]]`):
            Rows with `prompt_ids` and `completion_ids`, lists of at least one id: what this model reads before the
            completion, and the completion with its end.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows that are scored, and then stored, at a time.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the model takes its ids: `accelerator.device`, unless it is served.

    Returns:
        `int`: How many rows were scored.

    Raises:
        `ValueError`: If `batch_size` is below 1, or a row has no such lists. Nothing is scored then.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    columns = ("prompt_ids", "completion_ids")
    lengths = [
        sum(len(token_ids(row, column, number=number)) for column in columns) for number, row in enumerate(rollouts)
    ]
    # Neighbours of like length need little padding, and what does not fit in memory shows at once.
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    cached = CachedScorer(scorer, path, temperature=temperature)
    with tqdm(total=len(order), desc="Scoring", unit="completion", disable=None) as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            prompts, completions = (
                [token_ids(rollouts[number], column, number=number) for number in numbers] for column in columns
            )
            prompt_ids, prompt_mask = pad_ids(prompts, side="left", device=device)
            completion_ids, completion_mask = pad_ids(completions, side="right", device=device)
            ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
            cached.score(Sequences.of(ids, mask, completion_ids.size(1)))
            bar.update(len(numbers))
    return cached.misses


def _row_keys(input_ids: Tensor, mask: Tensor, num_tokens: int) -> list[bytes | None]:
    """Keys of rows, `None` of one without completion tokens, which has no log-probabilities."""
    length = input_ids.size(1) - num_tokens
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    is_scored = mask[:, length:].any(1)
    # Padding is no part of the key, so it may not move the tokens against each other.
    broken = is_scored & ((starts > 1) | ~mask[:, :length].any(1))
    if bool(broken.any()):
        raise ValueError(
            f"Rows {broken.nonzero().flatten().tolist()} of `attention_mask` have a gap between tokens, or no prompt. "
            "Give prompts of at least one token padded left, and completions padded right."
        )
    return [
        row_key(ids[:length][seen[:length]].tolist(), ids[length:][seen[length:]].tolist()) if scored else None
        for ids, seen, scored in zip(input_ids, mask, is_scored.tolist(), strict=True)
    ]
