"""
What families do to their logits is read from their configuration, and a model whose logits are anything else is
refused, in the dtypes in which models are trained and scored.
"""

import functools

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.gopd.test_scoring import SMALL
from trl_gopd.gopd.frozen import head
from trl_gopd.gopd.frozen.head import check_head, logit_transform
from trl_gopd.gopd.frozen.local import FrozenModel, project


# Families that do something to their logits, and what.
FAMILIES = {
    "llama": ({}, (1.0, None)),
    "cohere": ({"logit_scale": 0.0625}, (0.0625, None)),
    "granite": ({"logits_scaling": 8.0}, (0.125, None)),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 30.0}, (1.0, 30.0)),
    "recurrent_gemma": ({"lru_width": 32, "attention_window_size": 8, "head_dim": 8}, (1.0, 30.0)),
    "nanochat": ({}, (1.0, 15.0)),
    "hyperclovax": ({"logits_scaling": 0.5}, (0.5, None)),
    # its configuration has a scale that its forward does not read
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "logit_scale": "inv_sqrt_d_model"}, (1.0, None)),
}


def build(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SMALL, **FAMILIES[family][0])
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def predicting(frozen):
    """Hidden states from which the last ids are predicted, as scorers give them."""
    return lambda ids, mask, num_tokens: frozen(ids)[:, -num_tokens - 1 : -1]


def check(model, **options):
    frozen = FrozenModel(model)
    options = {"project": functools.partial(project, frozen.head), "transform": frozen.transform, **options}
    check_head(model, frozen.base, role="teacher_model", hidden=predicting(frozen), **options)


def changed(model, change):
    """The model, whose forward changes its logits in a way that its configuration does not say."""
    forward = model.forward

    def other(*args, **kwargs):
        output = forward(*args, **kwargs)
        if "logits" in output:  # which that of TRL's fused head has not
            output.logits = change(output.logits)
        return output

    model.forward = other
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(family, dtype):
    model = build(family, dtype)
    transform = logit_transform(model.config)
    assert (transform.scale, transform.softcap) == FAMILIES[family][1]
    check(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda logits: logits * 1.3, id="scale"),
        pytest.param(lambda logits: logits * 1.02, id="scale near 1"),
        pytest.param(lambda logits: 50 * torch.tanh(logits / 50), id="soft cap"),
        pytest.param(lambda logits: logits + torch.linspace(0, 20, logits.size(-1)).to(logits), id="bias"),
    ],
)
def test_refuses_other_logits(change, dtype):
    with pytest.raises(ValueError, match=r"logits of `teacher_model` \(LlamaForCausalLM\).*Use another model family"):
        check(changed(build("llama", dtype), change))


def test_refuses_other_logits_of_a_head_without_size():
    model = build("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    check(model)
    with pytest.raises(ValueError, match="not a linear head"):
        check(changed(model, lambda logits: logits + 1))


@pytest.mark.parametrize("family", ["recurrent_gemma", "nanochat"])
def test_refuses_a_soft_cap_that_nobody_knows(family, monkeypatch):
    monkeypatch.setattr(head, "SOFT_CAPS", ())
    with pytest.raises(ValueError, match="not a linear head"):
        check(build(family, torch.bfloat16))


def test_refuses_fewer_logits_than_the_head_has():
    with pytest.raises(ValueError, match="it has 50 logits a token, and its head 61"):
        check(changed(build("llama"), lambda logits: logits[..., :50]))


def test_refuses_other_hidden_states():
    """Those of a prompt-learning adapter, for example, which the backbone alone does not know."""
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    frozen = FrozenModel(model)
    with pytest.raises(ValueError, match=r"hidden states of the shape \(1, 5, 32\), and not \(1, 3, 32\)"):
        check_head(
            model,
            frozen.base,
            project=functools.partial(project, frozen.head),
            transform=frozen.transform,
            role="teacher_model",
            hidden=predicting(frozen),
        )


def test_leaves_the_model_as_it_was():
    model = build("llama").train()
    ids = torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(ValueError, match="not a linear head"):
            check_head(
                model,
                model,
                project=lambda hidden: 2 * model.lm_head(hidden),
                transform=logit_transform(model.config),
                role="model",
            )
        assert torch.equal(model(ids).logits, before) and model.training
