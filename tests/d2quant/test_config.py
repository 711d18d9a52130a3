"""
The configuration: every field is checked by name, value and remedy; JSON, copies and presets keep what was said; and
what only the quantizing machine needs is shared by copies and never stored.
"""

import copy
import doctest
import inspect
import json
import re

import pytest
import torch

from trl_gopd.d2quant import config as module
from trl_gopd.d2quant.config import FORMAT_VERSION, RUNTIME_FIELDS, D2QuantConfig


# One value other than the default for each field.
OTHER = {
    "bits": 3,
    "group_size": 32,
    "grid": "midrise",
    "down_grid": "bitplane",
    "scale_dtype": "bfloat16",
    "embedding_bits": 4,
    "modules_to_not_convert": ["layers.0.self_attn.o_proj"],
    "rounding": "gptq",
    "alpha": 0.5,
    "damp_percent": 0.1,
    "act_group_aware": False,
    "hessian_weights": False,
    "clip": False,
    "iterations": 0,
    "column_scale": True,
    "mean_shift": True,
    "shift_gate": 0.3,
    "shift_shrink": True,
    "rotation": "group",
    "tune_epochs": 2,
    "tune_learning_rate": 1e-3,
    "tune_codes": 0.5,
    "num_samples": 128,
    "seq_length": 2048,
    "add_bos_token": False,
    "seed": 7,
    "bias_modules": ["mlp.gate_proj", "mlp.up_proj"],
    "input_scale_modules": ["mlp.fc2"],
    "down_modules": ["mlp.down_proj"],
    "expert_parameters": {"mlp.experts.down_proj": False},
}
ONLY_VALUE = {"format_version": FORMAT_VERSION, "quant_method": "d2quant", "integrity": None}


def defaults():
    return {name: field.default for name, field in inspect.signature(D2QuantConfig).parameters.items()}


def test_examples():
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)


class TestFields:
    def test_all_are_tested_here(self):
        assert set(defaults()) == {*OTHER, *ONLY_VALUE, *RUNTIME_FIELDS}
        assert not [name for name, value in OTHER.items() if defaults()[name] == value]

    def test_documented_defaults_are_the_real_ones(self):
        documented = re.findall(r"^        (\w+) \(.*?(?:defaults to `(.*?)`)?\):$", D2QuantConfig.__doc__, re.M)
        documented += [("dataset", ""), ("tokenizer", "")]
        stated = {name: default.strip('"') for name, default in documented}
        real = {name: "" if value is None else str(value) for name, value in defaults().items()}
        assert stated == {name: value for name, value in real.items() if name != "quant_method"}

    @pytest.mark.parametrize("bits,rate", [(2, 1e-2), (3, 5e-3), (4, 5e-3), (8, 5e-3)])
    def test_rate_of_tuning_follows_the_bits(self, bits, rate):
        config = D2QuantConfig(bits)
        assert config.tune_learning_rate == config.to_dict()["tune_learning_rate"] == rate
        assert D2QuantConfig(bits, tune_learning_rate=1e-3).tune_learning_rate == 1e-3

    def test_dtype_of_torch_is_accepted(self):
        assert D2QuantConfig(scale_dtype=torch.bfloat16).scale_dtype == "bfloat16"

    def test_one_group_for_each_row(self):
        assert [D2QuantConfig(group_size=-1).group_size_of(width) for width in (32, 96)] == [32, 96]
        assert D2QuantConfig(group_size=16).group_size_of(96) == 16
        rotations = [D2QuantConfig(group_size=size, rotation="group").rotation_size for size in (-1, 16)]
        assert rotations == [None, 16]

    @pytest.mark.parametrize("bits", [2, 3])
    def test_bitplanes_take_two_or_three_bits(self, bits):
        assert D2QuantConfig(bits, grid="bitplane").bits == bits


class TestErrors:
    @pytest.mark.parametrize(
        ("field", "value", "remedy"),
        [
            ("bits", 1, "one of 2, 3, 4, 8, got 1"),
            ("bits", 5, "one of 2, 3, 4, 8, got 5"),
            ("bits", True, "got True"),
            ("bits", 2.0, "got 2.0"),
            ("group_size", 0, "at least 1, got 0. -1 is one group for each row"),
            ("group_size", -2, "got -2. -1 is one group for each row"),
            ("grid", "nf4", "one of 'affine', 'midrise', 'bitplane', got 'nf4'"),
            ("down_grid", "nf4", "one of None, 'affine', 'midrise', 'bitplane', got 'nf4'"),
            ("scale_dtype", "int8", "one of 'float16', 'bfloat16', 'float32', got 'int8'"),
            ("scale_dtype", torch.float64, "got 'float64'"),
            ("embedding_bits", 5, "one of None, 2, 3, 4, 8, got 5"),
            ("embedding_bits", False, "got False"),
            ("rounding", "awq", "one of 'rtn', 'gptq', 'gptaq', got 'awq'"),
            ("alpha", -0.1, r"in \[0, 1\], got -0.1. 0 is GPTQ"),
            ("alpha", 1.1, "got 1.1"),
            ("alpha", float("nan"), "got nan"),
            ("damp_percent", 0, r"in \(0, 1\], got 0. GPTQ uses 0.01"),
            ("iterations", -1, "at least 0, got -1. 0 keeps"),
            ("shift_gate", 2, r"in \[0, 1\], got 2. 0 corrects all"),
            ("rotation", "half", "one of None, 'full', 'group', got 'half'"),
            ("tune_epochs", -1, "at least 0, got -1. 0 leaves"),
            ("tune_learning_rate", 0.0, r"in \(0, inf\), got 0.0. Use 1e-2"),
            ("tune_learning_rate", float("inf"), "got inf"),
            ("tune_codes", -0.5, r"in \[0, 16\], got -0.5. Use 1.0; 0 keeps"),
            ("offload", "gpu", "one of None, 'cpu', 'disk', got 'gpu'"),
            ("num_samples", 0, "at least 1, got 0. GPTQ uses 128"),
            ("seq_length", 1, "at least 2, got 1. GPTQ uses 2048"),
            ("seed", -1, "at least 0, got -1. Use 0"),
            ("format_version", 0, "2, got 0. Leave it out"),
            (
                "modules_to_not_convert",
                ["*proj"],
                r"names or regular expr.*got '\*proj', which is none: nothing to rep",
            ),
            ("quant_method", "gptq", "'d2quant', got 'gptq'. Use the class of that method"),
        ],
    )
    def test_value_and_remedy_are_named(self, field, value, remedy):
        with pytest.raises(ValueError, match=f"`{field}` must (be|hold) .*{remedy}"):
            D2QuantConfig(**{field: value})

    @pytest.mark.parametrize(
        ("field", "value", "remedy"),
        [
            ("group_size", 64.0, "an integer, at least 1, got 64.0"),
            ("num_samples", "16", "an integer, at least 1, got '16'"),
            ("alpha", "0.25", r"a number in \[0, 1\], got '0.25'"),
            ("mean_shift", 1, "True or False, got 1"),
            ("add_bos_token", 1, "None, True or False, got 1. None does as the tokenizer does"),
            ("add_bos_token", "auto", "None, True or False, got 'auto'"),
            ("report_errors", None, "True or False, got None"),
            ("modules_to_not_convert", "down_proj", r"a list of names of linears, got 'down_proj'. Pass \["),
            ("bias_modules", [1], r"a list of names of linears, got \[1\]"),
        ],
    )
    def test_wrong_type_is_named(self, field, value, remedy):
        with pytest.raises(TypeError, match=f"`{field}` must be {remedy}"):
            D2QuantConfig(**{field: value})

    @pytest.mark.parametrize("field", ["grid", "down_grid"])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_wide_bitplanes_are_refused(self, field, bits):
        with pytest.raises(ValueError, match=f"2 or 3 for the grid 'bitplane', got {bits}. Use the grid 'affine'"):
            D2QuantConfig(bits, **{field: "bitplane"})

    def test_rotation_of_weights_that_stay_on_the_disk_is_refused(self):
        with pytest.raises(ValueError, match=r"`rotation='group'` changes all of them. Use `offload='cpu'`"):
            D2QuantConfig.paper(offload="disk")

    def test_unknown_keyword_is_refused(self):
        with pytest.raises(TypeError, match="'groupsize'"):
            D2QuantConfig(groupsize=64)

    def test_unknown_key_is_refused_with_the_known_ones(self):
        with pytest.raises(TypeError, match=r"no 'groupsize'. It has .*'group_size'"):
            D2QuantConfig.from_dict({"quant_method": "d2quant", "groupsize": 64})

    def test_newer_checkpoint_asks_for_an_upgrade(self):
        """Also if it has keys that only the newer version knows."""
        newer = D2QuantConfig().to_dict() | {"format_version": 3, "spline": "cubic"}
        with pytest.raises(ValueError, match="`format_version` 3, written by a newer trl_gopd; .* reads 2. Upgrade"):
            D2QuantConfig.from_dict(newer)


class TestCopies:
    def test_json_keeps_every_field(self):
        config = D2QuantConfig(**OTHER)
        loaded = D2QuantConfig.from_dict(json.loads(config.to_json_string()))
        assert vars(loaded) == vars(config)
        assert dict(config) == config.to_dict() == config.to_diff_dict()

    def test_runtime_fields_are_not_stored(self):
        config = D2QuantConfig(dataset=(i for i in "ab"), tokenizer=lambda: None, work_dir="/tmp/x")
        assert not {*config.to_dict()} & {*RUNTIME_FIELDS}
        assert "generator" not in repr(config)

    def test_equal_if_all_that_is_stored_is(self):
        assert D2QuantConfig(2, dataset=["a"]) == D2QuantConfig(2)
        assert D2QuantConfig(2) != D2QuantConfig(3)
        assert D2QuantConfig(2) != D2QuantConfig(2).to_dict()

    def test_what_to_dict_returns_is_not_the_config(self):
        config = D2QuantConfig(modules_to_not_convert=["o_proj"])
        config.to_dict()["modules_to_not_convert"].append("q_proj")
        assert config.modules_to_not_convert == ["o_proj"]

    def test_deep_copy_shares_runtime_fields_and_nothing_else(self):
        config = D2QuantConfig(dataset=(i for i in "ab"), tokenizer=lambda: None, **OTHER)
        copied = copy.deepcopy({"quantization_config": config})["quantization_config"]
        assert vars(copied) == vars(config)
        assert copied.dataset is config.dataset
        assert copied.tokenizer is config.tokenizer
        assert copied.bias_modules is not config.bias_modules


class TestPresets:
    PAPER = {
        "group_size": 128,
        "grid": "affine",
        "column_scale": True,
        "mean_shift": True,
        "hessian_weights": False,
        "rounding": "gptaq",
        "alpha": 0.25,
        "rotation": "group",
        "num_samples": 128,
        "seq_length": 2048,
        "tune_epochs": 0,
        "dataset": "wikitext2",
    }

    @pytest.mark.parametrize("bits", [2, 3])
    def test_paper(self, bits):
        config = D2QuantConfig.paper(bits)
        assert vars(config).items() >= {**self.PAPER, "bits": bits, "down_grid": None}.items()

    @pytest.mark.parametrize("bits", [2, 3])
    def test_release_has_bitplanes_in_down_proj(self, bits):
        config = D2QuantConfig.release(bits)
        assert vars(config).items() >= {**self.PAPER, "bits": bits, "down_grid": "bitplane"}.items()

    @pytest.mark.parametrize("preset", [D2QuantConfig.paper, D2QuantConfig.release])
    def test_overrides_win(self, preset):
        config = preset(num_samples=4, down_grid="midrise", dataset=["text"])
        assert (config.num_samples, config.down_grid, config.dataset) == (4, "midrise", ["text"])


class TestNames:
    @pytest.mark.parametrize(
        ("listed", "name", "skipped"),
        [
            ("mlp.down_proj", "model.layers.3.mlp.down_proj", True),
            ("down_proj", "model.layers.3.mlp.down_proj", True),
            ("layers.3.mlp.down_proj", "model.layers.3.mlp.down_proj", True),
            ("layers.3.mlp.down_proj", "model.layers.13.mlp.down_proj", False),
            ("own_proj", "model.layers.3.mlp.down_proj", False),
            # sub-modules
            ("mlp", "model.layers.3.mlp.down_proj", True),
            ("layers.3", "model.layers.3.mlp.down_proj", True),
            ("layers.3", "model.layers.33.mlp.down_proj", False),
            ("layers.3.", "model.layers.3.mlp.down_proj", True),
            ("model.layers.3", "model.layers.3.mlp.down_proj", True),
            ("model.layers.3.mlp", "model.layers.3.self_attn.k_proj", False),
            ("lm_head", "model.layers.3.mlp.down_proj", False),
            ("", "model.layers.3.mlp.down_proj", False),
            # regular expressions, of whole names or of names of sub-modules
            (".*down_proj", "model.layers.3.mlp.down_proj", True),
            (r".*\.mlp", "model.layers.3.mlp.down_proj", True),
            (r".*\.ml", "model.layers.3.mlp.down_proj", False),
            (r"model\.layers\.[0-3]\.", "model.layers.3.mlp.down_proj", True),
            (r"model\.layers\.[0-3]\.", "model.layers.33.mlp.down_proj", False),
            (r"layers\.[0-3]\.", "model.layers.3.mlp.down_proj", False),
            ("mlp.(up|down)_proj", "model.layers.3.mlp.down_proj", False),
            (".*mlp.(up|down)_proj", "model.layers.3.mlp.down_proj", True),
            # saved with a head, read as a base model
            ("model.layers.3.mlp.down_proj", "layers.3.mlp.down_proj", True),
            ("model.layers.13.mlp.down_proj", "layers.3.mlp.down_proj", False),
        ],
    )
    def test_skips_by_name_or_pattern(self, listed, name, skipped):
        assert D2QuantConfig(modules_to_not_convert=["q_proj", listed]).skips(name) is skipped

    def test_nothing_is_skipped_by_default(self):
        assert not D2QuantConfig().skips("model.layers.0.mlp.down_proj")

    def test_down_grid_is_that_of_down_modules(self):
        config = D2QuantConfig(down_grid="bitplane", down_modules=["mlp.down_proj"])
        grids = [config.grid_of(f"layers.0.mlp.{name}_proj") for name in ("down", "up")]
        assert grids == ["bitplane", "affine"]
        assert D2QuantConfig(down_modules=["mlp.down_proj"]).grid_of("layers.0.mlp.down_proj") == "affine"
