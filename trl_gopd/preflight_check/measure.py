"""
Measurements of what each λ does at the states of sampled completions.

Teacher and reference are run once on the completions, and the
target q_λ follows from their log-probabilities.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..gopd.batch import Sequences
from ..gopd.divergence import chunk_slices
from ..gopd.frozen.local import LocalScorer
from ..gopd.objective import expectation, extrapolate
from ..gopd.rollouts import pad_ids
from .findings import CLIPS, QUANTILES, LambdaEffect, LogRatios
from .models import Models
from .options import Options


# These are rules of thumb, which are not taken from a paper.
OFF_TEACHER = 1e-3  # An id counts as unlikely under the teacher below this probability.
DETERMINISTIC = 0.9  # The teacher counts as near-certain of an id above this probability.


@dataclass(frozen=True)
class Measurement:
    """
    What was measured at the N sampled tokens and the L values of λ.

    Args:
        labels (`torch.Tensor` of shape `(N,)`):
            Ids of the sampled tokens, int64.
        log_ratios (`torch.Tensor` of shape `(N,)`):
            log T/R of the sampled tokens, float32 nats.
        top (`torch.Tensor` of shape `(N,)`):
            Probability of the most likely id under the teacher, float32.
        effects (`dict[str, torch.Tensor]`):
            What [`lambda_effects`] returns, each `(N, L)`.
    """

    labels: Tensor
    log_ratios: Tensor
    top: Tensor
    effects: dict[str, Tensor]


def lambda_effects(
    *, teacher_logps: Tensor, reference_logps: Tensor, lambdas: Sequence[float], eos_ids: Sequence[int]
) -> dict[str, Tensor]:
    """
    Returns what each λ does at each state.

    Args:
        teacher_logps (`torch.Tensor` of shape `(N, V)`):
            Normalised log-probabilities T, nats.
        reference_logps (`torch.Tensor` of shape `(N, V)`):
            Normalised log-probabilities R, nats.
        lambdas (`Sequence[float]`):
            The L values of λ.
        eos_ids (`Sequence[int]`):
            Ids that end a completion.

    Returns:
        `dict[str, torch.Tensor]`: Those fields of [`LambdaEffect`] that are means over all states, before the mean is
        taken, each `(N, L)` float32.
    """
    teacher, reference = teacher_logps.float(), reference_logps.float()
    is_unlikely, best = teacher < math.log(OFF_TEACHER), teacher.argmax(-1)
    columns: dict[str, list[Tensor]] = {}
    for gopd_lambda in lambdas:
        log_q, log_z = extrapolate(teacher_logps=teacher, reference_logps=reference, gopd_lambda=gopd_lambda)
        probs = log_q.exp()
        kl = expectation(teacher.exp(), teacher - reference) if gopd_lambda == 1 else log_z / (gopd_lambda - 1)
        values = {
            "renyi": kl,
            "log_z": log_z,
            "kl_to_teacher": expectation(probs, log_q - teacher),
            "entropy": -expectation(probs, log_q),
            "eos_probability": probs[:, list(eos_ids)].sum(-1),
            "flips": (log_q.argmax(-1) != best).float(),
            "off_teacher_mass": (probs * is_unlikely).sum(-1),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.stack(values, 1) for name, values in columns.items()}


def measure(
    models: Models, prompt_ids: list[list[int]], completions: list[list[int]], options: Options
) -> Measurement:
    """
    Measures each λ of the grid at each token of the completions.

    Args:
        models ([`Models`]):
            Teacher and reference.
        prompt_ids (`list[list[int]]`):
            Token ids of the prompts.
        completions (`list[list[int]]`):
            Token ids of one completion for each prompt.
        options ([`Options`]):
            The grid, the batch size and the chunk size.

    Raises:
        `ValueError`: If a measured number is not finite.
    """
    eos_ids = [index for index in models.eos_ids if index < models.vocab_size]
    pieces: dict[str, list[Tensor]] = {}
    for teacher, reference, labels in _log_probs(models, prompt_ids, completions, options):
        values = lambda_effects(
            teacher_logps=teacher, reference_logps=reference, lambdas=options.grid, eos_ids=eos_ids
        )
        values["log_ratios"] = (teacher.gather(1, labels) - reference.gather(1, labels)).squeeze(1)
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
    tokens = torch.tensor([token for ids in completions for token in ids])
    return Measurement(tokens, values.pop("log_ratios"), values.pop("top"), values)


def mean_effects(measurement: Measurement, lambdas: Sequence[float]) -> list[LambdaEffect]:
    """Returns the mean of each effect over all tokens, for each λ."""
    effects = measurement.effects
    means = {name: value.double().mean(0).tolist() for name, value in effects.items()}
    certain = effects["flips"][measurement.top > DETERMINISTIC].double()
    flips = certain.mean(0).tolist() if len(certain) else [None] * len(lambdas)
    return [
        LambdaEffect(
            gopd_lambda=gopd_lambda,
            deterministic_flips=flips[index],
            **{name: each[index] for name, each in means.items()},
        )
        for index, gopd_lambda in enumerate(lambdas)
    ]


def describe_log_ratios(values: Tensor) -> LogRatios:
    """Returns mean, quantiles and tails of log-ratios `(N,)`, N at least 1."""
    values = values.double()
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
    return LogRatios(
        count=len(values),
        mean=float(values.mean()),
        quantiles={f"{q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
        beyond={f"{c:g}": float((values.abs() > c).double().mean()) for c in CLIPS},
    )


def _log_probs(
    models: Models, prompt_ids: list[list[int]], completions: list[list[int]], options: Options
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields T and R `(N, V)` in float32 nats and the sampled ids `(N, 1)`, for at most `chunk_size` tokens each."""
    for part in tqdm(chunk_slices(len(completions), options.batch_size), "Scoring", unit="batch", disable=None):
        rows = [prompt + ids for prompt, ids in zip(prompt_ids[part], completions[part], strict=True)]
        # Rows are padded on the right, so that positions count from the first token in every family.
        ids, mask = pad_ids(rows, side="right", device="cpu")
        starts = torch.tensor([len(prompt) for prompt in prompt_ids[part]]).unsqueeze(1)
        is_sampled = (mask.bool() & (torch.arange(ids.size(1)) >= starts))[:, 1:]
        labels = ids[:, 1:][is_sampled]
        scorers = (models.teacher, models.reference)
        hidden = [_hidden(scorer, Sequences(ids, mask, is_sampled)) for scorer in scorers]
        for tokens in chunk_slices(len(labels), options.chunk_size):
            teacher, reference = (
                scorer.logits(states[tokens])[:, : models.vocab_size].log_softmax(-1)
                for scorer, states in zip(scorers, hidden, strict=True)
            )
            yield teacher, reference.to(teacher.device), labels[tokens].to(teacher.device).unsqueeze(1)


def _hidden(scorer: LocalScorer, sequences: Sequences) -> Tensor:
    device = scorer.inner.base.get_input_embeddings().weight.device
    ids, mask = sequences.input_ids.to(device), sequences.attention_mask.to(device)
    return scorer.hidden(Sequences(ids, mask, sequences.scored))
