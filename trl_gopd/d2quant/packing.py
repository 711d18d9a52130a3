"""
Codes of 2, 3, 4 or 8 bits in int32 words, in the layout that GPTQ (v2) and AutoRound checkpoints call `qweight`.

Down a column, codes follow each other without gaps, lowest bit first: 32 of them fill `bits` words. At 3 bits two of
the 32 straddle a word boundary, at the other widths none does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


BITS = (2, 3, 4, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """
    Packs codes along the first axis.

    Args:
        codes (`torch.Tensor`): uint8 `(K, N)`, each in `[0, 2^bits)`.
        bits (`int`): 2, 3, 4 or 8.

    Returns:
        `torch.Tensor`: int32 `(ceil(K / 32) * bits, N)`, padded with zeros.

    Raises:
        ValueError: If `bits` or the dtype is another, or a code does not fit.

    Example:

    ```python
    >>> pack(torch.tensor([[3], [1], [2]], dtype=torch.uint8), bits=2)  # 0b10_01_11
    tensor([[39],
            [ 0]], dtype=torch.int32)

    ```
    """
    check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"`codes` must be uint8 with two axes, got {codes.dtype} with {codes.dim()}.")
    largest = int(codes.max()) if codes.numel() else 0
    if largest >= 2**bits:
        raise ValueError(f"`codes` must be below 2^{bits} = {2**bits}, got {largest}. Use more bits.")
    length, columns = codes.shape
    blocks = F.pad(codes, (0, 0, 0, -length % 32)).view(-(-length // 32), 32, columns)
    words = codes.new_zeros((blocks.shape[0], bits, columns), dtype=torch.int32)
    for position in range(32):
        word, shift = divmod(position * bits, 32)
        code = blocks[:, position].int()
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.flatten(0, 1)


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """
    Inverse of [`pack`].

    Args:
        words (`torch.Tensor`): int32 `(ceil(length / 32) * bits, N)`.
        bits (`int`): 2, 3, 4 or 8.
        length (`int`): Codes in a column, `K`.

    Returns:
        `torch.Tensor`: uint8 `(length, N)`.

    Raises:
        ValueError: If `bits` or the dtype is another, or the words do not hold `length` codes.
    """
    check_bits(bits)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[0] != -(-length // 32) * bits:
        raise ValueError(
            f"`words` of {length} codes must be int32 with two axes, the first of {-(-length // 32) * bits}, got "
            f"{words.dtype} {tuple(words.shape)}."
        )
    return unpack_rows(words.T, bits)[:, :length].T.contiguous()


def unpack_rows(words: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """
    Codes of words that follow each other along the *last* axis, cast to `dtype`, the padding included. Not checked.

    Args:
        words (`torch.Tensor`): int32 `(R, W)`, `W` a multiple of `bits`.
        bits (`int`): 2, 3, 4 or 8.
        dtype (`torch.dtype`, *optional*, defaults to `torch.uint8`): Of the result.

    Returns:
        `torch.Tensor`: `(R, W * 32 / bits)`.
    """
    rows, length = words.shape[0], words.shape[1] * 32 // bits
    # Hosts are little-endian, so that bytes follow each other in the order of the stream.
    data = words.contiguous().view(-1).view(torch.uint8).view(rows, 4 * words.shape[1])
    if bits == 8:
        return data.to(dtype)
    if bits == 4:
        return torch.stack((data & 15, data >> 4), -1).view(rows, length).to(dtype)
    # Below four bits, looking up four codes at a time is an order of magnitude faster than shifting each into place.
    if bits == 2:
        index = data.int()
    else:
        low, middle, high = data.view(rows, length // 8, 3).int().unbind(-1)
        index = torch.stack((low | (middle & 15) << 8, middle >> 4 | high << 4), -1)
    four_codes = torch.arange(16**bits, dtype=torch.int32, device=words.device)[:, None]
    shifts = torch.arange(0, 4 * bits, bits, dtype=torch.int32, device=words.device)
    table: Tensor = (four_codes >> shifts & (2**bits - 1)).to(dtype)
    return table.index_select(0, index.flatten()).view(rows, length)


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"`bits` must be one of {BITS}, got {bits}.")
