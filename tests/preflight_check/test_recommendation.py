"""The rule that recommends a λ, on numbers written by hand."""

import pytest

from trl_gopd.preflight_check.findings import Decoded, LambdaEffect
from trl_gopd.preflight_check.recommendation import recommend


def effect(gopd_lambda, *, mass=0.0, flips=0.0, renyi=1.0, end=0.1):
    return LambdaEffect(gopd_lambda, renyi, 0.0, 0.0, 0.0, end, 0.0, flips, mass)


def decoded(gopd_lambda, *rewards):
    scored = [reward for reward in rewards if reward is not None]
    return Decoded(gopd_lambda, list(rewards), sum(scored) / len(scored), 0.1, 5.0, 0.0)


class TestRecommend:
    def test_largest_within_both_limits(self):
        effects = [effect(0.5, mass=0.5), effect(1.0, mass=0.02), effect(1.1, mass=0.03), effect(1.5, mass=0.0301)]
        value, reasons = recommend(effects)
        assert value == 1.1
        assert "λ = 1.1 stays within the limits: it moves +0.0100" in reasons[0]
        assert "λ = 1.5 exceeds the limits: it moves +0.0101" in reasons[1]

    def test_flips_count_too(self):
        value, reasons = recommend([effect(1.0), effect(1.25, flips=0.0011)])
        assert value == 1.0 and "overturns 0.110% of its near-certain choices (limit 0.100%)" in reasons[0]

    def test_not_past_the_first_that_fails(self):
        assert recommend([effect(1.0), effect(1.25, flips=0.5), effect(1.5)])[0] == 1.0

    def test_limits_are_options(self):
        effects = [effect(1.0), effect(1.25, flips=0.002, mass=0.02)]
        assert recommend(effects, max_deterministic_flips=0.002, max_off_teacher_mass=0.02)[0] == 1.25
        assert recommend(effects, max_deterministic_flips=0.002, max_off_teacher_mass=0.01)[0] == 1.0

    def test_no_certain_position_is_no_flip(self):
        assert recommend([effect(1.0, flips=None), effect(1.25, flips=None)])[0] == 1.25

    def test_best_reward(self):
        effects = [effect(1.0), effect(1.25)]
        value, reasons = recommend(effects, [decoded(1.0, 0.0, 1.0, 2.0), decoded(1.25, 1.0, 2.0, 3.5)])
        assert value == 1.25 and "best mean reward, 2.167" in reasons[-1]

    def test_reward_within_one_standard_error_of_the_difference(self):
        effects = [effect(1.0), effect(1.25)]
        # differences 1, −1, 1: mean 1/3, standard error 2/3
        value, reasons = recommend(effects, [decoded(1.0, 0.0, 2.0, 4.0), decoded(1.25, 1.0, 1.0, 5.0)])
        assert value == 1.0 and "the difference is 0.3333 ± 0.67" in reasons[-1]

    def test_differences_are_paired_where_both_have_a_reward(self):
        effects = [effect(1.0), effect(1.25)]
        pair = [decoded(1.0, 0.0, 1.0, None, 5.0), decoded(1.25, 1.0, 2.0, 9.0, None)]
        assert recommend(effects, pair)[0] == 1.25  # 1 ± 0

    def test_ties_go_to_the_one_nearest_to_1(self):
        effects = [effect(each) for each in (0.5, 1.0, 1.5)]
        assert recommend(effects, [decoded(each, 1.0, 1.0) for each in (0.5, 1.0, 1.5)])[0] == 1.0

    def test_reward_beyond_the_limits_is_warned_of(self):
        effects = [effect(1.0), effect(1.25, flips=0.5)]
        value, reasons = recommend(effects, [decoded(1.0, 0.0, 0.0), decoded(1.25, 1.0, 1.0)])
        assert value == 1.25 and "Beware: that is beyond λ = 1," in reasons[-1]

    @pytest.mark.parametrize(("end", "word"), [(0.05, "longer"), (0.2, "shorter")])
    def test_length_alarm(self, end, word):
        _, reasons = recommend([effect(1.0), effect(1.25, end=end)])
        assert f"completions would get {word}" in reasons[-1]

    def test_no_alarm_within_a_quarter(self):
        _, reasons = recommend([effect(1.0), effect(1.25, end=0.09)])
        assert not any("Length" in reason for reason in reasons)
