"""
Every private name of TRL that this package uses, the versions that have them, and the only file to change when TRL
moves one.

`tests/contract/` pins what is relied on; `make compat` runs it with each of these versions.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import trl
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTunerLayer


ACCEPTED = ">=1.14,<1.17"

if not SpecifierSet(ACCEPTED).contains(trl.__version__, prereleases=True):
    raise ImportError(
        f"TRL {trl.__version__} is installed, but trl_gopd overrides private methods of its trainer as they are in "
        f"`trl{ACCEPTED}`. Install one of these versions: pip install 'trl{ACCEPTED}'."
    )

# After the check, since another version may lack these names and would end in a message about one of them.
from trl.models.utils import (  # noqa: E402
    _ForwardRedirection,
    disable_gradient_checkpointing,
    prepare_deepspeed,
    prepare_fsdp,
)
from trl.trainer.utils import (  # noqa: E402
    create_model_from_path,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    use_adapter,
)


__all__ = [
    "ACCEPTED",
    "allow_one_generation",
    "check_device",
    "refuse_head_adapter",
    "create_model_from_path",
    "disable_gradient_checkpointing",
    "eos_token_ids",
    "gather_heads",
    "get_config_model_id",
    "get_rollouts",
    "prepare_deepspeed",
    "prepare_fsdp",
    "set_rollouts",
    "through_forward",
    "use_adapter",
]


def check_device(device: torch.device) -> None:
    """Raises if the installed TRL cannot train on `device`."""
    # The output head of 1.15 is a Triton kernel alone; 1.14 has none, and that of 1.16 exists in torch too.
    needs_triton = Version(trl.__version__).release[:2] == (1, 15)
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if needs_triton and device.type not in ("cuda", "xpu") and not is_interpreted:
        raise ValueError(
            f"TRL {trl.__version__} computes log-probabilities with a Triton kernel and cannot train on the device "
            f"{str(device)!r}, only on CUDA or XPU. Train there, or install another version: "
            f"pip install 'trl{ACCEPTED},!=1.15.*'."
        )


def refuse_head_adapter(student: Any) -> None:
    """Raises for an adapter on the output head, which TRL does itself from 1.15 on."""
    if isinstance(student.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "Giving a PEFT adapter to `lm_head` is not supported: hidden states are multiplied by the head's own "
            "weight, so the adapter would not be trained. Remove 'lm_head' from `target_modules`."
        )


def eos_token_ids(trainer: Any) -> list[int]:
    """Ids that end a completion of a [`~trl.GRPOTrainer`]: before 1.14.2 the tokenizer's alone."""
    if Version(trl.__version__) < Version("1.14.2"):
        return [trainer._tokenizer.eos_token_id]
    return list(trainer.eos_token_ids)


def get_rollouts(trainer: Any) -> tuple[int, list[dict[str, Any]] | None]:
    """How many micro-batches a [`~trl.GRPOTrainer`] has trained on, and those of its present generation batch."""
    return trainer._step, trainer._buffered_inputs


def set_rollouts(trainer: Any, step: int, rollouts: list[dict[str, Any]] | None) -> None:
    """Puts back what `get_rollouts` returned: TRL itself would sample anew in the middle of a generation batch."""
    trainer._step, trainer._buffered_inputs = step, rollouts


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
