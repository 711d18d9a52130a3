"""
Laws of the block loop:

- its streams are the model's own: what it hands from block to block is what the packed model computes;
- a column scale that is absorbed, and a mean shift that is folded into biases, compute what they would if explicit;
- an interrupted run, taken up again after any block, ends in the same bytes, also if files of it were damaged since;
- what cannot be quantized is refused before a weight changes, and a number that is not finite before it is stored.
"""

import copy
import gc
import json
import re
import shutil
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, OPTConfig, OPTForCausalLM

import trl_gopd
from tests.tiny import build_bos_tokenizer, build_model, build_tokenizer
from trl_gopd.d2quant import pipeline, refine, report, stages, workdir
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.d2quant.report import Report
from trl_gopd.d2quant.streams import BlockCalls


EPS = torch.finfo(torch.float32).eps
TOKENS = torch.randint(0, 200, (6, 32), generator=torch.Generator().manual_seed(0))
# as `calibration_windows` draws them, six of six with seed 0
WINDOWS = TOKENS[torch.randperm(6, generator=torch.Generator().manual_seed(0))]


def config(**settings):
    return D2QuantConfig(
        **{
            "bits": 2,
            "group_size": 16,
            "iterations": 3,
            "dataset": TOKENS,
            "num_samples": 6,
            "seq_length": 32,
            "tune_epochs": 0,
            "embedding_bits": None,  # test_token_matrices has the laws of packed embeddings and heads
        }
        | settings
    )


@pytest.fixture
def model(tokenizer):
    return build_model(tokenizer, seed=1)


@torch.no_grad()
def logits(model):
    return model(WINDOWS, use_cache=False).logits


@torch.no_grad()
def mlp_input(model, index):
    """What the MLP of a block reads, `(windows, tokens, hidden_size)`."""
    inputs = []
    handle = model.model.layers[index].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits(model)
    handle.remove()
    return inputs[0]


def assert_same(model, other):
    """Names and bits of all tensors."""
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, D2QuantLinear)}


class TestQuantizeModel:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"bits": 3, "group_size": 12},
            {"grid": "midrise", "column_scale": True, "mean_shift": True},
            {"grid": "affine", "down_grid": "bitplane", "column_scale": True},
            {"rounding": "gptq", "rotation": "full"},
            {"rounding": "rtn", "clip": False, "iterations": 0},
        ],
    )
    def test_streams_are_those_of_the_models(self, model, tmp_path, settings):
        before = logits(model)
        quantize_model(model, None, config(work_dir=str(tmp_path), **settings))
        streams = load_file(next(tmp_path.glob("*/streams.safetensors")))

        def read_out(hidden):
            with torch.no_grad():
                return model.lm_head(model.model.norm(hidden))

        assert len(packed(model)) == 14
        # A batch of six and six of one row differ by the order of sums, and the rotation by its rounding.
        torch.testing.assert_close(read_out(streams["quantized"]), logits(model), rtol=0, atol=1e-4)
        torch.testing.assert_close(read_out(streams["full"]), before, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("settings", [{"offload": "cpu"}, {"offload": "disk"}, {"report_errors": False}])
    def test_where_streams_wait_and_what_is_reported_changes_no_bit(self, model, tokenizer, tmp_path, settings):
        other, own = build_model(tokenizer, seed=1), {"mean_shift": True, "tune_epochs": 1}
        quantize_model(model, None, config(**own))
        quantize_model(other, None, config(**own, **settings, work_dir=str(tmp_path)))
        assert_same(model, other)
        assert [path.name for path in tmp_path.iterdir()] == [next(tmp_path.glob("*/streams.*")).parent.name]

    def test_more_bits_come_closer(self, model, tokenizer):
        before = logits(model)
        errors = []
        for bits in (2, 3, 4, 8):
            quantized = build_model(tokenizer, seed=1)
            quantize_model(quantized, None, config(bits=bits))
            errors.append((logits(quantized) - before).square().mean().item())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3 * errors[0]  # six bits more: 2^-12 of the energy, by the rule of 6 dB a bit

    def test_compensated_rounding_loses_less_than_rounding_to_nearest(self, model):
        report = quantize_model(model, None, config())
        assert [entry.name for entry in report.linears] == [
            f"model.layers.{block}.{name}"
            for block in range(2)
            for name in (
                *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            )
        ]
        assert all(entry.error < entry.nearest_error for entry in report.linears)

    def test_absorbed_column_scale_equals_an_explicit_one(self, model, tokenizer, monkeypatch):
        settings = {"column_scale": True, "scale_dtype": "float32"}
        explicit = build_model(tokenizer, seed=1)
        quantize_model(model, None, config(**settings))

        def keep(block, consumer, scale, rounded, config):
            rounded.input_scales[consumer] = scale

        monkeypatch.setattr(stages, "absorb_column_scale", keep)
        quantize_model(explicit, None, config(**settings))
        scales = [module.input_scale for module in packed(explicit).values() if module.input_scale is not None]
        assert len(scales) == 2
        assert all(scale.std() > 0.01 for scale in scales)
        assert all(module.input_scale is None for module in packed(model).values())
        torch.testing.assert_close(logits(model), logits(explicit), rtol=0, atol=1e-4)

    def test_folded_mean_shift_is_the_mean_deviation_behind_quantized_attention(self, model):
        original = copy.deepcopy(model)
        report = quantize_model(model, None, config(mean_shift=True))
        assert len(report.shift_explained) == 2
        for index, block in enumerate(model.model.layers):
            # What the norm would return if the attention of this block alone were in full precision again.
            hybrid = copy.deepcopy(original)
            for before in range(index):
                hybrid.model.layers[before] = model.model.layers[before]
            deviations = mlp_input(hybrid, index) - mlp_input(model, index)
            shift = deviations.mean((0, 1))
            assert shift.abs().max() > 0.01
            removed = 1 - (deviations - shift).square().sum() / deviations.square().sum()
            assert report.shift_explained[f"model.layers.{index}"] == pytest.approx(removed.item(), rel=1e-4)
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                # A mean of 192 tokens, of which batches of six and of one differ by the order of sums, times a weight.
                atol = 2 * len(TOKENS) * 32 * EPS * linear.dequantize().abs().sum(1).max().item()
                torch.testing.assert_close(linear.bias, linear.dequantize() @ shift, rtol=0, atol=atol)

    def test_linears_can_be_left_as_they_are(self, model):
        weight = model.model.layers[0].mlp.down_proj.weight.clone()
        quantize_model(model, None, config(modules_to_not_convert=["down_proj", "layers.1.self_attn.q_proj"]))
        assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weight)
        assert len(packed(model)) == 14 - 3

    @pytest.mark.parametrize(
        ("entries", "count"),
        [
            (["layers.0"], 7),
            (["self_attn"], 6),
            (["lm_head", "model.layers.1.mlp"], 11),
            ([".*down_proj", "embed_tokens"], 12),
        ],
    )
    def test_sub_modules_and_patterns_can_be_left(self, model, tmp_path, entries, count):
        quantize_model(model, None, config(modules_to_not_convert=entries))
        assert len(packed(model)) == count
        model.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    def test_column_scale_without_an_exact_place_scales_the_input(self):
        torch.manual_seed(0)
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=256,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
                activation_function="gelu",
                init_std=0.1,
            )
        ).eval()
        report = quantize_model(model, None, config(column_scale=True))
        assert [name for name, m in packed(model).items() if m.input_scale is not None] == [
            "model.decoder.layers.0.fc2"
        ]
        assert any("scales its input" in note for note in report.notes)

    @pytest.mark.parametrize("add_bos_token", [None, False])
    def test_windows_of_text_begin_as_the_configuration_says(self, model, monkeypatch, add_bos_token):
        tokenizer, seen = build_bos_tokenizer(), []
        record = BlockCalls.record
        monkeypatch.setattr(BlockCalls, "record", lambda *given: seen.append(given[2]) or record(*given))
        text = ["some words, and then others " * 20]
        quantize_model(model, tokenizer, config(dataset=text, add_bos_token=add_bos_token, rounding="rtn"))
        assert (seen[0][:, 0] == tokenizer.bos_token_id).all() == (add_bos_token is None)

    @pytest.mark.parametrize("grid", ["affine", "bitplane"])
    def test_one_group_for_each_row(self, model, tmp_path, grid):
        settings = {"group_size": -1, "grid": grid, "rotation": "group", "column_scale": True}
        report = quantize_model(model, None, config(work_dir=str(tmp_path / "work"), **settings))
        assert {module.weight_scale.shape[-2] for module in packed(model).values()} == {1}
        assert {entry.group_size for entry in report.linears} == {32, 64}
        model.save_pretrained(tmp_path / "saved")
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)
        resumed = build_model(build_tokenizer(), seed=1)
        quantize_model(resumed, None, config(work_dir=str(tmp_path / "work"), **settings))
        assert_same(resumed, model)

    def test_tied_embeddings_stay_tied(self, tokenizer):
        model = build_model(tokenizer, seed=1, tie_word_embeddings=True)
        quantize_model(model, None, config())
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_bfloat16_stays(self, model):
        model.to(torch.bfloat16)
        quantize_model(model, None, config(mean_shift=True))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.int32, torch.float16}
        assert logits(model).isfinite().all()

    def test_base_model(self):
        torch.manual_seed(0)
        llama = LlamaModel(
            LlamaConfig(
                vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
            )
        ).eval()
        report = quantize_model(llama, None, config(tune_epochs=2))
        assert len(packed(llama)) == 7
        assert report.refinement.training[-1] < report.refinement.training[0]

    def test_modes_and_gradients_are_given_back(self, model):
        model.train()
        model.model.norm.eval()
        quantize_model(model, None, config(tune_epochs=1))
        assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]
        assert model.model.norm.weight.requires_grad
        assert not any(p.requires_grad for module in packed(model).values() for p in module.parameters())

    def test_dense_weights_are_freed_block_by_block(self, model, monkeypatch):
        dense = [weakref.ref(m) for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
        alive = []
        quantize = pipeline.quantize_block

        def count(*arguments):
            block_report = quantize(*arguments)
            gc.collect()
            alive.append(sum(reference() is not None for reference in dense))
            return block_report

        monkeypatch.setattr(pipeline, "quantize_block", count)
        quantize_model(model, None, config())
        assert alive == [7, 0]


class TestReport:
    def test_round_trips_as_json(self, model, tmp_path):
        report = quantize_model(model, None, config(mean_shift=True))
        report.save(tmp_path / "report.json")
        read = json.loads((tmp_path / "report.json").read_text())
        assert read == json.loads(json.dumps(asdict(report)))
        assert read["config"]["bits"] == 2
        assert read["seconds"] > 0

    def test_is_drawn(self, model, tmp_path):
        quantize_model(model, None, config()).save(tmp_path / "report.png")
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
        assert [path.name for path in tmp_path.iterdir()] == ["report.png"]

    def test_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report.json, "dumps", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Report(config={}).save(tmp_path / "report.json")
        assert list(tmp_path.iterdir()) == []


class TestResume:
    SETTINGS = {"column_scale": True, "mean_shift": True, "rotation": "group"}

    @pytest.mark.parametrize("done", [0, 1, 2])
    def test_after_any_block_ends_in_the_same_bytes(self, model, tokenizer, tmp_path, monkeypatch, done):
        whole = quantize_model(model, None, config(**self.SETTINGS))
        quantize = pipeline.quantize_block
        calls = []

        def killed(block, *arguments):
            if len(calls) == done:
                raise KeyboardInterrupt
            calls.append(block.name)
            return quantize(block, *arguments)

        interrupted = build_model(tokenizer, seed=1)
        monkeypatch.setattr(pipeline, "quantize_block", killed)
        settings = config(work_dir=str(tmp_path), **self.SETTINGS)
        if done < 2:
            with pytest.raises(KeyboardInterrupt):
                quantize_model(interrupted, None, settings)
        else:
            quantize_model(interrupted, None, settings)
        assert len(calls) == done

        monkeypatch.setattr(
            pipeline, "quantize_block", lambda block, *rest: calls.append(block.name) or quantize(block, *rest)
        )
        resumed = build_model(tokenizer, seed=1)
        report = quantize_model(resumed, None, settings)
        assert calls == ["model.layers.0", "model.layers.1"]
        assert_same(resumed, model)
        assert [(e.name, e.error) for e in report.linears] == [(e.name, e.error) for e in whole.linears]
        assert report.shift_explained == whole.shift_explained

    @pytest.mark.parametrize("change", ["weights", "tokens", "settings", "model", "version"])
    def test_other_runs_share_the_folder(self, model, tokenizer, tmp_path, monkeypatch, change):
        quantize_model(model, None, config(work_dir=str(tmp_path)))
        if change == "version":
            monkeypatch.setattr(trl_gopd, "__version__", "0")
        other = {"seed": 1} if change == "tokens" else {"alpha": 0.5} if change == "settings" else {}
        results = []
        for work_dir in (str(tmp_path), None):
            again = build_model(tokenizer, seed=2 if change == "weights" else 1)
            if change == "model":
                again.config.rope_parameters["rope_theta"] = 100.0
            quantize_model(again, None, config(work_dir=work_dir, **other))
            results.append(again)
        assert_same(*results)
        assert len(list(tmp_path.iterdir())) == 2

    def test_refinement_may_be_changed(self, model, tokenizer, tmp_path, monkeypatch):
        quantize_model(model, None, config(work_dir=str(tmp_path)))
        monkeypatch.setattr(pipeline, "quantize_block", None)
        report = quantize_model(build_model(tokenizer, seed=1), None, config(work_dir=str(tmp_path), tune_epochs=1))
        assert len(report.refinement.training) == 1

    def test_weights_elsewhere_are_refused(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(workdir, "parameters_digest", lambda tensors: None)
        with pytest.raises(ValueError, match="needs all weights in this process.* Leave it out"):
            quantize_model(model, None, config(work_dir=str(tmp_path)))


def harm(path, damage):
    data = path.read_bytes()
    if damage == "delete":
        path.unlink()
    elif damage == "flip":  # the last number
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "header":  # the layout, which says how to build the block, or the number of blocks
        path.write_bytes(data.replace(b"affine", b"midris").replace(b"done", b"dona"))
    elif damage == "zeros":
        path.write_bytes(data[: -len(data) // 3] + bytes(len(data) // 3))
    else:
        path.write_bytes(data[: {"cut": -1, "empty": 0}[damage]])


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    """A run of three blocks that has ended, and its folder. Not to be changed."""
    folder = tmp_path_factory.mktemp("work")
    model = build_model(tokenizer, seed=1, num_hidden_layers=3)
    report = quantize_model(model, None, config(work_dir=str(folder), **TestResume.SETTINGS))
    return model, report, folder


class TestDamagedWorkFolder:
    @pytest.fixture
    def run(self, finished, tmp_path):
        """A copy of the run's folder, to be damaged."""
        (source,) = finished[2].iterdir()
        return Path(shutil.copytree(source, tmp_path / "work" / source.name))

    @pytest.fixture
    def resume(self, finished, run, tokenizer, monkeypatch):
        """A function that resumes from the copy, and returns the numbers of the blocks that it quantized again."""
        model, report, _ = finished
        quantize = pipeline.quantize_block
        numbers = []

        def counted(block, *arguments):
            numbers.append(int(block.name.rpartition(".")[2]) + 1)
            return quantize(block, *arguments)

        def resume():
            monkeypatch.setattr(pipeline, "quantize_block", counted)
            again = build_model(tokenizer, seed=1, num_hidden_layers=3)
            second = quantize_model(again, None, config(work_dir=str(run.parent), **TestResume.SETTINGS))
            assert_same(again, model)
            assert [(e.name, e.error) for e in second.linears] == [(e.name, e.error) for e in report.linears]
            assert second.shift_explained == report.shift_explained
            return numbers

        return resume

    @pytest.mark.parametrize(
        ("damage", "number"),
        [("flip", 1), ("flip", 2), ("flip", 3), ("header", 2), ("zeros", 2), ("cut", 2), ("empty", 2), ("delete", 2)],
    )
    def test_block_is_quantized_again(self, run, resume, caplog, damage, number):
        before = {path.name: path.read_bytes() for path in run.glob("block-*")}
        harm(run / f"block-{number:04d}.safetensors", damage)
        assert resume() == list(range(number, 4))
        assert f"block-{number:04d}.safetensors" in caplog.text
        assert caplog.text.count("those after it are quantized again") == 1
        assert {path.name for path in run.glob("block-*")} == before.keys()

    def test_last_block_was_not_written(self, run, resume, caplog):
        """The run was killed before; or the file is lost, which nobody can tell."""
        (run / "block-0003.safetensors").unlink()
        assert resume() == [3]

    @pytest.mark.parametrize("other", ["block-0002.safetensors", "streams.safetensors"])
    def test_file_copied_over_a_block(self, run, resume, caplog, other):
        shutil.copy(run / other, run / "block-0001.safetensors")
        assert resume() == [1, 2, 3]
        assert "block-0001.safetensors, which is not what this run wrote there" in caplog.text

    def test_swapped_blocks(self, run, resume):
        (run / "block-0002.safetensors").rename(run / "aside")
        (run / "block-0003.safetensors").rename(run / "block-0002.safetensors")
        (run / "aside").rename(run / "block-0003.safetensors")
        assert resume() == [2, 3]

    @pytest.mark.parametrize("name", ["block-0002.safetensors", "streams.safetensors"])
    def test_file_of_another_run(self, run, resume, tokenizer, tmp_path, name):
        other = config(work_dir=str(tmp_path / "other"), alpha=0.5, **TestResume.SETTINGS)
        pipeline.quantize_blocks(build_model(tokenizer, seed=1, num_hidden_layers=3), None, other)
        shutil.copy(next((tmp_path / "other").glob(f"*/{name}")), run / name)
        assert resume() == ([] if name.startswith("streams") else [2, 3])

    @pytest.mark.parametrize("damage", ["flip", "header", "zeros", "cut", "empty", "delete"])
    def test_streams_are_computed_again(self, run, resume, caplog, damage):
        before = (run / "streams.safetensors").read_bytes()
        harm(run / "streams.safetensors", damage)
        assert resume() == []
        assert "streams.safetensors" in caplog.text
        assert "Finished blocks are run again over the calibration tokens, up to number 3" in caplog.text
        # and written again, tensors for tensors; the order of entries in the header is safetensors' own
        assert (run / "streams.safetensors").read_bytes()[-1000:] == before[-1000:]

    def test_streams_of_an_earlier_block(self, finished, run, resume, tokenizer, tmp_path, monkeypatch):
        """Killed between the two files of a block, or another process of the same run is behind."""
        write = workdir.WorkDir._write

        def killed(self, name, tensors, **facts):
            write(self, name, tensors, **facts)
            if facts.get("done") == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(workdir.WorkDir, "_write", killed)
            early = config(work_dir=str(tmp_path / "early"), **TestResume.SETTINGS)
            with pytest.raises(KeyboardInterrupt):
                quantize_model(build_model(tokenizer, seed=1, num_hidden_layers=3), None, early)
        shutil.copy(next((tmp_path / "early").glob("*/streams.safetensors")), run)
        (run / "block-0003.safetensors").unlink()
        assert resume() == [3]


class TestBadInput:
    def test_quantized_already(self, model):
        quantize_model(model, None, config())
        with pytest.raises(ValueError, match=r"it is quantized already.*dequantize"):
            quantize_model(model, None, config())

    def test_meta(self, model):
        with pytest.raises(ValueError, match="on the meta device.*Load it"):
            quantize_model(model.to("meta"), None, config())

    def test_not_a_model(self):
        with pytest.raises(TypeError, match="PreTrainedModel"):
            quantize_model(nn.Linear(2, 2), None, config())

    def test_group_wider_than_a_linear(self, model):
        with pytest.raises(
            ValueError, match=r"got 48 and `model.layers.0.self_attn.q_proj` with 32 inputs.*32 or less"
        ):
            quantize_model(model, None, config(group_size=48))
        assert not packed(model)

    def test_nothing_left_to_quantize(self, model):
        names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        with pytest.raises(ValueError, match=r"'down_proj'.*leaves no linear layer"):
            quantize_model(model, None, config(modules_to_not_convert=names))

    @pytest.mark.parametrize(
        ("entry", "nearest"),
        [
            ("mlp.down_prj", "mlp.down_proj"),
            ("layers.9", "layers.[01]"),
            ("self_atn", "self_attn"),
            ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"),
            (r".*down_prj", ".*"),
        ],
    )
    def test_name_that_no_module_has(self, model, entry, nearest):
        complaint = f"nothing in the model is called, {re.escape(repr(entry))}. The nearest .* '{nearest}'"
        with pytest.raises(ValueError, match=complaint):
            quantize_model(model, None, config(modules_to_not_convert=["o_proj", entry]))
        assert not packed(model)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weight_that_is_not_finite(self, model, value):
        name = "model.layers.1.mlp.up_proj.weight"
        model.get_parameter(name).data[3, 5] = value
        with pytest.raises(ValueError, match=f"`{name}` holds NaN or infinity.* Is the checkpoint whole"):
            quantize_model(model, None, config())
        assert not packed(model)

    @pytest.mark.parametrize(
        "name",
        ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"],
    )
    def test_number_outside_of_the_linears_that_is_not_finite(self, model, name):
        model.get_parameter(name).data.view(-1)[7] = float("nan")
        with pytest.raises(ValueError, match=f"`{name}` holds NaN or infinity"):
            quantize_model(model, None, config())
        assert not packed(model)

    def test_rotated_weight_that_is_not_finite(self, model):
        model.model.norm.weight.data.fill_(1e20)
        model.lm_head.weight.data.fill_(1e20)
        with pytest.raises(ValueError, match="`lm_head.weight` would hold NaN or infinity"):
            quantize_model(model, None, config(rotation="full"))
        assert not packed(model)

    def test_inputs_whose_squares_are_not_finite(self, model, tmp_path):
        """Hidden states are, since a norm follows."""
        model.model.layers[1].mlp.up_proj.weight.data *= 1e20
        with pytest.raises(ValueError, match="inputs of `model.layers.1.mlp.down_proj` are not finite.*bfloat16"):
            quantize_model(model, None, config(scale_dtype="bfloat16", work_dir=str(tmp_path)))
        assert [path.name for path in tmp_path.glob("*/block-*")] == ["block-0001.safetensors"]

    @pytest.mark.parametrize("rounding", ["rtn", "gptaq"])
    def test_hidden_states_that_are_not_finite(self, model, tmp_path, rounding):
        model.model.layers[1].mlp.up_proj.weight.data *= 1e20
        model.model.layers[1].mlp.down_proj.weight.data *= 1e20
        with pytest.raises(ValueError, match="hidden states behind `model.layers.1` in full precision are not finite"):
            settings = {"rounding": rounding, "scale_dtype": "bfloat16", "work_dir": str(tmp_path)}
            quantize_model(model, None, config(**settings))
        assert [path.name for path in tmp_path.glob("*/block-*")] == ["block-0001.safetensors"]

    def test_embedding_that_overflows(self, model):
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 3e38)
        model.model.embed_tokens.weight.data.clamp_(min=2)
        with pytest.raises(ValueError, match="hidden states before the first block are not finite.* window 0"):
            quantize_model(model, None, config())
        assert not packed(model)

    @pytest.mark.parametrize("rotation", [None, "full"])
    def test_quantized_block_that_is_not_finite(self, model, monkeypatch, tmp_path, rotation):
        pack = stages.pack_linear

        def broken(*arguments, **options):
            module = pack(*arguments, **options)
            module.weight_scale.data[0, 0] = float("inf")
            return module

        monkeypatch.setattr(stages, "pack_linear", broken)
        with pytest.raises(ValueError, match="`model.layers.0.self_attn.q_proj.weight_scale` holds NaN or infinity"):
            quantize_model(model, None, config(work_dir=str(tmp_path), rotation=rotation))
        assert not list(tmp_path.glob("*/*"))

    @pytest.mark.parametrize("factor", [1e-12, 1e12])
    def test_scales_that_vanish_or_overflow(self, model, factor):
        model.model.layers[1].mlp.up_proj.weight.data *= factor
        with pytest.raises(ValueError, match="got 'float16' and `model.layers.1.mlp.up_proj` with weights up to"):
            quantize_model(model, None, config())
        assert not packed(model)
        quantize_model(model, None, config(scale_dtype="bfloat16"))
        error = model.model.layers[1].mlp.up_proj.dequantize() / factor
        assert error.abs().max() > 0.01

    def test_weight_of_zeros(self, model):
        model.model.layers[1].mlp.up_proj.weight.data.zero_()
        quantize_model(model, None, config())
        assert not model.model.layers[1].mlp.up_proj.dequantize().any()

    def test_loss_of_the_refinement_that_is_not_finite(self, model, monkeypatch):
        monkeypatch.setattr(refine, "_backward", lambda *arguments: float("nan"))
        complaint = "loss of the refinement is nan for calibration window [0-5] in step 1 of 6. Lower"
        with pytest.raises(ValueError, match=complaint):
            quantize_model(model, None, config(tune_epochs=1))
        assert not getattr(model, "is_quantized", False)

    def test_scales_that_the_refinement_makes_infinite_are_not_kept(self, model, tokenizer):
        settings = {"num_samples": 1, "tune_learning_rate": 1e9}
        report = quantize_model(model, None, config(tune_epochs=1, **settings))
        assert report.refinement.held_out[0] < report.refinement.held_out[1]
        rounded = build_model(tokenizer, seed=1)
        quantize_model(rounded, None, config(**settings))
        assert_same(model, rounded)

    def test_id_that_the_model_has_not(self, model):
        with pytest.raises(ValueError, match=r"from 0 to 258.*got 300"):
            quantize_model(model, None, config(dataset=torch.full((6, 32), 300)))

    def test_too_few_tokens(self, model):
        with pytest.raises(ValueError, match="7"):
            quantize_model(model, None, config(num_samples=7))

    def test_no_tokenizer(self, model):
        with pytest.raises(TypeError, match="needs a `tokenizer`, got None"):
            quantize_model(model, None, config(dataset=["words"]))
