"""
What monitors see does not depend on padding, on the order of the completions or on how they are divided among
processes; shares lie in [0, 1]; counts are those of a loop that does nothing clever.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gopd.gopd.monitors import (
    completion_rows,
    is_eos,
    is_truncated,
    masked_sum,
    repetition,
    summarize_completions,
    token_table,
    topk_overlap,
)


EPS = torch.finfo(torch.float32).eps
EOS = 2


@st.composite
def batches(draw):
    """Ids from a small alphabet, with ends among them, and masks with gaps, as tools leave, and empty rows."""
    shape = draw(st.integers(1, 5)), draw(st.integers(0, 14))
    cells = shape[0] * shape[1]
    ids = draw(st.lists(st.integers(0, 3), min_size=cells, max_size=cells))
    mask = draw(st.lists(st.sampled_from([0, 1, 1, 1]), min_size=cells, max_size=cells))
    return torch.tensor(ids, dtype=torch.long).view(shape), torch.tensor(mask, dtype=torch.long).view(shape)


def grams_of(ids, mask, n):
    """All n-grams of one completion, none over a gap."""
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1) if all(mask[start : start + n])]


class TestMaskedSum:
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_sum_and_count_of_what_is_masked_in(self, poison):
        values = torch.tensor([[1.0, 2.0, poison], [4.0, poison, poison]])
        assert masked_sum(values, torch.tensor([[1, 1, 0], [1, 0, 0]])).tolist() == [7.0, 3.0]

    def test_nothing_masked_in(self):
        assert masked_sum(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [0.0, 0.0]
        assert masked_sum(torch.ones(2, 0), torch.zeros(2, 0)).tolist() == [0.0, 0.0]

    def test_mean_at_the_ends(self):
        """How the pressure on the end of sequence is read off."""
        ids = torch.tensor([[5, EOS, EOS], [EOS, 5, 9]])
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        log_ratios = torch.tensor([[0.5, -1.0, 8.0], [-2.0, 0.5, 0.5]])
        total, count = masked_sum(log_ratios, is_eos(ids, mask, EOS)).tolist()
        assert total / count == -1.5

    def test_detached_and_float32(self):
        got = masked_sum(torch.ones(2, dtype=torch.bfloat16, requires_grad=True), torch.ones(2))
        assert got.dtype == torch.float32 and not got.requires_grad


class TestIsTruncated:
    @pytest.mark.parametrize(
        ("ids", "mask", "expected"),
        [
            ([5, 6, EOS], [1, 1, 1], False),
            ([5, EOS, EOS], [1, 1, 0], False),  # the padding is the end's id
            ([5, 6, EOS], [1, 1, 0], True),  # and here is the only one of it
            ([5, EOS, 6], [1, 1, 1], True),  # a turn ended, the completion did not
            ([5, 7, 9], [1, 1, 0], False),  # another id that ends
            ([5, 6, EOS], [1, 0, 1], False),
            ([5, 6, EOS], [0, 0, 0], True),
        ],
    )
    def test_looks_at_the_last_token(self, ids, mask, expected):
        assert is_truncated(torch.tensor([ids]), torch.tensor([mask]), [EOS, 7]).tolist() == [expected]

    def test_one_id_or_several(self):
        ids, mask = torch.tensor([[5, EOS], [5, 7]]), torch.ones(2, 2)
        assert is_truncated(ids, mask, EOS).tolist() == is_truncated(ids, mask, [EOS]).tolist() == [False, True]
        assert is_truncated(ids, mask, []).tolist() == [True, True]


class TestRepetition:
    @pytest.mark.parametrize(
        ("ids", "expected"),
        [
            ([1, 2, 3, 4, 5, 6], 0.0),
            ([1, 1, 1, 1, 1, 1, 1], 3 / 4),  # four 4-grams, all the same
            ([1, 2, 1, 2, 1, 2, 1], 2 / 4),
            ([1, 1, 1, 1], 0.0),
            ([1, 1, 1], 0.0),
            ([], 0.0),
        ],
    )
    def test_closed_form(self, ids, expected):
        ids = torch.tensor([ids], dtype=torch.long)
        assert repetition(ids, torch.ones_like(ids)).tolist() == [expected]

    @settings(derandomize=True, deadline=None)
    @given(batch=batches(), n=st.integers(1, 5))
    def test_equals_the_count_of_a_loop(self, batch, n):
        ids, mask = batch
        expected = []
        for row, seen in zip(ids.tolist(), mask.tolist(), strict=True):
            grams = grams_of(row, seen, n)
            expected.append((len(grams) - len(set(grams))) / max(len(grams), 1))
        # one division
        torch.testing.assert_close(repetition(ids, mask, n), torch.tensor(expected), rtol=0, atol=EPS)

    def test_large_vocabularies_do_not_collide(self):
        """The last ids of a vocabulary of 2¹⁸ in every place: numbers as they are would pass 2⁶³."""
        top = 2**18
        ids = torch.tensor([[top - 1 - i // 7 for i in range(70)], [top - 1] * 70])
        grams = grams_of(ids[0].tolist(), [1] * 70, 4)
        expected = [1 - len(set(grams)) / 67, 1 - 1 / 67]
        got = repetition(ids, torch.ones_like(ids))
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2 * EPS)

    def test_same_tokens_in_two_completions_do_not_count(self):
        ids = torch.tensor([[1, 2, 3, 4, 5]] * 3)
        assert repetition(ids, torch.ones_like(ids)).tolist() == [0.0] * 3


class TestCompletionRows:
    @settings(derandomize=True, deadline=None)
    @given(
        batch=batches(), left=st.integers(0, 3), right=st.integers(0, 3), pad=st.sampled_from([-100, 0, EOS, 10**6])
    )
    def test_padding_changes_nothing(self, batch, left, right, pad):
        ids, mask = batch
        padded = F.pad(ids, (left, right), value=pad), F.pad(mask, (left, right))
        assert torch.equal(completion_rows(*padded, [EOS]), completion_rows(ids, mask, [EOS]))

    @settings(derandomize=True, deadline=None)
    @given(batch=batches())
    def test_masked_ids_are_not_seen(self, batch):
        ids, mask = batch
        hidden = ids.masked_fill(mask == 0, EOS)
        assert torch.equal(completion_rows(hidden, mask, [EOS]), completion_rows(ids, mask, [EOS]))

    @settings(derandomize=True, deadline=None)
    @given(batch=batches(), data=st.data())
    def test_each_row_is_its_own(self, batch, data):
        ids, mask = batch
        rows = completion_rows(ids, mask, [EOS])
        order = data.draw(st.permutations(range(len(ids))))
        assert torch.equal(completion_rows(ids[order], mask[order], [EOS]), rows[order])
        alone = [completion_rows(ids[i : i + 1], mask[i : i + 1], [EOS]) for i in range(len(ids))]
        assert torch.equal(torch.cat(alone), rows)

    @settings(derandomize=True, deadline=None)
    @given(batch=batches())
    def test_bounds(self, batch):
        ids, mask = batch
        lengths, truncated, repeated = completion_rows(ids, mask, [EOS]).unbind(1)
        assert torch.equal(lengths.long(), mask.sum(1))
        assert ((truncated == 0) | (truncated == 1)).all()
        assert ((repeated >= 0) & (repeated < 1)).all()

    def test_inputs_are_left_alone(self):
        ids, mask = torch.tensor([[1, 1, 1, 1, 1, EOS]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
        before = ids.clone(), mask.clone()
        completion_rows(ids, mask, EOS)
        assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])

    def test_dtypes_of_mask_and_ids(self):
        ids, mask = torch.tensor([[1, 1, 1, 1, 1, EOS]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
        rows = completion_rows(ids, mask, EOS)
        for dtype in (torch.bool, torch.int32, torch.float32):
            assert torch.equal(completion_rows(ids.int(), mask.to(dtype), EOS), rows)


class TestSummarizeCompletions:
    def test_closed_form(self):
        rows = torch.stack([torch.arange(101.0), (torch.arange(101) < 25).float(), torch.full((101,), 0.5)], dim=1)
        summary = summarize_completions(rows)
        assert (summary.mean_length, summary.p95_length, summary.repetition) == (50.0, 95.0, 0.5)
        # float32: one division of two integers
        assert summary.truncated_share == pytest.approx(25 / 101, abs=EPS)

    def test_one_completion(self):
        summary = summarize_completions(torch.tensor([[7.0, 1.0, 0.25]]))
        assert vars(summary) == {"mean_length": 7.0, "p95_length": 7.0, "truncated_share": 1.0, "repetition": 0.25}

    def test_goes_through_json(self):
        summary = summarize_completions(torch.tensor([[7.0, 1.0, 0.1]]))
        assert json.loads(json.dumps(vars(summary))) == vars(summary)


class TestTopkOverlap:
    def test_closed_form(self):
        student = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
        teacher = torch.tensor([[3, 1, 2], [4, 5, 6], [9, 2, 8]])
        torch.testing.assert_close(topk_overlap(student, teacher), torch.tensor([1.0, 0.0, 1 / 3]), rtol=0, atol=EPS)

    @settings(derandomize=True, deadline=None)
    @given(seed=st.integers(0, 2**16), n=st.integers(0, 5), k=st.integers(1, 6))
    def test_symmetric_and_equal_to_that_of_sets(self, seed, n, k):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = torch.rand(2, n, 9, generator=generator).topk(k).indices
        overlap = topk_overlap(student, teacher)
        expected = [len({*a} & {*b}) / k for a, b in zip(student.tolist(), teacher.tolist(), strict=True)]
        torch.testing.assert_close(overlap, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=EPS)
        assert torch.equal(overlap, topk_overlap(teacher, student))

    def test_shapes_must_be_equal(self):
        with pytest.raises(ValueError, match=r"one shape \(N, k\), got \(4, 3\) and \(4, 5\). Take as many"):
            topk_overlap(torch.zeros(4, 3), torch.zeros(4, 5))


class TestTokenTable:
    def arguments(self):
        names = ("student_logps", "teacher_logps", "reference_logps", "advantages")
        arguments = {name: torch.arange(6.0).view(2, 3) + 10 * i for i, name in enumerate(names)}
        return arguments | {"mask": torch.tensor([[1, 0, 1], [0, 1, 0]])}

    def test_one_row_for_each_token_that_counts(self):
        rows = token_table([["a", "b", "c"], ["d", "e", "f"]], **self.arguments())
        names = ("completion", "position", "token", "student_logp", "teacher_logp", "reference_logp", "advantage")
        assert [tuple(row) for row in rows] == [names] * 3
        assert [tuple(row.values()) for row in rows] == [
            (0, 0, "a", 0.0, 10.0, 20.0, 30.0),
            (0, 2, "c", 2.0, 12.0, 22.0, 32.0),
            (1, 1, "e", 4.0, 14.0, 24.0, 34.0),
        ]
        assert json.loads(json.dumps(rows)) == rows

    def test_without_a_reference(self):
        rows = token_table([["a", "b", "c"]] * 2, **self.arguments() | {"reference_logps": None})
        assert [row["reference_logp"] for row in rows] == [None] * 3

    def test_no_token(self):
        arguments = {name: value[:, :0] for name, value in self.arguments().items()}
        assert token_table([[], []], **arguments) == []

    @pytest.mark.parametrize("tokens", [[["a"] * 3], [["a"] * 3, ["b"] * 2]])
    def test_strings_must_fit_the_mask(self, tokens):
        with pytest.raises(ValueError, match=r"2 rows of 3 strings.*got rows of \[3.*Give a string for padding too"):
            token_table(tokens, **self.arguments())
