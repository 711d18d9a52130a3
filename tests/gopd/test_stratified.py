"""
Laws of the stratified estimator: its expectation, enumerated over tiny vocabularies, its gradient against autograd in
float64, its variance, and what padded vocabularies and bad input do to it.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gopd.gopd.divergence import extrapolated_divergence
from trl_gopd.gopd.objective import LogitTransform, token_advantages
from trl_gopd.gopd.stratified import log_probs_at, stratified_divergence


EPS = torch.finfo(torch.float32).eps
CAPPED = LogitTransform(scale=0.7, softcap=2.0, temperature=1.3)


def draw(*shape, generator, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def targets(teacher, reference):
    """What a local model answers, from its tempered logits."""
    return lambda rows, ids: tuple(None if z is None else log_probs_at(z[rows], ids) for z in (teacher, reference))


def random_ids(rows, vocab_size, k, generator):
    """`(rows, k)` distinct ids a row."""
    return torch.rand(rows, vocab_size, generator=generator).argsort(-1)[:, :k]


class Problem:
    """N tokens with random hidden states, head and targets."""

    def __init__(self, seed, tokens=7, width=5, vocab_size=37):
        gen = torch.Generator().manual_seed(seed)
        self.hidden = draw(tokens, width, generator=gen).requires_grad_()
        self.weight = draw(vocab_size, width, generator=gen).requires_grad_()
        self.bias = draw(vocab_size, generator=gen).requires_grad_()
        self.teacher, self.reference = (draw(tokens, vocab_size, generator=gen) for _ in range(2))
        self.labels = torch.randint(vocab_size, (tokens,), generator=gen)
        self.generator = gen
        # float32 against float64: roundings of the products, sums and softmaxes, of numbers of magnitude below 16
        self.tolerance = (width + vocab_size + 10) * EPS * 16

    @property
    def parameters(self):
        return self.hidden, self.weight, self.bias

    def stratified(self, **changes):
        args = {"labels": self.labels, "gopd_lambda": 1.25, "target_logps": targets(self.teacher, self.reference)}
        if "ids" not in changes:
            args["top_k"] = 4
        return stratified_divergence(*self.parameters, **args | changes)

    def full(self, **changes):
        args = {
            "labels": self.labels,
            "gopd_lambda": 1.25,
            "target_logits": lambda rows: (self.teacher[rows], self.reference[rows]),
        }
        return extrapolated_divergence(*self.parameters, **args | changes)


class TestExpectation:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        seed=st.integers(0, 2**31),
        vocab_size=st.integers(5, 9),
        size=st.integers(1, 9),
        source=st.sampled_from(["student", "caller"]),
        gopd_lambda=st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0]),
        clip=st.sampled_from([None, 0.3]),
        transform=st.sampled_from([LogitTransform(), LogitTransform(temperature=0.7), CAPPED]),
        off_policy=st.booleans(),
    )
    def test_is_that_of_the_whole_vocabulary(
        self, seed, vocab_size, size, source, gopd_lambda, clip, transform, off_policy
    ):
        """One state, each of its V labels once: Σ_y μ(y)·estimate(y), with w = π/μ."""
        k = min(size, vocab_size)
        gen = torch.Generator().manual_seed(seed)
        state, teacher, reference, other = (2 * draw(1, vocab_size, generator=gen) for _ in range(4))
        chosen = random_ids(1, vocab_size, k, gen)
        policy = transform(state).softmax(-1)[0]
        sampler = other.softmax(-1)[0] if off_policy else policy
        every = [z.expand(vocab_size, -1) for z in (state, teacher, reference)]
        hidden = every[0].clone().requires_grad_()
        head = torch.eye(vocab_size).requires_grad_()
        common = {
            "labels": torch.arange(vocab_size),
            "gopd_lambda": gopd_lambda,
            "transform": transform,
            "extrapolation_clip": clip,
        }
        out = stratified_divergence(
            hidden,
            head,
            None,
            target_logps=targets(*every[1:]),
            importance_weights=policy / sampler if off_policy else None,
            **({"top_k": k} if source == "student" else {"ids": chosen.expand(vocab_size, -1)}),
            **common,
        )
        whole = extrapolated_divergence(
            hidden, head, None, target_logits=lambda rows: (every[1][rows], every[2][rows]), **common
        )
        got = torch.autograd.grad((sampler * out.divergence).sum(), (hidden, head))
        want = torch.autograd.grad((policy * whole.divergence).sum(), (hidden, head))
        # Logits below 2·5, so log-ratios below 40 and rewards that λ doubles; a dozen roundings for each of V ids.
        tolerance = 12 * vocab_size * EPS * 80
        torch.testing.assert_close(got[0].sum(0), want[0].sum(0), rtol=0, atol=tolerance)
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=tolerance * 10)  # times a logit
        torch.testing.assert_close(
            (sampler * out.reverse_kl).sum(), whole.reverse_kl[0], rtol=0, atol=tolerance, msg="reverse_kl"
        )
        if gopd_lambda == 1 or k == vocab_size:
            expected = (sampler * out.divergence).sum()
            torch.testing.assert_close(expected, whole.divergence[0], rtol=0, atol=tolerance)

    def test_of_value_is_off_by_the_lumped_normaliser(self):
        """For λ > 1, E[value] = KL − (log Z_λ − log Ẑ) ≤ KL; below 1 it is the other way round."""
        problem = Problem(0, tokens=1)
        size = problem.teacher.size(1)
        policy = (problem.hidden @ problem.weight.t() + problem.bias).softmax(-1)[0].detach()
        log_t, log_r = (z.log_softmax(-1)[0] for z in (problem.teacher, problem.reference))
        inside = policy.topk(4).indices
        outside = torch.ones(size, dtype=torch.bool).index_fill(0, inside, False)
        for gopd_lambda, sign in ((0.5, 1), (1.25, -1), (2.0, -1)):
            values = []
            for label in range(size):
                problem.labels = torch.tensor([label])
                values.append(problem.stratified(gopd_lambda=gopd_lambda).divergence)
            value = (policy * torch.cat(values).detach()).sum()
            tilted = log_t + (gopd_lambda - 1) * (log_t - log_r)
            rest = [logps[outside].logsumexp(0) for logps in (log_t, log_r)]
            lumped = torch.cat([tilted[inside], (rest[0] + (gopd_lambda - 1) * (rest[0] - rest[1])).view(1)])
            gap = lumped.logsumexp(0) - tilted.logsumexp(0)
            expected = problem.full(gopd_lambda=gopd_lambda).divergence[0] + gap
            torch.testing.assert_close(value, expected, rtol=0, atol=problem.tolerance)
            assert sign * gap > 100 * problem.tolerance  # there is a gap to see


class TestAllIds:
    @pytest.mark.parametrize("gopd_lambda", [0.5, 1.0, 1.25, "rows"])
    @pytest.mark.parametrize("transform", [LogitTransform(), CAPPED], ids=["plain", "capped"])
    @pytest.mark.parametrize("clip", [None, 0.3])
    @pytest.mark.parametrize("source", ["student", "caller"])
    def test_are_the_exact_divergence(self, gopd_lambda, transform, clip, source):
        problem = Problem(1)
        size = problem.teacher.size(1)
        choice = {"top_k": size} if source == "student" else {"ids": random_ids(7, size, size, problem.generator)}
        common = {
            "gopd_lambda": torch.linspace(0, 2, 7) if gopd_lambda == "rows" else gopd_lambda,
            "transform": transform,
            "extrapolation_clip": clip,
        }
        out, whole = problem.stratified(**choice, **common), problem.full(**common)
        upstream = draw(7, generator=problem.generator)
        got = torch.autograd.grad((out.divergence * upstream).sum(), problem.parameters)
        want = torch.autograd.grad((whole.divergence * upstream).sum(), problem.parameters)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance * 7)
        for name in vars(whole):
            a, b = getattr(out, name), getattr(whole, name)
            torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance, msg=name)
        torch.testing.assert_close(out.coverage, torch.ones(7), rtol=0, atol=size * EPS)

    @pytest.mark.parametrize("narrow", ["teacher", "reference", "both"])
    def test_padding_of_the_student_is_left_alone(self, narrow):
        """The student has 37 ids and a frozen model 33: the divergence over the 33, and no gradient beyond."""
        problem = Problem(2)
        problem.labels %= 33
        if narrow != "reference":
            problem.teacher = problem.teacher[:, :33]
        if narrow != "teacher":
            problem.reference = problem.reference[:, :33]
        out, whole = problem.stratified(top_k=37), problem.full()
        got = torch.autograd.grad(out.divergence.sum(), problem.parameters)
        want = torch.autograd.grad(whole.divergence.sum(), problem.parameters)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance * 7)
        assert got[1][33:].abs().max() == 0
        for name in ("divergence", "student_logps", "entropy"):
            a, b = getattr(out, name), getattr(whole, name)
            torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance, msg=name)


def explicit(problem, ids, *, gopd_lambda, transform, clip, weights):
    """
    The estimator as its formula has it, in float64 and with autograd: surrogate, parameters, and the estimates of E[A]
    and of the reverse KL.
    """
    parameters = [x.detach().double().requires_grad_() for x in problem.parameters]
    z = (parameters[0] @ parameters[1].t() + parameters[2]) * transform.scale
    z = z if transform.softcap is None else transform.softcap * (z / transform.softcap).tanh()
    log_s = (z / transform.temperature).log_softmax(-1)
    log_t, log_r = (x.double().log_softmax(-1) for x in (problem.teacher, problem.reference))

    def advantages(s, t, r):
        reward = t - r if clip is None else (t - r).clamp(-clip, clip)
        lam = torch.as_tensor(gopd_lambda, dtype=torch.float64).expand(len(s)).unsqueeze(1)
        return t - s + (lam - 1) * reward

    outside = torch.ones_like(log_s).scatter(1, ids, 0.0)
    rests = [(x.detach().exp() * outside).sum(-1, keepdim=True).log() for x in (log_s, log_t, log_r)]
    b, a = advantages(*rests), advantages(log_s.detach(), log_t, log_r)
    label = problem.labels.unsqueeze(1)
    correction = outside.gather(1, label) * weights.double().unsqueeze(1)
    probs = log_s.detach().exp() * (1 - outside)
    surrogate = (
        -(probs * (a - b) * log_s).sum(-1) - (correction * (a - b).gather(1, label) * log_s.gather(1, label))[:, 0]
    )

    def estimate(x, rest):
        return ((probs * x).sum(-1, keepdim=True) + rests[0].exp() * rest + correction * (x.gather(1, label) - rest))[
            :, 0
        ]

    mean = estimate(a, b)
    reverse_kl = estimate(log_s.detach() - log_t, rests[0] - rests[1])
    return surrogate, parameters, mean, reverse_kl, log_s.detach()


class TestGradient:
    @pytest.mark.parametrize("chunk_size", [3, 256])
    @pytest.mark.parametrize("gopd_lambda", [0.5, 1.0, 1.25, "rows"])
    @pytest.mark.parametrize("transform", [LogitTransform(), CAPPED], ids=["plain", "capped"])
    @pytest.mark.parametrize("clip", [None, 0.3])
    @pytest.mark.parametrize("source", ["student", "caller"])
    def test_is_autograd_of_the_formula(self, chunk_size, gopd_lambda, transform, clip, source):
        problem = Problem(3, tokens=11)
        k, size = 6, problem.teacher.size(1)
        logits = problem.hidden @ problem.weight.t() + problem.bias
        ids = logits.topk(k).indices if source == "student" else random_ids(11, size, k, problem.generator)
        problem.labels[::3] = ids[::3, 2]  # some in S, most outside
        lam = torch.linspace(0, 2, 11) if gopd_lambda == "rows" else gopd_lambda
        weights = torch.rand(11, generator=problem.generator) * 2
        upstream = draw(11, generator=problem.generator)
        out = problem.stratified(
            **({"top_k": k} if source == "student" else {"ids": ids}),
            gopd_lambda=lam,
            transform=transform,
            extrapolation_clip=clip,
            importance_weights=weights,
            chunk_size=chunk_size,
        )
        got = torch.autograd.grad((out.divergence * upstream).sum(), problem.parameters)
        log_t, log_r = (z.double().log_softmax(-1) for z in (problem.teacher, problem.reference))
        surrogate, parameters, mean, reverse_kl, log_s = explicit(
            problem, ids, gopd_lambda=lam, transform=transform, clip=clip, weights=weights
        )
        want = torch.autograd.grad((surrogate * upstream).sum(), parameters)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=problem.tolerance * 11)
        pick = problem.labels.unsqueeze(1)
        expected = {
            "student_logps": log_s.gather(1, pick)[:, 0],
            "teacher_logps": log_t.gather(1, pick)[:, 0],
            "reference_logps": log_r.gather(1, pick)[:, 0],
            "entropy": -(log_s.exp() * log_s).sum(-1),
            "reverse_kl": reverse_kl,
            "expected_advantage": mean,
            "coverage": log_s.gather(1, ids).exp().sum(-1),
        }
        if gopd_lambda == 1:
            expected["divergence"] = -mean
        # b is the logarithm of a small difference, 1 − Σ of k probabilities, in each of the models. Its k roundings
        # are divided by the difference, and the correction multiplies them by w and by up to λ = 2.
        masses = [1 - z.gather(1, ids).exp().sum(-1) for z in (log_s, log_t, log_r)]
        cancellation = sum(2 * weights * k * EPS / mass for mass in masses)
        for name, value in expected.items():
            bound = problem.tolerance + cancellation * (name in ("reverse_kl", "expected_advantage", "divergence"))
            assert ((getattr(out, name).double() - value).abs() <= bound).all(), name

    def test_of_a_label_in_the_set_has_no_noise(self):
        problem = Problem(4)
        ids = random_ids(7, 37, 3, problem.generator)
        grads = []
        for column in range(3):
            problem.labels = ids[:, column]
            grads.append(torch.autograd.grad(problem.stratified(ids=ids).divergence.sum(), problem.parameters))
        for other in grads[1:]:
            assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))

    def test_frozen_head(self):
        problem = Problem(5)
        (want,) = torch.autograd.grad(problem.stratified().divergence.sum(), [problem.hidden])
        problem.weight.requires_grad_(False)
        problem.bias.requires_grad_(False)
        problem.stratified().divergence.sum().backward()
        assert torch.equal(problem.hidden.grad, want)
        assert problem.weight.grad is None

    @pytest.mark.parametrize("name", ["stratified", "full"])
    def test_only_the_divergence_and_the_labels_have_one(self, name):
        out = getattr(Problem(6), name)()
        assert {key for key, value in vars(out).items() if value.requires_grad} == {"divergence", "student_logps"}

    @pytest.mark.parametrize("name", ["stratified", "full"])
    @pytest.mark.parametrize("both", [False, True])
    def test_of_the_labels(self, name, both):
        """Alone, and beside that of the divergence; chunked, capped and tempered."""
        problem = Problem(8, tokens=11)
        upstream, other = draw(11, generator=problem.generator), draw(11, generator=problem.generator) * both
        out = getattr(problem, name)(transform=CAPPED, chunk_size=3)
        loss = (out.student_logps * upstream).sum()
        got = torch.autograd.grad(loss + (out.divergence * other).sum() if both else loss, problem.parameters)
        z = problem.hidden @ problem.weight.t() + problem.bias
        log_s = CAPPED(z).log_softmax(-1).gather(1, problem.labels.unsqueeze(1))[:, 0]
        want = torch.autograd.grad((log_s * upstream).sum(), problem.parameters)
        alone = getattr(problem, name)(transform=CAPPED, chunk_size=3).divergence
        of_divergence = torch.autograd.grad((alone * other).sum(), problem.parameters)
        for a, b, c in zip(got, want, of_divergence, strict=True):
            torch.testing.assert_close(a, b + c, rtol=0, atol=problem.tolerance * 11)

    def test_of_a_label_that_the_shared_vocabulary_lacks(self):
        problem = Problem(9, vocab_size=37)
        problem.labels[2] = 36
        out = problem.full(target_logits=lambda rows: (problem.teacher[rows, :30], problem.reference[rows, :30]))
        lacking = problem.labels >= 30
        assert torch.equal(out.student_logps.isneginf(), lacking)
        grad = torch.autograd.grad(out.student_logps.masked_fill(lacking, 0.0).sum(), problem.hidden)[0]
        assert grad[lacking].abs().max() == 0 < grad[~lacking].abs().min()

    def test_reference_is_not_needed_at_one(self):
        problem = Problem(7)
        with_it = problem.stratified(gopd_lambda=1.0)
        without = problem.stratified(gopd_lambda=1.0, target_logps=targets(problem.teacher, None))
        assert torch.equal(with_it.divergence, without.divergence)
        assert without.reference_logps is None

    def test_targets_are_asked_once_a_chunk(self):
        problem, asked = Problem(8), []

        def target_logps(rows, ids):
            asked.append((rows.start, rows.stop, tuple(ids.shape)))
            assert torch.equal(ids[:, -1], problem.labels[rows])
            return targets(problem.teacher, problem.reference)(rows, ids)

        problem.stratified(target_logps=target_logps, chunk_size=3).divergence.sum().backward()
        assert asked == [(0, 3, (3, 5)), (3, 6, (3, 5)), (6, 7, (1, 5))]

    @pytest.mark.parametrize("name", ["stratified", "full"])
    def test_default_chunk_has_256_tokens(self, name):
        """Which bounds the memory of callers who name no size."""
        problem, seen = Problem(8, tokens=300), []

        def answer(rows, ids=None):
            seen.append((rows.start, rows.stop))
            logits = problem.teacher[rows], problem.reference[rows]
            return logits if ids is None else tuple(log_probs_at(z, ids) for z in logits)

        getattr(problem, name)(**{"target_logits" if name == "full" else "target_logps": answer})
        assert seen == [(0, 256), (256, 300)]


class TestVariance:
    def test_falls_with_k_and_ends_at_zero(self):
        """Exact: Σ_y π(y)·|estimate(y) − mean|² of a peaked distribution over 40 ids, averaged over 5 states."""
        gen = torch.Generator().manual_seed(9)
        size, variances = 40, {}
        states, teacher, reference = (3 * draw(5, size, generator=gen) for _ in range(3))
        teacher, reference = states + teacher / 3, states + reference / 3
        repeated = [z.repeat_interleave(size, 0) for z in (states, teacher, reference)]
        labels, probs = torch.arange(size).repeat(5), states.softmax(-1)
        for k in (1, 2, 4, 8, 16, 32, size):
            hidden = repeated[0].clone().requires_grad_()
            out = stratified_divergence(
                hidden,
                torch.eye(size),
                None,
                labels=labels,
                target_logps=targets(*repeated[1:]),
                gopd_lambda=1.25,
                top_k=k,
            )
            (grad,) = torch.autograd.grad(out.divergence.sum(), hidden)
            grad = grad.view(5, size, size)
            mean = (probs.unsqueeze(-1) * grad).sum(1, keepdim=True)
            variances[k] = float((probs * (grad - mean).square().sum(-1)).sum(-1).mean())
        falling = list(variances.values())
        assert all(later < earlier for earlier, later in zip(falling, falling[1:], strict=False)), variances
        assert variances[16] < variances[1] / 10
        assert variances[size] < (size * EPS * 16) ** 2

    def test_is_zero_where_the_lumping_is_right(self):
        """If log π*/π is the same for all ids outside S, b is their advantage, and the sampled token adds nothing."""
        problem = Problem(10, tokens=1)
        logits = (problem.hidden @ problem.weight.t() + problem.bias).detach()
        ids = logits.topk(4).indices
        problem.teacher = logits.scatter_add(1, ids, torch.tensor([[1.0, -2.0, 0.5, 3.0]]))
        exact = torch.autograd.grad(problem.full(gopd_lambda=1.0).divergence.sum(), problem.parameters)
        for label in range(37):
            problem.labels = torch.tensor([label])
            got = torch.autograd.grad(problem.stratified(gopd_lambda=1.0).divergence.sum(), problem.parameters)
            for a, b in zip(got, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance)


class TestEdges:
    def test_chunks_do_not_matter(self):
        problem = Problem(11, tokens=10)
        results = []
        for chunk_size in (1, 4, 10, 256):
            out = problem.stratified(chunk_size=chunk_size)
            grads = torch.autograd.grad(out.divergence.sum(), problem.parameters)
            results.append((*vars(out).values(), *grads))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance * 10)

    @pytest.mark.parametrize("choice", [{"top_k": 3}, {"ids": torch.zeros(0, 3, dtype=torch.long)}])
    def test_no_tokens(self, choice):
        problem = Problem(12)
        problem.hidden = torch.zeros(0, 5, requires_grad=True)
        problem.labels = torch.zeros(0, dtype=torch.long)
        out = problem.stratified(**choice)
        assert {value.shape for value in vars(out).values()} == {(0,)}
        out.divergence.sum().backward()
        assert problem.weight.grad.abs().max() == 0

    def test_bfloat16(self):
        """Values from the logits that bfloat16 gives, gradients in bfloat16."""
        problem = Problem(13)
        low = Problem(13)
        low.hidden, low.weight, low.bias = (x.detach().bfloat16().requires_grad_() for x in problem.parameters)
        logits = torch.nn.functional.linear(*(x.detach() for x in low.parameters)).float()
        problem.hidden, problem.weight, problem.bias = logits.requires_grad_(), torch.eye(37), torch.zeros(37)
        out, exact = low.stratified(), problem.stratified()
        assert out.divergence.dtype == torch.float32
        for name in vars(out):
            a, b = getattr(out, name), getattr(exact, name)
            torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance, msg=name)
        grads = torch.autograd.grad(out.divergence.sum(), low.parameters)
        (grad,) = torch.autograd.grad(exact.divergence.sum(), [problem.hidden])
        half = torch.finfo(torch.bfloat16).eps / 2
        # the gradient of the logits is rounded, and so is each of the results
        expected = grad @ low.weight.detach().float()
        bound = half * (grad.abs() @ low.weight.detach().float().abs() + expected.abs()) + problem.tolerance
        assert ((grads[0].float() - expected).abs() <= bound).all()
        assert all(g.dtype == torch.bfloat16 for g in grads)

    def test_certain_models_stay_finite(self):
        """All mass in S to the last digit, for each of the models in turn and for all at once."""
        gen = torch.Generator().manual_seed(14)
        for certain in ((0,), (1,), (2,), (0, 1, 2)):
            z = [draw(6, 9, generator=gen) for _ in range(3)]
            for index in certain:
                z[index][:, 0] += 200
            hidden = z[0].requires_grad_()
            out = stratified_divergence(
                hidden,
                torch.eye(9),
                None,
                labels=torch.arange(6),
                target_logps=targets(*z[1:]),
                gopd_lambda=1.25,
                top_k=2,
            )
            (grad,) = torch.autograd.grad(out.divergence.sum(), hidden)
            assert grad.isfinite().all()
            assert all(value.isfinite().all() for value in vars(out).values())

    def test_smallest_probability_of_the_rest(self):
        """Outside S it counts as 2⁻²³, and so enters b = log(2⁻²³/½) + (λ − 1)·log(2⁻²³/π_ref(S̄))."""
        teacher = torch.tensor([[0.0, 0.0, -200.0, -200.0]])
        reference = torch.tensor([[3.0, 3.0, 2.0, 0.0]]).log_softmax(-1)
        rest = reference[0, 2:].exp().sum()
        out = stratified_divergence(
            torch.zeros(1, 4),
            torch.eye(4),
            None,
            labels=torch.tensor([1]),
            target_logps=targets(teacher, reference),
            gopd_lambda=1.25,
            ids=torch.tensor([[0, 1]]),
        )
        smallest = math.log(2**-23)
        inside = math.log(0.5 / 0.25) + 0.25 * (math.log(0.5) - reference[0, 0])
        outside = smallest - math.log(0.5) + 0.25 * (smallest - rest.log())
        # a dozen roundings of numbers below 32
        torch.testing.assert_close(out.expected_advantage[0], 0.5 * inside + 0.5 * outside, rtol=0, atol=12 * EPS * 32)

    def test_log_probabilities_that_sum_to_more_than_one(self):
        """A server that rounds: the mass outside S is negative, b a poor guess, and the expectation as before."""
        problem = Problem(15, tokens=1)
        logits = problem.hidden @ problem.weight.t() + problem.bias
        ids, policy, total = problem.teacher.topk(36).indices, logits.softmax(-1)[0].detach(), 0.0
        exact = targets(problem.teacher, problem.reference)

        def rounded(rows, asked):
            return tuple(logps + 0.01 for logps in exact(rows, asked))

        assert rounded(slice(0, 1), ids)[0].exp().sum() > 1
        for label in range(37):
            problem.labels = torch.tensor([label])
            out = problem.stratified(ids=ids, target_logps=rounded)
            total += policy[label] * torch.autograd.grad(out.divergence.sum(), problem.hidden)[0]
        (want,) = torch.autograd.grad(problem.full().divergence.sum(), problem.hidden)
        torch.testing.assert_close(total, want, rtol=0, atol=problem.tolerance)


class TestPaddedVocabularies:
    """The student has 37 ids, the teacher 30 and the reference 33."""

    def problem(self):
        problem = Problem(16)
        problem.teacher, problem.reference = problem.teacher[:, :30], problem.reference[:, :33]
        return problem

    def test_ids_of_the_set_that_a_model_lacks_get_nothing(self):
        problem = self.problem()
        problem.labels %= 30
        ids = torch.tensor([[3, 36, 5, 34]]).expand(7, -1)
        upstream = draw(7, generator=problem.generator)
        out = problem.stratified(ids=ids)
        grads = torch.autograd.grad((out.divergence * upstream).sum(), problem.parameters)
        assert all(grad.isfinite().all() for grad in grads)
        assert grads[1][[34, 36]].abs().max() == 0
        # the same as a student without these ids
        kept = [i for i in range(37) if i not in (34, 36)]
        weight, bias = problem.weight.detach()[kept], problem.bias.detach()[kept]
        short = stratified_divergence(
            problem.hidden,
            weight,
            bias,
            labels=problem.labels,
            target_logps=targets(problem.teacher, problem.reference),
            gopd_lambda=1.25,
            ids=torch.tensor([[3, 5]]).expand(7, -1),
        )
        (want,) = torch.autograd.grad((short.divergence * upstream).sum(), problem.hidden)
        torch.testing.assert_close(grads[0], want, rtol=0, atol=problem.tolerance)
        for name in vars(out):
            a, b = getattr(out, name), getattr(short, name)
            torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance, msg=name)

    @pytest.mark.parametrize("label", [31, 35, 40])
    def test_such_a_label_adds_nothing_and_is_marked(self, label):
        """Beyond the teacher, beyond both frozen models, beyond the student too."""
        problem = self.problem()
        ids = torch.tensor([[3, 9, 5]]).expand(7, -1)
        problem.labels = torch.full((7,), label)
        out = problem.stratified(ids=ids)
        grads = torch.autograd.grad(out.divergence.sum(), problem.parameters)
        problem.labels = torch.full((7,), 3)  # in S, so without a correction
        inside = problem.stratified(ids=ids)
        want = torch.autograd.grad(inside.divergence.sum(), problem.parameters)
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
        assert torch.equal(out.divergence, inside.divergence) and torch.equal(out.reverse_kl, inside.reverse_kl)
        assert out.student_logps.isneginf().all()

    def test_ids_that_only_a_teacher_has(self):
        """A teacher padded wider than the student may list its padding; to the student it does not exist."""
        problem = Problem(17)
        without = problem.stratified(ids=torch.tensor([[0, 5]]).expand(7, -1))
        want = torch.autograd.grad(without.divergence.sum(), problem.parameters)
        problem.teacher = torch.cat([problem.teacher, draw(7, 1, generator=problem.generator)], 1)
        out = problem.stratified(ids=torch.tensor([[0, 37, 5]]).expand(7, -1))
        got = torch.autograd.grad(out.divergence.sum(), problem.parameters)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance * 7)
        for name in ("divergence", "student_logps", "entropy", "coverage"):
            a, b = getattr(out, name), getattr(without, name)
            torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance, msg=name)


class TestLogProbsAt:
    def test_are_the_log_softmax(self):
        logits = draw(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
        ids = torch.tensor([[0, 7], [3, 3], [8, 1]])
        got = log_probs_at(logits, ids)
        assert got.dtype == torch.float32 and got[2, 0] == -math.inf
        logps = logits.double().log_softmax(-1)
        expected = torch.stack([logps[0, [0, 7]], logps[1, [3, 3]]])
        torch.testing.assert_close(got[:2].double(), expected, rtol=0, atol=10 * EPS * 8)


class TestBadInput:
    def test_exactly_one_source(self):
        ids = torch.zeros(7, 1, dtype=torch.long)
        with pytest.raises(ValueError, match="either `top_k` or `ids`, got both"):
            Problem(0).stratified(ids=ids, top_k=4)
        with pytest.raises(ValueError, match="either `top_k` or `ids`, got neither"):
            Problem(0).stratified(ids=None)

    @pytest.mark.parametrize(("top_k", "complaint"), [(0, "at least 1, got 0"), (38, "vocabulary, 37, got 38")])
    def test_top_k_is_within_the_vocabulary(self, top_k, complaint):
        with pytest.raises(ValueError, match=complaint):
            Problem(0).stratified(top_k=top_k)

    @pytest.mark.parametrize(
        "ids",
        [
            torch.zeros(7, dtype=torch.long),
            torch.zeros(6, 2, dtype=torch.long),
            torch.zeros(7, 0, dtype=torch.long),
            torch.zeros(7, 1),
        ],
        ids=["flat", "rows", "empty", "float"],
    )
    def test_shape_of_ids(self, ids):
        with pytest.raises(ValueError, match=r"int64 of shape \(7, k\).*got torch"):
            Problem(0).stratified(ids=ids)

    @pytest.mark.parametrize("row", [[4, 2, 4], [-1, 2, 4]])
    def test_ids_are_a_set(self, row):
        """An id that is listed twice would count twice."""
        with pytest.raises(ValueError, match="non-negative and distinct"):
            Problem(0).stratified(ids=torch.tensor([[0, 1, 2]] * 6 + [row]))

    def test_shape_of_importance_weights(self):
        with pytest.raises(ValueError, match=r"`importance_weights`.*\(7,\).*got \(7, 1\)"):
            Problem(0).stratified(importance_weights=torch.ones(7, 1))

    @pytest.mark.parametrize("model", ["teacher", "reference"])
    def test_shape_of_targets(self, model):
        """Whole logits in place of the ids' log-probabilities."""
        shapes = {"teacher": (7, 5), "reference": (7, 5)} | {model: (7, 37)}
        answer = tuple(torch.zeros(shape) for shape in shapes.values())
        with pytest.raises(ValueError, match=rf"of the {model} for each of the ids.*\(7, 5\), got \(7, 37\)"):
            Problem(0).stratified(target_logps=lambda rows, ids: answer)

    def test_missing_reference(self):
        problem = Problem(0)
        with pytest.raises(ValueError, match="got None. Pass it, or use 1"):
            problem.stratified(target_logps=targets(problem.teacher, None))


def test_sampled_estimator_is_the_other_end():
    """With S a single id of almost no mass, b aside, what is left is the paper's estimator."""
    problem = Problem(18, tokens=1)
    logits = (problem.hidden @ problem.weight.t() + problem.bias).detach()
    least = logits.argmin(-1, keepdim=True)
    problem.labels = logits.argmax(-1)
    problem.bias.data[least] -= 200
    # The student's mass on that id is 0, so a common factor keeps both sums over the others, and with them b, at 1.
    problem.teacher[0, least[0, 0]] = problem.reference[0, least[0, 0]] = -200.0
    got = torch.autograd.grad(problem.stratified(ids=least).divergence.sum(), problem.parameters)
    logps = (problem.hidden @ problem.weight.t() + problem.bias).log_softmax(-1)[:, problem.labels]
    advantage = token_advantages(
        student_logps=logps,
        teacher_logps=problem.teacher.log_softmax(-1)[:, problem.labels],
        reference_logps=problem.reference.log_softmax(-1)[:, problem.labels],
        mask=torch.ones(1, 1),
        gopd_lambda=1.25,
    )
    want = torch.autograd.grad((-advantage * logps).sum(), problem.parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=problem.tolerance)
