"""A resumed run wastes no step and loses no turn; a checkpoint that is asked for is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
from refusals import refusal

from nemo_r3.actor import checkpoint
from nemo_r3.actor.manifest import WAY_OUT, DamagedError
from nemo_r3.rollout import turn_cache
from nemo_r3.rollout.sampling import UNFINISHED, Completion
from nemo_r3.rollout.turn_cache import TurnCache
from recipes.checkpoints import refuse_useless_steps, resume, save_turns, trained
from recipes.counters import Counters


def said_of(steps: int, done: int, left: float) -> str:
    """What is said of `train.steps`, with `done` steps done and `left` updates before the learning rate is 0."""
    config = SimpleNamespace(train=SimpleNamespace(steps=steps))
    setup: Any = SimpleNamespace(config=config, run=SimpleNamespace(checkpoints=Path("runs/x/checkpoints")))
    trainer: Any = SimpleNamespace(steps_left=lambda: left)
    return refusal(lambda: refuse_useless_steps(setup, trainer, done))


def test_steps_behind_the_end_of_the_learning_rate_are_refused() -> None:
    assert said_of(20, done=12, left=0) == (
        "train.steps=20: the learning rate is 0 after step 12, so steps 13 to 20 would change nothing; name a "
        "new run.dir and train.start_from=runs/x/checkpoints/step_000012"
    )
    assert said_of(13, done=8, left=4) == (
        "train.steps=13: the learning rate is 0 after step 12, so step 13 would change nothing; set train.steps=12, or "
        "name a new run.dir and train.start_from=runs/x/checkpoints/step_000008"
    )
    assert "set train.steps=10, or raise actor.lr_decay_steps" in said_of(40, done=0, left=10)


@pytest.mark.parametrize(
    ("steps", "done", "left"),
    [
        (12, 8, 4),
        (12, 12, 0),  # finished
        (6, 8, 4),  # fewer steps than before
        (12, 8, 6),  # two of the eight had nothing to train on
        (14, 12, 2),  # so those updates are still to come
        (20, 12, 1738),  # actor.lr_decay_steps=1750
        (20, 12, math.inf),  # actor.lr_min above 0
    ],
)
def test_what_still_learns_goes_on(steps: int, done: int, left: float) -> None:
    assert said_of(steps, done, left) == "accepted"


def test_a_checkpoint_that_is_gone_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    asked = SimpleNamespace(checkpoint=str(tmp_path / "step_000002"))
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(evaluate=asked, train=SimpleNamespace(keep_checkpoints=2)),
        world=SimpleNamespace(broadcast=lambda value: value),
        run=SimpleNamespace(checkpoints=tmp_path),
    )
    assert refusal(lambda: trained(setup)).endswith(f"; complete in {tmp_path}: none (train.keep_checkpoints=2)")
    for step in (4, 6):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "manifest.json").touch()
    assert "step_000006, step_000004 (train" in refusal(lambda: trained(setup))


def test_a_run_starts_from_another_ones_checkpoint_until_it_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, bool]] = []

    def load(_: Any, path: Path, with_schedule: bool = True) -> dict[str, Any]:
        if path.name == "damaged":
            raise DamagedError(f"{path} is damaged: shard is missing; {WAY_OUT}")
        loaded.append((path.name, with_schedule))
        return {"version": 7, "state": {"step": 4, "cursor": 9}}

    monkeypatch.setattr(checkpoint, "load", load)
    train = SimpleNamespace(start_from="elsewhere/step_000007", steps=8)
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(train=train, actor=SimpleNamespace(lr_min=0.1)),
        world=SimpleNamespace(broadcast=lambda value: value, is_main=False),
        run=SimpleNamespace(checkpoints=tmp_path, cut_back=lambda step: None),
        progress=SimpleNamespace(say=lambda line: None),
    )
    trainer: Any = SimpleNamespace(steps_left=lambda: math.inf, schedule=SimpleNamespace(lr_decay_steps=8))
    rollout: Any = SimpleNamespace(
        engine=SimpleNamespace(sleep=lambda: None), turns=SimpleNamespace(restore=lambda *_: None)
    )
    assert resume(setup, trainer, rollout) == (Counters(), None)
    train.start_from = "elsewhere/damaged"
    said = refusal(lambda: resume(setup, trainer, rollout))
    assert said == "train.start_from: elsewhere/damaged is damaged: shard is missing"
    own = tmp_path / "step_000004"
    own.mkdir()
    (own / "manifest.json").touch()
    assert resume(setup, trainer, rollout) == (Counters(step=4, cursor=9), own)
    assert loaded == [("step_000007", False), ("step_000004", True)]


def test_a_second_stop_keeps_what_either_engine_added_to_the_turns_of_the_first(tmp_path: Path) -> None:
    """Both were given all turns; each went on with its own, and still holds the other's as it was."""
    (tmp_path / "step_000002").mkdir()
    (tmp_path / "step_000002" / "manifest.json").touch()
    begun = {name: Completion(name, (5,), (-0.5,), UNFINISHED, 2) for name in ("of 0", "of 1", "of neither")}
    ended = [Completion(f"of {rank}", (5, 6, rank), (-0.5, -1.0, -2.0), "stop", 2) for rank in (0, 1)]
    parts: dict[int, Mapping[str, Completion]] = {}
    met = Barrier(2)

    def stop(rank: int) -> None:
        def merge(part: Mapping[str, Completion]) -> dict[str, Completion]:
            parts[rank] = part
            met.wait(20)
            return {**parts[0], **parts[1]}

        cache = TurnCache(enabled=True)
        cache.restore(3, begun)
        cache.begin(3)
        cache.add(f"of {rank}", ended[rank])
        setup: Any = SimpleNamespace(
            config=SimpleNamespace(rollout=SimpleNamespace(tensor_parallel=1)),
            world=SimpleNamespace(rank=rank, is_main=rank == 0, merge=merge),
            run=SimpleNamespace(checkpoints=tmp_path),
            progress=SimpleNamespace(say=lambda line: None),
        )
        rollout: Any = SimpleNamespace(turns=cache)
        save_turns(setup, rollout, 3)

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(stop, (0, 1)))
    kept = turn_cache.read(tmp_path / "step_000002" / turn_cache.FILE)
    assert kept == begun | {turn.request_id: turn for turn in ended}
