"""Saves and loads a policy and its optimizer, whole or not at all (`manifest.py`), and at any layout.

It holds no generator state: every step is seeded by (seed, step), see `runtime.seed_generators`.
"""

from __future__ import annotations

import errno
import gc
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint import CheckpointException  # a BaseException

from nemo_r3 import watchdog
from nemo_r3.actor.checkpoint_writer import OPTIMIZER, ThreadedSave
from nemo_r3.actor.cpu import cuda_stand_in
from nemo_r3.actor.heap import give_back_freed_memory
from nemo_r3.actor.manifest import (
    WRITING,
    check_sizes,
    check_sums,
    keep_newest,
    latest,
    publish,
    read_manifest,
    step_path,
)
from nemo_r3.actor.optimizer import restore_schedule, schedule_state
from nemo_r3.actor.policy import Policy
from nemo_r3.actor.trainer import Trainer
from nemo_r3.actor.unpickling import without_code
from nemo_r3.errors import UserError, in_one_line
from nemo_r3.files import UNREADABLE, sum_of
from nemo_r3.precision import precision_of
from nemo_r3.runtime import World, is_collective

SCALES = "._extra_state"
"""The end of the name of what a layer keeps beside its weights, see scales.py."""
NORM_STATE = "layernorm" + SCALES


@dataclass(frozen=True)
class Saving:
    """A save under way."""

    world: World
    directory: Path  # the run's `checkpoints`
    manifest: dict[str, Any]  # the checkpoint's manifest without its `files`
    strategy: ThreadedSave  # writes the shards

    @property
    def writing(self) -> Path:
        """The directory while it is being written."""
        return self.directory / WRITING

    @property
    def final(self) -> Path:
        """The checkpoint that it will be."""
        return step_path(self.directory, self.manifest["step"])

    def is_written(self) -> bool:
        """Whether all ranks have written their shards; every rank calls this."""
        return all(self.world.gather(self.strategy.is_written()))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Garbage is not looked for: to walk over what is known of all ranks' parts takes longer than all else with it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
@cuda_stand_in()
def begin(trainer: Trainer, directory: Path, step: int, state: Mapping[str, Any], background: bool = False) -> Saving:
    """Begins to write `directory/step_<step>`, which counts once `finish` has returned.

    Args:
        trainer: on every rank, at work until the shards are written, or with `background` until this returns.
        directory: the run's `checkpoints`, on a file system that all ranks see.
        step: the training step that is done.
        state: the loop's own counters (JSON), which `load` returns.
        background: let the weights change before `finish`; costs a copy of what this rank writes, in host memory.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    policy = trainer.policy
    manifest = {
        "step": step,
        "version": policy.version,
        **_identity(policy),
        "schedule": schedule_state(trainer.schedule),
        "state": dict(state),
    }
    saving = Saving(policy.world, directory, manifest, ThreadedSave(copies=background))
    with _explained(saving):
        if saving.world.is_main:
            shutil.rmtree(saving.writing, ignore_errors=True)
            saving.writing.mkdir(parents=True)
        saving.world.barrier()
        strategy = FullyParallelSaveStrategyWrapper(saving.strategy, parallel_state.get_data_parallel_group())
        # the strategy checks that each part is written once: to check here as well would gather all ranks' parts again
        dist_checkpointing.save(_contents(trainer), str(saving.writing), strategy, validate_access_integrity=False)
    return saving


@_uncollected()
@cuda_stand_in()
def finish(saving: Saving, keep: int) -> Path:
    """Waits for the shards of all ranks, publishes the checkpoint and removes all but the newest `keep`.

    Raises as `begin` does.
    """
    world = saving.world
    with _explained(saving):
        _wait_for_shards(saving)
        saving.strategy.finish()
        sums = world.merge(saving.strategy.sums)
        names = world.broadcast([file.name for file in saving.writing.iterdir()] if world.is_main else [])
        sums |= _file_sums(saving.writing, sorted(set(names) - set(sums)), world)
        if UNREADABLE in sums.values():
            raise OSError(errno.EIO, "what was written cannot be read back")
        if world.is_main:
            publish(saving.directory, saving.manifest, sums)
            keep_newest(saving.directory, keep)
    give_back_freed_memory()  # copies of what are parts of larger tensors
    world.barrier()
    return saving.final


def _wait_for_shards(saving: Saving) -> None:
    """Waits until every rank has written, for as long as the files grow.

    Raises:
        OSError: nothing was written for run.timeout_minutes.
    """
    size, grown, pause = -1, time.monotonic(), 0.01
    while not saving.is_written():
        now = sum(saving.world.gather(saving.strategy.bytes_written()))
        if now != size:
            size, grown = now, time.monotonic()
        elif time.monotonic() - grown > saving.world.timeout.total_seconds():
            raise OSError(errno.ETIMEDOUT, "nothing was written for run.timeout_minutes")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


@contextmanager
def _explained(saving: Saving) -> Iterator[None]:
    """Cleans up after a failed save, and says in the error what the newest good checkpoint is."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointingException, CheckpointException) as error:
        if _is_fault(error):
            raise
        saving.strategy.abandon()
        if saving.world.is_main:
            shutil.rmtree(saving.writing, ignore_errors=True)
        good = latest(saving.directory)
        raise UserError(
            f"cannot write {saving.final}: {_cause(error)}; "
            + (f"the last good checkpoint is {good}; " if good else "there is no earlier checkpoint; ")
            + "if the disk is full, make room there; then run the same command again"
        ) from error


def _is_fault(error: BaseException) -> bool:
    """Whether a save failed because of a rank, the network or a GPU: nothing that a user could fix.

    The type does not tell: for a full disk torch's writer raises a bare RuntimeError, as gloo does for a lost rank.
    """
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or is_collective(error)


def _file_sums(directory: Path, names: Sequence[str], world: World) -> dict[str, str]:
    """SHA-256 of files, or UNREADABLE, the same on every rank.

    Each rank reads the files that the rank of its number wrote: they may be in its page cache, or are read next.
    """
    own = {}
    for name in names:
        if _writer(name) % world.size == world.rank:
            watchdog.alive()
            own[name] = sum_of(directory / name)
    return world.merge(own)


def _writer(name: str) -> int:
    """The rank that wrote a file: 3 for __3_0.distcp, and 0 for what is not a shard."""
    shard = re.search(r"__(\d+)_", name)
    return int(shard[1]) if shard else 0


def _cause(error: BaseException) -> str:
    """The innermost message of an error, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    while error.__cause__ is not None:
        error = error.__cause__
    return in_one_line(error) or type(error).__name__


def check(checkpoint: Path, world: World) -> None:
    """Reads all files of a checkpoint, each on one rank; there need be no model.

    Raises:
        DamagedError: the checkpoint is incomplete or damaged, on every rank alike.
    """
    _check_files(checkpoint, _manifest(checkpoint, world)["files"], world)


@cuda_stand_in()
def load(trainer: Trainer, checkpoint: Path, with_schedule: bool = True) -> dict[str, Any]:
    """Restores a checkpoint of any layout; one that is seen to be damaged leaves everything as it was.

    Without its schedule, the learning rate goes its own way from there.

    Returns:
        The manifest: `step`, `version`, `architecture`, and the loop's `state`.

    Raises:
        DamagedError: the checkpoint is incomplete or damaged, on every rank alike.
        UserError: it is of another model, or of the other rotary factors.
    """
    manifest = fitting_manifest(trainer.policy, checkpoint)
    _check_files(checkpoint, manifest["files"], trainer.policy.world)
    with trainer.at_work():
        _read(trainer.policy, checkpoint, _contents(trainer), manifest["version"])
        trainer.optimizer.loaded(manifest["version"])
    if with_schedule:
        restore_schedule(trainer.schedule, manifest["schedule"])
    return manifest


@cuda_stand_in()
def load_weights(policy: Policy, checkpoint: Path) -> dict[str, Any]:
    """Restores the weights alone, and checks only their files; otherwise as `load`."""
    manifest = fitting_manifest(policy, checkpoint)
    files = {name: file for name, file in manifest["files"].items() if not name.startswith(OPTIMIZER)}
    _check_files(checkpoint, files, policy.world)
    _read(policy, checkpoint, {"model": _sharded_weights(policy)}, manifest["version"])
    if policy.lora is not None:
        policy.lora.merge()
    torch.cuda.empty_cache()  # for the engine
    return manifest


def _manifest(checkpoint: Path, world: World) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the sizes that it says.

    Raises:
        DamagedError: the checkpoint is incomplete, on every rank alike.
    """

    def read() -> dict[str, Any]:
        manifest = read_manifest(checkpoint)
        check_sizes(checkpoint, manifest["files"])
        return manifest

    return world.on_main(read)  # the other ranks may see the files later


def fitting_manifest(policy: Policy, checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is of this model; otherwise as `_manifest`.

    Raises:
        UserError: it is of another model, dtype or LoRA, or of the other rotary factors.
    """
    theirs, ours, config = _manifest(checkpoint, policy.world), _identity(policy), policy.config
    if theirs["architecture"] != ours["architecture"]:
        raise UserError(
            f"{checkpoint} is a checkpoint of another model "
            f"({_differences(theirs['architecture'], ours['architecture'])}); "
            "set model.path to the model that the run began with"
        )
    if theirs["model"] != ours["model"]:
        raise UserError(
            f"{checkpoint} began with other weights (fingerprint {theirs['model']}) than model.path="
            f"{config.model.path} ({ours['model']}); set model.path to the model that the run began with"
        )
    if theirs["dtype"] != ours["dtype"]:
        raise UserError(
            f"{checkpoint} has weights in {theirs['dtype']}, and actor.precision={config.actor.precision} keeps them "
            f"in {ours['dtype']}; set one that keeps {theirs['dtype']}"
        )
    if theirs["lora"] != ours["lora"]:
        raise UserError(
            f"{checkpoint} trains {_in_words(theirs['lora'])}, and this run {_in_words(ours['lora'])}: set "
            "actor.lora_rank and actor.lora_alpha to the checkpoint's own, or model.path to an export of it"
        )
    if theirs["rope"] != ours["rope"]:
        raise UserError(
            f"{checkpoint} was trained with longrope's {theirs['rope']} factors, and rollout.max_model_len="
            f"{config.rollout.max_model_len} takes the {ours['rope']} ones; set it back to the run's own"
        )
    return theirs


def _check_files(checkpoint: Path, files: Mapping[str, Any], world: World) -> None:
    check_sums(checkpoint, files, _file_sums(checkpoint, sorted(files), world))


@_uncollected()
def _read(policy: Policy, checkpoint: Path, state: dict[str, Any], version: int) -> None:
    """Reads into this rank's sharded state, in place where the tensors allow it; the policy gets the weights."""
    watchdog.alive()
    try:
        with without_code(checkpoint, policy.world):
            found: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint))
    except CheckpointException as error:
        raise RuntimeError(f"{checkpoint} is whole and cannot be loaded: {_cause(error)}") from error
    policy.module.load_state_dict(found["model"] | _norm_state(policy.module), strict=policy.lora is None)
    policy.version = version


def _identity(policy: Policy) -> dict[str, Any]:
    """What a manifest says of the model and of what is trained of it, as JSON gives it back."""
    actor = policy.config.actor
    return {
        "architecture": json.loads(json.dumps(policy.arch.described())),
        "dtype": precision_of(policy.config).dtype_name,
        "lora": {"rank": actor.lora_rank, "alpha": actor.lora_alpha} if actor.lora_rank else {},
        "rope": policy.arch.rope.regime(policy.config.rollout.max_model_len),
        "model": policy.fingerprint,
    }


def _in_words(lora: Mapping[str, Any]) -> str:
    return f"LoRA of rank {lora['rank']} and alpha {lora['alpha']:g}" if lora else "all weights"


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    other = {key: (theirs.get(key), ours.get(key)) for key in ours | theirs if theirs.get(key) != ours.get(key)}
    return ", ".join(f"another {key}" if key == "rope" else f"{key} {a} != {b}" for key, (a, b) in other.items())


def weights_of(module: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's sharded state under megatron-core's names, the same for both of `actor.layer_spec`.

    Transformer Engine's norms would add states of their own, always empty, that the other layers' checkpoints lack.
    """
    state: dict[str, Any] = module.sharded_state_dict(metadata=metadata)
    return {name: part for name, part in state.items() if not name.endswith(NORM_STATE)}


def _norm_state(module: Any) -> dict[str, Any]:
    """What `weights_of` leaves out."""
    return {name: part for name, part in module.state_dict().items() if name.endswith(NORM_STATE)}


def _sharded_weights(policy: Policy) -> dict[str, Any]:
    """What was trained, all weights or LoRA's factors, and the layers' scales."""
    group, experts = parallel_state.get_data_parallel_group(), policy.arch.experts
    # as one tensor, all experts of all layers would be compared pairwise before a save
    weights = weights_of(policy.module, {"singleton_local_shards": experts is not None, "dp_cp_group": group})
    if policy.lora is None:
        return weights
    return policy.lora.sharded_state() | {name: part for name, part in weights.items() if name.endswith(SCALES)}


def _contents(trainer: Trainer) -> dict[str, Any]:
    """What this rank writes to a checkpoint, and what loading fills."""
    model = _sharded_weights(trainer.policy)
    return {"model": model, "optimizer": trainer.optimizer.sharded_state(model)}
