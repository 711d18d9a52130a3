"""
The student as it was before training, without a second copy of its frozen weights.

What training changes are the trained tensors, which are few under an adapter. A copy of them takes their place while
the start is scored. This is exact for every kind of adapter, since all else stays as it is, and it does not depend on
how a kind names or initialises its tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ...digests import parameters_digest
from ...files import written_whole
from .._trl import gather_parameters
from .identity import is_sharded


WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # what training may add to the names of parameters


class StudentStart:
    """
    The trained tensors of a PEFT student, as they are when this is built.

    Args:
        model ([`~peft.PeftModel`]):
            The student before it is wrapped for training. All ranks get the trained tensors of the first one.
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed.
    """

    FILE = "gopd_start.safetensors"

    def __init__(self, model: Any, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._tensors: dict[str, Tensor] = {}
        self._head: nn.Linear | None = None
        parameters = _named_parameters(model)
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        with gather_parameters(*trained.values()), torch.no_grad():
            for name, parameter in trained.items():
                kept = parameter.detach().to(accelerator.device, copy=True).contiguous()
                if accelerator.num_processes > 1:  # each rank may have drawn its own; training begins with the first's
                    kept = broadcast(kept, from_process=0)
                    parameter.data.copy_(kept)
                self._tensors[name] = kept
        # The tensors that are not trained belong to the start too, and an initialisation may have changed them.
        frozen = {name: parameter for name, parameter in parameters.items() if name not in trained}
        self._frozen_digest = None if is_sharded(accelerator) else parameters_digest(frozen)

    @contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """For the body, the trained tensors of the student are those of the start; afterwards, what they were."""
        with ExitStack() as stack, torch.no_grad():
            _release_gathered(model, self.accelerator)
            stack.callback(_release_gathered, model, self.accelerator)
            parameters = _named_parameters(self.accelerator.unwrap_model(model))
            for name, kept in self._tensors.items():
                parameter = parameters[name]
                if (kept.dtype, kept.device) != (parameter.dtype, parameter.device):  # training has moved or cast it
                    kept = self._tensors[name] = kept.to(parameter.device, parameter.dtype)
                    self._head = None
                stack.callback(_exchange(parameter, kept))
            yield

    @contextmanager
    def instead_of_base(self, model: nn.Module) -> Iterator[None]:
        """Where the student's adapters are switched off, the start for the body; nothing where they are on."""
        student = self.accelerator.unwrap_model(model)
        if student.get_model_status().enabled is not False:
            yield
            return
        student.base_model.enable_adapter_layers()
        try:
            with self.restored(model):
                yield
        finally:
            student.base_model.disable_adapter_layers()

    def head(self, model: nn.Module) -> Any:
        """The output head at the start, which is applied to hidden states after `restored` has ended."""
        student = self.accelerator.unwrap_model(model)
        head: Any = output_head(student.get_base_model())
        names = {id(parameter): name for name, parameter in _named_parameters(student).items()}
        own = {key: self._tensors.get(names[id(parameter)], parameter) for key, parameter in head.named_parameters()}
        if all(tensor is parameter for tensor, parameter in zip(own.values(), head.parameters(), strict=True)):
            return head  # it is not trained
        if self._head is None:
            self._head = _linear(**own)
        return self._head

    def save(self, folder: Path) -> None:
        """Writes the tensors into a checkpoint."""
        with written_whole(folder / self.FILE) as part:
            save_file({name: kept.cpu() for name, kept in self._tensors.items()}, part)

    def load(self, folder: Path) -> None:
        """
        Takes the tensors of the run that wrote a checkpoint, whose student may have been initialised otherwise.

        Raises:
            `ValueError`: If the checkpoint has none, or those of another student.
        """
        path = folder / self.FILE
        if not path.is_file():
            raise ValueError(
                f"The student's start is the reference, and the checkpoint {folder} has no {self.FILE} to tell what "
                "it was. Resume from a checkpoint of a run with the same `peft_config`, or start anew with another "
                "`output_dir`, or pass `ref_model`, or use `gopd_lambda=1`."
            )
        try:
            loaded = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}). Resume from another checkpoint; to go on from the weights alone, pass "
                "the folder as `model`."
            ) from error
        shapes, own = ({name: tuple(t.shape) for name, t in named.items()} for named in (loaded, self._tensors))
        differing = [name for name in shapes | own if shapes.get(name) != own.get(name)]
        if differing:
            raise ValueError(
                f"{path} holds the start of another student: {differing[0]} has the shape {shapes.get(differing[0])} "
                f"there and {own.get(differing[0])} in this run. Pass the student and the `peft_config` of that run, "
                "or start anew with another `output_dir`."
            )
        self._tensors = {name: loaded[name].to(kept) for name, kept in self._tensors.items()}
        self._head = None

    def digest(self) -> str | None:
        """Checksum of the student at the start, `None` if it is sharded."""
        return None if self._frozen_digest is None else f"{self._frozen_digest}-{parameters_digest(self._tensors)}"


def output_head(model: Any) -> Any:
    """The output head that a model applies at the moment, without the wrapper that PEFT puts around a trained one."""
    head = model.get_output_embeddings()
    if not hasattr(head, "modules_to_save"):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    return head.modules_to_save[active[0]] if active else head.original_module


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen layer around tensors that are there already."""
    layer = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None, device="meta")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None:
            setattr(layer, name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False))
    return layer


def _exchange(parameter: Any, kept: Tensor) -> Callable[[], object]:
    """Puts a whole tensor in the place of a parameter's, of which a rank may have a part; returns what undoes it."""
    shard: Tensor
    if isinstance(parameter, DTensor):
        shard = parameter.to_local()
        part = distribute_tensor(kept, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    elif hasattr(parameter, "ds_tensor"):
        shard = parameter.ds_tensor
        if getattr(parameter, "ds_secondary_tensor", None) is not None or shard.numel() == 0:
            raise ValueError(
                "The student's start cannot be kept with ZeRO++ or with parameters on NVMe. Turn off "
                "`zero_hpz_partition_size` and `offload_param` to NVMe, or pass `ref_model`, or use `gopd_lambda=1`."
            )
        first = dist.get_rank(parameter.ds_process_group) * shard.numel()
        part = kept.flatten()[first : first + shard.numel()]  # shorter on the last ranks, whose rest is padding
        shard = shard.view(-1)[: part.numel()]
    else:
        # Assigning `data` is no change to autograd and copies nothing.
        now, parameter.data = parameter.data, kept
        return lambda: setattr(parameter, "data", now)
    # Sharded parameters are gathered from memory that their framework has reserved, so it is written into.
    before = shard.clone()
    shard.copy_(part)
    return lambda: shard.copy_(before)


def _release_gathered(model: nn.Module, accelerator: Any) -> None:
    """Parameters that a sharded student holds whole are dropped, so that its next forward gathers them again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    engine = getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    release = getattr(getattr(engine, "optimizer", None), "empty_partition_cache", None)
    if release is not None:
        release()


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have outside of training's wrappers."""
    named = {}
    for name, parameter in model.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = parameter
    return named
