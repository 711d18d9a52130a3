"""
Token embeddings that stay packed in memory: a look-up unpacks the rows of its tokens alone.

The tensors are those of a [`~trl_gopd.d2quant.linear.D2QuantLinear`], so that an embedding and a tied head share them:
a token is a column of the packed words, a row of the weight that they stand for.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .grids import Grid, QuantizedWeight
from .kernels import dequantize
from .kernels.packed import Packed
from .linear import D2QuantLinear, moving
from .packing import unpack_rows


CODES_PER_BLOCK = 32  # zero points of 32 tokens fill `bits` words


class D2QuantEmbedding(nn.Embedding):
    """
    Token embeddings of a few bits, frozen: `embed_scale * row`, in the dtype of `embed_scale`.

    Args:
        packed ([`~trl_gopd.d2quant.linear.D2QuantLinear`]):
            The packed matrix, `out_features` tokens of `in_features` channels. Its parameters are taken, not copied.
        embed_scale (`float`, *optional*, defaults to `1.0`): What each row is multiplied by, as in Gemma.
        padding_idx (`int`, *optional*): As in [`~torch.nn.Embedding`]; it only matters to a gradient.
        dtype (`torch.dtype`, *optional*): Of the result; torch's default dtype if it is not given.

    Attributes:
        embed_scale (`torch.nn.Parameter`):
            A number in the dtype of the result. It comes first, since transformers takes a model's dtype from the
            first parameter, and the scales of groups may have another.
        weight, weight_scale, weight_zero_point (`torch.nn.Parameter`):
            Those of `packed`. With a tied head they are the same objects.

    Example:

    ```python
    >>> import torch
    >>> from trl_gopd.d2quant.embedding import D2QuantEmbedding
    >>> from trl_gopd.d2quant.linear import D2QuantLinear

    >>> embedding = D2QuantEmbedding(D2QuantLinear(16, 100, bits=8, group_size=16))
    >>> embedding(torch.tensor([[1, 99]])).shape
    torch.Size([1, 2, 16])

    ```
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    embed_scale: nn.Parameter

    def __init__(
        self,
        packed: D2QuantLinear,
        *,
        embed_scale: float = 1.0,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # `nn.Embedding.__init__` would allocate a dense weight
        self.num_embeddings, self.embedding_dim = packed.out_features, packed.in_features
        self.bits, self.group_size, self.grid = packed.bits, packed.group_size, packed.grid
        # What an embedding of torch has, and PEFT reads.
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        scale = torch.full((1,), embed_scale, dtype=dtype, device=packed.weight.device)
        self.embed_scale = nn.Parameter(scale, requires_grad=False)
        self.weight, self.weight_scale = packed.weight, packed.weight_scale
        self.register_parameter("weight_zero_point", packed.weight_zero_point)
        # Transformers draws new weights for any `nn.Embedding` without this mark when it initializes a model.
        self._is_hf_initialized = True

    @property
    def packed(self) -> Packed:
        """The packed tensors and their layout, as the kernels take them."""
        grid: Grid = self.grid
        return Packed(
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.embedding_dim,
            self.bits,
            self.group_size,
            grid,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Maps token ids of any shape `(...)` to rows `(..., embedding_dim)`."""
        rows = look_up(self.packed, input.flatten()).to(self.embed_scale.dtype)
        return rows.mul_(self.embed_scale).view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As that of a packed linear, whose scales these may be: `embed_scale` is cast, and they keep their dtype."""
        super()._apply(moving(fn, self.weight_scale), recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense rows `(num_embeddings, embedding_dim)`, `embed_scale` left out, in `dtype` or float32."""
        return dequantize(self.packed, dtype or torch.float32)

    def to_dense(self, like: nn.Embedding, dtype: torch.dtype | None = None) -> nn.Embedding:
        """
        `like`, an embedding of the family's own class whose tensors may be on the meta device, with the dense rows in
        `dtype` or float32, frozen.
        """
        like.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        for name, buffer in like.named_buffers():  # which can only be what it multiplies rows by
            setattr(like, name, torch.full_like(buffer, scale_of(like), device=self.weight.device))
        return like.train(self.training)

    def reset_parameters(self) -> None:
        """Does nothing: codes are never drawn at random."""

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}, "
            f"grid={self.grid}"
        )


def scale_of(embedding: nn.Module) -> float:
    """What a dense embedding multiplies its rows by, under the names that transformers has for it."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return 1.0 if scale is None else float(scale)


@torch.no_grad()
def look_up(packed: Packed, ids: Tensor) -> Tensor:
    """
    Rows of a packed weight, as [`~trl_gopd.d2quant.kernels.dequantize`] defines them.

    Args:
        packed ([`~trl_gopd.d2quant.kernels.packed.Packed`]): The weight, `out_features` rows.
        ids (`torch.Tensor`): integer `(N,)`, the numbers of the rows.

    Returns:
        `torch.Tensor`: `(N, in_features)` in float32, or in float64 if the scales are.

    Raises:
        `IndexError`: on a CPU, if there is no such row.
    """
    words, scales, zero_points, in_features, bits, group_size, grid = packed
    # `index_select` refuses negative numbers, as an embedding does; indexing would count them from the end.
    codes = unpack_rows(words.T.index_select(0, ids), bits)[:, :in_features]
    scales = scales.view(-1, *scales.shape[-2:]).index_select(2, ids).mT
    if zero_points is not None:
        blocks = torch.unflatten(zero_points, 1, (-1, bits)).index_select(1, ids // CODES_PER_BLOCK)
        of_blocks = unpack_rows(blocks.flatten(0, 1), bits)
        position = (ids % CODES_PER_BLOCK).long().repeat(len(zero_points))[:, None]
        zero_points = of_blocks.gather(1, position).view(len(zero_points), -1).T
    scales = scales.to(torch.promote_types(scales.dtype, torch.float32))
    return QuantizedWeight(codes, scales, zero_points, bits, group_size, grid).dequantize()
