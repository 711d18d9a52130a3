"""The models of a preflight: loading them, scoring with them, and leaving them as they were."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..gopd.frozen.adapter import is_same_model
from ..gopd.frozen.local import LocalScorer, evaluation_mode
from ..gopd.frozen.tokenizers import check_tokenizer
from .options import Options


# A name, a path, a `PreTrainedModel` or a `PeftModel`
GivenModel = str | os.PathLike[str] | nn.Module


@dataclass(frozen=True)
class Models:
    """
    The models of a preflight, ready to be called, and what they have in common.

    Args:
        teacher ([`LocalScorer`]):
            The teacher T.
        reference ([`LocalScorer`]):
            The reference R.
        sampler ([`LocalScorer`]):
            The model that writes the completions: the teacher or the student.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of all of them.
        vocab_size (`int`):
            Number of ids that all of them have.
        eos_ids (`list[int]`):
            Ids that end a completion.
    """

    teacher: LocalScorer
    reference: LocalScorer
    sampler: LocalScorer
    tokenizer: Any
    vocab_size: int
    eos_ids: list[int]

    @classmethod
    def of(cls, loaded: Mapping[str, nn.Module], tokenizer: PreTrainedTokenizerBase, options: Options) -> "Models":
        """Checks that all models read the token ids of one tokenizer, and makes them scorers."""
        scorers = {}
        for role, model in loaded.items():
            check_tokenizer(tokenizer, model, role=role)
            scorers[role] = _scorer(model, role, options)
        return cls(
            teacher=scorers["teacher_model"],
            reference=scorers["ref_model"],
            sampler=scorers["model" if options.sample_from == "student" else "teacher_model"],
            tokenizer=tokenizer,
            vocab_size=min(scorer.vocab_size for scorer in scorers.values()),
            eos_ids=_eos_ids(tokenizer, loaded.values()),
        )

    def check_context(self, prompt_ids: list[list[int]], max_completion_length: int) -> None:
        """Raises `ValueError` if a model cannot read the longest prompt with a completion of the maximum length."""
        longest = max(map(len, prompt_ids))
        roles = {"teacher_model": self.teacher, "ref_model": self.reference, "model": self.sampler}
        for role, scorer in roles.items():
            context = scorer.context
            if context is not None and longest + max_completion_length > context:
                raise ValueError(
                    f"The longest prompt has {longest} tokens and a completion may have {max_completion_length}, but "
                    f"`{role}` has a context of {context} tokens. Lower `max_completion_length`, or remove long "
                    "prompts."
                )


def load_models(given: Mapping[str, str | nn.Module], init_kwargs: dict[str, Any] | None) -> dict[str, nn.Module]:
    """
    Returns the model of each role. A name that has two roles is loaded once.

    Args:
        given (`Mapping[str, str | torch.nn.Module]`):
            Names, paths or instances by role.
        init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained`.

    Raises:
        `TypeError`: If an instance is not a model of transformers or PEFT.
        `ValueError`: If a model cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kwargs = {"dtype": "auto", "device_map": device, **(init_kwargs or {})}
    by_name: dict[str, nn.Module] = {}
    models = {}
    for role, each in given.items():
        if not isinstance(each, str):
            if not isinstance(each, PreTrainedModel) and not hasattr(each, "get_base_model"):
                raise TypeError(
                    f"`{role}` must be a name or path, a `PreTrainedModel` or a `PeftModel`, got "
                    f"{type(each).__name__}."
                )
            models[role] = each
            continue
        try:
            if each not in by_name:
                by_name[each] = AutoModelForCausalLM.from_pretrained(each, **kwargs)
        except (OSError, ValueError) as error:  # a missing folder, a broken folder, or no connection to the Hub
            raise ValueError(
                f"`{role}` {each!r} cannot be loaded ({str(error).splitlines()[0]}). Pass a folder that "
                "was written by `save_pretrained`, or the name of a model on the Hub."
            ) from error
        models[role] = by_name[each]
    return models


def is_student_the_teacher(given: Mapping[str, str | nn.Module], loaded: Mapping[str, nn.Module]) -> bool:
    """
    Whether student and teacher are known to be the same model: one name or folder, or equal parameters.

    Args:
        given (`Mapping[str, str | torch.nn.Module]`):
            Names, paths or instances of `"model"`, the student, and of `"teacher_model"` and `"ref_model"`.
        loaded (`Mapping[str, torch.nn.Module]`):
            Those of them that are in memory. The parameters of a student that is not cannot be compared.
    """
    student, teacher = given["model"], given["teacher_model"]
    if isinstance(student, str) and isinstance(teacher, str) and is_same_model(student, teacher):
        return True
    if isinstance(student, str):
        in_memory = next((model for role, model in loaded.items() if given[role] == student), None)
    else:
        in_memory = student
    return in_memory is not None and _have_equal_parameters(in_memory, loaded["teacher_model"])


def load_tokenizer(given: str | nn.Module) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that is stored with a model, and raises `ValueError` if there is none."""
    source = given if isinstance(given, str) else name_of(given, default="")
    try:
        if not source:
            raise OSError("it was not loaded from a path")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The student's tokenizer cannot be loaded ({str(error).splitlines()[0]}). Pass it as `processing_class`."
        ) from error


def name_of(given: Any, default: str | None = None) -> str:
    """Returns the name of a model or function, or `default` for a model without one, or the name of its class."""
    if isinstance(given, str):
        return given
    if isinstance(given, nn.Module):
        config: Any = given.config
        return config._name_or_path or (type(given).__name__ if default is None else default)
    return getattr(given, "__name__", type(given).__name__)


def _have_equal_parameters(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(_is_equal(ours[name], theirs[name]) for name in ours)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.is_meta or other.is_meta or one.shape != other.shape:  # A weight that is offloaded is a meta tensor.
        return False
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(one.device, dtype))


@contextmanager
def restored(models: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager after which training modes and gradient flags of models are what they were before."""
    models = list(models)
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluation_mode(model))
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _scorer(model: Any, role: str, options: Options) -> LocalScorer:
    # A real `Accelerator` would leave global state behind, which a trainer in the same process would read. This object
    # has the attributes that `LocalScorer` reads.
    device = (model.get_base_model() if hasattr(model, "get_base_model") else model).device
    accelerator = SimpleNamespace(device=device, state=SimpleNamespace(deepspeed_plugin=None), autocast=nullcontext)
    return LocalScorer(
        model,
        accelerator=accelerator,
        temperature=options.temperature,
        batch_size=options.batch_size,
        chunk_size=options.chunk_size,
        role=role,
    )


def _eos_ids(tokenizer: Any, models: Iterable[Any]) -> list[int]:
    """Returns the ids that end a completion: that of the tokenizer and those of the models, as GRPO uses them."""
    declared = [tokenizer.eos_token_id]
    for model in models:
        ids = model.generation_config.eos_token_id
        declared += ids if isinstance(ids, list) else [ids]
    return sorted({index for index in declared if index is not None})
