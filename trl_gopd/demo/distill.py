"""
Scene "distill" of the demo: a student that is distilled with λ > 1 becomes better than its teacher.

In the first part, a base model learns addition from noisy answers, GRPO trains a teacher from it, and `GOPDTrainer`
distills the teacher back into the base model at several λ. In the second part, strong-to-weak distillation, the
student is a smaller base model. The reference is either the student's initial weights or the base model of the
teacher, which is the reward correction of the paper.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import results
from .results import Row
from .workers import run_stages


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .arithmetic import Evaluation


LAMBDAS = (0.5, 1.0, 1.25, 1.5)
ESTIMATORS = ("sampled", "full")
# Second part: λ and reference of the smaller student. At λ = 1 there is no reference.
CORRECTION = ((1.0, None), (1.25, "student_start"), (1.25, "teacher_base"))


@dataclass(frozen=True)
class Settings:
    """
    Model sizes and training lengths of the scene.

    Args:
        base (`tuple[int, int]`): Hidden size and number of layers of base, teacher and student of the first part.
        small (`tuple[int, int]`): Hidden size and number of layers of the student of the second part.
        noise (`float`): Fraction of wrong answers in the training data of the base models.
        base_steps, teacher_steps, student_steps (`int`): Optimizer steps of each stage.
        base_batch_size (`int`): Rows per step of pretraining.
        base_learning_rate, teacher_learning_rate, student_learning_rate (`float`): Learning rate of each stage.
        batch_size (`int`): Completions per step of distillation.
        n (`int`): Sampled answers per evaluation.
    """

    base: tuple[int, int] = (64, 2)
    small: tuple[int, int] = (32, 1)
    noise: float = 0.25
    base_steps: int = 1000
    base_batch_size: int = 128
    base_learning_rate: float = 4e-3
    teacher_steps: int = 60
    teacher_learning_rate: float = 1e-4
    student_steps: int = 100
    student_learning_rate: float = 5e-4
    batch_size: int = 256
    n: int = 8100


def _row(
    seed: int,
    model: str,
    evaluation: "Evaluation",
    *,
    gopd_lambda: float | None = None,
    estimator: str | None = None,
    reference: str | None = None,
) -> Row:
    return {
        "seed": seed,
        "model": model,
        "lambda": gopd_lambda,
        "estimator": estimator,
        "reference": reference,
        **asdict(evaluation),
    }


def _make_base(path: Path, size: tuple[int, int], seed: int, settings: Settings) -> "PreTrainedTokenizerFast":
    """Trains and saves a base model and returns its tokenizer."""
    from . import arithmetic as task

    tokenizer = task.build_tokenizer()
    task.train_base(
        tokenizer,
        task.Size(*size),
        steps=settings.base_steps,
        noise=settings.noise,
        seed=seed,
        batch_size=settings.base_batch_size,
        learning_rate=settings.base_learning_rate,
        output_dir=str(path),
    )
    return tokenizer


def _make_teacher(folder: Path, seed: int, settings: Settings) -> list[Row]:
    from . import arithmetic as task

    tokenizer = _make_base(folder / "base", settings.base, seed, settings)
    teacher = task.train_teacher(
        task.load(folder / "base"),
        tokenizer,
        steps=settings.teacher_steps,
        seed=seed,
        learning_rate=settings.teacher_learning_rate,
        output_dir=str(folder / "teacher"),
    )
    return [
        _row(seed, name, task.evaluate(task.load(folder / name), tokenizer, n=settings.n, seed=seed, teacher=teacher))
        for name in ("base", "teacher")
    ]


def _make_small_base(folder: Path, seed: int, settings: Settings) -> list[Row]:
    from . import arithmetic as task

    path = folder / "small_base"
    # The offset gives the small model training data that differ from those of the large model.
    tokenizer = _make_base(path, settings.small, seed + 1000, settings)
    return [_row(seed, "small_base", task.evaluate(task.load(path), tokenizer, n=settings.n, seed=seed))]


def _distil(
    folder: Path,
    seed: int,
    settings: Settings,
    *,
    student: str,
    gopd_lambda: float,
    estimator: str,
    reference: str | None,
) -> list[Row]:
    from . import arithmetic as task

    tokenizer = task.build_tokenizer()
    path = folder / f"{student}-{gopd_lambda}-{estimator}-{reference}"
    task.train_student(
        str(folder / student),
        str(folder / "teacher"),
        tokenizer,
        task.prompts(task.operands("train")),
        ref_model=str(folder / "base") if reference == "teacher_base" else None,
        gopd_lambda=gopd_lambda,
        estimator=estimator,
        steps=settings.student_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.student_learning_rate,
        seed=seed,
        output_dir=str(path),
    )
    # The student is reloaded so that the evaluation covers saving and loading.
    evaluation = task.evaluate(
        task.load(path), tokenizer, n=settings.n, seed=seed, teacher=task.load(folder / "teacher")
    )
    model = "student" if student == "base" else "small_student"
    return [_row(seed, model, evaluation, gopd_lambda=gopd_lambda, estimator=estimator, reference=reference)]


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
    Runs both parts of the scene for each seed and returns the contents of the JSON file.

    Args:
        seeds (`int`): Number of seeds, which start at 0.
        output_dir (`Path`): Folder for the models. It is created if it does not exist.
        lambdas (`Sequence[float]`): λ of the first part.
        estimators (`Sequence[str]`): Estimators of the first part.
        settings ([`Settings`], *optional*): Model sizes and training lengths.
        workers (`int`, *optional*, defaults to `2`): Number of processes, each with one thread.

    Returns:
        `dict`: `rows` with the keys `seed`, `model`, `lambda`, `estimator`, `reference`, `accuracy`, `n`,
        `kl_to_teacher` and `length`, their `summary` over seeds, and how the result was produced.
    """
    settings = settings or Settings()
    start = time.perf_counter()
    bases, students = [], []
    for seed in range(seeds):
        folder = Path(output_dir) / "models" / f"seed{seed}"
        bases += [partial(make, folder, seed, settings) for make in (_make_teacher, _make_small_base)]
        jobs = [
            ("base", gopd_lambda, estimator, None if gopd_lambda == 1 else "student_start")
            for estimator in estimators
            for gopd_lambda in lambdas
        ]
        jobs += [("small_base", gopd_lambda, "sampled", reference) for gopd_lambda, reference in CORRECTION]
        students += [
            partial(
                _distil,
                folder,
                seed,
                settings,
                student=student,
                gopd_lambda=gopd_lambda,
                estimator=estimator,
                reference=reference,
            )
            for student, gopd_lambda, estimator, reference in jobs
        ]
    rows = run_stages({"bases and teachers": bases, "students": students}, workers=workers)
    order = {name: index for index, name in enumerate(("base", "teacher", "student", "small_base", "small_student"))}
    rows.sort(
        key=lambda r: (order[r["model"]], r["estimator"] or "", r["lambda"] or 0, r["reference"] or "", r["seed"])
    )
    return results.report(settings=asdict(settings), start=start, rows=rows, summary=summarize(rows))


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Averages the rows over seeds and compares them with the teacher of the same seed: [`~results.summarize`]."""
    teachers = {row["seed"]: row for row in rows if row["model"] == "teacher"}
    return results.summarize(
        rows, by=("model", "lambda", "estimator", "reference"), teacher_of=lambda row: teachers[row["seed"]]
    )


def print_table(result: Row) -> None:
    """Prints the summary as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Two-digit addition: sampled answers to held-out sums, ± one standard error")
    for name in ("model", "λ", "estimator", "reference", "accuracy", "against the teacher", "KL to teacher", "tokens"):
        table.add_column(name, justify="left" if name in ("model", "estimator", "reference") else "right")
    for row in result["summary"]:
        gain = row["gain_over_teacher"]
        table.add_row(
            row["model"],
            "" if row["lambda"] is None else f"{row['lambda']:g}",
            row["estimator"] or "",
            (row["reference"] or "").replace("_", " "),
            results.with_error(row["accuracy"], row["standard_error"]),
            "" if gain is None else results.with_error(gain, row["gain_standard_error"], signed=True),
            "" if row["kl_to_teacher"] is None else f"{row['kl_to_teacher']:.3f}",
            f"{row['length']:.2f}",
        )
    Console(width=max(120, Console().width)).print(table)


def draw(result: Row, path: Path) -> None:
    """Draws accuracy against λ beside the line of the teacher, and the smaller students for each reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = result["summary"]
    by_model = {row["model"]: row for row in summary if row["lambda"] is None}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    for name, color in (("teacher", "black"), ("base", "gray")):
        row = by_model[name]
        left.axhline(row["accuracy"], color=color, linestyle="--" if name == "teacher" else ":", label=name)
        if name == "teacher":
            low, high = (row["accuracy"] + sign * row["standard_error"] for sign in (-1, 1))
            left.axhspan(low, high, color=color, alpha=0.1)
    for estimator in dict.fromkeys(row["estimator"] for row in summary if row["model"] == "student"):
        rows = [row for row in summary if row["model"] == "student" and row["estimator"] == estimator]
        left.errorbar(
            [row["lambda"] for row in rows],
            [row["accuracy"] for row in rows],
            [row["standard_error"] for row in rows],
            marker="o",
            capsize=3,
            label=f"student, {estimator}",
        )
    left.set(xlabel="reward scale λ", ylabel="sampled accuracy", title="Distilled back into its own base")
    left.legend()

    rows = [row for row in summary if row["model"] == "small_student"]
    labels = [
        "λ = 1" if row["lambda"] == 1 else f"λ = {row['lambda']:g}\nreference:\n{row['reference'].replace('_', ' ')}"
        for row in rows
    ]
    right.bar(
        labels, [row["accuracy"] for row in rows], yerr=[row["standard_error"] for row in rows], capsize=3, width=0.6
    )
    right.axhline(by_model["teacher"]["accuracy"], color="black", linestyle="--", label="teacher")
    right.axhline(by_model["small_base"]["accuracy"], color="gray", linestyle=":", label="smaller base")
    low = min([by_model["small_base"]["accuracy"], *(row["accuracy"] for row in rows)])
    right.set(title="Into a smaller student", ylim=(max(0, low - 0.05), None))
    right.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
