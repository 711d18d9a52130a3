"""
One block: its linears are rounded stage by stage, and then packed.

A stage is the set of linears that read one tensor; they share H and D. In each block, in order,

    full weights     full stream → inputs of every stage, and the next full stream
                     quantized stream → output of the norm before the MLP, which DAC aims at
    q, k, v; o       inputs on the quantized stream → H, D → round
    DAC              mean deviation of that norm's output → biases of gate and up
    gate, up; down   inputs → H, D → round; the column scale of down → rows of up
    experts          inputs of all experts in one pass → H of each → round; all gates and ups, then all downs
    packed           quantized stream → the next quantized stream

One block's statistics are in memory at a time, and one window's inputs, except those of GPTAQ and DAC.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.convert import pack_linear, replace_module
from trl_gopd.d2quant.correction import Deviation, mean_shift
from trl_gopd.d2quant.finite import check_finite, is_finite
from trl_gopd.d2quant.report import BlockReport, LinearReport
from trl_gopd.d2quant.rounding import RoundingResult, round_weight
from trl_gopd.d2quant.streams import BlockCalls, Streams, check_stream
from trl_gopd.d2quant.topology import Block


# Two GiB: 128 experts of 2048 columns.
EXPERT_STATISTICS = 2**31
# Rows of a weight on which its error is measured: of all, the products would cost half as much as the rounding.
REPORTED_ROWS = 256


@dataclass
class RoundedLinears:
    """
    What the linears of a block will hold once they are packed, by their names in the block.

    Args:
        results (`dict[str, RoundingResult]`): codes and group parameters; column scales have been taken out of them.
        input_scales (`dict[str, torch.Tensor]`): column scales that nothing in the block can absorb.
    """

    results: dict[str, RoundingResult] = field(default_factory=dict)
    input_scales: dict[str, Tensor] = field(default_factory=dict)


def quantize_block(block: Block, calls: BlockCalls, streams: Streams, config: D2QuantConfig) -> BlockReport:
    """
    Quantizes a block in place, and moves both streams behind it.

    Args:
        block ([`~trl_gopd.d2quant.topology.Block`]): In full precision; the blocks before it are quantized.
        calls ([`~trl_gopd.d2quant.streams.BlockCalls`]): How to run it.
        streams ([`~trl_gopd.d2quant.streams.Streams`]): What enters it. Changed to what enters the next block.
        config ([`D2QuantConfig`]): How to quantize.

    Returns:
        [`~trl_gopd.d2quant.report.BlockReport`]: errors and seconds of each linear.

    Raises:
        `ValueError`: if a hidden state, the inputs of a linear or a stored number is not finite, or a Hessian is not
        positive definite.
    """
    stages = linears_to_quantize(block, config)
    shifted = _shifted_linears(block, stages, config)
    full_inputs, targets = _run_in_full_precision(block, stages, shifted, calls, streams, config)
    check_stream(streams.full, f"The hidden states behind `{block.name}` in full precision")
    rounded, entries, explained = RoundedLinears(), [], None
    for stage in stages:
        head, device = stage[0], block.linear(stage[0]).weight.device
        if head in block.routed:
            for names in _batches(block, stage):
                hessians = expert_statistics(block, names, calls, streams) if config.rounding != "rtn" else {}
                for name in names:
                    result, entry = _round_linear(block, name, hessians.pop(name, None), None, config)
                    entries.append(entry)
                    _set_rounded(block, name, result, None, rounded, config)
            continue
        # Made window by window as they are used: those of a whole stage would be the run's largest tensors.
        inputs: Iterable[Tensor | None] = (
            calls.of_window(index).capture_input(block, hidden, head) for index, hidden in enumerate(streams.quantized)
        )
        hessian = asymmetry = shift = None
        if head in shifted[:1]:
            inputs = [None if rows is None else calls.store.keep(rows) for rows in inputs]  # used twice
            shift, explained = _correct_deviation((target.to(device) for target in targets), inputs, config)
        if config.rounding != "rtn":
            full = (captured.pop(head, None) for captured in full_inputs)
            hessian, asymmetry = stage_statistics(inputs, full, shift, device)
        for name in stage:
            result, entry = _round_linear(block, name, hessian, asymmetry, config)
            entries.append(entry)
            _set_rounded(block, name, result, shift, rounded, config)
    for name, result in rounded.results.items():
        try:
            packed = pack_linear(block.linear(name), result.weight, config, input_scale=rounded.input_scales.get(name))
        except ValueError as error:
            raise ValueError(f"`{block.name}.{name}` cannot be packed: {error}") from error
        replace_module(block.module, name, packed)
    tensors = ((f"{block.name}.{name}", tensor) for name, tensor in block.module.state_dict().items())
    check_finite(tensors, "Load the model in bfloat16 or float32.")
    calls.move(block, streams.quantized)
    check_stream(streams.quantized, f"The hidden states behind the quantized `{block.name}`")
    return BlockReport(entries, explained)


def linears_to_quantize(block: Block, config: D2QuantConfig) -> list[tuple[str, ...]]:
    """Names of the linears of `block` that `config` does not exclude, stage by stage, in order of execution."""
    stages = [tuple(n for n in stage.linears if not config.skips(f"{block.name}.{n}")) for stage in block.stages]
    return [stage for stage in stages if stage]


def stage_statistics(
    inputs: Iterable[Tensor | None],
    full_inputs: Iterable[Tensor | None],
    shift: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """
    `H = 2/n Σ x xᵀ` and `D = 2/n Σ (x̃ − x) xᵀ` of the linears that read one tensor.

    A router may send none of a window's tokens to an expert, or others than in full precision. Windows without tokens
    are left out, and those whose tokens differ in number contribute to H only, though they count in the n of both.

    Args:
        inputs (`Iterable[torch.Tensor | None]`):
            For each window x, `(tokens, in_features)`: what the linears read behind quantized linears.
        full_inputs (`Iterable[torch.Tensor | None]`):
            For each window x̃, of the same tokens: what they read in the full-precision model. `None` for GPTQ.
        shift (`torch.Tensor`, *optional*):
            float32 `(in_features,)`, DAC's mean, which is added to each x before anything else.
        device (`torch.device`, *optional*):
            Where the sums are made, a window at a time. That of each input by default.

    Returns:
        `tuple[torch.Tensor | None, torch.Tensor | None]`: H and D, float32 `(in_features, in_features)` on `device`;
        `None` where there was nothing to sum.
    """
    hessian = asymmetry = None
    tokens = 0
    for rows, full in zip(inputs, full_inputs, strict=True):
        if rows is None:
            continue
        rows = rows.to(device or rows.device, torch.float32)
        rows = rows if shift is None else rows + shift.to(rows.device)
        hessian = rows.T @ rows if hessian is None else hessian.addmm_(rows.T, rows)
        tokens += len(rows)
        if full is not None and full.shape == rows.shape:
            moved = full.to(rows) - rows
            asymmetry = moved.T @ rows if asymmetry is None else asymmetry.addmm_(moved.T, rows)
    if hessian is None:
        return None, None
    return hessian.mul_(2 / tokens), None if asymmetry is None else asymmetry.mul_(2 / tokens)


def expert_statistics(
    block: Block, names: tuple[str, ...], calls: BlockCalls, streams: Streams
) -> dict[str, Tensor | None]:
    """
    `H = 2/n Σ x xᵀ` of linears of experts, over the tokens that the router sends them, and the mean of all of them in
    place of `in_features` tokens more:

        H_e = (n_e Ĥ_e + in_features H̄) / (n_e + in_features),   H̄ = Σ n_e Ĥ_e / Σ n_e

    An expert that few tokens reach then has an H that can be inverted, and one that none reaches has the mean. There
    is no D: which tokens an expert gets differs between the streams.

    Args:
        block ([`~trl_gopd.d2quant.topology.Block`]): The block, attention and earlier stages rounded.
        names (`tuple[str, ...]`): One linear of each expert, all of one width.
        calls ([`BlockCalls`]), streams ([`Streams`]): How to run the block, and what enters it.

    Returns:
        `dict[str, torch.Tensor | None]`: float32 `(in_features, in_features)` for each name; `None` if no token
        reaches any of the experts.
    """
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(names, 0)
    for index, hidden in enumerate(streams.quantized):
        captured, _ = calls.of_window(index).run_and_capture(block, hidden, list(names))
        for name, rows in captured.items():
            rows = rows.to(block.linear(name).weight.device, torch.float32)
            sums[name] = rows.T @ rows if name not in sums else sums[name].addmm_(rows.T, rows)
            tokens[name] += len(rows)
    if not sum(tokens.values()):
        return dict.fromkeys(names)
    width = block.linear(names[0]).in_features
    mean = torch.stack(list(sums.values())).sum(0) / sum(tokens.values())
    return {n: (sums.get(n, 0) + width * mean).mul_(2 / (tokens[n] + width)) for n in names}


def _batches(block: Block, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Parts of a stage of experts whose statistics are in memory together, `EXPERT_STATISTICS` bytes of them."""
    size = max(1, EXPERT_STATISTICS // (4 * block.linear(names[0]).in_features ** 2))
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _shifted_linears(block: Block, stages: list[tuple[str, ...]], config: D2QuantConfig) -> tuple[str, ...]:
    """Linears whose biases take DAC's mean shift. None, if one of them stays dense: it has no packed bias for it."""
    quantized = {name for stage in stages for name in stage}
    return block.shift_linears if config.mean_shift and quantized.issuperset(block.shift_linears) else ()


def _run_in_full_precision(
    block: Block,
    stages: list[tuple[str, ...]],
    shifted: tuple[str, ...],
    calls: BlockCalls,
    streams: Streams,
    config: D2QuantConfig,
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """
    Moves the full stream behind the block. Returns, for each window, the inputs of each stage by its first linear,
    with which GPTAQ compares, and the norm's output for the quantized stream while attention is still in full
    precision, at which DAC aims.
    """
    heads = [stage[0] for stage in stages if stage[0] not in block.routed] if config.rounding == "gptaq" else []
    full_inputs, targets = [], []
    for index, (full, quantized) in enumerate(zip(streams.full, streams.quantized, strict=True)):
        captured, streams.full[index] = calls.of_window(index).run_and_capture(block, full, heads)
        full_inputs.append(captured)
        for name in shifted[:1]:
            target = calls.of_window(index).capture_input(block, quantized, name)
            assert target is not None  # it was found by its being called
            targets.append(calls.store.keep(target))
    return full_inputs, targets


def _correct_deviation(
    targets: Iterable[Tensor], inputs: list[Tensor | None], config: D2QuantConfig
) -> tuple[Tensor, float]:
    """DAC's mean shift, float32 `(hidden_size,)`, and the share of the deviation's energy that it removes."""
    first, *rest = [
        Deviation.of(target, rows.to(target.device))
        for target, rows in zip(targets, inputs, strict=True)
        if rows is not None
    ]
    deviation = sum(rest, first)
    shift = mean_shift(deviation, gate=config.shift_gate, shrink=config.shift_shrink)
    energy = deviation.squares.sum()
    removed = (2 * shift * deviation.total - shift.square() * deviation.tokens).sum() / energy
    return shift.float(), float(removed) if energy > 0 else 0.0


def _round_linear(
    block: Block, name: str, hessian: Tensor | None, asymmetry: Tensor | None, config: D2QuantConfig
) -> tuple[RoundingResult, LinearReport]:
    """Rounds one linear, which stays as it is."""
    start, full_name, weight = time.perf_counter(), f"{block.name}.{name}", block.linear(name).weight
    if hessian is not None:
        if not is_finite(hessian) or asymmetry is not None and not is_finite(asymmetry):
            raise ValueError(
                f"The inputs of `{full_name}` are not finite over the calibration tokens. Does the model give "
                "finite logits for them, in this dtype? Load it in bfloat16 or float32."
            )
    is_second = name in {pair.consumer for pair in block.scale_pairs} or name in block.scale_reasons
    grid = config.down_grid if is_second and config.down_grid is not None else config.grid
    bits, group_size, scale_dtype = config.bits, config.group_size_of(weight.shape[1]), config.torch_scale_dtype
    result = round_weight(
        weight,
        hessian,
        asymmetry,
        bits=bits,
        group_size=group_size,
        grid=grid,
        alpha=config.alpha,
        damp_percent=config.damp_percent,
        act_group_aware=config.act_group_aware,
        hessian_weights=config.hessian_weights,
        column_scale=config.column_scale and is_second,
        iterations=config.iterations,
        clip=config.clip,
        scale_dtype=scale_dtype,
    )
    nearest_error = error = None
    if hessian is not None and config.report_errors:
        rows = slice(None, None, -(-len(weight) // REPORTED_ROWS))
        sample = weight[rows]
        nearest = round_weight(
            sample, bits=bits, group_size=group_size, grid="affine", iterations=0, clip=False, scale_dtype=scale_dtype
        )
        nearest_error = output_error(sample, nearest.dequantize(), hessian)
        error = output_error(sample, result.dequantize()[rows], hessian)
    seconds = time.perf_counter() - start
    return result, LinearReport(full_name, grid, bits, group_size, nearest_error, error, seconds)


def output_error(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> float:
    """`tr(Δ H Δᵀ)/tr(W H Wᵀ)`, the share of the output's energy that is lost; 0 where there is no energy."""
    weight = weight.float()
    difference = dequantized - weight
    energy = float(((weight @ hessian) * weight).sum())
    return float(((difference @ hessian) * difference).sum()) / energy if energy > 0 else 0.0


def _set_rounded(
    block: Block,
    name: str,
    result: RoundingResult,
    shift: Tensor | None,
    rounded: RoundedLinears,
    config: D2QuantConfig,
) -> None:
    """Until its block is packed, a linear holds what it will be as a dense weight, and the bias it will have."""
    linear = block.linear(name)
    dtype = linear.weight.dtype
    shift_bias = None if shift is None else result.dequantize() @ shift.to(linear.weight.device)
    if result.column_scale is not None:
        absorb_column_scale(block, name, result.column_scale, rounded, config)
        result = replace(result, column_scale=None)
    rounded.results[name] = result
    input_scale = rounded.input_scales.get(name)
    dense = result.dequantize() if input_scale is None else result.dequantize() * input_scale
    linear.weight.data = dense.to(dtype)
    if shift_bias is not None:
        bias = shift_bias if linear.bias is None else linear.bias + shift_bias
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def absorb_column_scale(
    block: Block, consumer: str, scale: Tensor, rounded: RoundedLinears, config: D2QuantConfig
) -> None:
    """
    Moves the column scale of `consumer` to the linear that makes its input: to the scales of its groups where that
    linear is rounded, to its rows where it stays dense. Without such a linear it becomes a scale of the inputs.

    Args:
        block ([`~trl_gopd.d2quant.topology.Block`]): The block; the producer's weight and bias change.
        consumer (`str`): Name of the linear in the block.
        scale (`torch.Tensor`): float32 `(in_features,)`.
        rounded ([`RoundedLinears`]): Changed in place.
        config ([`D2QuantConfig`]): Dtype in which scales are stored.
    """
    pair = next((pair for pair in block.scale_pairs if pair.consumer == consumer), None)
    if pair is None:
        rounded.input_scales[consumer] = scale
        return
    producer = block.linear(pair.producer)
    if producer.bias is not None:
        producer.bias.data[pair.rows] *= scale.to(producer.bias)
    if pair.producer not in rounded.results:
        producer.weight.data[pair.rows] *= scale.to(producer.weight)[:, None]
        return
    old = rounded.results[pair.producer]
    scales = old.weight.scales.clone()
    scales[:, pair.rows] *= scale[:, None]
    scales = scales.to(config.torch_scale_dtype).to(scales.dtype)
    rounded.results[pair.producer] = new = replace(old, weight=replace(old.weight, scales=scales))
    producer.weight.data = new.dequantize().to(producer.weight.dtype)
