"""
Refinement of a quantized model: its codes, scales, norms and biases are trained, all blocks at once.

Rounding minimises an error block by block, while what matters is the distribution of the next token. Once all blocks
are packed, what they hold is therefore trained on

    KL(p_full ‖ p_quantized), mean over the calibration tokens.

Scales, norms and biases follow Adam. A code q ∈ {0, …, 2^b − 1} of a weight s·(q − z) has a latent value u, and is
`round(u)`. The backward pass takes the rounding as the identity (straight-through), so `∂L/∂u = s · ∂L/∂w`, and u
moves by a fixed step against its sign, as in [SignRound](https://huggingface.co/papers/2309.05516). A code changes
only where the gradients of many windows agree. No parameter is added to the checkpoint: an absorbed column scale (DSQ)
scales the rows of `up_proj` and a folded shift (DAC) is a bias, so both are among what is trained.

Some windows are held out of the training. The state that has the smallest loss there is kept, and that may be the one
before the training: the refinement never makes a model worse by that measure.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from trl_gopd.d2quant.kernels import by_group
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.packing import pack
from trl_gopd.d2quant.report import Refinement
from trl_gopd.d2quant.topology import Topology
from trl_gopd.evaluation.logits import OutputHead, tokens_per_chunk
from trl_gopd.evaluation.resources import return_freed_memory


if TYPE_CHECKING:
    from trl_gopd.d2quant.config import D2QuantConfig
    from trl_gopd.d2quant.streams import BlockCalls

BETAS = (0.9, 0.95)
WARMUP_STEPS = 4
# One window in so many is held out of the training, and at most so many. Fewer windows are all trained on, and the
# best state is that with the smallest loss on them.
HELD_OUT_SHARE = 16
HELD_OUT_MOST = 8


class TrainedLinear(nn.Module):
    """
    Stands in for a packed linear while its codes are trained.

    Args:
        packed ([`~trl_gopd.d2quant.linear.D2QuantLinear`]): Affine or mid-rise. Its scales and bias are used as they
            are; its codes stay what they were until [`repack`].
    """

    def __init__(self, packed: D2QuantLinear) -> None:
        super().__init__()
        self.packed = packed
        self.set_codes(packed.weight)
        self.step_size = 0.0

    def set_codes(self, words: Tensor) -> None:
        """Starts from these packed codes, int32 `(in_features/32·bits, out_features)`."""
        self.packed.weight.data = words.clone()
        unpacked = self.packed.unpack()
        zero = unpacked.zero_points
        self.codes = unpacked.codes
        self.zero = (2**unpacked.bits - 1) / 2 if zero is None else zero.float()
        # float16: a latent is a code that fits uint8, and how far it has moved from that.
        self.moved = torch.zeros(self.codes.shape, dtype=torch.float16, device=self.codes.device)

    def current(self) -> Tensor:
        """The codes as the latents have them now, float32 `(out_features, in_features)`."""
        return (self.codes + self.moved.float()).round_().clamp_(0, 2**self.packed.bits - 1)

    def repack(self) -> Tensor:
        """The codes as the latents have them now, packed."""
        return pack(self.current().to(torch.uint8).T, self.packed.bits)

    def offsets(self) -> Tensor:
        """`q − z`, float32 `(out_features, in_features)`."""
        offsets = self.current()
        if isinstance(self.zero, float):
            return offsets.sub_(self.zero)
        for part, zero in by_group(offsets, self.zero, self.packed.group_size):
            part -= zero
        return offsets

    def step(self, weight_grad: Tensor, scales: Tensor) -> None:
        """One step of the latents along the sign of `s · ∂L/∂w`; overwrites `weight_grad`."""
        for part, scale in by_group(weight_grad, scales, self.packed.group_size):
            part *= scale.sign()
        moved = self.moved.float().sub_(weight_grad.sign_(), alpha=self.step_size)
        # A latent stays where it rounds to a code: it could otherwise run away where it has no effect.
        lowest, highest = -0.49 - self.codes.float(), 2**self.packed.bits - 0.51 - self.codes.float()
        self.moved.copy_(torch.minimum(torch.maximum(moved, lowest), highest))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self.packed.input_scale is not None:
            x = x * self.packed.input_scale.to(x.dtype)
        y: Tensor = _StraightThrough.apply(x, self.packed.weight_scale, self)  # type: ignore[no-untyped-call]
        return y if self.packed.bias is None else y + self.packed.bias.to(y.dtype)


class _StraightThrough(torch.autograd.Function):
    """`x Ŵᵀ`. The backward pass moves the latents too: their gradients, as large as the model, are never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, linear: TrainedLinear) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(x, scales)
        weight = _rebuilt(linear.offsets(), scales.mT, linear.packed.group_size)
        return x @ weight.to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, scales), linear = ctx.saved_tensors, ctx.linear
        group_size, offsets = linear.packed.group_size, linear.offsets()
        flat = grad.flatten(0, -2)
        weight_grad = (flat.mT @ x.flatten(0, -2)).float()
        scales_grad = torch.empty_like(scales.mT, memory_format=torch.contiguous_format)
        for part, sums in by_group(offsets * weight_grad, scales_grad, group_size):
            sums.copy_(part.sum(-1, keepdim=True))
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ _rebuilt(offsets, scales.mT, group_size).to(grad.dtype)
        if linear.step_size:
            linear.step(weight_grad, scales.mT)
        return x_grad, scales_grad.mT, None


def _rebuilt(offsets: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """`s · (q − z)`; overwrites `offsets`."""
    for part, scale in by_group(offsets, scales, group_size):
        part *= scale
    return offsets


def refine(
    model: PreTrainedModel,
    topology: Topology,
    calls: "BlockCalls",
    *,
    starts: list[Tensor],
    full: list[Tensor],
    full_head: nn.Module | None = None,
    config: "D2QuantConfig",
) -> Refinement:
    """
    Refines a quantized model in place, with one window per step. Activations are recomputed in the backward pass.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The quantized model. Its final norm is that of the full-precision model. Final norm, embedding and head are
            not trained.
        topology ([`Topology`]), calls ([`BlockCalls`]):
            Its topology, and how to run its blocks.
        starts (`list[torch.Tensor]`), full (`list[torch.Tensor]`):
            Hidden states `(1, tokens, hidden_size)` of each window: before the first block, and after the last one of
            the full-precision model.
        full_head (`torch.nn.Module`, *optional*):
            Head of the full-precision model, which makes the targets, if the model's own is packed.
        config ([`D2QuantConfig`]):
            `tune_epochs`, `tune_learning_rate`, `tune_codes` and `seed` are used.

    Returns:
        [`Refinement`]: losses, and how many codes changed.

    Raises:
        `ValueError`: if the loss is not finite. The parameters are those of the step before then.
    """
    heads = None if topology.lm_head is None else (OutputHead(model), OutputHead(model, full_head))
    student = _Student(model, topology, calls, heads)
    held_out = min(HELD_OUT_MOST, len(starts) // HELD_OUT_SHARE)
    windows = list(zip(range(len(starts)), starts, full, strict=True))
    trained, kept = windows[: len(windows) - held_out], windows[len(windows) - held_out :] or windows
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.tune_epochs * len(trained)
    result = Refinement()
    with (
        _trained_codes(topology, config) as linears,
        _trainable_parameters(model, topology) as tuned,
        _computing(model, config),
        tqdm(total=steps, desc="Refining", unit="step", disable=None) as bar,
    ):
        masters = [parameter.detach().float().clone() for parameter in tuned]
        groups = [{"params": [master], "size": float(master.abs().mean())} for master in masters]
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=BETAS)
        best = _State.of(tuned, linears)
        result.held_out.append(_mean_loss(student, kept))
        for _ in range(config.tune_epochs):
            total = 0.0
            for index in torch.randperm(len(trained), generator=generator).tolist():
                warmup = min(1.0, (bar.n + 1) / WARMUP_STEPS)
                for linear in linears:
                    linear.step_size = 2 * config.tune_codes / steps * (1 - bar.n / steps)
                loss = _backward(student, *trained[index])
                _check_loss(loss, f"for calibration window {trained[index][0]} in step {bar.n + 1} of {steps}", config)
                total += loss
                rate = config.tune_learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * bar.n / steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["size"]
                _step(optimizer, tuned, masters)
                return_freed_memory()
                bar.update()
            result.training.append(total / len(trained))
            result.held_out.append(_mean_loss(student, kept))
            _check_loss(result.held_out[-1], f"for the windows held out after step {bar.n} of {steps}", config)
            if result.held_out[-1] == min(result.held_out):
                best = _State.of(tuned, linears)
            bar.set_postfix(kl=f"{result.training[-1]:.4f}", held_out=f"{result.held_out[-1]:.4f}")
        result.changed_codes = best.restore(tuned, linears)
    return result


def _check_loss(loss: float, when: str, config: "D2QuantConfig") -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss of the refinement is {loss} {when}. Lower `tune_learning_rate` {config.tune_learning_rate}, or "
            "leave the refinement out with `tune_epochs=0`. With `work_dir`, finished blocks are kept."
        )


@dataclass(frozen=True)
class _Student:
    """What computes the loss, see [`refine`]."""

    model: PreTrainedModel
    topology: Topology
    calls: "BlockCalls"
    heads: tuple[OutputHead, OutputHead] | None  # its own, and that of the full-precision model


@dataclass
class _State:
    """Copies of what is trained: parameters, and codes, packed."""

    parameters: list[Tensor]
    words: list[Tensor]

    @classmethod
    def of(cls, tuned: list[nn.Parameter], linears: list[TrainedLinear]) -> "_State":
        return cls([parameter.detach().clone() for parameter in tuned], [linear.repack() for linear in linears])

    def restore(self, tuned: list[nn.Parameter], linears: list[TrainedLinear]) -> float:
        """Gives all of it back; returns the share of the codes that are not those of the rounding."""
        for parameter, value in zip(tuned, self.parameters, strict=True):
            parameter.data.copy_(value)
        changed = total = 0
        for linear, words in zip(linears, self.words, strict=True):
            before = linear.codes
            linear.set_codes(words)
            changed += int((linear.codes != before).sum())
            total += before.numel()
        return changed / total if total else 0.0


@contextmanager
def _trained_codes(topology: Topology, config: "D2QuantConfig") -> Iterator[list[TrainedLinear]]:
    """Within it, linears whose codes are trained stand in for the packed ones of the blocks."""
    linears: list[TrainedLinear] = []
    places: list[tuple[nn.Module, str]] = []
    try:
        for block in topology.blocks if config.tune_codes else ():
            for name, module in list(block.module.named_modules()):
                if type(module) is D2QuantLinear and module.grid != "bitplane":
                    linears.append(TrainedLinear(module))
                    places.append((block.module, name))
                    block.module.set_submodule(name, linears[-1])
        yield linears
    finally:
        for (parent, name), linear in zip(places, linears, strict=False):
            parent.set_submodule(name, linear.packed)


@contextmanager
def _trainable_parameters(model: PreTrainedModel, topology: Topology) -> Iterator[list[nn.Parameter]]:
    """
    The parameters to train. In the body they alone require gradients, and scales are in float32; afterwards, dtypes
    and `requires_grad` are what they were.
    """
    modules = (module for block in topology.blocks for module in block.module.modules())
    stored = {m: m.weight_scale.dtype for m in modules if isinstance(m, D2QuantLinear)}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for module in stored:
        module.weight_scale = nn.Parameter(module.weight_scale.float(), requires_grad=False)
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        tuned = list(_tuned_parameters(topology))
        for parameter in tuned:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield tuned
    finally:
        for module, dtype in stored.items():
            module.weight_scale = nn.Parameter(module.weight_scale.detach().to(dtype), requires_grad=False)
        for parameter, value in required.items():
            parameter.requires_grad_(value)


def _tuned_parameters(topology: Topology) -> Iterator[nn.Parameter]:
    """Scales and biases of packed linears, and all one-dimensional floating-point parameters of other modules."""
    for block in topology.blocks:
        for module in block.module.modules():
            if isinstance(module, D2QuantLinear):
                yield module.weight_scale
                if module.bias is not None:
                    yield module.bias
            else:
                yield from (p for p in module.parameters(recurse=False) if p.dim() == 1 and p.is_floating_point())


def _computing(model: PreTrainedModel, config: "D2QuantConfig") -> torch.autocast:
    """
    Matrix products in bfloat16 where the processor has instructions for them, which are about three times as fast.
    From four bits on their rounding would be as large as what is trained, and they stay in the dtype of the model.
    """
    device = model.device.type
    if device == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = device == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=fast and config.bits < 4 and model.dtype == torch.float32)


def _step(optimizer: torch.optim.Optimizer, tuned: list[nn.Parameter], masters: list[Tensor]) -> None:
    """One step of the float32 copies `masters` along the gradients of `tuned`, which are set to their new values."""
    for parameter, master in zip(tuned, masters, strict=True):
        master.grad = None if parameter.grad is None else parameter.grad.float()
        parameter.grad = None
    optimizer.step()
    for parameter, master in zip(tuned, masters, strict=True):
        parameter.data.copy_(master)


def _final_states(student: _Student, index: int, start: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states `(1, tokens, hidden_size)` of the quantized and of the full-precision model for a window."""
    model, topology = student.model, student.topology
    hidden = start.to(model.device)
    if torch.is_grad_enabled():
        hidden = hidden.detach().requires_grad_(True)  # so that a reentrant checkpoint would have a gradient too
    calls = student.calls.of_window(index)
    for block in topology.blocks:
        hidden = checkpoint(calls.run, block, hidden, use_reentrant=False)
    final_norm = nn.Identity() if topology.final_norm is None else model.get_submodule(topology.final_norm)
    with torch.no_grad():
        target = final_norm(full.to(hidden.device))
    return final_norm(hidden), target


def _losses(student: _Student, output: Tensor, target: Tensor) -> Iterator[tuple[float, Tensor]]:
    """
    For a part of the tokens at a time, its share of the mean loss and the gradient of `output`, of the shape of both.

    With logits g and t, `∂KL(softmax t ‖ softmax g)/∂g = softmax g − softmax t`: of what has the width of the
    vocabulary, only the product with the head needs a graph.
    """
    energy = target.float().square().sum()
    chunk = tokens_per_chunk(student.model.config.get_text_config().vocab_size, output.device)
    for part, target_part in zip(torch.split(output, chunk, 1), torch.split(target, chunk, 1), strict=True):
        if student.heads is None:
            difference = part.float() - target_part.float()
            yield float(difference.square().sum() / energy), 2 * difference / energy
            continue
        leaf = part.detach().requires_grad_(torch.is_grad_enabled())
        given = student.heads[0](leaf)
        with torch.no_grad():
            expected = student.heads[1](target_part).float()
            expected -= expected.logsumexp(-1, keepdim=True)
            logits = given.detach().float()
            log_p = logits - logits.logsumexp(-1, keepdim=True)  # not in place: it may be the memory of `given`
            probabilities = expected.exp()
            loss = float((probabilities * expected.sub_(log_p)).sum()) / output.shape[1]
            slope = log_p.exp_().sub_(probabilities).div_(output.shape[1])
        if not torch.is_grad_enabled():
            yield loss, slope.new_empty(0)
            continue
        yield loss, torch.autograd.grad(given, leaf, slope.to(given.dtype))[0]


def _backward(student: _Student, index: int, start: Tensor, full: Tensor) -> float:
    """Adds the gradients of a window's mean loss, and moves the latents; returns the loss."""
    output, target = _final_states(student, index, start, full)
    losses, gradients = zip(*_losses(student, output.detach(), target), strict=True)
    torch.autograd.backward(output, torch.cat(gradients, dim=1).to(output.dtype))
    return float(sum(losses))


@torch.no_grad()
def _mean_loss(student: _Student, windows: list[tuple[int, Tensor, Tensor]]) -> float:
    """Mean loss of windows."""
    total = 0.0
    for window in windows:
        output, target = _final_states(student, *window)
        total += sum(loss for loss, _ in _losses(student, output, target))
    return total / len(windows)
