"""
The estimators with a discount, against gradients of the objective of whole sequences, by enumeration: all sequences of
three tokens from a vocabulary of three, sampled from the student or from another policy.
"""

import itertools

import pytest
import torch

from trl_gopd.gopd.divergence import extrapolated_divergence
from trl_gopd.gopd.objective import credit, later_credit
from trl_gopd.gopd.stratified import log_probs_at, stratified_divergence


EPS = torch.finfo(torch.float32).eps
# What each estimator sums over: the sampled ids alone, one id beside the sampled one, the whole vocabulary.
ESTIMATORS = {"sampled": 0, "stratified": 1, "full": None}


def targets(teacher, reference):
    """What a local model answers, from its logits."""
    return lambda rows, ids: (log_probs_at(teacher[rows], ids), log_probs_at(reference[rows], ids))


class Sequences:
    """All `V^T` sequences, with a row of logits for every prefix: sums over them are exact expectations."""

    V = 3

    def __init__(self, seed, gopd_lambda, length=3):
        gen = torch.Generator().manual_seed(seed)
        self.prefixes = [p for n in range(length) for p in itertools.product(range(self.V), repeat=n)]
        self.ids = torch.tensor(list(itertools.product(range(self.V), repeat=length)))  # (V^T, T)
        self.index = {prefix: number for number, prefix in enumerate(self.prefixes)}
        self.rows = torch.tensor([[self.index[tuple(ids[:n])] for n in range(length)] for ids in self.ids.tolist()])
        self.hidden = torch.eye(len(self.prefixes))[self.rows]  # (V^T, T, prefixes)
        self.table = torch.randn(self.V, len(self.prefixes), generator=gen).requires_grad_()
        # log-probabilities of every id after every prefix, (prefixes, V)
        self.teacher, self.reference, self.sampler = (
            torch.randn(len(self.prefixes), self.V, generator=gen).log_softmax(-1) for _ in range(3)
        )
        self.gopd_lambda = gopd_lambda

    def student(self):
        return self.table.t().log_softmax(-1)

    def advantages(self):
        """`(prefixes, V)`, with gradient."""
        return self.teacher - self.student() + (self.gopd_lambda - 1) * (self.teacher - self.reference)

    def of_sampled(self, values):
        """`(V^T, T)` from `(prefixes, V)`."""
        return values[self.rows].gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)

    def probabilities(self, policy):
        """Of the sequences, `(V^T,)`, under a policy given by its log-probabilities."""
        return self.of_sampled(policy).sum(1).exp()

    def losses(self, estimator, discount, weights=None):
        """`(V^T,)`: their gradients are what each sequence estimates. With `weights`, TRL multiplies by nothing."""
        ones = torch.ones(self.ids.shape)
        own = ones if weights is None else weights
        logps = self.of_sampled(self.student())
        if estimator == "sampled":
            sampled = self.of_sampled(self.advantages()).detach()
            return -(own * credit(sampled, ones, discount=discount, weights=weights) * logps).sum(1)
        teacher, reference = (logps[self.rows.flatten()] for logps in (self.teacher, self.reference))
        arguments = (self.hidden.flatten(0, 1), self.table, None)
        options = {"labels": self.ids.flatten(), "gopd_lambda": self.gopd_lambda}
        if estimator == "full":
            out = extrapolated_divergence(
                *arguments, target_logits=lambda rows: (teacher[rows], reference[rows]), **options
            )
        else:
            options |= {"top_k": ESTIMATORS[estimator], "target_logps": targets(teacher, reference)}
            options["importance_weights"] = None if weights is None else weights.flatten()
            out = stratified_divergence(*arguments, **options)
        expected = out.expected_advantage.view(self.ids.shape)
        later = later_credit(expected, ones, discount=discount, weights=weights)
        return (out.divergence.view(self.ids.shape) - own * later * out.student_logps.view(self.ids.shape)).sum(1)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.table, retain_graph=True)[0]

    def value_after(self, prefix, discount):
        """Σ_y π(y)·(A + γ·value after y), of the states that follow `prefix` under the student; 0 at the end."""
        if prefix not in self.index:
            return 0.0
        row = self.index[prefix]
        advantages, probs = self.advantages().detach()[row], self.student().detach()[row].exp()
        return sum(
            float(probs[y]) * (float(advantages[y]) + discount * self.value_after((*prefix, y), discount))
            for y in range(self.V)
        )

    def exact_gradient(self, visits, discount):
        """Of −Σ_s visits(s) Σ_y π(y)·(A(y) + γ·value after y), through this π(y) alone."""
        advantages, loss = self.advantages().detach(), 0.0
        for prefix, row in self.index.items():
            later = torch.tensor([self.value_after((*prefix, y), discount) for y in range(self.V)])
            loss = loss - visits[row] * (self.student()[row].exp() * (advantages[row] + discount * later)).sum()
        return self.gradient(loss)

    def visits(self, policy):
        """Probability of coming to each prefix, `(prefixes,)`."""
        position_of = torch.zeros(len(self.ids), len(self.prefixes), dtype=torch.float32).scatter_(1, self.rows, 1.0)
        return self.probabilities(policy) @ position_of

    @property
    def tolerance(self):
        """Of V^T sequences of T tokens, numbers of magnitude below 16 and weights below 8."""
        return self.ids.numel() * 16 * EPS


@pytest.mark.parametrize("gopd_lambda", [1.0, 1.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestOnPolicy:
    def test_without_a_discount_it_is_the_gradient_of_whole_sequences(self, estimator, gopd_lambda):
        """γ = 1, against autograd of −E[Σ A]."""
        problem = Sequences(0, gopd_lambda)
        objective = -(problem.probabilities(problem.student()) * problem.of_sampled(problem.advantages()).sum(1)).sum()
        got = problem.gradient(problem.probabilities(problem.student().detach()) @ problem.losses(estimator, 1.0))
        torch.testing.assert_close(got, problem.gradient(objective), rtol=0, atol=problem.tolerance)

    @pytest.mark.parametrize("discount", [0.0, 0.6])
    def test_discount_is_of_each_later_token(self, estimator, gopd_lambda, discount):
        problem = Sequences(1, gopd_lambda)
        policy = problem.student().detach()
        got = problem.gradient(problem.probabilities(policy) @ problem.losses(estimator, discount))
        want = problem.exact_gradient(problem.visits(policy), discount)
        torch.testing.assert_close(got, want, rtol=0, atol=problem.tolerance)


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("discount", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestOffPolicy:
    """
    Sequences of another policy μ, with weights w = π/μ of their tokens: the gradient of the student at the states that
    μ visits. Weights outside of the discounted sum, or none on the later tokens, would give another one.
    """

    def test_expectation(self, estimator, discount, length):
        problem = Sequences(2, 1.5, length)
        weights = problem.of_sampled(problem.student().detach() - problem.sampler).exp()
        got = problem.gradient(
            problem.probabilities(problem.sampler) @ problem.losses(estimator, discount, weights=weights)
        )
        want = problem.exact_gradient(problem.visits(problem.sampler), discount)
        assert weights.max() < 8
        torch.testing.assert_close(got, want, rtol=0, atol=8 * problem.tolerance)

    def test_first_token_needs_no_correction_of_its_states(self, estimator, discount, length):
        """All policies start at one state, so there the gradient is that of tokens of the student."""
        problem = Sequences(3, 1.5, length)
        policy = problem.student().detach()
        weights = problem.of_sampled(policy - problem.sampler).exp()
        off_policy = problem.probabilities(problem.sampler) @ problem.losses(estimator, discount, weights=weights)
        on_policy = problem.probabilities(policy) @ problem.losses(estimator, discount)
        start = problem.index[()]
        got, want = problem.gradient(off_policy)[:, start], problem.gradient(on_policy)[:, start]
        assert weights.max() < 8
        torch.testing.assert_close(got, want, rtol=0, atol=8 * problem.tolerance)


def test_expected_advantages_are_less_noisy_than_sampled_ones():
    for seed in range(5):
        problem = Sequences(seed, 1.25)
        probabilities = problem.probabilities(problem.student()).detach()
        variances = {}
        for estimator in ESTIMATORS:
            gradients = torch.stack([problem.gradient(loss) for loss in problem.losses(estimator, 1.0)])
            centred = gradients - torch.einsum("n,nvp->vp", probabilities, gradients)
            variances[estimator] = float(probabilities @ centred.square().sum((1, 2)))
        assert max(variances["full"], variances["stratified"]) < variances["sampled"]
