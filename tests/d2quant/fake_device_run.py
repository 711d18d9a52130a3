"""Quantizes tiny models on a fake device, in a process of its own. Prints what it saw as JSON."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from tests import fake_device
from tests.tiny import build_model, build_tokenizer
from trl_gopd.d2quant import stages
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model


TOKENS = torch.randint(0, 200, (3, 16), generator=torch.Generator().manual_seed(0))
SETTINGS = {"bits": 2, "group_size": 16, "iterations": 1, "clip": False, "dataset": TOKENS, "num_samples": 3}
RUNS: dict[str, dict] = {
    "default": {"tune_epochs": 1},
    "paper": {"mean_shift": True, "column_scale": True, "rotation": "full", "tune_epochs": 0},
    "disk": {"offload": "disk", "mean_shift": True, "tune_epochs": 0},
}
round_weight = stages.round_weight


def watch(model) -> dict:
    """Notes, whenever a dense linear of a block runs or is rounded, where it is, and what else is there."""
    seen = {"blocks_at_a_time": 0, "ran_there": 0, "rounded_there": 0, "rounded_elsewhere": 0, "last_block_stayed": []}
    blocks = list(model.model.layers)
    waiting = {parameter.data_ptr() for parameter in blocks[-1].parameters()}

    def is_there(tensor: torch.Tensor) -> bool:
        return tensor.device.type == fake_device.NAME

    def note(name: str) -> None:
        seen[name] += 1
        there = sum(any(map(is_there, block.parameters())) for block in blocks)
        seen["blocks_at_a_time"] = max(seen["blocks_at_a_time"], there)

    def rounding(weight, *args, **kwargs):
        note("rounded_there" if is_there(weight) else "rounded_elsewhere")
        assert all(arg is None or arg.device == weight.device for arg in args)
        if len(seen["last_block_stayed"]) < 1:
            seen["last_block_stayed"].append(waiting == {p.data_ptr() for p in blocks[-1].parameters()})
        return round_weight(weight, *args, **kwargs)

    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda m, args: note("ran_there") if is_there(m.weight) else None)
    stages.round_weight = rounding
    return seen


def run(settings: dict, folder: Path) -> dict:
    """One run on the CPU, and one on the device."""
    settings = {**SETTINGS, "seq_length": TOKENS.shape[1], "work_dir": str(folder), **settings}
    expected = quantize_model(build_model(TOKENIZER, seed=1), None, D2QuantConfig(**settings | {"work_dir": None}))
    model = build_model(TOKENIZER, seed=1)
    seen = watch(model)
    config = D2QuantConfig(**settings, device=fake_device.NAME)
    report = quantize_model(model, None, config)
    stages.round_weight = round_weight
    resumed = build_model(TOKENIZER, seed=1)
    if config.tune_epochs:  # from the blocks in `work_dir`, which are run again over the streams
        next(folder.glob("*/streams.safetensors")).unlink()
        quantize_model(resumed, None, config)
    state, again = model.state_dict(), resumed.state_dict()
    return seen | {
        "places": sorted({tensor.device.type for tensor in state.values()}),
        "packed": sum(isinstance(module, D2QuantLinear) for module in model.modules()),
        "errors": [entry.error for entry in report.linears],
        "expected_errors": [entry.error for entry in expected.linears],
        "tuning_kl": report.tuning_kl,
        "expected_tuning_kl": expected.tuning_kl,
        "resumed_is_same": all(torch.equal(value, again[key]) for key, value in state.items() if key in again),
        "left": sorted(path.name for path in folder.iterdir() if not path.is_dir() or not any(path.iterdir())),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    TOKENIZER = build_tokenizer()
    fake_device.install()
    with tempfile.TemporaryDirectory() as folder:
        json.dump({name: run(settings, Path(folder, name)) for name, settings in RUNS.items()}, sys.stdout)
