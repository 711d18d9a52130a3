"""
Tuning of the continuous parameters of a quantized model: scales, norms and biases of all blocks at once.

Rounding minimises an error block by block, while what matters is the distribution of the next token. Once all codes
are fixed, the continuous parameters are therefore trained on

    KL(p_full ‖ p_quantized), mean over the calibration tokens,

by Adam. The codes stay as they are, and no parameter is added. An absorbed column scale (DSQ) scales the rows of
`up_proj` and a folded shift (DAC) is a bias, so both are among the parameters that are tuned.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.topology import Topology
from trl_gopd.evaluation.logits import OutputHead, tokens_per_chunk
from trl_gopd.evaluation.resources import return_freed_memory


if TYPE_CHECKING:
    from trl_gopd.d2quant.config import D2QuantConfig
    from trl_gopd.d2quant.streams import BlockCalls


BETAS = (0.9, 0.95)
WARMUP_STEPS = 4


def tune(
    model: PreTrainedModel,
    topology: Topology,
    calls: "BlockCalls",
    *,
    starts: list[Tensor],
    full: list[Tensor],
    full_head: nn.Module | None = None,
    config: "D2QuantConfig",
) -> list[float]:
    """
    Tunes a quantized model in place, with one window per step. Activations are recomputed in the backward pass.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The quantized model. Its final norm is that of the full-precision model. Final norm, embedding and head are
            not tuned.
        topology ([`Topology`]), calls ([`BlockCalls`]):
            Its topology, and how to run its blocks.
        starts (`list[torch.Tensor]`), full (`list[torch.Tensor]`):
            Hidden states `(1, tokens, hidden_size)` of each window: before the first block, and after the last one of
            the full-precision model.
        full_head (`torch.nn.Module`, *optional*):
            Head of the full-precision model, which makes the targets, if the model's own is packed.
        config ([`D2QuantConfig`]):
            `tune_epochs`, `tune_learning_rate` and `seed` are used.

    Returns:
        `list[float]`: mean loss of each epoch, in nats per token. For a model without a head it is the squared error
        of the final hidden states, relative to their mean square.

    Raises:
        `ValueError`: if the loss is not finite. The parameters are those of the step before then.
    """
    generator = torch.Generator().manual_seed(config.seed)
    heads = None if topology.lm_head is None else (OutputHead(model), OutputHead(model, full_head))
    steps = config.tune_epochs * len(starts)
    losses: list[float] = []
    with (
        _trainable_parameters(model, topology) as tuned,
        tqdm(total=steps, desc="Tuning", unit="step", disable=None) as bar,
    ):
        masters = [parameter.detach().float().clone() for parameter in tuned]
        groups = [{"params": [master], "size": float(master.abs().mean())} for master in masters]
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=BETAS)
        for _ in range(config.tune_epochs):
            total = 0.0
            for index in torch.randperm(len(starts), generator=generator).tolist():
                loss = _backward(model, topology, calls.of_window(index), heads, starts[index], full[index])
                if not math.isfinite(loss):
                    raise ValueError(
                        f"The tuning's loss is {loss} for calibration window {index}, in step {bar.n + 1} of {steps}. "
                        f"Lower `tune_learning_rate` {config.tune_learning_rate}, or leave the tuning out with "
                        "`tune_epochs=0`. With `work_dir`, finished blocks are kept."
                    )
                total += loss
                rate = config.tune_learning_rate * min(1.0, (bar.n + 1) / WARMUP_STEPS)
                rate *= 0.5 * (1 + math.cos(math.pi * bar.n / steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["size"]
                _step(optimizer, tuned, masters)
                return_freed_memory()
                bar.update()
            losses.append(total / len(starts))
            bar.set_postfix(kl=f"{losses[-1]:.4f}")
    return losses


@contextmanager
def _trainable_parameters(model: PreTrainedModel, topology: Topology) -> Iterator[list[nn.Parameter]]:
    """
    The parameters to tune. In the body they alone require gradients, and scales are in float32; afterwards, dtypes and
    `requires_grad` are what they were.
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


def _step(optimizer: torch.optim.Optimizer, tuned: list[nn.Parameter], masters: list[Tensor]) -> None:
    """One step of the float32 copies `masters` along the gradients of `tuned`, which are set to their new values."""
    for parameter, master in zip(tuned, masters, strict=True):
        master.grad = None if parameter.grad is None else parameter.grad.float()
        parameter.grad = None
    optimizer.step()
    for parameter, master in zip(tuned, masters, strict=True):
        parameter.data.copy_(master)


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


def _backward(
    model: PreTrainedModel,
    topology: Topology,
    calls: "BlockCalls",
    heads: tuple[OutputHead, OutputHead] | None,
    start: Tensor,
    full: Tensor,
) -> float:
    """Adds the gradients of one window's mean loss; returns the loss."""
    hidden = start.to(model.device).requires_grad_(True)  # so that a reentrant checkpoint would have a gradient too
    for block in topology.blocks:
        hidden = checkpoint(calls.run, block, hidden, use_reentrant=False)
    final_norm = nn.Identity() if topology.final_norm is None else model.get_submodule(topology.final_norm)
    output = final_norm(hidden)
    with torch.no_grad():
        target = final_norm(full.to(hidden.device))
    leaf = output.detach().requires_grad_(True)
    chunk = tokens_per_chunk(model.config.get_text_config().vocab_size, leaf.device)
    loss = 0.0
    for part, target_part in zip(leaf.split(chunk, dim=1), target.split(chunk, dim=1), strict=True):
        if heads is None:
            chunk_loss = (part.float() - target_part.float()).square().sum() / target.float().square().sum()
        else:
            with torch.no_grad():
                expected = heads[1](target_part).float().log_softmax(-1)
            given = heads[0](part).float().log_softmax(-1)
            chunk_loss = F.kl_div(given, expected, log_target=True, reduction="sum") / leaf.shape[1]
        chunk_loss.backward()
        loss += float(chunk_loss.detach())
    output.backward(leaf.grad)
    return loss
