"""Peak of the memory that torch allocates, counted from the events of its own allocators."""

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any]) -> int:
    """
    How far the bytes allocated during `run` rise above those allocated before it. Every allocation of torch on the CPU
    counts, those inside of an operator too, which a dispatch mode does not see.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    live = peak = 0
    for event in sorted(_memory_events(profile), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _memory_events(profile: Any) -> list[Any]:
    return [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
