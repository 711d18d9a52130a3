"""The log of one generation batch: its rows come in micro-batches, in any order, and each shows its own advantages."""

import math
from collections import defaultdict, deque
from types import SimpleNamespace

import pytest
import torch

from trl_gopd.gopd.completion_log import COLUMN, SHOWN_COMPLETIONS, CompletionLog
from trl_gopd.gopd.estimators.protocol import Estimate


EPS = torch.finfo(torch.float32).eps
NAN = math.nan


def number(row, token, salt):
    """Log-probabilities that tell rows, tokens and models apart, exact in float32."""
    return -(1 + row / 4 + token / 16 + salt / 64 * (-1) ** (row + token))


def micro_batch(rows, *, gopd_lambda=1.5, loss_mask=None, known=None, has_reference=True, shift=0.0):
    """Rows of three tokens of a generation batch; what is not known is NaN."""
    loss_mask = torch.ones(len(rows), 3) if loss_mask is None else torch.tensor(loss_mask)
    known = loss_mask if known is None else torch.tensor(known)
    student, teacher, reference = (
        torch.tensor([[number(row, token, salt) for token in range(3)] for row in rows]) for salt in (1, 9, 30)
    )
    student = (student + shift).masked_fill(known == 0, NAN)
    estimate = Estimate(
        logps=student,
        credits=torch.full_like(student, NAN),
        advantages=torch.full_like(student, NAN),
        known=known,
        gopd_lambda=torch.full((len(rows), 1), gopd_lambda),
        student_logps=student,
        teacher_logps=teacher,
        reverse_kl=student - teacher,
        reference_logps=reference if has_reference else None,
    )
    ids = torch.tensor([[100 * row + token for token in range(3)] for row in rows])
    return SimpleNamespace(row=torch.tensor(rows), loss_mask=loss_mask, completion_ids=ids), estimate


def advantage(row, token, *, gopd_lambda=1.5, clip=None, shift=0.0):
    """A of one token, whatever the estimator."""
    s, t, r = (number(row, token, salt) for salt in (1, 9, 30))
    reward = t - r if clip is None else max(-clip, min(clip, t - r))
    return t - s - shift + (gopd_lambda - 1) * reward


def close(value):
    return pytest.approx(value, rel=0, abs=16 * 8 * EPS)  # a few sums of numbers below 8


class OneRank:
    device, num_processes = "cpu", 1

    def gather(self, values):
        return values


class TwoRanks(OneRank):
    """Of which the other has the same numbers, negated."""

    num_processes = 2

    def gather(self, values):
        return torch.cat([values, -values])


def new_log(clip, accelerator=None, has_rewards=False):
    return CompletionLog(accelerator or OneRank(), has_rewards=has_rewards, extrapolation_clip=clip)


def trl_logs(*advantages):
    return {"advantages": deque(advantages, maxlen=32), "extra": defaultdict(lambda: deque(maxlen=32))}


def row_means(log):
    """What it puts into the logs for the rows of this process."""
    logs = trl_logs()
    log.fill(logs)
    return torch.tensor(list(logs["advantages"]))


class TestTable:
    """Its column is that of GRPO's advantages, of which it replaces the last generation batch."""

    def test_the_last_rows_are_replaced(self):
        log, logs = new_log(None), trl_logs(7.0, 8.0, 9.0)
        log.fill(logs)  # nothing has begun
        assert list(logs["advantages"]) == [7.0, 8.0, 9.0]
        log.begin(2, logs)
        log.add(*micro_batch([0, 1]))
        want = [close(sum(advantage(row, token) for token in range(3)) / 3) for row in (0, 1)]
        for _ in range(2):  # as often as it is asked
            log.fill(logs)
            assert list(logs["advantages"]) == [7.0, *want] and not logs["extra"]

    def test_rows_of_all_ranks(self):
        log, logs = new_log(None, TwoRanks()), trl_logs(7.0, 8.0, 9.0)
        log.begin(1, logs)
        log.add(*micro_batch([0]))
        log.fill(logs)
        mean = sum(advantage(0, token) for token in range(3)) / 3
        assert list(logs["advantages"]) == [7.0, close(mean), close(-mean)]

    def test_beside_those_of_rewards(self):
        log, logs = new_log(None, TwoRanks(), has_rewards=True), trl_logs(0.5, -0.5)
        log.begin(3, logs)
        assert COLUMN == "gopd_advantage" and list(logs["extra"]) == [COLUMN]
        assert len(logs["extra"][COLUMN]) == 6 and all(math.isnan(value) for value in logs["extra"][COLUMN])
        log.add(*micro_batch([0, 1, 2]))
        log.fill(logs)
        means = [sum(advantage(row, token) for token in range(3)) / 3 for row in range(3)]
        assert list(logs["extra"][COLUMN]) == [close(mean) for mean in (*means, *(-mean for mean in means))]
        assert list(logs["advantages"]) == [0.5, -0.5]

    def test_page(self, tmp_path):
        log = new_log(None)
        log.begin(1, trl_logs())
        log.write_page(tmp_path, step=3, decode=str)
        assert not list(tmp_path.iterdir())  # nothing was trained on
        log.add(*micro_batch([0]))
        log.write_page(tmp_path, step=3, decode=str)
        assert "Advantages, step 3" in (tmp_path / "advantages_00003.html").read_text()


class TestRowMeans:
    def test_rows_in_any_order(self):
        log = new_log(None)
        log.begin(5, trl_logs())
        log.add(*micro_batch([4, 1]))
        log.add(*micro_batch([0]))
        got = row_means(log).tolist()
        for row in (0, 1, 4):
            assert got[row] == close(sum(advantage(row, token) for token in range(3)) / 3)
        assert len(got) == 5 and math.isnan(got[2]) and math.isnan(got[3])

    def test_only_known_tokens_add_to_a_mean_over_trained_ones(self):
        """As in the loss: an id outside the vocabulary has an advantage of 0 and counts, and a tool's does not."""
        log = new_log(None)
        log.begin(2, trl_logs())
        log.add(*micro_batch([0, 1], loss_mask=[[1, 1, 0], [0, 0, 0]], known=[[1, 0, 0], [0, 0, 0]]))
        assert row_means(log).tolist() == [close(advantage(0, 0) / 2), 0.0]
        log.add(*micro_batch([1], loss_mask=[[0, 1, 0]]))
        assert row_means(log).tolist()[1] == close(advantage(1, 1))

    def test_a_row_that_comes_again_is_replaced(self):
        log = new_log(None)
        log.begin(1, trl_logs())
        log.add(*micro_batch([0]))
        log.add(*micro_batch([0], shift=0.25))
        want = [advantage(0, token, shift=0.25) for token in range(3)]
        assert row_means(log).tolist() == [close(sum(want) / 3)]
        assert [row["advantage"] for row in log.token_rows(str)] == [close(value) for value in want]

    def test_clip_and_lambda_are_those_of_the_objective(self):
        clip = 0.1  # rewards are ±21/64
        log = new_log(clip)
        log.begin(2, trl_logs())
        log.add(*micro_batch([0, 1], gopd_lambda=3.0))
        want = [sum(advantage(row, t, gopd_lambda=3.0, clip=clip) for t in range(3)) / 3 for row in (0, 1)]
        assert row_means(log).tolist() == [close(value) for value in want]
        assert want[0] != sum(advantage(0, t, gopd_lambda=3.0) for t in range(3)) / 3

    def test_a_new_generation_batch_forgets_the_last(self):
        log = new_log(None)
        assert len(row_means(log)) == 0 and log.token_rows(str) == []
        log.begin(2, trl_logs())
        log.add(*micro_batch([0, 1]))
        log.begin(3, trl_logs())
        assert row_means(log).shape == (3,) and bool(row_means(log).isnan().all()) and log.token_rows(str) == []


class TestTokenRows:
    def test_tokens_of_the_first_completions(self):
        log = new_log(None)
        log.begin(12, trl_logs())
        log.add(*micro_batch([11, 8, 7, 2], known=[[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 1, 1]]))
        log.add(*micro_batch([0]))
        want = []
        for row, tokens in ((0, (0, 1, 2)), (2, (1, 2)), (7, (0, 2))):  # not 8 and 11
            for token in tokens:
                want.append(
                    {
                        "completion": row,
                        "position": token,
                        "token": f"<{100 * row + token}>",
                        "student_logp": number(row, token, 1),
                        "teacher_logp": number(row, token, 9),
                        "reference_logp": number(row, token, 30),
                        "advantage": close(advantage(row, token)),
                    }
                )
        assert SHOWN_COMPLETIONS == 8
        assert log.token_rows(lambda index: f"<{index}>") == want
        assert not row_means(log)[[7, 8, 11]].isnan().any()  # all rows have a mean

    def test_without_a_reference(self):
        log = new_log(None)
        log.begin(1, trl_logs())
        log.add(*micro_batch([0], gopd_lambda=1.0, has_reference=False))
        rows = log.token_rows(str)
        assert [row["reference_logp"] for row in rows] == [None] * 3
        assert [row["advantage"] for row in rows] == [close(advantage(0, t, gopd_lambda=1.0)) for t in range(3)]

    def test_keeps_no_graph(self):
        log = new_log(None)
        log.begin(1, trl_logs())
        batch, estimate = micro_batch([0])
        estimate.student_logps.requires_grad_()
        log.add(batch, estimate)
        assert not row_means(log).requires_grad
