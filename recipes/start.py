"""Starts the two halves of a run, policy and rollout, with the starting weights or without.

Each imports its backend only then: that takes seconds, and has to come after `join`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_r3.models.names import count_parameters
from nemo_r3.refit import refit
from nemo_r3.rollout.scheduler import Rollout
from recipes.setup import Setup

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy
    from nemo_r3.rollout.engine import Engine


def start_policy(setup: Setup, trains: bool = True, with_weights: bool = True) -> Policy:
    """Builds this rank's shard of the policy; without weights, load a checkpoint next."""
    actor, millions = setup.config.actor, count_parameters(setup.arch) / 1e6
    layout = f"tensor_parallel={actor.tensor_parallel} pipeline_parallel={actor.pipeline_parallel}"
    setup.progress.say(f"loading the model: {millions:,.1f}M parameters, {layout}, ranks: {setup.world.size}")
    from nemo_r3.actor.policy import Policy

    return Policy(setup.config, setup.world, trains, with_weights)


def start_rollout(setup: Setup, with_weights: bool = True) -> Rollout[Engine]:
    """Starts this rank's part of a vLLM engine; without weights, refit before sampling."""
    setup.progress.say(f"starting vLLM: rollout.tensor_parallel={setup.config.rollout.tensor_parallel}")
    from nemo_r3.rollout.engine import Engine

    engine = Engine.start(setup.config, setup.model, with_weights)
    return Rollout(engine, setup.dialogue, setup.task, setup.config, setup.world, setup.progress)


def refit_if_behind(setup: Setup, policy: Policy, rollout: Rollout[Engine]) -> None:
    """Refits, if the engine has no weights or older ones than the policy; every rank calls this."""
    if rollout.engine.version != policy.version:
        setup.progress.during("refit")
        with setup.run.timed("refit"):
            refit(policy, rollout.engine)
