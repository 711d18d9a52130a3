"""
A file of log-probabilities of completions under one frozen model at one temperature, in SQLite's format.

Processes of one machine may share it, and a row is there as a whole or not at all, whenever a writer dies. Network
file systems lock files unreliably, so a file there is only read. What is read is checked: each row has a checksum.
"""

import hashlib
import json
import math
import os
import sqlite3
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from .identity import is_partial, is_same_identity
from .protocols import ROUNDING


CACHE_SUFFIX = ".sqlite3"
APPLICATION_ID = int.from_bytes(b"GOPD")
FORMAT = 2  # of the tables, keys and checksums below
TABLES = {
    "logps": "CREATE TABLE logps (key BLOB PRIMARY KEY, logps BLOB NOT NULL, checksum BLOB NOT NULL)",
    "model": "CREATE TABLE model (identity TEXT NOT NULL, temperature REAL NOT NULL, checksum BLOB NOT NULL)",
}
# A row of another length is damaged, and is not read into memory, however long it says that it is.
SELECT_ROW = "SELECT CASE WHEN length(logps) = ? THEN logps END, checksum FROM logps WHERE key = ?"
LOCK_SECONDS = 60.0  # for which another process may hold the file
DAMAGED = "It is damaged: delete it and score anew."
REMEDIES = {
    sqlite3.SQLITE_NOTADB: "It is another kind of file, or damaged: give another path, or delete it and score anew.",
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_READONLY: "It must be writable with its folder. To read it only, open it without a model.",
    sqlite3.SQLITE_CANTOPEN: "It must be a file in a folder that is writable, unless it is opened without a model.",
    sqlite3.SQLITE_BUSY: f"Another process has locked it for over {LOCK_SECONDS:.0f} seconds: end that, or wait.",
    sqlite3.SQLITE_FULL: "The disk is full: make room.",
}
MOUNTS = Path("/proc/self/mountinfo")
NETWORK_FILE_SYSTEMS = frozenset(
    "9p afs beegfs ceph cifs fhgfs gpfs lustre ncpfs nfs nfs4 panfs pvfs2 smb3 smbfs wekafs "
    "fuse.ceph fuse.ceph-fuse fuse.gcsfuse fuse.glusterfs fuse.goofys fuse.juicefs fuse.mfs fuse.mount-s3 fuse.rclone "
    "fuse.s3fs fuse.sshfs glusterfs".split()
)


def row_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """SHA-256 of both lengths and all ids, as int64: no two rows share it, wherever the prompt ends."""
    ids = [*prompt_ids, *completion_ids]
    return hashlib.sha256(struct.pack(f"<{2 + len(ids)}q", len(prompt_ids), len(completion_ids), *ids)).digest()


def network_file_system(path: Path) -> str | None:
    """Kind of the network file system that a file is on, or would be on; `None` for a disk of this machine."""
    path = path.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    device = there.stat().st_dev
    try:
        mounts = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # only Linux tells
        return None
    for mount in mounts:
        place, _, kind = mount.partition(" - ")
        if place.split()[2:3] == [f"{os.major(device)}:{os.minor(device)}"] and kind:
            name = kind.split()[0]
            return name if name in NETWORK_FILE_SYSTEMS else None
    return None


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
        `OSError`: If it cannot be used, here or in any method, or would be written to on a network file system.
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
        kind = network_file_system(self.path)
        if kind is not None:
            raise OSError(
                f"The log-probability cache {self.path} would be on a network file system ({kind}), whose locks are "
                "unreliable, so that its writers could destroy it. Give a path on a disk of this machine; each node "
                "needs a file of its own."
            )
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
            for statement in TABLES.values():
                connection.execute(statement)
            text = json.dumps(dict(identity))
            values = (text, self.temperature, _model_checksum(text.encode(), self.temperature))
            connection.execute("INSERT INTO model VALUES (?, ?, ?)", values)

    def _check(self, identity: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the file says it holds, if that is what was asked for."""
        with self._connection() as connection:
            kind = tuple(
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if kind == (APPLICATION_ID, 1):
                raise ValueError(
                    f"{self.path} was filled by an earlier version, whose rows had no checksums, so it is not known "
                    "whether they are still what was written. Give another path, or delete it and score anew."
                )
            if kind != (APPLICATION_ID, FORMAT):
                raise ValueError(
                    f"{self.path} is no log-probability cache of this version: it has the application id and format "
                    f"{kind}, expected {(APPLICATION_ID, FORMAT)}. Give another path, or delete it and score anew."
                )
            found, temperature = self._model(connection)
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

    def _model(self, connection: sqlite3.Connection) -> tuple[dict[str, Any], float]:
        """The model of the file and its temperature, if the tables are those that were made and hold one model."""
        tables = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        models = []
        if dict(tables) == {name.encode(): sql.encode() for name, sql in TABLES.items()}:
            models = connection.execute("SELECT identity, temperature, checksum FROM model LIMIT 2").fetchall()
        match models:
            case [(bytes(text), float(temperature), checksum)] if checksum == _model_checksum(text, temperature):
                found: dict[str, Any] = json.loads(text)
                return found, temperature
        raise OSError(f"The log-probability cache {self.path} does not tell which model it holds. {DAMAGED}")

    @contextmanager
    def _connection(self, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        # "rw" is to read only where the file is write-protected. Elsewhere readers too undo what a dead writer left.
        # The journal is the default one: with WAL a cache on a read-only disk could not be opened.
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS, isolation_level=None)) as connection:
                connection.text_factory = bytes  # damaged text need not be UTF-8
                connection.execute("PRAGMA cell_size_check = ON")  # finds more damage before it is followed
                yield connection
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter of a message that quotes damaged text
            remedy = REMEDIES.get(
                (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF,
                "Look at the disk and file: if it is damaged, delete it and score anew.",
            )
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

    def read(self, lengths: Mapping[bytes, int]) -> tuple[dict[bytes, Tensor], set[bytes]]:
        """
        Rows that are stored.

        Args:
            lengths (`Mapping[bytes, int]`):
                How many tokens each wanted row has, by its key (`row_key`).

        Returns:
            `tuple[dict[bytes, torch.Tensor], set[bytes]]`: those that are there and whole, float32 nats `(n,)`, one a
            token, and the keys of those that are damaged.
        """
        rows, damaged = {}, set()
        with self._connection() as connection:
            for key, length in lengths.items():
                found = connection.execute(SELECT_ROW, (4 * length, key)).fetchone()
                if found is not None:
                    values = _whole_row(key, *found)
                    if values is None:
                        damaged.add(key)
                    else:
                        rows[key] = torch.from_numpy(values.copy())
        return rows, damaged

    def write(self, rows: Mapping[bytes, Tensor], damaged: Collection[bytes] = ()) -> None:
        """
        Stores rows, all or none. Those that are there already stay as they are, unless they are damaged.

        Args:
            rows (`Mapping[bytes, torch.Tensor]`):
                By key, float32 nats `(n,)`, one a token. -inf is allowed.
            damaged (`Collection[bytes]`, *optional*):
                Keys of rows that `read` found damaged.

        Raises:
            `ValueError`: If there is one among them that is no log-probability: NaN, or above 0.
            `PermissionError`: If the file was opened without a model.
        """
        if self.is_read_only:
            raise PermissionError(f"{self.path} was opened without a model, to be read only. Pass `identity`.")
        numbers = {key: logps.detach().cpu().numpy().astype("<f4") for key, logps in rows.items()}
        broken = sum(not _are_log_probabilities(row) for row in numbers.values())
        if broken:
            raise ValueError(
                f"{broken} of {len(rows)} rows for {self.path} have NaN or numbers above 0 among their "
                "log-probabilities, so none was stored. Check the model, or load it in a wider dtype."
            )
        values = [(key, row.tobytes(), _row_checksum(key, row.tobytes())) for key, row in numbers.items()]
        with self._transaction() as connection:
            for key in damaged:
                found = connection.execute(SELECT_ROW, (4 * len(numbers[key]), key)).fetchone()
                if found is not None and _whole_row(key, *found) is None:  # no other process has replaced it yet
                    connection.execute("DELETE FROM logps WHERE key = ?", (key,))
            connection.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?, ?)", values)


def _whole_row(key: bytes, logps: Any, checksum: Any) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """The numbers of a row, `None` if it is damaged. SQLite has no types: anything may stand in a damaged row."""
    if not isinstance(logps, bytes) or checksum != _row_checksum(key, logps):
        return None
    values = np.frombuffer(logps, "<f4")
    return values if _are_log_probabilities(values) else None


def _are_log_probabilities(values: np.ndarray[Any, np.dtype[np.float32]]) -> bool:
    return bool((values <= ROUNDING).all())  # which NaN is not either


def _row_checksum(key: bytes, logps: bytes) -> bytes:
    """Of the key, too: the numbers of another row are damage."""
    return xxhash.xxh3_64(struct.pack("<q", len(logps)) + key + logps).digest()


def _model_checksum(identity: bytes, temperature: float) -> bytes:
    return xxhash.xxh3_64(struct.pack("<d", temperature) + identity).digest()
