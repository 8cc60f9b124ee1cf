"""Attention over shared contexts against whole rows, and the kernels against the formulas."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_r3.actor import kernels
from nemo_r3.actor.attention import SharedContextAttention, merge, packed, rotate
from nemo_r3.actor.kernels import CpuFlash, CudaFlash, Kernel, Parts, Plain, kernel_for
from nemo_r3.actor.rotary import Rotary
from nemo_r3.algo.layout import Bounds, Layout
from nemo_r3.algo.packing import Microbatch, pack
from nemo_r3.models.rope import Rope
from nemo_r3.types import Row

HEADS, KV_HEADS, DIM = 4, 2, 32
CPU = torch.device("cpu")
ROTARY = Rotary.of(Rope(10000.0, DIM), 1700, CPU)
THREE = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draws(tokens: int, keys: int, dtype: torch.dtype = torch.float64) -> THREE:
    draw = torch.Generator().manual_seed(tokens * 1000 + keys)
    shapes = ((tokens, HEADS, DIM), (keys, KV_HEADS, DIM), (keys, KV_HEADS, DIM))
    return tuple(torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def parts(queries: tuple[int, ...], keys: tuple[int, ...], causal: bool) -> Parts:
    return Parts(Bounds(queries, CPU), Bounds(keys, CPU), causal)


SHORT_AND_LONG = (0, 5, 6, 40, 47, 48, 82, 83)
CUTS = [parts((0, 9), (0, 9), True), parts(SHORT_AND_LONG, SHORT_AND_LONG, True), parts((0, 7, 8), (0, 33, 50), False)]


@pytest.mark.parametrize("which", CUTS)
@pytest.mark.parametrize(("kernel", "threads"), [(CpuFlash(), 1), (CpuFlash(), 64), (Plain(), 1)])
def test_kernels_equal_autograd_through_the_formulas(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, threads: int, which: Parts
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key, value = (t.requires_grad_() for t in draws(which.queries.cuts[-1], which.keys.cuts[-1]))
    grad = torch.randn_like(query)
    expected, sums = [], []
    for (start, end), (first, last) in zip(which.queries.spans, which.keys.spans, strict=True):
        q = query[start:end].transpose(0, 1)
        k, v = (t[first:last].transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0) for t in (key, value))
        scores = q @ k.transpose(1, 2) / DIM**0.5
        if which.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        expected.append((scores.softmax(-1) @ v).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    torch.cat(expected).backward(grad)
    with torch.no_grad():
        out, lse = kernel.forward(query, key, value, which)
        found = kernel.backward(grad, query, key, value, out, lse, which)
    torch.testing.assert_close(out, torch.cat(expected))
    torch.testing.assert_close(lse, torch.cat(sums, -1), check_dtype=False)
    for ours, theirs in zip(found, (query.grad, key.grad, value.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parts_of_about_one_length_share_a_call() -> None:
    batches = kernels._alike(Bounds(SHORT_AND_LONG, CPU))
    lengths = [batch.inside.sum(1).tolist() if isinstance(batch, kernels.Batch) else batch for batch in batches]
    assert lengths == [[5, 1, 7, 1, 1], [34, 34]]
    assert kernels._alike(Bounds((0, 8, 17, 20), CPU))[1] == slice(8, 17)


def test_two_halves_of_the_keys_merge_into_the_whole_softmax() -> None:
    query, key, value = draws(6, 20)
    whole = Plain().forward(query, key, value, parts((0, 6), (0, 20), False))
    halves = [
        Plain().forward(query, key[a:b], value[a:b], parts((0, 6), (0, b - a), False)) for a, b in ((0, 3), (3, 20))
    ]
    for ours, theirs in zip(merge(halves[0], halves[1]), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rotation_depends_on_distance_alone_and_turns_back() -> None:
    angles = packed(Layout((0, 60), (), torch.arange(60)), ROTARY, torch.float64)
    cos, sin = angles.cos, angles.sin
    query, key, _ = draws(60, 60)
    same = query[:1].expand(60, -1, -1), key[:1, :1].expand(60, HEADS, -1)
    turned = [rotate(heads, cos, sin) for heads in same]
    near, far = ((turned[0][a] * turned[1][b]).sum(-1) for a, b in ((5, 2), (50, 47)))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-4)  # the angles are float32
    torch.testing.assert_close(rotate(rotate(query, cos, sin), cos, -sin), query, rtol=1e-6, atol=1e-6)


def batch_of(groups: list[tuple[int, list[int]]]) -> list[Row]:
    """Rows of (context length, reflection lengths) whose reflections are trained."""
    rows = []
    for group, (context, lengths) in enumerate(groups):
        for number, length in enumerate(lengths):
            ids = [*range(context), *range(100 * (number + 1), 100 * (number + 1) + length)]
            flat = [0.0] * len(ids)
            rows.append(Row(ids, (), (), flat, [0.0] * context + [1.0] * length, flat, group, context))
    return rows


def layer(number: int) -> SharedContextAttention:
    """Of a model whose second layer has no rotary positions."""
    config: Any = SimpleNamespace(no_rope_freq=[0, 1])
    return SharedContextAttention(config, number)


def outputs(microbatch: Microbatch, tables: THREE) -> torch.Tensor:
    """Attention's output [trained, heads * head_dim] at the targets' sources; tokens are their query, key and value."""
    params = packed(microbatch.layout, ROTARY, tables[0].dtype)
    query, key, value = (table[microbatch.ids] for table in tables)
    out: torch.Tensor = layer(1)(query, key, value, None, packed_seq_params=params)
    return out[microbatch.targets.sources]


GROUPS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=1, max_size=16)), min_size=1, max_size=3
)


@settings(max_examples=40)
@given(GROUPS, st.sampled_from([1, 2, 4]))
def test_shared_contexts_change_nothing(groups: list[tuple[int, list[int]]], multiple: int) -> None:
    """Any layout: what is predicted, from where, with which gradient, is that of a row per reflection."""
    rows = batch_of(groups)
    members: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(row.group, []).append(number)
    shared = pack(rows, list(members.values()), multiple)
    alone = pack(rows, [(number,) for number in range(len(rows))], multiple)
    assert shared.rows == alone.rows
    assert torch.equal(shared.targets.ids, alone.targets.ids)
    assert torch.equal(shared.ids[shared.targets.sources], alone.ids[alone.targets.sources])
    found = []
    for microbatch in (shared, alone):
        tables = tuple(table.requires_grad_() for table in draws(1700, 1700))
        out = outputs(microbatch, tables)  # type: ignore[arg-type]
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        found.append((out, *torch.autograd.grad((out * weights).sum(), tables)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the log-sum-exps are float32


def test_a_layer_without_rotary_positions_sees_only_their_order() -> None:
    found = []
    for number in (1, 2):
        for positions in (torch.arange(9), 3 * torch.arange(9)):
            params = packed(Layout((0, 9), (), positions), ROTARY, torch.float64)
            query, key, value = (table.requires_grad_() for table in draws(9, 9))
            out = layer(number)(query, key, value, None, packed_seq_params=params)
            found.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for turned, spread, plain, same in zip(*found, strict=True):
        assert torch.equal(plain, same)
        assert all((plain - other).abs().max() > 0.1 for other in (turned, spread))


def test_the_kernel_follows_device_and_dtype() -> None:
    assert isinstance(kernel_for(torch.empty(1)), CpuFlash)
    meta = torch.empty(1, dtype=torch.bfloat16, device="meta")
    assert isinstance(kernel_for(meta), CudaFlash) and isinstance(kernel_for(meta.float()), Plain)


def test_the_cuda_kernel_makes_the_calls_that_torch_declares() -> None:
    meta = torch.device("meta")
    query, key, value = (t.to(meta, torch.bfloat16) for t in draws(8, 50))
    which = Parts(Bounds((0, 7, 8), meta), Bounds((0, 33, 50), meta), False)
    out, lse = CudaFlash().forward(query, key, value, which)
    assert out.shape == query.shape and lse.shape == (HEADS, 8)
    found = CudaFlash().backward(torch.empty_like(out), query, key, value, out, lse, which)
    assert [grad.shape for grad in found] == [query.shape, key.shape, value.shape]


@pytest.mark.gpu
def test_flash_on_a_gpu_equals_the_formulas() -> None:
    cuda = torch.device("cuda")
    for which in CUTS:
        where = replace_device(which, cuda)
        query, key, value = (t.to(cuda, torch.bfloat16) for t in draws(which.queries.cuts[-1], which.keys.cuts[-1]))
        grad = torch.randn_like(query)
        expected = Plain().forward(*(t.float() for t in (query, key, value)), where)
        out, lse = CudaFlash().forward(query, key, value, where)
        torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, expected[1], rtol=1e-3, atol=1e-2)
        found = CudaFlash().backward(grad, query, key, value, out, lse, where)
        theirs = Plain().backward(*(t.float() for t in (grad, query, key, value, out)), lse, where)
        for ours, plain in zip(found, theirs, strict=True):
            torch.testing.assert_close(ours.float(), plain, rtol=3e-2, atol=3e-2)


def replace_device(which: Parts, device: torch.device) -> Parts:
    return which._replace(queries=replace(which.queries, device=device), keys=replace(which.keys, device=device))
