"""The work folder of a run: finished blocks, and the streams behind the last of them, to go on from."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

import trl_gopd
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.convert import empty_packed, replace_module
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.placement import Placement
from trl_gopd.d2quant.report import BlockReport, LinearReport
from trl_gopd.d2quant.store import Store
from trl_gopd.d2quant.streams import BlockCalls, Streams
from trl_gopd.d2quant.topology import Block, Topology
from trl_gopd.digests import config_digest, parameters_digest
from trl_gopd.files import written_whole


STREAMS = "streams.safetensors"

logger = logging.get_logger(__name__)


def fingerprint(model: PreTrainedModel, windows: Tensor, config: D2QuantConfig) -> str:
    """
    Checksum, in 32 hexadecimal digits, of what a finished block depends on: weights and configuration of the model,
    calibration tokens, settings, and the version of this package.
    """
    weights = parameters_digest(model.state_dict())
    if weights is None:
        raise ValueError("`work_dir` needs all weights in this process, and some are elsewhere. Leave it out.")
    settings = {name: value for name, value in config.to_dict().items() if not name.startswith("tune_")}
    parts = {
        "version": trl_gopd.__version__,
        "settings": settings,
        "model": config_digest(model.config),
        "weights": weights,
        "windows": parameters_digest({"windows": windows}),
    }
    return xxhash.xxh3_128(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class WorkDir:
    """
    A folder with one file for each finished block, and one for the streams, each written whole. The streams are
    written last, and state how many blocks they are behind.

    Each file has a checksum over its content, its name and the run, so that one that is damaged or comes from
    elsewhere is not taken for what this run wrote there.

    Args:
        path (`pathlib.Path`): The user's folder, in which each run has a folder of its own. Made if it is not there.
        run (`str`): [`fingerprint`] of the run.
    """

    def __init__(self, path: Path, run: str):
        self.path, self.run = path / run, run
        self.path.mkdir(parents=True, exist_ok=True)

    def save(self, done: int, block: Block, block_report: BlockReport, streams: Streams) -> None:
        """Saves block number `done` (from 1), and the streams behind it."""
        packed = {name: m for name, m in block.module.named_modules() if isinstance(m, D2QuantLinear)}
        layout = {
            name: {"grid": m.grid, "bias": m.bias is not None, "input_scale": m.input_scale is not None}
            for name, m in packed.items()
        }
        self._write(
            _file_of(done),
            {name: tensor.cpu().contiguous() for name, tensor in block.module.state_dict().items()},
            layout=layout,
            linears=[asdict(entry) for entry in block_report.linears],
            shift_explained=block_report.shift_explained,
        )
        self._save_streams(done, streams)

    def load(
        self, topology: Topology, calls: BlockCalls, streams: Streams, config: D2QuantConfig, placement: Placement
    ) -> list[BlockReport]:
        """
        Puts the finished blocks that are whole into the model, up to the first that is not, and moves `streams` behind
        them. Where no whole file has these streams, the blocks are run again, and it is written. Returns the blocks'
        reports.
        """
        finished = self._count_finished(len(topology.blocks))
        start = self._load_streams(streams, finished, calls.store) if finished else 0
        reports = []
        for number, block in enumerate(topology.blocks[:finished], start=1):
            if number <= start:
                reports.append(self._load_block(number, block, config))
                continue
            with placement.turn(block.module):
                calls.move(block, streams.full)
                reports.append(self._load_block(number, block, config))
                calls.move(block, streams.quantized)
        if start < finished:
            self._save_streams(finished, streams)
        return reports

    def _count_finished(self, count: int) -> int:
        """Number of blocks before the first whose file is missing or not whole."""
        for number in range(1, count + 1):
            try:
                self._read(_file_of(number))
            except _NotWhole as error:
                if any((self.path / _file_of(later)).exists() for later in range(number, count + 1)):
                    logger.warning(f"{error} Block {number} of {count} and those after it are quantized again.")
                return number - 1
        return count

    def _save_streams(self, done: int, streams: Streams) -> None:
        self._write(STREAMS, {"full": torch.cat(streams.full), "quantized": torch.cat(streams.quantized)}, done=done)

    def _load_streams(self, streams: Streams, finished: int, store: Store) -> int:
        """Loads the streams behind at most `finished` blocks. Returns behind how many; 0 leaves `streams` alone."""
        try:
            tensors, facts = self._read(STREAMS)
        except _NotWhole as error:
            logger.warning(
                f"{error} Finished blocks are run again over the calibration tokens, up to number {finished}."
            )
            return 0
        if facts["done"] > finished:
            return 0
        streams.full = [store.keep(hidden) for hidden in torch.split(tensors["full"], 1)]
        streams.quantized = [store.keep(hidden) for hidden in torch.split(tensors["quantized"], 1)]
        return int(facts["done"])

    def _load_block(self, number: int, block: Block, config: D2QuantConfig) -> BlockReport:
        tensors, facts = self._read(_file_of(number))
        for name, layout in facts["layout"].items():
            replace_module(block.module, name, empty_packed(block.linear(name), config, **layout))
        block.module.load_state_dict(tensors)
        return BlockReport([LinearReport(**entry) for entry in facts["linears"]], facts["shift_explained"])

    def _write(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        text = json.dumps(facts)
        with written_whole(self.path / name) as part:
            save_file(tensors, part, metadata={"facts": text, "checksum": self._checksum(name, tensors, text)})

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            raise _NotWhole(f"`work_dir` lacks {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except Exception as error:  # whatever the reader makes of a damaged file
            raise _NotWhole(f"`work_dir` holds {path}, which cannot be read ({error}).") from error
        facts = metadata.get("facts", "")
        if metadata.get("checksum") != self._checksum(name, tensors, facts):
            raise _NotWhole(f"`work_dir` holds {path}, which is not what this run wrote there: its checksum differs.")
        return tensors, json.loads(facts)

    def _checksum(self, name: str, tensors: dict[str, Tensor], facts: str) -> str:
        text = f"{self.run}/{name} {parameters_digest(tensors)} {facts}"
        return xxhash.xxh3_128(text.encode()).hexdigest()


class _NotWhole(ValueError):
    """A file is missing, damaged, or another than the one that was written there. Its text says so."""


def _file_of(number: int) -> str:
    return f"block-{number:04d}.safetensors"
