"""A run's checkpoints: continuing from one, saving the next, and what was sampled of a stopped step.

Imports megatron-core, so it is imported after `join`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from nemo_r3.actor import checkpoint
from nemo_r3.actor.manifest import (
    MANIFEST,
    WAY_OUT,
    DamagedError,
    complete,
    latest,
    read_manifest,
    set_aside,
    start_named,
    step_of,
    step_path,
)
from nemo_r3.actor.saver import Saver
from nemo_r3.actor.trainer import Trainer
from nemo_r3.errors import UserError
from nemo_r3.progress import warn
from nemo_r3.rollout import turn_cache
from nemo_r3.rollout.scheduler import Rollout
from recipes.counters import Counters
from recipes.outcome import draw_curve, report
from recipes.setup import Setup


def newest(setup: Setup) -> Path | None:
    """The run's newest checkpoint as rank 0 sees it: on a shared file system, ranks may see different files."""
    return setup.world.broadcast(latest(setup.run.checkpoints))


def open_run(setup: Setup) -> None:
    """Opens the run's directory, unless this command's settings are refused; there need be no model.

    Raises:
        UserError: it cannot be used, see `RunDirectory.open` and `refuse_useless_steps`.
    """
    resuming = newest(setup) is not None
    if resuming:  # first: the steps may be wrong because another setting is
        setup.run.refuse_other_settings()
    refuse_useless_steps(setup)
    setup.run.open(resuming)


def refuse_useless_steps(setup: Setup) -> None:
    """Refuses steps whose learning rate would be 0 if every step left has an update.

    Raises:
        UserError: there are some; or the newest checkpoint is of another format.
    """
    steps, actor = setup.config.train.steps, setup.config.actor
    done, left = 0, actor.lr_decay_steps or steps
    if manifest := setup.world.on_main(lambda: _newest_manifest(setup.run.checkpoints)):
        done, schedule = manifest["step"], manifest["schedule"]
        left = max(schedule["lr_decay_steps"] - schedule["num_steps"], 0)
    useful = done + left
    if actor.lr_min or steps <= useful:
        return
    useless = f"step {steps}" if steps == useful + 1 else f"steps {useful + 1} to {steps}"
    instead = f"set train.steps={useful}, or " if useful > done else ""
    instead += (
        f"name a new run.dir and train.start_from={step_path(setup.run.checkpoints, done)}"
        if done
        else "raise actor.lr_decay_steps"
    )
    raise UserError(
        f"train.steps={steps}: the learning rate is 0 after step {useful}, so {useless} would change nothing; {instead}"
    )


def _newest_manifest(directory: Path) -> dict[str, Any] | None:
    """Of a run's `checkpoints`; one that cannot be read is left to `resume`."""
    for path in complete(directory):
        with suppress(DamagedError):
            return read_manifest(path)
    return None


def is_finished(setup: Setup) -> bool:
    """Whether a sound checkpoint has all of `train.steps`; then says so and cuts the logs back, without a model.

    A damaged one is left to `resume`.
    """
    found, steps = newest(setup), setup.config.train.steps
    if found is None or step_of(found) < steps:
        return False
    try:
        checkpoint.check(found, setup.world)
    except DamagedError:
        return False
    setup.progress.say(f"step {step_of(found)} of train.steps={steps} is done: nothing to train")
    setup.run.cut_back(step_of(found))
    return True


def trained(setup: Setup) -> Path | None:
    """The checkpoint to measure or export: `evaluate.checkpoint`, or the run's newest.

    Raises:
        UserError: it is no complete checkpoint, or this command's settings are not the run's.
    """
    asked = setup.config.evaluate.checkpoint
    if asked and not setup.world.broadcast((Path(asked) / MANIFEST).is_file()):
        kept = ", ".join(path.name for path in complete(setup.run.checkpoints)) or "none"
        raise UserError(
            f"evaluate.checkpoint: {asked} is no complete checkpoint: it has no {MANIFEST}; complete in "
            f"{setup.run.checkpoints}: {kept} (train.keep_checkpoints={setup.config.train.keep_checkpoints})"
        )
    found = Path(asked) if asked else newest(setup)
    if found is not None:
        setup.run.refuse_other_settings()
    return found


def resume(setup: Setup, trainer: Trainer, rollout: Rollout) -> tuple[Counters, Path | None]:
    """Loads the run's newest sound checkpoint, if there is one, and cuts the logs back to its step.

    The engine sleeps meanwhile, if it can, and is behind the policy afterwards.

    A run without a checkpoint of its own begins with `train.start_from`'s weights and moments, if that is set.

    Returns:
        The loop's counters and the checkpoint that they are from; new ones and None without a checkpoint.

    Raises:
        UserError: all checkpoints, or the one to start from, are damaged or of another model.
    """
    counters, home = Counters(), None
    if newest_first := setup.world.broadcast(complete(setup.run.checkpoints)):
        rollout.engine.sleep()
        home, manifest = _load_newest(setup, trainer, newest_first)
        counters = Counters(**manifest["state"])
        end, horizon = setup.config.actor.lr_min, trainer.schedule.lr_decay_steps
        setup.progress.say(
            f"resuming after step {counters.step} from {home}; the learning rate reaches {end:g} after {horizon} steps"
        )
        _restore_turns(setup, rollout, home, counters.step + 1)
    elif start := setup.config.train.start_from:
        rollout.engine.sleep()
        with start_named():
            updates = checkpoint.load(trainer, Path(start), with_schedule=False)["version"]
        setup.progress.say(f"starting from {start}, after {updates} updates; steps and learning rate begin anew")
    setup.run.cut_back(counters.step)
    return counters, home


def _load_newest(setup: Setup, trainer: Trainer, newest_first: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """Loads the first of these checkpoints that is sound, after setting aside those before it."""
    *newer, oldest = newest_first
    for path in newer:
        try:
            return path, checkpoint.load(trainer, path)
        except DamagedError as error:
            if setup.world.is_main:
                set_aside(path)
                warn(f"{error}, which this run does now")
    try:
        return oldest, checkpoint.load(trainer, oldest)
    except DamagedError as error:
        damage = str(error).removesuffix(f"; {WAY_OUT}")
        raise UserError(
            f"{damage}; there is no sound checkpoint before it: name another run.dir to start again"
        ) from error


def check_start_fits(setup: Setup, trainer: Trainer) -> None:
    """Checks what the run will go on from, or begin with, before it mines and starts vLLM.

    A checkpoint of its own that is damaged is left to `resume`, which has those before it.

    Raises:
        UserError: it is of another model; or `train.start_from` is seen to be damaged.
    """
    if found := newest(setup):
        with suppress(DamagedError):
            checkpoint.fitting_manifest(trainer.policy, found)
    elif start := setup.config.train.start_from:
        with start_named():
            checkpoint.fitting_manifest(trainer.policy, Path(start))


def make_saver(setup: Setup, trainer: Trainer, rollout: Rollout) -> Saver:
    """Makes the run's `Saver`.

    An offloaded optimizer state comes back to the device to be saved; the engine makes room for it, and sleeps until
    the next step's refit.
    """
    config = setup.config

    def make_room() -> None:
        setup.progress.during("save")
        if config.actor.offload_optimizer:
            rollout.engine.sleep()

    return Saver(trainer, setup.run.checkpoints, config.train, make_room)


def give_up(setup: Setup, saver: Saver, counters: Counters, saved_step: int, reason: str) -> NoReturn:
    """Ends a run that should not go on, with its report; first saves updates that no checkpoint has.

    A run without an empty step at its end gives up because of its last updates, which are not worth saving.

    Raises:
        UserError: always, with the reason.
    """
    if saved_step < counters.last_update < counters.step:
        saver.save(counters.step, asdict(counters))
    saver.finish()
    draw_curve(setup)
    report(setup)
    setup.world.barrier()  # a rank that left first would have rank 0 killed
    raise UserError(reason)


def save_turns(setup: Setup, rollout: Rollout, step: int) -> None:
    """After a stop, writes what was sampled of `step` beside the checkpoint whose weights sampled it.

    There is nothing to write if rollouts are deterministic, or before the first checkpoint. A failed write is only a
    warning: the turns will be sampled again.
    """
    speaks = setup.world.rank % setup.config.rollout.tensor_parallel == 0  # all ranks of an engine have the same
    turns = rollout.turns.restored(step) | setup.world.merge(rollout.turns.sampled(step) if speaks else {})
    home = latest(setup.run.checkpoints)
    if setup.world.is_main and turns and home is not None:
        file = home / turn_cache.FILE
        try:
            turn_cache.write(file, turns)
            setup.progress.say(f"kept {len(turns)} turns of step {step} in {file}")
        except OSError as error:
            warn(f"step {step} will be sampled again: cannot write {file} ({error.strerror})")


def _restore_turns(setup: Setup, rollout: Rollout, home: Path, step: int) -> None:
    """Gives the engines what a stopped process sampled of `step`, if anything."""
    file, turns = home / turn_cache.FILE, {}
    if setup.world.is_main and file.exists():
        try:
            turns = turn_cache.read(file)
            setup.progress.say(f"continuing with {len(turns)} turns of step {step} from {file}")
        except (OSError, ValueError) as error:
            warn(f"step {step} is sampled again: {file} is damaged ({error})")
    rollout.turns.restore(step, setup.world.broadcast(turns))
