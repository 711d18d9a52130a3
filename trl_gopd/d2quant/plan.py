"""
What a run of the quantizer will need and take, computed from a model's configuration. No weight is loaded.

The linears of each block are found in a pass of torch's fake tensors, which have shapes and no numbers. For each phase
of the run, the tensors that are alive when it is at its largest are counted; `docs/large_models.md` has the formulas.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.convert import empty_packed
from trl_gopd.d2quant.rounding import LAZY_COLUMNS
from trl_gopd.d2quant.token_matrices import chosen_token_matrices, empty_token_matrix
from trl_gopd.d2quant.topology import find_blocks
from trl_gopd.evaluation.logits import tokens_per_chunk


FLOAT = 4  # bytes of a float32
# Fitting a codebook passes over its group for each clipped range that is tried, of which half are usually left out,
# and for each alternation: so many operations on each weight, each as long as so many of a product of matrices.
SEARCH_OPERATIONS, ALTERNATION_OPERATIONS, PRODUCTS_PER_OPERATION = 40 * 6, 12, 50
# Tensors of the size of a group that the fit holds, and of a chunk of logits that the loss and its gradient hold.
GROUP_TENSORS, LOGITS_TENSORS = 14, 6
# float32 numbers for each trained parameter: itself, its gradient twice, its master copy, and two moments of Adam.
NUMBERS_PER_TRAINED = 6


@dataclass(frozen=True)
class Phase:
    """
    A part of the run, with what is in memory while it is at its largest.

    Args:
        name (`str`): what is done.
        device (`dict[str, int]`): bytes on the device that computes, by what they are.
        host (`dict[str, int]`): bytes in CPU memory that cannot be dropped.
        disk (`dict[str, int]`): bytes in files of the run.
        flops (`float`): floating-point operations of all its repetitions.
        in_float32 (`bool`): whether they are in float32, rather than in the dtype of the model.
    """

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]
    disk: Mapping[str, int]
    flops: float
    in_float32: bool = False


@dataclass(frozen=True)
class Plan:
    """
    What a run will need. On a CPU, `device_bytes` are part of `host_bytes`.

    Args:
        device (`str`): where blocks are computed.
        dtype (`str`): of the dense model, such as `"bfloat16"`.
        phases (`tuple[Phase, ...]`): in the order in which they come, those of a block once.
        model_bytes (`int`): of the dense model.
        mapped_bytes (`int`):
            Of them, those in files that are mapped into memory. The system drops and reads them again as it likes, and
            counts those that it holds as part of the process.
        packed_bytes (`int`): of the quantized model, and so of the folder it is saved to.
    """

    device: str
    dtype: str
    phases: tuple[Phase, ...]
    model_bytes: int
    mapped_bytes: int
    packed_bytes: int

    @property
    def device_bytes(self) -> int:
        """Largest memory of the device that computes, in bytes."""
        return max(sum(phase.device.values()) for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """Largest CPU memory that cannot be dropped, in bytes."""
        shared = torch.device(self.device).type == "cpu"
        return max(sum(phase.host.values()) + (sum(phase.device.values()) if shared else 0) for phase in self.phases)

    @property
    def disk_bytes(self) -> int:
        """Largest size of the run's own files, in bytes, without `work_dir` and what it saves."""
        return max(sum(phase.disk.values()) for phase in self.phases)

    @property
    def flops(self) -> float:
        """Floating-point operations of the run."""
        return sum(phase.flops for phase in self.phases)

    def seconds(self, flops_per_second: float, float32_flops_per_second: float | None = None) -> float:
        """
        How long the run takes, within a factor of two or so.

        Args:
            flops_per_second (`float`): Speed of the device in products of matrices, in the dtype of the model.
            float32_flops_per_second (`float`, *optional*): The same in float32; by default it is equal.
        """
        slow = sum(phase.flops for phase in self.phases if phase.in_float32)
        return (self.flops - slow) / flops_per_second + slow / (float32_flops_per_second or flops_per_second)

    def lines(self) -> list[str]:
        """The plan as text: a line for each phase, and the sums."""
        on_cpu = torch.device(self.device).type == "cpu"
        text = [f"{'phase':<34}{'on ' + self.device:>14}{'CPU memory':>14}{'files':>14}{'TFLOP':>12}"]
        for phase in self.phases:
            sizes = [_gib(sum(part.values())) for part in (phase.device, phase.host, phase.disk)]
            text.append(
                f"{phase.name:<34}" + "".join(f"{size:>14}" for size in sizes) + f"{phase.flops / 1e12:>12.4g}"
            )
        needs = [] if on_cpu else [f"{_gib(self.device_bytes)} on {self.device}"]
        needs += [f"{_gib(self.host_bytes)} of CPU memory", f"{_gib(self.disk_bytes)} of temporary files"]
        text.append(
            f"Needed at most: {', '.join(needs)}. {_gib(self.mapped_bytes)} of the model's {_gib(self.model_bytes)} "
            f"stay in its files. The quantized model has {_gib(self.packed_bytes)}."
        )
        return text


def plan(
    model: PreTrainedModel | PreTrainedConfig,
    config: D2QuantConfig,
    *,
    loaded_on: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Plan:
    """
    What quantizing a model will need and take.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~transformers.PreTrainedConfig`]):
            The model, or its configuration. Of a model, only the configuration, the class and the dtype are used.
        config ([`D2QuantConfig`]):
            How it is to be quantized.
        loaded_on (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where `from_pretrained` loads it. On a CPU, its weights stay in the checkpoint's files until they are used,
            if `dtype` is that of the files.
        dtype (`torch.dtype`, *optional*):
            Of the weights; by default that of the model, or what its configuration says.

    Returns:
        [`Plan`]: memory in bytes, and floating-point operations.

    Raises:
        `TypeError`, `ValueError`: if the model has no blocks that can be quantized.
    """
    if not isinstance(model, (PreTrainedModel, PreTrainedConfig)):
        raise TypeError(
            f"`model` must be a `PreTrainedModel` or a `PreTrainedConfig`, got {type(model).__name__}. Load one with "
            "`AutoConfig.from_pretrained`."
        )
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = _without_numbers(model, dtype)
        run = _Run.of(fake, config, torch.device(loaded_on))
        phases = [*run.rotation(), *_merged(phase for block in run.blocks for phase in run.block_phases(block))]
        phases += [*run.tuning(), run.end()]
    return Plan(
        device=str(run.device),
        dtype=str(fake.dtype).removeprefix("torch."),
        phases=tuple(phases),
        model_bytes=run.model_bytes,
        mapped_bytes=run.model_bytes if run.is_mapped else 0,
        packed_bytes=run.end_bytes,
    )


@dataclass(frozen=True)
class _Block:
    """
    A block in shapes.

    Args:
        stages (`dict[str, list[tuple[int, int]]]`):
            `(out_features, in_features)` of the linears that read one tensor, by the name of the first.
        dense (`int`), packed (`int`): bytes of its parameters before and after.
        trained (`int`): number of its parameters that are tuned.
        weights (`int`): number of weights of its linears.
    """

    stages: Mapping[str, list[tuple[int, int]]]
    dense: int
    packed: int
    trained: int
    weights: int


@dataclass(frozen=True)
class _Run:
    """A run in shapes. Bytes, but for `tokens` in all windows, `length` of one, `hidden_size` and `vocab_size`."""

    config: D2QuantConfig
    blocks: list[_Block]
    outside: int
    matrices: tuple[int, int]  # embedding and head as far as they are packed, before and after
    number: int
    hidden_size: int
    vocab_size: int
    device: torch.device
    loaded_on: torch.device

    @classmethod
    def of(cls, model: PreTrainedModel, config: D2QuantConfig, loaded_on: torch.device) -> "_Run":
        name, modules = find_blocks(model)
        inside = {id(parameter) for parameter in modules.parameters()}
        outside = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
        embeddings = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        if config.rotation is not None and head is not None and head.weight is embeddings:
            outside += head.weight.nbytes  # it is untied
        reads = _reads(model, modules)
        return cls(
            config=config,
            blocks=[_describe(block, f"{name}.{index}", reads, config) for index, block in enumerate(modules)],
            outside=outside,
            matrices=_token_matrix_bytes(model, config),
            number=embeddings.element_size(),
            hidden_size=embeddings.shape[1],
            vocab_size=0 if head is None else head.weight.shape[0],
            device=loaded_on if config.device is None else torch.device(config.device),
            loaded_on=loaded_on,
        )

    @property
    def tokens(self) -> int:
        return self.config.num_samples * self.config.seq_length

    @property
    def model_bytes(self) -> int:
        return self.outside + sum(block.dense for block in self.blocks)

    @property
    def packed(self) -> int:
        """What is packed while blocks are: the dense head makes the targets of the refinement until its end."""
        return sum(block.packed for block in self.blocks) + self.matrices[1]

    @property
    def end_bytes(self) -> int:
        return self.packed + self.outside - self.matrices[0]

    @property
    def is_mapped(self) -> bool:
        """Whether dense weights stay in the files of the checkpoint; rotating them writes to them."""
        return self.loaded_on.type == "cpu" and self.config.rotation is None

    @property
    def blocks_come(self) -> bool:
        """Whether blocks wait in CPU memory and come to another device."""
        return self.device.type != "cpu" and (self.loaded_on.type == "cpu" or self.config.offload is not None)

    def phase(
        self, name: str, device: Mapping[str, int], kept: Mapping[str, int], *, streams: int, flops: float
    ) -> Phase:
        """A phase with what is there throughout. `kept` waits where the hidden states do, as they do."""
        on_device, on_host = dict(device), {}
        if self.blocks_come:
            on_device["embeddings and head"] = self.outside
            on_host["packed blocks"] = self.packed
        elif self.device.type != "cpu":
            on_device["model"] = self.model_bytes
        else:
            on_host["packed blocks"] = self.packed
        if not self.is_mapped and self.loaded_on.type == "cpu":
            on_host["model"] = self.model_bytes
        elif self.blocks_come and self.loaded_on.type != "cpu":
            on_host["blocks"] = self.model_bytes - self.outside
        waiting = {"hidden states": streams * self.tokens * self.hidden_size * self.number} | dict(kept)
        if self.config.offload == "disk":
            return Phase(name, on_device, on_host, waiting, flops)
        return Phase(name, on_device, on_host | waiting, {}, flops)

    def block_phases(self, block: _Block) -> Iterator[Phase]:
        config, length = self.config, self.config.seq_length
        streams = 2 + bool(config.tune_epochs)
        whole = 2 * block.weights + 4 * length * self.hidden_size  # operations on a token, attention included
        # Outputs of all linears, and what the norms compute in float32.
        outputs = sum(rows for stage in block.stages.values() for rows, _ in stage)
        running = {
            "block": block.dense,
            "activations": length * (self.number * outputs + 4 * FLOAT * self.hidden_size),
        }
        widths = {name: stage[0][1] for name, stage in block.stages.items()}
        captured = dict(widths) if config.rounding == "gptaq" else {}
        shift = self.tokens * self.hidden_size * self.number if config.mean_shift else 0

        def kept() -> dict[str, int]:
            inputs = {"inputs in full precision": sum(captured.values()) * self.tokens * self.number}
            return inputs | {"outputs and inputs of the norm": 2 * shift} if shift else inputs

        yield self.phase("full-precision pass", running, kept(), streams=streams, flops=whole * self.tokens)
        before, codes = 0, 0
        for name, stage in block.stages.items():
            columns = widths[name]
            matrix, both = FLOAT * columns**2, 2 if config.rounding == "gptaq" else 1
            sums = {"H and D": both * matrix} if config.rounding != "rtn" else {}
            if sums:
                window = {"inputs of a window": 3 * FLOAT * length * columns}
                flops = self.tokens * (before + 2.0 * both * columns**2)
                statistics = self.phase(
                    f"{name}: statistics", running | sums | window, kept(), streams=streams, flops=flops
                )
                yield replace(statistics, in_float32=True)
            captured.pop(name, None)
            work = max(self._rounding_bytes(*shape) for shape in stage)
            codes += sum(rows * columns for rows, _ in stage)
            held = {"block": block.dense} | sums | {"rounding": work, "codes of the block": codes}
            flops = sum(self._rounding_flops(*shape) for shape in stage)
            rounding = self.phase(f"{name}: rounding", held, kept(), streams=streams, flops=flops)
            yield replace(rounding, in_float32=True)
            before += sum(2 * rows * columns for rows, _ in stage)
        yield self.phase("quantized pass", running, {}, streams=streams, flops=whole * self.tokens)

    def _rounding_bytes(self, rows: int, columns: int) -> int:
        """Beside H and D: to begin with, while columns are rounded, or while the result is made dense again."""
        weight, group = rows * columns, min(self.config.group_size_of(columns), columns)
        if self.config.rounding == "rtn":
            return 2 * FLOAT * weight + weight
        lazy = min(LAZY_COLUMNS, group) * columns
        matrices, slices = (2, 4 * lazy) if self.config.rounding == "gptaq" else (1, lazy)
        start, factor, dense = 2 * FLOAT * weight, FLOAT * (2 * columns**2 + weight), (2 * FLOAT + 4) * weight
        sweep = FLOAT * (matrices * columns**2 + weight + slices + GROUP_TENSORS * group * rows) + weight
        return max(start, factor, sweep, dense)

    def _rounding_flops(self, rows: int, columns: int) -> float:
        search = SEARCH_OPERATIONS if self.config.clip else 0
        fit = (search + ALTERNATION_OPERATIONS * self.config.iterations) * PRODUCTS_PER_OPERATION * rows * columns
        if self.config.rounding == "rtn":
            return fit
        factor, sweep = 4 / 3 * columns**3, 1.0 * rows * columns**2
        return fit + (factor + sweep) * (2 if self.config.rounding == "gptaq" else 1)

    def rotation(self) -> Iterator[Phase]:
        """Rows of a matrix in float64 are turned at a time; it happens where the model is loaded."""
        if self.config.rotation is not None:
            from trl_gopd.d2quant.rotation import CHUNK_ROWS

            size = self.config.rotation_size or self.hidden_size
            longest = max([self.vocab_size, *(rows for b in self.blocks for s in b.stages.values() for rows, _ in s)])
            rows = {"rows in float64": 3 * 8 * min(CHUNK_ROWS, longest) * self.hidden_size}
            flops = 2.0 * size * (self.model_bytes / self.number)
            yield self.phase("rotation", {}, rows, streams=0, flops=flops)

    def tuning(self) -> Iterator[Phase]:
        """All packed blocks are on the device, and activations of one block exist at a time."""
        if not self.config.tune_epochs:
            return
        length, block = self.config.seq_length, max(self.blocks, key=lambda block: block.weights)
        outputs = sum(rows for stage in block.stages.values() for rows, _ in stage)
        chunk = min(length, tokens_per_chunk(max(self.vocab_size, 1), self.device))
        weights = sum(block.weights for block in self.blocks)
        device = {
            "packed model": self.packed + self.outside,
            "trained parameters": NUMBERS_PER_TRAINED * FLOAT * sum(block.trained for block in self.blocks),
            "inputs of the blocks": (len(self.blocks) + 1) * length * self.hidden_size * self.number,
            "activations of a block": 2 * length * (self.number * outputs + 4 * FLOAT * self.hidden_size),
            "logits": LOGITS_TENSORS * FLOAT * chunk * self.vocab_size,
        }
        on_host = {"packed blocks": self.packed} if self.blocks_come else {}
        waiting = {"hidden states": 2 * self.tokens * self.hidden_size * self.number}
        flops = self.config.tune_epochs * self.tokens * (8.0 * weights + 6.0 * self.vocab_size * self.hidden_size)
        host, disk = (on_host, waiting) if self.config.offload == "disk" else (on_host | waiting, {})
        yield Phase("tuning", device, host, disk, flops)

    def end(self) -> Phase:
        """The packed model, where the model was loaded."""
        whole = {"packed model": self.end_bytes}
        return Phase("end", {}, whole, {}, 0) if self.loaded_on.type == "cpu" else Phase("end", whole, {}, {}, 0)


def _without_numbers(model: PreTrainedModel | PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """A model of fake tensors; to be called in their mode."""
    if isinstance(model, PreTrainedModel):
        built = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype or model.dtype)
    else:
        built = AutoModelForCausalLM.from_config(copy.deepcopy(model), dtype=dtype or model.dtype or torch.float32)
    built.eval()
    assert isinstance(built, PreTrainedModel)
    return built


def _reads(model: PreTrainedModel, blocks: nn.Module) -> dict[nn.Module, Tensor]:
    """The tensor that each linear of the blocks reads in a pass of four tokens. Those that do not run are missing."""
    reads: dict[nn.Module, Tensor] = {}

    def note(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        reads[linear] = args[0]

    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note)
    base: Any = model.base_model
    base(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    return reads


def _describe(block: nn.Module, name: str, reads: Mapping[nn.Module, Tensor], config: D2QuantConfig) -> _Block:
    heads: dict[int, str] = {}
    stages: dict[str, list[tuple[int, int]]] = {}
    dense = packed = sum(parameter.nbytes for parameter in block.parameters())
    trained = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() == 1)
    for linear_name, linear in block.named_modules():
        if not isinstance(linear, nn.Linear) or config.skips(f"{name}.{linear_name}") or linear not in reads:
            continue
        head = heads.setdefault(reads[linear].untyped_storage()._cdata, linear_name)
        stages.setdefault(head, []).append((linear.out_features, linear.in_features))
        layer = empty_packed(linear, config, grid=config.grid, bias=linear.bias is not None, input_scale=False)
        packed += sum(parameter.nbytes for parameter in layer.parameters())
        packed -= sum(parameter.nbytes for parameter in linear.parameters())
        trained += layer.weight_scale.numel()
    weights = sum(rows * columns for stage in stages.values() for rows, columns in stage)
    return _Block(stages, dense, packed, trained, weights)


def _token_matrix_bytes(model: PreTrainedModel, config: D2QuantConfig) -> tuple[int, int]:
    """Bytes of embedding and head before and after packing; a tied pair counts once."""
    chosen = chosen_token_matrices(model, config)
    dense = packed = 0
    for module in {module.weight: module for module in chosen.values()}.values():
        layer = empty_token_matrix(module, config)
        dense += sum(parameter.nbytes for parameter in module.parameters())
        packed += sum(parameter.nbytes for parameter in layer.parameters())
    if model.get_input_embeddings() in chosen.values():
        packed += model.get_input_embeddings().weight.element_size()  # the scale of all rows
    return dense, packed


def _merged(phases: Iterator[Phase]) -> list[Phase]:
    """One phase for each name, as large as the largest, with the operations of all."""
    merged: dict[str, Phase] = {}
    for phase in phases:
        known = merged.get(phase.name, replace(phase, flops=0.0))
        largest = max(
            known, phase, key=lambda one: sum(sum(part.values()) for part in (one.device, one.host, one.disk))
        )
        merged[phase.name] = replace(largest, flops=known.flops + phase.flops)
    return list(merged.values())


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f} GiB"
