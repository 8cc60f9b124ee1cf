"""Checkpoints of the policy: written whole or not at all, loadable at another layout.

    checkpoints/step_000040/   megatron dist_checkpointing ("fully_reshardable"): model, optimizer, schedule
                manifest.json  written last: step, weights version, model shape, which of longrope's factors, the
                               other files' sizes and SHA-256, and the loop's own counters
    checkpoints/.writing       what a save under way has written so far; swept away by the next one

No generator state is kept: every step is seeded by (seed, step), see `runtime.seed_step`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint import CheckpointException  # a BaseException

from nemo_r3.actor.checkpoint_writer import UNREADABLE, ThreadedSave, sum_of
from nemo_r3.actor.cpu import on_any_device
from nemo_r3.actor.policy import Policy
from nemo_r3.errors import UserError
from nemo_r3.runtime import World, is_collective

WRITING = ".writing"
MANIFEST = "manifest.json"
NORM_STATE = "decoder.final_layernorm._extra_state"
WAY_OUT = "remove that checkpoint to resume from the one before"
FIELDS = {"step", "version", "architecture", "rope", "files", "state", "model"}


class DamagedError(UserError):
    """A checkpoint that is not what was saved; the one before may be."""


def complete(directory: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` that have a manifest, newest first."""
    return sorted((file.parent for file in directory.glob(f"step_*/{MANIFEST}")), reverse=True)


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint in a run's `checkpoints`, or None."""
    return next(iter(complete(directory)), None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        DamagedError: it is no complete checkpoint.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DamagedError(f"{checkpoint} is not a complete checkpoint ({error}); {WAY_OUT}") from error
    if not isinstance(manifest, dict) or not manifest.keys() >= FIELDS:
        raise DamagedError(f"{checkpoint / MANIFEST} is damaged: it lacks {sorted(FIELDS - set(manifest))}; {WAY_OUT}")
    return manifest


@dataclass(frozen=True)
class Saving:
    """A save under way.

    Attributes:
        world: all ranks.
        directory: the run's `checkpoints`.
        manifest: what the checkpoint will say of itself, but for its files.
        strategy: writes the shards.
    """

    world: World
    directory: Path
    manifest: dict[str, Any]
    strategy: ThreadedSave

    @property
    def writing(self) -> Path:
        """What has been written so far."""
        return self.directory / WRITING

    @property
    def final(self) -> Path:
        """What it will be."""
        return self.directory / f"step_{self.manifest['step']:06d}"


def save(policy: Policy, directory: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Writes `directory/step_<step>` and removes all but the newest `keep` checkpoints; see `begin` and `finish`."""
    with policy.at_work():
        return finish(begin(policy, directory, step, state), keep)


@on_any_device
def begin(policy: Policy, directory: Path, step: int, state: Mapping[str, Any], background: bool = False) -> Saving:
    """Begins to write `directory/step_<step>`, which counts once `finish` has returned.

    Args:
        policy: on every rank, at work until the shards are written, or with `background` until this returns.
        directory: the run's `checkpoints`, on a file system that all ranks see.
        step: the training step that is done.
        state: the loop's own counters (JSON), given back by `load`.
        background: the policy may change before `finish`; costs a copy in host memory of what this rank writes.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    manifest = {
        "step": step,
        "version": policy.version,
        "architecture": _described(policy),
        "rope": _regime(policy),
        "model": policy.fingerprint,
        "state": dict(state),
    }
    saving = Saving(policy.world, directory, manifest, ThreadedSave(copies=background))
    with _explained(saving):
        if saving.world.is_main:
            shutil.rmtree(saving.writing, ignore_errors=True)
            saving.writing.mkdir(parents=True)
        saving.world.barrier()
        strategy = FullyParallelSaveStrategyWrapper(saving.strategy, _data_parallel_group())
        dist_checkpointing.save(_sharded_state(policy, is_loading=False), str(saving.writing), strategy)
    return saving


@on_any_device
def finish(saving: Saving, keep: int) -> Path:
    """Waits for the shards of all ranks, then makes the checkpoint count and removes all but the newest `keep`.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    world = saving.world
    with _explained(saving):
        saving.strategy.finish()
        sums = {name: total for part in world.gather(saving.strategy.sums) for name, total in part.items()}
        rest = sorted(set(_names(saving.writing, world)) - set(sums))
        sums |= _file_sums(saving.writing, rest, world)
        if UNREADABLE in sums.values():
            raise OSError(errno.EIO, "what was written cannot be read back")
        if world.is_main:
            _publish(saving, sums)
            for old in sorted(saving.directory.glob("step_*"))[:-keep]:
                _remove(old)
    world.barrier()
    return saving.final


@contextmanager
def _explained(saving: Saving) -> Iterator[None]:
    """Sweeps up after a save that fails, and says what stands."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
        if _is_fault(error):
            raise
        if saving.world.is_main:
            shutil.rmtree(saving.writing, ignore_errors=True)
        good = latest(saving.directory)
        raise UserError(
            f"cannot write {saving.final}: {_cause(error)}; "
            + (f"the last good checkpoint is {good}; " if good else "there is no earlier checkpoint; ")
            + "if the disk is full, make room there; then run the same command again"
        ) from error


class Saver:
    """Saves a policy again and again; with `background` each save is written while the run goes on."""

    def __init__(
        self,
        policy: Policy,
        directory: Path,
        keep: int,
        background: bool,
        room: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Writes nothing yet; `room` makes room on the device for the policy at work, the rest is as for `begin`."""
        self._policy, self._directory = policy, directory
        self._keep, self._background, self._room = keep, background, room
        self._saving: Saving | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Begins a save, after the end of the one before; in the foreground it ends it too.

        Returns:
            The checkpoint, which counts once its save has ended.

        Raises:
            UserError: either of them cannot be written.
        """
        self.finish()
        with self._room(), self._policy.at_work():
            self._saving = saving = begin(self._policy, self._directory, step, state, self._background)
            if not self._background:
                self.finish()
        return saving.final

    def finish_if_written(self) -> None:
        """Every rank calls this between steps: a save that all of them have written counts from now on."""
        if self._saving is not None and all(self._policy.world.gather(self._saving.strategy.is_written())):
            self.finish()

    def finish(self) -> None:
        """Waits for the save that is under way, if there is one."""
        saving, self._saving = self._saving, None
        if saving is not None:
            finish(saving, self._keep)


def _is_fault(error: BaseException) -> bool:
    """Whether a save failed because a rank, the network or a GPU did: nothing that a user could mend.

    torch's writer in C++ raises a bare RuntimeError for a full disk, and so does gloo for a lost rank.
    """
    return isinstance(error, torch.OutOfMemoryError) or is_collective(error)


def _names(directory: Path, world: World) -> list[str]:
    """The directory's files as rank 0 sees them."""
    names: list[str] = world.broadcast(sorted(file.name for file in directory.iterdir()))
    return names


def _file_sums(directory: Path, names: Sequence[str], world: World) -> dict[str, str]:
    """SHA-256 of files, or UNREADABLE, the same on every rank; they share the reading."""
    found = {name: sum_of(directory / name) for name in names[world.rank :: world.size]}
    return {name: total for part in world.gather(found) for name, total in part.items()}


def _publish(saving: Saving, sums: Mapping[str, str]) -> None:
    """Writes the manifest and moves the directory into place: from here on the checkpoint counts."""
    writing, final = saving.writing, saving.final
    files = {name: [(writing / name).stat().st_size, sums[name]] for name in sorted(sums)}
    with (writing / MANIFEST).open("w") as file:
        json.dump(saving.manifest | {"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        _remove(final)  # left by a run that was cut back to an earlier step
    writing.rename(final)


def _remove(checkpoint: Path) -> None:
    """Takes a checkpoint out of the count before its files: one that dies half removed is none."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _cause(error: BaseException) -> str:
    """The innermost message of an error, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


@on_any_device
def load(policy: Policy, checkpoint: Path) -> dict[str, Any]:
    """Restores a checkpoint of any layout into the policy; one that is seen to be damaged leaves it as it was.

    A policy that does not train takes the weights alone.

    Returns:
        The manifest: `step`, `version`, `architecture`, and the loop's `state`.

    Raises:
        DamagedError: the checkpoint is incomplete or damaged, on every rank alike.
        UserError: it is of another model, or of the other rotary factors.
    """
    manifest = read_manifest(checkpoint)
    if manifest["architecture"] != _described(policy):
        raise UserError(
            f"{checkpoint} is a checkpoint of another model ({_differences(manifest['architecture'], policy)}); "
            "set model.path to the model that the run began with"
        )
    if manifest["model"] != policy.fingerprint:
        raise UserError(
            f"{checkpoint} began with other weights (fingerprint {manifest['model']}) than model.path="
            f"{policy.config.model.path} ({policy.fingerprint}); set model.path to the model that the run began with"
        )
    if manifest["rope"] != _regime(policy):
        raise UserError(
            f"{checkpoint} was trained with longrope's {manifest['rope']} factors, and rollout.max_model_len="
            f"{policy.config.rollout.max_model_len} takes the {_regime(policy)} ones; set it back to the run's own"
        )
    _check_files(checkpoint, manifest["files"], policy.world)
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(checkpoint)), _data_parallel_group()
    )
    with policy.at_work():
        try:
            found = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(checkpoint), strategy)
        except CheckpointException as error:
            raise RuntimeError(f"{checkpoint} is whole and cannot be loaded: {_cause(error)}") from error
        policy.module.load_state_dict(found["model"] | _norm_state(policy.module))
        if policy.optimizer is not None:
            policy.optimizer.load_state_dict(found["optimizer"])
    if policy.optimizer is not None:
        policy.schedule.load_state_dict(found["schedule"])
        policy.schedule.init_lr = found["schedule"]["init_lr"]
    policy.version = manifest["version"]
    return manifest


def _check_files(checkpoint: Path, files: Mapping[str, tuple[int, str]], world: World) -> None:
    """Refuses a checkpoint with a lost, cut or altered file before anything is loaded from it."""
    for name, (size, _) in files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes of {size}"
            raise DamagedError(f"{checkpoint} is damaged: {name} {state}; {WAY_OUT}")
    sums = _file_sums(checkpoint, sorted(files), world)
    for name, (_, total) in files.items():
        if sums[name] != total:
            how = "cannot be read" if sums[name] == UNREADABLE else "has other content than was saved"
            raise DamagedError(f"{checkpoint} is damaged: {name} {how}; {WAY_OUT}")


def set_aside(checkpoint: Path) -> None:
    """Takes a damaged checkpoint out of the count, and keeps it as damaged_step_..."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _described(policy: Policy) -> dict[str, Any]:
    """The model's shape as JSON gives it back."""
    described: dict[str, Any] = json.loads(json.dumps(asdict(policy.arch)))
    return described


def _regime(policy: Policy) -> str:
    return policy.arch.rope.regime(policy.config.rollout.max_model_len)


def _differences(found: Mapping[str, Any], policy: Policy) -> str:
    ours = _described(policy)
    other = [key for key in ours if found.get(key) != ours[key]]
    return ", ".join(f"another {key}" if key == "rope" else f"{key} {found.get(key)} != {ours[key]}" for key in other)


def _data_parallel_group() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def weights_of(module: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's sharded state under megatron-core's names, the same for both of `actor.layer_spec`.

    Transformer Engine's final norm would add a state of its own, always empty, that the other layers' checkpoints lack.
    """
    state: dict[str, Any] = module.sharded_state_dict(metadata=metadata)
    return {name: part for name, part in state.items() if name != NORM_STATE}


def _norm_state(module: Any) -> dict[str, Any]:
    """What `weights_of` left out, as it is."""
    return {name: part for name, part in module.state_dict().items() if name == NORM_STATE}


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _data_parallel_group(),
    }
    model = weights_of(policy.module, metadata)
    if policy.optimizer is None:
        return {"model": model}
    schedule = policy.schedule.state_dict() | {"init_lr": policy.schedule.init_lr}
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer, "schedule": schedule}
