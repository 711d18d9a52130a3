"""
One block, against a naive block in float64: each linear is rounded with the H and D of what it reads once the linears
before it are rounded, the mean shift of DAC included; and the packed block computes what the naive one does with the
rounded weights, the explicit shift and the explicit column scales. The block is a toy, so nothing but torch is needed.
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_gopd.d2quant import stages
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.exact_transforms import ScalePair
from trl_gopd.d2quant.grids import QuantizedWeight
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.rounding import RoundingResult, round_weight
from trl_gopd.d2quant.stages import (
    RoundedLinears,
    absorb_column_scale,
    linears_to_quantize,
    output_error,
    quantize_block,
    stage_statistics,
)
from trl_gopd.d2quant.streams import BlockCalls, Streams
from trl_gopd.d2quant.topology import Block, Stage


EPS = torch.finfo(torch.float32).eps
HIDDEN, INNER, TOKENS, WINDOWS = 6, 10, 8, 3
# The longest path: five sums of at most ten terms, functions between them, and a sum over 24 tokens.
ROUNDINGS = 5 * 10 + 10 + TOKENS * WINDOWS
STAGES = (("q", "k"), ("o",), ("gate", "up"), ("down",))
PAIRS = (ScalePair("k", "o", slice(0, HIDDEN)), ScalePair("up", "down", slice(0, INNER)))


class ToyBlock(nn.Module):
    """A block with the parts that matter: shared inputs, a residual stream, a norm before a gated MLP."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN)
        self.o = nn.Linear(HIDDEN, HIDDEN)
        self.gate, self.up = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = F.rms_norm(hidden, (HIDDEN,))
        hidden = hidden + self.o(self.q(x).tanh() * self.k(x))
        y = F.rms_norm(hidden, (HIDDEN,))
        return hidden + self.down(F.silu(self.gate(y)) * self.up(y))


def naive_block(hidden: Tensor, weights: dict, biases: dict, shift: Tensor | float = 0.0) -> dict[str, Tensor]:
    """What each stage reads, by its first linear, and the `output`, in float64. `shift` is added behind the norm."""

    def apply(name, x):
        return x @ weights[name].T + biases.get(name, 0.0)

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()  # `rms_norm` takes the epsilon of its input

    inputs, hidden = {}, hidden.double()
    inputs["q"] = norm(hidden)
    inputs["o"] = torch.tanh(apply("q", inputs["q"])) * apply("k", inputs["q"])
    hidden = hidden + apply("o", inputs["o"])
    inputs["gate"] = norm(hidden) + shift
    gate = apply("gate", inputs["gate"])
    inputs["down"] = gate / (1 + torch.exp(-gate)) * apply("up", inputs["gate"])
    return inputs | {"output": hidden + apply("down", inputs["down"])}


@dataclass
class Run:
    """A toy block quantized, all that went into it, and each call of `round_weight` that a linear was rounded with."""

    block: Block
    config: D2QuantConfig
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    full: list[Tensor]
    quantized: list[Tensor]
    streams: Streams
    report: stages.BlockReport
    calls: dict[str, tuple[tuple, dict]] = field(default_factory=dict)
    results: dict[str, RoundingResult] = field(default_factory=dict)

    def packed(self, name: str) -> D2QuantLinear:
        module = self.block.module.get_submodule(name)
        assert isinstance(module, D2QuantLinear)
        return module

    def dense(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Weights with those of `names` replaced by what they were rounded to, column scales included."""
        rounded = {name: self.results[name].dequantize().double() for name in names if name in self.results}
        return self.weights | rounded

    def shift(self) -> Tensor:
        """μ of DAC: the mean over all tokens by which the norm's output moves once attention is rounded."""
        deviation = torch.cat([self.deviations(hidden) for hidden in self.quantized])
        return deviation.mean(0)

    def deviations(self, hidden: Tensor) -> Tensor:
        before = naive_block(hidden, self.weights, self.biases)["gate"]
        return (before - naive_block(hidden, self.dense(("q", "k", "o")), self.biases)["gate"])[0]


def config(**settings) -> D2QuantConfig:
    fast = {"iterations": 1, "clip": False}
    return D2QuantConfig(**{"bits": 3, "group_size": 4, "scale_dtype": "float32", "alpha": 0.5} | fast | settings)


def toy(generator, **fields) -> Block:
    module = ToyBlock()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 0.2, generator=generator)
    described = {
        "name": "layers.1",
        "module": module,
        "stages": tuple(Stage(linears) for linears in STAGES),
        "routed": frozenset(),
        "scale_pairs": PAIRS,
        "scale_reasons": {},
        "attention_norm": None,
        "mlp_norm": None,
        "shift_linears": ("gate", "up"),
        "shift_reason": None,
        "norms": (),
        "norm_readers": {},
        "residual_writers": (),
        "full_precision": {},
    }
    return Block(**described | fields)


def normal(generator, *shape) -> Tensor:
    return torch.randn(*shape, generator=generator)


@pytest.fixture
def quantize(generator, monkeypatch):
    """Returns a function that quantizes a toy block with the settings given, and its [`Run`]."""

    def run(block: Block | None = None, **settings) -> Run:
        block = toy(generator) if block is None else block
        full = [normal(generator, 1, TOKENS, HIDDEN) for _ in range(WINDOWS)]
        quantized = [hidden + 0.3 * normal(generator, 1, TOKENS, HIDDEN) for hidden in full]
        dense = copy.deepcopy(block.module)
        weights = {name.removesuffix(".weight"): p.detach().double() for name, p in dense.named_parameters()}
        biases = {n.removesuffix(".bias"): p.detach().double() for n, p in dense.named_parameters() if "bias" in n}
        weights = {name: weight for name, weight in weights.items() if ".bias" not in name}
        streams = Streams(list(full), list(full), list(quantized))
        recorded = []

        def record(weight, *args, **kwargs):
            recorded.append(((weight.detach().clone(), *args), kwargs, round_weight(weight, *args, **kwargs)))
            return recorded[-1][2]

        monkeypatch.setattr(stages, "round_weight", record)
        calls = BlockCalls(None, block.module, {block.name: ((), {})})
        with torch.no_grad():
            report = quantize_block(block, calls, streams, config(**settings))
        names = [entry.name.removeprefix("layers.1.") for entry in report.linears]
        own = [call for call in recorded if len(call[0]) == 3]  # others round to nearest, for the report
        rounded = dict(zip(names, own, strict=True))
        return Run(
            block,
            config(**settings),
            weights,
            biases,
            full,
            quantized,
            streams,
            report,
            {name: call[:2] for name, call in rounded.items()},
            {name: call[2] for name, call in rounded.items()},
        )

    return run


def assert_rounds_to(actual: Tensor, expected: Tensor, magnitude: Tensor | None = None) -> None:
    magnitude = expected if magnitude is None else magnitude
    atol = ROUNDINGS * EPS * float(magnitude.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def assert_statistics(run: Run, *, shifted: bool) -> None:
    """H and D of each linear are those of its inputs behind the linears that were rounded before it."""
    shift = run.shift() if shifted else 0.0
    before: tuple[str, ...] = ()
    for names in STAGES:
        biases = dict(run.biases)
        if shifted and names == ("down",):  # `shift` stands for the biases of gate and up
            assert {"gate", "up"} <= set(before)
        inputs, full = [], []
        for hidden, other in zip(run.quantized, run.full, strict=True):
            inputs.append(naive_block(hidden, run.dense(before), biases, shift)[names[0]][0])
            full.append(naive_block(other, run.weights, biases)[names[0]][0])
        x, x_full = torch.cat(inputs), torch.cat(full)
        hessian = sum(2 / len(x) * torch.outer(row, row) for row in x)
        asymmetry = sum(2 / len(x) * torch.outer(other - row, row) for row, other in zip(x, x_full, strict=True))
        for name in names:
            if name in run.calls:
                weight, given_hessian, given_asymmetry = run.calls[name][0]
                # a deviation as large as this one cannot hide behind the tolerance
                assert asymmetry.abs().max() > 0.05 * hessian.abs().max()
                assert_rounds_to(given_hessian, hessian)
                if run.config.rounding == "gptaq":
                    assert_rounds_to(given_asymmetry, asymmetry, hessian)
                else:
                    assert given_asymmetry is None
        before += names


class TestStatistics:
    """H and D of whole numbers are exact: n is a power of two."""

    def test_closed_form(self):
        x = [torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])]
        full = [torch.tensor([[2.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 1.0]])]
        hessian, asymmetry = stage_statistics(x, full)
        # Σ x xᵀ = [[1+0+9+1, 2+0+0+1], [·, 4+1+0+1]]; Σ (x̃ − x) xᵀ of the rows (1,0)·(1,2), (0,2)·(0,−1), (0,4)·(3,0)
        assert torch.equal(hessian, torch.tensor([[11.0, 3.0], [3.0, 6.0]]) * 2 / 4)
        assert torch.equal(asymmetry, torch.tensor([[1.0, 2.0], [12.0, -2.0]]) * 2 / 4)

    def test_shift_is_added_to_what_the_quantized_model_reads(self):
        x, full = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[2.0, 2.0], [0.0, 1.0]])
        shift = torch.tensor([1.0, -3.0])
        shifted = stage_statistics([x + shift], [full])
        assert all(map(torch.equal, stage_statistics([x], [full], shift), shifted))
        assert not torch.equal(shifted[0], stage_statistics([x], [full])[0])

    def test_windows_without_tokens_are_left_out(self):
        x, full = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[2.0, 2.0], [0.0, 1.0]])
        expected = stage_statistics([x], [full])
        assert all(map(torch.equal, stage_statistics([None, x, None], [full, full, full]), expected))
        assert stage_statistics([None, None], [full, full]) == (None, None)

    def test_tokens_that_differ_in_number_count_in_the_hessian_alone(self):
        x, full = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[2.0, 2.0], [0.0, 1.0]])
        hessian, asymmetry = stage_statistics([x, x, x[:1], x[:1]], [full, full[:1], None, full[:1]])
        rows = torch.cat([x, x, x[:1], x[:1]])
        assert torch.equal(hessian, rows.T @ rows * (2 / 6))
        moved = (full - x).T @ x + (full[:1] - x[:1]).T @ x[:1]
        assert torch.equal(asymmetry, moved * (2 / 6))
        assert stage_statistics([x], [None])[1] is None

    def test_windows_of_both_models_must_match(self):
        with pytest.raises(ValueError, match="zip"):
            stage_statistics([torch.ones(1, 2)] * 2, [torch.ones(1, 2)])

    def test_low_precision_is_summed_in_float32(self):
        x = torch.full((256, 1), 1.0, dtype=torch.bfloat16)
        full = torch.full((256, 1), 1.0 + 2**-7, dtype=torch.bfloat16)
        x[0] = 1.0 + 2**-7  # 2⁻⁷ of one row in 256 is lost by a sum in bfloat16
        hessian, asymmetry = stage_statistics([x], [full], torch.tensor([2.0**-12]))
        rows = x.double() + 2.0**-12
        assert hessian.dtype == asymmetry.dtype == torch.float32
        rtol = 2 * len(x) * EPS
        torch.testing.assert_close(hessian.double(), rows.T @ rows / 128, rtol=rtol, atol=0)
        torch.testing.assert_close(asymmetry.double(), (full.double() - rows).T @ rows / 128, rtol=rtol, atol=0)

    def test_changes_no_argument(self, generator):
        x, full, shift = normal(generator, 5, 3), normal(generator, 5, 3), normal(generator, 3)
        copies = x.clone(), full.clone(), shift.clone()
        stage_statistics([x, x], [full, full], shift)
        assert all(map(torch.equal, (x, full, shift), copies))


class TestLinearsToQuantize:
    def test_stages_keep_their_order(self, generator):
        assert linears_to_quantize(toy(generator), config()) == list(STAGES)

    def test_excluded_linears_and_empty_stages_are_left_out(self, generator):
        excluded = config(modules_to_not_convert=["layers.1.q", "o", "layers.0.down"])
        assert linears_to_quantize(toy(generator), excluded) == [("k",), ("gate", "up"), ("down",)]


class TestOutputError:
    def test_is_the_share_of_energy_that_is_lost(self, generator):
        weight, x = normal(generator, 5, 7).bfloat16(), normal(generator, 40, 7)
        result = round_weight(weight, bits=2, group_size=7, column_scale=True)
        delta = result.dequantize().double() - weight.double()
        expected = (x.double() @ delta.T).square().sum() / (x.double() @ weight.double().T).square().sum()
        assert output_error(weight, result.dequantize(), x.T @ x) == pytest.approx(float(expected), rel=100 * EPS)

    def test_without_energy(self):
        assert output_error(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(3, 3)) == 0.0
        assert output_error(torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)) == 0.0

    def test_small_energy_counts(self):
        # all of the energy, 0.02 and so less than 1, is lost
        assert output_error(torch.full((1, 2), 0.1), torch.zeros(1, 2), torch.eye(2)) == pytest.approx(1.0)


class TestQuantizeBlock:
    @pytest.mark.parametrize("rounding", ["gptaq", "gptq"])
    @pytest.mark.parametrize("mean_shift", [False, True])
    @pytest.mark.parametrize("column_scale", [False, True])
    def test_statistics_are_those_of_a_naive_block(self, quantize, rounding, mean_shift, column_scale):
        run = quantize(rounding=rounding, mean_shift=mean_shift, column_scale=column_scale)
        assert_statistics(run, shifted=mean_shift)

    @pytest.mark.parametrize("column_scale", [False, True])
    def test_shift_is_taken_from_all_tokens_and_folded_into_biases(self, quantize, column_scale):
        run = quantize(mean_shift=True, column_scale=column_scale, bits=2)
        shift = run.shift()
        assert 0.02 < shift.abs().max() < 10
        gate, up = (run.results[name].dequantize().double() for name in ("gate", "up"))
        scale = run.results["down"].column_scale.double() if column_scale else 1.0
        assert_rounds_to(run.packed("gate").bias, gate @ shift)
        assert_rounds_to(run.packed("up").bias, (run.biases["up"] + up @ shift) * scale)
        assert run.packed("q").bias is None and run.packed("down").bias is None
        assert_rounds_to(run.packed("o").bias, run.biases["o"])
        moved = torch.cat([run.deviations(hidden) for hidden in run.quantized])
        removed = 1 - (moved - shift).square().sum() / moved.square().sum()
        assert 0.01 < removed < 1
        assert run.report.shift_explained == pytest.approx(float(removed), rel=1e3 * EPS)

    @pytest.mark.parametrize("settings", [{"shift_gate": 0.1}, {"shift_shrink": True}])
    def test_shift_may_be_gated_or_shrunk(self, quantize, settings):
        run = quantize(mean_shift=True, bits=2, **settings)
        moved = torch.cat([run.deviations(hidden) for hidden in run.quantized])
        mean, variance = moved.mean(0), moved.var(0, correction=0)
        if "shift_gate" in settings:
            factor = (mean**2 / (mean**2 + variance) >= 0.1).double()
        else:
            factor = (1 - variance / len(moved) / mean**2).clamp(min=0)
        assert 0 < factor.mean() < 1
        # 1 − noise loses as many digits as it has zeros behind the comma, and there are less than three
        expected = run.results["gate"].dequantize().double() @ (factor * mean)
        torch.testing.assert_close(run.packed("gate").bias.double(), expected, rtol=0, atol=1e3 * ROUNDINGS * EPS)
        removed = 1 - (moved - factor * mean).square().sum() / moved.square().sum()
        assert run.report.shift_explained == pytest.approx(float(removed), rel=1e3 * ROUNDINGS * EPS)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"column_scale": True, "mean_shift": True},
            {"rounding": "rtn", "column_scale": True, "mean_shift": True},
        ],
    )
    def test_streams_move_behind_the_block(self, quantize, settings):
        run = quantize(**settings)
        shift = run.shift() if settings.get("mean_shift") else 0.0
        for index in range(WINDOWS):
            full = naive_block(run.full[index], run.weights, run.biases)["output"]
            rounded = naive_block(run.quantized[index], run.dense(sum(STAGES, ())), run.biases, shift)["output"]
            assert_rounds_to(run.streams.full[index], full)
            assert_rounds_to(run.streams.quantized[index], rounded)
            assert torch.equal(run.streams.start[index], run.full[index])
            assert run.streams.full[index].shape == (1, TOKENS, HIDDEN)

    def test_packed_linears_hold_the_codes(self, quantize):
        run = quantize(column_scale=True)
        for name, result in run.results.items():
            assert torch.equal(run.packed(name).unpack().codes, result.weight.codes)
            assert run.packed(name).input_scale is None  # it has been absorbed
        assert run.results.keys() == run.weights.keys()

    @pytest.mark.parametrize("mean_shift", [False, True])
    def test_column_scale_without_a_producer_scales_the_inputs(self, quantize, generator, mean_shift):
        block = toy(generator, scale_pairs=(), scale_reasons={"o": "reason", "down": "reason"})
        run = quantize(block, column_scale=True, mean_shift=mean_shift)
        assert_statistics(run, shifted=mean_shift)
        for name in ("o", "down"):
            assert run.results[name].column_scale.std() > 0.05
            assert torch.equal(run.packed(name).input_scale, run.results[name].column_scale)
        assert run.packed("up").input_scale is None
        shift = run.shift() if mean_shift else 0.0
        dense = run.dense(sum(STAGES, ()))
        for hidden, after in zip(run.quantized, run.streams.quantized, strict=True):
            assert_rounds_to(after, naive_block(hidden, dense, run.biases, shift)["output"])

    def test_column_scale_of_a_dense_producer_scales_its_rows(self, quantize):
        run = quantize(column_scale=True, modules_to_not_convert=["up", "k"])
        assert_statistics(run, shifted=False)
        for producer, consumer in (("up", "down"), ("k", "o")):
            scale = run.results[consumer].column_scale.double()
            dense = run.block.linear(producer)
            assert_rounds_to(dense.weight, run.weights[producer] * scale[:, None])
            assert_rounds_to(dense.bias, run.biases[producer] * scale)

    @pytest.mark.parametrize("settings", [{}, {"mean_shift": True, "modules_to_not_convert": ["gate"]}])
    def test_no_shift_unless_all_that_read_the_norm_can_have_it(self, quantize, settings):
        run = quantize(**settings)
        assert run.report.shift_explained is None
        assert torch.equal(run.packed("up").bias.double(), run.biases["up"])
        if settings:
            assert run.block.linear("gate").bias is None
            assert_statistics(run, shifted=False)

    def test_block_without_a_site_of_the_shift(self, quantize, generator):
        run = quantize(toy(generator, shift_linears=()), mean_shift=True)
        assert run.report.shift_explained is None
        assert run.packed("gate").bias is None
        assert_statistics(run, shifted=False)

    def test_shift_of_attention_without_an_error_is_zero(self, quantize, generator):
        block = toy(generator)
        for name in ("q", "k", "o"):
            block.linear(name).weight.data.zero_()
        run = quantize(block, mean_shift=True)
        assert run.report.shift_explained == 0.0
        assert not run.packed("gate").bias.any()

    def test_share_of_a_small_deviation_is_that_of_a_large_one(self, generator):
        deviations = torch.randn(64, 5, generator=generator, dtype=torch.float64) + 1
        config = D2QuantConfig(mean_shift=True)
        shares = [
            stages._correct_deviation([scale * deviations], [torch.zeros(64, 5)], config)[1] for scale in (2.0, 1e-3)
        ]
        assert shares[0] == pytest.approx(shares[1], rel=1e3 * EPS) and shares[0] > 0.1

    def test_settings_reach_the_rounding(self, quantize):
        settings = {
            "grid": "midrise",
            "down_grid": "affine",
            "alpha": 0.75,
            "damp_percent": 0.03,
            "act_group_aware": False,
            "hessian_weights": False,
            "iterations": 2,
            "clip": True,
            "scale_dtype": "bfloat16",
        }
        run = quantize(column_scale=True, **settings)
        for name, (args, options) in run.calls.items():
            is_second = name in ("o", "down")
            assert torch.equal(args[0].double(), run.weights[name])
            expected = {name: value for name, value in settings.items() if name != "down_grid"}
            expected |= {"bits": 3, "group_size": 4, "scale_dtype": torch.bfloat16, "column_scale": is_second}
            assert options == expected | ({"grid": "affine"} if is_second else {})
            assert run.packed(name).weight_scale.dtype == torch.bfloat16
            assert run.packed(name).grid == options["grid"]
        opposite = quantize(act_group_aware=True, hessian_weights=True)
        for _, options in opposite.calls.values():
            assert options["act_group_aware"] and options["hessian_weights"] and not options["clip"]
            assert not options["column_scale"]
            assert options["grid"] == "affine"

    def test_report_states_errors_and_formats(self, quantize, generator, monkeypatch):
        ticks = iter(float(tick**2) for tick in range(100))
        monkeypatch.setattr(stages.time, "perf_counter", lambda: next(ticks))
        block = toy(generator, scale_pairs=PAIRS[1:], scale_reasons={"o": "reason"})
        run = quantize(block, down_grid="bitplane")
        assert [entry.name for entry in run.report.linears] == [f"layers.1.{n}" for stage in STAGES for n in stage]
        for index, entry in enumerate(run.report.linears):
            name = entry.name.removeprefix("layers.1.")
            assert entry.grid == ("bitplane" if name in ("o", "down") else "affine")
            assert (entry.bits, entry.group_size) == (3, 4)
            assert entry.seconds == (2 * index + 1) ** 2 - (2 * index) ** 2
            weight, (_, hessian, _) = run.weights[name], run.calls[name][0]
            energy = float((weight @ hessian.double() * weight).sum())
            for error, dense in (
                (entry.error, run.results[name].dequantize().double()),
                (entry.nearest_error, nearest(weight, bits=3, group_size=4)),
            ):
                delta = dense - weight
                expected = float((delta @ hessian.double() * delta).sum()) / energy
                assert error == pytest.approx(expected, rel=1e-3)  # `nearest` does not round its scales to float32

    def test_errors_are_measured_on_rows_at_equal_distances(self, quantize, monkeypatch):
        monkeypatch.setattr(stages, "REPORTED_ROWS", 3)
        run = quantize()
        for entry in run.report.linears:
            name = entry.name.removeprefix("layers.1.")
            weight, (_, hessian, _) = run.weights[name], run.calls[name][0]
            rows = range(0, len(weight), -(-len(weight) // 3))
            assert 1 < len(rows) <= 3 < len(weight)
            delta, some = (run.results[name].dequantize().double() - weight)[rows], weight[rows]
            expected = (delta @ hessian.double() * delta).sum() / (some @ hessian.double() * some).sum()
            assert entry.error == pytest.approx(float(expected), rel=1e-5)

    def test_errors_can_be_left_out(self, quantize, generator):
        reported = quantize(toy(generator.manual_seed(3)))
        silent = quantize(toy(generator.manual_seed(3)), report_errors=False)
        assert {(entry.error, entry.nearest_error) for entry in silent.report.linears} == {(None, None)}
        assert len(silent.results) == len(reported.results) > 0

    def test_rounding_to_nearest_needs_no_statistics(self, quantize):
        run = quantize(rounding="rtn", mean_shift=True)
        for name, (args, _) in run.calls.items():
            assert args[1:] == (None, None)
            assert torch.equal(args[0].double(), run.weights[name])
        assert {(entry.error, entry.nearest_error) for entry in run.report.linears} == {(None, None)}
        assert_rounds_to(run.packed("gate").bias, run.results["gate"].dequantize().double() @ run.shift())

    def test_low_precision_keeps_its_dtype(self, generator):
        block = toy(generator)
        block.module.bfloat16()
        streams = [normal(generator, 1, TOKENS, HIDDEN).bfloat16() for _ in range(2)]
        streams = Streams(list(streams), list(streams), list(streams))
        calls = BlockCalls(None, block.module, {block.name: ((), {})})
        with torch.no_grad():
            quantize_block(block, calls, streams, config(mean_shift=True, scale_dtype="float16"))
        assert {p.dtype for p in block.module.parameters()} == {torch.int32, torch.float16, torch.bfloat16}
        assert block.linear("gate").bias.dtype == block.linear("up").bias.dtype == torch.bfloat16
        assert not any(parameter.requires_grad for parameter in block.module.parameters())
        assert streams.quantized[0].dtype == torch.bfloat16

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_inputs_that_are_not_finite_are_named(self, quantize, generator, value):
        block = toy(generator)
        block.module.k.bias.data[2] = value
        with pytest.raises(
            ValueError, match=r"behind `layers.1` in full precision are not finite.*Load it in bfloat16"
        ):
            quantize(block)
        assert not any(isinstance(module, D2QuantLinear) for module in block.module.modules())

    @pytest.mark.parametrize("broken", [0, 1])
    def test_statistics_that_are_not_finite_are_named(self, quantize, generator, monkeypatch, broken):
        def statistics(*arguments):
            matrices = stage_statistics(*arguments)
            matrices[broken][1, 0] = float("inf")
            return matrices

        monkeypatch.setattr(stages, "stage_statistics", statistics)
        block = toy(generator)
        with pytest.raises(ValueError, match=r"inputs of `layers.1.q` are not finite.*Load it in bfloat16 or float32"):
            quantize(block)
        assert not any(isinstance(module, D2QuantLinear) for module in block.module.modules())

    def test_expert_without_tokens_is_rounded_to_nearest(self, generator, quantize):
        class Routed(ToyBlock):
            def forward(self, hidden: Tensor) -> Tensor:
                return hidden + self.o(self.q(hidden).tanh() * self.k(hidden))

        routed = Routed()
        routed.load_state_dict(toy(generator).module.state_dict())
        run = quantize(toy(generator, module=routed, shift_linears=()))
        for name in ("gate", "up", "down"):
            assert run.calls[name][0][1:] == (None, None)
        assert run.calls["o"][0][1] is not None


def nearest(weight: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Affine rounding to nearest over the full range of each row and group, 0 included, one number at a time."""
    dense = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            values = weight[row, start : start + group_size].tolist()
            low, high = min(0.0, *values), max(0.0, *values)
            scale = (high - low) / (2**bits - 1)
            zero = round(-low / scale)
            for offset, value in enumerate(values):
                code = min(max(round(value / scale) + zero, 0), 2**bits - 1)
                dense[row, start + offset] = scale * (code - zero)
    return dense


class TestAbsorbColumnScale:
    @pytest.fixture
    def rounded(self, generator) -> tuple[Block, RoundedLinears, QuantizedWeight]:
        block = toy(generator, scale_pairs=(ScalePair("up", "down", slice(2, 8)),))
        weight = round_weight(block.linear("up").weight.detach(), bits=2, group_size=4).weight
        return block, RoundedLinears({"up": RoundingResult(weight, None)}), weight

    def test_goes_into_the_scales_of_the_rows_of_its_producer(self, rounded, generator):
        block, linears, before = rounded
        bias, scale = block.linear("up").bias.detach().clone(), normal(generator, 6).exp()
        absorb_column_scale(block, "down", scale, linears, config(scale_dtype="float16"))
        after = linears.results["up"].weight
        expected = before.scales.clone()
        for row in range(2, 8):
            expected[:, row] = (before.scales[:, row] * scale[row - 2]).half().float()
            bias[row] *= scale[row - 2]
        assert torch.equal(after.scales, expected)
        assert torch.equal(after.codes, before.codes) and torch.equal(after.zero_points, before.zero_points)
        assert torch.equal(block.linear("up").weight, after.dequantize())
        assert torch.equal(block.linear("up").bias, bias)
        assert linears.input_scales == {}

    def test_leaves_the_result_that_was_given(self, rounded, generator):
        block, linears, before = rounded
        scales = before.scales.clone()
        absorb_column_scale(block, "down", normal(generator, 6).exp(), linears, config())
        assert torch.equal(before.scales, scales)

    def test_keeps_the_dtype_of_the_producer(self, rounded):
        block, linears, _ = rounded
        block.module.bfloat16()
        absorb_column_scale(block, "down", torch.full((6,), 2.0), linears, config())
        assert block.linear("up").weight.dtype == block.linear("up").bias.dtype == torch.bfloat16
        assert linears.results["up"].weight.scales.dtype == torch.float32

    def test_becomes_an_input_scale_of_a_linear_without_a_producer(self, rounded, generator):
        block, linears, before = rounded
        scale = normal(generator, 6).exp()
        absorb_column_scale(block, "o", scale, linears, config())
        assert torch.equal(linears.input_scales["o"], scale)
        assert linears.results["up"].weight is before
