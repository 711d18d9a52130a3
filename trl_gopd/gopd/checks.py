"""Checks of what a trainer was given: of its arguments before anything is loaded or changed, and of each batch."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.utils import is_peft_available

from ._trl import refuse_head_adapter
from .config import GOPDConfig
from .contexts import shortened
from .frozen.adapter import check_adapted_student, is_peft
from .frozen.head import check_fused_head, check_head, logit_transform
from .frozen.local import project, vocab_size_of
from .prompts import prompt_problem


if is_peft_available():
    pass


def check_arguments(args: Any, *, uses_tools: bool) -> None:
    """
    Raises for a configuration that does not go with the other arguments of the trainer.

    Args:
        args ([`GOPDConfig`]):
            Configuration of the run.
        uses_tools (`bool`):
            Whether the student may call tools or act in an environment.
    """
    if not isinstance(args, GOPDConfig):
        raise TypeError(f"`args` must be a `GOPDConfig`, got {type(args).__name__}. Build one with the same fields.")
    if args.use_stored_completions and uses_tools:
        raise ValueError("`use_stored_completions` samples nothing, so there is no turn for tools. Drop them.")
    if args.gopd_eos_mismatch == "map" and uses_tools:
        raise ValueError(
            "`gopd_eos_mismatch='map'` exchanges the end token in the whole completion, which with tools has "
            "the ends of several turns as the template writes them. Use models that end alike, or 'keep'."
        )
    if args.gopd_nonfinite == "skip":
        check_steps_can_be_skipped(args)


def check_steps_can_be_skipped(args: GOPDConfig) -> None:
    """Raises `ValueError` for `gopd_nonfinite="skip"` where the optimizer step is a part of the backward pass."""
    taken_by = None
    if args.deepspeed or args.distributed_state.distributed_type == "DEEPSPEED":
        taken_by = "DeepSpeed"
    elif "layerwise" in args.optim or args.optim in ("lomo", "adalomo"):
        taken_by = f"`optim={args.optim.value!r}`"
    if taken_by:
        raise ValueError(
            f"`gopd_nonfinite='skip'` cannot leave out the optimizer step of {taken_by}, which takes it inside the "
            "backward pass. Use 'raise', or train with DDP or FSDP and another optimizer."
        )


def check_rewards(args: GOPDConfig, *, source: str) -> None:
    """
    Raises `ValueError` for a configuration with which task rewards have no effect.

    Args:
        args ([`GOPDConfig`]):
            Configuration of the run.
        source (`str`):
            Where the rewards come from, for messages.
    """
    if (args.num_generations or 1) < 2:
        raise ValueError(
            f"{source} with `num_generations=1` have no effect, since GRPO compares the completions of one prompt. "
            f"Use `num_generations` of at least 2, or drop them."
        )
    if args.gopd_estimator != "sampled":
        raise ValueError(
            f"{source} act on the log-probabilities of the sampled tokens, which "
            f"`gopd_estimator={args.gopd_estimator!r}` does not train. Use 'sampled'."
        )


def check_datasets(
    datasets: Mapping[str, Any], check_rows: Callable[[Any, str], None], *, needs_prompts: bool
) -> None:
    """
    Raises `ValueError` for data sets that cannot be trained on.

    Args:
        datasets (`Mapping[str, Any]`):
            By the name of the trainer's argument: a data set, a dictionary of several, or `None`.
        check_rows (`Callable`):
            Looks at the rows of a data set with this name.
        needs_prompts (`bool`):
            Whether rows need a prompt, which otherwise an environment gives.
    """
    for name, dataset in datasets.items():
        parts = {f"{name}[{key!r}]": part for key, part in dataset.items()} if isinstance(dataset, dict) else {}
        for part_name, part in (parts or {name: dataset}).items():
            check_dataset(part, part_name, needs_prompts=needs_prompts)
            check_rows(part, part_name)


def check_dataset(dataset: Any, name: str, *, needs_prompts: bool) -> None:
    """
    Raises `ValueError` for a data set without rows, with rows without prompts, or with images.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            The data set.
        name (`str`):
            What the user calls it, for messages.
        needs_prompts (`bool`):
            Whether rows need a prompt, which otherwise an environment gives.
    """
    columns = getattr(dataset, "column_names", None)
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. Give at least one row with a `prompt`.")
    if needs_prompts and isinstance(columns, list) and "prompt" not in columns:
        raise ValueError(f"`{name}` needs a column `prompt`, a string or a list of messages; it has {columns}.")
    for column in ("image", "images"):
        if isinstance(columns, list) and column in columns:
            raise ValueError(f"`{name}` has the column `{column}`, but frozen models score text only. Drop it.")
    if isinstance(columns, list) and "prompt" in columns and hasattr(dataset, "__len__"):
        for number, prompt in enumerate(dataset["prompt"]):
            _check_prompt(prompt, f"row {number} of `{name}`")


def check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises `ValueError` for a row of a batch without a prompt, unless its environment is to give one, or with one of
    another kind than the first row's, after which TRL treats all.
    """
    for number, row in enumerate(rows):
        if "prompt" not in row:
            continue
        _check_prompt(row["prompt"], f"row {number} of the batch")
        if isinstance(row["prompt"], str) != isinstance(rows[0].get("prompt"), str):
            raise ValueError(
                f"`prompt` is {shortened(row['prompt'])} in row {number} of the batch and "
                f"{shortened(rows[0].get('prompt'))} in row 0. Give all rows strings, or lists of messages."
            )


def _check_prompt(prompt: Any, where: str) -> None:
    problem = prompt_problem(prompt)
    if problem is not None:
        raise ValueError(
            f"`prompt` must be a string or a list of messages, got {shortened(prompt)} in {where}: {problem}. Correct "
            "the row, or leave it out."
        )


def check_token_ids(
    kind: str, token_ids: Sequence[Sequence[int]], rows: Sequence[Mapping[str, Any]], config: Any
) -> None:
    """
    Raises `ValueError` for a prompt or completion without tokens, or with ids that the student does not have.

    Args:
        kind (`str`):
            `"prompt"` or `"completion"`.
        token_ids (`Sequence[Sequence[int]]`):
            Ids of all prompts or completions of a batch.
        rows (`Sequence[Mapping]`):
            Rows of the data set, for messages. May be others in number, as between the turns of tools.
        config ([`~transformers.PreTrainedConfig`]):
            The student's.
    """
    vocab_size = vocab_size_of(config)
    for number, ids in enumerate(token_ids):
        outside = [index for index in ids if not 0 <= index < vocab_size]
        if len(ids) and not outside:
            continue
        shown = f" ({shortened(rows[number].get('prompt'))})" if len(rows) == len(token_ids) else ""
        where = f"The {kind} of row {number} of the batch{shown}"
        if outside:
            raise ValueError(
                f"{where} has the token id {outside[0]}, and the student has ids below {vocab_size}. Use ids of the "
                "student's tokenizer."
            )
        raise ValueError(
            f"{where} has no tokens. A {kind} needs at least one"
            + (", if only the end of the answer." if kind == "completion" else ". Correct the row, or leave it out.")
        )


def checked_rollouts(rollout_func: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` of [`~trl.GRPOTrainer`] whose prompts and completions are checked before they are used."""

    @functools.wraps(rollout_func)
    def checked(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        rows = [{"prompt": prompt} for prompt in prompts]
        for kind in ("prompt", "completion"):
            given = output.get(f"{kind}_ids")
            if given is not None:  # TRL names what is missing
                check_token_ids(kind, given, rows, trainer.model.config)
        return output

    return checked


def check_student(model: Any, args: GOPDConfig, *, needs_start: bool, accelerator: Any) -> None:
    """
    Raises `ValueError` for a student that the estimator cannot train.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, to which TRL has added its fused head. It is not changed.
        args ([`GOPDConfig`]):
            Configuration of the run.
        needs_start (`bool`):
            Whether the student's start has to be scored.
        accelerator ([`~accelerate.Accelerator`]):
            Says how the run is distributed.
    """
    has_adapter = is_peft(model)
    if has_adapter:
        refuse_head_adapter(model)
        check_adapted_student(model, estimator=args.gopd_estimator, needs_start=needs_start, accelerator=accelerator)
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        return  # ZeRO-3 has split the weights already, and its engine is not there yet
    base: Any = model.get_base_model() if has_adapter else model
    # In training mode, since bitsandbytes repacks 4-bit weights in evaluation mode on some CPUs, after which they pass
    # no gradient on. The probe takes the place of the backbone's output, so dropout makes no difference.
    with training_mode(model):
        if args.gopd_estimator != "sampled" or has_adapter:  # an adapter's model may be scored without the adapter
            head = functools.partial(project, base.get_output_embeddings())
            check_head(
                base, base, project=head, transform=logit_transform(base.config, args.temperature), role="model"
            )
        if args.gopd_estimator != "full" or args.gopd_discount:
            check_fused_head(base, temperature=args.temperature, role="model")


@contextmanager
def training_mode(model: Any) -> Iterator[None]:
    """Training mode for the body; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
