"""
Rotation of the residual stream, which spreads outliers over all channels and leaves the logits as they were.

A block reads the stream through RMSNorms and adds to it. Once the scales of the norms have been moved into the linears
after them, the norm of `hQ` is that of `h` for an orthogonal matrix Q. With `W ← WQ` in every linear that reads the
stream and `W ← QᵀW` in every linear that writes it, the stream becomes `hQ` and nothing else changes
([SliceGPT](https://huggingface.co/papers/2401.15024), [QuaRot](https://huggingface.co/papers/2404.00456)). The
inputs of `o_proj` and `down_proj` are not rotated: inference needs no additional product, and a column scale of
`down_proj` can still be absorbed.

The authors' release of [D2Quant](https://huggingface.co/papers/2602.02546) also takes the mean off each embedding.
That is exact before a LayerNorm only, and left out.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .finite import largest
from .topology import Block, Topology


# Rows worked on at once: a float64 copy of an embedding matrix would not fit beside it.
CHUNK_ROWS = 4096


@torch.no_grad()
def fuse_norms(model: PreTrainedModel, topology: Topology) -> None:
    """
    Fold the scale of every RMSNorm into the linears that read it, the final one into `lm_head`, in place.

    The norms keep a scale of 1. An `lm_head` that shares the matrix of the embeddings gets its own, which adds
    `vocab_size · hidden_size` numbers. Products are taken in float64 and rounded once, to the dtype of the weight.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            From `AutoModelForCausalLM`; changed, unless an error is raised.
        topology ([`~trl_gopd.d2quant.topology.Topology`]):
            Of `model`. It still holds afterwards.

    Raises:
        `ValueError`: if the logits would not survive a rotation. Nothing has been changed then.
    """
    readers = _norm_readers(model, topology)
    offsets = {norm: _weight_offset(model, norm) for norm in readers}
    _untie_lm_head(model)
    for norm, linears in readers.items():
        weight = getattr(model.get_submodule(norm), "weight", None)
        if weight is not None:
            scale = weight.double() + offsets[norm]
            for linear in linears:
                for rows in model.get_submodule(linear).weight.split(CHUNK_ROWS):
                    rows.copy_(_fused(rows, scale))
            weight.fill_(1 - offsets[norm])


@torch.no_grad()
def rotate(model: PreTrainedModel, topology: Topology, *, size: int | None = None, seed: int = 0) -> None:
    """
    Rotate the residual stream by [`rotation_matrix`], in place.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            After [`fuse_norms`]; changed, unless an error is raised. Products are taken in float64 and rounded once.
        topology ([`~trl_gopd.d2quant.topology.Topology`]):
            Of `model`. It still holds afterwards.
        size (`int`, *optional*):
            Channels that are mixed: one matrix turns each run of `size` channels, as in the authors' release, which
            uses 128. `None` mixes all channels.
        seed (`int`, *optional*, defaults to `0`):
            Of the signs in the matrix.

    Raises:
        `ValueError`: if `size` does not divide the hidden size, if the norms are not fused, or if the logits would not
        survive. Nothing has been changed then.
    """
    readers = _norm_readers(model, topology)
    for norm in readers:
        weight, neutral = getattr(model.get_submodule(norm), "weight", None), 1 - _weight_offset(model, norm)
        if weight is not None and (weight != neutral).any():
            raise ValueError(f"The scale of `{norm}` must be 1, got others. Call `fuse_norms` before `rotate`.")
    embeddings = model.get_submodule(topology.embeddings)
    hidden_size = embeddings.weight.shape[1]
    if size is not None and (size < 1 or hidden_size % size):
        raise ValueError(
            f"`size` must divide the hidden size {hidden_size}, got {size}. Use `None` to mix all channels."
        )

    matrix = rotation_matrix(size or hidden_size, seed=seed)
    _rotate_rows(embeddings.weight, matrix)
    for linear in (linear for linears in readers.values() for linear in linears):
        _rotate_rows(model.get_submodule(linear).weight, matrix)
    for block in topology.blocks:
        for name in block.residual_writers:
            writer: Any = block.module.get_submodule(name)
            _rotate_rows(writer.weight.T, matrix)
            if writer.bias is not None:
                _rotate_rows(writer.bias[None], matrix)


@torch.no_grad()
def rotated_magnitudes(
    model: PreTrainedModel, topology: Topology, *, size: int | None = None, seed: int = 0
) -> Iterator[tuple[str, float]]:
    """
    What [`fuse_norms`] and [`rotate`] would change, and the largest magnitude that it would have: not finite where the
    dtype overflows. It takes as long as they do, and changes nothing.

    Args:
        model ([`~transformers.PreTrainedModel`]), topology ([`~trl_gopd.d2quant.topology.Topology`]):
            As for [`fuse_norms`].
        size (`int`, *optional*), seed (`int`, *optional*, defaults to `0`):
            As for [`rotate`].

    Yields:
        `tuple[str, float]`: names of parameters, with magnitudes.

    Raises:
        `ValueError`: if the logits would not survive a rotation.
    """
    readers = _norm_readers(model, topology)
    offsets = {norm: _weight_offset(model, norm) for norm in readers}
    embeddings: Any = model.get_submodule(topology.embeddings)
    matrix = rotation_matrix(size or embeddings.weight.shape[1], seed=seed)

    def magnitude(weight: Tensor, scale: Tensor | None = None) -> float:
        chunks = (rows if scale is None else _fused(rows, scale) for rows in torch.split(weight, CHUNK_ROWS))
        return float(torch.tensor([largest(_rotated(rows, matrix)) for rows in chunks]).max())  # NaN, if one is

    yield f"{topology.embeddings}.weight", magnitude(embeddings.weight)
    for norm, linears in readers.items():
        weight = getattr(model.get_submodule(norm), "weight", None)
        scale = None if weight is None else weight.double() + offsets[norm]
        for linear in linears:
            yield f"{linear}.weight", magnitude(model.get_submodule(linear).weight, scale)
    for block in topology.blocks:
        for name in block.residual_writers:
            writer: Any = block.module.get_submodule(name)
            yield f"{block.name}.{name}.weight", magnitude(writer.weight.T)
            if writer.bias is not None:
                yield f"{block.name}.{name}.bias", magnitude(writer.bias[None])


def rotation_matrix(size: int, *, seed: int = 0) -> Tensor:
    """
    Orthogonal float64 matrix `(size, size)` on the CPU: Hadamard's with random signs. No entry is above `√(2/size)`.

    A size that is no power of two takes the Kronecker product of Sylvester's matrix for its largest power of two and
    Hartley's, `(cos + sin)(2πjk/n)/√n`, for the odd rest: 576 = 64·9. The signs of rows come from `seed`, not from the
    global random state.
    """
    odd = size // (size & -size)
    index = torch.arange(odd, dtype=torch.float64)
    angles = 2 * torch.pi / odd * torch.outer(index, index)
    matrix: Tensor = (angles.cos() + angles.sin()) / odd**0.5
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    signs: Tensor = 2 * torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed)) - 1
    return matrix * signs


def _rotate_rows(weight: Tensor, matrix: Tensor) -> None:
    """`weight ← weight · Q` in place; `weight` is `(rows, hidden_size)`, or a view of that shape."""
    for rows in torch.split(weight, CHUNK_ROWS):
        rows.copy_(_rotated(rows, matrix))


def _rotated(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows · Q`, computed in float64 and rounded once."""
    runs: Tensor = torch.unflatten(rows.double(), -1, (-1, len(matrix))) @ matrix.to(rows.device)
    return runs.flatten(-2).to(rows.dtype)


def _fused(rows: Tensor, scale: Tensor) -> Tensor:
    """`rows · diag(scale)`, computed in float64 and rounded once."""
    return (rows * scale.to(rows.device)).to(rows.dtype)


def _norm_readers(model: PreTrainedModel, topology: Topology) -> dict[str, tuple[str, ...]]:
    """Norms through which the residual stream is read, each with its readers, by their names in the model."""
    if topology.final_norm is None or topology.lm_head is None:
        raise _refusal("it has no final norm and `lm_head`, which undo the rotation; a base model has no `lm_head`")
    known = (topology.blocks_name, topology.embeddings, topology.final_norm, topology.lm_head)
    for name, _ in model.named_parameters():
        if not name.startswith(tuple(f"{part}." for part in known)):
            raise _refusal(f"`{name}` belongs to none of embeddings, blocks, final norm and `lm_head`")
    readers: dict[str, tuple[str, ...]] = {}
    for block in topology.blocks:
        _check_block(block)
        for norm in block.norms:
            readers[f"{block.name}.{norm}"] = tuple(f"{block.name}.{linear}" for linear in block.norm_readers[norm])
    return readers | {topology.final_norm: (topology.lm_head,)}


def _check_block(block: Block) -> None:
    for norm in block.norms:
        if norm not in (block.attention_norm, block.mlp_norm) or norm not in block.norm_readers:
            raise _refusal(f"`{block.name}.{norm}` does not stand between the residual stream and linears alone")
    if not block.residual_writers:
        raise _refusal(f"`{block.name}` adds more to the residual stream than outputs of linears")
    hidden_size = block.module.get_submodule(block.residual_writers[0]).out_features
    turned = {*block.residual_writers, *(linear for norm in block.norms for linear in block.norm_readers[norm])}
    for linear in (linear for stage in block.stages for linear in stage.linears):
        if linear not in turned and block.module.get_submodule(linear).in_features == hidden_size:
            raise _refusal(f"`{block.name}.{linear}` may read the residual stream, and not through a norm")


def _weight_offset(model: PreTrainedModel, name: str) -> int:
    """0 for an RMSNorm that multiplies by `weight`, 1 for one that multiplies by `1 + weight`, or has no weight."""
    norm = copy.deepcopy(model.get_submodule(name)).double().cpu()
    hidden_size = model.get_input_embeddings().weight.shape[1]
    weight = getattr(norm, "weight", None)
    weight = torch.zeros(hidden_size) if weight is None else weight
    inputs = torch.randn(4, hidden_size, generator=torch.Generator().manual_seed(0)).double() + 1
    outputs = norm(inputs)
    unit = inputs / inputs.pow(2).mean(-1, keepdim=True).sqrt()
    for offset in (0, 1):
        # `eps`, at most 1e-5, moves the outputs as much; the wrong offset and a mean taken off move them by about 1.
        if torch.allclose(outputs, unit * (offset + weight), rtol=1e-3, atol=1e-4):
            return offset
    raise _refusal(f"`{name}` is a {type(norm).__name__}, which does more than divide by a root mean square and scale")


def _refusal(reason: str) -> ValueError:
    return ValueError(f"The logits of `model` must survive a rotation, but {reason}. Use `rotation=None`.")


def _untie_lm_head(model: PreTrainedModel) -> None:
    embeddings, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    if lm_head.weight is embeddings.weight:
        lm_head.weight = nn.Parameter(embeddings.weight.clone(), requires_grad=embeddings.weight.requires_grad)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
        # Sharding and the quantizers of transformers look up here what is tied.
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
