"""
Logits of a causal language model, computed for one chunk of tokens at a time so that no `(B, T, V)` tensor exists.

The backbone runs once. The model's own `forward` is then called for each chunk, with the backbone replaced by a
function that returns the hidden states of that chunk. Everything that a model family does around its output head, such
as scaling or soft-capping, is therefore applied here as well.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


# Size of the float32 logits of one chunk. Smaller chunks read the matrix of the head more often than needed. On a CPU,
# glibc maps tensors above 32 MiB anew each time, and clearing the pages costs more than a larger chunk saves.
CPU_LOGITS_BYTES = 24 * 2**20
ACCELERATOR_LOGITS_BYTES = 256 * 2**20


def tokens_per_chunk(vocab_size: int, device: torch.device | str = "cpu") -> int:
    """
    Number of tokens whose logits are computed at a time, at least one: as many as have 24 MiB of float32 logits on a
    CPU, and 256 MiB elsewhere. A loss needs several tensors of that size.

    Args:
        vocab_size (`int`): Number of logits of a token.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where they are computed.

    Example:

    ```python
    >>> from trl_gopd.evaluation.logits import tokens_per_chunk

    >>> tokens_per_chunk(49_152), tokens_per_chunk(262_144), tokens_per_chunk(262_144, "cuda")
    (128, 24, 256)

    ```
    """
    budget = CPU_LOGITS_BYTES if torch.device(device).type == "cpu" else ACCELERATOR_LOGITS_BYTES
    return max(1, budget // (4 * vocab_size))


def check_windows(windows: Tensor, model: PreTrainedModel) -> None:
    """Raises a `ValueError` unless `windows` are integer ids `(n ≥ 1, T ≥ 2)` in the vocabulary of the model."""
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.is_floating_point():
        raise ValueError(
            "`windows` must be integer token ids of shape (n, T) with n >= 1 and T >= 2, got shape "
            f"{tuple(windows.shape)} and {windows.dtype}. Cut a text into equal windows."
        )
    vocab_size = model.config.get_text_config().vocab_size
    lowest, highest = int(windows.min()), int(windows.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`windows` must hold ids from 0 to {vocab_size - 1}, the vocabulary of the model, got "
            f"{lowest if lowest < 0 else highest}. Tokenize with the model's own tokenizer."
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Context manager that puts a model into evaluation mode and disables gradients. The training flag of every submodule
    is restored at the end, also after an exception.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def logits_in_chunks(model: PreTrainedModel, input_ids: Tensor, chunk_size: int) -> Iterator[Tensor]:
    """
    Yields the logits that predict each token after the first. Rows follow one another: all tokens of row 0, then all
    tokens of row 1, and so on.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, in evaluation mode.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids on the model's device, without padding.
        chunk_size (`int`):
            Number of tokens whose logits are held in memory at once.

    Yields:
        `torch.Tensor` of shape `(at most chunk_size, V)`: float32 logits, `B·(T − 1)` rows in total.
    """
    output = backbone(model)(input_ids=input_ids, use_cache=False)
    hidden = output.last_hidden_state[:, :-1].flatten(0, 1)
    for part in hidden.split(chunk_size):
        logits = _head_logits(model, output, part.unsqueeze(0))
        yield logits[0].float()


class OutputHead:
    """
    All that a causal language model does behind its backbone, as a function of the last hidden states.

    What the backbone returns beside hidden states differs between families, and their heads read it. A pass of two
    tokens records it once.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model. Its head is looked up when it is called.
        head (`torch.nn.Module`, *optional*):
            Output embeddings that compute in the place of the model's own.

    Raises:
        `TypeError`: if the head cannot be told from the backbone.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from trl_gopd.evaluation.logits import OutputHead

    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> OutputHead(LlamaForCausalLM(LlamaConfig(vocab_size=7, **sizes)))(torch.ones(1, 3, 8)).shape
    torch.Size([1, 3, 7])

    ```
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module | None = None):
        self._model, self._head = model, head
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        with torch.no_grad():
            self._output = backbone(model)(input_ids=ids, use_cache=False)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns the logits `(B, T, V)` of last hidden states `(B, T, hidden_size)`. Gradients flow to the states."""
        return _head_logits(self._model, self._output, hidden, self._head)


def backbone(model: PreTrainedModel) -> Any:
    """The part of a causal language model that returns hidden states. Raises a `TypeError` if it has none."""
    # Where the prefix of a family's checkpoints names no part of the model, `base_model` is the model itself.
    for part in (model.base_model, model.get_decoder(), getattr(model, "model", model)):
        if part is not model:
            return part
    raise TypeError(
        f"`model` must have a backbone that returns hidden states, and {type(model).__name__} has none. Pass a causal "
        "language model of transformers."
    )


def _head_logits(model: PreTrainedModel, output: Any, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
    """Logits of `hidden` `(B, T, hidden_size)`; all else that the head reads is as in `output`, of the backbone."""
    output = copy.copy(output)
    output.last_hidden_state = hidden
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    own = model.get_output_embeddings()
    with _backbone_returning(model, output), forwards_replaced({} if head is None else {own: head.forward}):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def _backbone_returning(model: PreTrainedModel, output: Any) -> Iterator[None]:
    """Context manager within which the backbone of `model` returns `output` instead of running."""
    # The causal models of OPT and BART call the decoder inside the backbone; all other models call the backbone.
    modules = {id(module): module for module in (backbone(model), model.get_decoder()) if module is not model}.values()
    calls = []

    def forward(*_: Any, **__: Any) -> Any:
        calls.append(True)
        return output

    with forwards_replaced(dict.fromkeys(modules, forward)):
        yield
    if not calls:
        raise TypeError(
            f"`model` must call its backbone before its head, and {type(model).__name__} does not. Pass a causal "
            "language model of transformers."
        )


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context manager within which modules run the functions of `forwards` in place of their own `forward`."""
    # accelerate's hooks set `forward` on the instance
    own = [(module, vars(module).get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own:
            del module.forward
            if before is not None:
                module.forward = before
