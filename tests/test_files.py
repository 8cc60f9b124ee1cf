"""Files are written whole or not at all, and what cannot be written is named."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import cast

import pytest

from nemo_r3.files import filename_in_errors, write_whole


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


def test_a_write_that_finds_no_room_names_the_file() -> None:
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as error, filename_in_errors(full):
        with full.open("w") as file:
            file.write("x")
            file.flush()
    assert error.value.errno == errno.ENOSPC
