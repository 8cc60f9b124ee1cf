"""A resumed run wastes no step and loses no turn; a checkpoint that is asked for is there."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
from refusals import refusal

from nemo_r3.actor import checkpoint
from nemo_r3.actor.manifest import MANIFEST, WAY_OUT, WRITING, DamagedError, publish
from nemo_r3.actor.trainer import Trainer
from nemo_r3.config import Config
from nemo_r3.errors import UserError
from nemo_r3.rollout import turn_cache
from nemo_r3.rollout.sampling import UNFINISHED, Completion
from nemo_r3.rollout.turn_cache import TurnCache
from recipes import checkpoints
from recipes.checkpoints import check_start_fits, give_up, make_saver, open_run, resume, save_turns, trained
from recipes.counters import Counters


def said_of(directory: Path, steps: int, lr_min: float = 0.0, lr_decay_steps: int = 0) -> str:
    """What is said of `train.steps` in the run with these `checkpoints`, which is not opened if they are refused."""
    config, opened = Config(), list[bool]()
    config.train.steps, config.actor.lr_min, config.actor.lr_decay_steps = steps, lr_min, lr_decay_steps
    world = SimpleNamespace(on_main=lambda act: act(), broadcast=lambda value: value)
    run = Mock(checkpoints=directory, open=opened.append)
    setup: Any = SimpleNamespace(config=config, world=world, run=run)
    said = refusal(lambda: open_run(setup))
    assert opened == ([directory.exists()] if said == "accepted" else [])
    return said


def saved(directory: Path, step: int, left: int) -> Path:
    """`checkpoints` with one of this step, before so many updates with a learning rate above 0."""
    (directory / WRITING).mkdir(parents=True)
    publish(directory, {"step": step, "schedule": {"lr_decay_steps": left + 3, "num_steps": 3}}, {})
    return directory


def test_steps_behind_the_end_of_the_learning_rate_are_refused(tmp_path: Path) -> None:
    done = saved(tmp_path, 12, left=0)
    assert said_of(done, 20) == (
        "train.steps=20: the learning rate is 0 after step 12, so steps 13 to 20 would change nothing; name a "
        f"new run.dir and train.start_from={done}/step_000012"
    )
    (done / "step_000012").rename(done / "damaged_step_000012")
    saved(done, 8, left=4)
    saved(done, 9, left=4)
    (done / "step_000009" / MANIFEST).write_text("{")
    assert said_of(done, 13) == (
        "train.steps=13: the learning rate is 0 after step 12, so step 13 would change nothing; set train.steps=12, or "
        f"name a new run.dir and train.start_from={done}/step_000008"
    )
    said = said_of(tmp_path / "new", 40, lr_decay_steps=10)
    assert said.endswith("set train.steps=10, or raise actor.lr_decay_steps")


@pytest.mark.parametrize(
    ("steps", "done", "left"),
    [
        (12, 8, 4),
        (12, 12, 0),  # finished
        (6, 8, 4),  # fewer steps than before
        (12, 8, 6),  # two of the eight had nothing to train on
        (14, 12, 2),  # so those updates are still to come
        (20, 12, 1738),  # actor.lr_decay_steps=1750
    ],
)
def test_what_still_learns_goes_on(tmp_path: Path, steps: int, done: int, left: int) -> None:
    assert said_of(saved(tmp_path, done, left), steps) == "accepted"


def test_a_rate_that_does_not_end_at_0_and_one_that_does_not_end_before_the_run_are_accepted(tmp_path: Path) -> None:
    assert said_of(saved(tmp_path, 12, left=0), 20, lr_min=1e-8) == "accepted"
    assert [said_of(tmp_path / "new", 20, lr_decay_steps=end) for end in (0, 20)] == ["accepted"] * 2


def test_a_checkpoint_that_is_gone_is_answered_with_those_that_are_there(tmp_path: Path) -> None:
    asked, compared = SimpleNamespace(checkpoint=str(tmp_path / "step_000002")), list[str]()
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(evaluate=asked, train=SimpleNamespace(keep_checkpoints=2)),
        world=SimpleNamespace(broadcast=lambda value: value),
        run=SimpleNamespace(checkpoints=tmp_path, refuse_other_settings=lambda: compared.append(asked.checkpoint)),
    )
    assert refusal(lambda: trained(setup)).endswith(f"; complete in {tmp_path}: none (train.keep_checkpoints=2)")
    for step in (4, 6):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "manifest.json").touch()
    assert "step_000006, step_000004 (train" in refusal(lambda: trained(setup))
    for asked.checkpoint, step in ((str(tmp_path / "step_000004"), 4), ("", 6)):
        assert trained(setup) == tmp_path / f"step_{step:06d}"
        assert compared.pop() == asked.checkpoint, "its settings with the run's"


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
    trainer: Any = SimpleNamespace(schedule=SimpleNamespace(lr_decay_steps=8))
    restored: list[int] = []
    rollout: Any = SimpleNamespace(
        engine=SimpleNamespace(sleep=lambda: None), turns=SimpleNamespace(restore=lambda step, _: restored.append(step))
    )
    assert resume(setup, trainer, rollout) == (Counters(), None)
    train.start_from = "elsewhere/damaged"
    said = refusal(lambda: resume(setup, trainer, rollout))
    assert said == "train.start_from: elsewhere/damaged is damaged: shard is missing"
    own = tmp_path / "step_000004"
    own.mkdir()
    (own / "manifest.json").touch()
    assert resume(setup, trainer, rollout) == (Counters(step=4, cursor=9), own)
    assert loaded == [("step_000007", False), ("step_000004", True)] and restored == [5]


def test_what_a_run_goes_on_from_is_compared_with_the_model_before_vllm_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitting_manifest(_: Any, path: Path) -> dict[str, Any]:
        if path.name == "damaged":
            raise DamagedError(f"{path} is damaged: shard is missing; {WAY_OUT}")
        raise UserError(f"{path.name} is of another model")

    monkeypatch.setattr(checkpoint, "fitting_manifest", fitting_manifest)
    train = SimpleNamespace(start_from="")
    setup: Any = SimpleNamespace(
        config=SimpleNamespace(train=train),
        world=SimpleNamespace(broadcast=lambda value: value),
        run=SimpleNamespace(checkpoints=tmp_path),
    )
    trainer: Any = SimpleNamespace(policy=None)
    check_start_fits(setup, trainer)
    train.start_from = "elsewhere/step_000007"
    assert refusal(lambda: check_start_fits(setup, trainer)) == "step_000007 is of another model"
    train.start_from = "elsewhere/damaged"
    assert refusal(lambda: check_start_fits(setup, trainer)).startswith(
        "train.start_from: elsewhere/damaged is damaged"
    )
    saved(tmp_path / "own", 4, left=0)
    setup.run.checkpoints = tmp_path / "own"
    assert refusal(lambda: check_start_fits(setup, trainer)) == "step_000004 is of another model"
    monkeypatch.setattr(checkpoint, "fitting_manifest", lambda _, path: fitting_manifest(_, path.parent / "damaged"))
    check_start_fits(setup, trainer)  # `resume` falls back to an earlier one


@pytest.mark.parametrize(("offloads", "done"), [(True, ["save", "sleep"]), (False, ["save"])])
def test_an_engine_makes_room_for_what_is_offloaded_while_it_is_saved(offloads: bool, done: list[str]) -> None:
    did: list[str] = []
    config = SimpleNamespace(actor=SimpleNamespace(offload_optimizer=offloads), train=None)
    progress, run = SimpleNamespace(during=did.append), SimpleNamespace(checkpoints=None)
    rollout: Any = SimpleNamespace(engine=SimpleNamespace(sleep=lambda: did.append("sleep")))
    setup: Any = SimpleNamespace(config=config, progress=progress, run=run)
    make_saver(setup, cast(Trainer, None), rollout)._make_room()
    assert did == done


@pytest.mark.parametrize(
    ("empty", "saved_step", "saves"),
    [
        (2, 4, ["save 7"]),
        (2, 5, []),  # a checkpoint has step 5, the last with an update
        (7, 0, []),  # there was none
        (0, 4, []),  # the last updates are why
    ],
)
def test_a_run_that_gives_up_saves_what_no_checkpoint_has_and_waits_for_what_is_being_written(
    monkeypatch: pytest.MonkeyPatch, empty: int, saved_step: int, saves: list[str]
) -> None:
    did: list[str] = []
    for name in ("draw_curve", "report"):
        monkeypatch.setattr(checkpoints, name, lambda _, name=name: did.append(name))
    saver: Any = SimpleNamespace(
        save=lambda step, state: did.append(f"save {state['step']}"), finish=lambda: did.append("finish")
    )
    setup: Any = SimpleNamespace(world=SimpleNamespace(barrier=lambda: did.append("wait")))
    counters = Counters(step=7, empty_steps=empty)
    assert refusal(lambda: give_up(setup, saver, counters, saved_step, "too hard")) == "too hard"
    assert did == [*saves, "finish", "draw_curve", "report", "wait"]


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
