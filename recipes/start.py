"""Starts a run's two halves, both with the starting checkpoint: the policy on megatron-core and the rollout on vLLM.

Each imports its own: that takes seconds, and not before `join` has prepared the environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_r3.rollout.scheduler import Rollout
from recipes.plan import Setup

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy
    from nemo_r3.rollout.engine import Engine


def start_policy(setup: Setup, trains: bool = True) -> Policy:
    """Builds this rank's shard of the policy."""
    from nemo_r3.actor.policy import Policy

    return Policy(setup.plan.config, setup.world, trains)


def start_rollout(setup: Setup) -> Rollout[Engine]:
    """Starts this rank's part of a vLLM engine."""
    from nemo_r3.rollout.engine import Engine

    plan = setup.plan
    engine = Engine.start(plan.config, plan.model)
    return Rollout(engine, setup.dialogue, plan.task, plan.config, setup.world, setup.progress)
