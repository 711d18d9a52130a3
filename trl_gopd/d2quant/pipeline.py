"""
The block loop: a full-precision model and calibration windows in, a packed model and a report out.

Two streams of hidden states run side by side through the blocks: `full`, what the full-precision model computes, and
`quantized`, what the blocks quantized so far compute. In each block, in order,

    full weights     full stream → inputs of every stage, and the next full stream
                     quantized stream → output of the norm before the MLP, which DAC aims at
    q, k, v; o       inputs on the quantized stream → H, D → round
    DAC              mean deviation of that norm's output → biases of gate and up
    gate, up; down   inputs → H, D → round; the column scale of down → rows of up
    packed           quantized stream → the next quantized stream

A stage is the set of linears that read one tensor; they share H and D. One block's statistics are in memory at a time.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from trl_gopd.d2quant.calibration import calibration_windows
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.correction import Deviation, mean_shift
from trl_gopd.d2quant.grids import Grid
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.rotation import fuse_norms, rotate
from trl_gopd.d2quant.rounding import RoundingResult, round_weight
from trl_gopd.d2quant.topology import Block, Topology, find_topology
from trl_gopd.d2quant.tuning import tune
from trl_gopd.evaluation.resources import return_freed_memory
from trl_gopd.files import written_whole


@dataclass(frozen=True)
class LinearReport:
    """
    What happened to one linear. Errors are `tr(Δ H Δᵀ)/tr(W H Wᵀ)`, the share of the output's energy that is lost.

    Args:
        name (`str`): of the linear in its model.
        grid (`str`), bits (`int`), group_size (`int`): its format.
        nearest_error (`float`, *optional*): of rounding to nearest over the full range; `None` without a Hessian.
        error (`float`, *optional*): of what was stored.
        seconds (`float`): spent on rounding it.
    """

    name: str
    grid: str
    bits: int
    group_size: int
    nearest_error: float | None
    error: float | None
    seconds: float


@dataclass
class Report:
    """
    What a run did.

    Args:
        config (`dict`): the configuration.
        linears (`list[LinearReport]`): one for each quantized linear, in order.
        shift_explained (`dict[str, float]`): per block, the share of the deviation's energy that DAC's mean removed.
        notes (`list[str]`): what was left in full precision or not corrected, and why.
        tuning_kl (`list[float]`): KL to the full-precision model in nats a token, mean of each epoch of the tuning.
        seconds (`float`): of the whole run.
    """

    config: dict[str, Any]
    linears: list[LinearReport] = field(default_factory=list)
    shift_explained: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tuning_kl: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON, or as a figure if `path` ends in .png, .svg or .pdf (needs matplotlib)."""
        path = Path(path)
        with written_whole(path) as part:
            if path.suffix in (".png", ".svg", ".pdf"):
                _draw(self, part)
            else:
                part.write_text(json.dumps(asdict(self), indent=1) + "\n")


@torch.no_grad()
def quantize_model(model: PreTrainedModel, tokenizer: Any = None, config: D2QuantConfig | None = None) -> Report:
    """
    Quantizes the decoder blocks of a model in place: each linear becomes a [`D2QuantLinear`].

    Everything that can be refused is refused before the first weight changes. An error after that leaves the model
    partly quantized; with `config.work_dir`, the finished blocks are kept there, and the same call on a freshly loaded
    model goes on with the next one.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            From `AutoModelForCausalLM` or `AutoModel`, in any float dtype, on any device.
        tokenizer (*optional*):
            Tokenizer, or its folder or name, unless the data are tokens. Overrides `config.tokenizer`.
        config ([`D2QuantConfig`], *optional*):
            How to quantize.

    Returns:
        [`Report`]: errors and seconds of each linear.

    Raises:
        `TypeError`, `ValueError`: if the model, the data or their combination with `config` cannot be used.
    """
    from trl_gopd.d2quant.hf_quantizer import mark_quantized  # which calls this function

    start = time.perf_counter()
    config = D2QuantConfig() if config is None else config
    topology = _check(model, config)
    windows = calibration_windows(
        config.dataset,
        config.tokenizer if tokenizer is None else tokenizer,
        num_samples=config.num_samples,
        seq_length=config.seq_length,
        seed=config.seed,
        vocab_size=model.config.get_text_config().vocab_size,
    )
    work = None if config.work_dir is None else _WorkDir(Path(config.work_dir), _fingerprint(model, windows, config))
    report = Report(config=config.to_dict())
    with _evaluation_mode(model):
        if config.rotation is not None:
            fuse_norms(model, topology)
            rotate(model, topology, size=config.group_size if config.rotation == "group" else None, seed=config.seed)
        run = _Run(model, topology, windows, config, report)
        done = work.load(run, topology) if work else 0
        blocks = topology.blocks[done:]
        for number, block in enumerate(tqdm(blocks, "Quantizing", unit="block", disable=None), start=done + 1):
            run.quantize_block(block)
            return_freed_memory()
            if work:
                work.save(number, block, run)
        _leave_checkpoint(model)
        if config.tune_epochs:
            run.quantized.clear()
            report.tuning_kl = tune(model, topology, run.calls, starts=run.start, full=run.full, config=config)
    mark_quantized(model, config)
    report.notes = _notes(topology, config)
    report.seconds = time.perf_counter() - start
    return report


class _Stop(Exception):
    """Ends a forward pass once what it was run for has been seen."""


class _Run:
    """The streams, and the loop's body. Streams and captured inputs are kept on the CPU, window by window."""

    def __init__(
        self, model: PreTrainedModel, topology: Topology, windows: Tensor, config: D2QuantConfig, report: Report
    ):
        self.model, self.config, self.report = model, config, report
        self.calls = _block_calls(model, topology, windows)
        self.start = [self.calls.first(window) for window in windows]
        self.full = list(self.start)
        self.quantized = list(self.start)
        self.needs_inputs = config.rounding == "gptaq"

    def quantize_block(self, block: Block) -> None:
        config, linears = self.config, _linears(block, self.config)
        heads = [stage[0] for stage in linears]
        shift_at = block.shift_linears if config.mean_shift else ()
        if not all(any(name in stage for stage in linears) for name in shift_at):
            shift_at = ()  # one that stays in full precision has no packed bias to put its share into

        full_inputs: list[dict[str, Tensor]] = []
        targets: list[Tensor] = []
        for index, (full, quantized) in enumerate(zip(self.full, self.quantized, strict=True)):
            captured, self.full[index] = self._forward(block, full, heads if self.needs_inputs else ())
            full_inputs.append(captured)
            if shift_at:
                targets.append(self._forward(block, quantized, shift_at[:1], stop=True)[0][shift_at[0]])

        results: dict[str, RoundingResult] = {}
        biases: dict[str, Tensor] = {}
        input_scales: dict[str, Tensor] = {}
        for stage in linears:
            head = stage[0]
            # tokens of a stage: a router may give an expert's linear none, or others than in full precision
            # They are made one by one as they are used: those of a whole stage would be the run's largest tensors.
            inputs: Iterable[Tensor | None] = (
                self._forward(block, stream, (head,), stop=True)[0].get(head) for stream in self.quantized
            )
            shift = None
            if shift_at and head == shift_at[0]:
                inputs = list(inputs)  # used twice
                shift = self._mean_shift(block, targets, inputs)
            hessian, asymmetry = self._statistics(inputs, (full.pop(head, None) for full in full_inputs), shift)
            for name in stage:
                linear = block.module.get_submodule(name)
                result = self._round(block, name, linear, hessian, asymmetry)
                if shift is not None:
                    biases[name] = result.dequantize() @ shift.to(linear.weight.device)
                if result.column_scale is not None:
                    self._absorb(block, name, result.column_scale, results, input_scales)
                    result = replace(result, column_scale=None)
                results[name] = result
                _set_dense(linear, result, biases.get(name), input_scales.get(name))
        for name, result in results.items():
            _pack(block.module, name, result, input_scales.get(name), self.config)
        for index, stream in enumerate(self.quantized):
            self.quantized[index] = self._forward(block, stream)[1]

    def _forward(
        self, block: Block, stream: Tensor, names: Iterable[str] = (), stop: bool = False
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Inputs `(tokens, features)` of the linears `names`, and the block's output unless it stops at the first."""
        captured: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                rows = args[0].detach().flatten(0, -2)
                captured[name] = torch.cat([captured[name], rows]) if name in captured else rows
                if stop:
                    raise _Stop

            return record

        handles = [block.module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        output = None
        try:
            output = self.calls.run(block, stream).to(stream.device)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: rows.to(stream.device) for name, rows in captured.items()}, output

    def _statistics(
        self, inputs: Iterable[Tensor | None], full_inputs: Iterable[Tensor | None], shift: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """H and D of a stage, float32 on the stage's device; `None` where nothing was seen, or not asked for."""
        if self.config.rounding == "rtn":
            return None, None
        hessian = asymmetry = None
        tokens = 0
        for rows, full in zip(inputs, full_inputs, strict=True):
            if rows is None:
                continue
            rows = rows.float() if shift is None else rows.float() + shift.to(rows.device)
            hessian = rows.T @ rows if hessian is None else hessian.addmm_(rows.T, rows)
            tokens += len(rows)
            if full is not None and full.shape == rows.shape:
                moved = full.float() - rows
                asymmetry = moved.T @ rows if asymmetry is None else asymmetry.addmm_(moved.T, rows)
        if hessian is None:
            return None, None
        return hessian.mul_(2 / tokens), None if asymmetry is None else asymmetry.mul_(2 / tokens)

    def _mean_shift(self, block: Block, targets: list[Tensor], inputs: list[Tensor]) -> Tensor:
        first, *rest = [Deviation.of(target, rows) for target, rows in zip(targets, inputs, strict=True)]
        deviation = sum(rest, first)
        shift = mean_shift(deviation, gate=self.config.shift_gate, shrink=self.config.shift_shrink)
        energy = deviation.squares.sum()
        removed = (2 * shift * deviation.total - shift.square() * deviation.tokens).sum() / energy
        self.report.shift_explained[block.name] = float(removed) if energy > 0 else 0.0
        return shift.float()

    def _round(
        self, block: Block, name: str, linear: nn.Linear, hessian: Tensor | None, asymmetry: Tensor | None
    ) -> RoundingResult:
        config, start = self.config, time.perf_counter()
        full_name = f"{block.name}.{name}"
        if hessian is not None:
            if not hessian.isfinite().all():
                raise ValueError(
                    f"The inputs of `{full_name}` are not finite over the calibration tokens. Does the model give "
                    "finite logits for them, in this dtype? Load it in bfloat16 or float32."
                )
            hessian = hessian.to(linear.weight.device)
            asymmetry = None if asymmetry is None else asymmetry.to(linear.weight.device)
        consumes = name in {pair.consumer for pair in block.scale_pairs} or name in block.scale_reasons
        grid = config.down_grid if consumes and config.down_grid is not None else config.grid
        scale_dtype = getattr(torch, config.scale_dtype)
        options = {"bits": config.bits, "group_size": config.group_size, "scale_dtype": scale_dtype}
        result = round_weight(
            linear.weight,
            hessian,
            asymmetry,
            grid=grid,
            alpha=config.alpha,
            damp_percent=config.damp_percent,
            act_group_aware=config.act_group_aware,
            hessian_weights=config.hessian_weights,
            column_scale=config.column_scale and consumes,
            iterations=config.iterations,
            clip=config.clip,
            **options,
        )
        nearest_error = error = None
        if hessian is not None:
            nearest = round_weight(linear.weight, grid="affine", iterations=0, clip=False, **options)
            nearest_error = _output_error(linear.weight, nearest, hessian)
            error = _output_error(linear.weight, result, hessian)
        self.report.linears.append(
            LinearReport(
                name=full_name,
                grid=grid,
                bits=config.bits,
                group_size=config.group_size,
                nearest_error=nearest_error,
                error=error,
                seconds=time.perf_counter() - start,
            )
        )
        return result

    def _absorb(
        self,
        block: Block,
        consumer: str,
        scale: Tensor,
        results: dict[str, RoundingResult],
        input_scales: dict[str, Tensor],
    ) -> None:
        """Moves the column scale of `consumer` to where its input is made, or to its input."""
        pair = next((pair for pair in block.scale_pairs if pair.consumer == consumer), None)
        if pair is None:
            input_scales[consumer] = scale
            return
        producer = block.module.get_submodule(pair.producer)
        if producer.bias is not None:
            producer.bias.data[pair.rows] *= scale.to(producer.bias)
        if pair.producer not in results:
            producer.weight.data[pair.rows] *= scale.to(producer.weight)[:, None]
            return
        old = results[pair.producer]
        scales = old.weight.scales.clone()
        scales[:, pair.rows] *= scale[:, None]
        scales = scales.to(getattr(torch, self.config.scale_dtype)).to(scales.dtype)
        results[pair.producer] = new = replace(old, weight=replace(old.weight, scales=scales))
        producer.weight.data = new.dequantize().to(producer.weight.dtype)


@dataclass
class BlockCalls:
    """How to run a block, or all of them up to the first, outside the model's own forward pass."""

    model: PreTrainedModel
    first_block: nn.Module
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]

    def first(self, window: Tensor) -> Tensor:
        """Hidden states `(1, tokens, hidden_size)` that enter the first block, on the CPU."""
        seen: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self.first_block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(window[None].to(self.model.device), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return seen[0].detach().cpu()

    def run(self, block: Block, hidden: Tensor) -> Tensor:
        """Output of a block `(1, tokens, hidden_size)`."""
        args, kwargs = self.arguments[block.name]
        output = block.module(hidden.to(_device(block.module)), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _block_calls(model: PreTrainedModel, topology: Topology, windows: Tensor) -> BlockCalls:
    """Masks, positions and the like of each block, seen in one pass. All windows have one length, and so the same."""
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments[name] = (args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"})

        return hook

    handles = [b.module.register_forward_pre_hook(record(b.name), with_kwargs=True) for b in topology.blocks]
    try:
        model.base_model(windows[:1].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return BlockCalls(model, topology.blocks[0].module, arguments)


def _leave_checkpoint(model: nn.Module) -> None:
    """
    Gives what stays dense memory of its own. On a CPU weights are parts of the mapped checkpoint, all of which is in
    memory as long as one of them is.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _linears(block: Block, config: D2QuantConfig) -> list[tuple[str, ...]]:
    """The linears to quantize, stage by stage."""
    stages = [tuple(n for n in stage.linears if not config.skips(f"{block.name}.{n}")) for stage in block.stages]
    return [stage for stage in stages if stage]


def _output_error(weight: Tensor, result: RoundingResult, hessian: Tensor) -> float:
    weight = weight.float()
    difference = result.dequantize() - weight
    energy = float(((weight @ hessian) * weight).sum())
    return float(((difference @ hessian) * difference).sum()) / energy if energy > 0 else 0.0


def _set_dense(
    linear: nn.Linear, result: RoundingResult, shift_bias: Tensor | None, input_scale: Tensor | None
) -> None:
    """Until its block is packed, a linear holds what it will be as a dense weight."""
    dense = result.dequantize() if input_scale is None else result.dequantize() * input_scale
    linear.weight.data = dense.to(linear.weight.dtype)
    if shift_bias is not None:
        bias = shift_bias if linear.bias is None else linear.bias + shift_bias
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)


def _pack(
    block: nn.Module, name: str, result: RoundingResult, input_scale: Tensor | None, config: D2QuantConfig
) -> None:
    linear = block.get_submodule(name)
    packed = D2QuantLinear.from_quantized(
        result.weight,
        bias=None if linear.bias is None else linear.bias.detach(),
        input_scale=input_scale,
        scale_dtype=getattr(torch, config.scale_dtype),
        dtype=linear.weight.dtype,
    )
    _replace(block, name, packed)


def _empty(linear: nn.Linear, config: D2QuantConfig, *, grid: Grid, bias: bool, input_scale: bool) -> D2QuantLinear:
    return D2QuantLinear(
        linear.in_features,
        linear.out_features,
        bits=config.bits,
        group_size=config.group_size,
        grid=grid,
        bias=bias,
        input_scale=input_scale,
        scale_dtype=getattr(torch, config.scale_dtype),
        dtype=linear.weight.dtype,
        device=linear.weight.device,
    )


def _replace(block: nn.Module, name: str, packed: D2QuantLinear) -> None:
    parent, _, child = name.rpartition(".")
    linear = block.get_submodule(name)
    if hasattr(linear, "_hf_hook"):  # by which accelerate moves inputs, and weights, of this very module
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(packed, linear._hf_hook)
    setattr(block.get_submodule(parent), child, packed.train(linear.training))


def _check(model: PreTrainedModel, config: D2QuantConfig) -> Topology:
    """Refuses what cannot be quantized, before anything is changed."""
    if any(isinstance(module, D2QuantLinear) for module in model.modules()) or getattr(model, "is_quantized", False):
        raise ValueError(
            "`model` must be in full precision, and it is quantized already. Load the original, or call "
            "`model.dequantize()` first."
        )
    if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values()):
        raise ValueError(
            "`model` must be in memory, and some of its weights are on the meta device: not loaded, or offloaded. "
            "Load it without `device_map='disk'` and with enough memory."
        )
    topology = find_topology(model)
    linears = [(block, name) for block in topology.blocks for stage in _linears(block, config) for name in stage]
    if not linears:
        raise ValueError(
            f"`modules_to_not_convert` {config.modules_to_not_convert} leaves no linear layer to quantize. Shorten it."
        )
    for block, name in linears:
        linear = block.module.get_submodule(name)
        if config.group_size > linear.in_features:
            raise ValueError(
                f"`group_size` must be at most the width of every quantized linear, got {config.group_size} and "
                f"`{block.name}.{name}` with {linear.in_features} inputs. Use {linear.in_features} or less, or name "
                "it in `modules_to_not_convert`."
            )
        if not linear.weight.isfinite().all():
            raise ValueError(
                f"The weight of `{block.name}.{name}` holds NaN or infinity. Is the checkpoint whole, and in range of "
                f"{linear.weight.dtype}?"
            )
    return topology


def _notes(topology: Topology, config: D2QuantConfig) -> list[str]:
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
    return [f"{line} ({len(names)} blocks, the first {names[0]})" for line, names in lines.items()]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # By name: a reference to a module would keep the dense weights of a replaced linear alive.
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]


def _fingerprint(model: PreTrainedModel, windows: Tensor, config: D2QuantConfig) -> str:
    """Changes with the weights, the calibration tokens and all settings that a block depends on."""
    settings = {name: value for name, value in config.to_dict().items() if not name.startswith("tune_")}
    digest = zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode())
    digest = zlib.crc32(windows.numpy().tobytes(), digest)
    for tensor in model.state_dict().values():
        digest = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), digest)
    return f"{digest:08x}"


class _WorkDir:
    """
    Finished blocks, and the streams after the last of them. A file is written aside and renamed; the streams come
    last, and name the number of blocks that are done.
    """

    STREAMS = "streams.safetensors"

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.fingerprint = path, fingerprint
        path.mkdir(parents=True, exist_ok=True)

    def save(self, done: int, block: Block, run: _Run) -> None:
        """After block number `done` (from 1)."""
        packed = {name: m for name, m in block.module.named_modules() if isinstance(m, D2QuantLinear)}
        layout = {
            name: {"grid": m.grid, "bias": m.bias is not None, "input_scale": m.input_scale is not None}
            for name, m in packed.items()
        }
        linears = [asdict(entry) for entry in run.report.linears if entry.name.startswith(f"{block.name}.")]
        self._write(
            self._block(done),
            {name: tensor.cpu().contiguous() for name, tensor in block.module.state_dict().items()},
            layout=layout,
            linears=linears,
            shift_explained=run.report.shift_explained.get(block.name),
        )
        streams = {"full": torch.cat(run.full), "quantized": torch.cat(run.quantized)}
        self._write(self.STREAMS, streams, done=done)

    def load(self, run: _Run, topology: Topology) -> int:
        """Puts the finished blocks into the model and the streams into the run; returns how many blocks are done."""
        if not (self.path / self.STREAMS).exists():
            return 0
        streams, facts = self._read(self.STREAMS)
        for index, block in enumerate(topology.blocks[: facts["done"]], start=1):
            tensors, block_facts = self._read(self._block(index))
            for name, layout in block_facts["layout"].items():
                _replace(block.module, name, _empty(block.module.get_submodule(name), run.config, **layout))
            block.module.load_state_dict(tensors)
            run.report.linears += [LinearReport(**entry) for entry in block_facts["linears"]]
            if block_facts["shift_explained"] is not None:
                run.report.shift_explained[block.name] = block_facts["shift_explained"]
        run.full = list(streams["full"].split(1))
        run.quantized = list(streams["quantized"].split(1))
        return facts["done"]

    def _block(self, number: int) -> str:
        return f"block-{number:04d}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        metadata = {"run": self.fingerprint, "facts": json.dumps(facts)}
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
        if metadata["run"] != self.fingerprint:
            raise ValueError(
                f"`work_dir` {self.path} belongs to a run with other weights, calibration tokens or settings. Delete "
                "the folder to start anew, or name another one."
            )
        return tensors, json.loads(metadata["facts"])


def _draw(report: Report, path: Path) -> None:
    """Output error of each kind of linear, block by block."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing a report needs matplotlib. Run `pip install matplotlib`.") from error
    kinds: dict[str, list[tuple[float, float]]] = {}
    for entry in report.linears:
        if entry.error is not None and entry.nearest_error is not None:
            kinds.setdefault(entry.name.rpartition(".")[2], []).append((entry.nearest_error, entry.error))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (kind, errors) in enumerate(kinds.items()):
        color = f"C{index}"
        axes.semilogy([after for _, after in errors], color=color, label=kind)
        axes.semilogy([before for before, _ in errors], color=color, linestyle=":", linewidth=1)
    axes.set(xlabel="block", ylabel="share of the output's energy lost")
    axes.set_title(f"{report.config['bits']} bits; dotted: rounding to nearest", fontsize="medium")
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)
