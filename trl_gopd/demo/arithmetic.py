"""
Arithmetic on two-digit numbers, learned from scratch in a minute: the task on which the demo distils.

A prompt is `47+38=`, and its answer `58`: 85 with the units first, the order in which carries arise. A base model is
trained on answers of which a share is wrong, so it samples wrong answers about as often. The teacher is that base
after some reinforcement learning on exact answers. A quarter of the pairs of numbers is held out of all training, and
accuracy is measured on those alone. The operation is addition unless another one is asked for; all have one split.

Nothing is downloaded: vocabulary, models and data are made here. All training is done by TRL's own trainers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike

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
# The largest sum, 198, has three digits; one more token ends the answer.
MAX_COMPLETION_LENGTH = 4
PROMPT_LENGTH = 6
# Which pairs are held out does not depend on the seed of a run: models of different seeds are compared on the same.
SPLIT_SEED = 0
HELD_OUT_SHARE = 0.25

# Float32 and one thread: the models are too small to gain from anything else.
CPU = {
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
    Width and depth of a Llama.

    Args:
        hidden_size (`int`): Width; a multiple of 4, the number of heads.
        num_layers (`int`): Depth.
    """

    hidden_size: int
    num_layers: int


@dataclass(frozen=True)
class Operation:
    """
    What is done with two numbers.

    Args:
        sign (`str`): The character between them.
        answers (`Callable`): From pairs `(rows, 2)` to answers `(rows,)`, int64 both.
        possible (`range`): What an answer can be, no more than three digits long.
    """

    sign: str
    answers: Callable[[Tensor], Tensor]
    possible: range


ADDITION = Operation("+", lambda pairs: pairs.sum(1), range(2 * min(OPERANDS), 2 * max(OPERANDS) + 1))
DIFFERENCE = Operation("-", lambda pairs: (pairs[:, 0] - pairs[:, 1]).abs(), range(len(OPERANDS)))
OPERATIONS = {"addition": ADDITION, "difference": DIFFERENCE}


def build_tokenizer(operations: Sequence[Operation] = (ADDITION,)) -> PreTrainedTokenizerFast:
    """
    One token a character: the digits, `+` and `=`, and one each for padding and the end; then other operations' signs.

    Example:

    ```python
    >>> from trl_gopd.demo.arithmetic import build_tokenizer

    >>> tokenizer = build_tokenizer()
    >>> tokenizer("47+38=").input_ids
    [6, 9, 12, 5, 10, 13]

    ```
    """
    # `dict`: addition's own sign, if it is among `operations`, keeps its place
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
    """A Llama in float32 with random weights. The global random state is left as it was."""
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
        # Ten tokens: at the usual base of 10,000 most frequencies hardly turn, and addition is learned far later.
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
    All pairs of numbers of a split, shuffled, `(rows, 2)` int64. The two splits are disjoint, for every seed and
    across operations.

    Args:
        split (`str`): `"train"` or `"test"`.
    """
    numbers = torch.tensor(list(OPERANDS))
    pairs = torch.cartesian_prod(numbers, numbers)
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    held_out = round(HELD_OUT_SHARE * len(pairs))
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    return pairs[:held_out] if split == "test" else pairs[held_out:]


def noisy_answers(
    pairs: Tensor, *, noise: float, generator: torch.Generator, operation: Operation = ADDITION
) -> Tensor:
    """
    Answers `(rows,)` int64 to `pairs` `(rows, 2)`, of which each is wrong with probability `noise`.

    A wrong answer is another number that the operation's answer can be, each equally likely.
    """
    answers = operation.answers(pairs)
    smallest, candidates = operation.possible.start, len(operation.possible)
    is_wrong = torch.rand(len(pairs), generator=generator) < noise
    # A shift of at least one and less than the number of candidates, taken round, never ends where it began.
    shift = torch.randint(1, candidates, (len(pairs),), generator=generator)
    return torch.where(is_wrong, (answers - smallest + shift) % candidates + smallest, answers)


def written(number: int) -> str:
    """
    A number as the models write it, units first.

    Example:

    ```python
    >>> from trl_gopd.demo.arithmetic import written

    >>> written(125)
    '521'

    ```
    """
    return str(number)[::-1]


def prompts(pairs: Tensor, operation: Operation = ADDITION) -> Dataset:
    """Rows `{prompt, answer}`, both strings."""
    answers = operation.answers(pairs).tolist()
    return Dataset.from_dict(
        {
            "prompt": [f"{a}{operation.sign}{b}=" for a, b in pairs.tolist()],
            "answer": [written(answer) for answer in answers],
        }
    )


def exact_answer(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """Reward of 1 for the right number and nothing else, 0 otherwise, in the form TRL asks of a reward function."""
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
    Tokenized training prompts with noisy answers, drawn with repetition, in the form [`~trl.SFTTrainer`] takes.

    Operations have equal shares of `rows`, rounded up, one after the other.
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
    labels = [[-100] * PROMPT_LENGTH + ids[PROMPT_LENGTH:] for ids in input_ids]  # only the answer is learned
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
    A model that has learned from noisy answers with [`~trl.SFTTrainer`], each training row seen once. It is saved in
    `output_dir`, with the tokenizer.
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
            dataset_kwargs={"skip_prepare_dataset": True},  # it is tokenized already
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
    `base` after `steps` of [`~trl.GRPOTrainer`] with [`exact_answer`] as reward, saved as [`train_base`] does. `base`
    itself is changed.
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
    """The model in the folder `student` after `steps` of [`GOPDTrainer`], saved as [`train_base`] does."""
    trainer = GOPDTrainer(
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


def load(folder: str | PathLike) -> PreTrainedModel:
    """A model that was saved."""
    return AutoModelForCausalLM.from_pretrained(folder)


@dataclass(frozen=True)
class Evaluation:
    """
    What sampling on held-out pairs shows.

    Args:
        accuracy (`float`): Share of exact answers.
        n (`int`): Sampled answers.
        kl_to_teacher (`float`, *optional*): KL(model ‖ teacher), nats per sampled token.
        length (`float`): Mean tokens of an answer, the end included.
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
    Samples `n` answers at temperature 1 to the held-out pairs, each about equally often, and judges them.

    The divergence from `teacher` is exact at every sampled token: the vocabulary is small enough to sum over. The
    global random state is left as it was.
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
            mask = mask == 0  # up to the end, which is included
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
