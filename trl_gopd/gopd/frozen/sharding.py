"""Frozen models that are split over the ranks, as the student is or although it is not."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from .._trl import prepare_deepspeed, prepare_fsdp
from .identity import is_sharded, uses_fsdp


# Parts of a configuration that are about the student.
OF_TRAINING = (
    "zero_optimization",
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def check_sharding(accelerator: Any) -> None:
    """Raises `ValueError` if frozen models cannot be sharded in this run."""
    if not is_sharded(accelerator) and accelerator.state.deepspeed_plugin is None:
        raise ValueError(
            "`shard_frozen_models` shards teachers and references by ZeRO-3 of DeepSpeed, and this run is launched "
            f"without it ({accelerator.distributed_type}). Launch it with a DeepSpeed configuration, such as one of "
            "ZeRO-2, or use `shard_frozen_models=False`."
        )


def zero3_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The DeepSpeed configuration of a model that is sharded and never trained, beside a student that is not sharded.

    Args:
        config (`dict[str, Any]`):
            Configuration of the run. Of its `zero_optimization`, what concerns ZeRO-3 is kept, and of training
            nothing.
    """
    zero = config.get("zero_optimization", {})
    kept = {name: value for name, value in zero.items() if name.startswith("stage3_") or name == "offload_param"}
    result = copy.deepcopy({name: value for name, value in config.items() if name not in OF_TRAINING})
    # a size of batches that DeepSpeed asks for and compares with the number of ranks, not always known while loading
    return {**result, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **copy.deepcopy(kept)}}


def shard(model: nn.Module, accelerator: Any) -> Any:
    """The model, to be called by all ranks together."""
    if uses_fsdp(accelerator):
        return prepare_fsdp(model, accelerator)
    if is_sharded(accelerator):
        return prepare_deepspeed(model, accelerator)
    plugin = SimpleNamespace(deepspeed_config=zero3_config(accelerator.state.deepspeed_plugin.deepspeed_config))
    return prepare_deepspeed(model, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))


@contextmanager
def sharded_loading(accelerator: Any, run_config: Any = None) -> Iterator[None]:
    """
    A body in which `from_pretrained` shards a model while it loads, so that no rank ever holds all of it.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed. With FSDP or ZeRO-3 the body is as without this context.
        run_config ([`~transformers.integrations.HfDeepSpeedConfig`], *optional*):
            What transformers knows of the DeepSpeed configuration of the run, and is to know again afterwards.
    """
    if is_sharded(accelerator):
        yield
        return
    # transformers keeps a weak reference to the newest of these objects
    config = HfDeepSpeedConfig(zero3_config(accelerator.state.deepspeed_plugin.deepspeed_config))
    try:
        yield
    finally:
        del config
        if run_config is None:
            unset_hf_deepspeed_config()
        else:
            set_hf_deepspeed_config(run_config)
