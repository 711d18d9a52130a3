"""
What a user's script does, for launchers, but something goes wrong on one rank. Prints when it does, and which process
each rank is.
"""

import argparse
import functools
import os
import resource
import signal
import time

from datasets import Dataset

from tests.distributed import harness  # FSDP2 on a CPU, and no build of DeepSpeed's operation for CPUs
from trl_gopd import GOPDConfig, GOPDTrainer


assert harness is not None

# What is called in each phase of a step
PHASES = {
    "generation": lambda trainer: (trainer, "_generate_single_turn"),
    "scoring": lambda trainer: (trainer._estimator, "scores"),
    "forward": lambda trainer: (trainer._estimator, "estimate"),
    "backward": lambda trainer: (trainer.accelerator, "backward"),
    "saving": lambda trainer: (trainer, "_save_rng_state"),
}


def announce() -> None:
    print(f"FAULT {time.time()}", flush=True)


def kill() -> None:
    announce()
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    announce()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def fail() -> None:
    announce()
    raise ValueError("there is something wrong with this rank")


def before(owner, name: str, action) -> None:
    """Has `action` happen before `owner.name`."""
    inherited = getattr(owner, name)

    @functools.wraps(inherited)
    def call(*args, **kwargs):
        action()
        return inherited(*args, **kwargs)

    object.__setattr__(owner, name, call)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models")
    parser.add_argument("out")
    parser.add_argument("--fault", default="none")
    parser.add_argument("--phase", default="scoring", choices=PHASES)
    parser.add_argument("--rank", type=int, default=1, help="on which something is wrong")
    parser.add_argument("--teacher", help="URL of a server")
    parser.add_argument("--estimator", default="sampled")
    parser.add_argument("--fsdp", action="store_true")
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    is_faulty = rank == args.rank
    print(f"RANK {rank} PID {os.getpid()}", flush=True)

    def reward(completions, **kwargs):
        if is_faulty and args.fault == "reward":
            fail()
        return [float(len(completion)) for completion in completions]

    def teacher_prompt(row):
        if is_faulty and args.fault == "overlong":
            announce()
            return row["prompt"] * 40
        if is_faulty and args.fault == "served":
            announce()
            return row["prompt"] + "###"
        if is_faulty and args.fault == "row":
            fail()
        return row["prompt"]

    teacher = args.teacher or f"{args.models}/teacher"
    if is_faulty and args.fault == "missing":
        announce()
        teacher = f"{args.models}/missing"
    trainer = GOPDTrainer(
        model=f"{args.models}/student",
        teacher_model=teacher,
        args=GOPDConfig(
            output_dir=args.out,
            gopd_estimator=args.estimator,
            gopd_lambda=1.0 if args.teacher else 1.25,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=8,
            max_steps=3,
            logging_steps=1,
            save_steps=2,
            use_cpu=not args.fsdp,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"What is {i} plus {i + 3}?" for i in range(16)]}),
        teacher_prompt=teacher_prompt,
        reward_funcs=reward,
    )
    state = trainer.accelerator.state
    print(f"READY {state.distributed_type} in {state.num_processes} processes", flush=True)
    if is_faulty:
        if args.fault == "nan":
            before(trainer._estimator, "scores", announce)
            trainer.teachers[None].head.weight.data[5] = float("nan")
        actions = {"kill": kill, "disk": fill_disk, "error": fail}
        if args.fault in actions:
            before(*PHASES[args.phase](trainer), actions[args.fault])
    trainer.train()
    print("TRAINED", flush=True)


if __name__ == "__main__":
    main()
