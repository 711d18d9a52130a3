"""
Runs a function in two real processes over gloo, under DDP, DeepSpeed ZeRO or FSDP2, on a machine without a GPU.

Importing TRL and DeepSpeed costs several seconds, so the test module imports them once and every scenario is a fork of
it: about three seconds instead of fifteen through `accelerate launch`. The environment of a rank is what `accelerate
launch --config_file` would give it.
"""

import json
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the same path on a machine that has a GPU

import deepspeed.ops
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


# A fork must not inherit a pool of threads that only exists in its parent.
torch.set_num_threads(1)
# Plain gloo instead of DeepSpeed's shared-memory op, whose C++ build takes a minute and which training does not use.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_prepare_backend = PartialState._prepare_backend


def _prepare_backend_for_fsdp(self, cpu=False, sagemaker_dp=False, backend=None):
    # accelerate 1.15 has no FSDP on CPUs: it would train with DDP instead, without a word
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and "RANK" in os.environ:
        return "gloo", DistributedType.MULTI_GPU
    return _prepare_backend(self, cpu, sagemaker_dp, backend)


PartialState._prepare_backend = _prepare_backend_for_fsdp

EXAMPLES = Path(__file__).parents[2] / "examples"
# `accelerator.distributed_type` of each: launchers fall back silently, so every scenario has to assert it.
DISTRIBUTED_TYPES = {"single": "NO", "ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
LOG_TAIL = 4000


def world_size(layout: str) -> int:
    """Ranks that `run` starts for a layout."""
    return 1 if layout == "single" else 2


def run(function: Callable[..., Any], layout: str, *, timeout: float = 120, **kwargs) -> list[Any]:
    """
    Calls `function(layout=layout, rank=rank, **kwargs)` in every rank.

    Args:
        function (`Callable`):
            What to run. Its result is pickled.
        layout (`str`):
            A key of `DISTRIBUTED_TYPES`.
        timeout (`float`, *optional*, defaults to `120`):
            Seconds after which ranks that still run are killed.
        **kwargs:
            Passed on.

    Returns:
        `list`: the result of every rank.

    Raises:
        `AssertionError`: If a rank fails or does not end in time. The message holds the end of every rank's log.
    """
    with tempfile.TemporaryDirectory(prefix=f"{layout}_") as name:
        folder = Path(name)
        ranks = _start(function, layout, folder, kwargs)
        started = time.monotonic()
        is_late = _wait(ranks, started + timeout)
        codes = [process.exitcode for process in ranks]
        if is_late or any(codes):
            raise AssertionError(_report(layout, codes, is_late, time.monotonic() - started, folder))
        return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(len(ranks))]


@dataclass(frozen=True)
class Ended:
    """
    How a rank ended.

    Args:
        code (`int`, *optional*): Exit code, negative for a signal; `None` if it had to be killed.
        seconds (`float`): From the end of the first rank to its own.
        log (`str`): What it printed.
    """

    code: int | None
    seconds: float
    log: str

    @property
    def error(self) -> str:
        """The last line that is not empty, which is the message of the exception that ended it."""
        return self.log.strip().rpartition("\n")[2]


def run_to_end(function: Callable[..., Any], layout: str, *, within: float, **kwargs) -> list[Ended]:
    """As `run`, for ranks that fail: how each has ended, if it did so `within` seconds after the first of them."""
    with tempfile.TemporaryDirectory(prefix=f"{layout}_") as name:
        folder = Path(name)
        ranks = _start(function, layout, folder, kwargs)
        ends: dict[int, float] = {}
        deadline = time.monotonic() + 120
        while len(ends) < len(ranks) and time.monotonic() < deadline:
            for rank, process in enumerate(ranks):
                if rank not in ends and not process.is_alive():
                    ends[rank] = time.monotonic()
                    deadline = min(ends.values()) + within
            time.sleep(0.02)
        for process in ranks:
            process.kill()
            process.join()
        return [
            Ended(
                process.exitcode if rank in ends else None,
                ends.get(rank, deadline) - min(ends.values(), default=deadline),
                (folder / f"{rank}.log").read_text(errors="replace"),
            )
            for rank, process in enumerate(ranks)
        ]


def _start(function: Callable[..., Any], layout: str, folder: Path, kwargs: dict[str, Any]) -> list[Any]:
    context = multiprocessing.get_context("fork")
    environment = {**environment_of(layout, folder), "MASTER_PORT": str(free_port())}
    ranks = [
        context.Process(target=_rank, args=(function, kwargs, layout, rank, environment, folder))
        for rank in range(world_size(layout))
    ]
    for process in ranks:
        process.start()
    return ranks


def environment_of(layout: str, folder: Path) -> dict[str, str]:
    """What `accelerate launch` exports to every rank; a configuration of DeepSpeed goes into `folder`."""
    if layout == "single":
        return {}
    world = str(world_size(layout))
    environment = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_MIXED_PRECISION": "no",
    }
    if layout == "fsdp2":
        environment |= {
            "ACCELERATE_USE_FSDP": "true",
            "ACCELERATE_TORCH_DEVICE": "cpu",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }
    if layout.startswith("zero"):
        config = json.loads((EXAMPLES / "deepspeed" / f"{layout}.json").read_text())
        if layout in ("zero2", "zero3"):
            # Small parameters stay whole by default, which would be all of a tiny model. With ZeRO-2 it is about
            # frozen models alone.
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        path = folder / f"{layout}.json"
        path.write_text(json.dumps(config))
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
        environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(layout == "zero3").lower()
    return environment


def _wait(ranks, deadline: float) -> bool:
    """Waits for all ranks; once one has failed its peers hang, so they get two seconds. Whether it took too long."""
    has_failed = False
    while any(process.is_alive() for process in ranks):
        if not has_failed and any(process.exitcode for process in ranks):
            has_failed, deadline = True, min(deadline, time.monotonic() + 2)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    is_late = not has_failed and any(process.is_alive() for process in ranks)
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    return is_late


def _report(layout: str, codes: list[int | None], is_late: bool, seconds: float, folder: Path) -> str:
    lines = [f"{layout}: {'no end' if is_late else 'failure'} after {seconds:.0f} s, exit codes {codes}"]
    for rank in range(len(codes)):
        path = folder / f"{rank}.log"
        log = path.read_text(errors="replace") if path.exists() else "(no log)"
        lines += [f"--- rank {rank} ---", log[-LOG_TAIL:]]
    return "\n".join(lines)


def _rank(function, kwargs, layout: str, rank: int, environment: dict[str, str], folder: Path) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # not the test runner's
    code = 1
    try:
        os.environ.update(environment)
        if world_size(layout) > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        result = function(layout=layout, rank=rank, **kwargs)
        (folder / f"{rank}.pkl").write_bytes(pickle.dumps(result))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(code)  # nothing of the parent's, such as pytest's own handlers, may run in a fork


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
