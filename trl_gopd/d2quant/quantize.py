"""Quantizes a model in memory, and makes transformers know that it is quantized."""

from typing import Any

from transformers import PreTrainedModel

from .config import D2QuantConfig
from .hf_quantizer import mark_quantized
from .pipeline import quantize_blocks
from .report import Report


def quantize_model(model: PreTrainedModel, tokenizer: Any = None, config: D2QuantConfig | None = None) -> Report:
    """
    Quantizes a model in place: each linear of its decoder blocks becomes a [`D2QuantLinear`], and so does the head.
    Token embeddings become a [`~trl_gopd.d2quant.embedding.D2QuantEmbedding`].

    Everything that can be refused is refused before the first weight changes. An error after that leaves the model
    partly quantized; with `config.work_dir`, the finished blocks are kept there, and the same call on a freshly loaded
    model goes on with the next one.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            From `AutoModelForCausalLM` or `AutoModel`, in any float dtype, on any device.
        tokenizer (*optional*):
            Tokenizer, or its folder or name, unless the data are tokens. Overrides `config.tokenizer`.
        config ([`D2QuantConfig`], *optional*):
            How to quantize.

    Returns:
        [`Report`]: errors and seconds of each linear.

    Raises:
        `TypeError`, `ValueError`: if the model, the data or their combination with `config` cannot be used.
    """
    config = D2QuantConfig() if config is None else config
    report = quantize_blocks(model, tokenizer, config)
    mark_quantized(model, config)
    return report
