"""
On-policy distillation of SmolLM2-135M past its teacher, on a CPU and without the Hub.

First a teacher is made: the same model, shown sums with their bare answers for a few steps of supervised fine-tuning.
Then a LoRA student that has never seen an answer learns from it with `GOPDTrainer`: it writes its own answers, and is
told for each of its tokens how much more likely the teacher finds it than the model both started from.

    pip install 'trl-gopd[demo]'
    python examples/gopd_smollm2.py                      # the teacher is given by its path
    python examples/gopd_smollm2.py --teacher instance   # or as a model in memory

About two minutes on two cores, and 3 GB of memory. The last line is, give or take a few nats,

    reverse KL to the teacher, nats per answer: 15.1 in steps 1-3, 3.6 in the last 3
"""

import argparse
import tempfile
from statistics import mean

import reasoning_gym
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_gopd import GOPDConfig, GOPDTrainer
from trl_gopd.demo.smollm2 import smollm2_path


# What runs on a laptop, for every trainer below. SmolLM2 is stored in float32, so nothing is gained by bf16 here.
CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
}
# LoRA wants about ten times the rate of full fine-tuning (https://huggingface.co/docs/trl/lora_without_regret), which
# is 1e-5 in the paper. The rest is impatience: these runs have a dozen steps.
LEARNING_RATE = 5e-4


def sums(size: int, seed: int) -> Dataset:
    """Questions like "4 - 1 - 7 =", as a chat, with their answers."""
    rows = reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, max_terms=3, max_digits=1)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in rows
        ]
    )


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def make_teacher(student: str, folder: str) -> None:
    """Writes to `folder` a copy of the student that answers sums with nothing but the number."""
    trainer = SFTTrainer(
        model=student,
        args=SFTConfig(
            output_dir=folder, per_device_train_batch_size=8, max_steps=16, learning_rate=LEARNING_RATE, **CPU
        ),
        train_dataset=sums(200, seed=1),
        peft_config=lora(),
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil SmolLM2-135M past a teacher, on a CPU.")
    parser.add_argument("--teacher", choices=("path", "instance"), default="path", help="how the teacher is passed")
    parser.add_argument("--max_steps", type=int, default=12, help="steps of distillation")
    options = parser.parse_args()

    student = str(smollm2_path())
    with tempfile.TemporaryDirectory() as folder:
        make_teacher(student, folder)
        trainer = GOPDTrainer(
            model=student,
            teacher_model=folder if options.teacher == "path" else AutoModelForCausalLM.from_pretrained(folder),
            args=GOPDConfig(
                output_dir=folder,
                gopd_lambda=1.25,  # the paper's
                learning_rate=LEARNING_RATE,
                per_device_train_batch_size=4,
                max_completion_length=24,
                max_steps=options.max_steps,
                **CPU,
            ),
            train_dataset=sums(400, seed=2).remove_columns("completion"),
            peft_config=lora(),
        )
        trainer.train()

    # The sum over an answer's tokens. Their mean alone hides that the answers get as short as the teacher's.
    per_answer = [
        entry["gopd/reverse_kl"] * entry["completions/mean_length"]
        for entry in trainer.state.log_history
        if "gopd/reverse_kl" in entry
    ]
    first, last = mean(per_answer[:3]), mean(per_answer[-3:])
    print(f"reverse KL to the teacher, nats per answer: {first:.1f} in steps 1-3, {last:.1f} in the last 3")


if __name__ == "__main__":
    main()
