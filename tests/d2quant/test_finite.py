"""A number that is not finite is found wherever it is, in any dtype; what has no numbers is finite."""

import pytest
import torch

from trl_gopd.d2quant.finite import check_finite, is_finite, largest


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 5, 11])
def test_one_number_is_enough(dtype, value, position):
    tensor = torch.arange(12, dtype=dtype).view(3, 4) - 6
    assert is_finite(tensor) and largest(tensor) == 6
    tensor.view(-1)[position] = value
    assert not is_finite(tensor)
    assert not largest(tensor) < float("inf")


def test_largest_number_of_a_dtype_is_finite():
    assert all(
        is_finite(torch.tensor([torch.finfo(dtype).min, torch.finfo(dtype).max], dtype=dtype)) for dtype in DTYPES
    )


def test_no_numbers_and_whole_numbers():
    assert is_finite(torch.zeros(0, 3)) and largest(torch.zeros(0)) == 0
    assert is_finite(torch.zeros(2, dtype=torch.int32)) and is_finite(torch.ones(2, dtype=torch.bool))


def test_the_first_is_named_with_its_dtype():
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta"), "c": torch.tensor([1, float("nan")])}
    with pytest.raises(ValueError, match="^`c` holds NaN or infinity, in torch.float32. Do this.$"):
        check_finite(tensors.items(), "Do this.")
