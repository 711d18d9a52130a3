"""Whether a frozen model reads the student's token ids."""

import logging
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module, *, role: str) -> None:
    """
    Raises `ValueError` unless the model reads the student's token ids: the same tokenizer, and room for all its ids.

    The widths of padded vocabularies may differ. Where a model comes without a tokenizer this is logged.
    """
    config: Any = model.config
    width = config.get_text_config().vocab_size
    if width < len(tokenizer):
        raise ValueError(
            f"`{role}` has a vocabulary of {width} ids, but the student's tokenizer has {len(tokenizer)}. Token ids "
            f"are scored as they are, so give a `{role}` with the student's tokenizer."
        )
    check_vocabulary(tokenizer, config._name_or_path, role=role)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, source: str, *, role: str) -> None:
    """Raises `ValueError` if the tokenizer that is found at `source` has other ids; logs it if none is found."""
    try:
        if not source:
            raise OSError("no path")
        other = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("The tokenizer of `%s` could not be compared with the student's: %s", role, error)
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    ids, their_ids = ({index: token for token, index in vocab.items()} for vocab in (ours, theirs))
    index = min(i for i in ids.keys() | their_ids.keys() if ids.get(i) != their_ids.get(i))
    raise ValueError(
        f"`{role}` ({source}) has another tokenizer than the student: id {index} is {their_ids.get(index)!r} there "
        f"and {ids.get(index)!r} in the student's. Token ids are scored as they are; use a model of the same family."
    )
