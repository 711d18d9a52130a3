"""
The block loop: a full-precision model and calibration windows in, a packed model and a report out.

Two streams of hidden states run side by side through the blocks: `full`, what the full-precision model computes, and
`quantized`, what the blocks quantized so far compute. What is done in one block stands in `stages`.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from trl_gopd.d2quant.calibration import calibration_windows
from trl_gopd.d2quant.checks import check_model
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.finite import check_finite
from trl_gopd.d2quant.placement import Placement
from trl_gopd.d2quant.recording import evaluation_mode
from trl_gopd.d2quant.refine import refine
from trl_gopd.d2quant.report import Report
from trl_gopd.d2quant.rotation import fuse_norms, rotate
from trl_gopd.d2quant.stages import quantize_block, stage_statistics
from trl_gopd.d2quant.store import Store
from trl_gopd.d2quant.streams import BlockCalls, Streams, check_stream, input_of
from trl_gopd.d2quant.token_matrices import NEAREST_BITS, TokenMatrices, chosen_token_matrices, pack_token_matrices
from trl_gopd.d2quant.topology import Topology
from trl_gopd.d2quant.workdir import WorkDir, fingerprint
from trl_gopd.evaluation.resources import return_freed_memory


logger = logging.get_logger(__name__)


@torch.no_grad()
def quantize_blocks(model: PreTrainedModel, tokenizer: Any, config: D2QuantConfig) -> Report:
    """
    Quantizes a model in place; arguments, errors and result are those of
    [`~trl_gopd.d2quant.quantize.quantize_model`]. What transformers has to know of it is not set yet.
    """
    start = time.perf_counter()
    with ExitStack() as undo:
        topology = check_model(model, config, undo)
        placement = Placement.of(model, topology, config)
        windows = calibration_windows(
            config.dataset,
            config.tokenizer if tokenizer is None else tokenizer,
            num_samples=config.num_samples,
            seq_length=config.seq_length,
            seed=config.seed,
            vocab_size=model.config.get_text_config().vocab_size,
            add_bos_token=config.add_bos_token,
        )
        work = None
        if config.work_dir is not None:
            work = WorkDir(Path(config.work_dir), fingerprint(model, windows, config))
        undo.pop_all()  # from here on, weights change
    _log_full_precision(model, topology)
    report = Report(config=config.to_dict())
    with evaluation_mode(model), placement, Store.open(config) as store:
        if config.rotation is not None:
            # What is not finite is refused before anything changes.
            _run_to_first_block(model, topology, windows, placement, store)
            fuse_norms(model, topology)
            rotate(model, topology, size=config.rotation_size, seed=config.seed)
        calls, streams = _run_to_first_block(model, topology, windows, placement, store)
        # Blocks compensate for what a coarse rounding of embedding and head does. At 8 bits there is nothing to
        # compensate, and they are packed last, so that all else is as with dense ones.
        is_first = config.embedding_bits is not None and config.embedding_bits < NEAREST_BITS
        matrices = TokenMatrices()
        if is_first:
            with placement.each_in_turn():
                matrices = pack_token_matrices(model, config, head_hessian(model, windows, config))
            if matrices.packed:
                streams.restart_quantized(calls, windows)
                return_freed_memory()
        if not config.tune_epochs:
            streams.start.clear()
        finished = work.load(topology, calls, streams, config, placement) if work else []
        for block, block_report in zip(topology.blocks, finished, strict=False):
            report.add(block.name, block_report)
        rest = topology.blocks[len(finished) :]
        for number, block in enumerate(tqdm(rest, "Quantizing", unit="block", disable=None), start=len(finished) + 1):
            with placement.turn(block.module):
                block_report = quantize_block(block, calls, streams, config)
            report.add(block.name, block_report)
            return_freed_memory()
            if work:
                work.save(number, block, block_report, streams)
        detach_from_checkpoint(model)
        if config.tune_epochs:
            streams.quantized.clear()
            with placement.all_blocks():
                report.refinement = refine(
                    model,
                    topology,
                    calls,
                    starts=streams.start,
                    full=streams.full,
                    full_head=matrices.full_head,
                    config=config,
                )
        if not is_first:
            with placement.each_in_turn():
                matrices = pack_token_matrices(model, config)
    check_finite(model.state_dict().items(), "Lower `tune_learning_rate`, or use the `scale_dtype` 'bfloat16'.")
    report.notes = _notes(topology, matrices, config)
    report.seconds = time.perf_counter() - start
    return report


def _run_to_first_block(
    model: PreTrainedModel, topology: Topology, windows: Tensor, placement: Placement, store: Store
) -> tuple[BlockCalls, Streams]:
    """How to run the blocks, and the streams before the first one, which are finite."""
    with placement.each_in_turn():
        calls = BlockCalls.record(model, topology, windows, store)
    streams = Streams.before_first_block(calls, windows)
    check_stream(streams.start, "The hidden states before the first block")
    return calls, streams


@torch.no_grad()
def head_hessian(model: PreTrainedModel, windows: torch.Tensor, config: D2QuantConfig) -> torch.Tensor | None:
    """H of the head over `windows` `(samples, tokens)`, in full precision; `None` where its packing needs none."""
    heads = [module for module in chosen_token_matrices(model, config).values() if isinstance(module, nn.Linear)]
    if not heads or config.rounding == "rtn":
        return None
    inputs = (input_of(model, heads[0], window).flatten(0, -2) for window in windows)
    return stage_statistics(inputs, [None] * len(windows))[0]


def detach_from_checkpoint(model: nn.Module) -> None:
    """
    Copies the parameters that are on a CPU into memory of their own. As loaded, they are parts of the mapped
    checkpoint file, and the whole file stays in memory as long as one of them does.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _log_full_precision(model: PreTrainedModel, topology: Topology) -> None:
    """Logs what stays in full precision though nobody has asked for it, and its share of the blocks' parameters."""
    reasons = {f"{block.name}.{name}": why for block in topology.blocks for name, why in block.full_precision.items()}
    reasons |= topology.full_precision
    if not reasons:
        return
    total = sum(parameter.numel() for parameter in model.get_submodule(topology.blocks_name).parameters())
    share = sum(model.get_parameter(name).numel() for name in reasons) / total
    names: dict[str, dict[str, None]] = {}  # by reason; those of different blocks once
    for name, reason in reasons.items():
        in_block = name.removeprefix(f"{topology.blocks_name}.").partition(".")[2]
        names.setdefault(reason, {})[f"`{in_block}`"] = None
    logger.warning(
        f"{share:.2%} of the parameters of the decoder blocks stay in full precision: "
        + "; ".join(f"{', '.join(of_reason)} ({reason})" for reason, of_reason in names.items())
    )


def _notes(topology: Topology, matrices: TokenMatrices, config: D2QuantConfig) -> list[str]:
    """What was asked for and could not be done, or was left out, one line each."""
    lines: dict[str, list[str]] = {}
    for block in topology.blocks:
        for name, reason in block.full_precision.items():
            lines.setdefault(f"{name} stays in full precision: {reason}", []).append(block.name)
        if config.column_scale:
            for name, reason in block.scale_reasons.items():
                lines.setdefault(f"the column scale of {name} scales its input: {reason}", []).append(block.name)
        if config.mean_shift and not block.shift_linears:
            lines.setdefault(f"no mean shift is corrected: {block.shift_reason}", []).append(block.name)
    for name, reason in topology.full_precision.items():
        block_name, _, in_block = name.removeprefix(f"{topology.blocks_name}.").partition(".")
        line = f"{in_block} stays in full precision: {reason}"
        lines.setdefault(line, []).append(f"{topology.blocks_name}.{block_name}")
    return [
        *(f"{name} stays in full precision: {reason}" for name, reason in matrices.full_precision.items()),
        *(f"{line} ({len(names)} blocks, the first {names[0]})" for line, names in lines.items()),
    ]
