"""
Deviation-aware correction: mean and explained share are what their formulas say, however tokens were pooled; gate,
shrinkage and clip have the limits that they should; and a shift of the norm is a bias of the linears that read it.
"""

import pytest
import torch

from trl_gopd.d2quant.correction import Deviation, mean_shift


@pytest.fixture
def outputs(generator):
    """Outputs `(windows, tokens, channels)` of a norm, full and quantized; channel 0 is untouched."""
    full = torch.randn(3, 50, 9, generator=generator)
    error = 0.1 * torch.randn(3, 50, 9, generator=generator) + 0.1 * torch.randn(9, generator=generator)
    error[..., 0] = 0
    return full, full - error


class TestDeviation:
    def test_closed_form(self):
        full, quantized = torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
        deviation = Deviation.of(full, quantized)  # (1, −2), (3, 2)
        assert deviation.tokens == 2
        assert torch.equal(deviation.mean, torch.tensor([2.0, 0.0]).double())
        assert torch.equal(deviation.explained, torch.tensor([4 / 5, 0.0], dtype=torch.float64))

    def test_explained_is_the_energy_that_the_mean_removes(self, outputs):
        full, quantized = (tensor.double().flatten(0, 1) for tensor in outputs)
        deviation = Deviation.of(*outputs)
        before = (full - quantized).square().sum(0)
        after = (full - quantized - deviation.mean).square().sum(0)
        rtol = 1e2 * torch.finfo(torch.float64).eps
        torch.testing.assert_close(1 - deviation.explained[1:], (after / before)[1:], rtol=rtol, atol=rtol)
        assert deviation.mean[0] == deviation.explained[0] == 0
        variance = (full - quantized).var(0, correction=0)
        expected = deviation.mean**2 / (deviation.mean**2 + variance)
        torch.testing.assert_close(deviation.explained[1:], expected[1:], rtol=rtol, atol=rtol)

    def test_parts_pool_to_the_whole(self, outputs):
        full, quantized = outputs
        parts = [Deviation.of(full[:1], quantized[:1]), Deviation.of(full[1, :7], quantized[1, :7])]
        parts += [Deviation.of(full[1, 7:], quantized[1, 7:]), Deviation.of(full[2], quantized[2])]
        whole, pooled = Deviation.of(full, quantized), sum(parts[1:], parts[0])
        assert pooled.tokens == whole.tokens == 150
        torch.testing.assert_close(pooled.total, whole.total)
        torch.testing.assert_close(pooled.squares, whole.squares)

    def test_one_token(self):
        deviation = Deviation.of(torch.tensor([[3.0, -2.0]]), torch.tensor([[1.0, 2.0]]))
        assert deviation.mean.tolist() == [2.0, -4.0]
        assert deviation.explained.tolist() == [1.0, 1.0]

    def test_energy_below_one_counts(self):
        assert Deviation.of(torch.tensor([[1e-3], [0.0]]), torch.zeros(2, 1)).explained.item() == pytest.approx(0.5)

    def test_low_precision_is_summed_in_double(self):
        full, quantized = torch.ones(5000, 1, dtype=torch.bfloat16), torch.zeros(5000, 1, dtype=torch.bfloat16)
        assert Deviation.of(full, quantized).total.item() == 5000

    def test_no_tokens(self):
        deviation = Deviation.of(torch.zeros(0, 4), torch.zeros(0, 4))
        for shrink in (False, True):
            assert torch.equal(mean_shift(deviation, shrink=shrink), torch.zeros(4).double())


class TestMeanShift:
    def test_is_the_mean_unless_told_otherwise(self, outputs):
        deviation = Deviation.of(*outputs)
        assert torch.equal(mean_shift(deviation), deviation.mean)

    def test_gate_keeps_what_the_mean_explains(self, outputs):
        deviation = Deviation.of(*outputs)
        middle = float(deviation.explained.median())
        kept = deviation.explained >= middle
        assert 0 < kept.sum() < len(kept)
        assert torch.equal(mean_shift(deviation, gate=middle), deviation.mean * kept)
        assert not mean_shift(deviation, gate=1.0).any()

    def test_shrinks_by_the_noise_of_the_mean(self, outputs):
        deviation = Deviation.of(*outputs)
        variance = deviation.squares / 150 - deviation.mean**2
        factor = (1 - variance / 150 / deviation.mean**2).clamp(min=0).nan_to_num()
        assert (factor[1:] < 1).all() and factor.max() > 0.9
        torch.testing.assert_close(mean_shift(deviation, shrink=True), factor * deviation.mean)

    def test_shrinkage_has_its_limits(self):
        def of(mean, variance, tokens):
            total = torch.tensor([mean * tokens]).double()
            return Deviation(total, torch.tensor([(mean**2 + variance) * tokens]).double(), tokens)

        assert mean_shift(of(0.5, 0.0, 1), shrink=True) == 0.5  # a constant is known from one token
        assert mean_shift(of(0.5, 0.05, 1), shrink=True).item() == pytest.approx(0.4)  # 0.5·(1 − 0.05/0.5²)
        assert mean_shift(of(0.5, 0.05, 2), shrink=True).item() == pytest.approx(0.45)
        assert mean_shift(of(0.5, 1.0, 10**9), shrink=True).item() == pytest.approx(0.5, rel=1e-8)
        assert mean_shift(of(0.5, 1.0, 4), shrink=True) == 0  # as uncertain as it is large
        assert mean_shift(of(0.1, 1.0, 4), shrink=True) == 0  # and more so
        assert mean_shift(of(0.0, 1.0, 4), shrink=True) == 0

    def test_is_clipped(self):
        full = torch.tensor([[-1e3, -10.5, -9.5, 9.5, 10.5, 1e3]])
        shift = mean_shift(Deviation.of(full, torch.zeros(1, 6)))
        assert shift.tolist() == [-10.0, -10.0, -9.5, 9.5, 10.0, 10.0]

    def test_is_a_bias_of_the_linears_that_read_it(self, outputs, generator):
        full, quantized = outputs
        weight = torch.randn(13, 9, generator=generator)
        shift = mean_shift(Deviation.of(full, quantized)).float()
        at_norm = (quantized + shift) @ weight.T
        folded = quantized @ weight.T + weight @ shift
        # a sum of nine, the addition of the shift, and that of the bias
        largest = (quantized.abs() + shift.abs()) @ weight.abs().T
        assert ((at_norm - folded).abs() <= (9 + 2) * torch.finfo(torch.float32).eps * largest).all()

    def test_lowers_the_error_behind_the_norm(self, outputs, generator):
        full, quantized = outputs
        shift = mean_shift(Deviation.of(full, quantized)).float()
        for _ in range(5):  # for any linear: what is left of the deviation has mean zero, and μ is orthogonal to it
            weight = torch.randn(13, 9, generator=generator)
            before, after = ((full - y) @ weight.T for y in (quantized, quantized + shift))
            assert after.square().sum() < before.square().sum()
