"""`join`: from a command line to joined ranks, refusing what cannot work before any weight is read.

CONFIG.yaml key=value ... -> settings, task, model: checked -> ranks, device, run directory, tokenizer -> Setup
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_r3 import capacity, fp8_support, runtime, tasks, trackers, watchdog
from nemo_r3 import config as configuration
from nemo_r3.actor.manifest import check_start
from nemo_r3.config import Config
from nemo_r3.dialogue import Dialogue, read_tokenizer, stop_token_ids
from nemo_r3.errors import UserError
from nemo_r3.failures.stamp import hash_of
from nemo_r3.models import Architecture, architecture_of, check_layout, model_path
from nemo_r3.precision import without_fp8
from nemo_r3.progress import Progress, warn
from nemo_r3.rollout import environment
from nemo_r3.run_directory import RunDirectory
from nemo_r3.runtime import World
from nemo_r3.tasks.protocol import Task


@dataclass(frozen=True)
class Setup:
    """What every part of a run is given."""

    config: Config
    task: Task
    arch: Architecture
    model: Path  # the starting checkpoint
    world: World
    run: RunDirectory
    dialogue: Dialogue  # the model's chat template with the task's wording
    progress: Progress  # what the user sees

    def check_trackers(self) -> None:
        """Checks, before any weight is read, that the servers which will show this run can be used.

        Raises:
            UserError: see `trackers.check`.
        """
        self.world.on_main(lambda: trackers.check(self.config, self.run.path))


def join(argv: Sequence[str], trains: bool = True) -> Setup:
    """Checks the command line and joins the ranks; from here on every rank makes the same calls.

    megatron-core (with Transformer Engine) and vLLM read the environment when they are imported. It is prepared here,
    so whatever imports them, such as `recipes.checkpoints`, is imported after this call. A command that does not train
    needs no FP8.

    Raises:
        ConfigError: a setting is wrong; ranks, model and layout do not fit each other; a training run does not fit its
            machines, or has nothing at `train.start_from`.
        UserError: the run directory holds something else or cannot be written; there is no tokenizer, or its chat
            template cannot be used; the task's problems differ between ranks; a training run's trackers cannot be used.
    """
    config = configuration.load(argv)
    with watchdog.watched(60 * config.run.timeout_minutes):  # a user's task may hang
        task = tasks.load(config.task, config.dialogue)
    model = model_path(config)
    arch = architecture_of(model)
    check_layout(config, arch)
    environment.prepare(config, torch.cuda.is_available())
    world = runtime.start(config)
    _refuse_other_problems(task, world)
    fp8_support.prepare(config if trains else without_fp8(config), arch)
    if advice := fp8_support.advice(config):
        warn(advice)
    run = RunDirectory(config, world)
    run.check_directory()
    progress = Progress(world.is_main, engines=world.size // config.rollout.tensor_parallel)
    progress.say(f"run.dir={run.path}  model.path={config.model.path}  task.name={config.task.name}")
    dialogue = Dialogue(read_tokenizer(model), config.dialogue, task.wording, stop_token_ids(model))
    setup = Setup(config, task, arch, model, world, run, dialogue, progress)
    if trains:
        world.on_main(lambda: check_start(config.train.start_from, run.checkpoints))
        capacity.check(config, arch, world, run.checkpoints)
        setup.check_trackers()
    return setup


def _refuse_other_problems(task: Task, world: World) -> None:
    """Refuses a task that gives ranks other problems or another order, as one does that reads them from a set."""
    problems = (problem for split in ("train", "test") for problem in task.problems(split))
    if world.size > 1 and len(set(world.gather(hash_of(problems)))) > 1:
        raise UserError(
            f"task.name: {task.name}: problems() differ between ranks: they must always be the same, in the same order "
            "(that of a set, for one, differs between processes)"
        )
