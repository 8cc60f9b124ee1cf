"""The name table: what loading takes apart, export puts together again exactly, for any shape."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_r3.models import convert, names
from nemo_r3.models.architecture import Architecture, Experts
from nemo_r3.models.rope import Rope

TP = st.sampled_from([1, 2, 4])


@st.composite
def architectures(draw: st.DrawFn, tensor_parallel: int) -> Architecture:
    """Any shape that `tensor_parallel` can cut; the vocabulary need not divide."""
    kv_heads = tensor_parallel * draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    return Architecture(
        family="any",
        num_layers=draw(st.integers(1, 3)),
        hidden_size=4 * draw(st.integers(1, 5)),
        ffn_hidden_size=tensor_parallel * draw(st.integers(1, 5)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 40)),
        max_positions=64,
        norm_eps=1e-6,
        rope=Rope(1e4, 2),
        tied=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        fused=draw(st.booleans()),
        experts=draw(st.none() | st.builds(Experts, st.integers(1, 3), st.just(1), st.booleans())),
    )


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-style checkpoint, written down once more, from transformers' module shapes."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (arch.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    for layer in range(arch.num_layers):
        own: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.o_proj.weight": (hidden, q),
        }
        heads = {"qkv": q + 2 * kv} if arch.fused else {"q": q, "k": kv, "v": kv}
        columns = {"gate_up": 2 * ffn} if arch.fused else {"gate": ffn, "up": ffn}
        own |= {f"self_attn.{part}_proj.weight": (size, hidden) for part, size in heads.items()}
        if arch.experts:
            own["mlp.gate.weight"] = (arch.experts.count, hidden)
        for mlp in [f"mlp.experts.{number}" for number in range(arch.experts.count)] if arch.experts else ["mlp"]:
            own |= {f"{mlp}.{part}_proj.weight": (size, hidden) for part, size in columns.items()}
            own[f"{mlp}.down_proj.weight"] = (hidden, ffn)
        if arch.qkv_bias:
            own |= {f"self_attn.{part}_proj.bias": (size,) for part, size in heads.items()}
        if arch.qk_norm:
            own |= {f"self_attn.{part}_norm.weight": (arch.head_dim,) for part in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def part_of(row: names.NameRow, tensors: dict[str, torch.Tensor], arch: Architecture, rank: int, size: int) -> Any:
    pieces = [tensors[name][index] for name, index in names.pieces(row, arch, rank, size)]
    return convert.merge(row, pieces, arch, size)


@settings(max_examples=60, deadline=None)
@given(TP.flatmap(lambda size: st.tuples(st.just(size), architectures(size))))
def test_loading_and_export_are_the_identity_on_a_whole_checkpoint(case: tuple[int, Architecture]) -> None:
    size, arch = case
    shapes = hf_shapes(arch)
    checkpoint = {name: torch.randn(shape) for name, shape in shapes.items()}
    back: dict[str, torch.Tensor] = {}
    for row in names.rows(arch):
        parts = [part_of(row, checkpoint, arch, rank, size) for rank in range(size)]
        assert {tuple(part.shape) for part in parts} == {names.part_shape(row, arch, size)}, "ranks hold equal parts"
        joined = convert.join(row, parts[0] if row.cut is None else torch.cat(parts), size)
        assert joined.shape == names.full_shape(row, arch, size) and joined.is_contiguous()
        assert sum(part.numel() for part in parts) == joined.numel() * (1 if row.cut is not None else size)
        for name, tensor in zip(row.hf, convert.split(row, joined, arch), strict=True):
            assert name not in back, "a tensor has one row"
            back[name] = tensor
    assert back.keys() == checkpoint.keys()
    assert all(torch.equal(back[name], checkpoint[name]) for name in checkpoint)


@settings(max_examples=40, deadline=None)
@given(TP.flatmap(lambda size: st.tuples(st.just(size), architectures(size))))
def test_a_ranks_part_comes_apart_into_the_matrices_that_it_is_made_of(case: tuple[int, Architecture]) -> None:
    """Of which LoRA has a pair of factors each: seven in a layer, fused or not, four in one with experts."""
    size, arch = case
    found: dict[str, tuple[int, int]] = {}
    parts: list[int] = []
    for row in names.rows(arch):
        part = torch.randn(names.part_shape(row, arch, size))
        if matrices := names.matrices(row, arch):
            pieces = convert.separate(row, part, arch, size)
            assert torch.equal(convert.merge(row, pieces, arch, size), part)
            for piece, (name, shape) in zip(pieces, matrices, strict=True):
                cut = tuple(length // (size if axis == row.cut else 1) for axis, length in enumerate(shape))
                assert piece.shape == cut and name not in found
                parts.append(sum(cut))
                found[name] = shape
        else:
            assert row.layer is None or any(part in row.megatron for part in ("norm", "bias", "router", "experts"))
    assert len(found) == (4 if arch.experts else 7) * arch.num_layers
    assert names.count_changed(arch) == sum(rows * columns for rows, columns in found.values())
    assert names.count_factors(arch, 3) == 3 * sum(rows + columns for rows, columns in found.values())
    assert names.count_factors(arch, 3, size) == 3 * sum(parts)
    if not arch.fused:
        assert all(found[name] == hf_shapes(arch)[name] for name in found)


@settings(max_examples=40, deadline=None)
@given(TP.flatmap(lambda size: st.tuples(st.just(size), architectures(size))))
def test_a_rank_holds_whole_attention_groups_and_matching_columns(case: tuple[int, Architecture]) -> None:
    """What tensor parallelism needs: each query head on a rank with its own key/value head."""
    size, arch = case
    rows = {row.megatron.split(".", 3)[-1]: row for row in names.rows(arch) if row.layer == 0}
    per_kv, dim = arch.num_heads // arch.num_kv_heads, arch.head_dim

    def heads(count: int, offset: int) -> torch.Tensor:
        return (offset + torch.arange(count)).repeat_interleave(dim)[:, None].expand(-1, arch.hidden_size).float()

    parts = [heads(arch.num_heads, 0), heads(arch.num_kv_heads, 1000), heads(arch.num_kv_heads, 2000)]
    row = rows["self_attention.linear_qkv.weight"]
    tensors = dict(zip(row.hf, [torch.cat(parts)] if arch.fused else parts, strict=True))
    for rank in range(size):
        groups = part_of(row, tensors, arch, rank, size)[:, 0].reshape(arch.num_kv_heads // size, per_kv + 2, dim)
        for group in groups[..., 0].int().tolist():
            *queries, k, v = group
            assert k - 1000 == v - 2000 == queries[0] // per_kv
            assert queries == list(range((k - 1000) * per_kv, (k - 999) * per_kv))
    gate = torch.arange(arch.ffn_hidden_size).float()[:, None].expand(-1, arch.hidden_size)
    row = rows["mlp.experts.local_experts.0.linear_fc1.weight" if arch.experts else "mlp.linear_fc1.weight"]
    parts = [gate, gate + 1000]
    tensors = dict(zip(row.hf, [torch.cat(parts)] if arch.fused else parts, strict=True))
    for rank in range(size):
        ours, up = part_of(row, tensors, arch, rank, size)[:, 0].chunk(2)
        assert torch.equal(ours + 1000, up), "a rank's gate and up columns belong together"


def test_padding_is_zero_and_does_not_come_back() -> None:
    arch = Architecture("any", 1, 4, 4, 2, 2, 2, 5, 64, 1e-6, Rope(1e4, 2), False)
    assert [arch.padded_vocab(size) for size in (1, 2, 4)] == [5, 6, 8]
    row = names.rows(arch)[0]
    full = torch.cat([part_of(row, {row.hf[0]: torch.ones(5, 4)}, arch, rank, 4) for rank in range(4)])
    assert full.sum() == 20 and not full[5:].any()
    assert convert.split(row, full, arch)[0].shape == (5, 4)


def test_a_stage_holds_neighbouring_layers_and_the_ends_are_at_the_ends() -> None:
    arch = Architecture("any", 4, 4, 4, 2, 2, 2, 5, 64, 1e-6, Rope(1e4, 2), False)
    found = {(row.layer, row.megatron.split(".")[1]): names.stage_of(row, arch, 2) for row in names.rows(arch)}
    layers = {(layer, "layers"): layer // 2 for layer in range(4)}
    assert found == layers | {(None, "word_embeddings"): 0, (None, "final_layernorm"): 1, (None, "weight"): 1}


def test_the_rows_of_experts_come_with_those_of_every_ranks_neighbouring_experts() -> None:
    arch = Architecture("any", 2, 4, 4, 2, 2, 2, 5, 64, 1e-6, Rope(1e4, 2), False, experts=Experts(6, 2, True))
    together = list(names.side_by_side(arch, 3))
    assert sorted(row.megatron for rows in together for row in rows) == sorted(row.megatron for row in names.rows(arch))
    experts = [tuple(row.expert for row in rows) for rows in together if len(rows) > 1]
    assert experts == [(0, 2, 4)] * 2 + [(1, 3, 5)] * 2 + [(0, 2, 4)] * 2 + [(1, 3, 5)] * 2, (
        "two matrices in two layers"
    )
    assert all(len({(row.layer, row.shape) for row in rows}) == 1 for rows in together)
    assert [*itertools.chain(*names.side_by_side(arch, 1))] == [*names.rows(arch)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight", "5.mlp.experts.local_experts.18.linear_fc1"),
        ("decoder.layers.1.mlp.experts.linear_fc2.weight2", "5.mlp.experts.local_experts.18.linear_fc2"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "4.mlp.linear_fc1"),
        ("decoder.layers.0.mlp.router.weight", "4.mlp.router"),
    ],
)
def test_layers_and_experts_are_counted_over_all_ranks_whichever_layer_spec_names_them(
    found: str, expected: str
) -> None:
    """On the rank whose first layer is 4 and first expert 16."""
    assert names.global_name(found, 4, 16) == f"decoder.layers.{expected}.weight"
    assert names.global_name(names.EMBEDDING, 4, 16) == names.EMBEDDING


@pytest.mark.parametrize(
    ("local", "fused"),
    [
        ("decoder.layers.3.input_layernorm.weight", "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.3.mlp.linear_fc1.layer_norm_weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("decoder.layers.3.self_attention.q_layernorm.weight", "decoder.layers.3.self_attention.q_layernorm.weight"),
    ],
)
def test_transformer_engine_folds_the_norms(local: str, fused: str) -> None:
    assert names.fused_norm_name(local) == fused
