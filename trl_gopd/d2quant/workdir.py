"""The work folder of a run: finished blocks, and the streams behind the last of them, to go on from."""

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.convert import empty_packed, replace_linear
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.report import BlockReport, LinearReport
from trl_gopd.d2quant.streams import Streams
from trl_gopd.d2quant.topology import Block, Topology
from trl_gopd.files import written_whole


STREAMS = "streams.safetensors"


def fingerprint(model: PreTrainedModel, windows: Tensor, config: D2QuantConfig) -> str:
    """Eight hexadecimal digits that change with the weights, the calibration tokens and what a block depends on."""
    settings = {name: value for name, value in config.to_dict().items() if not name.startswith("tune_")}
    digest = zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode())
    digest = zlib.crc32(windows.numpy().tobytes(), digest)
    for tensor in model.state_dict().values():
        digest = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), digest)
    return f"{digest:08x}"


class WorkDir:
    """
    A folder with one file for each finished block, and one for the streams. A file is written under another name and
    then renamed. The streams are written last, and state how many blocks are done.

    Args:
        path (`pathlib.Path`): The folder; it is made if it is not there.
        run (`str`): [`fingerprint`] of the run, which every file must carry.
    """

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run
        path.mkdir(parents=True, exist_ok=True)

    def save(self, done: int, block: Block, block_report: BlockReport, streams: Streams) -> None:
        """Saves block number `done` (from 1), and the streams behind it."""
        packed = {name: m for name, m in block.module.named_modules() if isinstance(m, D2QuantLinear)}
        layout = {
            name: {"grid": m.grid, "bias": m.bias is not None, "input_scale": m.input_scale is not None}
            for name, m in packed.items()
        }
        self._write(
            self._block(done),
            {name: tensor.cpu().contiguous() for name, tensor in block.module.state_dict().items()},
            layout=layout,
            linears=[asdict(entry) for entry in block_report.linears],
            shift_explained=block_report.shift_explained,
        )
        self._write(STREAMS, {"full": torch.cat(streams.full), "quantized": torch.cat(streams.quantized)}, done=done)

    def load(self, topology: Topology, streams: Streams, config: D2QuantConfig) -> list[BlockReport]:
        """Puts finished blocks into the model and the streams behind them into `streams`. Returns their reports."""
        if not (self.path / STREAMS).exists():
            return []
        tensors, facts = self._read(STREAMS)
        reports = [
            self._load_block(number, block, config)
            for number, block in enumerate(topology.blocks[: facts["done"]], start=1)
        ]
        streams.full = list(torch.split(tensors["full"], 1))
        streams.quantized = list(torch.split(tensors["quantized"], 1))
        return reports

    def _load_block(self, number: int, block: Block, config: D2QuantConfig) -> BlockReport:
        tensors, facts = self._read(self._block(number))
        for name, layout in facts["layout"].items():
            replace_linear(block.module, name, empty_packed(block.linear(name), config, **layout))
        block.module.load_state_dict(tensors)
        return BlockReport([LinearReport(**entry) for entry in facts["linears"]], facts["shift_explained"])

    def _block(self, number: int) -> str:
        return f"block-{number:04d}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        metadata = {"run": self.run, "facts": json.dumps(facts)}
        with written_whole(self.path / name) as part:
            save_file(tensors, part, metadata=metadata)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"`work_dir` {self.path} holds {name}, which cannot be read ({error}). Delete the folder to start "
                "anew."
            ) from error
        if metadata["run"] != self.run:
            raise ValueError(
                f"`work_dir` {self.path} belongs to a run with other weights, calibration tokens or settings. Delete "
                "the folder to start anew, or name another one."
            )
        return tensors, json.loads(metadata["facts"])
