"""
Frozen models: log-probabilities in chunks equal the model's own logits, for the ways families treat their logits.
"""

import math

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from tests.tiny import build_model
from trl_gopd.gopd.batch import Sequences
from trl_gopd.gopd.frozen.adapter import is_fresh_adapter
from trl_gopd.gopd.frozen.local import FrozenModel, LocalScorer, evaluation_mode, project


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    "soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
    "scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1, eos_token_id=2
        )
    ),
}


@pytest.fixture
def batch(generator):
    """Two rows, prompts padded left and completions right, 3 + 5 columns."""
    ids = torch.randint(3, 61, (2, 8), generator=generator)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    return ids, mask


def build(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def scorer(model, **options):
    options = {"temperature": 1.0, "role": "teacher_model", "batch_size": 2, "chunk_size": 256, **options}
    return LocalScorer(model, accelerator=Accelerator(cpu=True), **options)


def own_log_probs(model, ids, mask, temperature):
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -6:-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[:, -5:].unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_size", [3, 256])
def test_equals_the_models_own_logits(family, temperature, chunk_size, batch):
    ids, mask = batch
    model = build(family)
    teacher = scorer(model, temperature=temperature, batch_size=1, chunk_size=chunk_size)
    got = teacher.score(Sequences.of(ids, mask, 5))
    with torch.no_grad():
        want = own_log_probs(model, ids, mask, temperature)
    seen = mask[:, -5:].bool()
    # a few dozen float32 roundings of logits below 64
    torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=40 * torch.finfo(torch.float32).eps * 64)
    assert not got.requires_grad and got.dtype == torch.float32 and got[~seen].eq(0).all()


def test_refuses_a_head_it_cannot_reproduce():
    model = build("scale")
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.size(-1))
        return output

    model.forward = forward
    with pytest.raises(ValueError, match=r"logits of `teacher_model` \(CohereForCausalLM\).*Use another model family"):
        scorer(model)


def test_ids_the_model_lacks_score_minus_infinity(tokenizer, batch):
    ids, mask = batch
    ids[1, 6] = 70
    got = scorer(build("divided")).score(Sequences.of(ids, mask, 5))
    assert got[1, 3] == -math.inf and got[1, :3].isfinite().all()


def test_no_completion(batch):
    ids, mask = batch
    assert scorer(build("divided")).score(Sequences.of(ids, mask, 0)).shape == (2, 0)


def test_freezes(tokenizer):
    model = build_model(tokenizer, seed=0).train()
    inner = FrozenModel(model)
    assert not inner.model.training and not any(p.requires_grad for p in model.parameters())


def test_a_head_that_is_not_plain_is_called():
    class Doubled(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    head, hidden = Doubled(3, 5), torch.ones(2, 3)
    assert torch.equal(project(head, hidden), 2 * torch.nn.functional.linear(hidden, head.weight, head.bias))


def test_evaluation_mode_gives_every_module_its_own_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError, match="boom"), evaluation_mode(model):
        assert not model[0].training
        raise RuntimeError("boom")
    assert model.training and model[0].training and not model[1].training


def test_fresh_adapter(tokenizer):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_model(tokenizer, seed=0), LoraConfig(r=2, target_modules=["q_proj"]))
    assert is_fresh_adapter(model)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data.add_(1)
    assert not is_fresh_adapter(model)
