"""
The target q_λ: its closed forms on small vocabularies.

- λ = 1 is the teacher and λ = 0 the reference.
- q_λ is the normalised product T^λ R^(1−λ), and ids without probability under the teacher get none.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_gopd.gopd.objective import extrapolate


EPS = torch.finfo(torch.float32).eps
TEACHER, REFERENCE = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
GRID = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0)


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
