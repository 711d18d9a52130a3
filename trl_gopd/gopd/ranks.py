"""
An error on one rank ends all of them, within seconds and with its message.

Ranks wait for each other in collective operations, also in the middle of a sharded model, and wait in vain for one
that has failed: with NCCL until a timeout of minutes, with gloo until the connection is lost, of which the message
then speaks. A rank that fails therefore leaves its error in the store over which the ranks have found each other.
There the others look it up when an operation of theirs fails, and a thread looks for it all the time. A thread cannot
interrupt an operation that waits, so it gives its process some seconds to end by itself, and ends it then.

No collective operation is added, and a single process does nothing of this.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler


LOOK_EVERY = 0.5  # seconds between two looks for an error of another rank
PATIENCE = 10.0  # seconds that a process has to end by itself once another rank has failed
READ_WITHIN = 2.0  # seconds that a rank waits for the others to read its error, since its process may hold the store
ANSWER_WITHIN = 5.0  # seconds for the store, whose own timeout is half an hour
LOST_AFTER = 30.0  # seconds without an answer after which the process that holds the store is taken for gone
IS_GONE = (
    "The process of another rank is gone, and has told no error. It may have been killed, for instance for want of "
    "memory; see its own output and the launcher's. Resume with `resume_from_checkpoint=True`."
)
# How gloo and NCCL say so
SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")


class OtherRankError(RuntimeError):
    """Another rank has failed. The message begins with the number of that rank, and with the error that it raised."""


@contextmanager
def together() -> Iterator[None]:
    """
    Ends all ranks if an error leaves the body on one of them. It is a decorator, too. Inside another such body, and
    without other ranks, it does nothing.

    Raises:
        `OtherRankError`: On the other ranks, if an operation of theirs fails as a consequence. A rank that still waits
            after `PATIENCE` seconds prints the same message, and its process ends with the exit code 1.
    """
    has_others = dist.is_initialized() and dist.get_world_size() > 1
    store = _get_default_store() if has_others and _Watch.present is None else None
    if store is None:  # which MPI does not have either, whose launchers end all ranks themselves
        yield
        return
    with _Watch(store) as watch:
        try:
            yield
        except OtherRankError as error:  # the other rank has told of it, but this process may be the first to end
            _record(error)
            raise
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            is_gone = is_of_another_rank(error)
            own = Failure(watch.rank, IS_GONE if is_gone else said)
            first = watch.tell(own, waits=not is_gone)
            if first == own and not is_gone and isinstance(error, Exception):
                _record(error)
            if _may_be_of_collective(error) and first.text != said:  # which it is if all ranks have failed alike
                raise OtherRankError(own.text if first == own else str(first)) from error
            raise


def _record(error: Exception) -> None:
    """For the summary with which a launcher ends, which is of the process that ends first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with suppress(OSError):  # of a full disk, for one
            get_error_handler().record_exception(error)


@dataclass(frozen=True)
class Failure:
    """What a rank has failed with."""

    rank: int
    text: str

    def __str__(self) -> str:
        return f"Rank {self.rank}: {self.text}"


def _may_be_of_collective(error: BaseException) -> bool:
    # Derived classes, such as that of too little memory, are raised by other operations.
    return type(error) is RuntimeError or isinstance(error, dist.DistError)


def is_of_another_rank(error: BaseException) -> bool:
    """Whether an error says nothing but that another rank has failed, or that its process is gone."""
    if isinstance(error, OtherRankError):
        return True
    return _may_be_of_collective(error) and any(sign in str(error) for sign in SIGNS)


class _Watch:
    """
    A thread that looks for the error of another rank, for as long as the context lasts.

    Args:
        store ([`~torch.distributed.Store`]):
            That of the process group.

    Attributes:
        rank (`int`):
            Number of this process.
    """

    present: ClassVar["_Watch | None"] = None
    failures: ClassVar[int] = 0  # of earlier bodies, each of which all ranks have left with an error

    def __init__(self, store: Any) -> None:
        self.rank = dist.get_rank()
        self._others = [rank for rank in range(dist.get_world_size()) if rank != self.rank]
        # A connection of its own: an operation of the other thread may wait on the first one for long.
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=ANSWER_WITHIN))
        self._key = f"gopd_failure_{_Watch.failures}"
        self._seen: Failure | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gopd_ranks", daemon=True)

    def __enter__(self) -> Self:
        _Watch.present = self
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over.set()
        self._thread.join(LOOK_EVERY)  # it ends at once, unless the store does not answer
        _Watch.present = None
        _Watch.failures += kind is not None

    def tell(self, own: Failure, *, waits: bool) -> Failure:
        """
        Leaves an error for the other ranks, and returns the first error of any rank. If that is this one's, it waits
        until the others have read it.
        """
        self._is_over.set()
        try:
            first = Failure(*json.loads(self._store.compare_set(self._key, "", json.dumps(astuple(own)))))
            if first == own and waits:
                with suppress(dist.DistStoreError):  # a rank that was killed, or has not come this far
                    self._store.wait([self._read_by(rank) for rank in self._others], timedelta(seconds=READ_WITHIN))
            elif first != own:
                self._store.set(self._read_by(self.rank), "")
        except RuntimeError:  # the process that holds the store is gone
            first = self._seen or own
        return first

    def _read_by(self, rank: int) -> str:
        return f"{self._key}_read_by_{rank}"

    def _run(self) -> None:
        failure = self._wait_for_failure()
        if failure is None or self._is_over.wait(PATIENCE):
            return
        sys.stdout.flush()
        waited = f"The process of rank {self.rank} has waited for {PATIENCE:.0f} more seconds, and ends."
        print(f"{failure}\n{waited}", file=sys.stderr, flush=True)
        os._exit(1)

    def _wait_for_failure(self) -> Failure | None:
        answered = time.monotonic()
        while not self._is_over.wait(LOOK_EVERY):
            try:
                if self._store.check([self._key]):
                    self._seen = Failure(*json.loads(self._store.get(self._key)))
                    self._store.set(self._read_by(self.rank), "")
                    return self._seen
                answered = time.monotonic()
            except RuntimeError:
                if self._seen is not None:
                    return self._seen
                if time.monotonic() - answered > LOST_AFTER:
                    return Failure(self.rank, "The launcher is gone, or the process of rank 0, which holds the store.")
                with suppress(RuntimeError):
                    self._store = self._store.clone()
        return None
