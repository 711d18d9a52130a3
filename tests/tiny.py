"""Tiny models and a byte-level tokenizer, built in code."""

import random
import zlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with 259 ids, more with `extra_tokens`."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra_tokens]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def build_bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same, but it begins text with a beginning-of-sequence token when it is called, as that of Gemma does."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    template = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer._tokenizer.post_processor = template
    return tokenizer


def build_model(tokenizer, *, seed: int, hidden_size: int = 32, vocab_size: int = 0, **config) -> LlamaForCausalLM:
    """A Llama of two layers. Weights are wide, so that models of different seeds disagree."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=config.pop("num_hidden_layers", 2),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=config.pop("initializer_range", 0.1),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )
    return LlamaForCausalLM(config).eval()


def scripted_completions(tokenizer, prompt_ids: list[list[int]], *, step: int, max_length: int) -> list[list[int]]:
    """
    Completions of 2 to `max_length` ids, the end included, which depend on the prompt and the step alone: a run sees
    the same tokens however its batches are laid out.
    """
    completions = []
    for ids in prompt_ids:
        rng = random.Random(zlib.crc32(repr((ids, step)).encode()))
        length = rng.randrange(1, max_length)
        completions.append([rng.randrange(3, len(tokenizer)) for _ in range(length)] + [tokenizer.eos_token_id])
    return completions
