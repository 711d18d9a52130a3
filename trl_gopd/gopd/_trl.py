"""
Every private name of TRL that this package uses, and the only file to change when TRL moves one.

`tests/contract/` pins what is relied on.
"""

import contextlib
from collections.abc import Iterator

import torch
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
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
    "use_adapter",
]


class _AtLeastTwo(int):
    """An integer that claims not to be below 2."""

    def __lt__(self, other):
        return False if other == 2 else int.__lt__(self, other)


@contextlib.contextmanager
def allow_one_generation(config) -> Iterator[None]:
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
    [`~trl_gopd.gopd.scoring.project`] reads; does nothing elsewhere.

    Ranks hold different numbers of chunks, so heads are gathered around the loop over chunks, never in it.
    """
    parameters = [parameter for head in heads if head is not None for parameter in head.parameters(recurse=False)]
    # a model that DeepSpeed did not shard (quantized, or placed by the user) has no `ds_status`
    with maybe_gather_lm_head_ctx(*[parameter for parameter in parameters if hasattr(parameter, "ds_status")]):
        split = {id(head): head for head in heads if hasattr(getattr(head, "weight", None), "full_tensor")}
        try:
            with torch.no_grad():
                for head in split.values():
                    head.whole = tuple(None if p is None else p.full_tensor() for p in (head.weight, head.bias))
            yield
        finally:
            for head in split.values():
                head.__dict__.pop("whole", None)
