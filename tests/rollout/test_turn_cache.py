"""Turns on disk, and whose they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_r3.config.rollout import RolloutConfig
from nemo_r3.rollout.sampling import UNFINISHED, Completion, is_deterministic
from nemo_r3.rollout.turn_cache import TurnCache, read, turn_id, write
from nemo_r3.types import Phase, Segment, Trajectory

TURNS = {
    "a": Completion("a", (5, 70_000), (-0.5, -1.25), "stop", 3),
    "b": Completion("b", (), (), UNFINISHED, 3),
    "c": Completion("c", (9,), (-2.0,), UNFINISHED, 3),
}


def test_turns_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "turns", TURNS)
    assert read(tmp_path / "turns") == TURNS
    assert [file.name for file in tmp_path.iterdir()] == ["turns"]


def test_turns_keep_their_experts(tmp_path: Path) -> None:
    routed = np.arange(5 * 2 * 3).reshape(5, 2, 3).astype(np.uint16)
    turns = TURNS | {
        "a": replace(TURNS["a"], routed_experts=routed[:4]),
        "c": replace(TURNS["c"], routed_experts=routed[4:]),
    }
    write(tmp_path / "turns", turns)
    found = read(tmp_path / "turns")
    for name, turn in turns.items():
        np.testing.assert_array_equal(found[name].routed_experts, turn.routed_experts)
        assert turn.routed_experts is None or found[name].routed_experts.dtype == np.uint16
    whole = replace(TURNS["c"], routed_experts=routed[:2]).continuing(found["a"])
    np.testing.assert_array_equal(whole.routed_experts, [*routed[:4], *routed[:2]])
    assert TURNS["c"].continuing(TURNS["a"]).routed_experts is None


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """Whichever byte it is that was changed: a token that nobody sampled would be trained on."""
    file = tmp_path / "turns"
    write(file, TURNS)
    whole = file.read_bytes()
    changed = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(len(whole))]
    for damaged in (b"", whole[:-3], *changed):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="file of turns|changed since"):
            read(file)


def test_experts_that_would_be_read_as_other_numbers_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "turns"
    write(file, {"a": replace(TURNS["a"], routed_experts=np.full((4, 2, 3), 200, np.uint8))})
    file.write_bytes(file.read_bytes().replace(b'"U8"', b'"I8"'))
    with pytest.raises(ValueError, match="changed since"):
        read(file)


def test_a_turn_is_found_by_all_that_was_asked() -> None:
    prompt, other = (Trajectory((Segment(Phase.TASK, ids),)) for ids in ((1, 2), (1, 3)))
    names = {
        turn_id(Phase.RETRY, prompt, "p/0", 1),
        turn_id(Phase.RETRY, other, "p/0", 1),
        turn_id(Phase.RETRY, prompt, "p/1", 1),
        turn_id(Phase.RETRY, prompt, "p/0", 11),
        turn_id(Phase.REFLECTION, prompt, "p/0", 1),
    }
    assert len(names) == 5


def test_only_the_training_step_under_way_is_kept() -> None:
    cache = TurnCache(enabled=True)
    cache.begin(0)  # mining
    cache.add("a", TURNS["a"])
    assert cache.sampled(0) == {}
    cache.begin(2)
    for name, turn in TURNS.items():
        cache.add(name, turn)
    assert cache.sampled(2).keys() == {"a", "c"}, "a turn without tokens is none"
    assert cache.sampled(3) == {}
    cache.begin(-1)  # held-out problems
    assert cache.get("a") is None
    cache.add("d", TURNS["a"])
    cache.begin(2)
    assert cache.get("a") == TURNS["a"] and cache.sampled(2).keys() == {"a", "c"}, "the step goes on"
    cache.begin(3)
    assert cache.get("a") is None

    cache.restore(3, TURNS)
    cache.begin(3)
    cache.add("c", TURNS["a"])
    assert (cache.get("b"), cache.get("c")) == (TURNS["b"], TURNS["a"]), "what goes on is not as it was given"

    off = TurnCache(enabled=False)
    off.restore(2, TURNS)
    off.begin(2)
    off.add("a", TURNS["a"])
    assert off.get("a") is None and off.sampled(2) == {}


def test_what_goes_on_follows_what_was_begun() -> None:
    end = Completion("c-2", (7, 8), (-1.0, -3.0), "stop", 3)
    assert end.continuing(TURNS["c"]) == Completion("c-2", (9, 7, 8), (-2.0, -1.0, -3.0), "stop", 3)
    assert end.continuing(None) == end


def test_engines_of_several_ranks_on_gpus_keep_their_turns() -> None:
    assert not is_deterministic(RolloutConfig(tensor_parallel=2), on_cuda=True)
    assert is_deterministic(RolloutConfig(), on_cuda=False)
