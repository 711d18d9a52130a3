"""
One run at a time in a folder: two that wrote the same checkpoints would mix their files, each of them whole.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = "_gopd_running"  # files with an underscore first are not pushed to the hub


@contextmanager
def sole_writer(folder: Path, accelerator: Any) -> Iterator[None]:
    """
    Context manager in which no other run writes into a folder. All ranks have to enter it together.

    The lock is one of the operating system on a file, of the first rank. It ends with the process, however this ends,
    and needs nobody to remove it. Where a file system has no locks, that is logged.

    Args:
        folder (`Path`):
            Folder of the run, which is made if it is not there.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the ranks.

    Raises:
        `ValueError`: If another process holds the lock.
    """
    descriptor: int | None = None
    reason: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            descriptor = _lock(folder)
        except (BlockingIOError, PermissionError) as error:
            reason[0] = str(error)
        except OSError as error:
            logger.warning(
                "Nothing keeps another run from writing into %s, which cannot be locked: %s.", folder, error
            )
    reason = broadcast_object_list(reason)
    if reason[0] is not None:
        raise ValueError(reason[0])
    try:
        yield
    finally:
        if descriptor is not None:
            (folder / NAME).unlink(missing_ok=True)  # while it is locked: the next one makes another file
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """The descriptor of the locked file; `None` where there are no such locks."""
    if fcntl is None:
        logger.warning("Nothing keeps another run from writing into %s: this system has no locks of files.", folder)
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"{holder} is training in {folder} and writes its checkpoints there. Wait until it has ended, or use "
                "another `output_dir`."
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        # The one that had it may have removed the file after it was opened here.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"Process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)
