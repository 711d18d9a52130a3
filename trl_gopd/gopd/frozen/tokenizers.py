"""Whether a frozen model reads the student's token ids, and ends its answers with one of them as the student does."""

import logging
from typing import Any

from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .protocols import Scorer
from .relabelled import relabelled


logger = logging.getLogger(__name__)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module, *, role: str) -> Any:
    """
    Raises `ValueError` unless the model reads the student's token ids: it has them all, and they mean the same tokens.

    The model may have further ids, and its vocabulary may be padded. Where a model comes without a tokenizer this is
    logged.

    Returns:
        The tokenizer of the model, or `None` if none is found.
    """
    config: Any = model.config
    width = config.get_text_config().vocab_size
    if width < len(tokenizer):
        raise ValueError(
            f"`{role}` has a vocabulary of {width} ids, but the student's tokenizer has {len(tokenizer)}. Token ids "
            f"are scored as they are, so give a `{role}` with the student's tokenizer."
        )
    return check_vocabulary(tokenizer, config._name_or_path, role=role)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, source: str, *, role: str) -> Any:
    """
    Raises `ValueError` if the tokenizer that is found at `source` has other tokens at the student's ids.

    Returns:
        That tokenizer, or `None` if none is found, which is logged.
    """
    try:
        if not source:
            raise OSError("no path")
        other = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("The tokenizer of `%s` could not be compared with the student's: %s", role, error)
        return None
    index = different_id(tokenizer, other)
    if index is not None:
        ours, theirs = tokenizer.convert_ids_to_tokens([index]), _by_id(other).get(index)
        raise ValueError(
            f"`{role}` ({source}) has another tokenizer than the student: id {index} is {theirs!r} there and "
            f"{ours[0]!r} in the student's. Token ids are scored as they are; use a model of the same family."
        )
    return other


def different_id(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> int | None:
    """The smallest id of a tokenizer that is another token, or none, in another tokenizer, which may have more ids."""
    theirs = _by_id(other)
    return min((index for index, token in _by_id(tokenizer).items() if theirs.get(index) != token), default=None)


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def end_ids(tokenizer: PreTrainedTokenizerBase | None, generation_config: Any) -> tuple[int, ...]:
    """
    The ids that end an answer, as [`~trl.GRPOTrainer`] takes them: that of the tokenizer, and those with which
    generation stops. The first is what templates end an answer with.
    """
    ids = getattr(generation_config, "eos_token_id", None)
    several = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    own = getattr(tokenizer, "eos_token_id", None)
    return tuple(dict.fromkeys(([] if own is None else [own]) + several))


class EndTokens:
    """
    Compares the ids with which frozen models end an answer with those of the student.

    A model that never ends with the student's id finds the student's end very unlikely, wherever it comes, and the
    student learns not to end: so it is with a base model as the teacher of a chat model, or the other way round.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's.
        generation_config ([`~transformers.GenerationConfig`]):
            The student's.
        mismatch (`str`):
            What becomes of a model that ends otherwise: `"raise"` refuses it if the two have no end in common,
            `"map"` exchanges the first ends of the two, and `"keep"` does nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: Any, *, mismatch: str) -> None:
        self.tokenizer, self.mismatch = tokenizer, mismatch
        self.student = end_ids(tokenizer, generation_config)
        self._exchanged: dict[Scorer, tuple[int, int]] = {}
        self._built: dict[Scorer, Scorer] = {}

    def compare(self, scorer: Scorer, theirs: tuple[int, ...], *, role: str) -> None:
        """
        Takes note of a model.

        Args:
            scorer ([`Scorer`]):
                The model.
            theirs (`tuple[int, ...]`):
                Its ends, the first one first; empty if they are not known.
            role (`str`):
                For messages.

        Raises:
            `ValueError`: If the two have no end in common, unless something else is to become of it.
        """
        if not theirs or not self.student:
            logger.info("The end token of `%s` is not known and could not be compared with the student's.", role)
            return
        if theirs[0] == self.student[0] or self.mismatch == "keep":
            return
        ours, other = self._shown(self.student), self._shown(theirs)
        if self.mismatch == "map":
            self._exchanged[scorer] = self.student[0], theirs[0]
            logger.info("`%s` reads the end %s of completions as its own, %s.", role, ours[0], other[0])
        elif set(theirs).isdisjoint(self.student):
            raise ValueError(
                f"`{role}` ends its answers with {' or '.join(other)}, and the student with {' or '.join(ours)}. It "
                "would find every end of the student's unlikely, and the student would learn not to end. Use models "
                "that end alike, or set `gopd_eos_mismatch='map'`, which scores the student's end as the model's own, "
                "or 'keep', if the model does end with the student's."
            )
        else:
            logger.warning(
                "`%s` ends its answers with %s and the student with %s. If completions grow longer and longer, set "
                "`gopd_eos_mismatch='map'`.",
                role,
                " or ".join(other),
                " or ".join(ours),
            )

    def _shown(self, ids: tuple[int, ...]) -> list[str]:
        return [f"{index} ({self.tokenizer.convert_ids_to_tokens([index])[0]!r})" for index in ids]

    def apply(self, scorer: Scorer) -> Scorer:
        """The model, or a cache before it, as it is to be asked."""
        exchanged = self._exchanged.get(getattr(scorer, "wrapped", None) or scorer)
        if exchanged is None:
            return scorer
        if scorer not in self._built:
            self._built[scorer] = relabelled(scorer, *exchanged)
        return self._built[scorer]


def stored_end_ids(tokenizer: PreTrainedTokenizerBase | None, source: str) -> tuple[int, ...]:
    """[`end_ids`] of a model that is elsewhere, from its tokenizer and from what `source` says of its generation."""
    try:
        generation_config: Any = GenerationConfig.from_pretrained(source)
    except (OSError, ValueError):
        generation_config = None
    return end_ids(tokenizer, generation_config)
