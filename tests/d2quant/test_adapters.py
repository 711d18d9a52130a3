"""
Merging an adapter into packed words is refused by every kind of adapter, before a word changes, and says what to do;
after dequantizing it is exact.
"""

import copy
import inspect
import pickle

import pytest
import torch
from peft import OFTConfig, PeftMixedModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.tiny import build_model
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.linear import D2QuantLinear
from trl_gopd.d2quant.quantize import quantize_model


IDS = torch.arange(3, 40)[None]
# q_proj and o_proj are square: some adapters only fail by their shapes
COMMON = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4, "variant": "road_1"},
    "SHIRA": {"r": 1},
    "VBLORA": {"vector_length": 4, "num_vectors": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 8},
}
# Those that can be added to packed layers today. Others compute with the dense weight when they are made, and fail.
MERGED = (
    "LORA",
    "ADALORA",
    "BOFT",
    "C3A",
    "FOURIERFT",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LILY",
    "LOHA",
    "LOKR",
    "MISS",
)
MERGED += ("OFT", "PEANUT", "POLY", "PVERA", "RANDLORA", "ROAD", "SHIRA", "UNILORA", "VBLORA", "VERA", "WAVEFT")


@pytest.fixture(scope="module")
def packed(tokenizer):
    """Not to be changed."""
    model = build_model(tokenizer, seed=1)
    data = {"dataset": IDS, "num_samples": 1, "seq_length": 16, "tune_epochs": 0, "iterations": 1}
    quantize_model(model, None, D2QuantConfig(2, 16, rounding="rtn", **data))
    return model


@pytest.fixture
def model(packed):
    return copy.deepcopy(packed)


def words(model):
    return [module.weight.detach().clone() for module in model.modules() if isinstance(module, D2QuantLinear)]


@torch.no_grad()
def move(model):
    """Away from the identity, that most adapters are at first."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", sorted(PEFT_TYPE_TO_CONFIG_MAPPING, key=str))
@pytest.mark.filterwarnings("ignore")
def test_merging_is_refused(kind, model):
    config_class, before = PEFT_TYPE_TO_CONFIG_MAPPING[kind], words(model)
    known = inspect.signature(config_class).parameters
    options = {**COMMON, **OPTIONS.get(kind.value, {})}
    try:
        adapted = get_peft_model(model, config_class(**{key: v for key, v in options.items() if key in known}))
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        assert kind.value not in MERGED
        return
    if not any(isinstance(module, BaseTunerLayer) for module in adapted.modules()):
        return  # it adds nothing to linears
    move(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises((ValueError, NotImplementedError)) as refused:
            merge()
        if kind.value in MERGED:
            assert "adapter cannot be merged into packed weights. Call `model.dequantize()`" in str(refused.value)
        assert all(map(torch.equal, words(model), before))


@pytest.mark.filterwarnings("ignore")
def test_mixed_adapters_are_refused(model):
    config = OFTConfig(oft_block_size=4, **COMMON)
    adapted, before = PeftMixedModel(model, config), words(model)
    move(adapted)
    with pytest.raises(ValueError, match="cannot be merged into packed weights"):
        adapted.merge_and_unload()
    assert all(map(torch.equal, words(model), before))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_merging_after_dequantizing_is_exact(model, copied):
    adapted = copied(get_peft_model(model, OFTConfig(oft_block_size=4, **COMMON)))
    move(adapted)
    with pytest.raises(ValueError, match="cannot be merged into packed weights"):
        adapted.merge_and_unload()
    with torch.no_grad():
        want = adapted(IDS).logits
        adapted.base_model.model.dequantize()
        merged = adapted.merge_and_unload()
        # float32 in another order of summation: at most a few dozen roundings in a row
        assert (merged(IDS).logits - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_dense_layers_are_merged(model, tokenizer):
    dense = build_model(tokenizer, seed=1)
    adapted = get_peft_model(dense, OFTConfig(oft_block_size=4, **COMMON))
    move(adapted)
    before = dense.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    assert not torch.equal(adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight, before)
