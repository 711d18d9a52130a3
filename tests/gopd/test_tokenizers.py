"""
Frozen models score the student's ids as they are. They need to have them, and to end their answers with one of them:
otherwise they are refused, or the two ends are exchanged, which all estimators see alike.
"""

import logging

import pytest
import torch

from tests.tiny import build_model, build_tokenizer
from trl_gopd.gopd.batch import Sequences
from trl_gopd.gopd.frozen.relabelled import relabelled
from trl_gopd.gopd.frozen.tokenizers import EndTokens, check_vocabulary, different_id, end_ids, stored_end_ids


END_OF_TEXT, END_OF_TURN = 0, 2  # the student of these tests ends with the latter


def wider(tokenizer):
    """The same tokenizer with one id more."""
    other = build_tokenizer()
    other.add_tokens(["<|extra|>"], special_tokens=True)
    return other


class TestIds:
    def test_further_ids_of_the_model(self, tokenizer, tmp_path):
        wider(tokenizer).save_pretrained(tmp_path)
        assert len(check_vocabulary(tokenizer, str(tmp_path), role="teacher_model")) == len(tokenizer) + 1

    def test_further_ids_of_the_student(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match="id 259 is None there and '<|extra|>' in the student's".replace("|", r"\|")
        ):
            check_vocabulary(wider(tokenizer), str(tmp_path), role="teacher_model")

    def test_other_ids(self, tokenizer):
        assert different_id(tokenizer, tokenizer) is None
        assert different_id(tokenizer, build_tokenizer(("<|extra|>",))) == 3

    def test_none(self, tokenizer, caplog):
        with caplog.at_level(logging.WARNING):
            assert check_vocabulary(tokenizer, "", role="ref_model") is None
        assert "tokenizer of `ref_model` could not be compared" in caplog.text


class TestEnds:
    def ends(self, tokenizer, mismatch="raise", others=()):
        config = build_model(tokenizer, seed=0).generation_config
        config.eos_token_id = [END_OF_TURN, *others]
        return EndTokens(tokenizer, config, mismatch=mismatch)

    def test_ids(self, tokenizer, models, tmp_path):
        config = build_model(tokenizer, seed=0).generation_config
        assert end_ids(tokenizer, config) == (END_OF_TURN,)
        config.eos_token_id = [END_OF_TEXT, END_OF_TURN, 7]
        assert end_ids(tokenizer, config) == (END_OF_TURN, END_OF_TEXT, 7)
        config.eos_token_id = None
        assert end_ids(None, config) == () and end_ids(tokenizer, None) == (END_OF_TURN,)
        assert stored_end_ids(tokenizer, str(models / "teacher")) == (END_OF_TURN,)
        assert stored_end_ids(None, str(tmp_path)) == ()

    def test_refuses_models_without_an_end_in_common(self, tokenizer):
        with pytest.raises(ValueError, match="`teacher_model` ends its answers with 0") as caught:
            self.ends(tokenizer).compare(object(), (END_OF_TEXT,), role="teacher_model")
        assert all(part in str(caught.value) for part in ("<|endoftext|>", "2 ('<|im_end|>')", "'map'", "'keep'"))

    def test_an_end_in_common(self, tokenizer, caplog):
        ends, model = self.ends(tokenizer, others=[END_OF_TEXT]), object()
        with caplog.at_level(logging.INFO):
            ends.compare(model, (END_OF_TURN,), role="teacher_model")
            assert not caplog.text
            ends.compare(model, (END_OF_TEXT, END_OF_TURN), role="teacher_model")
        assert ends.apply(model) is model and "set `gopd_eos_mismatch='map'`" in caplog.text

    def test_keep(self, tokenizer):
        ends, model = self.ends(tokenizer, "keep"), object()
        ends.compare(model, (END_OF_TEXT,), role="teacher_model")
        assert ends.apply(model) is model

    def test_unknown(self, tokenizer, caplog):
        with caplog.at_level(logging.INFO, logger="trl_gopd"):
            self.ends(tokenizer).compare(object(), (), role="ref_model")
        assert "end token of `ref_model` is not known" in caplog.text

    def test_map_asks_each_model_once(self, tokenizer):
        """A model in two roles stays one, and so does the cache before it."""
        ends, model = self.ends(tokenizer, "map"), Top()
        ends.compare(model, (END_OF_TEXT,), role="teacher_model")
        cache = Top(wrapped=model)
        assert ends.apply(model) is ends.apply(model) and ends.apply(cache) is ends.apply(cache)
        assert ends.apply(cache).scorer is cache and ends.apply(model).ids == (END_OF_TURN, END_OF_TEXT)


class Top:
    """A scorer that answers with the likeliest ids, and keeps what it was given."""

    is_sharded, context = False, 7

    def __init__(self, wrapped=None):
        self.wrapped = wrapped

    def identity(self):
        return {"name": "top"}

    def score(self, sequences):
        self.given = sequences.input_ids.tolist()
        return torch.zeros(sequences.scored.shape)

    def score_top(self, sequences):
        logps = self.score(sequences)
        return logps, sequences.completion_ids.unsqueeze(-1), logps.unsqueeze(-1)


def test_served_models_are_asked_for_their_own_end():
    top = Top()
    model = relabelled(top, 2, 0)
    ids = torch.tensor([[2, 0, 5, 2], [0, 2, 0, 6]])
    _, top_ids, _ = model.score_top(Sequences.of(ids, torch.ones_like(ids), 2))
    assert top.given == [[2, 0, 5, 0], [0, 2, 2, 6]]  # the prompt is read as it is
    assert top_ids.squeeze(-1).tolist() == [[5, 2], [0, 6]]  # and what comes back has the ids of the student
    assert model.context == 7 and not model.is_sharded and model.identity()["exchanged_ids"] == [2, 0]


class TestRuns:
    @pytest.fixture
    def base(self, tokenizer):
        """A model that ends with another token than the student, of two seeds that differ."""

        def build(seed):
            model = build_model(tokenizer, seed=seed)
            model.generation_config.eos_token_id = END_OF_TEXT
            return model

        return build

    @pytest.mark.parametrize("role", ["teacher_model", "ref_model"])
    def test_refused(self, make, base, role):
        with pytest.raises(ValueError, match=f"`{role}` ends its answers with 0"):
            make(**{role: base(2)})

    @pytest.mark.parametrize("estimator", ["sampled", "stratified", "full"])
    def test_mapped(self, make, base, tokenizer, estimator):
        """As if the two tokens had each other's weights in the model."""

        def exchanged(seed):
            model = build_model(tokenizer, seed=seed)
            for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
                weight.data[[END_OF_TEXT, END_OF_TURN]] = weight.data[[END_OF_TURN, END_OF_TEXT]]
            return model

        options = {"gopd_estimator": estimator, "gopd_top_k": 8}
        mapped = make(teacher_model=base(2), ref_model=base(3), gopd_eos_mismatch="map", **options)
        wanted = make(teacher_model=exchanged(2), ref_model=exchanged(3), **options)
        kept = make(teacher_model=base(2), ref_model=base(3), gopd_eos_mismatch="keep", **options)
        for trainer in (mapped, wanted, kept):
            trainer.train()
        for name, gradient in wanted.grads.items():
            torch.testing.assert_close(mapped.grads[name], gradient, rtol=0, atol=1e-6)
        assert max((kept.grads[n] - g).abs().max() for n, g in wanted.grads.items()) > 1e-3

    def test_unknown_choice(self, make):
        with pytest.raises(ValueError, match="`gopd_eos_mismatch` must be one of .*, got 'swap'"):
            make(gopd_eos_mismatch="swap")
