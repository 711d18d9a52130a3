"""
What a user's script does, but something goes wrong on one rank, which it announces. For launchers a script, and for
the harness a function.
"""

import argparse
import functools
import os
import resource
import signal
import time
import traceback

from datasets import Dataset

from tests.distributed import harness  # which has FSDP2 run on a CPU
from trl_gopd.gopd import ranks
from trl_gopd.gopd.config import GOPDConfig
from trl_gopd.gopd.trainer import GOPDTrainer


MESSAGE = "there is something wrong with this rank"
# What is called in each phase of a step
PHASES = {
    "generation": lambda trainer: (trainer, "_generate_single_turn"),
    "scoring": lambda trainer: (trainer._estimator, "scores"),
    "forward": lambda trainer: (trainer.model, "forward"),
    "backward": lambda trainer: (trainer.accelerator, "backward"),
    "saving": lambda trainer: (trainer, "_save_rng_state"),
}
# Kinds of faults. The last three need a phase.
FAULTS = ("none", "missing", "row", "overlong", "reward", "served", "nan", "error", "killed", "disk")


def announce() -> None:
    print(f"FAULT {time.time()}", flush=True)


def fail() -> None:
    announce()
    raise ValueError(MESSAGE)


def be_killed() -> None:
    announce()
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """No file of this process may get longer than 100 bytes from now on."""
    announce()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def before(owner, name: str, action) -> None:
    """Has `action` happen before `owner.name`."""
    inherited = getattr(owner, name)

    @functools.wraps(inherited)
    def call(*args, **kwargs):
        action()
        return inherited(*args, **kwargs)

    object.__setattr__(owner, name, call)


def train(
    layout: str,
    rank: int,
    *,
    models: str,
    out: str,
    fault: str = "none",
    phase: str = "scoring",
    failing: int = 1,
    teacher: str | None = None,
    estimator: str = "sampled",
    lives_on: float = 0.0,
    steps: int = 3,
    patience: float = ranks.PATIENCE,
) -> None:
    """
    Trains, with a checkpoint after the second step.

    Args:
        layout, rank: As from the harness.
        models, out: Folders.
        fault: One of `FAULTS`.
        phase: One of `PHASES`.
        failing: Rank on which something is wrong.
        teacher: URL of a server. It has to refuse prompts with three `#` when the fault is "served".
        estimator: As in the configuration.
        lives_on: Seconds that the process of the failing rank takes to end after its error.
        steps: How many.
        patience: Seconds that the other rank gets to end by itself, and without an answer of the store.
    """
    ranks.PATIENCE = ranks.LOST_AFTER = patience
    is_failing = rank == failing
    has = {name: is_failing and fault == name for name in FAULTS}
    print(f"RANK {rank} PID {os.getpid()}", flush=True)

    def reward(completions, **kwargs):
        if has["reward"]:
            fail()
        return [float(len(completion)) for completion in completions]

    def teacher_prompt(row):
        if has["row"]:
            fail()
        if has["overlong"] or has["served"]:
            announce()
        return row["prompt"] * (40 if has["overlong"] else 1) + ("###" if has["served"] else "")

    args = GOPDConfig(
        output_dir=out,
        gopd_estimator=estimator,
        gopd_lambda=1.0 if teacher else 1.25,
        per_device_train_batch_size=2,
        num_generations=2 if fault == "reward" else 1,
        max_completion_length=8,
        max_steps=steps,
        logging_steps=1,
        save_steps=2,
        save_total_limit=1,
        use_cpu=layout != "fsdp2",
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    if has["missing"]:
        announce()
    try:
        trainer = GOPDTrainer(
            model=f"{models}/student",
            teacher_model=f"{models}/missing" if has["missing"] else teacher or f"{models}/teacher",
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [f"What is {i} plus {i + 3}?" for i in range(16)]}),
            teacher_prompt=teacher_prompt,
            reward_funcs=reward if fault == "reward" else None,
        )
        state = trainer.accelerator.state
        assert str(state.distributed_type).rpartition(".")[2] == harness.DISTRIBUTED_TYPES[layout]
        assert state.num_processes == harness.world_size(layout)
        if has["nan"]:
            before(trainer._estimator, "scores", announce)
            trainer.teachers[None].head.weight.data[5] = float("nan")
        for name, action in (("error", fail), ("killed", be_killed), ("disk", fill_disk)):
            if has[name]:
                before(*PHASES[phase](trainer), action)
        trainer.train()
    except Exception:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # to say why
        if is_failing and lives_on:
            traceback.print_exc()
            time.sleep(lives_on)
        raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("layout", "models", "out"):
        parser.add_argument(name)
    parser.add_argument("--fault", default="none", choices=FAULTS)
    parser.add_argument("--phase", default="scoring", choices=PHASES)
    parser.add_argument("--failing", type=int, default=1)
    parser.add_argument("--teacher")
    parser.add_argument("--estimator", default="sampled")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--patience", type=float, default=ranks.PATIENCE)
    train(rank=int(os.environ["RANK"]), **vars(parser.parse_args()))
