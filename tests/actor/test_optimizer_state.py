"""How a rank's flat part of a parameter is cut into rectangles; checkpoints themselves are in test_checkpoint.py."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.default_planner import _check_box_overlap
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from nemo_r3.actor import optimizer_state
from nemo_r3.actor.manifest import latest, read_manifest
from nemo_r3.actor.optimizer_state import STATES, rectangles, set_step


@given(st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 9), st.integers(1, 9))), st.data())
def test_rectangles_hold_the_range_in_order_and_nothing_else(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = prod(shape)
    first, end = sorted(data.draw(st.lists(st.integers(0, count), min_size=2, max_size=2)))
    tensor = torch.arange(count).view(shape)
    found = list(rectangles(first, end, shape))
    cut = [
        tensor[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]
        for offset, size in found
    ]
    assert torch.cat([part.flatten() for part in cut] or [torch.arange(0)]).tolist() == list(range(first, end))
    assert len(found) <= 3


def test_a_part_is_the_states_own_memory_at_its_place_in_the_whole_tensor() -> None:
    """Columns 6 to 12 of layer 2's 4 x 12, from the second row's middle on."""
    weight = ShardedTensor.from_rank_offsets(
        "decoder.layers.weight", torch.zeros(4, 6), (0, 2, 5), (2, 1, 2), replica_id=(0, 1, 3), prepend_axis_num=1
    )
    state = torch.arange(10.0)
    parts = [
        optimizer_state._part(weight, "exp_avg", state[start : start + prod(size)], offset, size)
        for start, (offset, size) in zip((0, 3, 9), rectangles(9, 19, (4, 6)), strict=True)
    ]
    assert [part.global_offset for part in parts] == [(1, 9), (2, 6), (3, 6)]
    assert [part.local_shape for part in parts] == [(1, 3), (1, 6), (1, 1)]
    assert {(part.key, part.global_shape) for part in parts} == {
        ("optimizer.state.exp_avg.decoder.layers.weight.2", (4, 12))
    }
    assert {part.replica_id for part in parts} == {(0, 1, 0)}, "the other data-parallel ranks hold other parts"
    for part in parts:
        part.data.fill_(-1)
    assert state.eq(-1).all()


def comparisons(layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often rank 0 compares two parts, planning a save of layers of 4 x 12, their rows dealt to four ranks."""
    found: dict[str, TensorStorageMetadata] = {}
    for layer in range(layers):
        parameter = torch.nn.Parameter(torch.zeros(4, 12))
        weight = ShardedTensor.from_rank_offsets(
            "decoder.layers.weight", parameter, (0, layer, layers), prepend_axis_num=1, replica_id=(0, 0, 0)
        )
        for first in range(0, 48, 12):
            own = {"param": SimpleNamespace(start=first, end=first + 12)}
            optimizer: Any = SimpleNamespace(
                _get_model_param_range_map=lambda _, own=own: own,
                _get_main_param_and_optimizer_states=lambda _: dict.fromkeys(STATES, torch.zeros(12)),
            )
            for part in optimizer_state._parts(optimizer, parameter, weight):
                whole = TensorStorageMetadata(TensorProperties(), torch.Size(part.global_shape), [])
                sizes = torch.Size(part.global_offset), torch.Size(part.local_shape)
                found.setdefault(part.key, whole).chunks.append(ChunkStorageMetadata(*sizes))
    compared = 0

    def compare(*boxes: ChunkStorageMetadata) -> bool:
        nonlocal compared
        compared += 1
        return _check_box_overlap(*boxes)

    with monkeypatch.context() as patch:
        patch.setattr(default_planner, "_check_box_overlap", compare)
        assert default_planner._validate_global_plan([SavePlan([]), SavePlan([])], Metadata(dict(found))) == []
    return compared


def test_planning_a_save_takes_time_that_grows_with_the_layers_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = comparisons(4, monkeypatch)
    assert few > 0
    assert comparisons(8, monkeypatch) == 2 * few


def test_adam_is_told_its_steps_by_parameter_and_by_group() -> None:
    """Transformer Engine's Adam has no step in its groups before its first."""
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    adam.state[adam.param_groups[0]["params"][0]] = {"step": torch.zeros(())}
    none: Any = SimpleNamespace(optimizer=None)
    optimizer: Any = SimpleNamespace(chained_optimizers=[none, SimpleNamespace(optimizer=adam)])
    set_step(optimizer, 7)
    assert [float(state["step"]) for state in adam.state.values()] == [7.0]
    assert [group["step"] for group in adam.param_groups] == [7]


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2"])
def test_data_parallel_ranks_write_equal_shares(two: Any, kind: str) -> None:
    checkpoint = latest(two.home / f"dp2-{kind}-checkpoints")
    assert checkpoint is not None
    files = read_manifest(checkpoint)["files"]
    first, second = (sum(size for name, (size, _) in files.items() if name.startswith(f"__{rank}_")) for rank in (0, 1))
    assert first == pytest.approx(second, rel=0.1)
