"""
Frozen models: log-probabilities in chunks equal the model's own logits, for the ways families treat their logits, and
whatever rows are scored with. Every row is read as if it were alone: positions are counted from its first token.
"""

import math
from types import SimpleNamespace

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
from trl_gopd.gopd.frozen import local
from trl_gopd.gopd.frozen.adapter import is_fresh_adapter
from trl_gopd.gopd.frozen.local import FrozenModel, LocalScorer, evaluation_mode, project
from trl_gopd.gopd.frozen.offload import Offload


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


def own_log_probs(model, ids, mask, temperature, num_tokens=5):
    """The naive way: each row alone, without padding."""
    result = torch.zeros(len(ids), num_tokens)
    for row, seen in enumerate(mask.bool()):
        labels = ids[row : row + 1, seen]
        logits = model(input_ids=labels).logits[0, :-1].float() / temperature
        logps = logits.log_softmax(-1).gather(-1, labels[0, 1:].unsqueeze(-1)).squeeze(-1)
        count = int(seen[-num_tokens:].sum())
        result[row, seen[-num_tokens:]] = logps[len(logps) - count :]
    return result


def heavy_tailed(rows, generator, prompt_length=12, median=24):
    """Rows whose completions have lengths of a Pareto tail, the longest at least eight times the median."""
    lengths = (median / 2 ** (1 / 1.1) * torch.rand(rows, generator=generator) ** (-1 / 1.1)).long().clamp(1, 600)
    lengths[rows // 2] = 8 * int(lengths.median()) + 3
    prompts = torch.randint(2, prompt_length + 1, (rows,), generator=generator)
    ids = torch.randint(3, 61, (rows, prompt_length + int(lengths.max())), generator=generator)
    columns = torch.arange(ids.size(1)) - prompt_length
    mask = (columns >= -prompts.unsqueeze(1)) & (columns < lengths.unsqueeze(1))
    return ids.masked_fill(~mask, 0), mask.long(), int(lengths.max())


class Positions:
    """Counts calls of a model and positions in them."""

    def __init__(self, teacher):
        self.shapes = []
        teacher.inner.register_forward_pre_hook(lambda module, args: self.shapes.append(tuple(args[0].shape)))

    @property
    def total(self):
        return sum(rows * columns for rows, columns in self.shapes)


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


class TestGroups:
    """What is forwarded together changes nothing but rounding."""

    # a few dozen float32 roundings of logits below 64
    ATOL = 40 * torch.finfo(torch.float32).eps * 64

    @pytest.mark.parametrize("rows", [16, 64])
    @pytest.mark.parametrize("packed", [False, True])
    def test_heavy_tails_cost_little_padding(self, rows, packed, generator, monkeypatch):
        if packed:
            monkeypatch.setattr(local, "can_pack", lambda config: True)
        ids, mask, width = heavy_tailed(rows, generator)
        teacher = scorer(build("divided"), batch_size=4)
        positions = Positions(teacher)
        teacher.score(Sequences.of(ids, mask, width))
        needed = int((mask.sum(1) - 1).sum())  # nothing is predicted from the last token
        lengths = mask[:, -width:].sum(1).float()
        assert lengths.max() >= 8 * lengths.median()
        assert positions.total <= (1 if packed else 1.15) * needed
        assert len(positions.shapes) <= rows / 2

    @pytest.mark.parametrize("family", ["learned positions", "scale"])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("budget", [1, 40, 100, None])
    def test_equals_rows_alone_in_any_order(self, family, packed, budget, generator, monkeypatch):
        if packed:
            monkeypatch.setattr(local, "can_pack", lambda config: True)
        ids, mask, width = heavy_tailed(8, generator, median=6)
        model = build(family)
        teacher = scorer(model, batch_size=2, batch_tokens=budget)
        assert teacher.budget.is_packed == packed
        order = torch.randperm(len(ids), generator=generator)
        got = teacher.score(Sequences.of(ids[order], mask[order], width))
        with torch.no_grad():
            want = own_log_probs(model, ids, mask, 1.0, width)[order]
        torch.testing.assert_close(got, want, rtol=0, atol=self.ATOL)

    def test_budget_bounds_a_forward(self, generator):
        ids, mask, width = heavy_tailed(16, generator)
        teacher = scorer(build("divided"), batch_tokens=100)
        positions = Positions(teacher)
        teacher.score(Sequences.of(ids, mask, width))
        assert any(rows > 1 for rows, _ in positions.shapes)
        assert all(rows == 1 or rows * columns <= 100 for rows, columns in positions.shapes)

    @pytest.mark.parametrize("ask", ["score", "hidden"])
    def test_only_what_is_needed_is_read(self, ask, generator):
        """Rows with nothing to score are not, nor is what comes after the last scored token, and the head less."""
        ids = torch.randint(3, 61, (4, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        scored = torch.zeros(4, 6, dtype=torch.bool)
        scored[0, [1, 3]] = scored[2, 0] = True
        teacher = scorer(build("bias"), batch_tokens=100)
        positions, heads = Positions(teacher), []
        project_all = teacher.inner.logits
        teacher.inner.logits = lambda hidden: heads.append(len(hidden)) or project_all(hidden)
        got = getattr(teacher, ask)(Sequences(ids, mask, scored))
        # 7 tokens up to the last scored one, of which 2 are padding, and 4: nothing is predicted from the last
        assert positions.shapes == [(2, 4)]
        assert sum(heads) == (3 if ask == "score" else 0)
        with torch.no_grad():
            hidden = teacher.inner.base.base_model(input_ids=ids[2:3, :4]).last_hidden_state[0, 2]
        if ask == "hidden":
            torch.testing.assert_close(got[2], hidden, rtol=0, atol=self.ATOL)
        else:
            assert got[~scored].eq(0).all() and got[scored].ne(0).all()

    def test_nothing_to_score_is_no_forward(self, batch):
        ids, mask = batch
        teacher = scorer(build("scale"))
        positions = Positions(teacher)
        got = teacher.score(Sequences(ids, mask, torch.zeros(2, 5, dtype=torch.bool)))
        assert positions.shapes == [] and torch.equal(got, torch.zeros(2, 5))

    @pytest.mark.parametrize("packed", [False, True])
    def test_padding_may_hold_anything(self, packed, batch, monkeypatch):
        if packed:
            monkeypatch.setattr(local, "can_pack", lambda config: True)
        ids, mask = batch
        ids = ids.masked_fill(mask == 0, 0)
        model = build("bias")  # whose head is not its embedding
        teacher = scorer(model)
        want = teacher.score(Sequences.of(ids, mask, 5))
        model.get_input_embeddings().weight.data[0] = math.nan
        assert torch.equal(teacher.score(Sequences.of(ids, mask, 5))[mask[:, 3:].bool()], want[mask[:, 3:].bool()])

    @pytest.mark.parametrize("column", [0, 6])
    def test_a_token_that_nothing_predicts_is_refused(self, column, batch):
        ids, mask = batch
        scored = torch.zeros(2, 7, dtype=torch.bool)
        scored[0, column] = True
        with pytest.raises(ValueError, match="masked, or that is the first of its row.*prompts of at least one token"):
            scorer(build("scale")).score(Sequences(ids, mask, scored))

    def test_rows_that_would_see_each_other_are_padded(self, batch, monkeypatch, caplog):
        """A family that does not hand positions on to its attention."""
        monkeypatch.setattr(local, "can_pack", lambda config: True)
        model = build("scale")
        forward = model.model.forward
        model.model.forward = lambda position_ids=None, **inputs: forward(**inputs)
        teacher = scorer(model)
        assert not teacher.budget.is_packed
        assert "`teacher_model` (CohereForCausalLM) does not keep rows apart" in caplog.text

    @pytest.mark.parametrize(
        "implementation,layers,expected",
        [
            ("flash_attention_2", None, True),
            ("kernels-community/flash-attn3", ["full_attention", "sliding_attention"], True),
            ("flash_attention_2", ["full_attention", "linear_attention"], False),
            ("sdpa", None, False),
            ("eager", None, False),
            (None, None, False),
        ],
    )
    def test_flash_attention_needs_no_padding(self, implementation, layers, expected):
        config = SimpleNamespace(_attn_implementation=implementation, layer_types=layers)
        config.get_text_config = lambda: config
        assert local.can_pack(config) == expected


class TestOffload:
    def test_weights_come_back_after_errors(self, batch):
        ids, mask = batch
        want = scorer(build("scale")).score(Sequences.of(ids, mask, 5))
        teacher = scorer(build("scale"), offload=True)
        homes = [p.data_ptr() for p in teacher.inner.parameters()]
        teacher.prefetch()
        assert torch.equal(teacher.score(Sequences.of(ids, mask, 5)), want)
        with pytest.raises(RuntimeError, match="boom"), teacher._on_device():
            raise RuntimeError("boom")
        assert [p.data_ptr() for p in teacher.inner.parameters()] == homes

    def test_are_elsewhere_meanwhile(self, monkeypatch):
        module = torch.nn.Linear(3, 5)
        homes = [p.data_ptr() for p in module.parameters()]
        offload = Offload(module, torch.device("cpu"))
        assert offload.num_bytes == 4 * 20
        monkeypatch.setattr(offload, "_copies", lambda: [torch.ones(5, 3), torch.zeros(5)])
        with offload.on_device():
            assert module(torch.ones(1, 3)).tolist() == [[3.0] * 5]
        assert [p.data_ptr() for p in module.parameters()] == homes


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
