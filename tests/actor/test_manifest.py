"""What is said of a checkpoint without loading it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from refusals import refusal

from nemo_r3.actor.manifest import (
    FORMAT,
    MANIFEST,
    WAY_OUT,
    WRITING,
    DamagedError,
    check_start,
    complete,
    is_sound,
    keep_newest,
    latest,
    latest_step,
    publish,
    read_manifest,
    set_aside,
    step_path,
)
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.files import sealed, sum_of


def saved(directory: Path, step: int = 1) -> Path:
    """A checkpoint with one shard, as `checkpoint.finish` leaves it."""
    writing = directory / WRITING
    writing.mkdir(parents=True)
    (writing / "shard").write_bytes(b"weights")
    publish(directory, {"step": step}, {"shard": sum_of(writing / "shard")})
    return step_path(directory, step)


def test_a_checkpoint_counts_once_it_is_published(tmp_path: Path) -> None:
    assert (latest(tmp_path), latest_step(tmp_path)) == (None, 0)
    (tmp_path / WRITING).mkdir()
    step_path(tmp_path, 9).mkdir()  # one that died while it was removed
    assert latest_step(tmp_path) == 0
    (tmp_path / WRITING).rmdir()
    older, newer = saved(tmp_path, 999_999), saved(tmp_path, 1_000_000)
    assert complete(tmp_path) == [newer, older]
    assert (latest(tmp_path), latest_step(tmp_path)) == (newer, 1_000_000)
    assert sorted(file.name for file in newer.iterdir()) == [MANIFEST, "shard"]


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path: Path) -> None:
    (saved(tmp_path) / "old").touch()
    assert not (saved(tmp_path) / "old").exists()


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [saved(tmp_path, step) for step in (1, 2, 3)]
    with monkeypatch.context() as removing, pytest.raises(OSError, match="cut short"):
        removing.setattr("shutil.rmtree", Mock(side_effect=OSError("cut short")))
        keep_newest(tmp_path, 2)
    assert complete(tmp_path) == [steps[2], steps[1]], "one whose removal was cut short no longer counts"
    (saved(tmp_path, 4) / MANIFEST).unlink()  # it would take the place of one that can be loaded
    keep_newest(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == steps[1:]
    assert complete(tmp_path) == [steps[2], steps[1]]


def test_a_run_can_start_from_what_is_complete_and_others_are_named(tmp_path: Path) -> None:
    there, own = saved(tmp_path / "first" / "checkpoints", 4), tmp_path / "second" / "checkpoints"
    named = f"is no complete checkpoint: it has no manifest.json; complete: {there}"
    for start in (tmp_path / "first", there.parent, there.with_name("step_000009")):
        said = refusal(lambda start=start: check_start(str(start), own), ConfigError)
        assert said == f"train.start_from: {start} {named}"
    assert refusal(lambda: check_start("gone", own)).endswith("it has no manifest.json")
    check_start(str(there), own)
    check_start("", own)
    for text, said in (
        (sealed({"format": 0}), f"{there} has format 0, "),
        ("{", f"train.start_from: {there} is not a "),
    ):
        (there / MANIFEST).write_text(text)
        found = refusal(lambda: check_start(str(there), own))
        assert found.startswith(said) and WAY_OUT not in found
    saved(own)
    check_start("gone", own)


def test_a_copy_that_a_user_keeps_there_is_left_alone(tmp_path: Path) -> None:
    kept = saved(tmp_path, 1).rename(tmp_path / "step_000001_best")
    two = saved(tmp_path, 2)
    assert complete(tmp_path) == [two]
    keep_newest(tmp_path, 1)
    assert sorted(tmp_path.iterdir()) == [kept, two]


def test_of_a_link_to_a_checkpoint_elsewhere_only_the_link_is_removed(tmp_path: Path) -> None:
    elsewhere = saved(tmp_path / "other_disk", 1)
    (tmp_path / "run").mkdir()
    step_path(tmp_path / "run", 1).symlink_to(elsewhere)
    saved(tmp_path / "run", 2)
    keep_newest(tmp_path / "run", 1)
    assert (len(complete(tmp_path / "run")), is_sound(elsewhere)) == (1, True)


def test_one_that_is_set_aside_no_longer_counts(tmp_path: Path) -> None:
    for _ in range(2):
        set_aside(saved(tmp_path))
    assert latest(tmp_path) is None
    assert [found.name for found in tmp_path.iterdir()] == ["damaged_step_000001"]


def test_a_damaged_checkpoint_is_not_sound(tmp_path: Path) -> None:
    """What `load` says of each is in test_checkpoint.py."""
    assert is_sound(saved(tmp_path / "whole"))
    altered, cut, lost, unsaid = (saved(tmp_path / name) for name in ("altered", "cut", "lost", "unsaid"))
    (altered / "shard").write_bytes(b"Weights")
    (cut / "shard").write_bytes(b"weight")
    (lost / "shard").unlink()
    (unsaid / MANIFEST).write_text((unsaid / MANIFEST).read_text()[:20])
    other = saved(tmp_path / "other", 2)
    (other / MANIFEST).write_text((other / MANIFEST).read_text().replace('"step": 2', '"step": 3'))
    assert not any(is_sound(checkpoint) for checkpoint in (altered, cut, lost, unsaid, other, tmp_path / "nowhere"))
    with pytest.raises(DamagedError, match="is not a complete checkpoint"):
        read_manifest(unsaid)


def test_another_version_s_checkpoint_is_no_damage(tmp_path: Path) -> None:
    """It must not be set aside, even if its fields are others."""
    (saved(tmp_path) / MANIFEST).write_text(sealed({"format": FORMAT - 1, "shards": {}}))
    with pytest.raises(
        UserError, match=f"step_000001 has format {FORMAT - 1}, and this version of nemo_r3 reads format {FORMAT}: "
    ) as caught:
        read_manifest(step_path(tmp_path, 1))
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00{", b"[" * 100_000, b"{}", b'{"format": 2, "step": 1, "files": {}}'])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, content: bytes) -> None:
    """So that a resume falls back to the checkpoint before."""
    (saved(tmp_path) / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match="is not a complete checkpoint"):
        read_manifest(step_path(tmp_path, 1))
