"""
The three estimators without a trainer: every field of an estimate and its gradient, against float64 numbers of loops
over rows, tokens and ids. The models are tables; what a model says of a token depends on all ids that it has read.
"""

import dataclasses
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trl_gopd.gopd.batch import Batch, Scores
from trl_gopd.gopd.divergence import DivergenceOutput
from trl_gopd.gopd.estimators import vocabulary
from trl_gopd.gopd.estimators.build import build_estimator
from trl_gopd.gopd.estimators.full import FullEstimator
from trl_gopd.gopd.estimators.sampled import SampledEstimator
from trl_gopd.gopd.estimators.stratified import StratifiedEstimator
from trl_gopd.gopd.frozen.build import FrozenModels
from trl_gopd.gopd.frozen.protocols import LogitScorer, TopScorer
from trl_gopd.gopd.objective import LogitTransform


EPS = torch.finfo(torch.float32).eps
# At most 32 roundings of numbers below 16: log-probabilities, and sums of four of them with weights below 2.
TOLERANCE = 32 * 16 * EPS
TEMPERATURE = 0.7  # of the student; the tables of frozen models hold tempered logits


# Models


def prefixes(sequences):
    """What a model has read before each token of the completions: `T` lists of ids for each row."""
    start = sequences.input_ids.size(1) - sequences.num_tokens
    return [
        [ids[: start + t][seen[: start + t].bool()].tolist() for t in range(sequences.num_tokens)]
        for ids, seen in zip(sequences.input_ids, sequences.attention_mask, strict=True)
    ]


class Model:
    """A causal model: a table of hidden states, which are averaged over what was read, and a head."""

    is_sharded, context = False, None

    def __init__(self, seed, vocab_size, has_bias=True):
        gen = torch.Generator().manual_seed(seed)
        self.vocab_size, self.read = vocab_size, []
        self.table = torch.randn(12, 3, generator=gen).requires_grad_()
        self.head = nn.Linear(3, vocab_size, bias=has_bias)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=gen))

    def parameters(self):
        return [self.table, *self.head.parameters()]

    def state(self, ids):
        return self.table[ids].mean(0) + self.table[ids[-1]]

    def exact(self, ids):
        """Raw logits `(V,)` in float64."""
        bias = 0.0 if self.head.bias is None else self.head.bias.double()
        return self.head.weight.double() @ (self.table.double()[ids].mean(0) + self.table.double()[ids[-1]]) + bias

    # As a frozen model

    def hidden(self, sequences):
        self.read += sequences.input_ids.tolist()
        rows = zip(prefixes(sequences), sequences.scored.tolist(), strict=True)
        states = [self.state(ids) for row, scored in rows for ids, one in zip(row, scored, strict=True) if one]
        return torch.stack(states).detach() if states else torch.zeros(0, 3)

    def logits(self, hidden):
        return self.head(hidden).detach()

    def score(self, sequences):
        logps = self.logits(self.hidden(sequences)).log_softmax(-1)
        labels = sequences.completion_ids[sequences.scored]
        has = labels < self.vocab_size
        values = logps.gather(-1, labels.clamp(max=self.vocab_size - 1).unsqueeze(1)).squeeze(1)
        return torch.zeros(sequences.scored.shape).masked_scatter(
            sequences.scored, values.masked_fill(~has, -math.inf)
        )

    def identity(self):
        return {}


class Server(Model):
    """A model of which only the log-probabilities of sampled ids and of the two likeliest ids are seen."""

    def __init__(self, seed, vocab_size):
        super().__init__(seed, vocab_size)
        self.inner = Model(seed, vocab_size)
        del self.head, self.vocab_size  # it must not pass for a model in this process

    def exact(self, ids):
        return self.inner.exact(ids)

    def score(self, sequences):
        self.read += sequences.input_ids.tolist()
        return self.inner.score(sequences)

    def score_top(self, sequences):
        ids, logps = torch.zeros(2, *sequences.scored.shape, 2).unbind(0)
        for b, row in enumerate(prefixes(sequences)):
            for t, read in enumerate(row):
                if sequences.scored[b, t]:
                    top = self.exact(read).detach().log_softmax(-1).topk(2)
                    ids[b, t], logps[b, t] = top.indices.float(), top.values.float()
        return self.score(sequences), ids.long(), logps


class Forward:
    """One forward of the student over a batch. Tokens that are not trained on are NaN."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        states = [[model.state(ids) for ids in row] for row in prefixes(batch.read_by_student)]
        self.states = torch.stack([torch.stack(row) for row in states])
        self.states = self.states.masked_fill(batch.loss_mask.unsqueeze(-1) == 0, math.nan)
        self.aux_loss = torch.tensor(7.0)
        self.entropy = torch.arange(12.0).view(3, 4)

    def log_probs(self):
        logps = (self.model.head(self.states) / TEMPERATURE).log_softmax(-1)
        self.logps = logps.gather(-1, self.batch.completion_ids.unsqueeze(-1)).squeeze(-1)
        return self.logps, self.entropy, self.aux_loss

    def over_hidden(self, function):
        self.outputs = function(self.states, self.model.head)
        return self.outputs, self.aux_loss


# A batch, and what may differ in it

RATIO = torch.tensor([[0.5, 1.5, 0.8, 99.0], [1.25, 99.0, 0.25, 1.75], [99.0, 0.6, 1.1, 0.9]])
STORED = torch.tensor([[1.5, 0.25, 1.1, 1.0], [0.5, 1.0, 1.25, 0.75], [1.0, 1.3, 0.4, 1.6]])
OLD_LOGPS = torch.tensor([[-1.0, -2.5, -0.75, math.nan], [-1.5, math.nan, -2.0, -0.5], [math.nan, -0.9, -1.75, -3.0]])
TEACHER_PROMPT = {
    "teacher_prompt_ids": torch.tensor([[11, 10], [0, 9], [5, 6]]),
    "teacher_prompt_mask": torch.tensor([[1, 1], [0, 1], [1, 1]]),
}
# λ that the rows ask for, and λ at this step of a schedule
ASKED, LAMBDA = [1.5, 1.0, 2.0], [1.25, 1.0, 1.75]


def make_batch(**changes):
    """Two rows of the teacher of four ids and one of the other's; rows end early, and a tool wrote in two of them."""
    values = {
        "prompt_ids": torch.tensor([[0, 0, 7], [0, 6, 8], [9, 5, 7]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[1, 4, 2, 0], [3, 2, 0, 4], [0, 2, 3, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        "loss_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 1, 1]]),
        "teacher_index": torch.tensor([0, 1, 0]),
        "gopd_lambda": torch.tensor(ASKED),
        "task_advantages": torch.zeros(3),
        "row": torch.arange(3),
        **changes,
    }
    return Batch(**values)


@dataclasses.dataclass
class Problem:
    """A student of five ids, teachers of four and five ids, and references of five and four."""

    batch: Batch
    student: Model = dataclasses.field(default_factory=lambda: Model(0, 5))
    teachers: tuple = dataclasses.field(default_factory=lambda: (Model(1, 4), Model(2, 5)))
    references: tuple = dataclasses.field(default_factory=lambda: (Model(3, 5), Model(4, 4)))

    def frozen(self):
        def by_id(models):
            return dict(zip(("math", "code"), models, strict=True)) if models else {}

        return FrozenModels(by_id(self.teachers), by_id(self.references), accelerator=None)


@dataclasses.dataclass
class Case:
    """Options of an estimator, changes of the batch, and λ of the rows at this step."""

    options: dict = dataclasses.field(default_factory=dict)
    batch: dict = dataclasses.field(default_factory=dict)
    gopd_lambda: list = dataclasses.field(default_factory=lambda: LAMBDA)
    problem: dict = dataclasses.field(default_factory=dict)

    def build(self):
        return Problem(make_batch(**self.batch), **{name: make() for name, make in self.problem.items()})

    @property
    def asks(self):
        """Which rows the reference is asked about."""
        asked = self.batch.get("gopd_lambda", torch.tensor(ASKED)).tolist()
        return [not self.options.get("mixes_lambda", False) or value != 1 for value in asked]


CASES = {
    "plain": Case(gopd_lambda=[1.25, 1.5, 1.75]),
    "mixed": Case({"mixes_lambda": True}),
    "mixed, none at 1": Case(
        {"mixes_lambda": True}, {"gopd_lambda": torch.tensor([1.5, 0.5, 2.0])}, [1.25, 0.75, 1.75]
    ),
    "no reference": Case({}, {"gopd_lambda": torch.ones(3)}, [1.0, 1.0, 1.0], {"references": tuple}),
    "clip": Case({"extrapolation_clip": 0.5}, gopd_lambda=[1.25, 0.5, 3.0]),
    "prompts of the teacher": Case({"mixes_lambda": True}, TEACHER_PROMPT),
    "an older policy": Case({}, {"old_logps": OLD_LOGPS}),
    "weights": Case({}, {"sampler_ratio": RATIO}),
    "stored weights": Case({}, {"stored_ratio": STORED}),
    "weights of sequences": Case({}, {"sampler_ratio": torch.tensor([[0.5], [1.5], [0.8]])}),
    "discount": Case({"discount": 0.6}),
    "discount, mixed": Case({"discount": 0.6, "mixes_lambda": True}),
    "discount, weights": Case({"discount": 0.6}, {"sampler_ratio": RATIO}),
    "discount, stored weights": Case({"discount": 0.6}, {"stored_ratio": STORED, "sampler_ratio": RATIO}),
    "discount, weights of sequences": Case({"discount": 1.0}, {"sampler_ratio": torch.tensor([[0.5], [1.5], [0.8]])}),
    "discount, an older policy": Case({"discount": 0.6}, {"old_logps": OLD_LOGPS}),
}
GATES = {
    "certain": Case({"deterministic_above": 0.1}),
    "agreement": Case({"needs_agreement": True, "mixes_lambda": True}),
    "both gates": Case({"deterministic_above": 0.1, "needs_agreement": True}, {"old_logps": OLD_LOGPS}),
}


# Naive numbers


@dataclasses.dataclass
class Expected:
    """What an estimate should hold, by field `{(row, token): number}`, where that is read."""

    known: set
    credits: dict
    advantages: dict
    student_logps: dict
    teacher_logps: dict
    reference_logps: dict
    reverse_kl: dict
    gopd_lambda: dict
    entropy: dict = dataclasses.field(default_factory=dict)
    means: dict = dataclasses.field(default_factory=dict)


def trained_tokens(batch):
    return [tuple(place) for place in batch.loss_mask.nonzero().tolist()]


def at(logps, index):
    return logps[index] if index < len(logps) else logps.new_tensor(-math.inf)


def clipped(value, case):
    bound = case.options.get("extrapolation_clip")
    return value if bound is None else value.clamp(-bound, bound)


def later_sums(values, tokens, batch, discount, weigh):
    """γ·(x + w·later sum) of the next trained token of the row, from the last one back; 0 without a next one."""
    sums = {}
    for b in range(3):
        later = 0.0
        for place in reversed([place for place in tokens if place[0] == b]):
            sums[place] = later
            later = (
                discount * weigh(place) * (values[place] + later)
                if weigh.of_values
                else discount * (values[place] + weigh(place) * later)
            )
    return sums


class Weigh:
    """Importance weight of a token within the discounted sum: none, or 1, if there is one weight a sequence."""

    def __init__(self, batch, of_values):
        ratio = batch.sampler_ratio if batch.stored_ratio is None else batch.stored_ratio
        self.ratio, self.of_values = ratio, of_values

    def __call__(self, place):
        has_tokens = self.ratio is not None and self.ratio.size(1) == 4
        return float(self.ratio[place]) if has_tokens else 1.0

    def own(self, place):
        return 1.0 if self.ratio is None else float(self.ratio.expand(3, 4)[place])


def read_logps(models, batch, sequences, width=None):
    """Float64 log-probabilities of each trained token's state, by the model of its row; over the first ids alone."""
    read, of = prefixes(sequences), batch.teacher_index.tolist()
    return {(b, t): models[of[b]].exact(read[b][t]).detach()[:width].log_softmax(-1) for b, t in trained_tokens(batch)}


def student_logits(problem):
    read = prefixes(problem.batch.read_by_student)
    return {(b, t): problem.student.exact(read[b][t]) / TEMPERATURE for b, t in trained_tokens(problem.batch)}


def expect_sampled(problem, case):
    batch, options, tokens = problem.batch, case.options, trained_tokens(problem.batch)
    logits = student_logits(problem)
    teacher = read_logps(problem.teachers, batch, batch.read_by_teacher)
    reference = read_logps(problem.references, batch, batch.read_by_student) if problem.references else None
    out = Expected(set(), *({} for _ in range(7)))
    values = {}
    for b, t in tokens:
        y = int(batch.completion_ids[b, t])
        s = logits[b, t].detach().log_softmax(-1)[y] if batch.old_logps is None else batch.old_logps[b, t].double()
        log_t = at(teacher[b, t], y)
        log_r = at(reference[b, t], y) if reference and case.asks[b] else log_t
        gopd_lambda = case.gopd_lambda[b]
        asked_r = log_r if case.asks[b] else torch.zeros(())  # the score of a row that is not asked about
        if log_t > math.log(options.get("deterministic_above", 1.0)):
            gopd_lambda = 1.0
        if options.get("needs_agreement") and (log_t - s).sign() != (log_t - asked_r).sign():
            gopd_lambda = 1.0
        values[b, t] = torch.zeros((), dtype=torch.float64)
        out.gopd_lambda[b, t] = gopd_lambda
        if math.isfinite(log_t) and math.isfinite(log_r):
            out.known.add((b, t))
            out.student_logps[b, t], out.teacher_logps[b, t], out.reverse_kl[b, t] = s, log_t, s - log_t
            values[b, t] = log_t - s + (gopd_lambda - 1) * clipped(log_t - log_r, case)
            if reference and case.asks[b]:
                out.reference_logps[b, t] = log_r
    out.advantages = values
    # The student's own weights: TRL multiplies by those of vLLM, and by none of stored completions.
    weigh = Weigh(batch, of_values=True)
    known = [place for place in tokens if place in out.known]
    later = later_sums(values, known, batch, options.get("discount", 0.0), weigh)
    for place in tokens:
        own = 1.0 if batch.stored_ratio is None else float(batch.stored_ratio[place])
        out.credits[place] = own * (values[place] + later.get(place, 0.0))
    return out


def full_token(z, log_t, log_r, y, gopd_lambda, case):
    log_s = z[: len(log_t)].log_softmax(-1)
    value = clipped(log_t - log_r, case)
    joint = log_t + (gopd_lambda - 1) * value
    log_q = joint.log_softmax(-1)
    probs = log_s.exp()
    kl = (probs * (log_s - log_q)).sum()
    advantages = log_t - log_s + (gopd_lambda - 1) * value
    return {
        "divergence": kl,
        "expected": (probs * advantages).sum().detach(),
        "student": at(log_s, y),
        "teacher": at(log_t, y),
        "reference": at(log_r, y),
        "entropy": -(probs * log_s).sum(),
        "reverse_kl": (probs * (log_s - log_t)).sum(),
        "means": {},
    }


def stratified_token(z, log_t, log_r, y, gopd_lambda, case, *, inside, weight):
    """S is `inside`; the rest of the vocabulary is one outcome, and the sampled id corrects for that."""
    has = [v for v in inside if v < len(z) and all(math.isfinite(at(x, v)) for x in (log_t, log_r))]
    dropped = [v for v in inside if v < len(z) and v not in has]
    is_known = all(math.isfinite(at(x, y)) for x in (log_t, log_r)) and y < len(z)
    log_s = z.index_fill(0, torch.tensor(dropped, dtype=torch.int64), -math.inf).log_softmax(-1)

    def outcomes(logps, ids):
        rest = 1 - sum(float(at(logps.detach(), v).exp()) for v in inside)
        label = [at(logps, y).detach()] if is_known else []
        return torch.stack([*(logps[v].detach() for v in ids), torch.tensor(max(rest, EPS)).double().log(), *label])

    s, t, r = (outcomes(x, has) for x in (log_s, log_t, log_r))
    advantages = t - s + (gopd_lambda - 1) * clipped(t - r, case)
    k, is_corrected = len(has), is_known and y not in inside
    correction = weight if is_corrected else 0.0

    def estimate(x):
        return (s[: k + 1].exp() * x[: k + 1]).sum() + correction * (x[-1] - x[k])

    mean, above = estimate(advantages), advantages - advantages[k]
    surrogate = -sum((s[i].exp() * above[i] * log_s[v] for i, v in enumerate(has)), torch.zeros(()))
    if is_corrected:
        surrogate = surrogate - correction * above[-1] * log_s[y]
    value = (s + advantages)[: k + 1].logsumexp(-1) - mean
    return {
        "divergence": value + surrogate - surrogate.detach(),
        "expected": mean,
        "student": log_s[y] if is_known else torch.tensor(-math.inf),
        "teacher": at(log_t, y) if is_known else torch.tensor(-math.inf),
        "reference": at(log_r, y) if is_known else torch.tensor(-math.inf),
        "entropy": -sum(p.exp() * p for p in log_s if p.isfinite()),
        "reverse_kl": estimate(s - t),
        "means": {
            "top_k_coverage": s[:k].exp().sum(),
            "top_k_overlap": overlap(inside, log_t),
        },
    }


def overlap(inside, log_t):
    count = min(len(inside), len(log_t))
    return torch.tensor(len(set(inside[:count]) & set(log_t.topk(count).indices.tolist())) / count)


def expect_over_vocabulary(problem, case, token, *, widths):
    """As for `expect_sampled`, with `token` for the values of one state; credits have a gradient."""
    batch, tokens = problem.batch, trained_tokens(problem.batch)
    logits = student_logits(problem)
    teacher = read_logps(problem.teachers, batch, batch.read_by_teacher, widths[0])
    reference = read_logps(problem.references, batch, batch.read_by_student, widths[1]) if problem.references else {}
    weigh = Weigh(batch, of_values=False)
    values, out = {}, Expected(set(), *({} for _ in range(7)))
    for b, t in tokens:
        log_r = reference[b, t] if reference and case.asks[b] else teacher[b, t]
        own = {} if token is full_token else {"weight": weigh.own((b, t))}
        if token is stratified_token:
            count = case.options.get("top_k", 2)
            source = (
                logits[b, t]
                if count
                else problem.teachers[int(batch.teacher_index[b])].exact(prefixes(batch.read_by_teacher)[b][t])
            )
            own["inside"] = source.topk(count or 2).indices.tolist()
        y = int(batch.completion_ids[b, t])
        value = values[b, t] = token(logits[b, t], teacher[b, t], log_r, y, case.gopd_lambda[b], case, **own)
        out.gopd_lambda[b, t] = case.gopd_lambda[b]
        out.entropy[b, t], out.reverse_kl[b, t] = value["entropy"], value["reverse_kl"]
        out.advantages[b, t] = -value["divergence"].detach()
        if value["student"].isfinite() and value["teacher"].isfinite():
            out.known.add((b, t))
            out.student_logps[b, t], out.teacher_logps[b, t] = value["student"], value["teacher"]
            if reference and case.asks[b]:
                out.reference_logps[b, t] = value["reference"]
        for name, mean in value["means"].items():
            out.means.setdefault(name, {})[b, t] = mean
    expected = {place: value["expected"] for place, value in values.items()}
    later = later_sums(expected, tokens, batch, case.options.get("discount", 0.0), weigh)
    for place, value in values.items():
        score = value["student"] - value["student"].detach() if place in out.known else 0.0
        out.credits[place] = -value["divergence"] + weigh.own(place) * later[place] * score
    return out


def assert_numbers(got, want, name):
    """`want` says which entries of `got` `(B, T)` are read."""
    for place, number in want.items():
        one, other = (float(torch.as_tensor(value).detach()) for value in (got[place], number))
        assert abs(one - other) <= TOLERANCE, (name, place, one, other)


def assert_estimate(got, want, problem, case):
    batch = problem.batch
    known = torch.zeros(3, 4)
    for place in want.known:
        known[place] = 1.0
    assert torch.equal(got.known.float(), known)
    everywhere = got.gopd_lambda.expand(3, 4)
    for name in ("credits", "advantages", "student_logps", "teacher_logps", "reverse_kl"):
        assert_numbers(getattr(got, name), getattr(want, name), name)
    assert_numbers(everywhere, want.gopd_lambda, "lambda")
    if problem.references:
        assert_numbers(got.reference_logps, want.reference_logps, "reference_logps")
    else:
        assert got.reference_logps is None
    if case.options.get("mixes_lambda"):
        assert got.has_reference.tolist() == [[asked] for asked in case.asks]
    else:
        assert got.has_reference is None
    # Nothing of tokens that are left out, though all that is known of them is NaN.
    assert not got.credits[batch.loss_mask == 0].any()
    for name in ("advantages", "student_logps", "teacher_logps", "reverse_kl", "gopd_lambda"):
        assert not getattr(got, name).requires_grad


def assert_gradient(got, want, problem):
    """That of credits with one factor for each token."""
    factors = 0.5 + torch.arange(12).view(3, 4) / 8
    mask = problem.batch.loss_mask.bool()
    parameters = problem.student.parameters()
    gradients = torch.autograd.grad((factors * got)[mask].sum(), parameters)
    exact = torch.autograd.grad(sum(float(factors[place]) * value for place, value in want.items()), parameters)
    assert max(float(gradient.abs().max()) for gradient in exact) > 0.1
    for one, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4 * TOLERANCE)  # sums over nine tokens


def step_lambda(case):
    return torch.tensor(case.gopd_lambda).unsqueeze(1)


# Laws


class TestSampled:
    @pytest.mark.parametrize("name", [*CASES, *GATES])
    def test_every_field(self, name):
        case = (CASES | GATES)[name]
        problem = case.build()
        estimator = SampledEstimator(problem.frozen(), **case.options)
        forward = Forward(problem.student, problem.batch)
        scores = estimator.scores(problem.batch)
        step = step_lambda(case)
        got = estimator.estimate(forward, problem.batch, scores, step)
        assert_estimate(got, expect_sampled(problem, case), problem, case)
        assert (got.gopd_lambda is step) == (name in CASES)
        assert got.logps is forward.logps and got.entropy is forward.entropy and got.aux_loss is forward.aux_loss
        assert got.logps.requires_grad and not got.credits.requires_grad and got.means == {}
        assert not got.advantages[got.known == 0].any()

    @pytest.mark.parametrize("name", GATES)
    def test_gates_close_for_some_tokens(self, name):
        """Otherwise the cases would not tell a gate from none, or from one that is always closed."""
        want = expect_sampled(GATES[name].build(), GATES[name])
        open_or_not = {value != 1 for place, value in want.gopd_lambda.items() if place[0] != 1}
        assert open_or_not == {True, False}

    def test_scores(self):
        case = CASES["mixed"]
        problem = case.build()
        got = SampledEstimator(problem.frozen(), mixes_lambda=True).scores(problem.batch)
        want = expect_sampled(problem, case)
        assert_numbers(got.teacher_logps, want.teacher_logps, "teacher")
        assert_numbers(got.reference_logps, want.reference_logps, "reference")
        assert not got.reference_logps[1].any() and got.top_ids is None and got.top_logps is None
        alone = SampledEstimator(Problem(problem.batch, references=()).frozen()).scores(problem.batch)
        assert torch.equal(alone.teacher_logps, got.teacher_logps) and alone.reference_logps is None

    def test_defaults(self):
        frozen = object()
        assert SampledEstimator(frozen) == SampledEstimator(frozen, False, 0.0, None, None, False)
        assert SampledEstimator(frozen).needs_old_logps is True


class TestFull:
    @pytest.mark.parametrize("name", CASES)
    def test_every_field(self, name):
        case = CASES[name]
        problem = case.build()
        estimator = FullEstimator(
            problem.frozen(), LogitTransform(temperature=TEMPERATURE), **case.options, chunk_size=4
        )
        forward = Forward(problem.student, problem.batch)
        scores = estimator.scores(problem.batch)
        assert scores == Scores()
        got = estimator.estimate(forward, problem.batch, scores, step_lambda(case))
        want = expect_over_vocabulary(problem, case, full_token, widths=(4, 4))
        assert_estimate(got, want, problem, case)
        assert_numbers(got.entropy, want.entropy, "entropy")
        assert_gradient(got.credits, want.credits, problem)
        assert got.aux_loss is forward.aux_loss and got.means == {}
        assert torch.equal(got.logps, got.student_logps) and got.logps.isfinite().all() and not got.logps.requires_grad
        # a gradient of log-probabilities that nothing uses is not even asked for
        assert forward.outputs[1].requires_grad == (estimator.discount > 0)

    def test_ids_that_the_student_lacks(self):
        """Label 4 has no probability under a student of four ids; the state is distilled all the same."""
        case = dataclasses.replace(CASES["discount, mixed"], problem={"student": lambda: Model(0, 4, has_bias=False)})
        problem = case.build()
        estimator = FullEstimator(problem.frozen(), LogitTransform(temperature=TEMPERATURE), **case.options)
        got = estimator.estimate(Forward(problem.student, problem.batch), problem.batch, Scores(), step_lambda(case))
        want = expect_over_vocabulary(problem, case, full_token, widths=(4, 4))
        assert_estimate(got, want, problem, case)
        assert_gradient(got.credits, want.credits, problem)
        assert got.student_logps[0, 1] == 0 and not got.known[0, 1]

    def test_defaults(self):
        frozen, transform = object(), LogitTransform()
        assert FullEstimator(frozen, transform) == FullEstimator(frozen, transform, False, 0.0, None, 256)

    def test_needs_an_older_policy_for_the_discount_alone(self):
        assert FullEstimator(object(), LogitTransform()).needs_old_logps is False
        assert FullEstimator(object(), LogitTransform(), discount=0.1).needs_old_logps is True


class TestStratified:
    @pytest.mark.parametrize("name", CASES)
    def test_every_field(self, name):
        case = CASES[name]
        problem = case.build()
        estimator = StratifiedEstimator(
            problem.frozen(), LogitTransform(temperature=TEMPERATURE), 2, **case.options, chunk_size=4
        )
        forward = Forward(problem.student, problem.batch)
        scores = estimator.scores(problem.batch)
        assert scores == Scores()
        got = estimator.estimate(forward, problem.batch, scores, step_lambda(case))
        self.check(got, problem, case, widths=(4, 4))
        assert got.aux_loss is forward.aux_loss and forward.outputs[1].requires_grad == (estimator.discount > 0)

    def check(self, got, problem, case, *, widths, means=("top_k_coverage", "top_k_overlap")):
        want = expect_over_vocabulary(problem, case, stratified_token, widths=widths)
        assert_estimate(got, want, problem, case)
        assert_numbers(got.entropy, want.entropy, "entropy")
        assert list(got.means) == list(means)
        for name in means:
            assert_numbers(got.means[name], want.means[name], name)
        assert_gradient(got.credits, want.credits, problem)
        assert torch.equal(got.logps, got.student_logps) and got.logps.isfinite().all() and not got.logps.requires_grad

    def test_more_ids_than_the_teachers_have(self):
        """Five of the student's, of which the teachers have four."""
        case = Case({"top_k": 5})
        problem = case.build()
        estimator = StratifiedEstimator(problem.frozen(), LogitTransform(temperature=TEMPERATURE), 5)
        got = estimator.estimate(Forward(problem.student, problem.batch), problem.batch, Scores(), step_lambda(case))
        self.check(got, problem, case, widths=(4, 4))

    @pytest.mark.parametrize("mixes_lambda", [False, True])
    @pytest.mark.parametrize("has_reference", [False, True])
    def test_served(self, mixes_lambda, has_reference):
        case = Case({"top_k": None, "mixes_lambda": mixes_lambda, "discount": 0.5}, {**TEACHER_PROMPT})
        case.problem["teachers"] = lambda: (Server(1, 4), Server(2, 5))
        if not has_reference:
            case.problem["references"], case.gopd_lambda = tuple, [1.0, 1.0, 1.0]
        problem = case.build()
        assert all(isinstance(s, TopScorer) and not isinstance(s, LogitScorer) for s in problem.teachers)
        estimator = StratifiedEstimator(
            problem.frozen(), LogitTransform(temperature=TEMPERATURE), chunk_size=4, **case.options
        )
        scores = estimator.scores(problem.batch)
        assert scores.top_ids.shape == scores.top_logps.shape == (3, 4, 2) and scores.reference_logps is None
        got = estimator.estimate(Forward(problem.student, problem.batch), problem.batch, scores, step_lambda(case))
        self.check(got, problem, case, widths=(None, 4), means=("top_k_coverage",))

    def test_defaults(self):
        frozen, transform = object(), LogitTransform()
        built = StratifiedEstimator(frozen, transform, 8)
        assert built == StratifiedEstimator(frozen, transform, 8, False, 0.0, None, 256)
        assert built.needs_old_logps is True


VOCABULARY = {
    "full": lambda problem, **options: FullEstimator(problem.frozen(), LogitTransform(), **options),
    "stratified": lambda problem, **options: StratifiedEstimator(problem.frozen(), LogitTransform(), 2, **options),
}
ALL = {"sampled": lambda problem, **options: SampledEstimator(problem.frozen(), **options), **VOCABULARY}


@pytest.mark.parametrize("estimator", ALL)
class TestAll:
    def test_rows_at_lambda_one_are_not_shown_to_the_reference(self, estimator):
        for mixes_lambda, shown in ((True, ([0, 2], [])), (False, ([0, 2], [1]))):
            problem = Problem(make_batch(**TEACHER_PROMPT))
            built = ALL[estimator](problem, mixes_lambda=mixes_lambda)
            scores = built.scores(problem.batch)
            built.estimate(Forward(problem.student, problem.batch), problem.batch, scores, step_lambda(CASES["mixed"]))
            batch = problem.batch
            for model, rows in zip(problem.references, shown, strict=True):
                assert model.read == batch.read_by_student.input_ids[rows].tolist()
            for model, rows in zip(problem.teachers, ([0, 2], [1]), strict=True):
                assert model.read == batch.read_by_teacher.input_ids[rows].tolist()

    def test_no_token_is_trained_on(self, estimator):
        problem = Problem(make_batch(loss_mask=torch.zeros(3, 4, dtype=torch.int64)))
        built = ALL[estimator](problem, discount=0.5)
        scores = built.scores(problem.batch)
        got = built.estimate(Forward(problem.student, problem.batch), problem.batch, scores, torch.full((3, 1), 1.5))
        assert not got.known.any() and not got.credits.any() and not got.advantages.any()


@pytest.mark.parametrize("estimator", VOCABULARY)
@pytest.mark.parametrize("has_reference", [True, False])
def test_all_heads_are_whole_while_they_are_applied(estimator, has_reference, monkeypatch):
    gathered = []

    def gather(*heads):
        gathered.append(heads)
        return nullcontext()

    monkeypatch.setattr(vocabulary, "gather_heads", gather)
    problem = Problem(make_batch(), **({} if has_reference else {"references": ()}))
    step = torch.full((3, 1), 1.5 if has_reference else 1.0)
    got = VOCABULARY[estimator](problem).estimate(
        Forward(problem.student, problem.batch), problem.batch, Scores(), step
    )
    got.credits.sum().backward()
    heads = tuple(model.head for model in (problem.student, *problem.teachers, *problem.references))
    assert gathered == [heads, heads]  # forward and backward


class TestOverVocabulary:
    """The part that both have in common, with a divergence made up by hand of the nine tokens."""

    N = 9

    def run(self, *, discount, options=None, has_scores=True, **changes):
        batch = make_batch(**changes)
        names = ("divergence", "student", "expected", "teacher", "reference", "entropy", "reverse_kl", "mean")
        rows = torch.randn(8, self.N, generator=torch.Generator().manual_seed(0))
        self.given = dict(zip(names, rows.unbind(0), strict=True))
        self.given["student"][2] = self.given["teacher"][4] = -math.inf
        self.leaves = [self.given[name].requires_grad_() for name in ("divergence", "student")]
        student = Forward(Model(0, 5), batch)

        def divergence(hidden, head):
            torch.testing.assert_close(hidden, student.states[batch.loss_mask.bool()], rtol=0, atol=0)
            assert head is student.model.head
            output = DivergenceOutput(
                *(self.given[name] for name in ("divergence", "student", "teacher")),
                self.given["reference"] if has_scores else None,
                *(self.given[name] for name in ("entropy", "reverse_kl", "expected")),
            )
            return output, {"one": self.given["mean"], "two": self.given["mean"] + 1}

        step = torch.tensor([[1.0], [2.0], [3.0]])
        estimate = vocabulary.estimate_over_vocabulary(
            student, batch, step, divergence, discount=discount, **(options or {})
        )
        assert estimate.gopd_lambda is step and estimate.aux_loss is student.aux_loss
        return batch, estimate

    def placed(self, name):
        """`(B, T)` numbers of the nine tokens at the places of the mask, 0 elsewhere."""
        full = torch.zeros(3, 4)
        for place, value in zip(trained_tokens(make_batch()), self.given[name].tolist(), strict=True):
            full[place] = value
        return full

    def test_every_number_is_put_in_its_place(self):
        has_reference = torch.tensor([[True], [False], [True]])
        _, got = self.run(discount=0.0, options={"has_reference": has_reference})
        for field, name in (("teacher_logps", "teacher"), ("reference_logps", "reference"), ("entropy", "entropy")):
            assert torch.equal(getattr(got, field), self.placed(name))
        assert torch.equal(got.reverse_kl, self.placed("reverse_kl"))
        assert torch.equal(got.credits, -self.placed("divergence"))
        assert torch.equal(got.advantages, -self.placed("divergence")) and not got.advantages.requires_grad
        student = self.placed("student").masked_fill(self.placed("student") == -math.inf, 0.0)
        assert torch.equal(got.student_logps, student) and torch.equal(got.logps, student)
        assert not got.logps.requires_grad and not got.student_logps.requires_grad
        assert list(got.means) == ["one", "two"] and torch.equal(got.means["one"], self.placed("mean"))
        assert got.has_reference is has_reference
        # the third token, which the student lacks, and the fifth, which the teacher lacks
        assert got.known.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1]]

    def test_without_a_reference(self):
        _, got = self.run(discount=0.0, has_scores=False)
        assert got.reference_logps is None and got.has_reference is None

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"sampler_ratio": RATIO},
            {"stored_ratio": STORED},
            {"stored_ratio": STORED, "sampler_ratio": RATIO},
            {"sampler_ratio": torch.tensor([[0.5], [1.5], [0.8]])},
        ],
    )
    def test_discount(self, changes):
        """−divergence, with γ·w·(what comes later) times the score of the token; nothing for an unknown label."""
        batch, got = self.run(discount=0.5, **changes)
        assert torch.equal(got.credits.detach(), -self.placed("divergence"))
        of_divergence, of_logps = torch.autograd.grad(got.credits[batch.loss_mask.bool()].sum(), self.leaves)
        assert torch.equal(of_divergence, -torch.ones(self.N))
        weigh, tokens = Weigh(batch, of_values=False), trained_tokens(batch)
        expected = dict(zip(tokens, self.given["expected"].double(), strict=True))
        later = later_sums(expected, tokens, batch, 0.5, weigh)
        want = [weigh.own(place) * later[place] if got.known[place] else 0.0 for place in tokens]
        torch.testing.assert_close(of_logps, torch.tensor(want), rtol=0, atol=TOLERANCE, check_dtype=False)


class Split:
    """A parameter that FSDP2 has split over ranks."""

    def __init__(self, whole):
        self.whole = whole

    def full_tensor(self):
        return self.whole

    def is_floating_point(self):
        return self.whole.is_floating_point()


class TestHeadArguments:
    def test_whole(self, monkeypatch):
        monkeypatch.setattr(vocabulary, "gather_heads", lambda *heads: heads)
        head, other = nn.Linear(2, 3), nn.Linear(2, 3)
        got = vocabulary.head_arguments(head, [other, head, other])
        assert got["weight"] is head.weight and got["bias"] is head.bias
        assert got["gather"]() == (head, other)

    @pytest.mark.parametrize("has_bias", [True, False])
    def test_split(self, has_bias):
        weight, bias = torch.ones(3, 2), torch.ones(3)
        head = type("Head", (), {"weight": Split(weight), "bias": Split(bias) if has_bias else None})()
        got = vocabulary.head_arguments(head, [])
        assert got["weight"] is weight and got["bias"] is (bias if has_bias else None)


class TestBuild:
    ARGS = {
        "gopd_extrapolation_clip": 2.5,
        "gopd_discount": 0.25,
        "gopd_deterministic_above": 0.9,
        "gopd_needs_agreement": True,
        "temperature": 0.7,
        "gopd_chunk_size": 17,
        "gopd_top_k": 5,
    }
    TRANSFORM = LogitTransform(3.0, 30.0, 0.7)

    def build(self, estimator, *, asks_servers=False, mixes_lambda=True):
        text = SimpleNamespace(model_type="cohere", logit_scale=3.0, final_logit_softcapping=30.0)
        self.frozen = object()
        return build_estimator(
            SimpleNamespace(gopd_estimator=estimator, **self.ARGS),
            self.frozen,
            student_config=SimpleNamespace(get_text_config=lambda: text),
            mixes_lambda=mixes_lambda,
            asks_servers=asks_servers,
        )

    @pytest.mark.parametrize("mixes_lambda", [True, False])
    def test_every_option_arrives(self, mixes_lambda):
        built = self.build("sampled", mixes_lambda=mixes_lambda)
        assert built == SampledEstimator(
            self.frozen,
            mixes_lambda=mixes_lambda,
            discount=0.25,
            extrapolation_clip=2.5,
            deterministic_above=0.9,
            needs_agreement=True,
        )
        options = {"mixes_lambda": mixes_lambda, "discount": 0.25, "extrapolation_clip": 2.5, "chunk_size": 17}
        built = self.build("full", mixes_lambda=mixes_lambda)
        assert built == FullEstimator(self.frozen, self.TRANSFORM, **options)
        built = self.build("stratified", mixes_lambda=mixes_lambda)
        assert built == StratifiedEstimator(self.frozen, self.TRANSFORM, top_k=5, **options)

    def test_servers_choose_their_own_ids(self):
        assert self.build("stratified", asks_servers=True).top_k is None
