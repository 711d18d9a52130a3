"""A linear layer whose weight stays packed in memory, and in the forward and backward pass."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .adapters import refuse_merging
from .grids import GRIDS, Grid, QuantizedWeight
from .kernels import dequantize, quantized_linear
from .kernels.packed import Packed
from .packing import check_bits, pack, unpack


class D2QuantLinear(nn.Linear):
    """
    Linear layer with a weight of `bits` bits, for inference and as the frozen base of an adapter.

    It is an [`~torch.nn.Linear`] so that PEFT wraps it as one, and the packed codes are called `weight` so that code
    that expects a dense one fails. Merging an adapter is refused, see `adapters`.

    Nothing requires a gradient when built. `weight_scale` and `bias` may be made to, and are then trained.

    Args:
        in_features (`int`): Size of an input.
        out_features (`int`): Size of an output.
        bits (`int`): Width of a code: 2, 3, 4 or 8.
        group_size (`int`): Columns that share a scale. The last group may be smaller.
        grid (`str`, *optional*, defaults to `"affine"`): `"affine"`, `"midrise"` or `"bitplane"`, see `grids`.
        bias (`bool`, *optional*, defaults to `False`): Whether there is a bias.
        input_scale (`bool`, *optional*, defaults to `False`):
            Whether inputs are multiplied by a vector, for a column scale that nothing before this layer can absorb.
        scale_dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): Of the scales.
        dtype (`torch.dtype`, *optional*): Of the bias; by default torch's default dtype.
        device (`torch.device`, *optional*): Where the tensors are.

    Attributes:
        weight (`torch.nn.Parameter`): int32 `(ceil(in_features / 32) * bits, out_features)`, see `packing`.
        weight_scale (`torch.nn.Parameter`):
            `(groups, out_features)`, or `(bits, groups, out_features)` for bit-planes.
        weight_zero_point (`torch.nn.Parameter` or `None`):
            int32 `(groups, ceil(out_features / 32) * bits)`, packed along the last axis; affine only.
        bias (`torch.nn.Parameter` or `None`): `(out_features,)`.
        input_scale (`torch.nn.Parameter` or `None`): `(in_features,)`.

    Example:

    ```python
    >>> D2QuantLinear(256, 64, bits=2, group_size=128).weight.shape
    torch.Size([16, 64])

    ```
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    input_scale: nn.Parameter | None
    _is_hf_initialized: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        grid: Grid = "affine",
        bias: bool = False,
        input_scale: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # `nn.Linear.__init__` would allocate a dense weight
        refuse_merging(D2QuantLinear)
        check_bits(bits)
        if group_size < 1:
            raise ValueError(
                f"`group_size` must be at least 1, got {group_size}. For one group a row, pass its length."
            )
        if grid not in GRIDS:
            raise ValueError(f"`grid` must be one of {GRIDS}, got {grid!r}.")
        if not scale_dtype.is_floating_point:
            raise ValueError(f"`scale_dtype` must be a floating-point dtype, got {scale_dtype}.")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.grid = bits, group_size, grid

        def zeros(*shape: int, dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        groups, planes = -(-in_features // group_size), (bits,) if grid == "bitplane" else ()
        self.weight = zeros(-(-in_features // 32) * bits, out_features, dtype=torch.int32)
        self.weight_scale = zeros(*planes, groups, out_features, dtype=scale_dtype)
        zero_points = zeros(groups, -(-out_features // 32) * bits, dtype=torch.int32) if grid == "affine" else None
        self.register_parameter("weight_zero_point", zero_points)
        self.register_parameter("bias", zeros(out_features, dtype=dtype) if bias else None)
        self.register_parameter("input_scale", zeros(in_features, dtype=scale_dtype) if input_scale else None)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedWeight,
        *,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """
        Packs a quantized weight.

        Args:
            quantized ([`QuantizedWeight`]): The weight.
            bias (`torch.Tensor`, *optional*): `(out_features,)`.
            input_scale (`torch.Tensor`, *optional*): `(in_features,)`, what multiplies the input.
            scale_dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): Scales are rounded to it.
            dtype (`torch.dtype`, *optional*): Of the bias; its own by default.
            device (`torch.device`, *optional*): Of the layer; that of the codes by default.

        Returns:
            [`D2QuantLinear`]: The layer, frozen.

        Raises:
            ValueError: If a scale is not finite in `scale_dtype`, or a tensor has the wrong shape.
        """
        out_features, in_features = quantized.codes.shape
        module = cls(
            in_features,
            out_features,
            bits=quantized.bits,
            group_size=quantized.group_size,
            grid=quantized.grid,
            bias=bias is not None,
            input_scale=input_scale is not None,
            scale_dtype=scale_dtype,
            dtype=dtype or (None if bias is None else bias.dtype),
            device=device or quantized.codes.device,
        )
        scales = quantized.scales.mT
        values = {
            "weight": pack(quantized.codes.T, quantized.bits),
            "weight_scale": _finite(scales if quantized.grid == "bitplane" else scales.squeeze(0), scale_dtype),
        }
        if quantized.zero_points is not None:
            values["weight_zero_point"] = pack(quantized.zero_points, quantized.bits).T
        if bias is not None:
            values["bias"] = bias
        if input_scale is not None:
            values["input_scale"] = _finite(input_scale, scale_dtype)
        for name, parameter in module.named_parameters():
            if name not in values or values[name].shape != parameter.shape:
                given = tuple(values[name].shape) if name in values else None
                raise ValueError(f"`{name}` of {module} must be {tuple(parameter.shape)}, got {given}.")
            parameter.data.copy_(values[name])
        # Transformers draws new weights for any `nn.Linear` without this mark when it initializes a model.
        module._is_hf_initialized = True
        return module

    @property
    def packed(self) -> Packed:
        """The packed tensors and their layout, as the kernels take them."""
        return Packed(
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.in_features,
            self.bits,
            self.group_size,
            self.grid,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`, in the dtype of the input, as a linear layer does."""
        return quantized_linear(input, self.packed, bias=self.bias, input_scale=self.input_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """
        What `.to()`, `.half()` and the like do: the bias is cast, and all tensors are moved. Scales keep their dtype,
        because rounding them would change every weight.
        """
        super()._apply(moving(fn, self.weight_scale, self.input_scale), recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """
        Dense weight, the scale of the inputs folded into its columns.

        Args:
            dtype (`torch.dtype`, *optional*): What the float32 values are cast to; float32 by default.

        Returns:
            `torch.Tensor`: `(out_features, in_features)`.
        """
        if self.input_scale is None:
            return dequantize(self.packed, dtype or torch.float32)
        return (dequantize(self.packed, torch.float32) * self.input_scale.float()).to(dtype or torch.float32)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Frozen dense [`~torch.nn.Linear`] that computes the same function, in `dtype` or float32."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dense.weight.dtype, copy=True), requires_grad=False)
        return dense.train(self.training)

    @torch.no_grad()
    def unpack(self) -> QuantizedWeight:
        """Codes, zero points, and the stored scales in float32. The scale of the inputs is not included."""
        scales = self.weight_scale.view(-1, *self.weight_scale.shape[-2:]).mT
        zero_points = self.weight_zero_point
        return QuantizedWeight(
            codes=unpack(self.weight, self.bits, self.in_features).T,
            scales=scales.to(torch.promote_types(scales.dtype, torch.float32)),
            zero_points=None if zero_points is None else unpack(zero_points.T, self.bits, self.out_features),
            bits=self.bits,
            group_size=self.group_size,
            grid=self.grid,
        )

    def reset_parameters(self) -> None:
        """Does nothing: codes come from a checkpoint or from [`from_quantized`], and are never drawn at random."""

    def extra_repr(self) -> str:
        scaled = ", input_scale=True" if self.input_scale is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, grid={self.grid}, bias={self.bias is not None}{scaled}"
        )


def moving(fn: Callable[[Tensor], Tensor], *scales: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What `fn` of `torch.nn.Module._apply` does, but for the dtype of `scales` and of their gradients."""
    kept = [tensor for scale in scales if scale is not None for tensor in (scale, scale.grad) if tensor is not None]

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype != tensor.dtype and any(tensor is scale for scale in kept):
            return tensor.to(moved.device)
        return moved

    return move


def _finite(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in `dtype`, or a `ValueError` that names one which is not finite in it."""
    rounded = scales.to(dtype)
    broken = scales[~rounded.isfinite()]
    if broken.numel():
        remedy = "Is the weight finite?" if not broken[0].isfinite() else "Use `torch.bfloat16` or `torch.float32`."
        raise ValueError(f"Scales must be finite in `scale_dtype` {dtype}, got {broken[0].item():g}. {remedy}")
    return rounded
