"""
Logits of a causal language model, a chunk of tokens at a time: `(B, T, V)` never exists.

The backbone runs once. Then the model's own `forward` is called for each chunk with a backbone that answers with that
chunk's hidden states, so whatever a family does around its head (scaling, soft caps) is done here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


def check_windows(windows: Tensor, model: PreTrainedModel) -> None:
    """Raises a `ValueError` unless `windows` is an integer tensor `(n, T)`, n ≥ 1 and T ≥ 2, of ids the model has."""
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
    """Evaluation mode without gradients for the body; every submodule gets its own mode back, after errors too."""
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
    Yields the logits that predict each token after the first, all of row 0, then all of row 1, and so on.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, in evaluation mode.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids on the model's device, without padding.
        chunk_size (`int`):
            Tokens whose logits exist at a time.

    Yields:
        `torch.Tensor` of shape `(at most chunk_size, V)`: float32, `B·(T − 1)` rows in all.
    """
    output = model.base_model(input_ids=input_ids, use_cache=False)
    hidden = output.last_hidden_state[:, :-1].flatten(0, 1)
    ids = input_ids[:, :-1].flatten()
    for start in range(0, len(hidden), chunk_size):
        part = slice(start, start + chunk_size)
        with _answering(model, type(output)(last_hidden_state=hidden[part].unsqueeze(0))):
            logits = model(input_ids=ids[part].unsqueeze(0), use_cache=False).logits
        yield logits[0].float()


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits `(B, T, V)` of the backbone's last hidden states `(B, T, hidden_size)`; gradients reach them."""
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    # of all outputs of a backbone the one with most fields: a mixture of experts also looks for router logits
    with _answering(model, MoeModelOutputWithPast(last_hidden_state=hidden)):
        return model(input_ids=ids, use_cache=False).logits


@contextmanager
def _answering(model: PreTrainedModel, answer: Any) -> Iterator[None]:
    """The model's backbone returns `answer` without running."""
    # OPT's and BART's causal models call the decoder inside the backbone, all others the backbone.
    modules = {id(module): module for module in (model.base_model, model.get_decoder())}.values()
    own = [(module, vars(module).get("forward")) for module in modules]  # accelerate's hooks set it on the instance
    asked = []

    def forward(*_: Any, **__: Any) -> Any:
        asked.append(True)
        return answer

    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, before in own:
            del module.forward
            if before is not None:
                module.forward = before
    if not asked:
        raise TypeError(
            f"`model` must call its backbone before its head, and {type(model).__name__} does not. Pass a causal "
            "language model of transformers."
        )
