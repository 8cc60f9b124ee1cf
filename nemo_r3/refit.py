"""Refit: the actor's weights into this rank's vLLM engine, before it samples with none or older ones.

    actor shard --pass on to other stages, gather tensor parts--> full tensor --> vLLM, which takes its own part

One tensor at a time: the whole model never stands beside itself. Every rank takes part in lockstep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy
    from nemo_r3.rollout.engine import Engine


def refit(policy: Policy, engine: Engine) -> None:
    """Brings the engine to the policy's weights and version; its weights wake before its KV cache needs room."""
    engine.wake("weights")
    engine.load(policy.export_hf(), policy.version)
    engine.wake("kv_cache")
