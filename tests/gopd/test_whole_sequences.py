"""The estimators with a discount of 1, against the gradient of the objective of whole sequences, by enumeration."""

import itertools

import pytest
import torch

from trl_gopd.gopd.divergence import extrapolated_divergence
from trl_gopd.gopd.objective import discounted_advantages
from trl_gopd.gopd.stratified import log_probs_at, stratified_divergence


EPS = torch.finfo(torch.float32).eps


def targets(teacher, reference):
    """What a local model answers, from its logits."""
    return lambda rows, ids: (log_probs_at(teacher[rows], ids), log_probs_at(reference[rows], ids))


class Sequences:
    """All `V^T` sequences, with a row of logits for every prefix: sums over them are exact expectations."""

    V, T = 3, 3

    def __init__(self, seed, gopd_lambda):
        gen = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(self.T) for p in itertools.product(range(self.V), repeat=n)]
        self.ids = torch.tensor(list(itertools.product(range(self.V), repeat=self.T)))  # (V^T, T)
        index = {prefix: number for number, prefix in enumerate(prefixes)}
        rows = [[index[tuple(ids[:n])] for n in range(self.T)] for ids in self.ids.tolist()]
        self.hidden = torch.eye(len(prefixes))[torch.tensor(rows)]  # (V^T, T, prefixes)
        self.table = torch.randn(self.V, len(prefixes), generator=gen).requires_grad_()
        self.teacher, self.reference = (
            torch.einsum("ntp,vp->ntv", self.hidden, torch.randn(self.V, len(prefixes), generator=gen)).log_softmax(-1)
            for _ in range(2)
        )
        self.gopd_lambda = gopd_lambda

    def student(self):
        return torch.einsum("ntp,vp->ntv", self.hidden, self.table).log_softmax(-1)

    def of_sampled(self, logps):
        return logps.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)

    def advantages(self):
        """`(V^T, T)`, of the sampled ids, with gradient."""
        t, r = self.of_sampled(self.teacher), self.of_sampled(self.reference)
        return t - self.of_sampled(self.student()) + (self.gopd_lambda - 1) * (t - r)

    def probabilities(self):
        return self.of_sampled(self.student()).sum(1).exp()

    def gradients(self, discount, top_k=None):
        """`(V^T, V, prefixes)`: what each sequence estimates; by the sampled ids alone if `top_k` is 0."""
        gradients = []
        for number in range(len(self.ids)):
            if top_k == 0:
                credit = discounted_advantages(
                    self.advantages().detach()[number : number + 1], torch.ones(1, self.T), discount
                )
                loss = -(credit[0] * self.of_sampled(self.student())[number]).sum()
            else:
                teacher, reference = self.teacher[number], self.reference[number]
                options = {"labels": self.ids[number], "gopd_lambda": self.gopd_lambda}
                if top_k is None:
                    out = extrapolated_divergence(
                        self.hidden[number],
                        self.table,
                        None,
                        target_logits=lambda rows, t=teacher, r=reference: (t[rows], r[rows]),
                        **options,
                    )
                else:
                    out = stratified_divergence(
                        self.hidden[number],
                        self.table,
                        None,
                        target_logps=targets(teacher, reference),
                        top_k=top_k,
                        **options,
                    )
                expected = out.expected_advantage.unsqueeze(0)
                later = discounted_advantages(expected, torch.ones(1, self.T), discount)[0] - expected[0]
                loss = out.divergence.sum() - (later * out.student_logps).sum()
            gradients.append(torch.autograd.grad(loss, self.table)[0])
        return torch.stack(gradients)


class TestWholeSequences:
    """With the later tokens' expected advantages credited at discount 1, it is the gradient of −E[Σ A]."""

    @pytest.mark.parametrize("gopd_lambda", [1.0, 1.5])
    @pytest.mark.parametrize("top_k", [None, 1, 0])
    def test_expectation(self, gopd_lambda, top_k):
        problem = Sequences(0, gopd_lambda)
        objective = -(problem.probabilities() * problem.advantages().sum(1)).sum()
        (want,) = torch.autograd.grad(objective, problem.table)
        got = torch.einsum("n,nvp->vp", problem.probabilities().detach(), problem.gradients(1.0, top_k))
        # 27 sequences of 3 tokens, numbers of magnitude below 16
        torch.testing.assert_close(got, want, rtol=0, atol=27 * 3 * 16 * EPS)

    def test_variance(self):
        """Expected advantages are less noisy than sampled ones."""
        for seed in range(5):
            problem = Sequences(seed, 1.25)
            probabilities = problem.probabilities().detach()
            variances = []
            for top_k in (None, 1, 0):
                gradients = problem.gradients(1.0, top_k)
                centred = gradients - torch.einsum("n,nvp->vp", probabilities, gradients)
                variances.append(float(probabilities @ centred.square().sum((1, 2))))
            exact, stratified, sampled = variances
            assert max(exact, stratified) < sampled
