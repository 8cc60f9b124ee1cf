"""The two-way name table: one row per megatron-core parameter serves loading, refit and export.

Says which tensors there are, how they are shaped and which part of them a rank holds; convert.py turns them into each
other. No torch: a model is counted where there is none.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from nemo_r3.models.architecture import Architecture

Index = tuple[slice, ...]
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class NameRow:
    """One megatron parameter and the Hugging Face tensors it is made of."""

    megatron: str  # parameter name with the global numbers of layer and expert, as the local layer spec names it
    hf: tuple[str, ...]  # the Hugging Face names it holds, in the order of `convert.merge`
    shape: tuple[int, ...]  # of the whole tensor, before a vocabulary is padded
    kind: str = "copy"
    """How they combine: "copy", "qkv" (interleaved by key/value group), "gate_up" or "vocab". "qkv" and "gate_up" may
    have a single name: of the tensor in which a family has fused them, one after the other."""
    cut: int | None = None  # the axis that tensor parallelism cuts; None if every rank holds the whole
    layer: int | None = None  # the global layer it belongs to; None for embedding, final norm and head
    expert: int | None = None  # the expert of that layer it belongs to; None if every token passes it


@cache  # experts have thousands of rows, and every refit asks for them
def rows(arch: Architecture) -> tuple[NameRow, ...]:
    """The rows of a decoder, in the same order on every rank."""
    vocabulary = (arch.vocab_size, arch.hidden_size)
    table = [NameRow(EMBEDDING, ("model.embed_tokens.weight",), vocabulary, "vocab", 0)]
    for layer in range(arch.num_layers):
        table += _layer_rows(arch, layer) + _feed_forward_rows(arch, layer)
    table.append(NameRow("decoder.final_layernorm.weight", ("model.norm.weight",), (arch.hidden_size,)))
    if not arch.tied:
        table.append(NameRow(HEAD, ("lm_head.weight",), vocabulary, "vocab", 0))
    return tuple(table)


def side_by_side(arch: Architecture, expert_parallel: int) -> Iterator[tuple[NameRow, ...]]:
    """The rows, each on its own but for experts: of these one of every expert-parallel rank, in the ranks' order.

    A rank holds neighbouring experts, so the rows of a tuple have the same place on each rank.
    """
    for (_, experts), alike in itertools.groupby(rows(arch), key=lambda row: (row.layer, row.expert is not None)):
        found, ranks = list(alike), expert_parallel if experts else 1
        each = len(found) // ranks
        yield from zip(*(found[rank * each : (rank + 1) * each] for rank in range(ranks)), strict=True)


def _row(layer: int, name: str, shape: tuple[int, ...], *sources: str, **traits: Any) -> NameRow:
    hf = tuple(f"model.layers.{layer}.{source}" for source in sources)
    return NameRow(f"decoder.layers.{layer}.{name}", hf, shape, layer=layer, **traits)


def _layer_rows(arch: Architecture, layer: int) -> list[NameRow]:
    """All rows of a layer but those of the feed-forward network."""
    hidden, columns, row = arch.hidden_size, arch.query_width + 2 * arch.key_width, partial(_row, layer)
    qkv = ["self_attn.qkv_proj"] if arch.fused else [f"self_attn.{part}_proj" for part in "qkv"]
    weights, biases = ([f"{name}.{which}" for name in qkv] for which in ("weight", "bias"))
    rows = [
        row("input_layernorm.weight", (hidden,), "input_layernorm.weight"),
        row("self_attention.linear_qkv.weight", (columns, hidden), *weights, kind="qkv", cut=0),
        row("self_attention.linear_proj.weight", (hidden, arch.query_width), "self_attn.o_proj.weight", cut=1),
        row("pre_mlp_layernorm.weight", (hidden,), "post_attention_layernorm.weight"),
    ]
    if arch.qkv_bias:
        rows.append(row("self_attention.linear_qkv.bias", (columns,), *biases, kind="qkv", cut=0))
    if arch.qk_norm:
        head = (arch.head_dim,)
        rows += [row(f"self_attention.{x}_layernorm.weight", head, f"self_attn.{x}_norm.weight") for x in "qk"]
    return rows


def _feed_forward_rows(arch: Architecture, layer: int) -> list[NameRow]:
    if arch.experts is None:
        return _swiglu_rows(arch, layer, "mlp", "mlp")
    router = _row(layer, "mlp.router.weight", (arch.experts.count, arch.hidden_size), "mlp.gate.weight")
    experts = [
        _swiglu_rows(arch, layer, f"mlp.experts.local_experts.{expert}", f"mlp.experts.{expert}", expert)
        for expert in range(arch.experts.count)
    ]
    return [router, *itertools.chain(*experts)]


def _swiglu_rows(arch: Architecture, layer: int, mcore: str, hf: str, expert: int | None = None) -> list[NameRow]:
    hidden, ffn, row = arch.hidden_size, arch.ffn_hidden_size, partial(_row, layer, expert=expert)
    gate_up = [f"{hf}.{part}.weight" for part in (["gate_up_proj"] if arch.fused else ["gate_proj", "up_proj"])]
    return [
        row(f"{mcore}.linear_fc1.weight", (2 * ffn, hidden), *gate_up, kind="gate_up", cut=0),
        row(f"{mcore}.linear_fc2.weight", (hidden, ffn), f"{hf}.down_proj.weight", cut=1),
    ]


def fused_norm_name(name: str) -> str:
    """The name that a parameter has with Transformer Engine's layers, which fold norms into the next matrix."""
    return name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight").replace(
        "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
    )


@cache
def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """A parameter's name on its rank, of whichever layer spec -> as in `NameRow`, but for `fused_norm_name`.

    Transformer Engine's layers hold the experts' matrices as linear_fc1.weight0, .weight1, ..

    Args:
        name: with layers and experts counted from 0 on this rank.
        first_layer: the global number of the rank's first layer.
        first_expert: the global number of its first expert in each layer.
    """
    name = re.sub(r"\.experts\.(\w+)\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)
    name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda number: str(first_layer + int(number[0])), name)
    return re.sub(r"(?<=\.local_experts\.)\d+", lambda number: str(first_expert + int(number[0])), name)


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

    Those that a family has fused are numbered. There are none of what LoRA leaves alone: norms, biases, vocabularies,
    routers and experts.
    """
    if row.layer is None or row.cut is None or row.expert is not None or len(row.shape) == 1:
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


@cache  # plans ask often
def count_factors(arch: Architecture, rank: int, size: int = 1) -> int:
    """Parameters of LoRA of this rank on each of `size` tensor-parallel ranks, which cut one factor of each pair."""
    found = 0
    for row in rows(arch):
        for _, shape in matrices(row, arch):
            found += sum(length // (size if axis == row.cut else 1) for axis, length in enumerate(shape))
    return rank * found


@cache
def count_changed(arch: Architecture) -> int:
    """Parameters that LoRA changes."""
    return sum(math.prod(shape) for row in rows(arch) for _, shape in matrices(row, arch))


@cache
def count_parameters(arch: Architecture, experts_only: bool = False) -> int:
    """Parameters of the checkpoint, or of its experts; a tied head counts once."""
    return sum(math.prod(row.shape) for row in rows(arch) if row.expert is not None or not experts_only)
