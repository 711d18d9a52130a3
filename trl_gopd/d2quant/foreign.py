"""
What a packed checkpoint says to a process in which `trl_gopd` has not been imported.

There, transformers skips a quantization that it does not know, finds that the shapes of packed words are not those of
the model, and advises an option that draws weights at random. Two things are therefore written beside the tensors:

- an entry in `config.json` that names as the file of weights what is no file. transformers refuses it, before it reads
  a weight and whatever the options are, with a message that ends in the name: it says what to do;
- a module that imports `trl_gopd`, and the names of its classes, for `trust_remote_code=True`.

No hook of transformers' quantizers knows the folder that a model is saved to. The method that writes `config.json` is
wrapped instead, when a packed model is first saved.
"""

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from trl_gopd.d2quant.config import D2QuantConfig


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODELING_MODULE = "modeling_d2quant"
MODELING_CODE = '''"""
Lets `trust_remote_code=True` load this checkpoint: importing trl_gopd is what makes its quantization known.
"""

import transformers
import trl_gopd  # noqa: F401
'''
# The entry of `config.json` that names the file of weights, and what stands there.
WEIGHTS_ENTRY = "transformers_weights"
WEIGHTS_MESSAGE = "packed by D2Quant, run `import trl_gopd` first, or pass `trust_remote_code=True`"


def allow_loading(config: "PreTrainedConfig") -> None:
    """Takes the entry that stops other processes out of a configuration that was loaded, also if it is damaged."""
    file = getattr(config, WEIGHTS_ENTRY, None)
    is_file = isinstance(file, str) and file.endswith((".safetensors", ".safetensors.index.json"))
    if hasattr(config, WEIGHTS_ENTRY) and not is_file:
        delattr(config, WEIGHTS_ENTRY)


def forget_code(config: "PreTrainedConfig") -> None:
    """Takes the names of the module's classes out of a configuration, of a model whose class is none of them."""
    references = getattr(config, "auto_map", None)
    if references and MODELING_MODULE in json.dumps(references):
        del config.auto_map


def write_along() -> None:
    """From now on, configurations of packed models are written with what this file is about."""
    save = transformers.PreTrainedConfig.save_pretrained
    if getattr(save, "_writes_along", False):
        return

    @functools.wraps(save)
    def save_pretrained(config: "PreTrainedConfig", save_directory: str | os.PathLike[str], **options: Any) -> None:
        save(config, save_directory, **options)
        quantization = getattr(config, "quantization_config", None)
        if isinstance(quantization, D2QuantConfig) and quantization.integrity is not None:  # a packed model was saved
            _write(Path(save_directory), config)

    save_pretrained._writes_along = True  # type: ignore[attr-defined]
    transformers.PreTrainedConfig.save_pretrained = save_pretrained


def _write(folder: Path, config: "PreTrainedConfig") -> None:
    """Adds the entry to `config.json` in `folder`, and the module, unless the model has code of its own."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored[WEIGHTS_ENTRY] = WEIGHTS_MESSAGE
    if "auto_map" not in stored:
        names = _class_names(config)
        code = [f"\n\nclass {name}(transformers.{name}):\n    pass\n" for name in names.values()]
        (folder / f"{MODELING_MODULE}.py").write_text(MODELING_CODE + "".join(code), encoding="utf-8")
        stored["auto_map"] = {auto_class: f"{MODELING_MODULE}.{name}" for auto_class, name in names.items()}
    (folder / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _class_names(config: "PreTrainedConfig") -> dict[str, str]:
    """Classes of transformers for models of this configuration, by the auto class that finds them."""
    from transformers.models.auto import modeling_auto

    tables = {
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    names = {auto_class: table.get(config.model_type) for auto_class, table in tables.items()}
    return {auto_class: name for auto_class, name in names.items() if isinstance(name, str)}
