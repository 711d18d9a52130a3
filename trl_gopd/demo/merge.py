"""
Scene "merge" of the demo: merges two experts into the base model that both were trained from.

A base model learns two operations from noisy answers, and GRPO trains one expert for each operation on the prompts of
that operation only. `GOPDTrainer` then distills both experts into the base model at several λ. It trains on prompts of
both operations, each row has the expert of its operation as the teacher, and the base model is the reference. The
scene compares these students with two methods that need no training: the mean of the experts' weights, and the
extrapolation from the base model through that mean ([ExPO](https://huggingface.co/papers/2404.16792)).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import results
from .results import Row
from .workers import run_stages


if TYPE_CHECKING:
    from datasets import Dataset

    from .arithmetic import Operation


DOMAINS = ("addition", "difference")
LAMBDAS = (1.0, 1.25, 1.5)
ESTIMATORS = ("sampled", "full")
# Step from the base model towards the mean of the experts, in units of their distance: 1 is the mean.
ALPHAS = (1.0, 1.25, 1.5)
KIND = ("model", "lambda", "alpha", "estimator")
GAIN = ("gain_over_teacher", "gain_standard_error")


@dataclass(frozen=True)
class Settings:
    """
    Model sizes and training lengths of the scene. By default, each domain has as many rows in each stage as the only
    domain of the scene "distill".

    Args:
        base (`tuple[int, int]`): Hidden size and number of layers of every model.
        noise (`float`): Fraction of wrong answers in the training data of the base model.
        base_steps, expert_steps, student_steps (`int`): Optimizer steps of each stage.
        base_batch_size (`int`): Rows per step of pretraining, for both domains together.
        base_learning_rate, expert_learning_rate, student_learning_rate (`float`): Learning rate of each stage.
        batch_size (`int`): Completions per step of distillation, for both domains together.
        n (`int`): Sampled answers per evaluation, in each domain.
    """

    base: tuple[int, int] = (64, 2)
    noise: float = 0.25
    base_steps: int = 2000
    base_batch_size: int = 128
    base_learning_rate: float = 4e-3
    expert_steps: int = 60
    expert_learning_rate: float = 1e-4
    student_steps: int = 200
    student_learning_rate: float = 5e-4
    batch_size: int = 256
    n: int = 8100


def merge_weights(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], *, alpha: float
) -> dict[str, Tensor]:
    """
    Returns the weights base + α·(mean of `experts` − base) in the dtypes and shapes of `base`. The result shares no
    memory with the inputs.

    Args:
        base (`Mapping[str, torch.Tensor]`):
            State dictionary of the model that the experts were trained from.
        experts (`Sequence[Mapping[str, torch.Tensor]]`):
            State dictionaries of the experts, with the same names and shapes.
        alpha (`float`):
            Step size. 0 gives the base, 1 gives the mean, and values above 1 extrapolate beyond the mean.
            [ExPO](https://huggingface.co/papers/2404.16792) counts its α from the mean, so that its α is this value
            minus 1.

    Raises:
        `ValueError`: If `experts` is empty, or if names or shapes differ from those of `base`.
    """
    if not experts:
        raise ValueError("`experts` must hold at least one state dictionary, got none.")
    shapes = {name: weight.shape for name, weight in base.items()}
    for index, expert in enumerate(experts):
        given = {name: weight.shape for name, weight in expert.items()}
        if differing := sorted(n for n in shapes.keys() | given.keys() if shapes.get(n) != given.get(n)):
            name = differing[0]
            raise ValueError(
                f"`experts[{index}]` must have the names and shapes of `base`, got {given.get(name)} for {name!r}, "
                f"which in `base` is {shapes.get(name)}. Merge models trained from one base."
            )
    # `lerp` returns its end points exactly.
    return {
        name: weight.lerp(torch.stack([expert[name] for expert in experts]).mean(0), alpha)
        for name, weight in base.items()
    }


def _make_base(folder: Path, seed: int, settings: Settings) -> list[Row]:
    from . import arithmetic as task

    operations = _operations()
    task.train_base(
        task.build_tokenizer(operations),
        task.Size(*settings.base),
        steps=settings.base_steps,
        noise=settings.noise,
        seed=seed,
        batch_size=settings.base_batch_size,
        learning_rate=settings.base_learning_rate,
        operations=operations,
        output_dir=str(folder / "base"),
    )
    return []


def _make_expert(folder: Path, seed: int, settings: Settings, domain: str) -> list[Row]:
    from . import arithmetic as task

    task.train_teacher(
        task.load(folder / "base"),
        task.build_tokenizer(_operations()),
        steps=settings.expert_steps,
        seed=seed,
        learning_rate=settings.expert_learning_rate,
        operation=task.OPERATIONS[domain],
        output_dir=str(folder / _expert(domain)),
    )
    return []


def _judge_untrained(folder: Path, seed: int, settings: Settings) -> list[Row]:
    """Evaluates the models that need no distillation: the base, the experts, and the experts' merged weights."""
    from . import arithmetic as task

    names = [_expert(domain) for domain in DOMAINS]
    rows = [row for name in ("base", *names) for row in _judge(folder, name, seed, settings, model=name)]
    merged = task.load(folder / "base")
    base = {name: weight.clone() for name, weight in merged.state_dict().items()}
    experts = [task.load(folder / name).state_dict() for name in names]
    for alpha in ALPHAS:
        merged.load_state_dict(merge_weights(base, experts, alpha=alpha))
        merged.save_pretrained(folder / f"weights-{alpha}")
        rows += _judge(folder, f"weights-{alpha}", seed, settings, model="weights", alpha=alpha)
    return rows


def _distil(folder: Path, seed: int, settings: Settings, *, gopd_lambda: float, estimator: str) -> list[Row]:
    from . import arithmetic as task

    name = f"student-{gopd_lambda}-{estimator}"
    task.train_student(
        str(folder / "base"),
        {domain: str(folder / _expert(domain)) for domain in DOMAINS},
        task.build_tokenizer(_operations()),
        train_rows(),
        gopd_lambda=gopd_lambda,  # the reference is the default, the initial student, which is the base of the experts
        estimator=estimator,
        steps=settings.student_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.student_learning_rate,
        seed=seed,
        output_dir=str(folder / name),
    )
    return _judge(folder, name, seed, settings, model="student", gopd_lambda=gopd_lambda, estimator=estimator)


def train_rows() -> "Dataset":
    """Returns a [`~datasets.Dataset`] with the training prompts of all domains and the domain as `teacher_id`."""
    from datasets import concatenate_datasets

    from . import arithmetic as task

    domains = [task.prompts(task.operands("train"), operation) for operation in _operations()]
    return concatenate_datasets(
        [rows.add_column("teacher_id", [name] * len(rows)) for name, rows in zip(DOMAINS, domains, strict=True)]
    )


def _judge(
    folder: Path,
    name: str,
    seed: int,
    settings: Settings,
    *,
    model: str,
    gopd_lambda: float | None = None,
    alpha: float | None = None,
    estimator: str | None = None,
) -> list[Row]:
    """
    Evaluates the model that is saved as `name` and returns one row for each domain. The divergence of a row is
    measured from the expert of its domain.
    """
    from . import arithmetic as task

    tokenizer = task.build_tokenizer(_operations())
    rows = []
    for domain, operation in zip(DOMAINS, _operations(), strict=True):
        evaluation = task.evaluate(
            task.load(folder / name),
            tokenizer,
            n=settings.n,
            seed=seed,
            teacher=task.load(folder / _expert(domain)),
            operation=operation,
        )
        kind = dict(zip(KIND, (model, gopd_lambda, alpha, estimator), strict=True))
        rows.append({"seed": seed, "domain": domain, **kind, **asdict(evaluation)})
    return rows


def _operations() -> "list[Operation]":
    from . import arithmetic as task

    return [task.OPERATIONS[domain] for domain in DOMAINS]


def _expert(domain: str) -> str:
    return f"{domain}_expert"


def run(
    *,
    seeds: int,
    output_dir: Path,
    lambdas: Sequence[float] = LAMBDAS,
    estimators: Sequence[str] = ESTIMATORS,
    settings: Settings | None = None,
    workers: int = 2,
) -> Row:
    """
    Runs the scene for each seed and returns the contents of the JSON file.

    Args:
        seeds (`int`): Number of seeds, which start at 0.
        output_dir (`Path`): Folder for the models. It is created if it does not exist.
        lambdas (`Sequence[float]`): λ of the students.
        estimators (`Sequence[str]`): Estimators of the students.
        settings ([`Settings`], *optional*): Model sizes and training lengths.
        workers (`int`, *optional*, defaults to `2`): Number of processes, each with one thread.

    Returns:
        `dict`: `rows` with the keys `seed`, `domain`, `model`, `lambda`, `alpha`, `estimator`, `accuracy`, `n`,
        `kl_to_teacher` and `length`, their `summary` over seeds, and how the result was produced. The teacher of a row
        is the expert of its domain.
    """
    settings = settings or Settings()
    start = time.perf_counter()
    bases, experts, students = [], [], []
    for seed in range(seeds):
        common = (Path(output_dir) / "merge_models" / f"seed{seed}", seed, settings)
        bases.append(partial(_make_base, *common))
        experts += [partial(_make_expert, *common, domain) for domain in DOMAINS]
        students.append(partial(_judge_untrained, *common))
        students += [
            partial(_distil, *common, gopd_lambda=gopd_lambda, estimator=estimator)
            for estimator in estimators
            for gopd_lambda in lambdas
        ]
    rows = run_stages({"bases": bases, "experts": experts, "students": students}, workers=workers)
    order = {name: index for index, name in enumerate(("base", *map(_expert, DOMAINS), "weights", "student"))}
    rows.sort(
        key=lambda r: (
            order[r["model"]],
            *(r["estimator"] or "", r["lambda"] or 0, r["alpha"] or 0),
            *(DOMAINS.index(r["domain"]), r["seed"]),
        )
    )
    return results.report(settings=asdict(settings), start=start, rows=rows, summary=summarize(rows))


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Averages the rows over seeds and compares them with the expert of their domain: [`~results.summarize`]."""
    experts = {(row["seed"], row["domain"]): row for row in rows if row["model"] == _expert(row["domain"])}
    return results.summarize(rows, by=("domain", *KIND), teacher_of=lambda row: experts[row["seed"], row["domain"]])


def by_kind(summary: Sequence[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Groups the summary: the values of the columns `KIND` map to the rows of all domains, by domain."""
    kinds: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in summary:
        kinds.setdefault(tuple(row[name] for name in KIND), {})[row["domain"]] = row
    return kinds


def print_table(result: Row) -> None:
    """Prints the summary as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Two experts, one model: sampled answers to held-out pairs, ± one standard error")
    for name in ("model", "scale", "estimator"):
        table.add_column(name)
    for domain in DOMAINS:
        for name in (domain, "against its expert", "KL to it"):
            table.add_column(name, justify="right")
    for (model, gopd_lambda, alpha, estimator), row_of in by_kind(result["summary"]).items():
        scale = "" if gopd_lambda is None else f"λ = {gopd_lambda:g}"
        cells = [model.replace("_", " "), scale if alpha is None else f"α = {alpha:g}", estimator or ""]
        for row in map(row_of.__getitem__, DOMAINS):
            gain = row["gain_over_teacher"]
            cells += [
                results.with_error(row["accuracy"], row["standard_error"]),
                "" if gain is None else results.with_error(gain, row["gain_standard_error"], signed=True),
                f"{row['kl_to_teacher']:.3f}",
            ]
        table.add_row(*cells)
    Console(width=max(140, Console().width)).print(table)


def draw(result: Row, path: Path) -> None:
    """
    Draws the accuracy gain over the experts, with one axis for each domain. Lines connect models that differ in λ or α
    only.
    """
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[str, dict[str, Row]]]] = {}
    for (model, gopd_lambda, alpha, estimator), row_of in by_kind(result["summary"]).items():
        label = ", ".join(part for part in (model.replace("_", " "), estimator) if part)
        scale = f"{gopd_lambda or alpha:g}" if gopd_lambda or alpha else ""
        series.setdefault(label, []).append((scale, row_of))
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate(series.items()):
        (x, x_error), (y, y_error) = (
            # The gain of an expert over itself is `None` in its own domain.
            [[row_of[domain][field] or 0.0 for _, row_of in points] for field in GAIN]
            for domain in DOMAINS
        )
        axes.errorbar(x, y, y_error, x_error, marker="o", markersize=4, capsize=2, linewidth=1, label=label)
        shift = (6, -11) if index % 2 else (-20, 6)  # keeps the labels of neighbouring lines apart
        for (scale, _), x_value, y_value in zip(points, x, y, strict=True):
            axes.annotate(scale, (x_value, y_value), xytext=shift, textcoords="offset points", fontsize="small")
    axes.axvline(0, color="black", linestyle=":", linewidth=1)
    axes.axhline(0, color="black", linestyle=":", linewidth=1)
    across, up = (f"{domain}: accuracy beyond its expert's" for domain in DOMAINS)
    axes.set(xlabel=across, ylabel=up, title="Two experts merged into their base\n(numbers: λ or α)")
    axes.legend()
    figure.savefig(path, dpi=150)
