"""
Laws of the advantages, of their credit over later tokens, and of the target: closed forms, naive loops, padding. The
expectation of the credit is enumerated in `test_whole_sequences.py`.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_gopd.gopd.objective import (
    LogitTransform,
    credit,
    expectation,
    extrapolate,
    implicit_rewards,
    lambda_is_one,
    later_credit,
    token_advantages,
)


EPS = torch.finfo(torch.float32).eps
# The worked example: targets q_λ for T = (.5, .3, .2) and R = (.2, .3, .5).
TEACHER, REFERENCE = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
TARGETS = {
    0.5: (0.339, 0.322, 0.339),
    1.0: (0.5, 0.3, 0.2),
    1.25: (0.578, 0.276, 0.146),
    1.5: (0.650, 0.246, 0.104),
    2.0: (0.767, 0.184, 0.049),
}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def draw(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=dtype)


class TestTokenAdvantages:
    def advantages(self, generator, **changes):
        args = {
            name: draw(2, 5, generator=generator) for name in ("student_logps", "teacher_logps", "reference_logps")
        }
        args |= {"mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), "gopd_lambda": 1.25} | changes
        return args, token_advantages(**args)

    def test_closed_form(self, generator):
        args, advantages = self.advantages(generator)
        s, t, r = args["student_logps"], args["teacher_logps"], args["reference_logps"]
        expected = (1.25 * t - 0.25 * r - s) * args["mask"]
        # four roundings of numbers of magnitude below 10
        torch.testing.assert_close(advantages, expected, rtol=0, atol=4 * EPS * 10)

    def test_lambda_one_ignores_reference(self, generator):
        args, advantages = self.advantages(generator, gopd_lambda=1.0)
        assert torch.equal(advantages, token_advantages(**args | {"reference_logps": None}))
        nan = torch.full((2, 5), math.nan)
        assert torch.equal(advantages, token_advantages(**args | {"reference_logps": nan}))

    def test_teacher_as_reference_makes_lambda_irrelevant(self, generator):
        args, _ = self.advantages(generator)
        args["reference_logps"] = args["teacher_logps"]
        values = [token_advantages(**args | {"gopd_lambda": value}) for value in (0.0, 1.0, 1.25, 2.0)]
        assert all(torch.equal(values[0], other) for other in values[1:])

    def test_same_model_three_times_gives_zero(self, generator):
        args, _ = self.advantages(generator)
        same = args["student_logps"]
        args |= {"teacher_logps": same, "reference_logps": same}
        assert torch.equal(token_advantages(**args), torch.zeros(2, 5))

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_padding_cannot_leak(self, generator, poison):
        args, advantages = self.advantages(generator)
        padded = {
            name: args[name].masked_fill(args["mask"] == 0, poison)
            for name in ("student_logps", "teacher_logps", "reference_logps")
        }
        assert torch.equal(advantages, token_advantages(**args | padded))
        assert torch.equal(advantages[0, 3:], torch.zeros(2))

    def test_lambda_by_row_and_by_token(self, generator):
        args, _ = self.advantages(generator)
        by_row = token_advantages(**args | {"gopd_lambda": torch.tensor([0.5, 1.5])})
        for row, value in enumerate((0.5, 1.5)):
            assert torch.equal(by_row[row], token_advantages(**args | {"gopd_lambda": value})[row])
        by_token = token_advantages(**args | {"gopd_lambda": torch.tensor([[0.5] * 5, [1.5] * 5])})
        assert torch.equal(by_row, by_token)

    def test_row_at_one_survives_infinite_reward(self, generator):
        args, _ = self.advantages(generator, gopd_lambda=torch.tensor([1.0, 1.25]))
        args["reference_logps"] = torch.full((2, 5), -math.inf)
        assert token_advantages(**args)[0].isfinite().all()

    def test_clip_acts_on_the_extrapolation_alone(self, generator):
        args, _ = self.advantages(generator)
        args["teacher_logps"] = args["teacher_logps"] + 20
        plain = token_advantages(**args | {"gopd_lambda": 1.0})
        assert torch.equal(plain, token_advantages(**args | {"gopd_lambda": 1.0, "extrapolation_clip": 0.5}))
        clipped = token_advantages(**args | {"gopd_lambda": 1.25, "extrapolation_clip": 0.5})
        expected = plain + 0.25 * 0.5 * args["mask"]
        torch.testing.assert_close(clipped, expected, rtol=0, atol=2 * EPS * 32)

    def test_detached_and_float32(self, generator):
        student = draw(1, 3, generator=generator).requires_grad_()
        advantages = token_advantages(
            student_logps=student,
            teacher_logps=draw(1, 3, generator=generator).bfloat16(),
            reference_logps=None,
            mask=torch.ones(1, 3),
            gopd_lambda=1.0,
        )
        assert not advantages.requires_grad and advantages.dtype == torch.float32

    def test_inputs_are_left_alone(self, generator):
        args, _ = self.advantages(generator)
        before = {name: value.clone() for name, value in args.items() if isinstance(value, torch.Tensor)}
        token_advantages(**args)
        assert all(torch.equal(args[name], value) for name, value in before.items())

    def test_empty_batch(self):
        empty = torch.zeros(2, 0)
        advantages = token_advantages(
            student_logps=empty, teacher_logps=empty, reference_logps=empty, mask=empty, gopd_lambda=1.25
        )
        assert advantages.shape == (2, 0)

    def test_missing_reference_raises(self, generator):
        with pytest.raises(ValueError, match=r"gopd_lambda=1.25.*got None. Pass it, or use 1"):
            self.advantages(generator, reference_logps=None)


class CountOperations(TorchDispatchMode):
    """Counts what is dispatched to a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def credit_by_loop(advantages, mask, discount, weights):
    """One token after the other, from the last, in Python floats."""
    result = torch.zeros_like(advantages)
    for row in range(len(advantages)):
        later = 0.0
        for t in reversed(range(advantages.size(1))):
            if mask[row, t]:
                result[row, t] = float(advantages[row, t]) + discount * later
                later = float(weights[row, t]) * float(result[row, t])
    return result


def later_credit_by_loop(expected, mask, discount, weights):
    result = torch.zeros_like(expected)
    for row in range(len(expected)):
        later = 0.0
        for t in reversed(range(expected.size(1))):
            if mask[row, t]:
                result[row, t] = discount * later
                later = float(expected[row, t]) + float(weights[row, t]) * float(result[row, t])
    return result


class TestCredit:
    def problem(self, generator, rows, length):
        """Half of the tokens are left out; weights are 0 for some, as TRL's are where it masks them."""
        mask = (torch.rand(rows, length, generator=generator) < 0.5).long()
        advantages = draw(rows, length, generator=generator, dtype=torch.float64) * mask
        weights = (torch.rand(rows, length, generator=generator, dtype=torch.float64) * 2.4 - 0.4).clamp(min=0)
        return advantages, mask, weights

    @pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 64, 65, 203])
    @pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
    @pytest.mark.parametrize("is_weighted", [False, True])
    @pytest.mark.parametrize("function", [credit, later_credit])
    def test_equals_a_loop_over_the_tokens(self, generator, length, discount, is_weighted, function):
        advantages, mask, weights = self.problem(generator, 4, length)
        by_loop = credit_by_loop if function is credit else later_credit_by_loop
        weights = weights if is_weighted else None
        expected = by_loop(advantages, mask, discount, torch.ones_like(advantages) if weights is None else weights)
        got = function(advantages, mask, discount=discount, weights=weights)
        assert got.dtype == torch.float64
        # A dozen roundings for each of up to `length` terms, relative to the sum of the terms without their signs.
        size = by_loop(advantages.abs(), mask, discount, torch.ones_like(advantages) if weights is None else weights)
        eps64 = torch.finfo(torch.float64).eps
        assert ((got - expected).abs() <= 12 * length * eps64 * size).all()

    def test_tokens_that_are_left_out_do_not_discount(self, generator):
        """A gap in the mask, as answers of tools leave it, changes nothing."""
        advantages, weights = draw(2, 5, generator=generator), torch.rand(2, 5, generator=generator)
        places = torch.tensor([1, 2, 5, 6, 9])
        mask = torch.zeros(2, 11).index_fill(1, places, 1)
        spread = [torch.zeros(2, 11).index_copy(1, places, x) for x in (advantages, weights)]
        for function in (credit, later_credit):
            dense = function(advantages, torch.ones(2, 5), discount=0.5, weights=weights)
            got = function(spread[0], mask, discount=0.5, weights=spread[1])
            # five terms below 4 in another order
            torch.testing.assert_close(got[:, places], dense, rtol=0, atol=2 * 5 * EPS * 4)
            assert got[mask == 0].abs().max() == 0

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_padding_cannot_leak(self, generator, poison):
        advantages, mask, weights = self.problem(generator, 3, 9)
        hidden = weights.masked_fill(mask == 0, poison)
        assert torch.equal(
            credit(advantages, mask, discount=0.9, weights=hidden),
            credit(advantages, mask, discount=0.9, weights=weights),
        )
        assert torch.equal(
            later_credit(advantages.masked_fill(mask == 0, poison), mask, discount=0.9, weights=hidden),
            later_credit(advantages, mask, discount=0.9, weights=weights),
        )

    def test_discount_zero_leaves_advantages_alone(self, generator):
        """Bit for bit, so with infinite ones too: 0 * inf would be NaN."""
        advantages, mask, weights = self.problem(generator, 3, 9)
        advantages[0, 4], mask[0, 4] = math.inf, 1
        assert torch.equal(credit(advantages, mask, discount=0.0), advantages)
        assert torch.equal(credit(advantages, mask, discount=0.0, weights=weights), advantages)

    def test_own_weight_is_left_to_the_loss(self):
        """G_t = A_t + γ·w_{t+1}·G_{t+1} and L_t = γ·(E_{t+1} + w_{t+1}·L_{t+1}), by hand."""
        values, weights = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[8.0, 3.0, 0.5]])
        ones = torch.ones(1, 3)
        assert credit(values, ones, discount=0.5, weights=weights).tolist() == [[1 + 1.5 * 3, 2 + 0.25 * 4, 4.0]]
        assert later_credit(values, ones, discount=0.5, weights=weights).tolist() == [[0.5 * (2 + 3 * 2), 2.0, 0.0]]

    @pytest.mark.parametrize("function", [credit, later_credit])
    def test_long_products_of_weights_stay_finite(self, function):
        """3²⁰⁰ is infinite in float32, and 0 · inf is NaN: nothing follows the first 200 tokens."""
        mask = torch.ones(1, 300)
        advantages = torch.ones(1, 300).index_fill(1, torch.arange(100, 300), 0.0)
        weights = torch.full((1, 300), 3.0)
        weights[:, :100] = 0.5
        got = function(advantages, mask, discount=1.0, weights=weights)
        # 1 + ½ + ¼ + … in either case: the own advantage and those after it, or a hundred expected ones
        assert got.isfinite().all() and got[0, 0] == 2.0

    @pytest.mark.parametrize("function", [credit, later_credit])
    def test_takes_few_operations_however_long(self, generator, function):
        """A loop would dispatch some operations for each token. Lengths up to the same power of two take as many."""
        counts = []
        for length in (2049, 4096, 4097):
            advantages, mask, weights = self.problem(generator, 2, length)
            with CountOperations() as operations:
                function(advantages, mask, discount=0.9, weights=weights)
            counts.append(operations.count)
        assert counts[0] == counts[1] < counts[2] < 20 * math.log2(4097)

    def test_detached_and_inputs_are_left_alone(self, generator):
        advantages, mask, weights = self.problem(generator, 2, 5)
        before = [x.clone() for x in (advantages, mask, weights)]
        expected = advantages.clone().requires_grad_()
        assert not later_credit(expected, mask, discount=0.5, weights=weights.clone().requires_grad_()).requires_grad
        credit(advantages, mask, discount=0.5, weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(before, (advantages, mask, weights), strict=True))

    @pytest.mark.parametrize("function", [credit, later_credit])
    def test_a_weight_of_the_sequence_is_refused(self, function):
        """It would broadcast, and be multiplied by itself once for each token."""
        with pytest.raises(ValueError, match=r"shape \(2, 3\).*got \(2, 1\). Give one weight a token; leave out"):
            function(torch.ones(2, 3), torch.ones(2, 3), discount=0.5, weights=torch.ones(2, 1))


class TestExtrapolate:
    """Closed forms over whole vocabularies are in `test_extrapolation.py`."""

    @pytest.mark.parametrize("gopd_lambda", [0.0, 0.5, 1.0, 1.25, 2.0])
    def test_id_that_the_teacher_excludes_has_no_probability(self, gopd_lambda):
        """Whether the reference has it or not."""
        teacher = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
        reference = torch.tensor([[0.25, 0.25, 0.5, 0.0]]).log()
        log_q, log_z = extrapolate(teacher_logps=teacher, reference_logps=reference, gopd_lambda=gopd_lambda)
        # T^λ R^(1−λ) = ½·2^(λ−1) for each of two ids
        torch.testing.assert_close(log_q.exp(), torch.tensor([[0.5, 0.5, 0.0, 0.0]]), rtol=0, atol=8 * EPS)
        torch.testing.assert_close(log_z, torch.tensor([(gopd_lambda - 1) * math.log(2)]), rtol=0, atol=8 * EPS)

    def test_rows_have_a_lambda_each(self, generator):
        teacher, reference = (draw(3, 5, generator=generator).log_softmax(-1) for _ in range(2))
        lambdas = torch.tensor([0.5, 1.0, 1.75])
        log_q, log_z = extrapolate(teacher_logps=teacher, reference_logps=reference, gopd_lambda=lambdas)
        joint = teacher.double() + (lambdas.double() - 1).unsqueeze(1) * (teacher.double() - reference.double())
        expected = joint.logsumexp(-1)
        # a dozen roundings of numbers below 16
        torch.testing.assert_close(log_z.double(), expected, rtol=0, atol=12 * EPS * 16)
        torch.testing.assert_close(log_q.double(), joint - expected.unsqueeze(1), rtol=0, atol=12 * EPS * 16)

    def test_row_at_one_survives_infinite_reward(self):
        teacher = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
        reference = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
        log_q, _ = extrapolate(teacher_logps=teacher, reference_logps=reference, gopd_lambda=torch.tensor([1.0, 1.25]))
        torch.testing.assert_close(log_q, teacher, rtol=0, atol=4 * EPS)

    @pytest.mark.parametrize("gopd_lambda", [1.0, 1.25])
    def test_any_shape_is_one_of_states(self, generator, gopd_lambda):
        """One state alone, and a batch of rows of states."""
        teacher, reference = (draw(2, 3, 5, generator=generator).log_softmax(-1) for _ in range(2))
        whole = extrapolate(teacher_logps=teacher, reference_logps=reference, gopd_lambda=gopd_lambda)
        assert whole[0].shape == (2, 3, 5) and whole[1].shape == (2, 3)
        for index in ((0, 0), (1, 2)):
            one = extrapolate(teacher_logps=teacher[index], reference_logps=reference[index], gopd_lambda=gopd_lambda)
            assert torch.equal(one[0], whole[0][index]) and torch.equal(one[1], whole[1][index])

    def test_detached_and_float32(self, generator):
        teacher = draw(2, 3, generator=generator).log_softmax(-1).bfloat16().requires_grad_()
        for gopd_lambda in (1.0, 1.25):
            for value in extrapolate(teacher_logps=teacher, reference_logps=teacher, gopd_lambda=gopd_lambda):
                assert value.dtype == torch.float32 and not value.requires_grad

    def test_missing_reference_raises(self):
        with pytest.raises(ValueError, match=r"gopd_lambda=1.25.*got None. Pass it, or use 1"):
            extrapolate(teacher_logps=torch.zeros(1, 1), reference_logps=None, gopd_lambda=1.25)

    def test_clip_bounds_the_reward(self):
        teacher, reference = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()
        log_q, _ = extrapolate(
            teacher_logps=teacher, reference_logps=reference, gopd_lambda=2.0, extrapolation_clip=0.5
        )
        expected = torch.tensor([[0.9 * math.exp(0.5), 0.1 * math.exp(-0.5)]])
        torch.testing.assert_close(log_q.exp(), expected / expected.sum(), rtol=0, atol=8 * EPS)


class TestImplicitRewards:
    def test_closed_form(self):
        teacher, reference = torch.tensor([3.0, 0.0, -1.0]), torch.tensor([1.0, 0.25, 4.0])
        got = implicit_rewards(teacher_logps=teacher, reference_logps=reference)
        assert got.tolist() == [2.0, -0.25, -5.0]
        got = implicit_rewards(teacher_logps=teacher, reference_logps=reference, extrapolation_clip=1.5)
        assert got.tolist() == [1.5, -0.25, -1.5]

    def test_detached_and_float32(self):
        """In float32 before the difference: 8 − ¹/₃₂ has no place in bfloat16."""
        teacher, reference = torch.tensor([8.0, 1.0]).bfloat16(), torch.tensor([0.03125, 1.0]).bfloat16()
        rewards = implicit_rewards(teacher_logps=teacher.requires_grad_(), reference_logps=reference.requires_grad_())
        assert rewards.tolist() == [7.96875, 0.0]
        assert rewards.dtype == torch.float32 and not rewards.requires_grad


class TestLambdaIsOne:
    @pytest.mark.parametrize(
        ("gopd_lambda", "expected"),
        [
            (1, True),
            (1.0, True),
            (1.25, False),
            (torch.ones(2), True),
            (torch.tensor([1.0, 1.25]), False),
            (torch.ones(0), True),
        ],
    )
    def test_of_all(self, gopd_lambda, expected):
        assert lambda_is_one(gopd_lambda) is expected


class TestExpectation:
    def test_closed_form_over_the_last_dimension(self):
        probs = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
        values = torch.tensor([[[2.0, 4.0], [4.0, 8.0]]])
        assert expectation(probs, values).tolist() == [[3.0, 7.0]]

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_id_without_probability_adds_nothing(self, value):
        assert expectation(torch.tensor([0.0, 1.0]), torch.tensor([value, 3.0])).item() == 3.0


class TestLogitTransform:
    def test_does_nothing_by_default(self, generator):
        raw = draw(3, 5, generator=generator).bfloat16()
        logits = LogitTransform()(raw)
        assert logits.dtype == torch.float32 and torch.equal(logits, raw.float())
        assert torch.equal(LogitTransform().backward(logits, logits), logits)

    def test_scales_then_caps_then_tempers(self):
        logits = LogitTransform(scale=0.5, softcap=2.0, temperature=4.0)(torch.tensor([6.0]))
        expected = torch.tensor([2.0 * math.tanh(0.5 * 6.0 / 2.0) / 4.0])
        torch.testing.assert_close(logits, expected, rtol=0, atol=4 * EPS)

    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_backward_is_autograd(self, generator, softcap):
        transform = LogitTransform(scale=0.7, softcap=softcap, temperature=1.3)
        raw, grad = draw(3, 5, generator=generator).requires_grad_(), draw(3, 5, generator=generator)
        logits = transform(raw)
        (want,) = torch.autograd.grad((logits * grad).sum(), raw)
        # a dozen roundings of numbers below 4
        torch.testing.assert_close(transform.backward(grad, logits.detach()), want, rtol=0, atol=12 * EPS * 4)


class TestTabularPolicy:
    """The policy gradient with enumerated actions ends at the closed-form optimum."""

    @pytest.mark.parametrize("gopd_lambda", [0.5, 1.0, 1.25, 2.0])
    def test_converges_to_the_optimum(self, gopd_lambda):
        logits = torch.zeros(1, 3, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=1.0)
        for _ in range(500):
            logps = logits.log_softmax(-1)
            advantages = token_advantages(
                student_logps=logps,
                teacher_logps=TEACHER.log().unsqueeze(0),
                reference_logps=REFERENCE.log().unsqueeze(0),
                mask=torch.ones(1, 3),
                gopd_lambda=gopd_lambda,
            )
            loss = -(logps.exp().detach() * advantages * logps).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected = torch.tensor(TARGETS[gopd_lambda])
        # the constants carry three digits
        torch.testing.assert_close(logits.detach().softmax(-1)[0], expected, rtol=0, atol=0.00051)
