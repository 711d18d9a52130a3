"""The figures in the README and in docs/ are those of the committed runs."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from trl_gopd.demo import distill, merge
from trl_gopd.demo.results import with_error


ROOT = Path(__file__).parents[2]


def committed(scene: str) -> dict:
    return json.loads((ROOT / f"docs/results/demo_{scene}.json").read_text())


def plain(page: str) -> str:
    return (ROOT / page).read_text().replace("**", "").replace("−", "-")


@pytest.mark.parametrize("scene", [distill, merge])
def test_committed_summary_is_that_of_the_committed_rows(scene):
    result = committed(scene.__name__.rpartition(".")[2])
    assert scene.summarize(result["rows"]) == result["summary"]


def test_readme_table_is_the_committed_result():
    summary = {
        (row["model"], row["lambda"]): row for row in committed("distill")["summary"] if row["estimator"] != "full"
    }
    pattern = r"^\| (base|teacher|student, λ = ([\d.]+)) \| ([\d.]+) ± ([\d.]+) \|(.*)\|$"
    rows = re.findall(pattern, plain("README.md"), re.MULTILINE)
    assert len(rows) == 6
    for name, gopd_lambda, accuracy, error, gain in rows:
        row = summary[name.split(",")[0], float(gopd_lambda) if gopd_lambda else None]
        assert (accuracy, error) == (f"{row['accuracy']:.3f}", f"{row['standard_error']:.3f}")
        if gain.strip():
            assert gain.strip() == with_error(row["gain_over_teacher"], row["gain_standard_error"], signed=True)


def test_committed_distillation_shows_the_claim():
    """Accuracy rises with λ, and λ = 1.5 beats the teacher by more than two standard errors of the difference."""
    for estimator in ("sampled", "full"):
        rows = [
            row
            for row in committed("distill")["summary"]
            if row["model"] == "student" and row["estimator"] == estimator
        ]
        accuracies = [row["accuracy"] for row in sorted(rows, key=lambda row: row["lambda"])]
        assert accuracies == sorted(accuracies) and rows[-1]["lambda"] == 1.5
        assert rows[-1]["gain_over_teacher"] > 2 * rows[-1]["gain_standard_error"]


def test_documented_merging_table_is_the_committed_result():
    names = {"weights": "mean of the weights"}
    lines = []
    for (model, gopd_lambda, alpha, estimator), row_of in merge.by_kind(committed("merge")["summary"]).items():
        name = names.get(model, model.replace("_", " "))
        if model == "weights" and alpha != 1:
            name = f"extrapolated weights, α = {alpha:g}"
        if model == "student":
            name = f"student, λ = {gopd_lambda:g}, `{estimator}`"
        cells = [name]
        for row in map(row_of.__getitem__, merge.DOMAINS):
            gain, error = map(row.__getitem__, merge.GAIN)
            cells.append(with_error(row["accuracy"], row["standard_error"]))
            cells.append("" if gain is None else with_error(gain, error, signed=True))
        lines.append(f"| {' | '.join(cells)} |")
    assert len(lines) == 12
    assert "\n".join(lines) in plain("docs/gopd.md")


def test_committed_merging_shows_the_claim():
    """For each domain and seed, λ > 1 is ahead of λ = 1 and of the expert; over seeds by two standard errors."""
    result = committed("merge")
    accuracy = {(*(row[name] for name in ("seed", "domain", *merge.KIND)),): row["accuracy"] for row in result["rows"]}
    students = [row for row in result["rows"] if row["model"] == "student" and row["lambda"] > 1]
    assert len(students) == 3 * 2 * 2 * 2  # seeds, domains, λ, estimators
    for row in students:
        seed, domain = row["seed"], row["domain"]
        assert row["accuracy"] > accuracy[seed, domain, f"{domain}_expert", None, None, None]
        assert row["accuracy"] > accuracy[seed, domain, "student", 1.0, None, row["estimator"]]
    for row in result["summary"]:
        if row["model"] != "student":
            continue
        if row["lambda"] > 1:
            assert row["gain_over_teacher"] > 2 * row["gain_standard_error"]
        else:
            assert abs(row["gain_over_teacher"]) < 0.01


def test_readme_quotes_the_committed_merging():
    summary = merge.by_kind(committed("merge")["summary"])
    quoted = [*summary["student", 1.5, None, "sampled"].values(), *summary["weights", None, 1.0, None].values()]
    text = " ".join(plain("README.md").split())
    for row in quoted:
        assert with_error(abs(row["gain_over_teacher"]), row["gain_standard_error"]) in text


def test_documented_context_distillation_is_the_committed_curve():
    gaps = json.loads((ROOT / "docs/results/context_distillation.json").read_text())["gap"]
    assert len(gaps) == 50
    text = " ".join(plain("docs/gopd.md").split())
    first, last = (with_error(mean(part), stdev(part) / len(part) ** 0.5) for part in (gaps[:10], gaps[-10:]))
    assert f"falls from {first} in the first ten steps to {last} in the last ten" in text
