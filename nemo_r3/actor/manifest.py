"""Checkpoints as directories: finding, checking, publishing and removing them, without loading any.

    checkpoints/step_000040/   megatron dist_checkpointing ("torch_dist"): model, optimizer
                manifest.json  written last: format, step, weights version and dtype, LoRA's rank and alpha, model
                               shape, which of longrope's factors, the learning rate's schedule, the other files' sizes
                               and SHA-256, the loop's own counters, and a SHA-256 of all that
    checkpoints/.writing       what a save under way has written so far; swept away by the next one

Only a checkpoint with a manifest counts. Nothing here needs torch, which Slurm's batch script lacks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_r3.errors import ConfigError, UserError
from nemo_r3.files import UNREADABLE, sealed, sum_of, unsealed, write_whole

WRITING = ".writing"
MANIFEST = "manifest.json"
FORMAT = 5
"""Raised by a change after which earlier checkpoints can no longer be read."""
WAY_OUT = "remove that checkpoint to resume from the one before"


class DamagedError(UserError):
    """A checkpoint that is not what was saved; the one before it may be."""


def step_path(directory: Path, step: int) -> Path:
    """Where a run's `checkpoints` keep a step."""
    return directory / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The inverse of `step_path`."""
    return int(checkpoint.name.removeprefix("step_"))


def steps_in(directory: Path) -> list[Path]:
    """A run's `checkpoints`, complete or not, newest first; not what a user keeps there as step_000040_best."""
    found = (path for path in directory.glob("step_*") if path.name.removeprefix("step_").isdecimal())
    return sorted(found, key=step_of, reverse=True)


def complete(directory: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` that have a manifest, newest first."""
    return [checkpoint for checkpoint in steps_in(directory) if (checkpoint / MANIFEST).is_file()]


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint in a run's `checkpoints`, or None."""
    return next(iter(complete(directory)), None)


def check_start(start: str, directory: Path) -> None:
    """Refuses a `train.start_from` that is no complete checkpoint, unless the run has its own in its `directory`.

    Raises:
        ConfigError: and the complete ones nearby.
        UserError: it is damaged, or of another format.
    """
    path = Path(start)
    if not start or latest(directory):
        return
    if (path / MANIFEST).is_file():
        with start_named():
            read_manifest(path)
        return
    near = [found for place in (path / "checkpoints", path, path.parent) for found in complete(place)]
    raise ConfigError(
        f"train.start_from: {start} is no complete checkpoint: it has no {MANIFEST}"
        + (f"; complete: {', '.join(map(str, near))}" if near else "")
    )


@contextmanager
def start_named() -> Iterator[None]:
    """Says of a damaged checkpoint which setting names it: there is none before it to fall back to."""
    try:
        yield
    except DamagedError as error:
        raise UserError(f"train.start_from: {str(error).removesuffix(f'; {WAY_OUT}')}") from error


def latest_step(directory: Path) -> int:
    """The step of the newest complete checkpoint in a run's `checkpoints`; 0 where there is none."""
    newest = latest(directory)
    return step_of(newest) if newest else 0


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        DamagedError: it is no complete checkpoint.
        UserError: it is of another format.
    """
    try:
        found = unsealed((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{checkpoint} is not a complete checkpoint ({MANIFEST}: {error}); {WAY_OUT}") from error
    if (form := found.get("format")) != FORMAT:
        raise UserError(
            f"{checkpoint} has format {form}, and this version of nemo_r3 reads format {FORMAT}: continue or export "
            "the run with the version that wrote it; a new run can start from that export"
        )
    return found


def check_sizes(checkpoint: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Refuses a checkpoint with a lost or cut file; `files` is what its manifest says: size and SHA-256 by name.

    Raises:
        DamagedError: naming the file.
    """
    for name, (size, _) in files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes of {size}"
            raise DamagedError(f"{checkpoint} is damaged: {name} {state}; {WAY_OUT}")


def check_sums(checkpoint: Path, files: Mapping[str, tuple[int, str]], sums: Mapping[str, str]) -> None:
    """Refuses a checkpoint with an altered file; `sums` are the SHA-256 of its files by name.

    Raises:
        DamagedError: naming the file.
    """
    for name, (_, total) in files.items():
        if sums[name] != total:
            how = "cannot be read" if sums[name] == UNREADABLE else "has other content than was saved"
            raise DamagedError(f"{checkpoint} is damaged: {name} {how}; {WAY_OUT}")


def is_sound(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete and its files are what was saved."""
    try:
        files = read_manifest(checkpoint)["files"]
        check_sizes(checkpoint, files)
        check_sums(checkpoint, files, {name: sum_of(checkpoint / name) for name in files})
    except DamagedError:
        return False
    return True


def publish(directory: Path, manifest: dict[str, Any], sums: Mapping[str, str]) -> None:
    """Writes the manifest of the save under way and moves it into place: from then on the checkpoint counts.

    Args:
        directory: a run's `checkpoints`.
        manifest: all but its format and `files`.
        sums: SHA-256 of the files by name.
    """
    writing, final = directory / WRITING, step_path(directory, manifest["step"])
    manifest = {"format": FORMAT} | manifest
    files = {name: [(writing / name).stat().st_size, sums[name]] for name in sorted(sums)}
    write_whole(writing / MANIFEST, sealed(manifest | {"files": files}))
    if final.exists():
        _remove(final)  # left by a run that was cut back to an earlier step
    writing.rename(final)


def keep_newest(directory: Path, number: int) -> None:
    """Removes all but the newest `number` complete checkpoints in a run's `checkpoints`."""
    for other in set(steps_in(directory)) - set(complete(directory)[:number]):
        _remove(other)


def _remove(checkpoint: Path) -> None:
    """Deletes the manifest first, so that a half-removed checkpoint never looks complete; of a link, only the link."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def set_aside(checkpoint: Path) -> None:
    """Renames a damaged checkpoint to damaged_step_..., so that it no longer counts."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
