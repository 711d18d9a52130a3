"""The configuration: defaults, round trips, and what it refuses."""

import dataclasses
import json
import math
import re
import warnings

import pytest
from trl import TrlParser

from trl_gopd.gopd.config import GOPDConfig


def build(tmp_path, **kwargs):
    return GOPDConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"} | kwargs)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_generation_is_the_default(tmp_path, batch_size):
    config = build(tmp_path, per_device_train_batch_size=batch_size)
    assert config.num_generations == 1 and type(config.num_generations) is int
    assert config.generation_batch_size == batch_size


def test_the_rest_of_the_validation_of_grpo_still_runs(tmp_path):
    with pytest.raises(ValueError, match="vllm_importance_sampling_clip_min"):
        build(tmp_path, vllm_importance_sampling_clip_min=7.0)


def test_recipe_of_the_paper(tmp_path):
    config = build(tmp_path)
    assert (config.gopd_lambda, config.learning_rate, config.loss_type, config.temperature) == (
        1.25,
        1e-5,
        "grpo",
        1.0,
    )
    assert config.vllm_importance_sampling_mode == "token_truncate"
    assert config.vllm_importance_sampling_clip_max == 5.0 and config.vllm_importance_sampling_clip_min is None


def test_json_and_command_line_round_trip(tmp_path):
    config = build(tmp_path, gopd_lambda=1.5, teacher_model_init_kwargs={"dtype": "bfloat16"})
    again = json.loads(config.to_json_string())
    assert again["gopd_lambda"] == 1.5 and again["num_generations"] == 1
    parser = TrlParser(dataclass_types=(GOPDConfig,))
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--gopd_lambda", "1.5"]
    arguments += ["--teacher_model_init_kwargs", '{"dtype": "bfloat16"}', "--gopd_extrapolation_clip", "2.0"]
    arguments += ["--gopd_nonfinite", "skip", "--gopd_max_skipped_steps", "3"]
    (parsed,) = parser.parse_args_and_config(arguments)
    assert parsed.gopd_lambda == 1.5 and parsed.gopd_extrapolation_clip == 2.0
    assert parsed.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert (parsed.gopd_nonfinite, parsed.gopd_max_skipped_steps) == ("skip", 3)


def test_help_prints(capsys):
    with pytest.raises(SystemExit):
        TrlParser(dataclass_types=(GOPDConfig,)).parse_args_and_config(["--help"])
    assert "--gopd_estimator" in capsys.readouterr().out


def test_docstring_states_every_own_field():
    from trl import GRPOConfig

    own = {field.name for field in dataclasses.fields(GOPDConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    documented = set(re.findall(r"^ {8}(\w+) \(`", GOPDConfig.__doc__, flags=re.MULTILINE))
    assert documented == own
    for field in dataclasses.fields(GOPDConfig):
        stated = re.search(rf"^ {{8}}{field.name} \(.*defaults to `(.*)`\)", GOPDConfig.__doc__, flags=re.MULTILINE)
        if field.name in own and stated:
            assert stated[1].strip('"') == str(field.default)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gopd_lambda": math.nan}, "`gopd_lambda` must be finite and >= 0, got nan. Use 1.0"),
        ({"gopd_lambda": math.inf}, "got inf"),
        ({"gopd_lambda": -0.5}, "got -0.5"),
        ({"gopd_estimator": "top"}, r"must be one of \['sampled', 'stratified', 'full'\], got 'top'"),
        ({"gopd_extrapolation_clip": -1.0}, "must be positive and finite, got -1.0. Use None"),
        ({"gopd_extrapolation_clip": 0.0}, "got 0.0"),
        ({"gopd_chunk_size": 0}, "must be at least 1, got 0. Use 256"),
        ({"gopd_nonfinite": "mask"}, r"`gopd_nonfinite` must be one of \['raise', 'skip'\], got 'mask'"),
        ({"gopd_max_skipped_steps": 0}, "`gopd_max_skipped_steps` must be at least 1, got 0. Use 10"),
        ({"num_generations": 0}, "must be at least 1, got 0. Use 1"),
        ({"importance_sampling_level": "sequence"}, "'sequence'` has no meaning in G-OPD.*Use 'token'"),
        ({"loss_type": "luspo"}, "'luspo'` has no meaning in G-OPD"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "has no meaning in G-OPD"),
        ({"sync_ref_model": True, "beta": 0.1}, "the reference of G-OPD is fixed"),
        ({"gopd_estimator": "full", "loss_type": "cispo"}, "not one of the sampled token.*'grpo'"),
        ({"gopd_estimator": "full", "beta": 0.1}, "`beta=0.1` has no meaning.*Use 0"),
        ({"gopd_estimator": "full", "entropy_coef": 0.1}, "`entropy_coef=0.1`.*Use 0"),
        ({"gopd_estimator": "full", "off_policy_mask_threshold": 0.1}, "Use None"),
    ],
)
def test_refused(tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **bad)


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_biased_sampling_warns(tmp_path, setting):
    with pytest.warns(UserWarning, match=f"{next(iter(setting))}.*biases the estimate of the gradient. Use"):
        build(tmp_path, **setting)


@pytest.mark.parametrize("option", [{"top_p": 0.5}, {"typical_p": 0.9}, {"temperature": 0.5}, {"do_sample": False}])
def test_biased_sampling_by_other_means_warns(tmp_path, option):
    with pytest.warns(UserWarning, match=f"{next(iter(option))}.*biases the estimate") as caught:
        build(tmp_path, generation_kwargs=option)
    (warning,) = [each for each in caught if "biases the estimate" in str(each.message)]
    assert warning.filename == __file__  # where the configuration was made


def test_unbiased_sampling_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build(tmp_path)
        build(tmp_path, generation_kwargs={"top_p": 1.0, "temperature": 1.0, "max_time": 60.0})
