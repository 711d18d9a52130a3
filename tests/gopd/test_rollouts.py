"""Stored completions take the place of sampled ones as they are: whole, in order, or not at all."""

import pytest
import torch

from tests.gopd.harness import Recording
from tests.tiny import scripted_completions
from trl_gopd.gopd.rollouts import stored_completions, token_ids


ROWS = [{"completion_ids": [5, 6, 7]}, {"completion_ids": [0]}]
LOGPS = [[-0.5, -1.0, -0.25], [-2.0]]


class TestStoredCompletions:
    def test_are_the_rows_in_order(self):
        assert stored_completions(ROWS, max_length=3) == ([[5, 6, 7], [0]], None)

    def test_bring_what_their_sampler_gave_them(self):
        rows = [{**row, "sampling_per_token_logps": logps} for row, logps in zip(ROWS, LOGPS, strict=True)]
        assert stored_completions(rows, max_length=3) == ([[5, 6, 7], [0]], LOGPS)

    def test_too_long_is_not_cut(self):
        with pytest.raises(ValueError, match="row 0 of the batch has 3 ids, and `max_completion_length` is 2. Raise"):
            stored_completions(ROWS, max_length=2)

    @pytest.mark.parametrize(
        ("logps", "size"), [([-1.0, -1.0], "got 2"), (None, "got NoneType instead"), (-1.0, "got float instead")]
    )
    def test_log_probabilities_that_do_not_fit(self, logps, size):
        rows = [{**ROWS[0], "sampling_per_token_logps": LOGPS[0]}, {**ROWS[1], "sampling_per_token_logps": logps}]
        with pytest.raises(ValueError, match=f"each of the 1 `completion_ids` in row 1 of the batch, {size}"):
            stored_completions(rows, max_length=3)

    @pytest.mark.parametrize(
        "value", [float("nan"), float("inf"), -float("inf"), 0.5, "-1", None, [-1.0], True, -1e300, 10**400]
    )
    def test_log_probabilities_that_are_none(self, value):
        rows = [{**ROWS[0], "sampling_per_token_logps": LOGPS[0]}, {**ROWS[1], "sampling_per_token_logps": [value]}]
        with pytest.raises(ValueError, match="finite numbers of at most 0, .* in row 1 of the batch. Correct the row"):
            stored_completions(rows, max_length=3)

    def test_certain_tokens_and_whole_numbers_are_allowed(self):
        rows = [{**ROWS[1], "sampling_per_token_logps": [value]} for value in (0, -3, 1e-6, -1e30)]
        assert stored_completions(rows, max_length=3)[1] == [[0], [-3], [1e-6], [-1e30]]

    def test_trainer_takes_them_for_sampled_ones(self, make, models, tokenizer, prompts):
        """At the seam that the trainer has to use: rows in, in the order of the prompts."""

        class Stored(Recording):
            def _generate_and_score_completions(self, inputs):
                self._rows = inputs
                return super()._generate_and_score_completions(inputs)

            def _generate_single_turn(self, prompt_ids, *args, **kwargs):
                return stored_completions(self._rows, max_length=self.max_completion_length)

        # What `Recording` would sample in step 0: the same run, down to the loss.
        ids = scripted_completions(tokenizer, tokenizer(list(prompts["prompt"]))["input_ids"], step=0, max_length=9)
        runs = []
        for arguments in ({}, {"cls": Stored, "train_dataset": prompts.add_column("completion_ids", ids)}):
            runs.append(make(**arguments))
            runs[-1].train()
        sampled, stored = runs
        assert stored.losses == sampled.losses
        assert torch.equal(stored.seen["completion_ids"], sampled.seen["completion_ids"])


class TestTokenIds:
    def test_are_int64(self):
        ids = token_ids({"prompt_ids": [3, 0]}, "prompt_ids", number=0)
        assert ids.tolist() == [3, 0] and str(ids.dtype) == "torch.int64"

    @pytest.mark.parametrize(
        ("row", "shown"),
        [
            ({}, "no such column"),
            ({"prompt_ids": None}, "NoneType None"),
            ({"prompt_ids": []}, r"list \[\]"),
            ({"prompt_ids": [1, -100]}, r"list \[1, -100\]"),
            ({"prompt_ids": [1.0]}, r"list \[1.0\]"),
            ({"prompt_ids": [True]}, r"list \[True\]"),
            ({"prompt_ids": "text"}, "str text"),
        ],
    )
    def test_others_are_refused(self, row, shown):
        with pytest.raises(ValueError, match=f"`prompt_ids` must be a list .* row 7 has {shown}. Store the ids"):
            token_ids(row, "prompt_ids", number=7)
