"""Real file systems that fill up, or become read-only, under a run that saves."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch import QUICKSTART, SMALL, run, start

from nemo_r3.actor.manifest import is_sound
from recipes.fault_injection import untimed

MB = 2**20
CHECKPOINT = 11 * MB
"""Of the embedded model with its optimizer: 10.6 million bytes."""
TIGHT = 21_000_000
"""Two checkpoints fit by the arithmetic of set-up, which does not know what their indices take."""
MS_RDONLY, MS_REMOUNT = 1, 32


def mount(path: Path, size: int, flags: int = 0) -> bool:
    """Mounts a tmpfs, or gives it other options; False where that is not allowed, or a file is being written."""
    options = f"size={size}".encode()
    return ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(path), b"tmpfs", ctypes.c_ulong(flags), options) == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for not quite two checkpoints, where a run's checkpoints go."""
    path = tmp_path / "run" / "checkpoints"
    path.mkdir(parents=True)
    if not mount(path, TIGHT):
        pytest.skip("mounting a tmpfs is not allowed here: it needs root and CAP_SYS_ADMIN")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def settings(bank: Path, disk: Path) -> tuple[str, ...]:
    saved = (f"run.dir={disk.parent}", "train.save_every=1", "train.keep_checkpoints=1")
    return (QUICKSTART, *SMALL, f"failures.path={bank}", *saved, "train.steps=4", "evaluate.every=2")  # as `trained`


def cause(errors: str, disk: Path) -> str:
    """The one error line of a run that could not save step 2, and what it must say in any case."""
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors
    assert f"cannot write {disk}/step_000002: " in line
    assert f"the last good checkpoint is {disk}/step_000001; " in line
    assert is_sound(disk / "step_000001")
    return line


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(bank: Path, disk: Path) -> None:
    done = run("train", *settings(bank, disk), succeed=False)
    assert done.returncode == 2
    assert "No space left on device" in cause(done.stderr, disk)
    assert sorted(found.name for found in disk.iterdir()) == ["step_000001"]


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_during_a_save_leaves_the_checkpoint_before(
    bank: Path, trained: Path, disk: Path
) -> None:
    assert mount(disk, 10 * CHECKPOINT, MS_REMOUNT)
    process = start("train", *settings(bank, disk))
    until(lambda: (disk / "step_000001" / "manifest.json").exists(), process)
    until(lambda: any((disk / ".writing").glob("*.distcp")), process)
    until(lambda: mount(disk, 10 * CHECKPOINT, MS_REMOUNT | MS_RDONLY), process)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Read-only file system" in cause(said, disk)
    assert any((disk / ".writing").iterdir()), "it was in the middle of the save"
    assert mount(disk, 10 * CHECKPOINT, MS_REMOUNT)
    assert "resuming after step 1 " in run("train", *settings(bank, disk)).stdout
    assert untimed(disk.parent / "metrics.jsonl") == untimed(trained / "metrics.jsonl")


def until(happened: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.0005)
