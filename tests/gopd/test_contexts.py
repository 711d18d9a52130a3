"""
No frozen model is asked for a row that is longer than its context: such a row raises before, or has no loss. That
holds for teachers and references, whoever's prompt they read.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.gopd.harness import load
from tests.tiny import build_model
from trl_gopd.gopd.batch import Batch
from trl_gopd.gopd.contexts import Contexts, shortened
from trl_gopd.gopd.frozen.local import context_of


class Model:
    """A scorer that has a context."""

    def __init__(self, context):
        self.context = context

    def identity(self):
        return {"name": "some/model"}


def batch_of(teacher_index, *, prompt_lengths=None, completion_lengths=None):
    """A batch of rows of `teacher_index`, with prompts and completions of these lengths."""
    count = len(teacher_index)
    prompts, completions = prompt_lengths or [2] * count, completion_lengths or [3] * count
    prompt_mask = torch.stack([torch.arange(max(prompts)) >= max(prompts) - length for length in prompts]).long()
    completion_mask = torch.stack([torch.arange(max(completions)) < length for length in completions]).long()
    return Batch(
        prompt_ids=torch.full(prompt_mask.shape, 5),
        prompt_mask=prompt_mask,
        completion_ids=torch.full(completion_mask.shape, 6),
        completion_mask=completion_mask,
        loss_mask=completion_mask.clone(),
        teacher_index=torch.tensor(teacher_index),
        gopd_lambda=torch.full((count,), 1.25),
        task_advantages=torch.zeros(count),
        row=torch.arange(count),
    )


class TestReadable:
    ROWS = [{"prompt": "a" * 1000}, {"prompt": "b"}, {"prompt": "c"}]
    LENGTHS = {"teacher_lengths": [9, 4, 4], "reference_lengths": [5, 5, 5], "completion_lengths": [1, 5, 6]}

    def readable(self, teacher, reference, *, gopd_lambda=(2.0, 2.0, 2.0), drops_overlong=True):
        references = {} if reference is None else {"x": reference}
        contexts = Contexts({"x": teacher}, references, drops_overlong=drops_overlong)
        return contexts.readable(self.ROWS, ["x"] * 3, gopd_lambda=torch.tensor(gopd_lambda), **self.LENGTHS)

    def test_teacher(self):
        assert self.readable(Model(10), None) == [True, True, True]
        assert self.readable(Model(9), None) == [False, True, False]

    def test_reference(self):
        assert self.readable(Model(None), Model(10)) == [True, True, False]

    def test_no_reference_reads_a_row_whose_lambda_is_one(self):
        assert self.readable(Model(None), Model(10), gopd_lambda=(2.0, 2.0, 1.0)) == [True, True, True]

    def test_unknown_contexts(self):
        assert self.readable(Model(None), Model(None)) == [True, True, True]

    def test_message(self):
        with pytest.raises(ValueError, match="`max_completion_length`") as caught:
            self.readable(Model(9), Model(4), drops_overlong=False)
        text = str(caught.value)
        assert "prompt of 9 tokens that `teacher_model['x']` (some/model) reads" in text
        assert "completion of 1 tokens, exceed its context of 9" in text and "overlong_teacher_prompts='drop'" in text
        assert len(text) < 600 and "aaa...aaa" in text
        with pytest.raises(ValueError, match=r"`ref_model\['x'\]` \(some/model\) reads.*context of 10"):
            self.readable(Model(None), Model(10), drops_overlong=False)

    def test_shortened(self):
        assert shortened("abc") == "'abc'" and len(shortened("a" * 500)) == 120


class TestContextOf:
    def of(self, **fields):
        config = SimpleNamespace(**fields)
        config.get_text_config = lambda: config
        return context_of(config)

    def test_unknown(self):
        assert self.of() is None

    def test_plain(self):
        assert self.of(max_position_embeddings=32) == 32
        assert self.of(max_position_embeddings=32, rope_parameters={"rope_type": "default", "factor": 4.0}) == 32

    def test_stretched(self):
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        assert self.of(max_position_embeddings=32, rope_parameters=yarn) == 128
        assert self.of(max_position_embeddings=128, rope_parameters=yarn) == 128
        assert self.of(max_position_embeddings=32, rope_parameters={"rope_type": "linear", "factor": 2.0}) == 64

    def test_by_kind_of_layers(self):
        kinds = {"full_attention": {"rope_type": "yarn", "factor": 4.0}, "sliding": {"rope_type": "default"}}
        assert self.of(max_position_embeddings=32, rope_parameters=kinds) == 128


def test_a_row_without_a_loss_is_read_as_one_token():
    """So that a model is never given more tokens than it can read."""
    batch = batch_of([0, 0], prompt_lengths=[3, 2], completion_lengths=[2, 4])
    batch.loss_mask[1] = 0
    for read in (batch.read_by_student, batch.read_by_teacher):
        assert read.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0]]
        assert read.scored.tolist() == [[True, True, False, False], [False] * 4]


class TestRuns:
    @pytest.fixture
    def short(self, tokenizer):
        """A model that says of itself that it reads 24 tokens; prompts have 17 to 19, completions 2 to 9."""

        def build(seed):
            model = build_model(tokenizer, seed=seed)
            model.config.max_position_embeddings = 24
            return model

        return build

    def test_teacher_with_the_prompt_of_the_student(self, make, short):
        with pytest.raises(ValueError, match="`teacher_model` .* exceed its context of 24"):
            make(teacher_model=short(2), per_device_train_batch_size=8).train()

    def test_reference(self, make, short):
        with pytest.raises(ValueError, match="`ref_model` .* exceed its context of 24"):
            make(ref_model=short(3), per_device_train_batch_size=8).train()

    @pytest.mark.parametrize("estimator", ["sampled", "full"])
    @pytest.mark.parametrize("role", ["teacher_model", "ref_model"])
    def test_dropped_rows_have_no_loss(self, make, short, models, estimator, role):
        """The gradient is that of all rows without a limit, of which the long ones have no loss."""
        given = {"teacher_model": str(models / "teacher"), "ref_model": str(models / "base"), role: short(4)}
        options = {"gopd_estimator": estimator, "overlong_teacher_prompts": "drop", "per_device_train_batch_size": 8}
        trainer = make(**given, **options)
        trainer.train()
        seen = trainer.seen
        fits = seen["prompt_mask"].sum(1) + seen["completion_mask"].sum(1) <= 24
        assert 0 < fits.sum() < 8
        assert torch.equal(seen["tool_mask"], seen["completion_mask"] * fits.unsqueeze(1))
        if estimator == "sampled":
            assert seen["gopd_teacher_logps"][~fits].eq(0).all() and seen["gopd_reference_logps"][~fits].eq(0).all()
        assert all(torch.isfinite(gradient).all() for gradient in trainer.grads.values())
        assert any(gradient.any() for gradient in trainer.grads.values())

    def test_all_rows_dropped(self, make, models):
        model = load(models / "teacher")
        model.config.max_position_embeddings = 4
        trainer = make(teacher_model=model, overlong_teacher_prompts="drop")
        trainer.train()
        assert not any(gradient.any() for gradient in trainer.grads.values())
