"""
Memory of several experts: as adapters of the student's own base, and as models of their own.

    python benchmarks/gopd_adapters.py --json FILE

Each run trains a LoRA on SmolLM2-135M-Instruct for two steps in a process of its own, towards N experts that are LoRA
adapters on that base, each for its share of the rows, with the base as reference (λ = 1.25). `shared` gives the
experts by the folders of their adapters, `separate` merges each into a model of its own. With no expert the teacher is
the base itself: that is the memory of one model.
"""

import argparse
import importlib.metadata
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


RUNS = (("shared", 0), ("shared", 1), ("shared", 4), ("separate", 1), ("separate", 4))
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
BATCH_SIZE = 4


def make_adapter(folder: Path, seed: int) -> Path:
    """An adapter on SmolLM2 that changes what it says; untrained, since only its size counts here."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trl_gopd.demo.smollm2 import smollm2_path

    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2_path()), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    model.save_pretrained(folder)
    return folder


def merged(folder: Path):
    """The adapter as a model of its own."""
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()


def run(kind: str, experts: int, folder: Path) -> dict:
    """Two steps, in this process."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig

    from trl_gopd import GOPDConfig, GOPDTrainer
    from trl_gopd.demo.smollm2 import smollm2_path
    from trl_gopd.evaluation import measure

    torch.set_num_threads(1)
    student = str(smollm2_path())
    names = [f"expert{index}" for index in range(experts)]
    teachers = {name: folder / name if kind == "shared" else merged(folder / name) for name in names}
    rows = {"prompt": [f"What is {index} plus {index + 3}?" for index in range(4 * BATCH_SIZE)]}
    if names:
        rows["teacher_id"] = [names[index % experts] for index in range(4 * BATCH_SIZE)]
    with measure() as used:
        trainer = GOPDTrainer(
            model=student,
            teacher_model=teachers or student,
            args=GOPDConfig(
                output_dir=str(folder / "out"),
                gopd_lambda=1.25,
                per_device_train_batch_size=BATCH_SIZE,
                max_completion_length=32,
                max_steps=2,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(rows),
            peft_config=LoraConfig(**LORA),
        )
        trainer.train()
    return {"kind": kind, "experts": experts, "peak_gib": used.peak_memory_bytes / 2**30}


def table(runs: list[dict]) -> str:
    """In Markdown, against the first."""
    lines = ["| experts | as | peak, GiB | of one model's |", "|---|---|---|---|"]
    for each in runs:
        kind = "–" if not each["experts"] else "adapters" if each["kind"] == "shared" else "models"
        ratio = each["peak_gib"] / runs[0]["peak_gib"]
        lines.append(f"| {each['experts']} | {kind} | {each['peak_gib']:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs all of them, one process each."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        kind, experts, folder = args.one
        print(json.dumps(run(kind, int(experts), Path(folder))))
        return
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(max(experts for _, experts in RUNS)):
            make_adapter(folder / f"expert{index}", seed=index)
        for kind, experts in RUNS:
            one = [sys.executable, __file__, "--one", kind, str(experts), name]
            output = subprocess.run(one, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
    print(table(runs))
    if args.json:
        result = {
            "command": shlex.join(["python", "benchmarks/gopd_adapters.py", *argv]),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
            "runs": runs,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
