"""Tensors under their Hugging Face names into megatron-core's, and back, by the rows of the name table.

    Hugging Face tensors  --pieces, merge-->  every rank's part of a megatron tensor
                          <----separate-----
                          <------split------  one full megatron tensor  <--join--

All of them only copy and reorder numbers, so a checkpoint survives the round trip bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_r3.models.architecture import Architecture
from nemo_r3.models.names import NameRow


def merge(row: NameRow, pieces: Sequence[Tensor], arch: Architecture, size: int) -> Tensor:
    """A rank's `pieces` -> its part of the megatron tensor, one of `size` equal ones; of any dtype.

    - qkv: [heads / size * head_dim, hidden] and twice [kv_heads / size * head_dim, hidden] ->
      [kv_heads / size * (heads / kv_heads + 2) * head_dim, hidden]: for each key/value head its queries, its key, its
      value. Biases are the same without hidden.
    - gate_up: twice [ffn_hidden / size, hidden] -> [2 * ffn_hidden / size, hidden].
    - vocab: at most [padded_vocab / size, hidden] -> [padded_vocab / size, hidden], padded with zeros.
    """
    if row.kind == "qkv":
        groups = [piece.unflatten(0, (arch.num_kv_heads // size, -1)) for piece in pieces]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if row.kind == "gate_up":
        return torch.cat(list(pieces))
    (piece,) = pieces
    padding = arch.padded_vocab(size) // size - len(piece) if row.kind == "vocab" else 0
    return torch.cat([piece, piece.new_zeros(padding, piece.shape[1])]) if padding else piece


def join(row: NameRow, parts: Tensor, size: int) -> Tensor:
    """The parts of all `size` ranks, one after the other along axis 0 -> the full megatron tensor, contiguous.

    Without a `cut`, any rank's part is the full tensor.
    """
    if row.kind == "gate_up":
        return parts.unflatten(0, (size, 2, -1)).transpose(0, 1).flatten(0, 2)
    if row.cut == 1:
        return parts.unflatten(0, (size, -1)).transpose(0, 1).flatten(1).contiguous()
    return parts


def split(row: NameRow, full: Tensor, arch: Architecture) -> list[Tensor]:
    """The full megatron tensor, padded or not -> its Hugging Face tensors."""
    if row.kind == "vocab":
        return [full[: arch.vocab_size]]
    pieces = separate(row, full, arch, 1)
    return pieces if len(row.hf) == len(pieces) else [torch.cat(pieces)]


def separate(row: NameRow, part: Tensor, arch: Architecture, size: int) -> list[Tensor]:
    """The inverse of `merge`, but for a vocabulary: a rank's part of the megatron tensor -> its pieces."""
    if row.kind == "qkv":
        query = arch.num_heads // arch.num_kv_heads * arch.head_dim
        groups = part.unflatten(0, (arch.num_kv_heads // size, -1))
        pieces = groups.split([query, arch.head_dim, arch.head_dim], dim=1)
        return [piece.flatten(0, 1).contiguous() for piece in pieces]
    return list(part.chunk(2)) if row.kind == "gate_up" else [part]
