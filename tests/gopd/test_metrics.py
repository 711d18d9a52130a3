"""
What is logged of a micro-batch: every name and its mean, against float64 sums over the tokens that count, where all
other entries of the tensors are NaN or infinite; and that ranks together log what one rank with all rows would.
"""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from trl_gopd.gopd.estimators.protocol import Estimate
from trl_gopd.gopd.metrics import PER_TEACHER, SAME, means, nothing_to_learn, summarize, token_values


EPS = torch.finfo(torch.float32).eps
NAN, INF = math.nan, math.inf
CLIP = 1.5
END = 9

# Three rows of four tokens. The second one's third token was written by a tool and the first row ends early: these are
# not trained on. The second token of the third row is in no teacher's vocabulary. What nobody may read is NaN or inf.
LOSS_MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1], [1, 1, 1, 1]])
KNOWN = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1]])
IDS = torch.tensor([[3, 9, 4, 9], [9, 5, 9, 8], [6, 9, 7, 8]])
TEACHER = torch.tensor([[-1.0, -0.5, -2.0, NAN], [-3.0, -0.25, INF, -1.5], [-0.75, -INF, -2.5, -4.0]])
STUDENT = torch.tensor([[-1.5, -0.25, -4.0, INF], [-1.0, -0.5, NAN, -1.25], [-2.75, -1.0, -2.0, -1.0]])
REFERENCE = torch.tensor([[-2.0, -4.5, -1.0, -INF], [-0.5, -0.5, NAN, -1.0], [-1.0, NAN, -2.75, -2.0]])
ADVANTAGES = torch.tensor([[1.0, -0.5, 3.0, NAN], [-2.0, 0.0, INF, -0.25], [2.5, NAN, -0.125, -3.5]])
LAMBDA = torch.tensor([[1.25], [1.0], [2.0]])
ASKED = torch.tensor([[True], [False], [True]])
MONITOR = torch.tensor([[0.5, 0.25, 1.0, NAN], [0.75, 0.5, NAN, 0.0], [1.0, INF, 0.25, 0.5]])
# Of the nine known tokens, and of the six among them about which the reference was asked
TOKENS = [(b, t) for b in range(3) for t in range(4) if KNOWN[b, t]]
SHOWN = [(b, t) for b, t in TOKENS if b != 1]


def make_estimate(**changes):
    values = {
        "logps": STUDENT,
        "credits": torch.full((3, 4), NAN),
        "advantages": ADVANTAGES,
        "known": KNOWN.float(),
        "gopd_lambda": LAMBDA,
        "student_logps": STUDENT,
        "teacher_logps": TEACHER,
        "reverse_kl": STUDENT - TEACHER,
        "reference_logps": REFERENCE,
        "has_reference": ASKED,
        "means": {"top_k_coverage": MONITOR},
        **changes,
    }
    return Estimate(**values)


def make_batch(rows=slice(None)):
    return SimpleNamespace(completion_ids=IDS[rows], loss_mask=LOSS_MASK[rows])


def values_of(clip=CLIP, varies=True, **changes):
    return token_values(
        make_estimate(**changes), make_batch(), eos_token_ids=END, extrapolation_clip=clip, varies=varies
    )


def alone(totals):
    """One rank."""
    return totals


def naive(function, tokens):
    """Mean of a function of row and token over tokens, in float64; `None` for no token."""
    numbers = [float(function(*token)) for token in tokens]
    return sum(numbers) / len(numbers) if numbers else None


def naive_means(tokens=TOKENS, shown=SHOWN, trained=None, clip=CLIP):
    """Every name, written out. A bound of +inf stands for none."""
    trained = [(b, t) for b in range(3) for t in range(4) if LOSS_MASK[b, t]] if trained is None else trained
    a, s, t_, r = (x.double() for x in (ADVANTAGES, STUDENT, TEACHER, REFERENCE))

    def reward(b, t):
        return t_[b, t] - r[b, t]

    def extrapolation(b, t):
        return (float(LAMBDA[b, 0]) - 1) * max(-clip, min(clip, float(reward(b, t))))

    out = {
        "reverse_kl": naive(lambda b, t: s[b, t] - t_[b, t], tokens),
        "teacher_logp": naive(lambda b, t: t_[b, t], tokens),
        "advantage_mean": naive(lambda b, t: a[b, t], tokens),
        "advantage_square": naive(lambda b, t: a[b, t] ** 2, tokens),
        "advantage_positive_share": naive(lambda b, t: a[b, t] > 0, tokens),
        "outside_vocabulary_share": naive(lambda b, t: (b, t) not in tokens, trained),
        "eos_advantage": naive(lambda b, t: a[b, t], [x for x in tokens if IDS[x] == END]),
        "top_k_coverage": naive(lambda b, t: MONITOR[b, t], tokens),
        "lambda": naive(lambda b, t: LAMBDA[b, 0], tokens),
        "implicit_reward": naive(reward, shown),
        "extrapolation": naive(extrapolation, shown),
        "extrapolation_abs": naive(lambda b, t: abs(extrapolation(b, t)), shown),
        "distillation_abs": naive(lambda b, t: abs(s[b, t] - t_[b, t]), shown),
        "eos_implicit_reward": naive(reward, [x for x in shown if IDS[x] == END]),
        "clip_share": naive(lambda b, t: abs(reward(b, t)) > clip, shown),
    }
    return {name: value for name, value in out.items() if value is not None}


def assert_same(got, want):
    assert list(got) == list(want)  # names, in order
    # a dozen numbers below 16, added in float32
    assert got == pytest.approx(want, rel=0, abs=12 * 16 * EPS)


class TestTokenValues:
    def test_every_name(self):
        assert_same(means(values_of(), torch.zeros(3, dtype=torch.int64), [None], add_over_ranks=alone), naive_means())

    def test_masks_and_values(self):
        """What counts is what is known, and what does not count of an advantage is 0."""
        got = values_of()
        for name in ("reverse_kl", "teacher_logp", "advantage_mean", "advantage_square", "lambda", "top_k_coverage"):
            assert torch.equal(got[name][1], KNOWN.bool())
        assert torch.equal(got["outside_vocabulary_share"][1], LOSS_MASK.bool())
        assert torch.equal(got["implicit_reward"][1], KNOWN.bool() & ASKED)
        assert torch.equal(got["advantage_mean"][0], ADVANTAGES.masked_fill(KNOWN == 0, 0.0))
        assert torch.equal(got["lambda"][0], LAMBDA.expand(3, 4))
        # ends in the data set's padding, of a tool, and out of the vocabulary are none
        assert got["eos_advantage"][1].nonzero().tolist() == [[0, 1], [1, 0]]
        assert got["eos_implicit_reward"][1].nonzero().tolist() == [[0, 1]]

    def test_several_ends(self):
        got = token_values(
            make_estimate(), make_batch(), eos_token_ids=[END, 8], extrapolation_clip=None, varies=False
        )
        assert got["eos_advantage"][1].nonzero().tolist() == [[0, 1], [1, 0], [1, 3], [2, 3]]

    def test_without_a_clip(self):
        """Rewards of any size; 4.0 of the second token is clipped otherwise."""
        want = naive_means(clip=INF)
        del want["clip_share"]
        got = means(values_of(clip=None), torch.zeros(3, dtype=torch.int64), [None], add_over_ranks=alone)
        assert_same(got, want)
        assert got["extrapolation_abs"] > naive_means()["extrapolation_abs"]

    def test_lambda_that_never_varies(self):
        assert "lambda" not in values_of(varies=False) and "implicit_reward" in values_of(varies=False)

    def test_lambda_of_each_token(self):
        gates = torch.tensor([[1.0, 1.25, 1.0, NAN], [2.0, 1.0, NAN, 1.5], [1.0, NAN, 1.25, 1.25]])
        got = values_of(gopd_lambda=gates)
        assert torch.equal(got["lambda"][0][KNOWN.bool()], gates[KNOWN.bool()])
        rewards = (TEACHER - REFERENCE).clamp(-CLIP, CLIP)
        counted = got["extrapolation"][1]
        assert torch.equal(got["extrapolation"][0][counted], ((gates - 1) * rewards)[counted])

    def test_all_rows_met_the_reference(self):
        got = means(values_of(has_reference=None), torch.zeros(3, dtype=torch.int64), [None], add_over_ranks=alone)
        assert_same(got, naive_means(shown=TOKENS))

    def test_no_reference(self):
        got = values_of(reference_logps=None, means={})
        assert list(got) == list(naive_means())[:7] + ["lambda"]

    def test_a_share_at_its_bound(self):
        """An advantage of 0 is not positive, and a reward at the bound is not clipped."""
        at_bound = torch.full((3, 4), CLIP)
        got = values_of(teacher_logps=at_bound, reference_logps=torch.zeros(3, 4), advantages=torch.zeros(3, 4))
        assert not got["clip_share"][0].any() and not got["advantage_positive_share"][0].any()


class TestMeans:
    INDEX = torch.tensor([1, 0, 1])

    def by_teacher(self, tokens, shown, total):
        row = {"token_share": len(tokens) / total}
        own = naive_means(tokens, shown, trained=tokens)
        return row | {name: own[name] for name in own if name in PER_TEACHER}

    def test_of_each_of_several_teachers(self):
        got = means(values_of(), self.INDEX, ["math", "code", "none"], add_over_ranks=alone)
        want = naive_means()
        groups = {
            "math": [x for x in TOKENS if x[0] == 1],
            "code": [x for x in TOKENS if x[0] != 1],
            "none": [],
        }
        for key, tokens in groups.items():
            shown = [x for x in tokens if x in SHOWN]
            want |= {f"{key}/{name}": value for name, value in self.by_teacher(tokens, shown, len(TOKENS)).items()}
        assert_same(got, want)
        # a teacher whose rows the reference never saw has no reward; one without rows has its share alone
        assert "math/lambda" in got and "math/implicit_reward" not in got and "code/clip_share" in got
        assert [name for name in got if name.startswith("none/")] == ["none/token_share"] and got[
            "none/token_share"
        ] == 0

    def test_names_that_are_logged_for_each_teacher(self):
        assert set(PER_TEACHER) == {
            "reverse_kl",
            "teacher_logp",
            "advantage_mean",
            "implicit_reward",
            "clip_share",
            "lambda",
        }

    def test_one_teacher_has_no_names_of_its_own(self):
        assert not any("/" in name for name in means(values_of(), self.INDEX * 0, ["math"], add_over_ranks=alone))

    def test_two_ranks_are_one_with_all_rows(self):
        estimate = make_estimate()
        parts = []
        for rows in (slice(0, 1), slice(1, 3)):
            own = dataclasses.replace(
                estimate,
                **{
                    field.name: getattr(estimate, field.name)[rows]
                    for field in dataclasses.fields(estimate)
                    if isinstance(getattr(estimate, field.name), torch.Tensor)
                },
                means={"top_k_coverage": MONITOR[rows]},
            )
            values = token_values(own, make_batch(rows), eos_token_ids=END, extrapolation_clip=CLIP, varies=True)
            means(values, self.INDEX[rows], ["math", "code"], add_over_ranks=lambda x: parts.append(x) or x)
        together = means(values, self.INDEX[rows], ["math", "code"], add_over_ranks=lambda x: sum(parts))
        one = means(values_of(), self.INDEX, ["math", "code"], add_over_ranks=alone)
        assert_same(together, one)

    def test_one_token(self):
        alone_known = torch.zeros(3, 4)
        alone_known[1, 0] = 1
        got = means(values_of(known=alone_known), self.INDEX, ["math", "code"], add_over_ranks=alone)
        assert got["math/token_share"] == 1.0 and got["code/token_share"] == 0.0 and got["advantage_mean"] == -2.0

    def test_sums_are_float32(self):
        """In bfloat16, 513 is 512."""
        ones = torch.ones(1, 513, dtype=torch.bfloat16)
        got = means({"one": (ones, ones.bool())}, torch.zeros(1, dtype=torch.int64), [None], add_over_ranks=alone)
        assert got == {"one": 1.0}

    @pytest.mark.parametrize("ids", [[None], ["math", "code"]])
    def test_no_token_counts(self, ids):
        got = means(values_of(known=torch.zeros(3, 4)), self.INDEX * 0, ids, add_over_ranks=alone)
        shares = {} if ids == [None] else {"math/token_share": 0.0, "code/token_share": 0.0}
        assert got == {"outside_vocabulary_share": 1.0, **shares}


class TestNothingToLearn:
    def test_most_runs(self):
        assert nothing_to_learn({}) == nothing_to_learn(naive_means()) == []

    @pytest.mark.parametrize(("scale", "count"), [(0.0, 1), (0.99, 1), (1.0, 0), (1.01, 0)])
    def test_advantages_of_0(self, scale, count):
        """The root mean square of advantages, against rounding."""
        got = nothing_to_learn({"advantage_square": (scale * SAME) ** 2, "extrapolation_abs": 0.5})
        assert len(got) == count
        for reason in got:
            assert reason == (
                "Student and teacher give every sampled token the same probability, so all advantages are 0 and there "
                "is nothing to learn. Check that `teacher_model` is another model than the student."
            )

    @pytest.mark.parametrize(("scale", "count"), [(0.0, 1), (0.99, 1), (1.0, 0), (1.01, 0)])
    def test_teacher_is_the_reference(self, scale, count):
        got = nothing_to_learn({"advantage_square": 0.5, "extrapolation_abs": scale * SAME})
        assert len(got) == count
        for reason in got:
            assert reason == (
                "Teacher and reference give every sampled token the same probability, so λ changes nothing. Check "
                "that `ref_model` is another model than the teacher, or use `gopd_lambda=1`."
            )

    def test_both(self):
        assert len(nothing_to_learn({"advantage_square": 0.0, "extrapolation_abs": 0.0})) == 2

    def test_bound_is_above_rounding(self):
        """Two forwards of a model of log-probabilities below 16 differ by a few dozen roundings."""
        assert 32 * 16 * EPS < SAME == 1e-4


class TestSummarize:
    def test_every_name(self):
        given = naive_means()
        got = summarize(given, 3.5)
        mean = given["advantage_mean"]
        numbers = [float(ADVANTAGES[token]) for token in TOKENS]
        variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
        want = {name: value for name, value in given.items() if name not in NOT_SHOWN}
        want |= {"advantage_std": math.sqrt(variance), "advantage_abs_max": 3.5}
        sizes = given["extrapolation_abs"], given["distillation_abs"]
        want["extrapolation_share"] = sizes[0] / (sizes[0] + sizes[1])
        assert_same(got, want)
        assert mean != 0 and list(given) == list(naive_means())  # what was given is as it was

    def test_standard_deviation_of_equal_advantages(self):
        """E[A²] − E[A]² may be rounded below 0, as it is here."""
        square = 0.1**2 - 2**-50
        got = summarize({"advantage_square": square, "advantage_mean": 0.1}, 0.1)
        assert got == {"advantage_mean": 0.1, "advantage_std": 0.0, "advantage_abs_max": 0.1}

    def test_nothing_to_share(self):
        """Neither distillation nor extrapolation: no share of what is 0."""
        given = {"advantage_square": 0.0, "advantage_mean": 0.0, "extrapolation_abs": 0.0, "distillation_abs": 0.0}
        got = summarize(given, 0.0)
        assert got["extrapolation_share"] == 0.0
        smallest = summarize(given | {"extrapolation_abs": 1e-30}, 0.0)
        assert smallest["extrapolation_share"] == 1.0

    @pytest.mark.parametrize("share", [0.0, 0.25])
    def test_ids_outside_the_vocabulary_are_shown_if_there_are_any(self, share):
        given = {"advantage_square": 1.0, "advantage_mean": 0.0, "outside_vocabulary_share": share}
        assert ("outside_vocabulary_share" in summarize(given, 1.0)) == bool(share)

    def test_no_token_counts(self):
        assert summarize({}, 0.0) == summarize({"outside_vocabulary_share": 0.0, "a/token_share": 0.0}, 0.0) == {}
        assert summarize({"outside_vocabulary_share": 1.0, "a/token_share": 0.0}, 0.0) == {
            "outside_vocabulary_share": 1.0
        }


NOT_SHOWN = ("advantage_square", "extrapolation_abs", "distillation_abs")


def test_numbers_that_are_not_finite_are_not_logged():
    from trl_gopd.gopd.metrics import drop_nonfinite

    nan, inf = float("nan"), float("inf")
    metrics = {"a": [1.0, nan, 3], "b": [inf], "c": ["text"], "d": []}
    logs = {"loss": 1.0, "grad_norm": nan, "epoch": 1, "name": "x"}
    drop_nonfinite(logs, metrics)
    assert logs == {"loss": 1.0, "epoch": 1, "name": "x"}
    assert metrics == {"a": [1.0, 3], "c": ["text"]}
