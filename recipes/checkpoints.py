"""A run's checkpoints: continuing from one, saving the next, and keeping what was sampled of a stopped step.

Imports megatron-core, so it is imported after `join`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nemo_r3 import signals, trackers
from nemo_r3.actor import checkpoint
from nemo_r3.actor.manifest import MANIFEST, WAY_OUT, DamagedError, complete, latest, set_aside
from nemo_r3.actor.policy import Policy
from nemo_r3.actor.saver import Saver
from nemo_r3.errors import UserError
from nemo_r3.rollout import kept
from nemo_r3.rollout.scheduler import Rollout
from recipes.counters import Counters
from recipes.setup import Setup


def newest(setup: Setup) -> Path | None:
    """The run's newest checkpoint as rank 0 sees it: on a shared file system, ranks may see different files."""
    newest: Path | None = setup.world.broadcast(latest(setup.run.checkpoints))
    return newest


def trained(setup: Setup) -> Path | None:
    """The checkpoint to measure or export: `evaluate.checkpoint`, or the run's newest.

    Raises:
        UserError: it is no complete checkpoint, or this command's settings are not the run's.
    """
    asked = setup.config.evaluate.checkpoint
    trained = Path(asked) if asked else newest(setup)
    if asked and not setup.world.broadcast((Path(asked) / MANIFEST).is_file()):
        raise UserError(f"evaluate.checkpoint: {asked} is no complete checkpoint: it has no {MANIFEST}")
    if trained is not None:
        setup.run.refuse_other_settings()
    return trained


def resume(setup: Setup, policy: Policy, rollout: Rollout) -> tuple[Counters, Path | None]:
    """Loads the run's newest sound checkpoint, if there is one, and cuts the logs back to its step.

    The engine sleeps meanwhile, if it can, and is behind the policy afterwards.

    Returns:
        The loop's counters and the checkpoint that they are from; new ones and None without a checkpoint.

    Raises:
        UserError: all checkpoints are damaged, the newest is of another model, or `train.steps` goes beyond the
            learning rate's end.
    """
    counters, home, steps = Counters(), None, setup.config.train.steps
    if newest_first := setup.world.broadcast(complete(setup.run.checkpoints)):
        rollout.engine.sleep()
        home, manifest = _load_newest(setup, policy, newest_first)
        counters = Counters(**manifest["state"])
        refuse_useless_steps(setup, policy, counters.step)
        setup.progress.say(f"resuming after step {counters.step} from {home}; {policy.describe_schedule()}")
        if counters.step >= steps:
            setup.progress.say(f"step {counters.step} of train.steps={steps} is done: nothing to train")
        _take_up_turns(setup, rollout, home, counters.step + 1)
    setup.run.cut_back(counters.step)
    return counters, home


def _load_newest(setup: Setup, policy: Policy, newest_first: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """Loads the first of these checkpoints that is sound, after setting aside those before it."""
    *newer, oldest = newest_first
    for path in newer:
        try:
            return path, checkpoint.load(policy, path)
        except DamagedError as error:
            if setup.world.is_main:
                set_aside(path)
                print(f"warning: {error}, which this run does now", file=sys.stderr, flush=True)
    try:
        return oldest, checkpoint.load(policy, oldest)
    except DamagedError as error:
        damage = str(error).removesuffix(f"; {WAY_OUT}")
        raise UserError(
            f"{damage}; there is no sound checkpoint before it: name another run.dir to start again"
        ) from error


def check_new_run(setup: Setup, policy: Policy) -> None:
    """Checks a run without checkpoints before mining, as `resume` checks others: no step's learning rate may be 0."""
    if newest(setup) is None:
        refuse_useless_steps(setup, policy, 0)


def refuse_useless_steps(setup: Setup, policy: Policy, done: int) -> None:
    """Refuses steps whose learning rate would be 0 if every step left has an update."""
    steps, useful = setup.config.train.steps, done + policy.updates_left()
    if steps <= useful:
        return
    useless = f"step {steps}" if steps == useful + 1 else f"steps {useful + 1} to {steps}"
    instead = f"set train.steps={useful}, or " if useful > done else ""
    instead += (
        f"export this run and start a new one with model.path={setup.run.path / 'export'}"
        if done
        else "raise actor.lr_decay_steps"
    )
    raise UserError(
        f"train.steps={steps}: the learning rate is 0 after step {useful}, so {useless} would change nothing; {instead}"
    )


def make_saver(setup: Setup, policy: Policy, rollout: Rollout) -> Saver:
    """Makes the run's `Saver`.

    An offloaded optimizer state comes back to the device to be saved; the engine makes room for it, and sleeps until
    the next step's refit.
    """
    config = setup.config

    def make_room() -> None:
        setup.progress.during("save")
        if config.actor.offload_optimizer:
            rollout.engine.sleep()

    return Saver(policy, setup.run.checkpoints, config.train, make_room)


def stop(setup: Setup, rollout: Rollout, step: int) -> None:
    """Keeps what was sampled of `step`, and ends the trackers; the ranks leave together: a launcher ends who stays."""
    _keep_turns(setup, rollout, step)
    trackers.close(signals.STOPPED)
    setup.world.barrier()


def _keep_turns(setup: Setup, rollout: Rollout, step: int) -> None:
    """After a stop, writes what was sampled of `step` beside the checkpoint whose weights sampled it.

    There is nothing to write if rollouts are deterministic, or before the first checkpoint. A failed write is only a
    warning: the turns will be sampled again.
    """
    turns = {name: turn for part in setup.world.gather(rollout.kept.of(step)) for name, turn in part.items()}
    home = latest(setup.run.checkpoints)
    if setup.world.is_main and turns and home is not None:
        try:
            kept.write(home / kept.FILE, turns)
            setup.progress.say(f"kept {len(turns)} turns of step {step} in {home / kept.FILE}")
        except OSError as error:
            lost = f"step {step} will be sampled again: cannot write {home / kept.FILE} ({error.strerror})"
            print(f"warning: {lost}", file=sys.stderr, flush=True)


def _take_up_turns(setup: Setup, rollout: Rollout, home: Path, step: int) -> None:
    """Gives the engines what a stopped process kept of `step`, if anything."""
    file, turns = home / kept.FILE, {}
    if setup.world.is_main and file.exists():
        try:
            turns = kept.read(file)
            setup.progress.say(f"continuing with {len(turns)} turns of step {step} from {file}")
        except (OSError, SafetensorError) as error:
            print(f"warning: step {step} is sampled again: {file} is damaged ({error})", file=sys.stderr, flush=True)
    rollout.kept.take_up(step, setup.world.broadcast(turns))
