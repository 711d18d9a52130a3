"""
The map from the last hidden states of a causal language model to its logits, which is applied here to a chunk of
tokens at a time: a linear head, then the scale and the soft cap that some families have.

What a family does to its logits is read from its configuration, and then checked against the model's own forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._trl import fused_log_probs
from ..objective import LogitTransform


# Names under which configurations keep what their model does to the output of its head.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse, Falcon-H1
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
SOFT_CAPS = (
    "final_logit_softcapping",  # Gemma 2 to 4, VaultGemma, NanoChat, Muse, Beam and others
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)
IGNORES_SCALE = ("mpt",)  # its configuration has a `logit_scale` that its forward never reads
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)

PROBED_TOKENS = 3
PROBED_LOGIT = 60.0  # root mean square of the logits of the probe: above all soft caps in use, which are 15 to 50


def logit_transform(config: Any, temperature: float = 1.0) -> LogitTransform:
    """
    What a model does to the output of its head, read from its configuration.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model, or of its text part.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.

    Returns:
        [`LogitTransform`].
    """
    config = config.get_text_config()
    scale = 1.0
    multiplier, divisor = _first(config, MULTIPLIERS), _first(config, DIVISORS)
    if multiplier is not None and config.model_type not in IGNORES_SCALE:
        scale = float(multiplier)
    elif divisor is not None:
        scale = float(divisor) if config.model_type in MULTIPLIES_BY_DIVISOR else 1 / float(divisor)
    return LogitTransform(scale, _first(config, SOFT_CAPS), temperature)


def _first(config: Any, names: tuple[str, ...]) -> Any:
    """The first of some fields of a configuration that is set."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


@torch.no_grad()
def check_head(
    model: Any,
    base: Any,
    *,
    project: Callable[[Tensor], Tensor],
    transform: LogitTransform,
    role: str,
    hidden: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> None:
    """
    Raises `ValueError` unless a model's logits are those that are computed from its hidden states.

    The model's own forward is run once with the output of its backbone exchanged for a probe: random hidden states
    whose logits are large enough for every soft cap to act, whatever the weights are. The logits of the probe then
    have to be the same on both ways, up to the rounding of the model's dtype.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, whose forward is called.
        base ([`~transformers.PreTrainedModel`]):
            The transformers model in it.
        project (`Callable`):
            Computes raw logits `(N, V)` of hidden states `(N, D)`.
        transform ([`LogitTransform`]):
            Is applied to the raw logits.
        role (`str`):
            For messages.
        hidden (`Callable`, *optional*):
            Computes hidden states from `input_ids`, `attention_mask` and a number of tokens n: the `(B, n, D)` from
            which the last n ids are predicted. If given, they have to be those of the model's own forward.

    Raises:
        `ValueError`: If the two differ, with the remedy.
    """
    ids = _probed_ids(base)
    with probed(base, project, transform.scale) as (states, probes):
        want = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if bool(want.isnan().any()):
        raise ValueError(
            f"The logits of `{role}` ({type(base).__name__}) are not finite: a model returns NaN. Check its weights, "
            "or load it in a wider dtype."
        )
    reason = None
    if not probes:
        reason = f"its forward does not call its backbone (`{base.base_model_prefix}`)"
    elif hidden is not None:
        reason = _different_states(hidden(ids, torch.ones_like(ids), PROBED_TOKENS), states[0][:, :-1])
    if reason is None:
        got = transform(project(probes[0].flatten(0, 1)))
        reason = _different_logits(got, want.flatten(0, 1).float() / transform.temperature, base.dtype)
    if reason is not None:
        raise ValueError(
            f"The logits of `{role}` ({type(base).__name__}) are not a linear head followed by the scale and soft cap "
            f"of its configuration, so they cannot be computed in chunks: {reason}. Use another model family."
        )


@torch.no_grad()
def check_fused_head(base: Any, *, temperature: float, role: str) -> None:
    """
    Raises `ValueError` unless the log-probabilities that TRL computes from a student's hidden states are those of the
    student's own logits: TRL, too, knows only some of the families that do something to them.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The student, to which TRL has added its fused head.
        temperature (`float`):
            Sampling temperature that divides the logits.
        role (`str`):
            For messages.
    """
    ids = _probed_ids(base)
    inputs = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    transform = logit_transform(base.config, temperature)
    with probed(base, base.get_output_embeddings(), transform.scale):
        got = fused_log_probs(base, ids, **inputs)
        if got is None:
            return
        want = base(input_ids=ids, **inputs).logits[:, :-1].float() / temperature
    # Six roundings of a logit and of the largest one, each half an eps, and those of sums in float32.
    largest = want.abs().max().clamp(min=1)
    tolerance = (6 * torch.finfo(base.dtype).eps + 2**7 * torch.finfo(torch.float32).eps) * largest
    gap = (got - want.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)).abs().max()
    if not gap <= tolerance:
        raise ValueError(
            f"TRL computes other log-probabilities for `{role}` ({type(base).__name__}) than those of its own logits, "
            f"{gap:.3g} nats away from them, so it cannot be trained on sampled tokens. Use `gopd_estimator='full'`, "
            "or another model family."
        )


@contextmanager
def probed(
    base: Any, project: Callable[[Tensor], Tensor], scale: float
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """
    A body in which the backbone of a model answers with a probe.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            The model.
        project (`Callable`):
            Computes raw logits of hidden states.
        scale (`float`):
            Multiplies the raw logits.

    Returns:
        Two lists, which the body fills: what the backbone would have answered, and the probe, both `(B, L, D)`.
    """
    states: list[Tensor] = []
    probes: list[Tensor] = []

    def exchange(module: nn.Module, arguments: Any, output: Any) -> Any:
        states.append(output.last_hidden_state)
        noise = torch.randn(states[-1].shape, generator=torch.Generator().manual_seed(0)).to(states[-1])
        size = project(noise.flatten(0, 1)).float().square().mean().sqrt() * abs(scale)
        # A head whose weights are all zero has no size, and the logits of any probe are zero.
        probes.append(noise * (PROBED_LOGIT / size if size else 1.0))
        output.last_hidden_state = probes[-1]
        return output

    hook = base.base_model.register_forward_hook(exchange)
    try:
        yield states, probes
    finally:
        hook.remove()


def _probed_ids(base: Any) -> Tensor:
    """Ids `(1, L)` that the model has."""
    device = base.get_input_embeddings().weight.device
    return torch.arange(PROBED_TOKENS + 1, device=device).unsqueeze(0) % int(base.config.get_text_config().vocab_size)


def _different_states(got: Tensor, want: Tensor) -> str | None:
    """Why hidden states are not the same, if they are not."""
    if got.shape != want.shape:
        return f"its own forward has hidden states of the shape {tuple(want.shape)}, and not {tuple(got.shape)}"
    # One computation, run twice: only kernels that add in a changing order can make a difference.
    gap = (got.float() - want.float()).norm() / want.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    if not gap <= 16 * torch.finfo(want.dtype).eps:
        return f"its own forward has other hidden states, which differ by {gap:.2%}"
    return None


def _different_logits(got: Tensor, want: Tensor, dtype: torch.dtype) -> str | None:
    """Why float32 logits `(N, V)` are not the same, if they are not; the model computed `want` in `dtype`."""
    if got.shape != want.shape:
        return f"it has {want.size(-1)} logits a token, and its head {got.size(-1)}"
    if not got.any() and not want.any():
        return None
    # The model rounds its logits at most five times, after the head, the scale, and the three steps of a soft cap, and
    # the head is rounded once here: by half an eps each time, and independently.
    eps = torch.finfo(dtype).eps
    # Products of a head with up to 2**14 inputs may be added in another order: random roundings of float32.
    order = 2**7 * torch.finfo(torch.float32).eps
    tiny = torch.finfo(torch.float32).tiny
    gap = ((got - want).square().mean(1) / want.square().mean(1).clamp(min=tiny)).sqrt().max()
    # Roundings of single logits cancel in their common factor, so that one near 1 shows.
    factor = (got * want).sum(1) / got.square().sum(1).clamp(min=tiny)
    if gap <= 3 * eps + order and (factor - 1).abs().max() <= eps + order:
        return None
    return f"its own logits are about {factor.mean():.4g} times those computed here, and {gap:.2%} away from them"
