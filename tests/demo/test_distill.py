"""The demo: its task, its statistics, and the contract of its JSON on a run of a few steps."""

import json
import math

import pytest
import torch

from trl_gopd.demo import arithmetic, distill


def row(seed, model, accuracy, **kwargs):
    fields = {"lambda": None, "estimator": None, "reference": None, "n": 100, "kl_to_teacher": 0.5, "length": 3.0}
    return {"seed": seed, "model": model, "accuracy": accuracy, **fields, **kwargs}


class TestTask:
    def test_tokenizer_round_trip(self):
        tokenizer = arithmetic.build_tokenizer()
        ids = tokenizer("47+38=85").input_ids
        assert len(ids) == 8 and tokenizer.decode(ids) == "47+38=85"

    def test_splits_are_disjoint(self):
        train, test = ({tuple(p) for p in arithmetic.operands(split).tolist()} for split in ("train", "test"))
        assert not train & test and len(train | test) == 90 * 90

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="must be 'train' or 'test', got 'valid'"):
            arithmetic.operands("valid")

    def test_noise_is_the_share_of_wrong_answers(self, generator):
        pairs = arithmetic.operands("train").repeat(5, 1)
        answers = arithmetic.noisy_answers(pairs, noise=0.3, generator=generator)
        share = (answers != pairs.sum(1)).float().mean().item()
        assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(pairs))
        assert answers.min() >= 20 and answers.max() <= 198

    def test_reward_is_exact(self):
        assert arithmetic.exact_answer(["85", "85 ", "850", ""], ["85"] * 4) == [1.0, 0.0, 0.0, 0.0]

    def test_evaluation_of_a_model_that_knows_nothing(self):
        tokenizer = arithmetic.build_tokenizer()
        model = arithmetic.build_model(tokenizer, arithmetic.Size(16, 1), seed=0)
        state = torch.get_rng_state()
        result = arithmetic.evaluate(model, tokenizer, n=50, seed=0, teacher=model)
        assert result.accuracy < 0.2 and 1 <= result.length <= 4
        assert result.kl_to_teacher == 0.0
        assert torch.equal(torch.get_rng_state(), state)


class TestSummary:
    def test_over_seeds(self):
        rows = [row(0, "teacher", 0.7), row(1, "teacher", 0.8), row(0, "student", 0.8), row(1, "student", 0.86)]
        teacher, student = distill.summarize(rows)
        assert teacher["accuracy"] == pytest.approx(0.75) and teacher["gain_over_teacher"] is None
        # stdev of (.7, .8) is .1/√2, over √2 seeds
        assert teacher["standard_error"] == pytest.approx(0.05)
        assert student["gain_over_teacher"] == pytest.approx(0.08)
        assert student["gain_standard_error"] == pytest.approx(0.02)  # of the differences .10 and .06
        assert student["n"] == 200

    def test_one_seed_is_binomial(self):
        (teacher,) = distill.summarize([row(0, "teacher", 0.5)])
        assert teacher["standard_error"] == pytest.approx(math.sqrt(0.25 / 100))


def test_contract_of_the_json(tmp_path):
    """Every key of the contract, from a run of two steps a stage in which nothing is learned."""
    settings = distill.Settings(
        base=(16, 1), small=(8, 1), base_steps=2, teacher_steps=2, student_steps=2, batch_size=16, n=64
    )
    result = distill.run(
        seeds=1, output_dir=tmp_path, lambdas=(1.0, 1.25), estimators=("full",), settings=settings, workers=2
    )
    distill.draw(result, tmp_path / "figure.png")
    distill.print_table(result)
    again = json.loads(json.dumps(result))
    keys = {"seed", "model", "lambda", "estimator", "reference", "accuracy", "n", "kl_to_teacher", "length"}
    assert all(set(r) == keys for r in again["rows"])
    models = [(r["model"], r["lambda"], r["estimator"], r["reference"]) for r in again["rows"]]
    assert models == [
        ("base", None, None, None),
        ("teacher", None, None, None),
        ("student", 1.0, "full", None),
        ("student", 1.25, "full", "student_start"),
        ("small_base", None, None, None),
        ("small_student", 1.0, "sampled", None),
        ("small_student", 1.25, "sampled", "student_start"),
        ("small_student", 1.25, "sampled", "teacher_base"),
    ]
    assert len(again["summary"]) == 8 and again["settings"]["base_steps"] == 2
    assert (tmp_path / "figure.png").stat().st_size > 0
