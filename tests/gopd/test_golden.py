"""
Training steps of every estimator in every setting, against a naive implementation that shares nothing with the
package: three models, all logits of each row by itself without padding, in float64.
"""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.gopd.harness import IDS, Keeping
from tests.tiny import LORA, scripted_completions
from trl_gopd.gopd.trainer import GOPDTrainer


EPS = torch.finfo(torch.float32).eps
# Relative error of a float32 gradient. Forward and backward, a number passes through the 15 products of two layers and
# a head, whose sums have at most 96 terms. Each term and each sum is rounded by at most eps/2 of its size, with a sign
# that is as good as random, so the errors add like a random walk: √(2 · 15 · 96 · 2)·eps/2 < 38 eps. Twice that leaves
# room for what cancels between tokens.
TOLERANCE = (2 * 15 * 96 * 2) ** 0.5 * EPS
assert TOLERANCE < 1e-5
TOP_K, DISCOUNT, EPSILON, WEIGHT_CAP = 16, 0.9, 0.2, 5.0

REUSE = {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
VARIANTS = {
    "plain": {},
    "reuse": REUSE,
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "discount": {"gopd_discount": DISCOUNT},
    "lora": {"peft_config": LoraConfig(**LORA)},
    "stored": {"use_stored_completions": True},
    "weights": {"use_stored_completions": True},
    "weights and discount": {"use_stored_completions": True, "gopd_discount": DISCOUNT},
}
USES_SAMPLER = ("reuse", "weights", "weights and discount")  # the student that completions came from
# λ and the number of teachers, in turns: each estimator, λ and number meets every variant, and each other
TURNS = (
    {"sampled": (1.0, 1), "full": (1.25, 2), "stratified": (1.25, 1)},
    {"sampled": (1.25, 2), "full": (1.0, 1), "stratified": (1.0, 2)},
)
CASES = [
    (variant, estimator, *setting)
    for variant, turn in zip(VARIANTS, itertools.cycle(TURNS), strict=False)
    for estimator, setting in turn.items()
    if (variant, estimator) != ("reuse", "stratified")
]


class Golden(Keeping, GOPDTrainer):
    """Keeps of each micro-batch what the student was, what it was when completions were sampled, and what came out."""

    def weights(self):
        model = self.accelerator.unwrap_model(self.model)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.sampled_by = self.weights()
        if self.args.use_stored_completions:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        completions = scripted_completions(self._tokenizer, prompt_ids, step=self.state.global_step, max_length=9)
        return completions, None

    def training_step(self, model, inputs, *args, **kwargs):
        weights = self.weights()
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = Step(self.state.global_step, self.seen, weights, self.sampled_by, loss.item(), self.grads)
        self.steps = [*getattr(self, "steps", []), step]
        return loss


@dataclass
class Step:
    """One micro-batch; `grads` are summed since the last step of the optimizer."""

    number: int
    inputs: dict
    weights: dict
    sampled_by: dict
    loss: float
    grads: dict


@dataclass
class Setting:
    """What a case asks for, and float64 copies of the models."""

    variant: str
    estimator: str
    gopd_lambda: float
    student: torch.nn.Module
    teachers: dict
    reference: torch.nn.Module

    @property
    def discount(self):
        return DISCOUNT if "discount" in self.variant else 0.0

    def with_weights(self, weights):
        """The student as it was at a step."""
        student = copy.deepcopy(self.student)
        named = dict(student.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                named[name].copy_(value)
        return student


def log_probs(model, prompt, completion):
    """`(T, V)`, from all logits of one row."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def later(values, weights, discount, *, weigh_values):
    """What comes after each token: γ·w'·(v' + after') of sampled values, or γ·(v' + w'·after') of expected ones."""
    after = [0.0]
    for value, weight in zip(values.tolist()[:0:-1], weights.tolist()[:0:-1], strict=True):
        after.append(discount * (weight * (value + after[-1]) if weigh_values else value + weight * after[-1]))
    return torch.tensor(after[::-1], dtype=torch.float64)


def sampled_losses(setting, s, t, r, old, weights):
    """−w·min(ρG, clip(ρ)G) of the sampled tokens, G = A + γ·w'·G', with A under the policy that sampled."""
    advantages = (t - old) + (setting.gopd_lambda - 1) * (t - r)
    credit = weights * (advantages + later(advantages, weights, setting.discount, weigh_values=True))
    ratio = (s - old).exp()
    return -torch.minimum(ratio * credit, ratio.clamp(1 - EPSILON, 1 + EPSILON) * credit)


def full_values(setting, log_s, log_t, log_r):
    """KL(π ‖ q_λ), which has the gradient, and E[A]."""
    log_q = (setting.gopd_lambda * log_t + (1 - setting.gopd_lambda) * log_r).log_softmax(-1)
    advantages = log_t - log_s + (setting.gopd_lambda - 1) * (log_t - log_r)
    return (log_s.exp() * (log_s - log_q)).sum(-1), (log_s.exp() * advantages).sum(-1).detach()


def stratified_values(setting, log_s, log_t, log_r, label, weight):
    """
    −Σ_S sg(π(A − b)) log π − w·1{y outside}·sg(A_y − b) log π_y with b the advantage of "not in S", as a gradient at
    the value −Ê[A] + log Ẑ; and Ê[A]. Of one state.
    """
    inside = log_s.topk(TOP_K).indices
    rests = [(1 - x.detach()[inside].exp().sum()).log() for x in (log_s, log_t, log_r)]

    def advantage(s, t, r):
        return (t - s + (setting.gopd_lambda - 1) * (t - r)).detach()

    own, rest = advantage(log_s, log_t, log_r), advantage(*rests)
    probs, outside = log_s.detach().exp(), 0.0 if label in inside else weight
    correction = outside * (own[label] - rest)
    mean = (probs * own)[inside].sum() + rests[0].exp() * rest + correction
    joint = torch.cat([(log_s.detach() + own)[inside], (rests[0] + rest).unsqueeze(0)])
    surrogate = -((probs * (own - rest))[inside] * log_s[inside]).sum() - correction * log_s[label]
    return joint.logsumexp(0) - mean + surrogate - surrogate.detach(), mean


def token_losses(setting, row, student, sampler):
    """`(T,)` losses of one row's tokens, with a gradient; ratios to the student that sampled; importance weights."""
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    label = torch.tensor(completion).unsqueeze(1)
    log_s = log_probs(student, prompt, completion)
    with torch.no_grad():
        log_t = log_probs(setting.teachers[row["teacher_id"]], prompt, completion)
        log_r = log_probs(setting.reference, prompt, completion)
        log_old = log_probs(sampler, prompt, completion) if setting.variant in USES_SAMPLER else log_s
    s, t, r, old = (x.gather(1, label).squeeze(1) for x in (log_s, log_t, log_r, log_old.detach()))
    weights = torch.ones_like(t)
    if row["sampler_logps"]:
        weights = (old - torch.tensor(row["sampler_logps"], dtype=torch.float64)).exp().clamp(max=WEIGHT_CAP)
    if setting.estimator == "sampled":
        return sampled_losses(setting, s, t, r, old, weights), (s - old).exp(), weights
    if setting.estimator == "full":
        divergence, expected = full_values(setting, log_s, log_t, log_r)
    else:
        pairs = [
            stratified_values(setting, *state) for state in zip(log_s, log_t, log_r, completion, weights, strict=True)
        ]
        divergence, expected = (torch.stack(part) for part in zip(*pairs, strict=True))
    after = later(expected, weights, setting.discount, weigh_values=False)
    return divergence - weights * after * (s - s.detach()), (s - old).exp(), weights


@pytest.fixture(scope="module")
def exact(models):
    """The models in float64."""
    return {
        name: AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32).eval().double()
        for name in ("student", "teacher", "base")
    }


@pytest.fixture
def run(make, several, models, exact, prompts, tokenizer):
    """Trains in one setting; returns it, the micro-batches and what their rows are."""

    def train(variant, estimator, gopd_lambda, num_teachers):
        options = {"max_steps": 2, "gopd_estimator": estimator, "gopd_lambda": gopd_lambda, **VARIANTS[variant]}
        rows, ids = prompts, IDS if num_teachers == 2 else [None] * len(prompts)
        read = [tokenizer(prompt)["input_ids"] for prompt in prompts["prompt"]]
        stored = scripted_completions(tokenizer, read, step=0, max_length=9)
        sampler_logps = [[(-4.0, -8.0)[i % 2] for i in range(len(completion))] for completion in stored]
        if num_teachers == 2:
            rows = rows.add_column("teacher_id", IDS)
        if variant in ("stored", "weights", "weights and discount"):
            rows = rows.add_column("completion_ids", stored)
        if "weights" in variant:
            rows = rows.add_column("sampling_per_token_logps", sampler_logps)
        build = several if num_teachers == 2 else make
        trainer = build(cls=Golden, gopd_top_k=TOP_K, train_dataset=rows, **options)
        trainer.train()
        student = exact["student"]
        if variant == "lora":
            student = get_peft_model(copy.deepcopy(student), LoraConfig(**LORA)).double()
        teachers = {None: exact["teacher"], "math": exact["teacher"], "code": exact["base"]}
        setting = Setting(variant, estimator, gopd_lambda, student, teachers, exact["student"])

        def row_of(prompt, seen, completion, mask):
            """A row, found by what the student read."""
            prompt, completion = prompt[seen.bool()].tolist(), completion[mask.bool()].tolist()
            number = read.index(prompt)
            assert "completion_ids" not in rows.column_names or completion == stored[number]
            return {
                "prompt_ids": prompt,
                "completion_ids": completion,
                "teacher_id": ids[number],
                "sampler_logps": sampler_logps[number] if "weights" in variant else None,
            }

        columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        batches = [zip(*(step.inputs[name] for name in columns), strict=True) for step in trainer.steps]
        return setting, trainer.steps, [[row_of(*row) for row in batch] for batch in batches]

    return train


@pytest.mark.parametrize(("variant", "estimator", "gopd_lambda", "num_teachers"), CASES)
def test_losses_and_gradients(run, variant, estimator, gopd_lambda, num_teachers):
    setting, steps, batches = run(variant, estimator, gopd_lambda, num_teachers)
    accumulation = VARIANTS[variant].get("gradient_accumulation_steps", 1)
    want, ratios, all_weights, number = {}, [], [], None
    for step, rows in zip(steps, batches, strict=True):
        if step.number != number:
            want, number = {}, step.number
        student, sampler = (setting.with_weights(weights) for weights in (step.weights, step.sampled_by))
        parts, of_rows, weights = zip(*(token_losses(setting, row, student, sampler) for row in rows), strict=True)
        ratios, all_weights = [*ratios, *of_rows], [*all_weights, *weights]
        loss = torch.stack([losses.mean() for losses in parts]).mean() / accumulation
        size = torch.stack([losses.abs().mean() for losses in parts]).mean() / accumulation
        assert abs(step.loss - loss.item()) < TOLERANCE * size, (step.loss, loss)
        named = {name: p for name, p in student.named_parameters() if name in step.weights}
        for name, grad in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            want[name] = want.get(name, 0.0) + grad
        norm = torch.stack([grad.norm() for grad in want.values()]).norm()
        gap = torch.stack([(step.grads[name] - grad).norm() for name, grad in want.items()]).norm()
        assert step.grads.keys() == want.keys() and norm > 0 and gap < TOLERANCE * norm, gap / norm
    assert len(steps) == accumulation * (number + 1) and number >= 1
    # The settings are what they are meant to be: some tokens are clipped, or have the largest weight, others do not.
    gaps, weights = (torch.cat(ratios).detach() - 1).abs(), torch.cat(all_weights)
    if variant == "reuse":
        assert (gaps > EPSILON).any() and ((gaps > 0) & (gaps < EPSILON)).any()
    assert ("weights" in variant) == bool((weights == WEIGHT_CAP).any()) == bool((weights < 0.5).any())


def test_each_pair_of_values_is_met():
    values = (VARIANTS, ("sampled", "full", "stratified"), (1.0, 1.25), (1, 2))
    for (i, one), (j, other) in itertools.combinations(enumerate(values), 2):
        pairs = {(case[i], case[j]) for case in CASES} | {("reuse", "stratified")}
        assert pairs >= set(itertools.product(one, other))
