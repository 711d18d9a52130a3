"""
Every private name of TRL that this package uses, the versions that have them, and the only file to change when TRL
moves one.

`tests/contract/` pins what is relied on; `make compat` runs it with each of these versions.
"""

import contextlib
import functools
import os
import types
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
    use_adapter,
)


__all__ = [
    "ACCEPTED",
    "allow_one_generation",
    "check_device",
    "dense_head",
    "refuse_head_adapter",
    "create_model_from_path",
    "disable_gradient_checkpointing",
    "eos_token_ids",
    "fused_log_probs",
    "gather_heads",
    "gather_parameters",
    "get_config_model_id",
    "get_rollouts",
    "prepare_deepspeed",
    "prepare_fsdp",
    "set_rollouts",
    "through_forward",
    "tools_of_rows",
    "unpack_quantized_head",
    "use_adapter",
    "without_reference_adapter",
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


def dense_head(head: Any, dtype: torch.dtype | None = None) -> Any:
    """
    An output head whose `weight` can be multiplied by: `head` itself, or its dense and frozen copy in `dtype` where
    the weight is quantized, so that it holds codes.
    """
    if head.weight.is_floating_point():
        return head
    if not hasattr(head, "to_dense"):
        raise ValueError(
            f"The student's output head is a quantized {type(head).__name__}, and losses are computed from its dense "
            "weight, which it cannot give (`to_dense`). Leave the head in full precision: name 'lm_head' in "
            "`modules_to_not_convert` when the student is quantized."
        )
    return head.to_dense(dtype)


def unpack_quantized_head(student: Any) -> None:
    """
    Lets TRL's fused head, which reads `weight` of the student's head, see a dense one if the head is quantized. It
    exists from a forward pass to the end of its backward pass.

    Raises:
        `ValueError`: If the head is quantized and cannot give its dense weight.
    """
    head = student.get_output_embeddings()
    if head.weight.is_floating_point() or "forward" not in vars(student):  # TRL 1.14 calls the head
        return
    dense_head(head)
    name = next(name for name, module in student.named_modules() if module is head)
    fused = student.forward

    @functools.wraps(fused)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **kwargs)
        packed = self.get_submodule(name)
        self.set_submodule(name, dense_head(packed, self.dtype))
        try:
            return fused(*args, fused_lm_head=True, **kwargs)
        finally:
            self.set_submodule(name, packed)

    student.forward = types.MethodType(forward, student)


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
def without_reference_adapter(config: Any) -> Iterator[None]:
    """
    Keeps GRPO, constructed in the body, from adding an adapter `ref` to a PEFT student, as it does if `beta` is not 0.

    The new adapter is initialised first, which for some initialisations changes the weights under it, and then filled
    by the names of parameters, which misses those of some kinds. Under an adapter GRPO makes nothing else of `beta`
    until it trains; the caller sets the attribute.
    """
    given, config.beta = config.beta, 0.0
    try:
        yield
    finally:
        config.beta = given


@contextlib.contextmanager
def gather_parameters(*parameters: torch.Tensor) -> Iterator[None]:
    """A context in which parameters that ZeRO-3 has sharded are whole; others are left alone."""
    # TRL's own asks whether the student is trained with ZeRO-3; frozen models may be sharded where it is not. A model
    # that DeepSpeed did not shard (quantized, or placed by the user) has no `ds_status`.
    split = {
        id(p): p for p in parameters if getattr(getattr(p, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"
    }
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(split.values())):
        yield


@contextlib.contextmanager
def gather_heads(*heads: torch.nn.Module | None) -> Iterator[None]:
    """
    Makes the weights of output heads whole, under ZeRO-3 in place and under FSDP2 as `whole`, a pair that
    [`~trl_gopd.gopd.frozen.local.project`] reads; does nothing elsewhere.

    Ranks hold different numbers of chunks, so heads are gathered around the loop over chunks, never in it.
    """
    parameters = [parameter for head in heads if head is not None for parameter in head.parameters(recurse=False)]
    with gather_parameters(*parameters):
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


def fused_log_probs(student: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor | None:
    """
    Log-probabilities `(B, L - 1)` of the ids after the first, as TRL computes them in the loss from hidden states;
    `None` with TRL 1.14, which computes them from the student's own logits.
    """
    if Version(trl.__version__).release[:2] < (1, 15):
        return None
    output = student(input_ids=input_ids, labels=input_ids, fused_lm_head=True, **inputs)
    log_probs: torch.Tensor = output.log_probs[:, : input_ids.size(1) - 1]
    return log_probs


def tools_of_rows(trainer: Any, count: int) -> list[list[Callable[..., Any]]]:
    """The tools that a trainer's templates were given for each of the `count` prompts of its last batch."""
    if trainer.environment_factories is None:
        return [trainer.tools] * count
    return [trainer._env_tools[name] for name in trainer._batch_environments]


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
