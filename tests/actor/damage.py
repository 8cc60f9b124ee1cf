"""What checkpoints do when they are foreign, damaged, cut by a full disk, or when the process dies while saving."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import batch_of
from lab import Lab
from safetensors.torch import load_file

from nemo_r3.actor import checkpoint
from nemo_r3.actor.manifest import latest
from nemo_r3.errors import UserError


def bad_checkpoints(lab: Lab) -> dict[str, Any]:
    """What loading says of checkpoints that are foreign or damaged, and whether the policy stayed as it was."""
    policy = lab.policy("one", "qwen2")
    policy.update(batch_of())
    good = lab.home / "one-qwen2-checkpoints" / "step_000002"
    largest = max(good.glob("*.distcp"), key=lambda file: file.stat().st_size).name

    def damage(name: str, act: Callable[[Path], Any]) -> Path:
        copy = lab.home / "damaged" / name
        shutil.copytree(good, copy)
        act(copy)
        return copy

    cases = {
        "foreign": lab.home / "one-llama_tied-checkpoints" / "step_000002",
        "absent": lab.home / "damaged" / "nowhere",
        "truncated": damage(
            "truncated", lambda path: os.truncate(path / largest, (path / largest).stat().st_size // 2)
        ),
        "emptied": damage("emptied", lambda path: os.truncate(path / largest, 0)),
        "shard_lost": damage("shard_lost", lambda path: (path / largest).unlink()),
        "metadata_lost": damage("metadata_lost", lambda path: (path / ".metadata").unlink()),
        "metadata_cut": damage("metadata_cut", lambda path: os.truncate(path / ".metadata", 100)),
        "format_lost": damage("format_lost", lambda path: (path / "metadata.json").unlink()),
        "format_cut": damage("format_cut", lambda path: os.truncate(path / "metadata.json", 10)),
        "garbled": damage("garbled", lambda path: (path / largest).write_bytes(bytes((path / largest).stat().st_size))),
        "manifest_lost": damage("manifest_lost", lambda path: (path / "manifest.json").unlink()),
        "manifest_cut": damage("manifest_cut", lambda path: os.truncate(path / "manifest.json", 30)),
        "manifest_empty": damage("manifest_empty", lambda path: (path / "manifest.json").write_text("{}")),
    }
    found = {}
    for name, path in cases.items():
        message, same = lab.unchanged(policy, lambda path=path: refusal(lambda: checkpoint.load(policy, path)))
        found[name] = {"message": message, "unchanged": same}
    return found


def refusal(act: Callable[[], Any]) -> str:
    """A `UserError`'s message; anything else is told by its type, so that a test can say what came instead."""
    try:
        act()
    except UserError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001  torch's CheckpointException is no Exception
        return f"{type(error).__name__}, no UserError"
    return "accepted"


def full_disk(lab: Lab) -> dict[str, Any]:
    """A save that runs out of room, at two places, and what is left of the earlier checkpoint."""
    directory, policy = lab.home / "full", lab.policy("one", "llama")
    policy.update(batch_of())
    checkpoint.save(policy, directory, 1, {"cursor": 1}, keep=1)
    expected = lab.weights(policy)
    policy.update(batch_of())
    found: dict[str, Any] = {}
    for name, limit in (("at_once", 0), ("in_a_shard", 50_000)):
        found[name] = refusal(lambda limit=limit: limited(limit, lambda: checkpoint.save(policy, directory, 2, {}, 1)))
        found[f"{name} left"] = sorted(path.name for path in directory.iterdir())
    again = lab.policy("one", "llama")
    found["cursor"] = checkpoint.load(again, latest(directory))["state"]
    restored = lab.weights(again)
    found["earlier_loads"] = all(torch.equal(restored[name], expected[name]) for name in expected)
    checkpoint.save(policy, directory, 2, {}, keep=1)  # once there is room again
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


def killed_while_saving(lab: Lab) -> None:
    """Ends this process by SIGKILL when all shards of step 2 are written and nothing says so yet."""
    policy, directory = lab.policy("one", "qwen2_tied"), lab.home / "killed"
    policy.update(batch_of())
    checkpoint.save(policy, directory, 1, {"cursor": 1}, keep=2)
    lab.keep("killed-1", lab.weights(policy))
    policy.update(batch_of())
    checkpoint.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    checkpoint.save(policy, directory, 2, {"cursor": 2}, keep=2)


def after_the_kill(lab: Lab) -> dict[str, Any]:
    directory = lab.home / "killed"
    before = sorted(path.name for path in directory.iterdir())
    newest = latest(directory)
    assert newest is not None
    policy = lab.policy("tp2", "qwen2_tied")
    state = checkpoint.load(policy, newest)["state"]
    ours, theirs = lab.weights(policy), load_file(lab.home / "killed-1.weights.safetensors")
    checkpoint.save(policy, directory, 3, {}, keep=1)
    return {
        "before": before,
        "latest": newest.name,
        "state": state,
        "same_weights": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "after": sorted(path.name for path in directory.iterdir()),
    }
