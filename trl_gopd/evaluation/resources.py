"""Measurement of wall-clock time, peak memory and speed."""

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
    Time and memory of a `with measure()` block. The fields are filled when the block ends.

    Args:
        seconds (`float`): wall-clock time of the block.
        peak_memory_bytes (`int`):
            Peak resident memory of the process, including pages of memory-mapped files.
        is_process_peak (`bool`):
            Whether the peak covers the whole life of the process, because the system cannot reset its counter.
        peak_cuda_bytes (`int`, *optional*):
            Peak memory of PyTorch's allocator during the block, summed over all GPUs; `None` without CUDA.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    is_process_peak: bool = False
    peak_cuda_bytes: int | None = None


@contextmanager
def measure() -> Iterator[Resources]:
    """
    Context manager that measures its block. Blocks must not be nested, because each one resets the peak at its start.

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


def flops_per_second(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """
    Floating-point operations per second in products of matrices of 2048 rows and columns: the best of the products
    that end within about a second.

    Args:
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where to measure.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the matrices.
    """
    size = 2048
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    times: list[float] = []
    while sum(times) < 1 and len(times) < 20:
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # to wait for a device that works asynchronously
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def return_freed_memory() -> None:
    """
    Returns freed memory to the operating system. glibc keeps freed blocks between blocks that are still in use, so
    that a process which allocates and frees large tensors grows. With other C libraries this function does nothing.
    """
    with suppress(AttributeError, OSError, TypeError):  # raised by C libraries other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _restart_peak() -> bool:
    """Resets the peak-memory counter of the process and returns whether the system supports this."""
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
