"""`accelerate launch` with the example configurations, as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.harness import EXAMPLES


@pytest.mark.slow  # imports, in three processes that share the cores
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_launched_with_an_example_config_trains_and_saves(layout, models, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(EXAMPLES / "accelerate_configs" / f"{layout}.yaml"), "--main_process_port", "0"]
    command += [str(Path(__file__).with_name("launch_train.py")), str(models), str(tmp_path / "out")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("trained with DistributedType.DEEPSPEED in 2 processes") == 2, done.stdout[-4000:]

    student = AutoModelForCausalLM.from_pretrained(models / "student")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2", dtype=torch.float32)
    assert trained.num_parameters() == student.num_parameters()
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), trained.parameters(), strict=True))
