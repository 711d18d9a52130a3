"""
Every private name of TRL that this package uses, and the only file to change when TRL moves one.

`tests/contract/` pins what is relied on.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from trl.models.utils import _ForwardRedirection, disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    create_model_from_path,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    use_adapter,
)


__all__ = [
    "allow_one_generation",
    "create_model_from_path",
    "disable_gradient_checkpointing",
    "gather_heads",
    "get_config_model_id",
    "prepare_deepspeed",
    "prepare_fsdp",
    "through_forward",
    "use_adapter",
]


class _AtLeastTwo(int):
    """An integer that claims not to be below 2."""

    def __lt__(self, other: int) -> bool:
        return False if other == 2 else int.__lt__(self, other)


@contextlib.contextmanager
def allow_one_generation(config: Any) -> Iterator[None]:
    """
    Lets the body run `GRPOConfig.__post_init__` with `num_generations=1`.

    GRPO compares completions of one prompt and refuses a single one; distillation scores every token by itself. The
    check sits in the middle of TRL's validation, so it is stepped around rather than copied around.
    """
    given = config.num_generations
    config.num_generations = _AtLeastTwo(given)
    try:
        yield
    finally:
        config.num_generations = given


@contextlib.contextmanager
def gather_heads(*heads: torch.nn.Module | None) -> Iterator[None]:
    """
    Makes the weights of output heads whole, under ZeRO-3 in place and under FSDP2 as `whole`, a pair that
    [`~trl_gopd.gopd.frozen.local.project`] reads; does nothing elsewhere.

    Ranks hold different numbers of chunks, so heads are gathered around the loop over chunks, never in it.
    """
    parameters = [parameter for head in heads if head is not None for parameter in head.parameters(recurse=False)]
    # a model that DeepSpeed did not shard (quantized, or placed by the user) has no `ds_status`
    with maybe_gather_lm_head_ctx(*[parameter for parameter in parameters if hasattr(parameter, "ds_status")]):
        split: dict[int, Any] = {
            id(head): head for head in heads if hasattr(getattr(head, "weight", None), "full_tensor")
        }
        try:
            with torch.no_grad():
                for head in split.values():
                    head.whole = tuple(None if p is None else p.full_tensor() for p in (head.weight, head.bias))
            yield
        finally:
            for head in split.values():
                head.__dict__.pop("whole", None)


def through_forward(
    wrapper: torch.nn.Module, inner: torch.nn.Module, function: Callable[..., Any], **inputs: Any
) -> Any:
    """
    What `function(**inputs)` returns, called from inside the forward of `wrapper` in place of that of `inner`.

    DDP, DeepSpeed and FSDP act on a call of the wrapper's forward, and PEFT on that of its own, so what uses the
    weights of `inner` has to run inside them. TRL's redirection does not undo itself where a wrapper raises.

    Args:
        wrapper (`torch.nn.Module`):
            The model as training holds it.
        inner (`torch.nn.Module`):
            The transformers model in it, or `wrapper` itself.
        function (`Callable`):
            Called once with the keyword arguments that reach the forward of `inner`.
        **inputs:
            Keyword arguments of the wrapper's forward.
    """
    patched = inner.__dict__.get("forward")  # TRL's own forward of the student
    try:
        return _ForwardRedirection()(wrapper, inner, function, **inputs)
    finally:
        inner.__dict__.pop("forward", None)
        if patched is not None:
            inner.__dict__["forward"] = patched
