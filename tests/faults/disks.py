"""Disks that are soon full."""

import ctypes
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """
    Makes a folder a disk of `size` bytes (rounded up to pages) for as long as the body runs. Where mounting is not
    allowed, no file of this process may grow larger than that instead, which leads to an `OSError` as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0:
        try:
            yield folder
        finally:
            if libc.umount2(os.fsencode(folder), 2):  # MNT_DETACH
                raise OSError(ctypes.get_errno(), "The small disk cannot be unmounted", str(folder))
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
