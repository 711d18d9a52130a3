"""Starts `launch_fault.py` with a launcher, as a user starts a script, and says how that ended."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.harness import EXAMPLES, environment_of, free_port


SCRIPT = Path(__file__).with_name("launch_fault.py")
LIMIT = 90.0  # seconds for a start and its end


@dataclass(frozen=True)
class Ending:
    """
    How a launch ended.

    Args:
        code (`int`, *optional*): Exit code of the launcher, `None` if it had to be killed.
        seconds (`float`): From the first fault to the end of launcher and ranks.
        left (`list[int]`): Ranks that outlived the launcher by two seconds.
        log (`str`): What all of them printed, in this order.
    """

    code: int | None
    seconds: float
    left: list[int]
    log: str


def launch(launcher: str, layout: str, folder: Path, *options: str, kill_launcher: bool = False) -> Ending:
    """
    Runs the script until launcher and ranks have ended, or are killed because they take too long.

    Args:
        launcher (`str`):
            `"accelerate"`, `"torchrun"` or `"deepspeed"`.
        layout (`str`):
            As for the harness.
        folder (`Path`):
            Where `models` are, and where the script writes.
        *options (`str`):
            Of the script.
        kill_launcher (`bool`, *optional*, defaults to `False`):
            Whether the launcher is killed when the first step has been logged, and the end of the ranks is waited for.
    """
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    if layout == "fsdp2":
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if launcher == "deepspeed":  # which leaves to the script what accelerate exports
        exported = environment_of(layout, folder)
        environment |= {name: value for name, value in exported.items() if name.startswith("ACCELERATE")}
    command = [
        *_launcher(launcher, layout),
        str(SCRIPT),
        layout,
        str(folder / "models"),
        str(folder / "out"),
        *options,
    ]
    path = folder / "log.txt"
    with path.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    started = time.time()
    try:
        if kill_launcher:
            while "'loss'" not in path.read_text() and process.poll() is None and time.time() < started + LIMIT:
                time.sleep(0.1)
            fault = time.time()
            process.kill()
            _wait_for_ranks(path, LIMIT / 2)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT)
        left = _wait_for_ranks(path, 2.0)
        text = path.read_text(errors="replace")
        if not kill_launcher:
            fault = min(map(float, re.findall(r"^FAULT ([\d.]+)", text, re.M)), default=started)
        return Ending(process.returncode, time.time() - fault, left, text)
    finally:
        process.kill()
        process.wait()
        for pid in _ranks(path).values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _launcher(name: str, layout: str) -> list[str]:
    if name == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        return [*command, "--master_port", str(free_port())]
    if name == "deepspeed":
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--no_local_rank"]
        return [*command, "--master_port", str(free_port())]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    if layout == "ddp":  # the example is for GPUs
        options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
        return [*command, *options.split()]
    config = EXAMPLES / "accelerate_configs" / f"{layout}.yaml"
    return [*command, "--config_file", str(config), "--mixed_precision", "no"]


def _ranks(path: Path) -> dict[int, int]:
    """Processes of ranks, by rank, that still run."""
    found = {int(rank): int(pid) for rank, pid in re.findall(r"RANK (\d+) PID (\d+)", path.read_text())}
    return {rank: pid for rank, pid in found.items() if _runs(pid)}


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for_ranks(path: Path, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while _ranks(path) and time.monotonic() < deadline:
        time.sleep(0.05)
    return sorted(_ranks(path))
