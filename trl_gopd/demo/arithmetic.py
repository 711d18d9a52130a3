"""
Arithmetic on two-digit numbers: the task of the demo, which small models learn from scratch in about a minute.

A prompt is `47+38=` and its answer is `58`, which is 85 with the units digit first, the order in which carries arise.
A base model is trained on data in which a fraction of the answers is wrong, and therefore samples wrong answers about
as often. The teacher is the base model after reinforcement learning with exact answers as the reward. A quarter of the
pairs of numbers is held out from all training, and accuracy is measured on these pairs only. The operation is addition
by default. All operations use the same split.

Nothing is downloaded: the module creates vocabulary, models and data. All training uses the trainers of TRL.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_gopd import GOPDConfig, GOPDTrainer


OPERANDS = range(10, 100)
# The largest sum, 198, has three digits, and one more token ends the answer.
MAX_COMPLETION_LENGTH = 4
PROMPT_LENGTH = 6
# The split does not depend on the seed of a run, so that models with different seeds are compared on the same pairs.
SPLIT_SEED = 0
HELD_OUT_FRACTION = 0.25

# Options of all trainers. The models are too small to gain from lower precision.
CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Size:
    """
    Width and depth of a Llama model.

    Args:
        hidden_size (`int`): Hidden size; a multiple of 4, the number of attention heads.
        num_layers (`int`): Number of layers.
    """

    hidden_size: int
    num_layers: int


@dataclass(frozen=True)
class Operation:
    """
    Arithmetic operation on two numbers.

    Args:
        sign (`str`): Character between the two numbers.
        answers (`Callable`): Maps pairs `(rows, 2)` to answers `(rows,)`, both int64.
        possible (`range`): Range of the answers, which have at most three digits.
    """

    sign: str
    answers: Callable[[Tensor], Tensor]
    possible: range


ADDITION = Operation("+", lambda pairs: pairs.sum(1), range(2 * min(OPERANDS), 2 * max(OPERANDS) + 1))
DIFFERENCE = Operation("-", lambda pairs: (pairs[:, 0] - pairs[:, 1]).abs(), range(len(OPERANDS)))
OPERATIONS = {"addition": ADDITION, "difference": DIFFERENCE}


def build_tokenizer(operations: Sequence[Operation] = (ADDITION,)) -> PreTrainedTokenizerFast:
    """
    Builds a tokenizer with one token for each character. The vocabulary consists of tokens for padding and the end of
    a sequence, the digits, `+`, `=`, and the signs of further operations.

    Example:

    ```python
    >>> from trl_gopd.demo.arithmetic import build_tokenizer

    >>> tokenizer = build_tokenizer()
    >>> tokenizer("47+38=").input_ids
    [6, 9, 12, 5, 10, 13]

    ```
    """
    # A `dict` keeps the first position of a repeated key, so the sign of addition keeps its index.
    tokens = dict.fromkeys(["<pad>", "<eos>", *"0123456789+=", *(operation.sign for operation in operations)])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=PROMPT_LENGTH + MAX_COMPLETION_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, size: Size, *, seed: int) -> LlamaForCausalLM:
    """Builds a float32 Llama model with random weights. The global random state is not changed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.5 / math.sqrt(size.hidden_size),
        # Sequences have ten tokens. With the usual base of 10,000 most rotary frequencies hardly change over that
        # length, and addition is learned much later.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def operands(split: str) -> Tensor:
    """
    Returns all pairs of numbers of a split in a shuffled order, `(rows, 2)` int64. The two splits are disjoint and do
    not depend on seed or operation.

    Args:
        split (`str`): `"train"` or `"test"`.
    """
    numbers = torch.tensor(list(OPERANDS))
    pairs = torch.cartesian_prod(numbers, numbers)
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    held_out = round(HELD_OUT_FRACTION * len(pairs))
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    return pairs[:held_out] if split == "test" else pairs[held_out:]


def noisy_answers(
    pairs: Tensor, *, noise: float, generator: torch.Generator, operation: Operation = ADDITION
) -> Tensor:
    """
    Returns answers `(rows,)` int64 to `pairs` `(rows, 2)`, each of which is wrong with probability `noise`.

    A wrong answer is drawn uniformly from all other possible answers of the operation.
    """
    answers = operation.answers(pairs)
    smallest, candidates = operation.possible.start, len(operation.possible)
    is_wrong = torch.rand(len(pairs), generator=generator) < noise
    # A cyclic shift by at least one and less than the number of candidates never returns the correct answer.
    shift = torch.randint(1, candidates, (len(pairs),), generator=generator)
    return torch.where(is_wrong, (answers - smallest + shift) % candidates + smallest, answers)


def written(number: int) -> str:
    """
    Returns a number as the models write it, with the units digit first.

    Example:

    ```python
    >>> from trl_gopd.demo.arithmetic import written

    >>> written(125)
    '521'

    ```
    """
    return str(number)[::-1]


def prompts(pairs: Tensor, operation: Operation = ADDITION) -> Dataset:
    """Returns a dataset with the string columns `prompt` and `answer`."""
    answers = operation.answers(pairs).tolist()
    return Dataset.from_dict(
        {
            "prompt": [f"{a}{operation.sign}{b}=" for a, b in pairs.tolist()],
            "answer": [written(answer) for answer in answers],
        }
    )


def exact_answer(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """Reward function in the form that TRL expects: 1 if the completion is exactly the answer, 0 otherwise."""
    return [float(given == expected) for given, expected in zip(completions, answer, strict=True)]


def answered(
    tokenizer: PreTrainedTokenizerFast,
    *,
    rows: int,
    noise: float,
    seed: int,
    operations: Sequence[Operation] = (ADDITION,),
) -> Dataset:
    """
    Returns tokenized training prompts with noisy answers, drawn with replacement, in the form that [`~trl.SFTTrainer`]
    accepts.

    Each operation has the same number of rows, `rows` divided by the number of operations and rounded up. The
    operations follow one another.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for operation in operations:
        pairs = operands("train")
        pairs = pairs[torch.randint(len(pairs), (-(-rows // len(operations)),), generator=generator)]
        answers = noisy_answers(pairs, noise=noise, generator=generator, operation=operation)
        texts += [
            f"{a}{operation.sign}{b}={written(answer)}{tokenizer.eos_token}"
            for (a, b), answer in zip(pairs.tolist(), answers.tolist(), strict=True)
        ]
    input_ids = tokenizer(texts).input_ids
    labels = [[-100] * PROMPT_LENGTH + ids[PROMPT_LENGTH:] for ids in input_ids]  # the loss covers the answer only
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels})


def train_base(
    tokenizer: PreTrainedTokenizerFast,
    size: Size,
    *,
    steps: int,
    noise: float,
    seed: int,
    output_dir: str,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    operations: Sequence[Operation] = (ADDITION,),
    callbacks: list[TrainerCallback] | None = None,
) -> PreTrainedModel:
    """
    Trains a model on noisy answers with [`~trl.SFTTrainer`], in one epoch, and saves it in `output_dir` together with
    the tokenizer. Returns the model.
    """
    trainer = SFTTrainer(
        model=build_model(tokenizer, size, seed=seed),
        args=SFTConfig(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            adam_beta2=0.98,
            warmup_steps=steps // 20,
            dataset_kwargs={"skip_prepare_dataset": True},  # the data is tokenized already
            seed=seed,
            **CPU,
        ),
        train_dataset=answered(tokenizer, rows=steps * batch_size, noise=noise, seed=seed, operations=operations),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return _saved(trainer, output_dir)


def train_teacher(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    seed: int,
    output_dir: str,
    prompts_per_step: int = 64,
    num_generations: int = 8,
    learning_rate: float = 1e-4,
    operation: Operation = ADDITION,
    callbacks: list[TrainerCallback] | None = None,
) -> PreTrainedModel:
    """
    Trains `base` in place with [`~trl.GRPOTrainer`] and [`exact_answer`] as the reward, and saves it in `output_dir`
    together with the tokenizer. Returns the model.
    """
    trainer = GRPOTrainer(
        model=base,
        reward_funcs=exact_answer,
        args=GRPOConfig(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=prompts_per_step * num_generations,
            num_generations=num_generations,
            max_completion_length=MAX_COMPLETION_LENGTH,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            seed=seed,
            **CPU,
        ),
        train_dataset=prompts(operands("train"), operation),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return _saved(trainer, output_dir)


def train_student(
    student: str,
    teacher_model: str | dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    train_dataset: Dataset,
    *,
    gopd_lambda: float,
    estimator: str,
    steps: int,
    seed: int,
    output_dir: str,
    batch_size: int,
    learning_rate: float,
    ref_model: str | None = None,
) -> PreTrainedModel:
    """
    Trains the model in the folder `student` with [`GOPDTrainer`] and saves it in `output_dir` together with the
    tokenizer. Returns the model.
    """
    trainer: Any = GOPDTrainer(
        model=student,
        teacher_model=teacher_model,
        ref_model=ref_model,
        args=GOPDConfig(
            output_dir=output_dir,
            gopd_lambda=gopd_lambda,
            gopd_estimator=estimator,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            max_completion_length=MAX_COMPLETION_LENGTH,
            learning_rate=learning_rate,
            seed=seed,
            **CPU,
        ),
        train_dataset=train_dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    return _saved(trainer, output_dir)


def _saved(trainer: Trainer, folder: str) -> PreTrainedModel:
    trainer.model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    return trainer.model


def load(folder: str | PathLike[str]) -> PreTrainedModel:
    """Loads a model from a folder."""
    return AutoModelForCausalLM.from_pretrained(folder)


@dataclass(frozen=True)
class Evaluation:
    """
    Result of sampling answers to the held-out pairs.

    Args:
        accuracy (`float`): Fraction of exact answers.
        n (`int`): Number of sampled answers.
        kl_to_teacher (`float`, *optional*): KL(model ‖ teacher) in nats per sampled token.
        length (`float`): Mean number of tokens of an answer, including the end token.
    """

    accuracy: float
    n: int
    kl_to_teacher: float | None
    length: float


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    n: int,
    seed: int,
    teacher: PreTrainedModel | None = None,
    operation: Operation = ADDITION,
    batch_size: int = 2048,
) -> Evaluation:
    """
    Samples `n` answers to the held-out pairs at temperature 1, about equally many for each pair, and scores them.

    The divergence from `teacher` is computed exactly at every sampled token by summing over the vocabulary. The global
    random state is not changed.
    """
    pairs = operands("test")
    pairs = pairs.repeat(-(-n // len(pairs)), 1)[:n]
    rows = prompts(pairs, operation)
    model.eval()
    correct, tokens, divergence = 0.0, 0, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, n, batch_size):
            batch = rows[start : start + batch_size]
            inputs = tokenizer(batch["prompt"], return_tensors="pt")
            ids = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_COMPLETION_LENGTH,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            completions = ids[:, PROMPT_LENGTH:]
            mask = (completions == tokenizer.eos_token_id).cumsum(1).roll(1, 1)
            mask[:, 0] = 0
            mask = mask == 0  # all tokens up to and including the end token
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            correct += sum(exact_answer(texts, batch["answer"]))
            tokens += int(mask.sum())
            if teacher is not None:
                student_logps, teacher_logps = (
                    each(input_ids=ids).logits[:, PROMPT_LENGTH - 1 : -1].float().log_softmax(-1)
                    for each in (model, teacher.eval())
                )
                kl = (student_logps.exp() * (student_logps - teacher_logps)).sum(-1)
                divergence += float(kl[mask].sum())
    return Evaluation(
        accuracy=correct / n,
        n=n,
        kl_to_teacher=None if teacher is None else divergence / tokens,
        length=tokens / n,
    )
