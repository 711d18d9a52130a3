"""
Files that are whole: written under another name, synced to the disk and renamed, so that readers see the complete old
file or the complete new one, after a power failure, too; and checksums that tell whether they are still what was
written.
"""

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash


ALGORITHM = "xxh3_128"  # of all checksums; memory speed, where CRC-32 takes three times as long
READ_BYTES = 2**24  # of a file at a time


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Context manager that writes a file or a folder under a temporary name, waits until it is on the disk, and renames
    it to `path` when the body ends without an exception. After an exception what was written is removed and `path` is
    left as it was. What killed writers of the same path have left is removed, too.

    Args:
        path (`pathlib.Path`):
            Final path. A file that exists there is kept until the new one is complete. A folder that exists there has
            to be empty.

    Raises:
        `OSError`: if something cannot be written, whatever library writes it.

    Yields:
        `pathlib.Path`: Temporary path to write to. It is in the same folder, has the same suffix as `path`, and
        belongs to this writer alone, so that several processes may write the same path: the last one to end wins.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from trl_gopd.files import written_whole
    >>> with written_whole(Path("state.json")) as part:  # doctest: +SKIP
    ...     part.write_text("{}")

    ```
    """
    remove_leftovers(path)
    part = path.with_name(f".{path.stem}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield part
        sync_tree(part)
        part.replace(path)
        sync(path.parent)
    except BaseException as error:
        _remove(part)
        number = os_error_number(error)
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def os_error_number(error: BaseException) -> int | None:
    """
    Number of the error of the operating system that another one says to come from; `None` if it says of none.
    safetensors and tokenizers write without Python, and name the cause in the text of errors of their own only.
    """
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else int(number[1])


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files and folders of writers of `path` on this machine whose process is gone."""
    name = re.compile(
        rf"\.{re.escape(path.stem)}\.{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}\.part{re.escape(path.suffix)}"
    )
    for found in path.parent.iterdir() if path.parent.is_dir() else ():
        match = name.fullmatch(found.name)
        if match and not _is_running(int(match[1])):
            _remove(found)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync_tree(inner)
    sync(path)


def checksum(path: Path) -> str:
    """Checksum of the content of a file, by `ALGORITHM`, in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OverflowError:  # no process has such a number
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
