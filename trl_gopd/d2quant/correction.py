"""
Deviation-aware correction (DAC) of the mean error that quantized attention causes at the input of the MLP.

Quantizing the attention of a block changes the output y of the norm before its MLP. In each channel, the deviation
`y_full − y_quantized` has a mean μ and a variance σ² over tokens. Adding μ removes the share `μ²/(μ² + σ²)` of its
energy (section 3.3 of [D²Quant](https://huggingface.co/papers/2602.02546)). An RMSNorm has no bias to
which μ could be added, so it is added to the biases of the linears that read y: `Ŵ(y + μ) = Ŵ y + Ŵ μ`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


# Largest magnitude of a shift, as in the authors' release.
CLIP = 10.0


@dataclass(frozen=True)
class Deviation:
    """
    Sums over tokens of the deviation of a norm's output; [`Deviation.of`] makes one, `+` pools two.

    Args:
        total (`torch.Tensor`): float64 `(channels,)`, Σ (full − quantized).
        squares (`torch.Tensor`): float64 `(channels,)`, Σ (full − quantized)².
        tokens (`int`): how many tokens were summed.
    """

    total: Tensor
    squares: Tensor
    tokens: int

    @classmethod
    def of(cls, full: Tensor, quantized: Tensor) -> "Deviation":
        """From the two outputs, `(..., channels)`, of the same tokens."""
        difference = (full.double() - quantized.double()).flatten(0, -2)
        return cls(difference.sum(0), difference.square().sum(0), len(difference))

    def __add__(self, other: "Deviation") -> "Deviation":
        return Deviation(self.total + other.total, self.squares + other.squares, self.tokens + other.tokens)

    @property
    def mean(self) -> Tensor:
        """μ, float64 `(channels,)`; 0 of no tokens."""
        return self.total / max(self.tokens, 1)

    @property
    def explained(self) -> Tensor:
        """`μ²/(μ² + σ²)` of each channel, float64 `(channels,)`: the share of the deviation that μ removes."""
        energy = self.squares / max(self.tokens, 1)
        return torch.where(energy > 0, self.mean.square() / energy, 0.0)


def mean_shift(deviation: Deviation, *, gate: float = 0.0, shrink: bool = False) -> Tensor:
    """
    The shift that is added to the norm's output.

    Args:
        deviation ([`Deviation`]):
            Pooled over the calibration tokens.
        gate (`float`, *optional*, defaults to `0.0`):
            Channels of which μ explains less than this share are not corrected; 0 corrects all, as in the paper.
        shrink (`bool`, *optional*, defaults to `False`):
            Multiplies μ by `max(0, 1 − (σ²/n)/μ²)`, the positive-part shrinkage of a mean known from n tokens.

    Returns:
        `torch.Tensor`: float64 `(channels,)`, clipped to ±10 as in the authors' release.
    """
    shift, explained = deviation.mean, deviation.explained
    if shrink:
        noise = (1 / explained.clamp(min=1e-30) - 1) / max(deviation.tokens, 1)  # σ²/(n μ²)
        shift = shift * (1 - noise).clamp(min=0)
    return torch.where(explained >= gate, shift, 0.0).clamp(-CLIP, CLIP)
