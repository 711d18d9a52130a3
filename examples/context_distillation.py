"""
Context distillation of SmolLM2-135M, on a CPU and without the Hub: the teacher is the student itself, but it reads the
solution of the problem before it scores what the student wrote without it.

    pip install 'trl-gopd[demo]'
    python examples/context_distillation.py --json context.json --figure context.png
    python examples/context_distillation.py --gopd_lambda 1.25   # the reference is the same model without the solution

The problems are those of GSM8K with other names and numbers (`gsm_symbolic` of reasoning-gym). What is shown is how
far the student is from the teacher on its own completions, KL(π(·|x) ‖ π*(·|x, solution)) in nats a token, on fresh
problems at every step.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

import reasoning_gym
from datasets import Dataset
from peft import LoraConfig

from trl_gopd import GOPDConfig, GOPDTrainer
from trl_gopd.demo.smollm2 import smollm2_path


BATCH_SIZE = 8


def problems(size: int, seed: int) -> Dataset:
    """Problems as a chat, and their solutions."""
    rows = reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "solution": row["metadata"]["answer_cot"],
            }
            for row in rows
        ]
    )


def with_solution(row: dict) -> list[dict]:
    """What the teacher reads."""
    text = (
        f"{row['prompt'][0]['content']}\n\nHere is a correct solution:\n{row['solution']}\n\n"
        "Now solve the problem in your own words."
    )
    return [{"role": "user", "content": text}]


def draw(gaps: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    window = 5
    smooth = [mean(gaps[max(0, index - window + 1) : index + 1]) for index in range(len(gaps))]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(gaps) + 1), gaps, ".", color="C0", alpha=0.5, label="a step")
    axes.plot(range(1, len(gaps) + 1), smooth, color="C0", label=f"mean of {window} steps")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel="KL to the teacher, nats a token", title="The teacher reads the solution")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil what a solution tells into SmolLM2-135M, on a CPU.")
    parser.add_argument("--gopd_lambda", type=float, default=1.0)
    parser.add_argument("--max_steps", type=int, default=50)
    parser.add_argument("--max_completion_length", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the curve goes")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()

    student = str(smollm2_path())
    with tempfile.TemporaryDirectory() as folder:
        trainer = GOPDTrainer(
            model=student,
            teacher_model=student,  # the base under the adapter, which is in memory already
            teacher_prompt=with_solution,
            args=GOPDConfig(
                output_dir=folder,
                gopd_lambda=options.gopd_lambda,
                gopd_estimator="full",  # the least noise; everything is local
                learning_rate=2e-4,
                per_device_train_batch_size=BATCH_SIZE,
                max_completion_length=options.max_completion_length,
                max_steps=options.max_steps,
                seed=options.seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=problems(BATCH_SIZE * options.max_steps, seed=options.seed),  # none is seen twice
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()

    gaps = [entry["gopd/reverse_kl"] for entry in trainer.state.log_history if "gopd/reverse_kl" in entry]
    settings = {name: getattr(options, name) for name in ("gopd_lambda", "max_completion_length", "seed")}
    result = {"settings": settings, "gap": gaps}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.figure:
        draw(gaps, options.figure)
    print(f"gap, nats a token: {mean(gaps[:5]):.3f} in steps 1-5, {mean(gaps[-5:]):.3f} in the last 5")


if __name__ == "__main__":
    main()
