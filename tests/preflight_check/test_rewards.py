"""Reward functions are called as GRPO calls them, on completions that are sampled from q_λ."""

import math

import pytest

from tests.preflight_check.harness import GRID, PROMPTS, run


class TestRewards:
    def test_are_called_as_grpo_calls_them(self, models):
        calls = []

        def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric):
            log_metric("name", 1.0)
            calls.append((prompts, completions, completion_ids, answer))
            return list(range(len(prompts)))

        rows = [{"prompt": [{"role": "user", "content": text}], "answer": text[:3]} for text in PROMPTS]
        report = run(models, prompts=rows, reward_funcs=[reward, lambda completions, **_: [10.0] * len(completions)])
        assert [each.gopd_lambda for each in report.decoded] == list(GRID) and len(calls) == len(GRID)
        for prompts, completions, completion_ids, answer in calls:
            assert [prompt[0]["content"][:3] for prompt in prompts] == answer
            assert all(completion[0]["role"] == "assistant" for completion in completions)
            assert all(1 <= len(ids) <= 12 for ids in completion_ids)
        for each, (_, _, completion_ids, _) in zip(report.decoded, calls, strict=True):
            assert each.rewards == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]
            assert each.reward == 12.5
            assert math.isclose(each.standard_error, math.sqrt(3.5 / 6))  # variance of six whole numbers in a row
            assert each.length == sum(map(len, completion_ids)) / 6

    def test_lambda_zero_and_one_decode_reference_and_teacher(self, models):
        """On the same draws: what decodes at 1 is what was sampled, and at 0 what the reference would write."""
        texts = {}

        def keep(completions, **_):
            texts[len(texts)] = completions
            return [0.0] * len(completions)

        run(models, lambdas=[0.0], reward_funcs=keep)
        run(models, lambdas=[], reward_funcs=keep, teacher_model=models / "base")
        assert texts[0] == texts[2] != texts[1]

    def test_none_counts_for_nothing(self, models):
        report = run(models, reward_funcs=lambda completions, **_: [None, 1.0, 2.0, None, math.nan, 3.0])
        assert report.decoded[0].rewards == [None, 1.0, 2.0, None, None, 3.0] and report.decoded[0].reward == 2.0

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (
                lambda completions, **_: [None] * len(completions),
                "a reward for 0 of 6 completions.* columns which",
            ),
            (lambda completions, **_: [1.0], "returned 1 rewards for 6 completions. It must return one for each"),
        ],
    )
    def test_useless_ones_are_refused(self, models, function, message):
        with pytest.raises(ValueError, match=message):
            run(models, reward_funcs=function)
