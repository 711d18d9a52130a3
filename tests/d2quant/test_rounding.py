"""
Rounding: without correlations it is to nearest; the sweep is optimal brain surgeon, and its errors add up to the loss
that it minimises; the shift of GPTAQ is a least squares. How columns are batched, ordered or scaled is the same sweep.
"""

import itertools

import pytest
import torch

from tests.memory import peak_bytes
from trl_gopd.d2quant import rounding
from trl_gopd.d2quant.grids import GRIDS, GroupGrid
from trl_gopd.d2quant.rounding import inverse_factor, round_weight


EPS = torch.finfo(torch.float32).eps
FORMATS = list(itertools.product(GRIDS, (2, 3)))
PLAIN = {"hessian_weights": False, "act_group_aware": False}
FAST = {"iterations": 2, "clip": False}  # where the law holds for any grid


def random_weight(generator, rows=7, columns=20):
    return torch.randn(rows, columns, generator=generator) * (0.5 + torch.rand(columns, generator=generator))


def calibrate(generator, columns=20, tokens=60, noise=0.3):
    """Correlated inputs `(tokens, columns)` of the quantized model and of the full one, and their H and D."""
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    full = torch.randn(tokens, columns, generator=generator) @ mix
    quantized = full + noise * torch.randn(tokens, columns, generator=generator) @ mix
    return quantized, full, 2 / tokens * quantized.T @ quantized, 2 / tokens * (full - quantized).T @ quantized


def damp(hessian, damp_percent):
    return hessian + damp_percent * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def loss(weight, result, hessian):
    """tr(ΔHΔᵀ) in float64."""
    delta = (result.dequantize() - weight.float()).double()
    return float((delta @ hessian.double() * delta).sum())


def assert_same_up_to_half_precision(result, other):
    """Sums in another order may round a scale to the next float16; a level has up to seven of it."""
    tolerance = 2**-10 * result.weight.scales.max() * 7
    torch.testing.assert_close(result.dequantize(), other.dequantize(), rtol=0, atol=float(tolerance))


def fix_grid(monkeypatch, *, scale=0.4, column_scale=None, group_size=8):
    """Makes every group take one 3-bit affine grid, whatever its weights. Groups are asked for in order."""
    position = 0

    def fixed(columns, **options):
        nonlocal position
        rows = columns.shape[1]
        mine = None if column_scale is None else column_scale[position : position + len(columns)]
        position += len(columns)
        return GroupGrid(torch.full((1, rows), scale), torch.full((rows,), 4.0), mine, 3, "affine")

    monkeypatch.setattr(rounding, "fit_group", fixed)
    return {"bits": 3, "group_size": group_size, **PLAIN}


def surgeon(weight, hessian, asymmetry, alpha, scale=0.4, zero=4, top=7):
    """
    Optimal brain surgeon, one column after another, float64: `H⁻¹` of the columns left is inverted anew each time, and
    what column i deviates by in the full model is fitted by the columns after it.
    """
    weight, codes = weight.double().clone(), []
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:])
        code = (weight[:, i] / scale + zero).round().clamp(0, top)
        error = (weight[:, i] - scale * (code - zero)) / inverse[0, 0]
        update = -torch.outer(error, inverse[0, 1:])
        if asymmetry is not None and i + 1 < len(hessian):
            shift = torch.linalg.solve(hessian[i + 1 :, i + 1 :], asymmetry[i, i + 1 :])
            update += alpha * torch.outer(weight[:, i], shift)
        weight[:, i + 1 :] += update
        codes.append(code)
    return torch.stack(codes, dim=1).to(torch.uint8)


class TestToNearest:
    @pytest.mark.parametrize("grid, bits", FORMATS)
    @pytest.mark.parametrize("column_scale", [False, True])
    def test_no_level_is_nearer(self, grid, bits, column_scale, generator):
        weight = random_weight(generator)
        result = round_weight(weight, bits=bits, group_size=8, grid=grid, column_scale=column_scale, **FAST)
        assert (result.column_scale is not None) == column_scale
        dense = result.dequantize()
        for code in range(2**bits):
            codes = torch.full_like(result.weight.codes, code)
            level = rounding.RoundingResult(
                rounding.QuantizedWeight(**{**vars(result.weight), "codes": codes}), result.column_scale
            ).dequantize()
            assert ((weight - dense).abs() <= (weight - level).abs() + 4 * EPS * weight.abs().max()).all()

    @pytest.mark.parametrize("grid, bits", FORMATS)
    @pytest.mark.parametrize("column_scale", [False, True])
    def test_is_the_sweep_without_correlations(self, grid, bits, column_scale, generator):
        weight = random_weight(generator)
        options = {"bits": bits, "group_size": 8, "grid": grid, "column_scale": column_scale, **FAST}
        nearest = round_weight(weight, **options)
        swept = round_weight(weight, torch.eye(20), hessian_weights=False, **options)
        assert torch.equal(nearest.weight.codes, swept.weight.codes)
        assert torch.equal(nearest.dequantize(), swept.dequantize())

    def test_stored_groups_follow_the_columns(self, generator):
        weight = random_weight(generator)
        result = round_weight(weight, bits=2, group_size=8)
        for group, columns in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
            alone = round_weight(weight[:, columns], bits=2, group_size=8)
            assert torch.equal(result.weight.codes[:, columns], alone.weight.codes)
            assert torch.equal(result.weight.scales[:, :, group], alone.weight.scales[:, :, 0])
            assert torch.equal(result.weight.zero_points[:, group], alone.weight.zero_points[:, 0])


class TestGptq:
    def test_is_optimal_brain_surgeon(self, generator, monkeypatch):
        for _ in range(5):
            weight, (_, _, hessian, _) = random_weight(generator), calibrate(generator)
            options = fix_grid(monkeypatch)
            result = round_weight(weight, hessian, damp_percent=0.02, **options)
            assert torch.equal(result.weight.codes, surgeon(weight, damp(hessian.double(), 0.02), None, 0))

    @pytest.mark.parametrize("grid, bits", FORMATS)
    @pytest.mark.parametrize("column_scale", [False, True])
    def test_errors_add_up_to_the_loss(self, grid, bits, column_scale, generator, monkeypatch):
        weight, (_, _, hessian, _) = random_weight(generator), calibrate(generator)
        errors, quantize = [], GroupGrid.quantize

        def record(self, column, column_scale=None):
            codes, values = quantize(self, column, column_scale)
            errors.append(column - values)
            return codes, values

        monkeypatch.setattr(GroupGrid, "quantize", record)
        options = {"bits": bits, "group_size": 8, "grid": grid, "column_scale": column_scale, "act_group_aware": False}
        result = round_weight(weight, hessian, **options, **FAST)
        pivots = inverse_factor(hessian, 0.01).diagonal()
        total = (torch.stack(errors, dim=1) / pivots).double().square().sum()
        # each of 20 updates rounds its weights once; the errors that they leave are tens of times smaller
        assert float(total) == pytest.approx(loss(weight, result, damp(hessian, 0.01)), rel=20 * 50 * EPS)

    @pytest.mark.parametrize("grid, bits", FORMATS)
    def test_loses_less_than_to_nearest(self, grid, bits, generator):
        ratios = []
        for _ in range(6):
            weight, (_, _, hessian, _) = random_weight(generator, rows=30), calibrate(generator)
            nearest = round_weight(weight, bits=bits, group_size=8, grid=grid, iterations=3)
            swept = round_weight(weight, hessian, bits=bits, group_size=8, grid=grid, iterations=3)
            ratios.append(loss(weight, swept, hessian) / loss(weight, nearest, hessian))
        assert max(ratios) < 1

    def test_dead_columns_are_zero_and_touch_no_other(self, generator):
        quantized, full, *_ = calibrate(generator)
        quantized[:, [3, 17]] = 0
        hessian, asymmetry = quantized.T @ quantized / 30, (full - quantized).T @ quantized / 30
        asymmetry[[3, 17]] = 0
        weight = random_weight(generator)
        options = {"bits": 3, "group_size": 8, "damp_percent": 0.0}
        result = round_weight(weight, hessian, asymmetry, **options)
        assert (result.dequantize()[:, [3, 17]] == 0).all()
        other = weight.clone()
        other[:, [3, 17]] = 1e3
        assert torch.equal(round_weight(other, hessian, asymmetry, **options).dequantize(), result.dequantize())

    def test_hessian_of_no_tokens(self, generator):
        result = round_weight(random_weight(generator), torch.zeros(20, 20), bits=2, group_size=8)
        assert (result.dequantize() == 0).all()


class TestGptaq:
    @pytest.mark.parametrize("alpha", [0.25, 1.0])
    def test_shift_is_a_least_squares(self, alpha, generator, monkeypatch):
        for _ in range(5):
            weight, (_, _, hessian, asymmetry) = random_weight(generator), calibrate(generator)
            options = fix_grid(monkeypatch)
            result = round_weight(weight, hessian, asymmetry, alpha=alpha, **options)
            assert torch.equal(
                result.weight.codes, surgeon(weight, damp(hessian.double(), 0.01), asymmetry.double(), alpha)
            )

    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("zero", ["asymmetry", "alpha"])
    def test_without_asymmetry_is_gptq(self, grid, zero, generator):
        weight, (_, _, hessian, asymmetry) = random_weight(generator), calibrate(generator)
        options = {"bits": 2, "group_size": 8, "grid": grid, **FAST}
        plain = round_weight(weight, hessian, **options)
        if zero == "alpha":
            other = round_weight(weight, hessian, asymmetry, alpha=0.0, **options)
        else:
            other = round_weight(weight, hessian, torch.zeros(20, 20), **options)
        assert torch.equal(plain.weight.codes, other.weight.codes)
        assert torch.equal(plain.dequantize(), other.dequantize())

    @pytest.mark.parametrize("bits", [2, 3])
    def test_comes_closer_to_the_full_model(self, bits, generator):
        gains = []
        for _ in range(20):
            weight = random_weight(generator, rows=30)
            quantized, full, hessian, asymmetry = calibrate(generator, tokens=200)
            errors = []
            for arguments in ((hessian,), (hessian, asymmetry)):
                dense = round_weight(weight, *arguments, bits=bits, group_size=8, iterations=3).dequantize()
                errors.append(float((quantized @ dense.T - full @ weight.T).square().sum()))
            gains.append(1 - errors[1] / errors[0])
        gains = torch.tensor(gains)
        assert gains.mean() > 4 * gains.std() / len(gains) ** 0.5


class TestSweep:
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("column_scale", [False, True])
    def test_batches_change_nothing(self, grid, column_scale, generator, monkeypatch):
        weight, (_, _, hessian, asymmetry) = random_weight(generator), calibrate(generator)
        results = []
        for columns in (3, 1000):
            monkeypatch.setattr(rounding, "LAZY_COLUMNS", columns)
            options = {"bits": 2, "group_size": 8, "grid": grid, "column_scale": column_scale, **FAST}
            results.append(round_weight(weight, hessian, asymmetry, **options))
        assert torch.equal(results[0].weight.codes, results[1].weight.codes)
        assert_same_up_to_half_precision(*results)

    def test_order_is_by_group_and_undone(self, generator):
        weight, (_, _, hessian, asymmetry) = random_weight(generator, columns=24), calibrate(generator, columns=24)
        diagonal = hessian.diagonal()
        groups = [sorted(range(i, i + 8), key=lambda j: -diagonal[j]) for i in (0, 8, 16)]
        order = torch.tensor(sum(sorted(groups, key=lambda group: -diagonal[group[0]]), []))
        assert order.tolist() != list(range(24))
        options = {"bits": 2, "group_size": 8, "column_scale": True}
        result = round_weight(weight, hessian, asymmetry, **options)
        permuted = round_weight(
            weight[:, order],
            hessian[order][:, order],
            asymmetry[order][:, order],
            act_group_aware=False,
            **options,
        )
        assert torch.equal(result.weight.codes[:, order], permuted.weight.codes)
        assert torch.equal(result.column_scale[order], permuted.column_scale)
        assert torch.equal(result.dequantize()[:, order], permuted.dequantize())
        assert torch.equal(result.weight.scales[:, :, order[::8] // 8], permuted.weight.scales)

    @pytest.mark.parametrize("first", [0, 2])
    def test_order_keeps_a_short_last_group(self, first, generator):
        weight, variances = random_weight(generator), torch.rand(20, generator=generator) + 0.1
        variances[first * 8 + 1] = 5.0
        options = {"bits": 3, "group_size": 8, "column_scale": True}
        # without correlations the order cannot matter
        results = [round_weight(weight, variances.diag(), act_group_aware=flag, **options) for flag in (True, False)]
        assert torch.equal(results[0].weight.codes, results[1].weight.codes)
        assert_same_up_to_half_precision(*results)

    @pytest.mark.parametrize("exact", [True, False])
    def test_column_scale_may_be_folded_into_the_inputs(self, exact, generator, monkeypatch):
        weight, (_, _, hessian, asymmetry) = random_weight(generator), calibrate(generator)
        hessian = damp(hessian, 0.01)  # before it is scaled, so that both see the same
        scale = torch.randn(20, generator=generator).mul(0.3).exp()
        if exact:
            scale = scale.log2().round().mul(2).exp2()
        options = fix_grid(monkeypatch, column_scale=scale)
        inside = round_weight(weight, hessian, asymmetry, damp_percent=0.0, **options)
        options = fix_grid(monkeypatch)
        folded = round_weight(
            weight / scale,
            hessian * scale * scale[:, None],
            asymmetry * scale * scale[:, None],
            damp_percent=0.0,
            **options,
        )
        assert len(inside.weight.codes.unique()) == 8
        assert torch.equal(inside.weight.codes, folded.weight.codes)

    def test_changes_no_argument(self, generator):
        _, _, hessian, asymmetry = calibrate(generator)
        hessian[3] = hessian[:, 3] = 0
        for dtype in (torch.float32, torch.bfloat16):
            weight = random_weight(generator).to(dtype)
            arguments = weight, hessian, asymmetry
            copies = [argument.clone() for argument in arguments]
            first = round_weight(*arguments, bits=2, group_size=8, column_scale=True, **FAST)
            assert all(torch.equal(*pair) for pair in zip(arguments, copies, strict=True))
            again = round_weight(*arguments, bits=2, group_size=8, column_scale=True, **FAST)
            assert torch.equal(first.dequantize(), again.dequantize())

    @pytest.mark.parametrize("shape, group_size", [((1, 1), 8), ((1, 20), 64), ((3, 9), 1), ((5, 1), 1)])
    @pytest.mark.parametrize("grid", GRIDS)
    def test_odd_shapes(self, shape, group_size, grid, generator):
        weight = random_weight(generator, *shape)
        arguments = calibrate(generator, columns=shape[1])[2:]
        for given in ((), arguments[:1], arguments):
            options = {"bits": 2, "group_size": group_size, "grid": grid, "column_scale": True, **FAST}
            result = round_weight(weight, *given, **options)
            assert result.dequantize().shape == shape and result.dequantize().isfinite().all()
            assert result.weight.scales.shape[1:] == (shape[0], -(-shape[1] // group_size))
            if group_size == 1 and not given:  # one weight, and a level that can be anywhere
                torch.testing.assert_close(result.dequantize(), weight, rtol=2**-10, atol=0)


class TestRoundingResult:
    def test_column_scale_may_be_absorbed(self, generator):
        weight, (_, _, hessian, _) = random_weight(generator), calibrate(generator)
        up = torch.randn(20, 11, generator=generator)
        inputs, gate = torch.randn(11, 50, generator=generator), torch.randn(20, 50, generator=generator)
        result = round_weight(weight, hessian, bits=2, group_size=8, column_scale=True)
        explicit = result.dequantize() @ (gate * (up @ inputs))
        absorbed = result.weight.dequantize() @ (gate * (result.column_scale[:, None] * up @ inputs))
        # two sums and three products, of terms none larger than the product of the magnitudes
        largest = result.dequantize().abs() @ (gate.abs() * (up.abs() @ inputs.abs()))
        assert ((explicit - absorbed).abs() <= (20 + 11 + 3) * EPS * largest).all()


class TestDefaults:
    """What is left out is what the docstring says, and every option has an effect on this weight."""

    OPTIONS = {
        "grid": ("affine", "midrise"),
        "alpha": (0.25, 0.26),
        "damp_percent": (0.01, 0.011),
        "act_group_aware": (True, False),
        "hessian_weights": (True, False),
        "column_scale": (False, True),
        "iterations": (15, 14),
        "clip": (True, False),
        "scale_dtype": (torch.float16, torch.bfloat16),
    }

    @pytest.fixture
    def arguments(self, generator):
        weight, (_, _, hessian, asymmetry) = random_weight(generator, rows=40), calibrate(generator)
        return weight, hessian, asymmetry

    @pytest.mark.parametrize("name", OPTIONS)
    def test_is_that_of_the_docstring(self, name, arguments):
        options = {"bits": 3, "group_size": 8}
        if name == "iterations":
            options["column_scale"] = True  # without which the fit has converged before the fourteenth
        default, other = self.OPTIONS[name]
        implicit = round_weight(*arguments, **options).dequantize()
        assert torch.equal(implicit, round_weight(*arguments, **options, **{name: default}).dequantize())
        assert not torch.equal(implicit, round_weight(*arguments, **options, **{name: other}).dequantize())


class TestNaive:
    """The whole of it against float64: order, damping, sweep, shift, and the grids that the groups were given."""

    @pytest.mark.parametrize("alpha", [0.0, 0.5])
    def test_two_bits_with_and_without_asymmetry(self, alpha, generator, monkeypatch):
        grids, fit = [], rounding.fit_group

        def record(columns, **options):
            grids.append(fit(columns, **options))
            return grids[-1]

        monkeypatch.setattr(rounding, "fit_group", record)
        weight, (_, _, hessian, asymmetry) = random_weight(generator), calibrate(generator)
        hessian[4] = hessian[:, 4] = asymmetry[4] = asymmetry[:, 4] = 0  # a column that is never used
        result = round_weight(
            weight, hessian, asymmetry, bits=2, group_size=8, alpha=alpha, damp_percent=0.05, iterations=2
        )
        diagonal = hessian.diagonal().tolist()
        groups = [sorted(range(start, min(start + 8, 20)), key=lambda j: -diagonal[j]) for start in (0, 8, 16)]
        groups.sort(key=lambda group: -diagonal[group[0]])
        order = sum(groups, [])
        rest = weight.double()[:, order]
        rest[:, order.index(4)] = 0
        damped = damp(hessian.double(), 0.05)[order][:, order]
        moved = alpha * asymmetry.double()[order][:, order]
        position = 0
        for group, grid in zip(groups, grids, strict=True):
            scales, zeros = grid.scales[0].double(), grid.zero_points.double()
            assert torch.equal(result.weight.scales[0, :, min(group) // 8].double(), scales)
            assert torch.equal(result.weight.zero_points[:, min(group) // 8].double(), zeros)
            for column in group:
                code = (rest[:, position] / scales + zeros).round().clamp(0, 3)
                assert torch.equal(result.weight.codes[:, column].double(), code)
                error = rest[:, position] - scales * (code - zeros)
                inverse = torch.linalg.inv(damped[position:, position:])
                update = -torch.outer(error / inverse[0, 0], inverse[0, 1:])
                if position + 1 < len(order):
                    after = damped[position + 1 :, position + 1 :]
                    update += torch.outer(
                        rest[:, position], torch.linalg.solve(after, moved[position, position + 1 :])
                    )
                rest[:, position + 1 :] += update
                position += 1


class TestMemory:
    @pytest.mark.parametrize("rows", [40, 320])
    def test_two_matrices_of_the_size_of_h_beside_the_weight(self, rows, generator):
        columns, group_size = 512, 32
        _, _, hessian, asymmetry = calibrate(generator, columns=columns, tokens=2 * columns)
        weight = random_weight(generator, rows=rows, columns=columns)
        peak = peak_bytes(lambda: round_weight(weight, hessian, asymmetry, bits=2, group_size=group_size, **FAST))
        # U, and H until it is factored, D from then on; the weight, and its codes, a byte each.
        matrices = 2 * columns * columns + 1.25 * rows * columns
        # Of a lazy block: spread, shift, and two products on the way to it; of a group: errors and a dozen like them.
        slices = 4 * rounding.LAZY_COLUMNS * columns + 14 * group_size * rows
        assert peak <= 4 * (matrices + slices)

    def test_inverse_factor_takes_two_matrices(self, generator):
        hessian = calibrate(generator, columns=256)[2]
        order = torch.randperm(256, generator=generator)
        for given in (None, order):
            peak = peak_bytes(lambda given=given: inverse_factor(hessian, 0.01, given))
            assert peak <= 4 * (2 * 256 * 256 + 16 * 256)  # and a few vectors, of up to 8 bytes a number


class TestInverseFactor:
    def test_closed_form(self):
        assert torch.equal(inverse_factor(torch.tensor([[4.0]]), 0.0), torch.tensor([[0.5]]))
        assert torch.equal(inverse_factor(torch.tensor([[2.0]]), 1.0), torch.tensor([[0.5]]))
        # H = V Vᵀ with V = [[1, 2], [0, 4]], and U = V⁻¹
        factor = inverse_factor(torch.tensor([[5.0, 8.0], [8.0, 16.0]]), 0.0)
        assert torch.equal(factor, torch.tensor([[1.0, -0.5], [0.0, 0.25]]))

    def test_column_that_is_never_used_has_a_pivot_of_one(self):
        factor = inverse_factor(torch.diag(torch.tensor([0.0, 4.0])), 0.0)
        assert torch.equal(factor, torch.diag(torch.tensor([1.0, 0.5])))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_keeps_the_dtype(self, dtype, generator):
        assert inverse_factor(calibrate(generator)[2].to(dtype), 0.01).dtype == dtype

    def test_factors_the_inverse(self, generator):
        _, _, hessian, _ = calibrate(generator)
        copy = hessian.clone()
        factor = inverse_factor(hessian, 0.05)
        assert torch.equal(hessian, copy)
        assert torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()
        product = factor.double() @ damp(hessian.double(), 0.05) @ factor.double().T
        condition = float(torch.linalg.cond(damp(hessian.double(), 0.05)))
        torch.testing.assert_close(product, torch.eye(20).double(), rtol=0, atol=20 * EPS * condition)

    def test_order_is_that_of_the_columns(self, generator):
        _, _, hessian, _ = calibrate(generator)
        order = torch.randperm(20, generator=generator)
        assert torch.equal(inverse_factor(hessian, 0.05, order), inverse_factor(hessian[order][:, order], 0.05))

    def test_says_what_to_do_when_there_is_none(self, generator):
        hessian = torch.ones(5, 5) - 2 * torch.eye(5)
        with pytest.raises(ValueError, match=r"5 columns .* `damp_percent=0.01`. Raise it, or calibrate on more"):
            inverse_factor(hessian, 0.01)
