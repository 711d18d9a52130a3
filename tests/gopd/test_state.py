"""How one frozen model is told from another."""

import pytest

from trl_gopd.gopd.frozen.identity import is_same_identity


BASE = {"name": "base", "revision": None}


@pytest.mark.parametrize(
    "one,other,same",
    [
        ({**BASE, "weights": "aa"}, {**BASE, "name": "moved", "weights": "aa"}, True),
        ({**BASE, "weights": "aa"}, {**BASE, "weights": "bb"}, False),
        ({**BASE, "weights": None}, {**BASE, "weights": "bb"}, True),  # a sharded run has no checksum
        ({**BASE, "weights": None}, {**BASE, "revision": "v2", "weights": None}, False),
        ({**BASE, "adapter": "teacher_model_math"}, {**BASE, "adapter": "teacher_model_code"}, False),
        ({**BASE, "adapter": None}, BASE, True),  # the base without an adapter is the base
    ],
)
def test_checksums_decide_before_names(one, other, same):
    assert is_same_identity(one, other) is same
    assert is_same_identity(other, one) is same
