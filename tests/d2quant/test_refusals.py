"""
What is refused is refused before anything changes: each row of the table is a model and a configuration that do not go
together, the message names the field to change, and all tensors, names and settings of the model stay as they were.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from tests.tiny import build_model
from trl_gopd.d2quant.config import D2QuantConfig
from trl_gopd.d2quant.quantize import quantize_model


TOKENS = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
DATA = {"dataset": TOKENS, "num_samples": 4, "seq_length": 16, "tune_epochs": 0}
SMALL = {**DATA, "bits": 2, "group_size": 16, "iterations": 1}


def llama(tokenizer, edit=None, **options):
    model = build_model(tokenizer, seed=1, **options)
    if edit is not None:
        edit(model)
    return model


def gemma(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3_text", **sizes, num_key_value_heads=1, head_dim=16, vocab_size=259)
    return AutoModelForCausalLM.from_config(config).eval()


def opt(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(vocab_size=259, num_hidden_layers=1, num_attention_heads=2, **sizes)).eval()


def overflowing_head(model):
    """Each number is finite, and so is each of the fused head; those of the rotated one are not."""
    model.half()
    model.model.norm.weight.data.fill_(2.0)
    model.lm_head.weight.data.fill_(30_000.0)


def overflowing_norm(model):
    model.model.layers[1].input_layernorm.weight.data.fill_(1e30)
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(1e30)


def vanishing_norm(model):
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(1e-12)


def overflowing_embedding(model):
    """But not for the first tokens, with which the topology is found."""
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 40)
    model.model.embed_tokens.weight.data[10:] = 3e37


def nan_in(name):
    def edit(model):
        model.get_parameter(name).data.view(-1)[3] = float("nan")

    return edit


def tiny_linear(model):
    model.model.layers[1].mlp.up_proj.weight.data *= 1e-12


PAPER = D2QuantConfig.paper
REFUSED = {
    "group does not divide": (
        lambda t: llama(t, hidden_size=96),
        lambda: PAPER(group_size=64, **DATA),
        r"`group_size` must divide the hidden size 96 with `rotation='group'`, got 64. .*`rotation=None`",
    ),
    "group too wide": (llama, lambda: D2QuantConfig(2, 48, **DATA), "`group_size` must be .* got 48 and"),
    "rotation of a sandwich": (gemma, lambda: PAPER(group_size=16, **DATA), "survive a rotation, .*`rotation=None`"),
    "rotation of LayerNorms": (opt, lambda: PAPER(group_size=16, **DATA), "survive a rotation, .*`rotation=None`"),
    "rotation comes before windows": (
        gemma,
        lambda: PAPER(group_size=16, dataset=None),
        "survive a rotation, .*`rotation=None`",
    ),
    "rotated head overflows": (
        lambda t: llama(t, overflowing_head),
        lambda: D2QuantConfig(**SMALL, rotation="full", scale_dtype="float32"),
        r"`lm_head.weight` would hold NaN or infinity, in torch.float16, after `rotation`. Load",
    ),
    "fused linear overflows": (
        lambda t: llama(t, overflowing_norm),
        lambda: D2QuantConfig(**SMALL, rotation="group", scale_dtype="bfloat16"),
        r"`model.layers.1.self_attn.q_proj.weight` would hold NaN or infinity",
    ),
    "scales of a fused linear vanish": (
        lambda t: llama(t, vanishing_norm),
        lambda: D2QuantConfig(**SMALL, rotation="full"),
        r"`scale_dtype` must hold .* got 'float16' and `model.layers.1.mlp.gate_proj` with weights up to",
    ),
    "embedding overflows, rotated": (
        lambda t: llama(t, overflowing_embedding),
        lambda: D2QuantConfig(**SMALL, rotation="full", embedding_bits=None),
        "hidden states before the first block are not finite",
    ),
    "scales vanish": (
        lambda t: llama(t, tiny_linear),
        lambda: D2QuantConfig(**SMALL),
        "`scale_dtype` must hold .* got 'float16' and `model.layers.1.mlp.up_proj`.* Use 'bfloat16' or 'float32'",
    ),
    "NaN in the head": (
        lambda t: llama(t, nan_in("lm_head.weight")),
        lambda: D2QuantConfig(**SMALL),
        "`lm_head.weight` holds NaN or infinity",
    ),
    "no such module": (
        llama,
        lambda: D2QuantConfig(**SMALL, modules_to_not_convert=["mlp.down"], rotation="full"),
        "`modules_to_not_convert` names .* 'mlp.down'. The nearest name is 'mlp.down_proj'",
    ),
    "nothing is left": (
        llama,
        lambda: D2QuantConfig(**SMALL, modules_to_not_convert=["layers"]),
        r"`modules_to_not_convert` \['layers'\] leaves no linear layer",
    ),
    "too few windows": (
        llama,
        lambda: D2QuantConfig(**{**SMALL, "num_samples": 5}, rotation="full"),
        "5 windows of 16 tokens .`num_samples`, `seq_length`., got 4",
    ),
    "id outside of the vocabulary": (
        llama,
        lambda: D2QuantConfig(**{**SMALL, "dataset": torch.full((4, 16), 300)}, rotation="full"),
        "from 0 to 258, .* got 300",
    ),
    "no tokenizer": (llama, lambda: D2QuantConfig(**{**SMALL, "dataset": ["text"]}), "needs a `tokenizer`, got None"),
    "no text": (
        llama,
        lambda: D2QuantConfig(**{**SMALL, "dataset": "nowhere.txt"}, rotation="full"),
        "no text file 'nowhere.txt'",
    ),
    "work_dir is a file": (
        llama,
        lambda: D2QuantConfig(**SMALL, rotation="full", work_dir=__file__),
        "test_refusals.py",
    ),
    "WikiText-2 offline": (
        llama,
        lambda: PAPER(group_size=16, tune_epochs=0),
        r"WikiText-2 \(Salesforce/wikitext\) could not be loaded",
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_nothing_changes(row, tokenizer):
    build, build_config, complaint = REFUSED[row]
    model, config = build(tokenizer), build_config()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings, text = vars(copy.deepcopy(config)), model.config.to_json_string()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises((TypeError, ValueError, OSError), match=complaint):
        quantize_model(model, None, config)
    after = model.state_dict()
    assert after.keys() == before.keys()
    # as bytes, since NaN differs from itself
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert model.config.to_json_string() == text
    assert vars(config) == settings
    assert not getattr(model, "is_quantized", False)


def test_the_check_sees_a_change(tokenizer):
    """A rotation that is not refused changes the tensors."""
    model = llama(tokenizer)
    before = model.lm_head.weight.clone()
    quantize_model(model, None, D2QuantConfig(**SMALL, rotation="full", rounding="rtn"))
    assert not torch.equal(model.lm_head.weight, before)
