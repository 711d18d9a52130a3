"""What a user's script does, for `accelerate launch`: the folder of the models, and where to write, are arguments."""

import sys

import deepspeed.ops
from datasets import Dataset

from trl_gopd import GOPDConfig, GOPDTrainer


# DeepSpeed would compile it for a minute on first use, only on CPUs; training does not need it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(models: str, out: str) -> None:
    trainer = GOPDTrainer(
        model=f"{models}/student",
        teacher_model=f"{models}/teacher",
        args=GOPDConfig(
            output_dir=out,
            per_device_train_batch_size=2,
            max_completion_length=8,
            max_steps=2,
            logging_steps=1,
            save_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"What is {i} plus {i + 3}?" for i in range(16)]}),
    )
    trainer.train()
    state = trainer.accelerator.state
    print(f"trained with {state.distributed_type} in {state.num_processes} processes", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
