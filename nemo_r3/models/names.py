"""The two-way name table: one row per megatron-core parameter serves loading, refit and export.

Says which tensors there are, how they are shaped and which part of them a rank holds; convert.py turns them into each
other. No torch: a model is counted where there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_r3.models.architecture import Architecture

Index = tuple[slice, ...]
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class NameRow:
    """One megatron parameter and the Hugging Face tensors it is made of."""

    megatron: str  # parameter name with the global layer number, as the local layer spec names it
    hf: tuple[str, ...]  # the Hugging Face names it holds, in the order of `convert.merge`
    shape: tuple[int, ...]  # of the whole tensor, before a vocabulary is padded
    kind: str = "copy"
    """How they combine: "copy", "qkv" (interleaved by key/value group), "gate_up" or "vocab". "qkv" and "gate_up" may
    have a single name: of the tensor in which a family has fused them, one after the other."""
    cut: int | None = None  # the axis that tensor parallelism cuts; None if every rank holds the whole
    layer: int | None = None  # the global layer it belongs to; None for embedding, final norm and head


def rows(arch: Architecture) -> list[NameRow]:
    """The rows of a decoder, in the same order on every rank."""
    vocabulary = (arch.vocab_size, arch.hidden_size)
    table = [NameRow(EMBEDDING, ("model.embed_tokens.weight",), vocabulary, "vocab", 0)]
    for layer in range(arch.num_layers):
        table += _layer_rows(arch, layer)
    table.append(NameRow("decoder.final_layernorm.weight", ("model.norm.weight",), (arch.hidden_size,)))
    if not arch.tied:
        table.append(NameRow(HEAD, ("lm_head.weight",), vocabulary, "vocab", 0))
    return table


def _layer_rows(arch: Architecture, layer: int) -> list[NameRow]:
    mcore, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    hidden, ffn, columns = arch.hidden_size, arch.ffn_hidden_size, arch.query_width + 2 * arch.key_width

    def row(name: str, shape: tuple[int, ...], *sources: str, kind: str = "copy", cut: int | None = None) -> NameRow:
        return NameRow(f"{mcore}.{name}", tuple(f"{hf}.{source}" for source in sources), shape, kind, cut, layer)

    qkv = ["self_attn.qkv_proj"] if arch.fused else [f"self_attn.{part}_proj" for part in "qkv"]
    gate_up = ["mlp.gate_up_proj"] if arch.fused else ["mlp.gate_proj", "mlp.up_proj"]
    weights, biases = ([f"{name}.{which}" for name in qkv] for which in ("weight", "bias"))
    rows = [
        row("input_layernorm.weight", (hidden,), "input_layernorm.weight"),
        row("self_attention.linear_qkv.weight", (columns, hidden), *weights, kind="qkv", cut=0),
        row("self_attention.linear_proj.weight", (hidden, arch.query_width), "self_attn.o_proj.weight", cut=1),
        row("pre_mlp_layernorm.weight", (hidden,), "post_attention_layernorm.weight"),
        row("mlp.linear_fc1.weight", (2 * ffn, hidden), *(f"{name}.weight" for name in gate_up), kind="gate_up", cut=0),
        row("mlp.linear_fc2.weight", (hidden, ffn), "mlp.down_proj.weight", cut=1),
    ]
    if arch.qkv_bias:
        rows.append(row("self_attention.linear_qkv.bias", (columns,), *biases, kind="qkv", cut=0))
    if arch.qk_norm:
        head = (arch.head_dim,)
        rows += [row(f"self_attention.{x}_layernorm.weight", head, f"self_attn.{x}_norm.weight") for x in "qk"]
    return rows


def fused_norm_name(name: str) -> str:
    """The name that a parameter has with Transformer Engine's layers, which fold norms into the next matrix."""
    return name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight").replace(
        "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
    )


def pieces(row: NameRow, arch: Architecture, rank: int, size: int) -> list[tuple[str, Index]]:
    """Which parts of a row's Hugging Face tensors tensor-parallel rank `rank` of `size` holds.

    Names, and indices into the tensors, in the order of `convert.merge`. A fused tensor has one index for each tensor
    that it is made of. The vocabulary's may end beyond the tensor, as slices may.
    """
    if row.cut is None:
        return [(name, (slice(None),)) for name in row.hf]
    lengths = _lengths(row, arch) or [full_shape(row, arch, size)[row.cut]]
    fused = len(row.hf) < len(lengths)
    indexed = []
    for number, length in enumerate(lengths):
        start = rank * (length // size) + (sum(lengths[:number]) if fused else 0)
        index = *[slice(None)] * row.cut, slice(start, start + length // size)
        indexed.append((row.hf[0 if fused else number], index))
    return indexed


def _lengths(row: NameRow, arch: Architecture) -> list[int]:
    """How many of a row's rows belong to each of the matrices that it is made of; empty if it is one."""
    match row.kind:
        case "qkv":
            return [arch.query_width, arch.key_width, arch.key_width]
        case "gate_up":
            return [arch.ffn_hidden_size] * 2
        case _:
            return []


def matrices(row: NameRow, arch: Architecture) -> list[tuple[str, tuple[int, int]]]:
    """The matrices of a layer that a row is made of, in the order of `convert.merge`: names, and [rows, columns].

    Those that a family has fused are numbered. There are none of what LoRA leaves alone: norms, biases, vocabularies.
    """
    if row.layer is None or row.cut is None or len(row.shape) == 1:
        return []
    rows, columns = row.shape
    lengths = _lengths(row, arch) or [rows]
    fused = len(row.hf) < len(lengths)
    found = [f"{row.hf[0]}.{number}" for number in range(len(lengths))] if fused else row.hf
    return [(name, (length, columns)) for name, length in zip(found, lengths, strict=True)]


def full_shape(row: NameRow, arch: Architecture, tensor_parallel: int) -> tuple[int, ...]:
    """The shape of a row's full megatron tensor, a vocabulary padded."""
    return (arch.padded_vocab(tensor_parallel), arch.hidden_size) if row.kind == "vocab" else row.shape


def part_shape(row: NameRow, arch: Architecture, size: int) -> tuple[int, ...]:
    """The shape of each of the `size` parts of a row's megatron tensor."""
    shape = list(full_shape(row, arch, size))
    if row.cut is not None:
        shape[row.cut] //= size
    return tuple(shape)


def stage_of(row: NameRow, arch: Architecture, stages: int) -> int:
    """The pipeline stage that holds a row's parameter."""
    if row.layer is not None:
        return row.layer // (arch.num_layers // stages)
    return 0 if row.megatron == EMBEDDING else stages - 1


def count_factors(arch: Architecture, rank: int, size: int = 1) -> int:
    """Parameters of LoRA of this rank on each of `size` tensor-parallel ranks, which cut one factor of each pair."""
    found = 0
    for row in rows(arch):
        for _, shape in matrices(row, arch):
            found += sum(length // (size if axis == row.cut else 1) for axis, length in enumerate(shape))
    return rank * found


def count_parameters(arch: Architecture) -> int:
    """Parameters of the checkpoint; a tied head counts once."""
    return sum(math.prod(row.shape) for row in rows(arch))
