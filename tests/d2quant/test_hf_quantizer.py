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

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import trl_gopd
from tests.tiny import build_model
from trl_gopd.d2quant import hf_quantizer, pipeline
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.hf_quantizer import mark_quantized, save_quantized
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model
from trl_gopd.d2quant.rounding import round_weight


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
        assert (stored["quant_method"], stored["format_version"]) == ("d2quant", 1)
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
        assert read(tmp_path / FILE)[1] == read(folder / FILE)[1]
        # and refers to no code, since none is saved along
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())

    def test_newer_format_asks_for_an_upgrade(self, folder):
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
        with pytest.raises(ValueError, match="written by a newer trl_gopd.* Upgrade"):
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

    def test_bias_without_a_place_is_said(self, saved, caplog, monkeypatch):
        monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
        AutoModelForCausalLM.from_pretrained(saved[1]).dequantize()
        assert "4 linears of the dense model have a bias, such as `model.layers.0.mlp.gate_proj`" in caplog.text

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

    def test_family_without_linears(self, tmp_path):
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1))
        gpt2.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="must have `torch.nn.Linear` layers in its blocks, got GPT2LMHeadModel"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=D2QuantConfig(2, 8))

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


class TestDamage:
    def test_every_tensor_is_guarded(self, folder):
        data = (folder / FILE).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__")
        assert len(header) == 50
        for name, entry in header.items():
            position = start + sum(entry["data_offsets"]) // 2
            (folder / FILE).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            with pytest.raises(ValueError, match=f"`{name}` in .*{FILE} is not what was saved.* Copy or download"):
                hf_quantizer._verify([str(folder / FILE)])

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

    @pytest.mark.parametrize("missing", [f"{SCALED}.weight", "model.norm.weight"])
    def test_missing_tensor(self, folder, missing):
        tensors, metadata = read(folder / FILE)
        del tensors[missing]
        save_file(tensors, folder / FILE, metadata)
        with pytest.raises(ValueError, match=f"lacks 1 tensors, such as `{missing}`. Copy or"):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("part", ["weight", "weight_scale", "input_scale"])
    def test_missing_tensor_without_checksums(self, folder, part):
        """Other programs write the file without our metadata."""
        tensors, _ = read(folder / FILE)
        del tensors[f"{SCALED}.{part}"]
        save_file(tensors, folder / FILE, {"format": "pt"})
        with pytest.raises(ValueError, match=f"The checkpoint has no `{SCALED}.{part}`"):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("part", ["weight", "weight_scale"])
    def test_wrong_shape(self, folder, part):
        tensors, _ = read(folder / FILE)
        tensors[f"{SCALED}.{part}"] = tensors[f"{SCALED}.{part}"][..., :-1].contiguous()
        save_file(tensors, folder / FILE, {"format": "pt"})
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match=f"no `{SCALED}.{part}`, or one of another shape"):
            AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)

    def test_checksums_are_not_required(self, saved, folder):
        tensors, _ = read(folder / FILE)
        save_file(tensors, folder / FILE, {"format": "pt"})
        assert_same(AutoModelForCausalLM.from_pretrained(folder), saved[0])

    def test_missing_shard(self, saved, tmp_path):
        saved[0].save_pretrained(tmp_path, max_shard_size="20KB")
        next(tmp_path.glob("model-00002-*")).unlink()
        with pytest.raises((OSError, ValueError), match="model-00002-of"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


class TestSaveQuantized:
    def test_full_disk_leaves_nothing(self, saved, tmp_path, monkeypatch):
        def write_half(tensors, filename, metadata):
            Path(filename).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", write_half)
        with pytest.raises(OSError, match="No space left on device"):
            save_quantized(saved[0], tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

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

folder, ids, want, again = sys.argv[1], *torch.load(sys.argv[2]), sys.argv[3]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except RuntimeError as error:
    assert "ignore_mismatched_sizes" in str(error), error
else:
    raise SystemExit("it loaded a model that it cannot know")
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
        torch.save((IDS, logits(model)), tmp_path / "want.pt")
        result = subprocess.run(
            [sys.executable, "-c", self.CODE, str(folder), str(tmp_path / "want.pt"), str(tmp_path / "again")],
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

    def test_merging_into_packed_words_fails(self, model):
        with pytest.raises(RuntimeError):
            model.merge_and_unload()

    def test_merging_after_dequantizing_is_exact(self, model):
        want = logits(model)
        model.base_model.model.dequantize()
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not [name for name in trainable if ".base_layer." in name]
        merged = model.merge_and_unload()
        assert isinstance(merged, LlamaForCausalLM)
        # as above: float32 in another order
        assert (logits(merged) - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()
