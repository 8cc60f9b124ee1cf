"""Files are written whole or not at all, and what cannot be written is named."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import cast

import pytest

from nemo_r3 import files
from nemo_r3.errors import UserError
from nemo_r3.files import filename_in_errors, sealed, take_lock, unsealed, write_whole


@pytest.mark.parametrize("content", ["ä\n", b"\xff\r\n"])
def test_text_and_bytes_are_written_as_they_are(tmp_path: Path, content: str | bytes) -> None:
    write_whole(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "x"
    write_whole(file, "old")
    with pytest.raises(TypeError):
        write_whole(file, cast(str, 3))
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "x", list[tuple[str, str]]()

    def fsync(descriptor: int) -> None:
        seen.append((file.read_text(), Path(f"/proc/self/fd/{descriptor}").read_text()))

    file.write_text("old")
    monkeypatch.setattr(files.os, "fsync", fsync)
    write_whole(file, "new")
    assert seen == [("old", "new")]


def test_an_object_that_was_changed_since_it_was_sealed_is_refused() -> None:
    content = {"b": [1, 2.5, None], "a": {"ä": "\ud800"}}
    text = sealed(content)
    assert unsealed(text) == content
    for changed in (text.replace("2.5", "3.5"), text.replace("sum", "sun"), "{}", text[:-5], "[1]", "[" * 100_000):
        with pytest.raises(ValueError, match="changed since|JSON|string"):
            unsealed(changed)


def test_a_write_that_finds_no_room_names_the_file() -> None:
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as error, filename_in_errors(full):
        with full.open("w") as file:
            file.write("x")
            file.flush()
    assert error.value.errno == errno.ENOSPC


def test_a_directory_has_one_writer_and_a_requeued_job_waits_for_a_lost_nodes_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = (tmp_path / ".lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")  # as a container is given it that takes it over where there is none
    with pytest.raises(UserError, match=f"another process is writing to {tmp_path}"):
        take_lock(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: held.close())
    take_lock(tmp_path)
    files._locks.pop().close()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(handle: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    take_lock(tmp_path)
    assert f"{tmp_path}/.lock cannot be locked here (Function not implemented)" in capsys.readouterr().err
    files._locks.pop().close()
