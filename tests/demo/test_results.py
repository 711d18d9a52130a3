"""The figures in the README are those of the committed run."""

import json
import re
from pathlib import Path

from trl_gopd.demo import distill


ROOT = Path(__file__).parents[2]


def test_readme_table_is_the_committed_result():
    result = json.loads((ROOT / "docs/results/demo_distill.json").read_text())
    readme = (ROOT / "README.md").read_text().replace("**", "").replace("−", "-")
    summary = {(row["model"], row["lambda"]): row for row in result["summary"] if row["estimator"] != "full"}
    rows = re.findall(
        r"^\| (base|teacher|student, λ = ([\d.]+)) \| ([\d.]+) ± ([\d.]+) \|(.*)\|$", readme, re.MULTILINE
    )
    assert len(rows) == 6
    for name, gopd_lambda, accuracy, error, gain in rows:
        row = summary[name.split(",")[0], float(gopd_lambda) if gopd_lambda else None]
        assert (accuracy, error) == (f"{row['accuracy']:.3f}", f"{row['standard_error']:.3f}")
        if gain.strip():
            assert gain.strip() == f"{row['gain_over_teacher']:+.3f} ± {row['gain_standard_error']:.3f}"


def test_committed_summary_is_that_of_the_committed_rows():
    result = json.loads((ROOT / "docs/results/demo_distill.json").read_text())
    assert distill.summarize(result["rows"]) == result["summary"]


def test_committed_result_shows_the_claim():
    """Accuracy rises with λ, and λ = 1.5 beats the teacher by more than two standard errors of the difference."""
    result = json.loads((ROOT / "docs/results/demo_distill.json").read_text())
    for estimator in ("sampled", "full"):
        rows = [r for r in result["summary"] if r["model"] == "student" and r["estimator"] == estimator]
        accuracies = [row["accuracy"] for row in sorted(rows, key=lambda row: row["lambda"])]
        assert accuracies == sorted(accuracies) and rows[-1]["lambda"] == 1.5
        assert rows[-1]["gain_over_teacher"] > 2 * rows[-1]["gain_standard_error"]
