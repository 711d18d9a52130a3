"""The forward of the student over a micro-batch, as the estimators ask for it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ._trl import through_forward
from .frozen.start import output_head


class Student:
    """
    One forward of the student; see [`StudentForward`].

    Args:
        model (`torch.nn.Module`):
            The student as training holds it, wrapped by DDP, DeepSpeed or FSDP.
        base ([`~transformers.PreTrainedModel`]):
            The transformers model in it.
        log_probs (`Callable`):
            TRL's forward, which returns log-probabilities, entropies and the auxiliary loss.
        inputs (`dict[str, torch.Tensor]`):
            `input_ids` and `attention_mask` `(B, L)`.
        num_tokens (`int`):
            Columns of the completions, the last ones.
        autocast (`Callable`):
            Makes the context of mixed precision in which the forward runs.
        computes_aux_loss (`bool`):
            Whether the load-balancing loss of a mixture of experts is trained, too.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Any,
        *,
        log_probs: Callable[[], tuple[Tensor, Tensor | None, Tensor | None]],
        inputs: dict[str, Tensor],
        num_tokens: int,
        autocast: Callable[[], Any],
        computes_aux_loss: bool,
    ) -> None:
        self.model, self.base, self.log_probs = model, base, log_probs
        self.inputs, self.num_tokens, self.autocast = inputs, num_tokens, autocast
        self.computes_aux_loss = computes_aux_loss

    def over_hidden(
        self, function: Callable[[Tensor, nn.Module], tuple[Tensor | None, ...]]
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """See [`StudentForward.over_hidden`]."""

        def inside(**inputs: Any) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
            inputs.pop("labels", None)
            hidden, aux_loss = backbone(self.base, computes_aux_loss=self.computes_aux_loss, **inputs)
            states = hidden[:, -self.num_tokens - 1 : -1]
            return function(states, output_head(self.base)), aux_loss

        with self.autocast():
            outputs: tuple[tuple[Tensor | None, ...], Tensor | None] = through_forward(
                self.model, self.base, inside, **self.inputs
            )
        return outputs


def backbone(base: Any, *, computes_aux_loss: bool = False, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    """
    Last hidden states `(B, L, D)` of a causal language model, and, if asked for, its load-balancing loss.

    The loss is computed by the family's own forward, which is called with a single token for its head.
    """
    inputs["use_cache"] = False
    if not computes_aux_loss:
        return base.base_model(**inputs).last_hidden_state, None
    seen: list[Tensor] = []
    hook = base.base_model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    try:
        output = base.forward(**inputs, output_router_logits=True, logits_to_keep=1)
    finally:
        hook.remove()
    return seen[0], output.aux_loss
