"""How one turn is sampled, what comes back, and where its randomness comes from. No vLLM, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from nemo_r3.config.rollout import RolloutConfig

UNFINISHED = "unfinished"
"""Finish reason of a request that was left before its turn had ended."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling of one request; always from the whole distribution (no top_p, no top_k).

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        max_tokens: most tokens to sample, the end-of-turn token included.
        stop_ids: tokens that end the turn; the one that does is the last of its tokens.
        seed: of the request's own random numbers: the same in any engine, and after a resume. None for temperature 0.
    """

    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request has sampled.

    Attributes:
        request_id: as it was added.
        ids: [length] sampled token ids.
        logprobs: [length] their log-probabilities in nats at the request's temperature.
        finish_reason: "stop" or "length"; "unfinished" if the request was aborted before.
        version: the version of the weights that sampled it.
    """

    request_id: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    version: int

    def continuing(self, begun: Completion | None) -> Completion:
        """This completion appended to the one it continues, of the same weights."""
        if begun is None:
            return self
        return replace(self, ids=begun.ids + self.ids, logprobs=begun.logprobs + self.logprobs)


class Sampler(Protocol):
    """What the scheduler needs of an engine."""

    version: int
    """Version of the weights in use."""
    max_model_len: int
    """Most tokens of a prompt and its completion together."""

    def add(self, request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Queues a request; the prompt must leave room for at least one token."""
        ...

    def step(self) -> list[Completion]:
        """Samples one token for as many requests as fit; returns those that finished with it."""
        ...

    def leave(self) -> list[Completion]:
        """Ends all requests that are under way; returns what they have sampled so far, perhaps nothing."""
        ...

    def forget(self) -> None:
        """Drops what is cached of earlier prompts."""
        ...


def request_seed(seed: int, step: int, problem_id: str, sample: int, phase: str) -> int:
    """A 63-bit seed that is the same in every process and on every machine.

    Example: ``request_seed(1, 0, "countdown-1-2-3-7", 4, Phase.REFLECTION)``
    """
    key = "\x1f".join((str(seed), str(step), problem_id, str(sample), str(phase)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def is_deterministic(rollout: RolloutConfig, on_cuda: bool) -> bool:
    """Whether a step done again has to give the same turns: `rollout.deterministic`; where it is unset, on CPUs."""
    return rollout.deterministic if rollout.deterministic is not None else not on_cuda
