"""
    python -m tests.faults.soak_training --steps 5000 --json soak.json

trains thousands of steps with each estimator, with pages, checkpoints and, where there can be one, a cache, and
records memory and open files over time.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.faults.training import ESTIMATORS, build
from tests.tiny import scripted_completions
from trl_gopd.gopd.trainer import GOPDTrainer


SAVED = 50  # steps between checkpoints, of which two are kept, and between pages
REPEATED = 8  # batches after which completions come again, so that the cache is asked, too


class Scripted(GOPDTrainer):
    """With completions that cost nothing."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step % REPEATED
        return scripted_completions(self._tokenizer, prompt_ids, step=step, max_length=4), None


class Recorder(TrainerCallback):
    """Resident memory, open files and time, every so many steps."""

    def __init__(self, every: int) -> None:
        self.every, self.rows, self.started = every, [], time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rows.append(
            {
                "estimator": args.gopd_estimator,
                "step": state.global_step,
                "memory_mib": round(pages * os.sysconf("SC_PAGESIZE") / 2**20, 2),
                "open_files": len(os.listdir("/proc/self/fd")),
                "seconds": round(time.perf_counter() - self.started, 1),
            }
        )


def soak(estimator: str, steps: int, folder: Path, every: int = SAVED) -> list[dict[str, Any]]:
    """
    One dictionary every `every` steps: the estimator, the step, resident memory in MiB, how many files are open, and
    seconds since the start.
    """
    options: dict[str, Any] = {
        "output_dir": str(folder / estimator),
        "max_steps": steps,
        "save_steps": SAVED,
        "logging_steps": SAVED,
        "log_completions": True,
        "num_completions_to_print": 0,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "learning_rate": 1e-4,
    }
    if estimator == "sampled":
        options["logprob_cache_dir"] = str(folder / "cache")
    trainer = build(estimator, Scripted, **options)
    recorder = Recorder(every)
    trainer.add_callback(recorder)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return recorder.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000, help="of each estimator (default: 5000)")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=ESTIMATORS, help="(default: all)")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for estimator in args.estimators for row in soak(estimator, args.steps, Path(folder))]
    for row in rows[:: max(1, len(rows) // 30)]:
        print(row)
    if args.json:
        args.json.write_text(json.dumps(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
