"""Laws of measured resources: they are of the body, filled in also after an error."""

import doctest
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from trl_gopd.evaluation import measure, resources


MEBIBYTE = 2**20


def test_seconds_are_of_the_body():
    start = time.perf_counter()
    with measure() as used:
        time.sleep(0.01)
    assert 0.01 <= used.seconds <= time.perf_counter() - start


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, to restart the peak")
def test_peak_is_of_the_body():
    with measure() as small:
        pass
    if small.is_process_peak:
        pytest.skip("needs a system that restarts the peak")
    with measure() as large:
        block = bytearray(b"1") * (64 * MEBIBYTE)  # written, hence resident
    del block
    with measure() as after:
        pass
    assert large.peak_memory_bytes - small.peak_memory_bytes > 60 * MEBIBYTE
    assert large.peak_memory_bytes - after.peak_memory_bytes > 60 * MEBIBYTE


def test_a_peak_that_cannot_restart_is_marked(monkeypatch):
    monkeypatch.setattr(resources, "_restart_peak", lambda: False)
    with measure() as used:
        pass
    assert used.is_process_peak and used.peak_memory_bytes > 0


def test_peak_without_proc(monkeypatch):
    def no_file(*_):
        raise FileNotFoundError

    with measure() as used:
        pass
    monkeypatch.setattr(resources, "open", no_file, raising=False)
    with measure() as other:
        pass
    # The largest of the process's life, which is not less; Linux counts pages with a delay of some.
    assert other.is_process_peak and other.peak_memory_bytes > used.peak_memory_bytes - MEBIBYTE


def test_is_filled_after_an_error():
    with pytest.raises(KeyError), measure() as used:
        raise KeyError
    assert used.seconds > 0 and used.peak_memory_bytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_speed_is_that_of_the_fastest_product(dtype, monkeypatch):
    class Matrix:
        def __matmul__(self, other):
            return {(0, 0): 1.0}

    seen, ticks = [], iter([0.0, 0.7, 1.0, 1.2, 2.0, 2.5])  # 0.7, 0.2 and 0.5 seconds, which are more than one
    monkeypatch.setattr(resources.torch, "ones", lambda *size, **options: seen.append((size, options)) or Matrix())
    monkeypatch.setattr(resources, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert resources.flops_per_second("cpu", dtype) == pytest.approx(2 * 2048**3 / 0.2)
    assert seen == [((2048, 2048), {"dtype": dtype, "device": "cpu"})]


def test_example():
    result = doctest.testmod(resources)
    assert result.attempted == 3 and result.failed == 0
