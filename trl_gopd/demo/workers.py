"""
Parallel training of small models, each in a process with one thread.

The models of the demonstrations are too small to gain from several threads.
"""

import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm.auto import tqdm


def run_stages(
    stages: Mapping[str, Sequence[Callable[[], list[dict[str, Any]]]]], *, workers: int
) -> list[dict[str, Any]]:
    """
    Runs the jobs of each stage in parallel and the stages one after another, with one progress bar for all of them.

    Args:
        stages (`Mapping[str, Sequence[Callable]]`):
            Jobs by the name of their stage, which the progress bar shows. A job must be picklable and returns rows.
        workers (`int`):
            Number of processes.

    Returns:
        `list[dict]`: Rows of all jobs, in no particular order.
    """
    rows: list[dict[str, Any]] = []
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about a missing kernel that is not used here
    warnings.simplefilter("ignore", FutureWarning)
    # Trainers print a summary when they end. It is discarded so that only the bar and the final table are shown.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
