"""Trainings side by side, each in a process with one thread: what the demo's models are too small to share."""

import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from tqdm.auto import tqdm


def run_stages(stages: Mapping[str, Sequence[Callable[[], list[dict]]]], *, workers: int) -> list[dict]:
    """
    Runs jobs of a stage side by side, one stage after the other, under one progress bar.

    Args:
        stages (`Mapping[str, Sequence[Callable]]`):
            Jobs by what the bar calls their stage. A job is pickled, and returns its rows.
        workers (`int`):
            Processes.

    Returns:
        `list[dict]`: The rows of all jobs, in no particular order.
    """
    rows: list[dict] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool,
        tqdm(total=sum(map(len, stages.values())), unit="model") as bar,
    ):
        for description, jobs in stages.items():
            bar.set_description(description)
            for future in as_completed([pool.submit(job) for job in jobs]):
                rows.extend(future.result())
                bar.update()
    return rows


def _start_worker() -> None:
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that nothing here uses
    warnings.simplefilter("ignore", FutureWarning)
    # The scene shows one bar and one table; what each short trainer prints at its end is left out.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
