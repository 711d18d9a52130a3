"""
The target q_λ: its closed forms on small vocabularies, and `generate` sampling from it.

- λ = 1 is the teacher, λ = 0 the reference, teacher = reference makes λ irrelevant.
- log Z_λ = (λ − 1)·D_λ by enumeration; the limit of D_λ at 1 is KL(T ‖ R); D_λ does not fall as λ grows.
- Decoding step by step equals the mix of both models' logits on the whole sequence, for rows padded left.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tests.tiny import build_model
from trl_gopd.gopd.extrapolation import ExtrapolatedLogitsProcessor, lambda_effects
from trl_gopd.gopd.frozen.local import FrozenModel
from trl_gopd.gopd.objective import extrapolate


EPS = torch.finfo(torch.float32).eps
TEACHER, REFERENCE = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
GRID = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0)


def logps(generator, rows=4, vocab=37):
    return torch.randn(rows, vocab, generator=generator).mul(2).log_softmax(-1)


def effects(teacher, reference, lambdas, eos_ids=()):
    return lambda_effects(teacher_logps=teacher, reference_logps=reference, lambdas=lambdas, eos_ids=eos_ids)


class TestExtrapolate:
    @pytest.mark.parametrize(
        ("gopd_lambda", "expected"),
        [
            (0.0, (0.2, 0.3, 0.5)),
            (0.5, (0.339, 0.322, 0.339)),
            (1.0, (0.5, 0.3, 0.2)),
            (1.25, (0.578, 0.276, 0.146)),
            (1.5, (0.650, 0.246, 0.104)),
            (2.0, (0.767, 0.184, 0.049)),
        ],
    )
    def test_worked_example(self, gopd_lambda, expected):
        log_q, _ = extrapolate(teacher_logps=TEACHER.log(), reference_logps=REFERENCE.log(), gopd_lambda=gopd_lambda)
        # the last digit given is rounded
        torch.testing.assert_close(log_q.exp(), torch.tensor(expected), rtol=0, atol=0.5e-3)

    @given(
        gopd_lambda=st.floats(0, 4),
        logits=st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=9),
    )
    @settings(derandomize=True, deadline=None, max_examples=50)
    def test_is_the_normalised_product(self, gopd_lambda, logits):
        teacher, reference = torch.tensor(logits, dtype=torch.float64).log_softmax(0).T
        log_q, log_z = extrapolate(teacher_logps=teacher, reference_logps=reference, gopd_lambda=gopd_lambda)
        weights = teacher.exp() ** gopd_lambda * reference.exp() ** (1 - gopd_lambda)
        # inputs rounded to float32, and a sum of two products of at most 4·(5 + 5 + log 9) nats
        tolerance = {"rtol": 0, "atol": 4 * EPS * 50}
        torch.testing.assert_close(log_z.double(), weights.sum().log(), **tolerance)
        torch.testing.assert_close(log_q.double(), (weights / weights.sum()).log(), **tolerance)

    def test_lambda_one_ignores_reference(self):
        reference = torch.full((3,), math.nan)
        log_q, log_z = extrapolate(teacher_logps=TEACHER.log(), reference_logps=reference, gopd_lambda=1.0)
        assert torch.equal(log_q, TEACHER.log()) and log_z == 0

    @pytest.mark.parametrize("gopd_lambda", GRID)
    def test_ids_without_probability_stay_without(self, gopd_lambda):
        teacher = torch.tensor([0.5, 0.5, 0.0, 0.0]).log()
        reference = torch.tensor([0.25, 0.5, 0.25, 0.0]).log()
        log_q, log_z = extrapolate(teacher_logps=teacher, reference_logps=reference, gopd_lambda=gopd_lambda)
        assert torch.equal(log_q.exp()[2:], torch.zeros(2)) and log_z.isfinite()
        torch.testing.assert_close(log_q.exp().sum(), torch.tensor(1.0))


class TestLambdaEffects:
    def test_closed_forms(self):
        values = effects(TEACHER.log().unsqueeze(0), REFERENCE.log().unsqueeze(0), GRID, eos_ids=[2])
        assert set(values) == {
            *("renyi", "log_z", "kl_to_teacher", "entropy", "eos_probability", "flips", "off_teacher_mass")
        }
        for index, gopd_lambda in enumerate(GRID):
            weights = TEACHER.double() ** gopd_lambda * REFERENCE.double() ** (1 - gopd_lambda)
            z, q = weights.sum(), weights / weights.sum()
            if gopd_lambda == 1:
                renyi = (TEACHER * (TEACHER / REFERENCE).log()).sum()
            else:
                renyi = z.log() / (gopd_lambda - 1)
            expected = {
                "renyi": renyi,
                "log_z": z.log(),
                "kl_to_teacher": (q * (q / TEACHER).log()).sum(),
                "entropy": -(q * q.log()).sum(),
                "eos_probability": q[2],
                "flips": torch.tensor(float(q.argmax() != 0)),
                "off_teacher_mass": torch.tensor(0.0),
            }
            for name, value in expected.items():
                # a dozen roundings of numbers below 2, divided by |λ − 1| ≥ 1/4
                torch.testing.assert_close(values[name][0, index], value.float(), rtol=0, atol=100 * EPS, msg=name)

    def test_entropies_of_the_worked_example(self):
        lambdas = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0)
        entropy = effects(TEACHER.log().unsqueeze(0), REFERENCE.log().unsqueeze(0), lambdas)["entropy"]
        expected = torch.tensor([[1.030, 1.098, 1.030, 0.953, 0.861, 0.663]])
        torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-3)

    def test_log_z_is_scaled_divergence(self, generator):
        lambdas = (0.25, 0.5, 1.0, 1.25, 2.0, 3.0)
        values = effects(logps(generator), logps(generator), lambdas)
        scale = torch.tensor(lambdas) - 1
        torch.testing.assert_close(values["log_z"], scale * values["renyi"])

    def test_limit_at_one_is_kl(self, generator):
        teacher, reference = logps(generator), logps(generator)
        step = 2**-6
        below, kl, above = effects(teacher, reference, (1 - step, 1.0, 1 + step))["renyi"].T
        assert (below < kl).all() and (kl < above).all()
        # the mean of both sides is off by the second order only: h²/2 · D'' with |D''| below r³, r ≤ 16 nats here
        rewards = (teacher - reference).abs().max()
        assert ((below + above) / 2 - kl).abs().max() < step**2 / 2 * rewards**3

    def test_divergence_does_not_fall_with_lambda(self, generator):
        values = effects(logps(generator, rows=50), logps(generator, rows=50), (0.25, 0.5, 1.0, 1.1, 1.5, 2.0, 4.0))
        assert (values["renyi"].diff(dim=1) > 0).all()

    def test_teacher_equal_to_reference_makes_lambda_irrelevant(self, generator):
        teacher = logps(generator)
        values = effects(teacher, teacher, GRID, eos_ids=[0])
        rounding = 37 * EPS * 4  # of one sum over the vocabulary, divided by |λ − 1| ≥ 1/4
        assert not values["flips"].any()
        for name in ("renyi", "log_z", "kl_to_teacher"):
            assert values[name].abs().max() <= rounding, name
        for name in ("entropy", "eos_probability", "off_teacher_mass"):
            torch.testing.assert_close(values[name], values[name][:, 2:3].expand(-1, len(GRID)))

    def test_flip_and_off_teacher_mass_by_hand(self):
        # At λ = 3 the weights T³/R² are 0.9, 0.097 and 7.29: an id that the teacher hardly ever takes comes first.
        teacher = torch.tensor([[0.9, 0.0991, 0.0009]]).log()
        reference = torch.tensor([[0.9, 0.09999, 1e-5]]).log()
        values = effects(teacher, reference, (1.0, 3.0))
        weights = (teacher.double().exp() ** 3 / reference.double().exp() ** 2)[0]
        assert values["flips"].tolist() == [[0.0, 1.0]]
        expected = torch.tensor([[0.0009, float(weights[2] / weights.sum())]])
        torch.testing.assert_close(values["off_teacher_mass"], expected, rtol=32 * EPS * 12, atol=0)


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return build_model(tokenizer, seed=2, hidden_size=48, vocab_size=260)


@pytest.fixture(scope="module")
def reference(tokenizer):
    return build_model(tokenizer, seed=3, vocab_size=264)


def mixed_logits(teacher, reference, ids, gopd_lambda, temperature):
    """The same from scratch: both models on one row without padding."""
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids.unsqueeze(0)).logits[0, -1] for model in (teacher, reference))
    shared = min(len(ours), len(theirs))
    return (gopd_lambda * ours[:shared] + (1 - gopd_lambda) * theirs[:shared]) / temperature


def decode(teacher, reference, gopd_lambda, prompts, *, steps=5, temperature=1.0, frozen_temperature=1.0):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processor = ExtrapolatedLogitsProcessor(
        FrozenModel(reference, frozen_temperature), gopd_lambda=gopd_lambda, attention_mask=mask
    )
    config = GenerationConfig(
        do_sample=True, top_k=0, temperature=temperature, max_new_tokens=steps, pad_token_id=0, eos_token_id=None
    )
    torch.manual_seed(0)
    output = teacher.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=-1,
    )
    return output.sequences[:, width:], output.scores


class TestProcessor:
    PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]

    @pytest.mark.parametrize("gopd_lambda", [0.0, 0.5, 1.0, 1.25, 2.0])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_scores_are_those_of_both_models_on_whole_rows(self, teacher, reference, gopd_lambda, temperature):
        tokens, scores = decode(
            teacher, reference, gopd_lambda, self.PROMPTS, temperature=temperature, frozen_temperature=temperature
        )
        assert len(scores) == 5
        for row, prompt in enumerate(self.PROMPTS):
            for step, score in enumerate(scores):
                ids = torch.tensor(prompt + tokens[row, :step].tolist())
                want = mixed_logits(teacher, reference, ids, gopd_lambda, temperature)
                # two layers of a few hundred roundings each, amplified by 2|λ| + 1
                bound = 400 * EPS * want.abs().max().item() * (2 * gopd_lambda + 1)
                torch.testing.assert_close(score[row, :260], want, rtol=0, atol=bound)

    def test_reference_with_positions_of_its_own(self, teacher, tokenizer):
        """Learned positions count from a row's first token, not from its padding."""
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
        reference = GPT2LMHeadModel(GPT2Config(vocab_size=260, bos_token_id=1, eos_token_id=2, **sizes)).eval()
        tokens, scores = decode(teacher, reference, 2.0, self.PROMPTS)
        ids = torch.tensor(self.PROMPTS[1] + tokens[1, :4].tolist())
        want = mixed_logits(teacher, reference, ids, 2.0, 1.0)
        torch.testing.assert_close(scores[4][1], want, rtol=0, atol=2000 * EPS * want.abs().max().item())

    def test_samples_follow_the_target(self, teacher, reference):
        """Frequencies of the first token over many draws, four standard errors around q_λ."""
        draws = 2000
        prompt = self.PROMPTS[1]
        tokens, _ = decode(teacher, reference, 1.5, [prompt] * draws, steps=1)
        law = mixed_logits(teacher, reference, torch.tensor(prompt), 1.5, 1.0).softmax(-1)
        top = law.topk(5).indices
        share = (tokens == top).float().mean(0)
        error = (law[top] * (1 - law[top]) / draws).sqrt()
        assert ((share - law[top]).abs() < 4 * error).all()

    @pytest.mark.parametrize("gopd_lambda", [0.0, 1.0, 1.5])
    def test_ids_of_one_model_alone_are_never_sampled(self, teacher, reference, gopd_lambda):
        _, scores = decode(reference, teacher, gopd_lambda, self.PROMPTS, steps=2)  # 264 ids against 260
        assert all((score[:, 260:] == -math.inf).all() and score[:, :260].isfinite().all() for score in scores)

    def test_lambda_one_does_not_call_the_reference(self, teacher, reference, monkeypatch):
        monkeypatch.setattr(reference.model, "forward", lambda *_, **__: pytest.fail("called the reference"))
        decode(teacher, reference, 1.0, self.PROMPTS, steps=2)

    def test_masked_id_of_the_teacher_stays_masked(self, reference):
        processor = ExtrapolatedLogitsProcessor(
            FrozenModel(reference), gopd_lambda=0.0, attention_mask=torch.ones(1, 3, dtype=torch.long)
        )
        scores = torch.zeros(1, 264)
        scores[0, 7] = -math.inf
        mixed = processor(torch.tensor([[5, 6, 7]]), scores)
        assert mixed[0, 7] == -math.inf and mixed.isfinite().sum() == 263

    def test_second_use_is_refused(self, teacher, reference):
        processor = ExtrapolatedLogitsProcessor(
            FrozenModel(reference), gopd_lambda=1.5, attention_mask=torch.ones(1, 3, dtype=torch.long)
        )
        ids = torch.tensor([[5, 6, 7]])
        processor(ids, torch.zeros(1, 264))
        with pytest.raises(ValueError, match=r"ids of shape \(1, 4\), got \(1, 3\). Make a new one for each"):
            processor(ids, torch.zeros(1, 264))
