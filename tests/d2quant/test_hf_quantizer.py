"""
Quantized models in transformers: a checkpoint comes back as it was, however it is loaded; a model in full precision is
handed to the pipeline as such, and what cannot work is refused before its weights are read; a damaged checkpoint is an
error, never a model; and adapters train on top.
"""

import copy
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import trl_gopd
from tests.d2quant.families import build
from tests.tiny import build_model
from trl_gopd.d2quant import integrity, pipeline
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.hf_quantizer import D2QuantHfQuantizer, mark_quantized, save_quantized
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.d2quant.rounding import round_weight
from trl_gopd.digests import VOLATILE


IDS = torch.arange(3, 40)[None]
KEPT = "model.layers.0.self_attn.o_proj"
SCALED = "model.layers.1.mlp.down_proj"
FILE = "model.safetensors"


def pack(model, config):
    """Rounds to nearest and packs, with everything a layer may have: biases, an input scale, bit-planes."""
    for index, block in enumerate(model.base_model.layers):
        for name, linear in list(block.named_modules()):
            if not isinstance(linear, nn.Linear) or config.skips(f"layers.{index}.{name}"):
                continue
            is_down = name == "mlp.down_proj"
            rounded = round_weight(
                linear.weight.data,
                bits=config.bits,
                group_size=config.group_size,
                grid=(is_down and config.down_grid) or config.grid,
                iterations=0,
            )
            generator = torch.Generator().manual_seed(index)
            bias = torch.randn(linear.out_features, generator=generator) if name in config.bias_modules else None
            scale = torch.rand(linear.in_features, generator=generator) + 0.5 if is_down and index else None
            packed = D2QuantLinear.from_quantized(rounded.weight, bias=bias, input_scale=scale, dtype=torch.float32)
            block.set_submodule(name, packed)
    mark_quantized(model, config)
    return model


def stand_in(model, tokenizer, config):
    """What `quantize_model` does to a model, without calibrating."""
    pack(model, config)


@pytest.fixture(scope="module")
def config():
    return D2QuantConfig(
        2,
        8,
        down_grid="bitplane",
        modules_to_not_convert=["layers.0.self_attn.o_proj"],
        bias_modules=["mlp.gate_proj", "mlp.up_proj"],
        dataset=["text"],
    )


@pytest.fixture(scope="module")
def saved(config, tokenizer, tmp_path_factory):
    """A packed model and its folder. Not to be changed."""
    model = pack(build_model(tokenizer, seed=1), config)
    folder = tmp_path_factory.mktemp("saved") / "packed"
    save_quantized(model, folder, tokenizer=tokenizer)
    return model, folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(saved[1], tmp_path / "copy"))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, D2QuantLinear)}


def assert_same(model, other):
    """Names, dtypes and bits of all tensors."""
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    for (name, tensor), (other_name, other_tensor) in pairs:
        assert (name, tensor.dtype) == (other_name, other_tensor.dtype)
        assert torch.equal(tensor, other_tensor), name


def read(file):
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata()


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def forge(folder, edit):
    """Edits what a checkpoint states of itself along with its configuration, and computes the checksum anew."""

    def edit_both(config):
        settings = config["quantization_config"]
        for entries in (config, settings["integrity"]["model_config"]):
            edit(entries)
        settings["integrity"]["checksum"] = integrity._checksum(settings)

    edit_config(folder, edit_both)


class TestReload:
    def test_every_tensor_comes_back(self, saved):
        model, folder = saved
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert_same(loaded, model)
        assert torch.equal(logits(loaded), logits(model))
        assert repr(loaded) == repr(model)

    def test_tokenizer_is_saved_along(self, saved, tokenizer):
        loaded = AutoTokenizer.from_pretrained(saved[1])
        assert loaded.get_vocab() == tokenizer.get_vocab()

    def test_configuration_states_what_is_stored(self, saved):
        _, folder = saved
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert (stored["quant_method"], stored["format_version"]) == ("d2quant", 2)
        assert stored["modules_to_not_convert"] == [KEPT]
        assert stored["bias_modules"] == ["mlp.gate_proj", "mlp.up_proj"]
        assert stored["input_scale_modules"] == [SCALED]
        assert stored["down_modules"] == ["mlp.down_proj"]
        assert "dataset" not in stored

    def test_packed_linears_are_frozen(self, saved):
        loaded = AutoModelForCausalLM.from_pretrained(saved[1])
        trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert not {name.rpartition(".")[0] for name in trainable} & packed(loaded).keys()
        assert f"{KEPT}.weight" in trainable

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype_is_that_of_what_is_not_packed(self, saved, dtype):
        model, folder = saved
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for name, module in packed(loaded).items():
            original = model.get_submodule(name)
            assert torch.equal(module.weight, original.weight)
            assert module.weight_scale.dtype == torch.float16
            assert torch.equal(module.weight_scale, original.weight_scale)
            assert module.bias is None or module.bias.dtype == dtype
        assert loaded.model.norm.weight.dtype == dtype
        dense = copy.deepcopy(model).dequantize().to(dtype)
        # two models that round each product to `dtype`: no further from each other than both from float32
        error = (logits(dense).float() - logits(model)).abs().max()
        assert (logits(loaded).float() - logits(model)).abs().max() <= 2 * error

    @pytest.mark.parametrize("device_map", ["auto", "cpu"])
    def test_device_map(self, saved, device_map):
        model, folder = saved
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
        assert_same(loaded, model)

    def test_block_on_disk(self, saved, tmp_path):
        model, folder = saved
        device_map = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
        device_map |= {"model.layers.1": "disk", "model.rotary_emb": "cpu"}
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "off")
        assert loaded.get_submodule(SCALED).weight.is_meta
        assert torch.equal(logits(loaded), logits(model))
        with pytest.raises(ValueError, match="must be in memory, and `model.layers.1.* is offloaded. Load it without"):
            loaded.dequantize()
        loaded.save_pretrained(tmp_path / "again")
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)

    def test_base_model_lacks_the_prefix(self, saved):
        model, folder = saved
        base = AutoModel.from_pretrained(folder)
        assert_same(base, model.model)

    def test_base_model_is_read_with_a_head(self, saved, config, tokenizer, tmp_path):
        base = pack(build_model(tokenizer, seed=2).model, config)
        assert base.config.quantization_config.modules_to_not_convert == [KEPT.removeprefix("model.")]
        base.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path).model, base)

    def test_shards(self, saved, tmp_path):
        model, _ = saved
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    def test_tied_embeddings_stay_tied(self, config, tokenizer, tmp_path):
        model = pack(build_model(tokenizer, seed=1, tie_word_embeddings=True), config)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same(loaded, model)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("grid", ["affine", "midrise"])
    def test_every_width(self, bits, grid, tokenizer, tmp_path):
        config = D2QuantConfig(bits, 16, grid=grid, scale_dtype="bfloat16", bias_modules=[])
        model = build_model(tokenizer, seed=bits)
        linear = model.model.layers[0].mlp.up_proj
        rounded = round_weight(linear.weight.data, bits=bits, group_size=16, grid=grid, iterations=0)
        model.model.layers[0].mlp.up_proj = D2QuantLinear.from_quantized(rounded.weight, scale_dtype=torch.bfloat16)
        mark_quantized(model, config)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert len(packed(loaded)) == 1
        assert_same(loaded, model)

    def test_generation_is_that_of_the_dense_model(self, saved):
        model, folder = saved
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        want = copy.deepcopy(model).dequantize().generate(IDS, **options)
        assert torch.equal(loaded.generate(IDS, **options), want)

    def test_compiles_in_one_piece(self, saved):
        """Which `is_compileable` promises. What is compiled for a machine is that of the kernels."""
        model, _ = saved
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
        assert model.hf_quantizer.is_compileable
        assert torch.equal(logits(compiled), logits(model))

    def test_copies(self, saved):
        model, folder = saved
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert_same(copied, model)
            assert copied.hf_quantizer is not loaded.hf_quantizer
        assert torch.isfinite(logits(loaded.to(torch.bfloat16))).all()

    def test_saved_again_it_is_the_same(self, saved, tmp_path):
        model, folder = saved
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        assert (tmp_path / FILE).read_bytes() == (folder / FILE).read_bytes()
        # with the code that `trust_remote_code=True` runs
        assert (tmp_path / "modeling_d2quant.py").read_bytes() == (folder / "modeling_d2quant.py").read_bytes()
        assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()

    def test_dense_model_is_saved_without_a_word_of_it(self, saved, tmp_path):
        dense = AutoModelForCausalLM.from_pretrained(saved[1]).dequantize()
        dense.save_pretrained(tmp_path)
        assert not (tmp_path / "modeling_d2quant.py").exists()
        config = json.loads((tmp_path / "config.json").read_text())
        assert not {"auto_map", "transformers_weights", "quantization_config"} & config.keys()
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(dense))

    def test_saving_leaves_the_configuration(self, saved, tmp_path):
        model, _ = saved
        before = model.config.to_dict()
        model.save_pretrained(tmp_path / "a")
        model.save_pretrained(tmp_path / "b", is_main_process=False)
        assert model.config.to_dict() == before
        assert not (tmp_path / "b" / "modeling_d2quant.py").exists()

    @pytest.mark.parametrize(("version", "remedy"), [(3, "newer trl_gopd.* Upgrade"), (1, "Quantize the model")])
    def test_other_formats_are_refused(self, folder, version, remedy):
        edit_config(folder, lambda config: config["quantization_config"].update(format_version=version))
        with pytest.raises(ValueError, match=f"is of `format_version` {version}.*{remedy}"):
            AutoModelForCausalLM.from_pretrained(folder)


class TestDequantize:
    def test_dense_model_of_the_same_function(self, saved, tokenizer):
        model, folder = saved
        dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
        assert not packed(dense)
        assert not dense.is_quantized
        assert not hasattr(dense.config, "quantization_config")
        assert all(parameter.requires_grad for parameter in dense.parameters())
        want = logits(model)
        # float32 in another order of summation: at most a few dozen roundings in a row
        assert (logits(dense) - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()

    def test_dtype(self, saved):
        dense = AutoModelForCausalLM.from_pretrained(saved[1], dtype=torch.bfloat16).dequantize()
        assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}


class TestMarkQuantized:
    @pytest.mark.parametrize("change", [{"bits": 3}, {"group_size": 16}, {"down_grid": None}])
    def test_configuration_of_another_model_is_refused(self, saved, config, change):
        other = copy.copy(config)
        vars(other).update(change)
        with pytest.raises(ValueError, match="`config` must say how `model.layers.0.*` is packed, got"):
            mark_quantized(copy.deepcopy(saved[0]), other)

    def test_configuration_is_copied(self, saved, config):
        model, _ = saved
        assert model.config.quantization_config is not config
        assert (config.dataset, model.config.quantization_config.dataset) == (["text"], None)
        assert model.config.quantization_config is model.hf_quantizer.quantization_config


class TestOnTheFly:
    @pytest.fixture
    def calls(self, monkeypatch):
        """What the pipeline was given."""
        calls = []

        def quantize(model, tokenizer, config):
            calls.append((model.is_quantized, hasattr(model.config, "quantization_config"), tokenizer, config))
            stand_in(model, tokenizer, config)

        monkeypatch.setattr(pipeline, "quantize_blocks", quantize)
        return calls

    def test_pipeline_gets_a_model_in_full_precision(self, calls, models, config, saved):
        model = AutoModelForCausalLM.from_pretrained(models / "student", quantization_config=config)
        ((is_quantized, has_config, tokenizer, given),) = calls
        assert (is_quantized, has_config) == (False, False)
        assert tokenizer("a")["input_ids"]
        assert given.dataset is config.dataset
        assert_same(model, saved[0])  # seed 1, as well
        assert (model.is_quantized, model.quantization_method) == (True, "d2quant")

    def test_configuration_of_the_caller_is_left_alone(self, calls, models, config):
        """A concrete class does not copy its arguments, as an auto class does."""
        before = vars(copy.deepcopy(config))
        model = LlamaForCausalLM.from_pretrained(models / "student", quantization_config=config)
        assert vars(config) == before
        assert model.config.quantization_config.dataset is None

    def test_dataset_without_a_copy(self, calls, models, config):
        config = copy.copy(config)
        config.dataset = (text for text in ["a", "b"])
        AutoModelForCausalLM.from_pretrained(models / "student", quantization_config=config)
        assert calls[0][3].dataset is config.dataset

    def test_dictionary_is_a_configuration(self, calls, models, config):
        model = AutoModel.from_pretrained(models / "student", quantization_config=config.to_dict())
        assert isinstance(model.config.quantization_config, D2QuantConfig)
        assert len(packed(model)) == 13

    def test_tokenizer_of_the_configuration_comes_first(self, calls, models, config, tokenizer):
        config = copy.copy(config)
        config.tokenizer = tokenizer
        AutoModelForCausalLM.from_pretrained(models / "student", quantization_config=config)
        assert calls[0][2] is tokenizer

    def test_the_pipeline_itself(self, models, tmp_path):
        """What it makes of a model in memory, `from_pretrained` makes of a checkpoint."""
        config = D2QuantConfig(
            2, 16, down_grid="bitplane", column_scale=True, mean_shift=True, num_samples=2, seq_length=32
        )
        model = AutoModelForCausalLM.from_pretrained(models / "student")
        quantize_model(model, models / "student", config)
        loaded = AutoModelForCausalLM.from_pretrained(models / "student", quantization_config=config)
        assert_same(loaded, model)
        assert loaded.config.quantization_config == model.config.quantization_config
        assert loaded.config.quantization_config.down_modules == ["mlp.down_proj"]
        loaded.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    @pytest.fixture
    def unreadable(self, models, tmp_path):
        """A model whose weights cannot be read: an error that is not about that came before they were."""
        path = Path(shutil.copytree(models / "student", tmp_path / "model"))
        (path / FILE).write_bytes(b"no weights")
        return path

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (
                {"group_size": 48},
                "`group_size` must be .*, got 48 and `model.layers.0.self_attn.q_proj` of 32 columns",
            ),
            (
                {"modules_to_not_convert": ["down_prj"]},
                "is called, 'down_prj'. The nearest name is 'down_proj'",
            ),
            ({"tokenizer": "nowhere/to-be-found"}, "needs a tokenizer, and none could be loaded from 'nowhere/to-be"),
        ],
    )
    def test_refused_before_weights_are_read(self, unreadable, options, complaint):
        config = D2QuantConfig(2, **{"group_size": 8, **options})
        with pytest.raises(ValueError, match=complaint):
            AutoModelForCausalLM.from_pretrained(unreadable, quantization_config=config)

    @pytest.mark.parametrize("dataset", [None, "wikitext2", ["text"]])
    def test_text_needs_a_tokenizer(self, unreadable, dataset):
        for path in unreadable.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ValueError, match=r"none could be loaded from .*. Pass `D2QuantConfig\(tokenizer"):
            AutoModelForCausalLM.from_pretrained(unreadable, quantization_config=D2QuantConfig(2, 8, dataset=dataset))

    def test_tokens_need_none(self, calls, models, config, tmp_path):
        build_config = copy.copy(config)
        build_config.dataset = torch.zeros(4, 8, dtype=torch.int64)
        path = Path(shutil.copytree(models / "student", tmp_path / "model"))
        for file in path.glob("tokenizer*"):
            file.unlink()
        AutoModelForCausalLM.from_pretrained(path, quantization_config=build_config)
        assert calls[0][2] is None

    def test_family_that_cannot_be_quantized(self, tmp_path):
        build("Zamba2 (shared blocks)").save_pretrained(tmp_path)
        config = D2QuantConfig(2, 8, dataset=torch.zeros(4, 8, dtype=torch.int64), num_samples=4, seq_length=8)
        with pytest.raises(ValueError, match="Zamba2ForCausalLM .* cannot be quantized: blocks must not share"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)

    def test_what_stays_in_full_precision_is_logged_once(self, tmp_path, caplog):
        model = build("Mixtral")
        model.save_pretrained(tmp_path)
        config = D2QuantConfig(4, 16, dataset=torch.zeros(1, 8, dtype=torch.int64), num_samples=1, seq_length=8)
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        (message,) = [record.getMessage() for record in caplog.records if "full precision" in record.getMessage()]
        parameters = [parameter.numel() for parameter in model.model.layers.parameters()]
        share = 2 * model.model.layers[0].mlp.gate.weight.numel() / sum(parameters)
        assert message.startswith(f"{share:.2%} of the parameters of the decoder blocks stay in full precision")
        assert message.count("`mlp.gate.weight` (2-D parameter of MixtralTopKRouter, which weighs experts") == 1

    @pytest.mark.parametrize(
        ("device_map", "place"),
        [
            ({"model": "cpu", "lm_head": "disk"}, "disk"),
            ({"model": "cpu", "lm_head": 0}, "cpu"),
            ({"": "meta"}, "meta"),
        ],
    )
    def test_weights_elsewhere_are_refused(self, unreadable, device_map, place):
        with pytest.raises(ValueError, match=f"`device_map` must .*, got {place} for some. Use one device"):
            AutoModelForCausalLM.from_pretrained(
                unreadable, quantization_config=D2QuantConfig(2, 8), device_map=device_map
            )

    def test_one_device_is_accepted(self, calls, models, config):
        model = AutoModelForCausalLM.from_pretrained(models / "student", quantization_config=config, device_map="cpu")
        assert len(packed(model)) == 13

    def test_where_it_is_computed_is_not_stored(self, models, tmp_path):
        tokens = torch.arange(64).view(2, 32) + 3
        settings = {"group_size": 16, "dataset": tokens, "num_samples": 2, "seq_length": 32, "iterations": 0}
        plain, moved = (
            AutoModelForCausalLM.from_pretrained(
                models / "student", quantization_config=D2QuantConfig(tune_epochs=1, **settings, **where)
            )
            for where in ({}, {"device": "cpu:0", "offload": "disk", "report_errors": False})
        )
        state = moved.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
        moved.save_pretrained(tmp_path / "packed")
        stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
        assert not {"device", "offload", "report_errors"} & stored.keys()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").hf_quantizer.quantization_config
        assert (loaded.device, loaded.offload, loaded.report_errors) == (None, None, True)


class TestParallel:
    """What a rank would hold of packed words, cut along their rows, is no part of the weight."""

    @pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"ep_size": 2}, {"tp_size": 2, "ep_size": 2}])
    def test_cut_layers_are_refused(self, saved, sizes):
        distributed = SimpleNamespace(**{"tp_size": 1, "ep_size": 1, "fsdp_size": 2, "pp_size": 1} | sizes)
        config = AutoConfig.from_pretrained(saved[1])
        config.distributed_config = distributed
        first, value = next(iter(sizes.items()))
        with pytest.raises(ValueError, match=f"`{first}` must be 1 for packed weights, .*got {value}. .*`device_map"):
            D2QuantHfQuantizer(saved[0].config.quantization_config).update_attn_implementation(config)

    @pytest.mark.parametrize("size", ["tp_size", "ep_size", "fsdp_size", "pp_size"])
    def test_quantizing_on_ranks_is_refused(self, config, models, size):
        model_config = AutoConfig.from_pretrained(models / "student")
        model_config.distributed_config = SimpleNamespace(**{size: 2})
        with pytest.raises(ValueError, match=f"`{size}` must be 1 while a model is quantized, got 2"):
            D2QuantHfQuantizer(config, pre_quantized=False).update_attn_implementation(model_config)

    def test_one_rank_is_accepted(self, saved, config):
        model_config = AutoConfig.from_pretrained(saved[1])
        model_config.distributed_config = SimpleNamespace(tp_size=1, ep_size=None, fsdp_size=2, pp_size=1)
        quantizer = D2QuantHfQuantizer(saved[0].config.quantization_config)
        assert quantizer.update_attn_implementation(model_config) is model_config


class TestDamage:
    def test_every_tensor_is_guarded(self, saved, folder):
        model, data = saved[0], (folder / FILE).read_bytes()
        stated = model.config.quantization_config.integrity
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__")
        assert len(header) == 50
        integrity.check_tensors([str(folder / FILE)], stated, model)
        for name, entry in header.items():
            position = start + sum(entry["data_offsets"]) // 2
            (folder / FILE).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            part = name[: len("model.layers.0")] if ".layers." in name else name
            with pytest.raises(ValueError, match=f"`{part}` in {FILE} is not what was saved.* Copy or download"):
                integrity.check_tensors([str(folder / FILE)], stated, model)

    @pytest.mark.parametrize(
        ("name", "dtypes"),
        [
            (f"{SCALED}.weight_scale", ("F16", "BF16")),
            (f"{SCALED}.weight", ("I32", "F32")),
            ("lm_head.weight", ("F32", "I32")),
        ],
    )
    def test_dtypes_are_guarded(self, folder, name, dtypes):
        tensors, metadata = read(folder / FILE)
        kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32}
        assert tensors[name].dtype == kinds[dtypes[0]]
        tensors[name] = tensors[name].view(kinds[dtypes[1]])
        save_file(tensors, folder / FILE, metadata)
        with pytest.raises(ValueError, match="is not what was saved"):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_swapped_tensors(self, folder):
        tensors, metadata = read(folder / FILE)
        names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(2)]
        tensors |= dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))
        save_file(tensors, folder / FILE, metadata)
        with pytest.raises(ValueError, match="`model.layers.0` in model.safetensors is not what was saved"):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_flipped_bit_stops_loading(self, folder):
        data = bytearray((folder / FILE).read_bytes())
        data[-1] ^= 128
        (folder / FILE).write_bytes(data)
        with pytest.raises(ValueError, match="is not what was saved"):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("kept", [0, 4, 1000, -1])
    def test_file_cut_short(self, folder, kept):
        (folder / FILE).write_bytes((folder / FILE).read_bytes()[:kept])
        with pytest.raises(ValueError, match=f"{FILE} cannot be read, it is cut short or damaged: .* Copy or"):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("missing", "complaint"),
        [
            (f"{SCALED}.weight", "`model.layers.1` in model.safetensors is not what was saved: .* incomplete"),
            (f"{SCALED}.input_scale", "`model.layers.1` in model.safetensors is not what was saved: .* incomplete"),
            ("model.norm.weight", "lacks `model.norm.weight`. Copy or"),
        ],
    )
    def test_missing_tensor(self, folder, missing, complaint):
        tensors, metadata = read(folder / FILE)
        del tensors[missing]
        save_file(tensors, folder / FILE, metadata)
        with pytest.raises(ValueError, match=complaint):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_tensor_that_was_not_saved(self, folder):
        tensors, metadata = read(folder / FILE)
        save_file({**tensors, "extra": torch.zeros(1)}, folder / FILE, metadata)
        with pytest.raises(ValueError, match="`extra` in model.safetensors is not what was saved"):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("part", ["weight", "weight_scale"])
    def test_wrong_shape(self, folder, part):
        tensors, metadata = read(folder / FILE)
        tensors[f"{SCALED}.{part}"] = tensors[f"{SCALED}.{part}"][..., :-1].contiguous()
        save_file(tensors, folder / FILE, metadata)
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError, match="`model.layers.1` in model.safetensors is not what was saved"):
                AutoModelForCausalLM.from_pretrained(folder, **options)

    @pytest.mark.parametrize("part", ["weight", "weight_scale"])
    def test_missing_tensor_that_the_caller_passes(self, saved, part):
        """Tensors that come from no file are not compared with the checksums, and yet none is drawn at random."""
        model, folder = saved
        tensors = dict(model.state_dict())
        config = AutoConfig.from_pretrained(folder)
        loaded = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors))
        assert_same(loaded, model)
        del tensors[f"{SCALED}.{part}"]
        with pytest.raises(ValueError, match=f"The checkpoint has no `{SCALED}.{part}`"):
            LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)

    def test_file_that_another_program_wrote_with_the_same_tensors(self, saved, folder):
        tensors, _ = read(folder / FILE)
        save_file(tensors, folder / FILE, {"written": "elsewhere", "format": "pt"})
        assert_same(AutoModelForCausalLM.from_pretrained(folder), saved[0])

    def test_shards_are_named(self, saved, tmp_path):
        saved[0].save_pretrained(tmp_path, max_shard_size="20KB")
        name = "model.layers.1.mlp.up_proj.weight"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        file = index["weight_map"][name]
        tensors, metadata = read(tmp_path / file)
        tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, tmp_path / file, metadata)
        with pytest.raises(ValueError, match=f"`model.layers.1` in .*{file}.* is not what was saved"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_missing_shard(self, saved, tmp_path):
        saved[0].save_pretrained(tmp_path, max_shard_size="20KB")
        next(tmp_path.glob("model-00002-*")).unlink()
        with pytest.raises((OSError, ValueError), match="model-00002-of"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def edited(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return {"affine": "midrise", "float16": "bfloat16"}.get(value, value + "x")
    if isinstance(value, list):
        return value[:-1] or ["layers.1.mlp.up_proj"]
    if isinstance(value, dict):
        return {**value, next(iter(value), "a"): edited(next(iter(value.values()), 1))}
    return 1


class TestEditedConfiguration:
    """Of the two dictionaries in `config.json`, no entry changes what is loaded without being noticed."""

    def entries(self, folder):
        config = json.loads((folder / "config.json").read_text())
        return [(key,) for key in config] + [("quantization_config", key) for key in config["quantization_config"]]

    def change(self, folder, path, function):
        def edit(config):
            *parents, last = path
            for key in parents:
                config = config[key]
            function(config, last)

        edit_config(folder, edit)

    @pytest.mark.parametrize("how", ["edited", "removed"])
    def test_every_entry(self, saved, folder, how):
        before = (folder / "config.json").read_text()
        loaded = []
        for path in self.entries(folder):
            if path in (("quantization_config",), ("quantization_config", "quant_method")):
                continue  # then it is another method, or none: transformers refuses the packed words
            if how == "edited":
                self.change(folder, path, lambda config, key: config.update({key: edited(config[key])}))
            else:
                self.change(folder, path, lambda config, key: config.pop(key))
            try:
                model = AutoModelForCausalLM.from_pretrained(folder)
            except Exception as error:
                assert str(error), path
            else:
                loaded.append(path)
                assert_same(model, saved[0])
                assert torch.equal(logits(model), logits(saved[0])), path
            (folder / "config.json").write_text(before)
        if how == "edited":  # an entry with the default value may also be left out
            assert {path for (path, *_) in loaded} <= {*VOLATILE, *integrity.FREE}, loaded

    @pytest.mark.parametrize("key", ["transformers_version", "use_cache", "_name_or_path", "architectures"])
    def test_what_changes_no_number_may_change(self, saved, folder, key):
        edit_config(folder, lambda config: config.update({key: False if key == "use_cache" else ["x"]}))
        if key == "transformers_version":
            edit_config(folder, lambda config: config.update({key: "5.0.0"}))
        assert_same(AutoModelForCausalLM.from_pretrained(folder), saved[0])

    def test_entry_is_named_with_both_values(self, folder):
        edit_config(folder, lambda config: config["rope_parameters"].update(rope_theta=500.0))
        with pytest.raises(ValueError, match="`rope_parameters.rope_theta` is 500.0 and was 10000.0. Restore"):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_argument_of_the_caller_is_named(self, saved):
        options = {
            "attn_implementation": "eager",
            "use_cache": False,
            "output_hidden_states": True,
            "dtype": "float32",
        }
        AutoModelForCausalLM.from_pretrained(saved[1], **options)
        with pytest.raises(ValueError, match="`rms_norm_eps` is 0.1 and was 1e-06. .* do not pass it to `from_pretr"):
            AutoModelForCausalLM.from_pretrained(saved[1], rms_norm_eps=0.1)

    @pytest.mark.parametrize("dtype", [True, "int8", "float8_e5m2x"])
    def test_dtype_that_is_none(self, folder, dtype):
        edit_config(folder, lambda config: config.update(dtype=dtype))
        with pytest.raises(
            (ValueError, AttributeError), match="must be a floating-point dtype, got|no attribute 'floa"
        ):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("file", ["another text", 3, None, ["x"], FILE])
    def test_file_of_weights_that_is_none(self, saved, folder, file):
        edit_config(folder, lambda config: config.update(transformers_weights=file))
        assert_same(AutoModelForCausalLM.from_pretrained(folder), saved[0])

    @pytest.mark.parametrize("references", [[], ["x"], {"AutoModel": None}])
    def test_code_that_is_not_named(self, saved, folder, references):
        edit_config(folder, lambda config: config.update(auto_map=references))
        assert_same(AutoModelForCausalLM.from_pretrained(folder), saved[0])

    def test_numbers_that_json_lacks(self, saved, tmp_path):
        model = copy.deepcopy(saved[0])
        model.config.limits = {"low": 0.0, "high": float("inf"), "none": float("nan")}
        model.save_pretrained(tmp_path)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    def test_head_of_another_kind(self, saved):
        model = AutoModelForSequenceClassification.from_pretrained(saved[1], num_labels=3)
        assert_same(model.model, saved[0].model)

    @pytest.mark.parametrize("removed", ["integrity", "checksum"])
    def test_checksums_are_required(self, folder, removed):
        def remove(config):
            settings = config["quantization_config"]
            (settings if removed == "integrity" else settings["integrity"]).pop(removed)

        edit_config(folder, remove)
        with pytest.raises(ValueError, match="no `integrity`.* Save the|checksum is missing or differs. Copy or"):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("entry", "value", "complaint"),
        [
            ("num_hidden_layers", 100_000, "`num_hidden_layers` is 100000 and was 2"),
            ("hidden_size", 10**9, "`hidden_size` is 1000000000 and was 32"),
            ("vocab_size", 10**10, "`vocab_size` is 10000000000 and was 259"),
        ],
    )
    def test_size_is_refused_before_the_model_is_built(self, folder, monkeypatch, entry, value, complaint):
        monkeypatch.setattr(LlamaForCausalLM, "__init__", None)
        edit_config(folder, lambda config: config.update({entry: value}))
        with pytest.raises(ValueError, match=complaint):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_forged_number_of_blocks_is_refused_before_the_model_is_built(self, folder, monkeypatch):
        monkeypatch.setattr(LlamaForCausalLM, "__init__", None)
        forge(folder, lambda entries: entries.update(num_hidden_layers=100_000))
        with pytest.raises(ValueError, match="describes 100000 blocks, and the checkpoint has"):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("entry", ["vocab_size", "intermediate_size"])
    def test_forged_size_is_refused_before_anything_is_allocated(self, folder, entry):
        forge(folder, lambda entries: entries.update({entry: 10**9}))
        with pytest.raises(ValueError, match=r"a model of \d{11,} numbers, the files hold \d{5}\. Copy or"):
            AutoModelForCausalLM.from_pretrained(folder)


class TestFamilies:
    SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}

    @pytest.mark.parametrize(
        ("family", "options"),
        [
            ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # its experts have other names in files
            ("gemma3_text", {"head_dim": 16}),  # tied
            ("gpt_neox", {}),
        ],
    )
    @pytest.mark.parametrize("shard", ["1GB", "20KB"])
    def test_every_tensor_comes_back(self, tmp_path, family, options, shard):
        torch.manual_seed(0)
        sizes = {**self.SIZES, "vocab_size": 96, "num_hidden_layers": 2, **options}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
        tokens = torch.randint(0, 90, (2, 16))
        data = {"dataset": tokens, "num_samples": 2, "seq_length": 16, "tune_epochs": 0}
        quantize_model(model, None, D2QuantConfig(2, 16, rounding="rtn", iterations=1, **data))
        model.save_pretrained(tmp_path, max_shard_size=shard)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        file = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"in .*{file.name}.* is not what was saved"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


class TestSaveQuantized:
    def test_full_disk_leaves_nothing(self, saved, tmp_path, monkeypatch):
        def write_half(tensors, filename, metadata):
            Path(filename).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", write_half)
        with pytest.raises(OSError, match="No space left on device.*model") as caught:
            save_quantized(saved[0], tmp_path / "model")
        assert caught.value.errno == errno.ENOSPC
        assert list(tmp_path.iterdir()) == []

    def test_equal_models_give_equal_files(self, saved, tokenizer, tmp_path):
        for number in range(4):  # of two entries in the metadata of a file, the order would be drawn each time
            save_quantized(saved[0], tmp_path / str(number), tokenizer=tokenizer)
        files = [{path.name: path.read_bytes() for path in sorted(folder.iterdir())} for folder in tmp_path.iterdir()]
        assert files[0][FILE] and files == 4 * [files[0]]

    @pytest.mark.parametrize("name", ["lm_head.weight", f"{SCALED}.weight_scale"])
    def test_number_that_is_not_finite(self, saved, tmp_path, name):
        model = copy.deepcopy(saved[0])
        model.get_parameter(name).data.view(-1)[3] = float("nan")
        with pytest.raises(ValueError, match=f"`{name}` holds NaN or infinity.* It is not saved"):
            save_quantized(model, tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    def test_files_that_are_not_saved_have_no_checksum(self, saved, tmp_path):
        model = copy.deepcopy(saved[0])
        model._keys_to_ignore_on_save = {"model.norm.weight"}
        model.save_pretrained(tmp_path)
        assert "model.norm.weight" not in read(tmp_path / FILE)[0]
        assert "model.norm.weight" not in model.config.quantization_config.integrity["tensors"]

    @pytest.mark.parametrize("mine", ["model", "model/notes"])
    def test_what_is_there_is_kept(self, saved, tmp_path, mine):
        (tmp_path / mine).parent.mkdir(exist_ok=True)
        (tmp_path / mine).write_text("mine")
        with pytest.raises(FileExistsError, match="`path` must be a new or empty folder, got .*. Name another one"):
            save_quantized(saved[0], tmp_path / "model")
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / mine]
        assert (tmp_path / mine).read_text() == "mine"

    def test_empty_folder_is_used(self, saved, tmp_path):
        (tmp_path / "model").mkdir()
        save_quantized(saved[0], tmp_path / "model")
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), saved[0])

    def test_model_in_full_precision_is_refused(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="must be quantized, got a LlamaForCausalLM that is not. Call"):
            save_quantized(build_model(tokenizer, seed=1), tmp_path / "model")

    def test_adapter_is_refused(self, saved, tmp_path):
        model = get_peft_model(copy.deepcopy(saved[0]), LoraConfig(target_modules="all-linear"))
        with pytest.raises(TypeError, match="`PreTrainedModel`, got PeftModel. Save an adapter with its own"):
            save_quantized(model, tmp_path / "model")
        assert list(tmp_path.iterdir()) == []


class TestForeignProcess:
    CODE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM

*folders, want, again = sys.argv[1:]
ids, want = torch.load(want)
options = ({}, {"ignore_mismatched_sizes": True}, {"trust_remote_code": False}, {"dtype": "bfloat16"})
for auto_class, folder in zip((AutoModelForCausalLM, AutoModelForCausalLM, AutoModel), folders, strict=True):
    for given in options:
        try:
            auto_class.from_pretrained(folder, **given)
        except ValueError as error:
            assert str(error).endswith("run `import trl_gopd` first, or pass `trust_remote_code=True`"), error
        else:
            raise SystemExit(f"it loaded a model that it cannot know, with {given}")
from transformers.quantizers import auto
assert "trl_gopd" not in sys.modules and "d2quant" not in auto.AUTO_QUANTIZER_MAPPING

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "d2quant" in auto.AUTO_QUANTIZER_MAPPING and "d2quant" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert torch.equal(model(ids).logits, want)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)

# saved from here, it can be loaded in this way again
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert torch.equal(model(ids).logits, want)
base = AutoModel.from_pretrained(again, trust_remote_code=True)
assert "modeling_d2quant" in type(base).__module__, type(base).__module__
"""

    def test_refuses_or_trusts(self, saved, tmp_path):
        model, folder = saved
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        model.save_pretrained(tmp_path / "plain")
        folders = [folder, tmp_path / "shards", tmp_path / "plain"]
        torch.save((IDS, logits(model)), tmp_path / "want.pt")
        result = subprocess.run(
            [sys.executable, "-c", self.CODE, *map(str, [*folders, tmp_path / "want.pt", tmp_path / "again"])],
            env={
                **os.environ,
                "HF_MODULES_CACHE": str(tmp_path / "modules"),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(trl_gopd.__file__).parents[1]),
            },
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr[-2000:]


class TestAdapters:
    @pytest.fixture
    def model(self, saved):
        base = AutoModelForCausalLM.from_pretrained(saved[1])
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))

    def test_all_linears_get_one(self, model):
        wrapped = {name for name, module in packed(model).items() if name.endswith(".base_layer")}
        assert len(wrapped) == 13

    def test_trainer_moves_the_adapter_alone(self, model, tmp_path):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
        Trainer(model, arguments, train_dataset=rows).train()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) is not (".lora_" in name), name

    def test_adapter_comes_back(self, model, saved, tmp_path):
        model.save_pretrained(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(saved[1])
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))
        assert not torch.equal(logits(model), logits(saved[0]))

    def test_adapter_of_transformers_is_saved_alone(self, saved, tmp_path):
        """One that `add_adapter` made, of a model that is no `PeftModel`."""
        model = AutoModelForCausalLM.from_pretrained(saved[1])
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path)
        tensors, metadata = read(tmp_path / "adapter_model.safetensors")
        assert len(tensors) == 4
        assert metadata == {"format": "pt"}
        again = AutoModelForCausalLM.from_pretrained(saved[1])
        again.load_adapter(str(tmp_path))
        assert torch.equal(logits(again), logits(model))

    def test_merging_after_dequantizing_is_exact(self, model):
        want = logits(model)
        model.base_model.model.dequantize()
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not [name for name in trainable if ".base_layer." in name]
        merged = model.merge_and_unload()
        assert isinstance(merged, LlamaForCausalLM)
        # as above: float32 in another order
        assert (logits(merged) - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()
