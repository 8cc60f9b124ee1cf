"""What a request asks of an engine, what comes back, and where its randomness comes from. No vLLM, no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_r3.config.rollout import RolloutConfig

UNFINISHED = "unfinished"
"""Finish reason of a request that was aborted."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request is sampled: always from the whole distribution (no top_p, no top_k)."""

    temperature: float  # logits are divided by it; 0 takes the likeliest token
    max_tokens: int  # most tokens to sample, including the end-of-turn token
    stop_ids: tuple[int, ...]  # tokens that end the turn; the one that did is its last token
    seed: int | None = None
    """Of the request's own random numbers, which are the same in any engine and after a resume; None for
    temperature 0."""
    experts_from: int | None = None
    """The first token, of prompt and completion, whose experts are wanted; None: of no token."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request has sampled."""

    request_id: str  # as it was added
    ids: tuple[int, ...]  # [length] sampled token ids
    logprobs: tuple[float, ...]  # [length] their log-probabilities in nats, at the request's temperature
    finish_reason: str  # "stop", "length" or UNFINISHED
    version: int  # the version of the weights that sampled it
    routed_experts: NDArray[Any] | None = field(default=None, compare=False, repr=False)
    """[tokens, layers, top_k] uint8 or uint16: the experts to which vLLM sent each token from `Sampling.experts_from`
    to the last but one; None if they were not wanted, or nothing was sampled."""

    def continuing(self, begun: Completion | None) -> Completion:
        """This completion appended to the one it continues, of the same weights."""
        if begun is None:
            return self
        routed = [part for part in (begun.routed_experts, self.routed_experts) if part is not None]
        return replace(
            self,
            ids=begun.ids + self.ids,
            logprobs=begun.logprobs + self.logprobs,
            routed_experts=np.concatenate(routed) if routed else None,
        )


def request_seed(seed: int, step: int, asked: str, sample: int, phase: str) -> int:
    """A 63-bit seed that is the same in every process and on every machine.

    Example: ``request_seed(1, 0, "countdown-1-2-3-7/0", 4, Phase.REFLECTION)``; `asked` is a problem or a failure.
    """
    key = "\x1f".join((str(seed), str(step), asked, str(sample), str(phase)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def is_deterministic(rollout: RolloutConfig, on_cuda: bool) -> bool:
    """Whether a repeated step has to give the same turns: `rollout.deterministic`; if unset, on CPUs only."""
    return rollout.deterministic if rollout.deterministic is not None else not on_cuda
