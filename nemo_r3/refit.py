"""Refit: the actor's weights into this rank's vLLM engine, before it samples with none or older ones.

    actor shard --pass on to other stages, gather tensor parts--> full tensor --> vLLM, which takes its own part

One tensor at a time: the whole model never stands beside itself. Every rank takes part in lockstep.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Source(Protocol):
    """What gives weights: `actor.Policy`."""

    version: int

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """Streams (Hugging Face name, full tensor); collective."""
        ...


class Sink(Protocol):
    """What takes weights: `rollout.Engine`."""

    def wake(self, *tags: str) -> None:
        """Takes back memory given away by sleep."""
        ...

    def load(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Replaces all weights and resets the prefix cache."""
        ...


def refit(policy: Source, engine: Sink) -> None:
    """Brings the engine to the policy's weights and version; its weights wake before its KV cache needs room."""
    engine.wake("weights")
    engine.load(policy.export_hf(), policy.version)
    engine.wake("kv_cache")
