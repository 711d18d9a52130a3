"""A preflight of the tiny models that takes a second, shared by the tests of this folder."""

from trl_gopd.preflight_check import PreflightReport, preflight


PROMPTS = ["What is 2 plus 3?", "Why?", "How many legs have three dogs?"]
GRID = (0.5, 1.0, 1.25, 2.0)
QUICK = {"num_samples": 6, "max_completion_length": 12, "batch_size": 4, "lambdas": GRID}


def run(models, **options) -> PreflightReport:
    """The preflight of a teacher and a reference that differ."""
    return preflight(
        **{"teacher_model": models / "teacher", "ref_model": models / "base", "prompts": PROMPTS, **QUICK, **options}
    )


def numbers(report):
    """What has to be the same when a preflight is repeated."""
    return {key: value for key, value in report.to_dict().items() if key not in ("seconds", "settings")}


def vowels(completions, **kwargs):
    """A reward function."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]
