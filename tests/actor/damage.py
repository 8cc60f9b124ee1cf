"""Checkpoints that are foreign, damaged, late or cut by a full disk, and a process that dies while saving."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from data import batch_of
from lab import SAVED, Lab, save_at_work, written_late
from refusals import refusal
from safetensors.torch import load_file

from nemo_r3.actor import checkpoint
from nemo_r3.actor.manifest import MANIFEST, latest, read_manifest
from nemo_r3.actor.policy import Policy
from nemo_r3.actor.saver import Saver
from nemo_r3.actor.trainer import Trainer
from nemo_r3.config import TrainConfig
from nemo_r3.files import sealed


def bad_checkpoints(lab: Lab) -> dict[str, Any]:
    """What loading says of checkpoints that are foreign or damaged, and whether the policy stayed as it was."""
    trainer = lab.trainer("one", "qwen2")
    trainer.update(batch_of())
    good = lab.home / "one-qwen2-checkpoints" / SAVED
    largest, weights = (
        max(good.glob(f"{kind}__0_*.distcp"), key=lambda file: file.stat().st_size).name for kind in ("optimizer", "")
    )

    def damage(name: str, act: Callable[[Path], Any]) -> Path:
        copy = lab.home / "damaged" / name
        shutil.copytree(good, copy)
        act(copy)
        return copy

    cases = {
        "foreign": lab.home / "one-llama_tied-checkpoints" / SAVED,
        "other_weights": damage("other_weights", lambda path: change(path, model="0123456789abcdef")),
        "other_dtype": damage("other_dtype", lambda path: change(path, dtype="bfloat16")),
        "lora": lab.home / "one-qwen2-lora_rank=4-checkpoints" / SAVED,
        "truncated": damage(
            "truncated", lambda path: os.truncate(path / largest, (path / largest).stat().st_size // 2)
        ),
        "shard_lost": damage("shard_lost", lambda path: (path / largest).unlink()),
        "metadata_lost": damage("metadata_lost", lambda path: (path / ".metadata").unlink()),
        "format_lost": damage("format_lost", lambda path: (path / "metadata.json").unlink()),
        "garbled": damage("garbled", lambda path: garble(path / largest)),
        "garbled_weights": damage("garbled_weights", lambda path: garble(path / weights)),
        "manifest_lost": damage("manifest_lost", lambda path: (path / "manifest.json").unlink()),
    }
    found = {}
    for name, path in cases.items():
        message, same = lab.unchanged(trainer, lambda path=path: refusal(lambda: checkpoint.load(trainer, path)))
        found[name] = {"message": message, "unchanged": same}
    bare = Policy(trainer.policy.config, lab.world, with_weights=False)
    weights_alone = {
        name: refusal(lambda path=cases[name]: checkpoint.load_weights(bare, path))
        for name in ("garbled", "garbled_weights")
    }
    return found | {"other_factors": other_factors(lab), "weights_alone": weights_alone}


def garble(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def change(path: Path, **entries: str) -> None:
    """Makes a checkpoint's manifest say something else."""
    (path / MANIFEST).write_text(sealed(read_manifest(path) | entries))


def other_factors(lab: Lab) -> dict[str, Any]:
    """A checkpoint that was trained with longrope's short factors, in a run whose sequences need the long ones."""
    trainer = lab.trainer("one", "phi3_short")
    path = save_at_work(trainer, lab.home / "short", 0, {}, keep=1)
    trainer.policy.config.rollout.max_model_len = 300
    message, same = lab.unchanged(trainer, lambda: refusal(lambda: checkpoint.load(trainer, path)))
    return {"message": message, "unchanged": same}


def full_disk(lab: Lab) -> dict[str, Any]:
    """A save that runs out of room, at two places, and what is left of the earlier checkpoint."""
    directory, trainer = lab.home / "full", lab.trainer("one", "llama")
    trainer.update(batch_of())
    save_at_work(trainer, directory, 1, {"cursor": 1}, keep=1)
    expected = lab.weights(trainer.policy)
    trainer.update(batch_of())
    found: dict[str, Any] = {}
    for name, limit in (("at_once", 0), ("in_a_shard", 50_000)):
        found[name] = refusal(lambda limit=limit: limited(limit, lambda: save_at_work(trainer, directory, 2, {}, 1)))
        found[f"{name} left"] = sorted(path.name for path in directory.iterdir())
    again = lab.trainer("one", "llama")
    found["cursor"] = checkpoint.load(again, latest(directory))["state"]
    restored = lab.weights(again.policy)
    found["earlier_loads"] = all(torch.equal(restored[name], expected[name]) for name in expected)
    save_at_work(trainer, directory, 2, {}, keep=1)  # once there is room again
    found["afterwards"] = sorted(path.name for path in directory.iterdir())
    return found


def limited(size: int, act: Callable[[], Any]) -> Any:
    """Runs `act` where no file may grow beyond `size` bytes: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        return act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def written_late_by_rank_1(lab: Lab, trainer: Trainer) -> dict[str, Any]:
    """When a save in the background counts: the directory before any rank, one and both of them have written."""
    directory = lab.home / "late"
    config = TrainConfig(keep_checkpoints=1, save_in_background=True)
    saver = Saver(trainer, directory, config, lambda: None)
    found: dict[str, Any] = {}

    def look(name: str) -> None:
        lab.world.barrier()
        assert saver.after(2, {}) is None
        lab.world.barrier()
        found[name] = sorted(path.name for path in directory.iterdir())

    gathered = patch.object(dist, "all_gather_object", wraps=dist.all_gather_object)
    with written_late() as let_write, gathered as gather:
        saver.save(1, {})
        look("written by none")
        if lab.world.rank == 0:
            let_write()
            wait_until_written(saver)
        look("written by rank 0")
        let_write()
        wait_until_written(saver)
    look("written by both")
    lab.note("descriptions", sum(isinstance(call.args[1], list) for call in gather.call_args_list))
    return found


def wait_until_written(saver: Saver) -> None:
    """Returns after ten seconds at the latest."""
    end = time.monotonic() + 10
    while saver._saving is not None and not saver._saving.strategy.is_written() and time.monotonic() < end:
        time.sleep(0.01)


def killed_while_saving(lab: Lab) -> None:
    """Ends this process by SIGKILL when all shards of step 2 are written and nothing says so yet."""
    trainer, directory = lab.trainer("one", "qwen2_tied"), lab.home / "killed"
    trainer.update(batch_of())
    save_at_work(trainer, directory, 1, {"cursor": 1}, keep=2)
    lab.keep("killed-1", lab.weights(trainer.policy))
    trainer.update(batch_of())
    checkpoint.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    save_at_work(trainer, directory, 2, {"cursor": 2}, keep=2)


def after_the_kill(lab: Lab) -> dict[str, Any]:
    directory = lab.home / "killed"
    before = sorted(path.name for path in directory.iterdir())
    newest = latest(directory)
    assert newest is not None
    trainer = lab.trainer("tp2", "qwen2_tied")
    state = checkpoint.load(trainer, newest)["state"]
    ours, theirs = lab.weights(trainer.policy), load_file(lab.home / "killed-1.weights.safetensors")
    save_at_work(trainer, directory, 3, {}, keep=1)
    return {
        "before": before,
        "latest": newest.name,
        "state": state,
        "same_weights": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "after": sorted(path.name for path in directory.iterdir()),
    }
