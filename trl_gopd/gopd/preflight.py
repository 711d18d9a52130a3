"""
What λ would do, before any training.

Teacher and reference alone say where G-OPD would pull a student: at each state to q_λ = softmax(λ·z* + (1 − λ)·z_ref),
eq. 12 of [G-OPD](https://huggingface.co/papers/2602.12125). `preflight` samples completions, measures on their states
what q_λ does that the teacher does not, and can decode q_λ itself and let reward functions judge it.

What it cannot see is training: the states are those of today's sampler, and a student need not reach q_λ.
"""

import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
)

import trl_gopd

from .batch import Sequences
from .divergence import chunk_slices
from .extrapolation import DETERMINISTIC, ExtrapolatedLogitsProcessor, lambda_effects
from .frozen.local import LocalScorer, evaluation_mode
from .frozen.tokenizers import check_tokenizer
from .preflight_report import (
    CLIPS,
    MAX_DETERMINISTIC_FLIPS,
    MAX_OFF_TEACHER_MASS,
    QUANTILES,
    Decoded,
    LambdaEffect,
    LogRatios,
    PreflightReport,
    recommend,
)
from .rollouts import pad_ids


__all__ = ["PreflightReport", "load_prompts", "preflight"]

LAMBDAS = (0.5, 1.0, 1.1, 1.25, 1.5, 2.0)
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
ACCEPTED = (
    "Give a data set's name, a JSON, JSONL, CSV or Parquet file with a column `prompt`, a .txt file with one prompt a "
    "line, a `Dataset`, or a list of prompts."
)


def preflight(
    *,
    teacher_model: str | os.PathLike | nn.Module,
    prompts: Any,
    model: str | os.PathLike | nn.Module | None = None,
    ref_model: str | os.PathLike | nn.Module | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    reward_funcs: Callable | Sequence[Callable] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    sample_from: str = "teacher",
    num_samples: int = 100,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    chunk_size: int = 256,
    max_off_teacher_mass: float = MAX_OFF_TEACHER_MASS,
    max_deterministic_flips: float = MAX_DETERMINISTIC_FLIPS,
    model_init_kwargs: dict[str, Any] | None = None,
) -> PreflightReport:
    """
    Measures what each λ would pull a student to, and recommends one.

    Without reward functions that is the largest λ up to which q_λ stays within both limits. With them it is the λ
    whose decoded completions have the best mean reward or, of those within one standard error of it (of the
    difference, prompt by prompt), the one nearest to 1. λ = 1 is always measured.

    Models given as instances are left as they were, on their devices. Only one process may run this.

    Args:
        teacher_model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The teacher T.
        prompts (`str` or `os.PathLike` or [`~datasets.Dataset`] or `list`):
            What [`load_prompts`] takes. Further columns go to the reward functions.
        model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The student, before training. Defaults to the reference.
        ref_model (`str` or `os.PathLike` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            The reference R. Defaults to the student.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Defaults to the student's.
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Reward functions as [`~trl.GRPOTrainer`] takes them, not asynchronous; their rewards are added. With them,
            completions are decoded from q_λ for each λ.
        lambdas (`Sequence[float]`, *optional*, defaults to `(0.5, 1, 1.1, 1.25, 1.5, 2)`):
            The grid.
        sample_from (`str`, *optional*, defaults to `"teacher"`):
            Who writes the completions on whose states λ is measured: `"teacher"` or `"student"`.
        num_samples (`int`, *optional*, defaults to `100`):
            Completions, and decoded ones for each λ. Prompts are drawn without repetition, or each used about equally
            often if there are fewer.
        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens of a completion at most.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits of all models, in sampling and in scoring, as in training.
        seed (`int`, *optional*, defaults to `0`):
            Of the choice of prompts and of sampling. The global random state is left as it was.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a forward.
        chunk_size (`int`, *optional*, defaults to `256`):
            Tokens whose logits exist at a time.
        max_off_teacher_mass (`float`, *optional*, defaults to `0.01`):
            How much more probability than the teacher q_λ may put on ids that the teacher finds unlikely.
        max_deterministic_flips (`float`, *optional*, defaults to `0.001`):
            Share of the teacher's near-certain choices that q_λ may overturn.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments of `from_pretrained` for models given by name. Unless stated here, the dtype is that of
            the checkpoint, and the device the GPU if there is one.

    Returns:
        [`PreflightReport`].

    Raises:
        `ValueError`, `TypeError`: before anything is sampled, if an option, the prompts or the models cannot be used.
    """
    start = time.perf_counter()
    # a path is a name to everything below
    teacher_model, model, ref_model = (
        os.fspath(given) if isinstance(given, os.PathLike) else given for given in (teacher_model, model, ref_model)
    )
    _check_options(
        wholes={
            "num_samples": (num_samples, 2),  # for a standard error
            "max_completion_length": (max_completion_length, 1),
            "batch_size": (batch_size, 1),
            "chunk_size": (chunk_size, 1),
            "seed": (seed, 0),
        },
        shares={
            "max_off_teacher_mass": max_off_teacher_mass,
            "max_deterministic_flips": max_deterministic_flips,
        },
        temperature=temperature,
        lambdas=lambdas,
        sample_from=sample_from,
    )
    grid = sorted({1.0, *map(float, lambdas)})
    rewards = _check_rewards(reward_funcs)
    if model is None and ref_model is None:
        raise ValueError("`model` and `ref_model` are both None, and λ needs a reference. Pass one of them.")
    student, reference = (ref_model if model is None else model), (model if ref_model is None else ref_model)
    rows = _choose(load_prompts(prompts), num_samples, seed)
    tokenizer = _tokenizer_of(student) if processing_class is None else processing_class
    prompt_ids = _tokenize(tokenizer, rows)

    given = {"teacher_model": teacher_model, "ref_model": reference}
    if sample_from == "student":
        given["model"] = student
    models = _load(given, model_init_kwargs)
    with _restored(models.values()), torch.no_grad():
        frozen = {}
        for role, loaded in models.items():
            check_tokenizer(tokenizer, loaded, role=role)
            frozen[role] = _freeze(loaded, role, temperature, batch_size, chunk_size)
        _check_context(frozen, prompt_ids, max_completion_length)
        run = _Run(
            teacher=frozen["teacher_model"],
            reference=frozen["ref_model"],
            tokenizer=tokenizer,
            prompt_ids=prompt_ids,
            vocab_size=min(each.inner.vocab_size for each in frozen.values()),
            eos_ids=_eos_ids(tokenizer, models.values()),
            max_completion_length=max_completion_length,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            chunk_size=chunk_size,
        )
        completions = run.sample(frozen["model" if sample_from == "student" else "teacher_model"], "Sampling")
        labels, log_ratios, top, values = run.measure(completions, grid)
        decoded = [run.decode(gopd_lambda, rows, rewards) for gopd_lambda in grid if rewards]

    is_end = torch.isin(labels, torch.tensor(run.eos_ids, dtype=labels.dtype))
    effects = _summarize(grid, values, top)
    ends = _log_ratios(log_ratios[is_end]) if is_end.any() else None
    recommended, reasons = recommend(
        effects,
        decoded,
        max_off_teacher_mass=max_off_teacher_mass,
        max_deterministic_flips=max_deterministic_flips,
    )
    return PreflightReport(
        settings={
            **{role: _name_of(each) for role, each in (("model", student), *given.items())},
            "lambdas": grid,
            "sample_from": sample_from,
            "num_samples": num_samples,
            "max_completion_length": max_completion_length,
            "temperature": temperature,
            "seed": seed,
            "batch_size": batch_size,
            "reward_funcs": [_name_of(each) for each in rewards],
            "max_off_teacher_mass": max_off_teacher_mass,
            "max_deterministic_flips": max_deterministic_flips,
            "versions": {each.__name__: str(each.__version__) for each in (trl_gopd, torch, transformers)},
        },
        completions=len(completions),
        tokens=len(labels),
        length=len(labels) / len(completions),
        truncated=run.truncated(completions),
        deterministic=float((top > DETERMINISTIC).double().mean()),
        log_ratios=_log_ratios(log_ratios),
        eos_log_ratios=ends,
        effects=effects,
        decoded=decoded,
        recommended_lambda=recommended,
        reasons=reasons,
        seconds=time.perf_counter() - start,
    )


def load_prompts(prompts: Any, *, split: str = "train", name: str | None = None) -> Dataset:
    """
    Rows with a `prompt`, a string or a list of messages.

    Args:
        prompts (`str` or `os.PathLike` or [`~datasets.Dataset`] or `list`):
            A file (.json, .jsonl, .csv, .parquet with a column `prompt`; .txt with one prompt a line), a folder or
            name for [`~datasets.load_dataset`], a data set, or a list of prompts or of rows.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a data set given by name or folder.
        name (`str`, *optional*):
            Its configuration.

    Returns:
        [`~datasets.Dataset`]: at least one row.

    Raises:
        `TypeError`, `ValueError`: if there are no prompts to be had.
    """
    if isinstance(prompts, str | os.PathLike):
        prompts = _read(Path(prompts), split, name)
    elif isinstance(prompts, list | tuple):
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
        try:
            prompts = Dataset.from_list(rows)
        except (ValueError, TypeError) as error:  # what pyarrow raises for mixed types
            raise TypeError(
                f"`prompts` must all be strings or all be lists of messages ({error}). {ACCEPTED}"
            ) from error
    if not isinstance(prompts, Dataset):
        raise TypeError(f"`prompts` must not be of type {type(prompts).__name__}. {ACCEPTED}")
    if not len(prompts):
        raise ValueError(f"`prompts` is empty, it has no rows. {ACCEPTED}")
    if "prompt" not in prompts.column_names:
        raise ValueError(f"The rows have no column `prompt`, got {prompts.column_names}. {ACCEPTED}")
    return prompts


@dataclass(frozen=True)
class _Run:
    """The models, placed and checked, with what all steps share."""

    teacher: LocalScorer
    reference: LocalScorer
    tokenizer: Any
    prompt_ids: list[list[int]]
    vocab_size: int  # ids that all models have
    eos_ids: list[int]
    max_completion_length: int
    temperature: float
    seed: int
    batch_size: int
    chunk_size: int

    def sample(self, sampler: LocalScorer, title: str, gopd_lambda: float = 1.0) -> list[list[int]]:
        """One completion a prompt from q_λ, with `sampler` in the teacher's place; ends are included."""
        base = sampler.inner.base
        device = base.get_input_embeddings().weight.device
        pad_id = self._pad_id
        config = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.max_completion_length,
            eos_token_id=self.eos_ids or None,
            pad_token_id=pad_id,
            suppress_tokens=list(range(self.vocab_size, sampler.inner.vocab_size)) or None,
            disable_compile=True,
        )
        completions = []
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            _blank_generation_config(base),
            tqdm(total=len(self.prompt_ids), desc=title, unit="completion", disable=None) as bar,
        ):
            torch.manual_seed(self.seed)  # the same for each λ, so that their rewards are compared on alike draws
            for part in chunk_slices(len(self.prompt_ids), self.batch_size):
                ids, mask = pad_ids(self.prompt_ids[part], side="left", device=device)
                extrapolated = ExtrapolatedLogitsProcessor(
                    self.reference.inner, gopd_lambda=gopd_lambda, attention_mask=mask
                )
                output = base.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([extrapolated]),
                )
                completions += [self._cut(row) for row in output[:, ids.size(1) :].tolist()]
                bar.update(len(ids))
        return completions

    def _cut(self, row: list[int]) -> list[int]:
        """What comes up to the first end, which is included: the rest is padding."""
        end = next((index for index, token in enumerate(row) if token in self.eos_ids), len(row))
        return row[: end + 1]

    @property
    def _pad_id(self) -> int:
        # any id will do, since it is masked
        return next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)

    def truncated(self, completions: list[list[int]]) -> float:
        """Share of completions without an end."""
        return mean(float(ids[-1] not in self.eos_ids) for ids in completions)

    def measure(
        self, completions: list[list[int]], lambdas: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """
        For all N tokens of the completions: ids, log T/R and max T, each `(N,)`, and the values of `lambda_effects`.
        """
        eos_ids = [index for index in self.eos_ids if index < self.vocab_size]
        pieces: dict[str, list[Tensor]] = {}
        for part in tqdm(chunk_slices(len(completions), self.batch_size), "Scoring", unit="batch", disable=None):
            rows = [p + c for p, c in zip(self.prompt_ids[part], completions[part], strict=True)]
            # Padded right, so that positions count from the first token in every family.
            ids, mask = pad_ids(rows, side="right", device="cpu")
            starts = torch.tensor([len(p) for p in self.prompt_ids[part]]).unsqueeze(1)
            chosen = (mask.bool() & (torch.arange(ids.size(1)) >= starts))[:, 1:]
            labels = ids[:, 1:][chosen]
            hidden = [_hidden(each, ids, mask)[chosen.to(_device(each))] for each in (self.teacher, self.reference)]
            for tokens in chunk_slices(len(labels), self.chunk_size):
                teacher, reference = (
                    each.inner.logits(states[tokens])[:, : self.vocab_size].log_softmax(-1)
                    for each, states in zip((self.teacher, self.reference), hidden, strict=True)
                )
                reference, label = reference.to(teacher.device), labels[tokens].to(teacher.device).unsqueeze(1)
                values = lambda_effects(
                    teacher_logps=teacher, reference_logps=reference, lambdas=lambdas, eos_ids=eos_ids
                )
                values["log_ratios"] = (teacher.gather(1, label) - reference.gather(1, label)).squeeze(1)
                values["top"] = teacher.max(-1).values.exp()
                for name, value in values.items():
                    pieces.setdefault(name, []).append(value.cpu())
        values = {name: torch.cat(parts) for name, parts in pieces.items()}
        broken = [name for name, value in values.items() if not value.isfinite().all()]
        if broken:
            raise ValueError(
                f"{broken} are not finite: a model returns NaN, or the reference gives probability 0 to ids that the "
                "teacher allows. Check both models, or load them in a wider dtype."
            )
        labels = torch.tensor([token for ids in completions for token in ids])
        return labels, values.pop("log_ratios"), values.pop("top"), values

    def decode(self, gopd_lambda: float, rows: Dataset, reward_funcs: Sequence[Callable]) -> Decoded:
        """Completions from q_λ, and their rewards."""
        completions = self.sample(self.teacher, f"Decoding λ = {gopd_lambda:g}", gopd_lambda)
        rewards = _rewards(self.tokenizer, rows, completions, reward_funcs)
        scored = [reward for reward in rewards if reward is not None]
        if len(scored) < 2:
            raise ValueError(
                f"At λ = {gopd_lambda:g} the reward functions judged {len(scored)} of {len(rewards)} completions, "
                "and a standard error takes 2. Check that the prompts have the columns that they need."
            )
        return Decoded(
            gopd_lambda=gopd_lambda,
            rewards=rewards,
            reward=mean(scored),
            standard_error=stdev(scored) / math.sqrt(len(scored)),
            length=mean(map(len, completions)),
            truncated=self.truncated(completions),
        )


def _rewards(tokenizer, rows: Dataset, completions: list[list[int]], reward_funcs: Sequence[Callable]):
    """Sum over functions of each completion's reward, called as GRPO calls them; `None` where all gave `None`."""
    prompts = list(rows["prompt"])
    texts: list[Any] = tokenizer.batch_decode(completions, skip_special_tokens=True)
    if not isinstance(prompts[0], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: list(rows[name]) for name in rows.column_names if name not in ("prompt", "completion")}
    ignore = {"trainer_state": TrainerState(), "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    totals: list[float | None] = [None] * len(texts)
    for function in reward_funcs:
        try:
            values = function(prompts=prompts, completions=texts, completion_ids=completions, **columns, **ignore)
        except Exception as error:  # whatever a function of the user's raises
            raise RuntimeError(
                f"The reward function {_name_of(function)!r} raised {type(error).__name__}: {error}. It was given "
                f"what GRPO gives: prompts, completions ({'strings' if isinstance(texts[0], str) else 'messages'}, as "
                f"the prompts are), completion_ids and the columns {list(columns)}."
            ) from error
        if len(values) != len(texts):
            raise ValueError(
                f"The reward function {_name_of(function)!r} returned {len(values)} rewards for {len(texts)} "
                "completions. Let it return one for each, `None` where it has no say."
            )
        for index, value in enumerate(values):
            if value is not None and not math.isnan(value):
                totals[index] = (totals[index] or 0.0) + float(value)
    return totals


def _summarize(lambdas: Sequence[float], values: dict[str, Tensor], top: Tensor) -> list[LambdaEffect]:
    means = {name: value.double().mean(0).tolist() for name, value in values.items()}
    certain = values["flips"][top > DETERMINISTIC].double()
    flips = certain.mean(0).tolist() if len(certain) else [None] * len(lambdas)
    return [
        LambdaEffect(
            gopd_lambda=gopd_lambda,
            deterministic_flips=flips[index],
            **{name: each[index] for name, each in means.items()},
        )
        for index, gopd_lambda in enumerate(lambdas)
    ]


def _log_ratios(values: Tensor) -> LogRatios:
    values = values.double()
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
    return LogRatios(
        count=len(values),
        mean=float(values.mean()),
        quantiles={f"{q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
        beyond={f"{c:g}": float((values.abs() > c).double().mean()) for c in CLIPS},
    )


def _check_options(
    *,
    wholes: dict[str, tuple[int, int]],
    shares: dict[str, float],
    temperature: float,
    lambdas: Sequence[float],
    sample_from: str,
) -> None:
    """Raises for the first option out of its range; `wholes` has values with their minima. NaN is refused too."""
    for name, (value, least) in wholes.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` must lie between 0 and 1, got {share}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}. Use 1.0.")
    for gopd_lambda in lambdas:
        if not 0 <= gopd_lambda < math.inf:
            raise ValueError(f"`lambdas` must be finite and >= 0, got {gopd_lambda}. Use a grid such as {LAMBDAS}.")
    if sample_from not in ("teacher", "student"):
        raise ValueError(f"`sample_from` must be 'teacher' or 'student', got {sample_from!r}.")


def _check_rewards(reward_funcs: Callable | Sequence[Callable] | None) -> list[Callable]:
    given: Any = [] if reward_funcs is None else reward_funcs
    functions: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    for function in functions:
        if not callable(function) or isinstance(function, nn.Module) or inspect.iscoroutinefunction(function):
            raise TypeError(
                f"`reward_funcs` must be plain functions of prompts and completions, got {function!r:.100}. Wrap a "
                "reward model or a coroutine in one."
            )
    return functions


def _read(path: Path, split: str, name: str | None) -> Dataset:
    """A data set from a file, a folder or a name."""
    try:
        if not path.is_file():
            return load_dataset(str(path), name=name, split=split)
        if path.suffix in FILE_FORMATS:
            return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            return Dataset.from_dict({"prompt": [line for line in lines if line.strip()]})
    except (OSError, ValueError, DatasetsError, StopIteration) as error:  # the last one from an empty JSON file
        reason = str(error) or "it is empty"
        raise ValueError(f"No prompts could be loaded from {str(path)!r} ({reason}). {ACCEPTED}") from error
    raise ValueError(f"The file {str(path)!r} has the unknown ending {path.suffix!r}. {ACCEPTED}")


def _choose(rows: Dataset, count: int, seed: int) -> Dataset:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return rows.select([order[index % len(order)] for index in range(count)])


def _tokenize(tokenizer, rows: Dataset) -> list[list[int]]:
    prompts = list(rows["prompt"])
    is_text = isinstance(prompts[0], str)
    if not is_text and not getattr(tokenizer, "chat_template", None):
        raise ValueError("Prompts of messages need a tokenizer with a chat template, got one without. Give strings.")
    encoded = []
    for prompt in prompts:
        if is_text:
            ids = tokenizer(prompt)["input_ids"]
        elif isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            raise TypeError(
                f"A `prompt` must be a string or a list of messages with `role` and `content`, got {prompt!r:.100}. "
                f"{ACCEPTED}"
            )
        if not ids:
            raise ValueError(f"The prompt {prompt!r:.100} has no tokens. Remove the row.")
        encoded.append(ids)
    return encoded


def _tokenizer_of(given: str | nn.Module) -> PreTrainedTokenizerBase:
    source = given if isinstance(given, str) else given.config._name_or_path
    try:
        if not source:
            raise OSError("it was not loaded from a path")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The student's tokenizer cannot be loaded ({str(error).splitlines()[0]}). Pass it as `processing_class`."
        ) from error


def _load(given: dict[str, str | nn.Module], init_kwargs: dict[str, Any] | None) -> dict[str, nn.Module]:
    """The models by role; one that has two roles is loaded once."""
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
        except (OSError, ValueError) as error:  # what transformers raises for a missing folder, a broken one, no hub
            raise ValueError(
                f"`{role}` {each!r} cannot be loaded ({str(error).splitlines()[0]}). Name a folder that "
                "`save_pretrained` wrote, or a model of the Hub."
            ) from error
        models[role] = by_name[each]
    return models


def _freeze(model: nn.Module, role: str, temperature: float, batch_size: int, chunk_size: int) -> LocalScorer:
    # What `LocalScorer` asks of an accelerator. A real one would leave global state behind, which the trainer reads.
    device = (model.get_base_model() if hasattr(model, "get_base_model") else model).device
    alone = SimpleNamespace(device=device, state=SimpleNamespace(deepspeed_plugin=None), autocast=nullcontext)
    return LocalScorer(
        model, accelerator=alone, temperature=temperature, batch_size=batch_size, chunk_size=chunk_size, role=role
    )


def _check_context(frozen: dict[str, LocalScorer], prompt_ids: list[list[int]], max_completion_length: int) -> None:
    longest = max(map(len, prompt_ids))
    for role, each in frozen.items():
        context = getattr(each.inner.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and longest + max_completion_length > context:
            raise ValueError(
                f"The longest prompt has {longest} tokens and a completion up to {max_completion_length}, but "
                f"`{role}` has a context of {context}. Lower `max_completion_length`, or leave long prompts out."
            )


def _eos_ids(tokenizer, models) -> list[int]:
    """The ids that end a completion: the tokenizer's, and those that the models declare, as for GRPO."""
    declared = [tokenizer.eos_token_id]
    for model in models:
        ids = model.generation_config.eos_token_id
        declared += ids if isinstance(ids, list) else [ids]
    return sorted({index for index in declared if index is not None})


@contextmanager
def _restored(models) -> Iterator[None]:
    """Evaluation modes and gradient flags of the models are after the body what they were before."""
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluation_mode(model))
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def _blank_generation_config(base: PreTrainedModel) -> Iterator[None]:
    # `generate` fills what is None from the model's own: a top-k or a repetition penalty would bias the states.
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _device(frozen: LocalScorer) -> torch.device:
    return frozen.inner.base.get_input_embeddings().weight.device


def _hidden(frozen: LocalScorer, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states `(B, L - 1, D)` that predict every id after the first."""
    device = _device(frozen)
    ids, mask = ids.to(device), mask.to(device)
    everything = Sequences(ids, mask, torch.ones_like(ids[:, 1:], dtype=torch.bool))
    return frozen.hidden(everything).view(len(ids), ids.size(1) - 1, -1).to(device)


def _name_of(given: Any) -> str:
    if isinstance(given, nn.Module):
        given = given.config._name_or_path or type(given).__name__
    return given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
