"""Checkpoints: resumed at the same layout and at others, damaged, foreign, on a full disk, killed half-way."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import chain, count, repeat
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from nemo_r3.actor import checkpoint, saver
from nemo_r3.actor.checkpoint_writer import ThreadedSave
from nemo_r3.actor.trainer import Trainer
from nemo_r3.config import TrainConfig
from nemo_r3.errors import UserError
from nemo_r3.files import UNREADABLE

LORA = "qwen2-lora_rank=4"
EXPERTS_LORA = "qwen3_moe-lora_rank=4"
SAME = [
    "one-to-one-llama_tied",
    "one-to-one-qwen2",
    "tp2-to-tp2-qwen2",
    "pp2-to-pp2-llama_tied",
    "dp2-to-dp2-qwen2",
    f"one-to-one-{LORA}",
    "ep2-to-ep2-qwen3_moe",
]
OTHER = [
    "one-to-tp2-llama_tied",
    "tp2-to-pp2-qwen2",
    "pp2-to-dp2-llama_tied",
    "dp2-to-tp2pp2-qwen2",
    "tp2pp2-to-tp2dp2-llama_tied",
    f"tp2-to-tp2pp2-{LORA}",
    "one-to-ep2-qwen3_moe",
    "ep2-to-dp2-qwen3_moe",
    "ep2-to-tp2ep2-qwen3_moe",
    f"one-to-ep2-{EXPERTS_LORA}",
    f"ep2-to-dp2-{EXPERTS_LORA}",
]
DAMAGED = {
    "truncated": ".distcp has",
    "shard_lost": ".distcp is missing",
    "metadata_lost": ".metadata is missing",
    "garbled": "distcp has other content than was saved",
    "garbled_weights": "distcp has other content than was saved",
    "format_lost": "metadata.json is missing",
    "manifest_lost": "is not a complete checkpoint",
}
FOREIGN = {
    "foreign": ("is a checkpoint of another model (family llama != qwen2", "set model.path to"),
    "other_weights": ("began with other weights (fingerprint 0123456789abcdef) than model.path=", "set model.path to"),
    "other_dtype": ("has weights in bfloat16, and actor.precision=fp32 keeps them in float32", "set one that keeps"),
    "lora": (
        "trains LoRA of rank 4 and alpha 32, and this run all weights",
        "set actor.lora_rank and actor.lora_alpha",
    ),
    "other_factors": ("was trained with longrope's short factors", "rollout.max_model_len=300 takes the long ones"),
}


def saved_at(name: str) -> str:
    """The policy that went on without a stop: "tp2-to-pp2-qwen2" -> "tp2-qwen2"."""
    layout, _, _, kind = name.split("-", 3)
    return f"{layout}-{kind}"


@pytest.mark.parametrize("name", SAME + OTHER)
def test_a_checkpoint_gives_back_what_it_was_saved_with(every: dict[str, Any], name: str) -> None:
    found = every[name]
    assert (found["step"], found["state"], found["loaded_version"]) == (3, {"cursor": 5}, 2)
    assert found["same_without_weights"]
    assert found["version"] == found["steps"] == 5


@pytest.mark.parametrize("name", sorted({saved_at(name) for name in SAME + OTHER}))
def test_a_save_in_the_background_is_the_same_to_the_byte_while_the_policy_moves_on(
    every: dict[str, Any], name: str
) -> None:
    """Its shards are written after three more updates."""
    assert every[name]["background"] == {"early": False, "same": True}


def test_a_save_in_the_background_counts_once_every_rank_has_written(two: Any) -> None:
    assert two.found["late"] == {
        "written by none": [".writing"],
        "written by rank 0": [".writing"],
        "written by both": ["step_000001"],
    }


@pytest.mark.parametrize("name", SAME)
def test_at_the_same_layout_nothing_differs_from_the_uninterrupted_run(
    one: Any, every: dict[str, Any], name: str
) -> None:
    assert every[name]["metrics"] == every[saved_at(name)]["metrics"][2:]
    for update in (3, 5):
        ours, theirs = (load_file(one.home / f"{n}-{update}.weights.safetensors") for n in (name, saved_at(name)))
        assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", OTHER)
def test_at_another_layout_the_run_goes_on_as_before(one: Any, every: dict[str, Any], name: str) -> None:
    for found, expected in zip(every[name]["metrics"], every[saved_at(name)]["metrics"][2:], strict=True):
        for key in ("loss", "kl", "grad_norm", "lr", "token_mult_prob_error"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    for update in (3, 5):
        ours, theirs = (load_file(one.home / f"{n}-{update}.weights.safetensors") for n in (name, saved_at(name)))
        assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) < 1e-5
    assert every[name]["same_everywhere"]


@pytest.mark.parametrize("name", ["one-qwen2", "tp2-llama_tied"])
def test_a_new_run_starts_with_a_checkpoints_weights_and_moments_and_its_own_learning_rate(
    one: Any, every: dict[str, Any], name: str
) -> None:
    """As far along its schedule as the run that resumed, it makes the same update; at its beginning it has its own."""
    found, resumed = every[f"fork-{name}"], every[f"one-to-{name}"]
    assert (found["schedule"], found["version"]) == ("its own", 2)
    assert found["same"] == resumed["metrics"][0]
    ours, theirs = (load_file(one.home / f"{kind}-{name}-3.weights.safetensors") for kind in ("fork", "one-to"))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert found["other"]["lr"] == 2e-3
    assert found["other"]["grad_norm"] == found["same"]["grad_norm"]


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(one: Any, case: str) -> None:
    found = one.found["bad_checkpoints"][case]
    assert DAMAGED[case] in found["message"]
    assert "remove that checkpoint to resume from the one before" in found["message"]
    assert found["unchanged"]


def test_whoever_takes_the_weights_alone_reads_and_checks_no_more(one: Any) -> None:
    said = one.found["bad_checkpoints"]["weights_alone"]
    assert said["garbled"] == "accepted"
    assert "other content than was saved" in said["garbled_weights"]


@pytest.mark.parametrize("case", FOREIGN)
def test_a_checkpoint_of_another_run_is_refused(one: Any, case: str) -> None:
    found = one.found["bad_checkpoints"][case]
    assert all(part in found["message"] for part in FOREIGN[case]), found["message"]
    assert found["unchanged"]


@pytest.mark.parametrize("case", ["at_once", "in_a_shard"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(one: Any, case: str) -> None:
    found = one.found["full_disk"]
    assert found[case].startswith(f"cannot write {one.home}/full/step_000002: ")
    assert "the last good checkpoint is" in found[case] and "make room" in found[case]
    assert found[f"{case} left"] == ["step_000001"]


def test_after_a_full_disk_the_earlier_checkpoint_loads_and_saving_works_again(one: Any) -> None:
    found = one.found["full_disk"]
    assert found["cursor"] == {"cursor": 1} and found["earlier_loads"]
    assert found["afterwards"] == ["step_000002"]


def test_a_field_that_only_the_checkpoints_model_has_is_named() -> None:
    theirs, ours = {"family": "smollm3", "nope_layers": [3]}, {"family": "smollm3"}
    assert checkpoint._differences(theirs, ours) == "nope_layers [3] != None"


def test_a_full_disk_on_another_rank_ends_all_ranks_in_one_line(two: Any) -> None:
    assert two.code != 0
    lines = [line for line in two.errors.splitlines() if "error: cannot write" in line]
    assert len(lines) == 1 and "step_000002" in lines[0]
    assert sorted(path.name for path in (two.home / "full-two").iterdir()) == ["step_000001"]


def test_killed_while_saving_the_checkpoint_before_counts(one: Any, two: Any) -> None:
    assert one.code == -9
    found = two.found["killed"]
    assert found["before"] == [".writing", "step_000001"]
    assert (found["latest"], found["state"], found["same_weights"]) == ("step_000001", {"cursor": 1}, True)


def test_the_next_save_sweeps_up_and_keeps_as_many_as_asked(two: Any) -> None:
    assert two.found["killed"]["after"] == ["step_000003"]


def test_a_save_gathers_what_all_ranks_hold_once_to_deal_it_and_once_to_check_it(two: Any) -> None:
    assert two.found["descriptions"] == 2


def test_the_last_launch_ends_well(four: Any) -> None:
    assert four.code == 0, four.errors[-3000:]


@pytest.mark.parametrize(("sizes", "said"), [(repeat(7), "nothing was written for run.timeout_"), (count(), "torn")])
def test_a_save_is_given_up_once_its_files_no_longer_grow(tmp_path: Path, sizes: Iterator[int], said: str) -> None:
    def finish() -> None:
        raise OSError("torn")

    done = chain(repeat(False, 6), repeat(True))
    told = {"is_written": lambda: next(done), "bytes_written": lambda: next(sizes), "abandon": lambda: None}
    strategy: Any = SimpleNamespace(**told, finish=finish)
    world: Any = SimpleNamespace(is_main=True, gather=lambda item: [item], timeout=timedelta(seconds=0.005))
    saving = checkpoint.Saving(world, tmp_path, {"step": 2}, strategy)
    with pytest.raises(UserError, match=rf"cannot write .*/step_000002: .*{said}.*there is no earlier checkpoint"):
        checkpoint.finish(saving, keep=1)


def test_what_a_failed_save_is_still_writing_goes_too(tmp_path: Path) -> None:
    """With megatron-core 0.19 a full disk is seen as soon as its config is to be written, beside the shards."""

    def write() -> None:
        time.sleep(0.2)
        saving.writing.mkdir()
        (saving.writing / "__0_0.distcp").touch()

    strategy = ThreadedSave(copies=False)
    strategy._thread = Thread(target=write)
    world: Any = SimpleNamespace(is_main=True)
    saving = checkpoint.Saving(world, tmp_path, {"step": 2}, strategy)
    with pytest.raises(UserError, match="cannot write .*: no room"), checkpoint._explained(saving):
        strategy._thread.start()
        raise OSError("no room")
    strategy._thread.join()
    assert not saving.writing.exists()


@pytest.mark.parametrize(
    "fault", [RuntimeError("[/pytorch/third_party/gloo/pair.cc] Connection closed"), torch.OutOfMemoryError("3 GiB")]
)
def test_a_lost_rank_or_a_full_gpu_is_not_called_a_full_disk(tmp_path: Path, fault: RuntimeError) -> None:
    world: Any = SimpleNamespace(is_main=True, gather=lambda item: [item])
    strategy: Any = SimpleNamespace(is_written=lambda: True, finish=Mock(side_effect=fault))
    with pytest.raises(RuntimeError) as caught:
        checkpoint.finish(checkpoint.Saving(world, tmp_path, {"step": 2}, strategy), keep=1)
    assert caught.value is fault


def test_a_shard_that_cannot_be_read_back_does_not_count(tmp_path: Path) -> None:
    """The checkpoint before would make way for it."""
    (tmp_path / ".writing").mkdir()
    world: Any = SimpleNamespace(
        is_main=True, rank=0, size=1, gather=lambda item: [item], merge=dict, broadcast=lambda item: item
    )
    told = {"is_written": lambda: True, "finish": lambda: None, "abandon": lambda: None}
    written: Any = SimpleNamespace(**told, sums={"shard": UNREADABLE})
    with pytest.raises(UserError, match=r"cannot write .*/step_000002: .*what was written cannot be read back"):
        checkpoint.finish(checkpoint.Saving(world, tmp_path, {"step": 2}, written), keep=1)
    assert not any(tmp_path.iterdir())


def test_any_error_of_a_thread_that_writes_is_handed_to_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, that would wait for results for ever."""
    saving, results, error = ThreadedSave(copies=False), SimpleQueue[Any](), RuntimeError("unexpected pos")
    monkeypatch.setattr(saving, "_write_file", Mock(side_effect=error))
    saving._work = [], [("a file", None)], cast(Any, results)
    saving._write()
    assert results.get_nowait() is error and saving._work is None


@pytest.mark.parametrize("act", ["begin", "finish", "load"])
def test_python_looks_for_no_garbage_among_all_ranks_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, act: str
) -> None:
    enabled = []

    def fail(*_: Any, **__: Any) -> None:
        enabled.append(gc.isenabled())
        raise KeyError

    monkeypatch.setattr(checkpoint, "_identity", fail)
    monkeypatch.setattr(dist_checkpointing, "load", fail)
    monkeypatch.setattr(checkpoint, "without_code", lambda *_: nullcontext())
    nothing: Any = SimpleNamespace(policy=SimpleNamespace(version=0), world=None, gather=list)
    saving = checkpoint.Saving(nothing, tmp_path, {"step": 2}, cast(Any, SimpleNamespace(is_written=fail)))
    acts = {
        "begin": lambda: checkpoint.begin(nothing, tmp_path, 1, {}),
        "finish": lambda: checkpoint.finish(saving, keep=1),
        "load": lambda: checkpoint._read(nothing, tmp_path, {}, 1),
    }
    with pytest.raises(KeyError):
        acts[act]()
    assert (enabled, gc.isenabled()) == ([False], True)


def test_a_save_is_due_by_steps_at_the_end_and_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 59.0, 60.0, 61.0, 120.0, 121.0])
    monkeypatch.setattr(saver.time, "monotonic", lambda: next(clock))
    config = TrainConfig(steps=7, save_every=3, save_minutes=1.0)
    saves, done = pretended(monkeypatch, config)
    assert [saves.is_due(step) for step in (3, 7, 1, 2)] == [True, True, False, True]
    saves.save(2, {})
    assert [saves.is_due(step) for step in (4, 5)] == [False, True], "a minute since the last save began"
    assert done == ["room", "at work", "begin 2", "finish 2", "at rest"], "room is made for the trainer at work"
    monkeypatch.setattr(saver.time, "monotonic", lambda: 1e9)
    monkeypatch.setattr(saves._trainer.policy.world, "broadcast", lambda _: False)
    assert not saves.is_due(4), "by rank 0's clock"
    config.save_minutes = 0.0
    assert [saves.is_due(step) for step in (1, 2, 3)] == [False, False, True]


def test_a_save_in_the_background_ends_before_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    saves, done = pretended(monkeypatch, TrainConfig(save_in_background=True))
    for step in (1, 2):
        saves.save(step, {})
    saves.finish()
    saves.finish()
    assert [act for act in done if act[-1].isdigit()] == ["begin 1", "finish 1", "begin 2", "finish 2"]


def test_after_each_step_what_is_written_counts_and_what_is_due_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    saves, done = pretended(monkeypatch, TrainConfig(steps=9, save_every=3, save_in_background=True))
    assert [saves.after(step, {}) for step in (2, 3, 4)] == [None, Path("3"), None]
    assert not any("finish" in act for act in done), "it is being written"
    done.append("written 3")
    assert saves.after(5, {}) is None and done[-1] == "finish 3"


def pretended(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> tuple[saver.Saver, list[str]]:
    """A saver that writes nothing, and what it has done."""
    done: list[str] = []

    def begin(trainer: Trainer, directory: Path, step: int, *_: Any) -> SimpleNamespace:
        done.append(f"begin {step}")
        return SimpleNamespace(step=step, final=directory / str(step), is_written=lambda: f"written {step}" in done)

    monkeypatch.setattr(checkpoint, "begin", begin)
    monkeypatch.setattr(checkpoint, "finish", lambda saving, keep: done.append(f"finish {saving.step}"))

    @contextmanager
    def at_work() -> Iterator[None]:
        done.append("at work")
        yield
        done.append("at rest")

    policy = SimpleNamespace(world=SimpleNamespace(broadcast=lambda item: item))
    trainer = cast(Trainer, SimpleNamespace(policy=policy, at_work=at_work))
    return saver.Saver(trainer, Path(), config, lambda: done.append("room")), done
