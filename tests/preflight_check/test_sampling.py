"""
`generate` samples from q_λ.

- Decoding step by step equals the mix of the logits of both models on the whole sequence, for rows padded left.
- Sampled tokens follow q_λ, and ids that only one model has are never sampled.
"""

import math

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from tests.tiny import build_model
from trl_gopd.gopd.frozen.local import FrozenModel
from trl_gopd.preflight_check import ExtrapolatedLogitsProcessor


EPS = torch.finfo(torch.float32).eps


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
        with pytest.raises(ValueError, match=r"ids of shape \(1, 4\), got \(1, 3\). Create a new processor for each"):
            processor(ids, torch.zeros(1, 264))
