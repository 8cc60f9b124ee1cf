"""Starts the two halves of a run, policy and rollout, with the starting weights or without.

Each imports its backend only then: that takes seconds, and has to come after `join`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nemo_r3.config import Config
from nemo_r3.imports import importing
from nemo_r3.models.names import count_factors, count_parameters
from nemo_r3.precision import without_fp8
from nemo_r3.refit import refit
from nemo_r3.rollout.scheduler import Rollout
from recipes.setup import Setup

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy
    from nemo_r3.actor.trainer import Trainer


def start_trainer(setup: Setup) -> Trainer:
    """Builds this rank's shard of the policy, with the starting weights, and its optimizer."""
    policy = _build(setup, setup.config, with_weights=True)
    from nemo_r3.actor.trainer import Trainer

    return Trainer(policy)


def start_policy(setup: Setup) -> Policy:
    """Builds this rank's shard of a policy that scores and exports a checkpoint; load its weights next."""
    return _build(setup, without_fp8(setup.config), with_weights=False)


def _build(setup: Setup, config: Config, with_weights: bool) -> Policy:
    actor, counted = setup.config.actor, f"{count_parameters(setup.arch) / 1e6:,.1f}M parameters"
    if actor.lora_rank:
        counted += f" and {count_factors(setup.arch, actor.lora_rank) / 1e6:,.2f}M of LoRA"
    layout = f"tensor_parallel={actor.tensor_parallel} pipeline_parallel={actor.pipeline_parallel}"
    if setup.arch.experts:
        layout += f" expert_parallel={actor.expert_parallel}"
    setup.progress.say(f"loading the model: {counted}, {layout}, ranks: {setup.world.size}")
    from nemo_r3.actor.policy import Policy

    return Policy(config, setup.world, with_weights)


def start_rollout(setup: Setup, trains: bool = False) -> Rollout:
    """Starts this rank's part of a vLLM engine; one that trains starts without weights: refit before sampling."""
    config = setup.config
    if not trains:  # nobody would read the experts that vLLM records for `actor.routing_replay`
        config = replace(config, actor=replace(config.actor, routing_replay=False))
    setup.progress.say(f"starting vLLM: rollout.tensor_parallel={config.rollout.tensor_parallel}")
    with importing():
        from nemo_r3.rollout.engine import Engine

    engine = Engine.start(config, setup.model, with_weights=not trains)
    return Rollout(engine, setup.dialogue, setup.task, config, setup.world, setup.progress)


def refit_if_behind(setup: Setup, policy: Policy, rollout: Rollout) -> None:
    """Refits, if the engine has no weights or older ones than the policy; every rank calls this."""
    if rollout.engine.version != policy.version:
        setup.progress.during("refit")
        with setup.run.timed("refit"):
            refit(policy, rollout.engine)
