"""
What one step of `GOPDTrainer` costs beside TRL's `DistillationTrainer` and `GRPOTrainer`: seconds and peak memory.

    python benchmarks/gopd_step.py                                   # models of two layers: the overhead alone
    python benchmarks/gopd_step.py --size smollm2 --json step.json   # SmolLM2-135M, a vocabulary of 49,152
    python benchmarks/gopd_step.py --bf16 --only "gopd 1 sampled" "gopd 1 full" --baseline "gopd 1 sampled"

All contestants have the same student, teacher, prompts, optimizer and dtype, and sample the same number of tokens.
Each lives in a process of its own, so that peak memory is its own, and all of them are alive at the same time: they
take turns, one step each, in an order that is reversed from round to round. Ratios are taken within a round, since the
speed of a machine that does other work too drifts between rounds.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


BASELINE = "trl distillation"
# The number is λ. TRL's rule for GRPO is at least two completions a prompt; the others take one.
CONTESTANTS = (
    BASELINE,
    "trl grpo",
    "gopd 1 sampled",
    "gopd 1 full",
    "gopd 1.25 sampled",
    "gopd 1.25 full",
)
# At most this many times the step of `BASELINE`.
TARGETS = {"gopd 1 sampled": 1.05, "gopd 1 full": 1.05, "gopd 1.25 sampled": 1.2, "gopd 1.25 full": 1.2}
SEED = 0


@dataclass(frozen=True)
class Setting:
    """
    Args:
        size (`str`): `"tiny"` or `"smollm2"`.
        batch_size (`int`): Completions a step.
        completion_length (`int`): Tokens of every completion, exactly.
        threads (`int`): Threads of torch.
        warmup (`int`): Steps before the first that is timed.
        repeats (`int`): Timed steps.
        bf16 (`bool`): Whether forward passes run under autocast to bfloat16, which is what `bf16=True` means to TRL.
    """

    size: str
    batch_size: int
    completion_length: int
    threads: int
    warmup: int
    repeats: int
    bf16: bool = False


SETTINGS = {
    "tiny": Setting("tiny", batch_size=4, completion_length=32, threads=1, warmup=3, repeats=30),
    "smollm2": Setting("smollm2", batch_size=4, completion_length=64, threads=2, warmup=1, repeats=5),
}


# What is measured


def build_models(size: str):
    """Student, teacher and their tokenizer, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_gopd.demo import arithmetic

    if size == "smollm2":
        from trl_gopd.demo.smollm2 import smollm2_path

        path = smollm2_path()
        student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
        return student, teacher, AutoTokenizer.from_pretrained(path, padding_side="left")

    tokenizer = arithmetic.build_tokenizer()
    student, teacher = (
        arithmetic.build_model(tokenizer, arithmetic.Size(hidden_size, 2), seed=seed)
        for seed, hidden_size in ((1, 64), (2, 96))
    )
    for model in (student, teacher):
        model.config.max_position_embeddings = 256  # those of the demo end after a sum; rotary positions go on
    return student, teacher, tokenizer


def build_prompts(size: str, rows: int) -> list[str]:
    """Texts of 32 tokens for `"tiny"`, a token a character, and of 33 for `"smollm2"`, which cuts out digits."""
    if size == "tiny":
        return [f"{i:015}+{i + 1234:015}=" for i in range(rows)]
    return [f"Please add up these numbers: {i:09} and {i + 1234:015}" for i in range(rows)]


def build_trainer(contestant: str, setting: Setting, output_dir: str, callbacks: list):
    """The trainer called `contestant`, set up like every other one as far as their configurations allow."""
    import torch
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    from trl_gopd import GOPDConfig, GOPDTrainer

    student, teacher, tokenizer = build_models(setting.size)
    options = {
        "output_dir": output_dir,
        "max_steps": setting.warmup + setting.repeats,
        "per_device_train_batch_size": setting.batch_size,
        "max_completion_length": setting.completion_length,
        "generation_kwargs": {"min_new_tokens": setting.completion_length},
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "gradient_checkpointing": False,
        "bf16": setting.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "seed": SEED,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    common = {
        "model": student,
        "train_dataset": Dataset.from_dict({"prompt": build_prompts(setting.size, 64)}),
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    if contestant == "trl distillation":
        return DistillationTrainer(teacher_model=teacher, args=DistillationConfig(beta=1.0, **options), **common)
    if contestant == "trl grpo":
        del teacher
        return GRPOTrainer(reward_funcs=_reward, args=GRPOConfig(num_generations=2, **options), **common)
    _, gopd_lambda, estimator = contestant.split()
    args = GOPDConfig(gopd_lambda=float(gopd_lambda), gopd_estimator=estimator, **options)
    return GOPDTrainer(teacher_model=teacher, args=args, **common)


def _reward(completions, **kwargs) -> list[float]:
    """Any reward does, as long as completions differ in it: the time of a step does not depend on its value."""
    return [float(len(set(completion))) for completion in completions]


def run_contestant(
    contestant: str, setting: Setting, wait: Callable[[], None], report: Callable[[dict], None]
) -> None:
    """
    Trains for `setting.warmup + setting.repeats` steps: `wait` is called before each and `report` after it.

    The reports are one of the finished construction, one a step, and one of the end.
    """
    import torch
    import transformers
    import trl  # noqa: F401  part of the memory that is there before the models are

    import trl_gopd  # noqa: F401  likewise

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(setting.threads)
    cuda = torch.cuda.is_available()
    memory = {"imports_gib": _peak_memory_gib()}
    now = {"wall": 0.0, "cpu": 0.0, "generation": 0.0, "prompt_tokens": 0, "completion_tokens": 0}
    start = {}

    def seconds() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            wait()
            now.update(generation=0.0, prompt_tokens=0, completion_tokens=0)
            start.update(cpu=time.process_time(), wall=seconds())

        def on_step_end(self, args, state, control, **kwargs):
            now.update(wall=seconds() - start["wall"], cpu=time.process_time() - start["cpu"])
            report(dict(now))

    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(contestant, setting, output_dir, [Turns()])
        generate = trainer._generate_single_turn

        def timed_generate(prompt_ids, *args, **kwargs):
            started = seconds()
            result = generate(prompt_ids, *args, **kwargs)
            completion_ids = result[0] if isinstance(result, tuple) else result
            now["generation"] += seconds() - started
            now["prompt_tokens"] += sum(map(len, prompt_ids))
            now["completion_tokens"] += sum(map(len, completion_ids))
            return result

        trainer._generate_single_turn = timed_generate
        memory["built_gib"] = _peak_memory_gib()
        report({"built": True, "device": str(trainer.args.device)})
        trainer.train()
        memory["trained_gib"] = _peak_memory_gib()
        if cuda:
            memory["cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
        report(memory)


def _peak_memory_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# Who measures it


class Worker:
    """A contestant in a process of its own, which takes a step when it is told to."""

    def __init__(self, contestant: str, setting: Setting):
        self.contestant = contestant
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(contestant, setting, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> dict:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"`{self.contestant}` stopped with exit code {self._process.exitcode}. Its error is above; -9 without "
                "one is a lack of memory, for which there is `--only`."
            ) from None

    def step(self) -> dict:
        self._pipe.send("step")
        return self.receive()


def _work(contestant: str, setting: Setting, pipe) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # upstream's, of upstream, once for every process
    with contextlib.redirect_stdout(io.StringIO()):
        run_contestant(contestant, setting, wait=pipe.recv, report=pipe.send)


def measure(contestants: list[str], setting: Setting) -> dict[str, dict]:
    """For every contestant its `steps`, a list of what `run_contestant` reports, its `memory` and its `device`."""
    os.environ["OMP_NUM_THREADS"] = str(setting.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workers = [Worker(contestant, setting) for contestant in contestants]
    results = {worker.contestant: {"device": worker.receive()["device"], "steps": []} for worker in workers}
    started = time.perf_counter()
    for number in range(setting.warmup + setting.repeats):
        for worker in workers if number % 2 == 0 else reversed(workers):
            step = worker.step()
            if number >= setting.warmup:
                results[worker.contestant]["steps"].append(step)
        elapsed = time.perf_counter() - started
        print(f"round {number + 1} of {setting.warmup + setting.repeats}, {elapsed:.0f} s", file=sys.stderr)
    for worker in workers:
        results[worker.contestant]["memory"] = worker.receive()
    return results


# What it comes to


def summarize(results: dict[str, dict], baseline: str = BASELINE) -> dict[str, dict]:
    """
    For every contestant median, least and largest seconds of a step, of its generation and of the rest, CPU seconds,
    peak memory, and the same of the ratios to the baseline's step, if that took part.
    """
    summary = {}
    base = results.get(baseline)
    for contestant, result in results.items():
        steps, memory = result["steps"], result["memory"]
        row = {
            "step_s": _spread([step["wall"] for step in steps]),
            "generation_s": _spread([step["generation"] for step in steps]),
            "rest_s": _spread([step["wall"] - step["generation"] for step in steps]),
            "cpu_s": _spread([step["cpu"] for step in steps]),
            "memory_gib": memory.get("cuda_gib", memory["trained_gib"] - memory["imports_gib"]),
        }
        if base is not None:
            pairs = list(zip(steps, base["steps"], strict=True))
            row["ratio"] = _spread([ours["wall"] / theirs["wall"] for ours, theirs in pairs])
            row["cpu_ratio"] = _spread([ours["cpu"] / theirs["cpu"] for ours, theirs in pairs])
        if contestant in TARGETS and baseline == BASELINE:
            row["target"] = TARGETS[contestant]
        summary[contestant] = row
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(summary: dict[str, dict]) -> str:
    """Markdown."""
    seconds = ("step", "generation", "rest", "CPU")
    columns = ["trainer", *(f"{name}, s" for name in seconds), "step ratio", "CPU ratio", "target", "memory, GiB"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]

    def cell(value: dict[str, float] | None, digits: int = 2) -> str:
        if value is None:
            return ""
        return "{median:.{d}f} ({min:.{d}f}–{max:.{d}f})".format(**value, d=digits)

    for contestant, row in summary.items():
        digits = 2 if row["step_s"]["median"] >= 1 else 3
        cells = [
            contestant,
            *(cell(row[name], digits) for name in ("step_s", "generation_s", "rest_s", "cpu_s")),
            cell(row.get("ratio")),
            cell(row.get("cpu_ratio")),
            f"{row['target']:.2f}" if "target" in row else "",
            f"{row['memory_gib']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def environment(argv: list[str]) -> dict:
    """What has to be known to run it again."""
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "accelerate", "torch")}
    return {
        "command": shlex.join(["python", "benchmarks/gopd_step.py", *argv]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "trl_gopd", "benchmarks")),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"processor": _processor(), "cpus": os.cpu_count(), "load_average": os.getloadavg()},
        "dtype": "float32",  # of the weights
        "seed": SEED,
    }


def _git(*args: str) -> str | None:
    run = subprocess.run(["git", *args], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def parse_args(argv: list[str] | None = None) -> tuple[list[str], Setting, str, Path | None]:
    """Names of the contestants, what they do, whose step is the unit, and where the JSON goes."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--size", choices=list(SETTINGS), default="tiny", help="models (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"some of {CONTESTANTS}")
    parser.add_argument("--repeats", type=int, help="timed steps of each (default: 30 of tiny, 5 of smollm2)")
    parser.add_argument("--warmup", type=int, help="steps before them (default: 3 of tiny, 1 of smollm2)")
    parser.add_argument("--batch-size", type=int, help="completions a step (default: 4)")
    parser.add_argument("--completion-length", type=int, help="tokens each (default: 32 of tiny, 64 of smollm2)")
    parser.add_argument("--threads", type=int, help="threads (default: 1 of tiny, 2 of smollm2)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 (default: float32)")
    parser.add_argument(
        "--baseline",
        choices=CONTESTANTS,
        metavar="NAME",
        default=BASELINE,
        help="unit of ratios (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all times go")
    args = parser.parse_args(argv)
    names = ("repeats", "warmup", "batch_size", "completion_length", "threads")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in given.items():
        if value < (0 if name == "warmup" else 1):
            parser.error(f"--{name.replace('_', '-')} is too small: {value}")
    contestants = [name for name in CONTESTANTS if args.only is None or name in args.only]
    return contestants, Setting(**asdict(SETTINGS[args.size]) | given | {"bf16": args.bf16}), args.baseline, args.json


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    contestants, setting, baseline, file = parse_args(argv)
    report = environment(argv) | {"setting": asdict(setting)}
    report["results"] = measure(contestants, setting)
    tokens = {name: {step["completion_tokens"] for step in r["steps"]} for name, r in report["results"].items()}
    if any(seen != {setting.batch_size * setting.completion_length} for seen in tokens.values()):
        raise RuntimeError(f"Contestants did not sample the same number of tokens a step: {tokens}.")
    report["summary"] = summarize(report["results"], baseline)
    print(f"{setting}\n")
    print(table(report["summary"]))
    print(f"\nMedian (least–largest) of the steps; ratios are to the step of `{baseline}` in the same round.")
    print(f"commit {report['commit']}{', and changes on top of it' if report['dirty'] else ''}")
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
