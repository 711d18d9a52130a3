"""
What this package relies on in transformers' quantizers. A failure names what moved, and the file of ours to adapt.
"""

import dataclasses
import inspect
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tests.d2quant.families import build
from tests.tiny import build_model
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.foreign import WEIGHTS_ENTRY, WEIGHTS_MESSAGE
from trl_gopd.d2quant.hf_quantizer import D2QuantHfQuantizer


WHERE = f"moved in transformers {transformers.__version__}; adapt trl_gopd/d2quant/"
HOOKS = (
    "validate_environment",
    "update_dtype",
    "preprocess_model",
    "_process_model_before_weight_loading",
    "postprocess_model",
    "_process_model_after_weight_loading",
)


class Recording(HfQuantizer):
    """Notes the calls of its hooks, and what the model was like."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def note(self, hook, model=None, **kwargs):
        state = None
        if model is not None:
            weight = model.get_input_embeddings().weight
            state = (weight.is_meta, model.is_quantized, hasattr(model.config, "quantization_config"))
        self.calls.append((hook, state, kwargs))

    def validate_environment(self, *args, **kwargs):
        self.note("validate_environment", **kwargs)

    def update_dtype(self, dtype):
        self.note("update_dtype")
        return dtype

    def preprocess_model(self, model, **kwargs):
        result = super().preprocess_model(model, **kwargs)
        self.note("preprocess_model", model)
        return result

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.dtype = torch.get_default_dtype()
        self.note("_process_model_before_weight_loading", model, **kwargs)

    def postprocess_model(self, model, **kwargs):
        result = super().postprocess_model(model, **kwargs)
        self.note("postprocess_model", model)
        return result

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.note("_process_model_after_weight_loading", model, **kwargs)

    def get_state_dict_and_metadata(self, model):
        self.note("get_state_dict_and_metadata", model)
        return None, {"recorded": "yes"}

    def is_serializable(self):
        self.note("is_serializable")
        return True

    is_trainable = property(lambda self: True)


@pytest.fixture
def recording(monkeypatch, models):
    """The quantizer of a model that was loaded in full precision, and that model."""
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "d2quant", Recording)
    config = D2QuantConfig(2, 8)
    model = AutoModelForCausalLM.from_pretrained(models / "student", quantization_config=config, dtype=torch.bfloat16)
    return model.hf_quantizer, model


@pytest.mark.parametrize("table", ["AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"])
def test_tables_hold_classes_by_method(table):
    classes = getattr(auto, table, None)
    assert isinstance(classes, dict), f"transformers.quantizers.auto.{table} {WHERE}registration.py, hf_quantizer.py"
    assert all(inspect.isclass(value) for value in classes.values()), f"{table} {WHERE}hf_quantizer.py (`register`)"
    assert classes["d2quant"].__module__.startswith("trl_gopd.d2quant."), f"{table} {WHERE}registration.py"


def test_method_is_supported_by_its_name():
    supported = auto.AutoHfQuantizer.supports_quant_method(D2QuantConfig().to_dict())
    assert supported, f"`supports_quant_method` {WHERE}config.py (`quant_method`)"
    quantizer = auto.AutoHfQuantizer.from_config(D2QuantConfig().to_dict(), pre_quantized=True)
    assert type(quantizer) is D2QuantHfQuantizer, f"`AutoHfQuantizer.from_config` {WHERE}hf_quantizer.py"


def test_unknown_method_is_skipped():
    """If it is refused one day, packed words need not be called `weight` any more."""
    assert auto.AutoHfQuantizer.supports_quant_method({"quant_method": "nobody"}) is False, f"{WHERE}linear.py"


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="quantized with GPTQConfig but you are passing a D2QuantConfig"):
        auto.AutoHfQuantizer.merge_quantization_configs({"quant_method": "gptq", "bits": 4}, D2QuantConfig())


@pytest.mark.parametrize("method", ["from_dict", "to_dict", "to_diff_dict", "to_json_string", "__iter__"])
def test_configurations_have_what_ours_overrides_or_inherits(method):
    assert hasattr(QuantizationConfigMixin, method), f"QuantizationConfigMixin.{method} {WHERE}config.py"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("__init__", ["self", "quantization_config", "kwargs"]),
        ("validate_environment", ["self", "args", "kwargs"]),
        ("preprocess_model", ["self", "model"]),
        ("_process_model_before_weight_loading", ["self", "model", "kwargs"]),
        ("postprocess_model", ["self", "model", "kwargs"]),
        ("_process_model_after_weight_loading", ["self", "model", "kwargs"]),
        ("get_state_dict_and_metadata", ["self", "model"]),
        ("dequantize", ["self", "model", "dtype"]),
        ("_dequantize", ["self", "model", "dtype"]),
        ("remove_quantization_config", ["self", "model"]),
    ],
)
def test_signatures(method, parameters):
    got = list(inspect.signature(getattr(HfQuantizer, method)).parameters)
    assert got[: len(parameters)] == parameters, f"HfQuantizer.{method} {WHERE}hf_quantizer.py"


def test_only_known_methods_are_abstract():
    names = HfQuantizer.__abstractmethods__
    assert names == {"is_serializable", "is_trainable"}, f"abstract methods {names} {WHERE}hf_quantizer.py"


def test_kinds_of_flags():
    for name in ("is_trainable", "is_compileable"):
        assert isinstance(inspect.getattr_static(HfQuantizer, name), property), f"{name} {WHERE}hf_quantizer.py"
    assert callable(HfQuantizer.is_serializable), f"is_serializable {WHERE}hf_quantizer.py"
    assert HfQuantizer.requires_calibration is False, f"requires_calibration {WHERE}hf_quantizer.py"


def test_order_of_calls(recording):
    quantizer, _ = recording
    got = [hook for hook, _, _ in quantizer.calls]
    # A hook that calls another is noted when it returns.
    want = [HOOKS[0], HOOKS[1], HOOKS[3], HOOKS[2], HOOKS[5], HOOKS[4]]
    assert got == want, f"order of hooks {got} {WHERE}hf_quantizer.py"


def test_what_the_hooks_see(recording):
    quantizer, model = recording
    states = {hook: state for hook, state, _ in quantizer.calls}
    kwargs = {hook: options for hook, _, options in quantizer.calls}
    assert states[HOOKS[3]][:2] == (True, True), f"model before loading: not on meta, or not marked, {WHERE}"
    assert states[HOOKS[5]] == (False, True, True), f"model after loading {WHERE}hf_quantizer.py"
    assert "device_map" in kwargs["validate_environment"], f"`device_map` {WHERE}hf_quantizer.py"
    files = kwargs["_process_model_before_weight_loading"].get("checkpoint_files")
    assert files and str(files[0]).endswith(".safetensors"), f"`checkpoint_files` {WHERE}integrity.py"
    assert quantizer.dtype == torch.bfloat16, f"default dtype while a model is built {WHERE}hf_quantizer.py"
    assert quantizer.pre_quantized is False
    assert model.config.quantization_config is quantizer.quantization_config, f"{WHERE}hf_quantizer.py"


def test_configuration_is_seen_before_the_model_is_built(monkeypatch, models):
    class Seeing(Recording):
        def update_attn_implementation(self, config):
            raise RuntimeError(f"saw {config.hidden_size}")

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "d2quant", Seeing)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", None)
    with pytest.raises(RuntimeError, match="saw 32"):
        AutoModelForCausalLM.from_pretrained(models / "student", quantization_config=D2QuantConfig(2, 8))


def test_saving_asks_before_it_writes_the_configuration(recording, tmp_path):
    quantizer, model = recording
    quantizer.note = lambda hook, *arguments: setattr(model.config, "asked", hook)
    model.save_pretrained(tmp_path)
    asked = json.loads((tmp_path / "config.json").read_text())["asked"]
    assert asked == "get_state_dict_and_metadata", f"order in `save_pretrained` {WHERE}hf_quantizer.py"


def test_what_saving_calls(recording, tmp_path):
    quantizer, model = recording
    quantizer.calls.clear()
    model.save_pretrained(tmp_path)
    assert [hook for hook, _, _ in quantizer.calls] == ["is_serializable", "get_state_dict_and_metadata"], (
        f"calls of `save_pretrained` {WHERE}hf_quantizer.py"
    )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata().get("recorded") == "yes", f"metadata of a checkpoint {WHERE}integrity.py"


def test_removing_the_configuration_makes_a_plain_model(recording):
    quantizer, model = recording
    quantizer.remove_quantization_config(model)
    assert model.is_quantized is False
    assert not hasattr(model, "hf_quantizer"), f"`remove_quantization_config` {WHERE}hf_quantizer.py"
    assert not hasattr(model.config, "quantization_config"), f"`remove_quantization_config` {WHERE}hf_quantizer.py"


def test_loaded_parameters_are_marked(recording):
    _, model = recording
    unmarked = [n for n, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    assert unmarked == [], f"the mark of loaded parameters, `_is_hf_initialized`, {WHERE}hf_quantizer.py, linear.py"


def test_a_marked_module_is_not_initialized(tokenizer):
    model = build_model(tokenizer, seed=1)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(torch.zeros_like(linear.weight))
    model._is_hf_initialized = model.model._is_hf_initialized = False
    linear._is_hf_initialized = True
    model.initialize_weights()
    assert not linear.weight.any(), f"the mark of initialized modules {WHERE}hf_quantizer.py, linear.py"


def test_names_in_a_checkpoint(tokenizer):
    """Which tensors are written, and under which names."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.integrations.accelerate import load_offloaded_parameter
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    assert list(inspect.signature(load_offloaded_parameter).parameters) == ["model", "param_name"], (
        f"{WHERE}integrity.py"
    )
    model = build_model(tokenizer, seed=1, tie_word_embeddings=True)
    tensors = remove_tied_weights_from_state_dict(model.state_dict(), model)
    assert "lm_head.weight" not in tensors, f"`remove_tied_weights_from_state_dict` {WHERE}hf_quantizer.py"
    written = revert_weight_conversion(model, dict(tensors))
    assert all(written[name] is tensor for name, tensor in tensors.items()), (
        f"`revert_weight_conversion` copies what it does not convert: {WHERE}integrity.py"
    )


def test_code_of_a_checkpoint():
    from transformers.models.auto import modeling_auto

    tables = ("MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
    assert all(hasattr(modeling_auto, table) for table in tables), f"{WHERE}foreign.py"
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM", f"{WHERE}foreign.py"
    assert callable(PreTrainedModel.is_remote_code), f"`is_remote_code` {WHERE}hf_quantizer.py"


def test_a_file_of_weights_that_is_none_is_quoted(models, tmp_path):
    """Before a weight is read."""
    folder = shutil.copytree(models / "student", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, WEIGHTS_ENTRY: WEIGHTS_MESSAGE}))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError) as refused:
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert str(refused.value).endswith(WEIGHTS_MESSAGE), f"`{WEIGHTS_ENTRY}` {WHERE}foreign.py"


def test_saving_a_model_saves_its_configuration_once(tokenizer, tmp_path, monkeypatch):
    saved = []
    save = transformers.PreTrainedConfig.save_pretrained
    monkeypatch.setattr(
        transformers.PreTrainedConfig,
        "save_pretrained",
        lambda self, *given, **o: saved.append(given) or save(self, *given, **o),
    )
    build_model(tokenizer, seed=1).save_pretrained(tmp_path)
    assert [len(given) for given in saved] == [1], f"`PreTrainedConfig.save_pretrained` {WHERE}foreign.py"
    assert os.path.samefile(*saved[0], tmp_path)


def test_what_stays_in_float32(tokenizer):
    model = build_model(tokenizer, seed=1)
    model._keep_in_fp32_modules_strict = {"norm"}
    assert model._get_dtype_plan(torch.bfloat16) == {"norm": torch.float32}, f"`_get_dtype_plan` {WHERE}dense.py"


def test_sizes_of_ranks():
    from transformers.distributed.configuration_utils import DistributedConfig

    names = {field.name for field in dataclasses.fields(DistributedConfig)}
    assert {"tp_size", "ep_size", "pp_size", "fsdp_size"} <= names, f"DistributedConfig {WHERE}hf_quantizer.py"


def test_ranks_are_seen_before_the_model_is_built(monkeypatch, models):
    class Seeing(Recording):
        def update_attn_implementation(self, config):
            raise RuntimeError(f"saw {config.distributed_config}")

    class Anything(LlamaForCausalLM):
        @classmethod
        def prepare_distribute_model(cls, distributed_config, device_map=None):
            return "ranks", None, SimpleNamespace(get_mesh=lambda names: None)

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "d2quant", Seeing)
    with pytest.raises(RuntimeError, match="saw ranks"):
        Anything.from_pretrained(models / "student", quantization_config=D2QuantConfig(2, 8), distributed_config="x")


def test_families_ask_their_configuration_whether_they_are_quantized():
    model, calls = build("FalconMamba"), []
    model.backbone.layers[0].mixer.dt_proj.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, use_cache=False)
    model.config._is_quantized = True
    model(input_ids=ids, use_cache=False)
    assert calls == [1], f"`config._is_quantized` {WHERE}as_linears.py"


def test_eager_experts_take_one_matrix_at_a_time():
    class Indexed:
        def __init__(self, parameter):
            self.parameter, self.taken = parameter, []

        def __getitem__(self, index):
            self.taken.append(int(index))
            return self.parameter[index]

    experts = build("Mixtral").model.layers[0].mlp.experts
    experts.config._experts_implementation = "eager"
    given = torch.randn(5, 32), torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2]]), torch.full((5, 2), 0.5)
    expected, matrices = experts(*given), Indexed(experts._parameters.pop("down_proj").detach())
    vars(experts)["down_proj"] = matrices
    assert torch.equal(experts(*given), expected)
    assert matrices.taken == [0, 2], f"the loop over experts {WHERE}experts.py"
