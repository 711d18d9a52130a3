"""What a piece of work takes: seconds, and the peak of memory."""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch


@dataclass
class Resources:
    """
    Filled when the body of [`measure`] ends.

    Args:
        seconds (`float`): wall-clock time of the body.
        peak_memory_bytes (`int`):
            Largest resident memory of the process, pages of mapped files included.
        is_process_peak (`bool`):
            Whether that peak is of the process's whole life, because the system cannot restart the count.
        peak_cuda_bytes (`int`, *optional*):
            Largest memory that PyTorch's allocator held during the body, summed over GPUs; `None` without CUDA.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    is_process_peak: bool = False
    peak_cuda_bytes: int | None = None


@contextmanager
def measure() -> Iterator[Resources]:
    """
    Measures its body. Not to be nested: the peak is counted afresh from the start of each.

    Example:

    ```python
    >>> from trl_gopd.evaluation import measure

    >>> with measure() as used:
    ...     numbers = list(range(10))
    >>> used.seconds < 1 and used.peak_memory_bytes > 0
    True

    ```
    """
    used = Resources(is_process_peak=not _restart_peak())
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else None
    for gpu in gpus or ():
        torch.cuda.reset_peak_memory_stats(gpu)
    start = time.perf_counter()
    try:
        yield used
    finally:
        for gpu in gpus or ():
            torch.cuda.synchronize(gpu)
        used.seconds = time.perf_counter() - start
        used.peak_memory_bytes = _peak_bytes()
        if gpus is not None:
            used.peak_cuda_bytes = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)


def return_freed_memory() -> None:
    """
    Gives freed memory back to the system. glibc keeps it, in pieces between what is still in use, so that a process
    which allocates and frees large tensors grows; other C libraries need no help.
    """
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _restart_peak() -> bool:
    """Makes Linux count the peak from now on; says whether it did."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # man 5 proc: resets VmHWM
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    try:
        with open("/proc/self/status") as file:
            # VmHWM, not `ru_maxrss`, which cannot be restarted
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # which Windows does not have

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
