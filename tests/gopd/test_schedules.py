"""
λ of a step lies between 1 and the λ asked for, which is what the constant schedule returns bit for bit; a resumed
schedule goes on as if it had never stopped; statistics are sums, the same however a batch is divided; gates leave λ or
set it to 1.
"""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gopd.gopd.monitors import CompletionSummary
from trl_gopd.gopd.objective import token_advantages
from trl_gopd.gopd.schedules import KINDS, START_BATCHES, BackOff, LambdaSchedule, deviation_squares, gate_lambda


EPS, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
HEALTHY = CompletionSummary(mean_length=100.0, p95_length=150.0, truncated_share=0.0, repetition=0.0)
CUT_OFF = CompletionSummary(mean_length=100.0, p95_length=150.0, truncated_share=0.9, repetition=0.0)

lambdas = st.floats(0, 10)
summaries = st.builds(
    CompletionSummary,
    mean_length=st.floats(1, 1000),
    p95_length=st.just(0.0),
    truncated_share=st.floats(0, 1),
    repetition=st.floats(0, 1),
)
# One optimizer step each: what was observed at its end.
histories = st.lists(st.tuples(st.tuples(st.floats(0, 100), st.floats(0, 100)), summaries), max_size=30)


@st.composite
def schedules(draw):
    """A function that builds a schedule, and builds it again when training is resumed."""
    kind = draw(st.sampled_from(KINDS))
    back_off = BackOff(
        max_truncated_share=draw(st.floats(0, 0.99)),
        max_repetition=draw(st.none() | st.floats(0, 0.99)),
        max_length_change=draw(st.none() | st.floats(1.01, 4)),
        factor=draw(st.floats(0, 0.99)),
        recovery=draw(st.integers(1, 20)),
    )
    arguments = {
        "kind": kind,
        "warmup_steps": 7 if kind == "linear" else 0,
        "gain": draw(st.floats(0.01, 2)),
        "back_off": draw(st.sampled_from([None, back_off])),
    }
    return lambda: LambdaSchedule(**arguments)


def observe(schedule, deviations, summary):
    schedule.observe_deviations(torch.tensor(deviations))
    schedule.observe_completions(summary)


class TestLambdaSchedule:
    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(gopd_lambda=lambdas, history=histories)
    def test_constant_is_the_lambda_asked_for(self, gopd_lambda, history):
        schedule = LambdaSchedule()
        for step, seen in enumerate(history):
            observe(schedule, *seen)
            assert schedule.at(step, gopd_lambda) == gopd_lambda
        rows = torch.tensor([gopd_lambda, 1.0, 0.1])
        assert torch.equal(schedule.at(3, rows), rows)

    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(build=schedules(), history=histories)
    def test_one_stays_exactly_one(self, build, history):
        schedule = build()
        for step, seen in enumerate(history):
            assert schedule.at(step, 1.0) == 1.0
            assert torch.equal(schedule.at(step, torch.ones(3)), torch.ones(3))
            observe(schedule, *seen)

    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(build=schedules(), history=histories, gopd_lambda=lambdas)
    def test_lies_between_one_and_the_lambda_asked_for(self, build, history, gopd_lambda):
        schedule = build()
        for step, seen in enumerate(history):
            value = schedule.at(step, gopd_lambda)
            rounding = 2 * EPS64 * max(gopd_lambda, 1)  # λ − 1 is rounded, and 1 + share·(λ − 1)
            assert min(1, gopd_lambda) - rounding <= value <= max(1, gopd_lambda) + rounding
            observe(schedule, *seen)

    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(build=schedules(), history=histories, stop=st.integers(0, 30))
    def test_resumed_run_has_the_same_lambda(self, build, history, stop):
        whole, stopped = build(), build()
        for step, seen in enumerate(history):
            if step == stop:
                state = json.loads(json.dumps(stopped.state_dict()))
                stopped = build()
                stopped.load_state_dict(state)
            assert stopped.at(step, 1.25) == whole.at(step, 1.25)
            observe(whole, *seen)
            observe(stopped, *seen)
        assert stopped.state_dict() == whole.state_dict()

    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(build=schedules(), history=histories, values=st.lists(lambdas, min_size=1, max_size=4))
    def test_a_row_has_the_lambda_it_would_have_alone(self, build, history, values):
        schedule = build()
        for seen in history:
            observe(schedule, *seen)
        rows = schedule.at(3, torch.tensor(values, dtype=torch.float64))
        assert rows.tolist() == [schedule.at(3, value) for value in values]

    def test_linear_goes_from_one_to_lambda(self):
        schedule = LambdaSchedule("linear", warmup_steps=4)
        assert [schedule.at(step, 0.5) for step in range(6)] == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
        # from `warmup_steps` on it is λ itself, here one that 1 + (λ − 1) misses
        assert 1 + (0.1 - 1) != 0.1
        assert schedule.at(4, 0.1) == 0.1

    @pytest.mark.parametrize(
        ("deviations", "gopd_lambda", "expected"),
        [
            ((0.25, 1.0), 1.25, 1 + 0.25 * 0.5),  # clip(1 + a·ρ, 1, λ) with ρ = ½
            ((4.0, 1.0), 1.25, 1.25),  # 1.5, above what was asked for
            ((0.0, 1.0), 1.25, 1.0),  # the student is the teacher
            ((0.25, 1.0), 0.5, 1 - 0.25 * 0.5),  # below 1 the mirror image
            ((4.0, 1.0), 0.9, 0.9),
            ((3.0, 0.0), 1.25, 1.25),  # no reward to compare with: as it was, at first ρ = 1
            ((0.0, 0.0), 2.0, 1.25),
        ],
    )
    def test_adaptive_rule(self, deviations, gopd_lambda, expected):
        schedule = LambdaSchedule("adaptive")
        schedule.observe_deviations(torch.tensor(deviations))
        assert schedule.at(0, gopd_lambda) == expected

    def test_adaptive_starts_as_if_the_student_were_the_reference(self, generator):
        student, teacher = torch.randn(2, 3, 5, generator=generator)
        before, after = LambdaSchedule("adaptive"), LambdaSchedule("adaptive")
        after.observe_deviations(
            deviation_squares(
                student_logps=student, teacher_logps=teacher, reference_logps=student, mask=torch.ones(3, 5)
            )
        )
        assert before.at(0, 3.0) == after.at(0, 3.0) == 1.25

    def test_deviations_must_be_finite(self):
        schedule = LambdaSchedule("adaptive")
        for squares in ((math.nan, 1.0), (1.0, math.inf)):
            with pytest.raises(ValueError, match=r"`squares` must be finite, got .*(nan|inf).*Mask the tokens"):
                schedule.observe_deviations(torch.tensor(squares))
        assert schedule.at(0, 3.0) == 1.25

    def test_state_is_a_copy(self):
        schedule = LambdaSchedule(back_off=BackOff(max_length_change=2.0))
        state = schedule.state_dict()
        schedule.observe_completions(HEALTHY)
        assert state["start_lengths"] == []
        other = LambdaSchedule(back_off=BackOff(max_length_change=2.0))
        state = schedule.state_dict()
        other.load_state_dict(state)
        other.observe_completions(HEALTHY)
        assert state["start_lengths"] == [100.0]

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"ratio": 1.0}, r"keys \['ratio', 'trust', 'start_lengths'\], got \['ratio'\]"),
            ({"ratio": math.nan, "trust": 1.0, "start_lengths": []}, "`ratio` >= 0.*got .*nan"),
            ({"ratio": 1.0, "trust": 1.5, "start_lengths": []}, r"`trust` in \[0, 1\].*got .*1\.5"),
            ({"ratio": 1.0, "trust": 1.0, "start_lengths": [1.0] * 11}, "at most 10 `start_lengths`"),
        ],
    )
    def test_foreign_state_is_refused(self, state, message):
        schedule = LambdaSchedule()
        before = schedule.state_dict()
        with pytest.raises(ValueError, match=message):
            schedule.load_state_dict(state)
        assert schedule.state_dict() == before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"kind": "cosine"}, r"`kind` must be one of \['constant', 'linear', 'adaptive'\], got 'cosine'. Use"),
            ({"kind": "linear"}, "`warmup_steps` must be at least 1 for 'linear', got 0. Use 'constant'"),
            ({"warmup_steps": 3}, "`warmup_steps` must be 0 for 'constant', got 3. Use 'linear'"),
            ({"kind": "adaptive", "gain": 0.0}, "`gain` must be finite and > 0, got 0.0"),
            ({"kind": "adaptive", "gain": math.nan}, "`gain` must be finite and > 0, got nan"),
        ],
    )
    def test_bad_setting_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LambdaSchedule(**arguments)


class TestBackOff:
    def test_falls_by_the_factor_and_recovers_by_equal_steps(self):
        schedule = LambdaSchedule(back_off=BackOff(max_truncated_share=0.5, factor=0.5, recovery=8))
        seen = [HEALTHY, CUT_OFF, CUT_OFF, HEALTHY, HEALTHY, *[HEALTHY] * 5]
        values = []
        for summary in seen:
            schedule.observe_completions(summary)
            values.append(schedule.at(0, 2.0))
        assert values == [2.0, 1.5, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2.0, 2.0]

    def test_factor_zero_is_plain_distillation_at_once(self):
        schedule = LambdaSchedule(back_off=BackOff(max_truncated_share=0.5, factor=0.0))
        schedule.observe_completions(CUT_OFF)
        assert schedule.at(0, 1.25) == 1.0

    def test_acts_on_what_warm_up_and_adaptation_leave(self):
        for schedule, expected in (
            (LambdaSchedule("linear", warmup_steps=2, back_off=BackOff(max_truncated_share=0.5)), 1.25),
            (LambdaSchedule("adaptive", gain=0.5, back_off=BackOff(max_truncated_share=0.5)), 1.25),
        ):
            schedule.observe_completions(CUT_OFF)
            assert schedule.at(1, 2.0) == expected

    @pytest.mark.parametrize(
        ("limits", "changes", "alarm"),
        [
            ({"max_truncated_share": 0.3}, {"truncated_share": 0.31}, "truncated share 0.31 > 0.3"),
            ({"max_repetition": 0.2}, {"repetition": 0.25}, "repetition 0.25 > 0.2"),
            ({"max_length_change": 2.0}, {"mean_length": 201.0}, "mean length 201, 100 at the start"),
            ({"max_length_change": 2.0}, {"mean_length": 49.0}, "mean length 49, 100 at the start"),
        ],
    )
    def test_limits_are_told_apart(self, limits, changes, alarm):
        schedule = LambdaSchedule(back_off=BackOff(**limits))
        for _ in range(START_BATCHES):
            assert schedule.observe_completions(HEALTHY) == []
        assert schedule.observe_completions(CompletionSummary(**(vars(HEALTHY) | changes))) == [alarm]
        # at the limit is not beyond it, and what has no limit is ignored
        others = {"truncated_share": 1.0, "repetition": 1.0, "mean_length": 900.0}
        at_limit = {"truncated_share": 0.3, "repetition": 0.2, "mean_length": 200.0}
        (name,) = (limit.replace("max_", "").replace("length_change", "mean_length") for limit in limits)
        assert (
            schedule.observe_completions(CompletionSummary(**(vars(HEALTHY) | others | {name: at_limit[name]}))) == []
        )

    def test_start_is_the_mean_of_the_first_batches(self):
        schedule = LambdaSchedule(back_off=BackOff(max_length_change=1.5))
        lengths = [10.0, 1000.0, *[95.0] * (START_BATCHES - 2)]
        for length in lengths:  # none of these can be told from the start
            assert schedule.observe_completions(CompletionSummary(length, 0.0, 0.0, 0.0)) == []
        start = sum(lengths) / START_BATCHES
        assert schedule.observe_completions(CompletionSummary(start * 1.49, 0.0, 0.0, 0.0)) == []
        assert schedule.observe_completions(CompletionSummary(start * 1.51, 0.0, 0.0, 0.0)) != []

    def test_without_it_nothing_is_observed(self):
        schedule = LambdaSchedule()
        assert schedule.observe_completions(CUT_OFF) == []
        assert schedule.state_dict() == LambdaSchedule().state_dict()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "needs one of `max_truncated_share`.*got None for all. Set one"),
            ({"max_truncated_share": 1.0}, r"`max_truncated_share` must be in \[0, 1\), got 1.0. Use None"),
            ({"max_repetition": -0.1}, r"`max_repetition` must be in \[0, 1\), got -0.1. Use None"),
            ({"max_length_change": 1.0}, "`max_length_change` must be finite and > 1, got 1.0. Use None"),
            ({"max_repetition": 0.1, "factor": 1.0}, r"`factor` must be in \[0, 1\), got 1.0. Use 0.5"),
            ({"max_repetition": 0.1, "recovery": 0}, "`recovery` must be at least 1 batch, got 0. Use 100"),
        ],
    )
    def test_bad_setting_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            BackOff(**arguments)


@pytest.fixture
def logps(generator):
    names = ("student_logps", "teacher_logps", "reference_logps")
    return {name: -torch.rand(4, 7, generator=generator) * 3 for name in names}


class TestDeviationSquares:
    def test_closed_form(self):
        squares = deviation_squares(
            student_logps=torch.tensor([[-1.0, -2.0]]),
            teacher_logps=torch.tensor([[-2.0, -4.0]]),
            reference_logps=torch.tensor([[-5.0, -4.0]]),
            mask=torch.ones(1, 2),
        )
        assert squares.tolist() == [1 + 4, 9 + 0]

    def test_parts_of_a_batch_add_up(self, logps):
        mask = torch.ones(4, 7)
        parts = [
            deviation_squares(**{name: value[rows] for name, value in logps.items()}, mask=mask[rows])
            for rows in (slice(0, 1), slice(1, 4))
        ]
        # 28 summands below 3² in any order
        torch.testing.assert_close(sum(parts), deviation_squares(**logps, mask=mask), rtol=0, atol=28 * EPS * 28 * 9)

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_padding_cannot_leak(self, logps, poison):
        mask = torch.ones(4, 7, dtype=torch.long)
        padded = {name: torch.nn.functional.pad(value, (2, 3), value=poison) for name, value in logps.items()}
        padded_mask = torch.nn.functional.pad(mask, (2, 3))
        got, expected = deviation_squares(**padded, mask=padded_mask), deviation_squares(**logps, mask=mask)
        torch.testing.assert_close(got, expected, rtol=0, atol=28 * EPS * 28 * 9)  # summed in another order

    def test_detached_float32_and_empty(self, logps):
        logps["student_logps"].requires_grad_()
        half = {name: value.bfloat16() for name, value in logps.items()}
        squares = deviation_squares(**half, mask=torch.ones(4, 7))
        assert squares.dtype == torch.float32 and not squares.requires_grad
        empty = {name: torch.zeros(2, 0) for name in logps}
        assert deviation_squares(**empty, mask=torch.zeros(2, 0)).tolist() == [0.0, 0.0]


class TestGateLambda:
    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(
        seed=st.integers(0, 2**16),
        by=st.sampled_from(["number", "row", "column", "token"]),
        threshold=st.none() | st.floats(0.01, 0.99),
        agreement=st.booleans(),
    )
    def test_leaves_lambda_or_sets_it_to_one(self, seed, by, threshold, agreement):
        generator = torch.Generator().manual_seed(seed)
        student, teacher, reference = -torch.rand(3, 4, 7, generator=generator) * 3
        shape = {"number": (), "row": (4,), "column": (4, 1), "token": (4, 7)}[by]
        asked = torch.rand(shape, generator=generator) * 2
        gated = gate_lambda(
            asked.item() if by == "number" else asked,
            student_logps=student,
            teacher_logps=teacher,
            reference_logps=reference,
            deterministic_above=threshold,
            needs_agreement=agreement,
        )
        whole = (asked.unsqueeze(1) if by == "row" else asked).expand(4, 7)
        assert gated.shape == (4, 7) and gated.dtype == torch.float32
        shut = torch.zeros(4, 7, dtype=torch.bool)
        if threshold is not None:
            shut |= teacher > math.log(threshold)
        if agreement:
            shut |= (teacher - student) * (teacher - reference) <= 0
        assert torch.equal(gated, torch.where(shut, 1.0, whole))

    def test_certain_teacher(self):
        nats = torch.tensor([[math.log(p) for p in (0.2, 0.89, 0.9, 0.91, 1.0)]])
        logps = dict.fromkeys(("student_logps", "teacher_logps", "reference_logps"), nats)
        assert gate_lambda(1.25, **logps, deterministic_above=0.9).tolist() == [[1.25, 1.25, 1.25, 1.0, 1.0]]

    def test_gate_of_the_sampled_token_is_shut_only_where_that_of_the_state_is(self, generator):
        """By enumeration: and, for p ≥ ½, for one id of such a state alone."""
        flat_to_peaked = torch.linspace(0, 4, 50).unsqueeze(1)
        everything = (torch.randn(50, 6, generator=generator) * flat_to_peaked).log_softmax(-1)
        zeros = torch.zeros(50, 6)
        for p in (0.3, 0.5, 0.8):
            sampled = gate_lambda(
                2.0, student_logps=zeros, teacher_logps=everything, reference_logps=zeros, deterministic_above=p
            )
            state = gate_lambda(
                2.0,
                student_logps=zeros[:, :1],
                teacher_logps=everything.max(1, keepdim=True).values,
                reference_logps=zeros[:, :1],
                deterministic_above=p,
            )
            assert (state == 1).any() and (state == 2).any()
            shut = (sampled == 1).sum(1)
            assert torch.equal(shut > 0, state[:, 0] == 1)
            if p >= 0.5:
                assert shut.max() == 1

    @pytest.mark.parametrize(
        ("student", "teacher", "reference", "expected"),
        [
            (-2.0, -1.0, -3.0, 1.5),  # both up
            (-1.0, -2.0, -1.5, 1.5),  # both down
            (-1.0, -2.0, -3.0, 1.0),  # the teacher likes it less than the student, and more than the reference
            (-3.0, -2.0, -1.0, 1.0),
            (-2.0, -2.0, -3.0, 1.0),  # nothing to distil
            (-2.0, -2.0, -2.0, 1.5),
        ],
    )
    def test_signs_must_agree(self, student, teacher, reference, expected):
        values = {"student_logps": student, "teacher_logps": teacher, "reference_logps": reference}
        logps = {name: torch.tensor([[value]]) for name, value in values.items()}
        assert gate_lambda(1.5, **logps, needs_agreement=True).item() == expected

    def test_shut_gate_gives_the_advantage_of_plain_distillation(self, logps):
        gated = gate_lambda(1.5, **logps, deterministic_above=0.3, needs_agreement=True)
        mask = torch.ones(4, 7)
        advantages = token_advantages(**logps, mask=mask, gopd_lambda=gated)
        plain = token_advantages(**logps, mask=mask, gopd_lambda=1.0)
        extrapolated = token_advantages(**logps, mask=mask, gopd_lambda=1.5)
        assert 0 < (gated == 1).sum() < gated.numel()
        assert torch.equal(advantages, torch.where(gated == 1, plain, extrapolated))

    def test_is_finite_where_padding_is_not(self, logps):
        logps = {name: value.index_fill(1, torch.tensor([6]), math.nan) for name, value in logps.items()}
        assert gate_lambda(1.25, **logps, deterministic_above=0.5, needs_agreement=True).isfinite().all()

    @pytest.mark.parametrize("probability", [0.0, 1.0, math.nan])
    def test_threshold_must_be_a_probability(self, logps, probability):
        with pytest.raises(ValueError, match=f"must be between 0 and 1, got {probability}. Use None"):
            gate_lambda(1.25, **logps, deterministic_above=probability)
