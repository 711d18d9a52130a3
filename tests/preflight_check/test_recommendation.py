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
        assert value == 1.0 and "changes 0.110% of its near-certain choices (limit 0.100%)" in reasons[0]

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
        assert value == 1.25 and "Caution: this is above λ = 1," in reasons[-1]

    @pytest.mark.parametrize(("end", "word"), [(0.05, "longer"), (0.2, "shorter")])
    def test_length_alarm(self, end, word):
        _, reasons = recommend([effect(1.0), effect(1.25, end=end)])
        assert f"completions would become {word}" in reasons[-1]

    def test_no_alarm_within_a_quarter(self):
        _, reasons = recommend([effect(1.0), effect(1.25, end=0.09)])
        assert not any("completions would" in reason for reason in reasons)


class TestNothingToLearn:
    """Two of the three models are one."""

    @pytest.mark.parametrize("kl", [0.0, 9e-7, -9e-7])
    def test_teacher_is_reference(self, kl):
        """Every λ is within the limits, which says nothing in its favour."""
        value, reasons = recommend([effect(1.0, renyi=kl), effect(2.0, renyi=kl)])
        assert value == 1.0
        (reason,) = reasons
        assert reason.startswith("Nothing can be learned about λ from these models: teacher and reference agree")
        assert "so the target is the teacher for every λ" in reason and "needs no reference" in reason
        assert "Pass the model from which the teacher was trained as the reference" in reason

    def test_teacher_is_reference_whatever_the_rewards(self):
        """Different rewards of the same distribution are noise."""
        effects = [effect(1.0, renyi=0.0), effect(2.0, renyi=0.0)]
        value, reasons = recommend(effects, [decoded(1.0, 0.0, 0.0), decoded(2.0, 1.0, 1.0)])
        assert value == 1.0 and len(reasons) == 1

    def test_models_that_differ_are_compared_as_usual(self):
        value, reasons = recommend([effect(1.0, renyi=2e-6), effect(2.0, renyi=2e-6)])
        assert value == 2.0 and not any("Nothing" in reason for reason in reasons)

    def test_teacher_is_student(self):
        """Extrapolation from the reference still moves the student."""
        effects = [effect(1.0), effect(2.0)]
        usual, told = recommend(effects), recommend(effects, same_as_student="teacher")
        assert told[0] == usual[0] == 2.0 and told[1][1:] == usual[1]
        assert told[1][0] == (
            "The student is the teacher, so training with λ = 1 would not change it. Any other λ moves it away from "
            "the teacher."
        )

    def test_reference_is_student(self):
        """This is the default, and no news."""
        effects = [effect(1.0), effect(2.0)]
        assert recommend(effects, same_as_student="reference") == recommend(effects)

    @pytest.mark.parametrize("same", ["teacher", "reference"])
    def test_all_three_are_one(self, same):
        value, reasons = recommend([effect(1.0, renyi=0.0), effect(2.0, renyi=0.0)], same_as_student=same)
        assert value == 1.0
        (reason,) = reasons
        assert reason.startswith("There is nothing to learn: student, teacher and reference agree")
        assert "with any λ" in reason and "Pass another teacher" in reason
