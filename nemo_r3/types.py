"""What flows through nemo_r3: problems, trajectories made of phased segments, groups.

    Problem -> Trajectory [task][attempt]                       a first attempt; a failure if it is rejected
            -> Trajectory [task][attempt][request][reflection]  what a policy update trains on
            -> Trajectory [...][request][retry]                 what the verifier judges

A trajectory is a flat run of token ids, cut into segments that each have a phase. There is no prompt/response split,
and nothing here knows how many turns there are. No torch, no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_ROOM = "no_room"
"""Finish reason of an empty answer: its prompt fills `rollout.max_model_len`, so nothing was sampled."""


class Phase(StrEnum):
    """Which part of a trajectory a token belongs to."""

    TASK = "task"
    ATTEMPT = "attempt"
    REQUEST = "request"
    REFLECTION = "reflection"
    RETRY = "retry"


@dataclass(frozen=True, slots=True)
class Problem:
    """One verifiable task.

    Example: ``Problem("countdown-1-2-3-7", "Using the numbers 1, 2, 3, ...", {"numbers": [1, 2, 3], "target": 7})``
    """

    id: str  # unique, and stable across runs and machines
    text: str  # the user's first turn
    data: Mapping[str, Any]  # facts for the verifier, as JSON has them; never shown to the model
    tools: tuple[Mapping[str, Any], ...] = ()
    """The functions that the model may call, as chat templates take them:
    ``{"type": "function", "function": {"name": ..., "description": ..., "parameters": <JSON Schema>}}``."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one phase."""

    phase: Phase  # the part of the trajectory
    ids: tuple[int, ...]  # [length] token ids
    logprobs: tuple[float, ...] = ()
    """[length] log-probabilities (nats, at the rollout temperature) with which vLLM sampled the tokens; empty for
    template and user text."""
    version: int = -1  # of the weights that sampled it; -1 for template and user text
    routed_experts: NDArray[Any] | None = field(default=None, compare=False, repr=False)
    """[tokens, layers, top_k] uint8 or uint16, with `actor.routing_replay`: the experts to which vLLM sent tokens that
    came before this segment's last one. They go on where those of the trajectory's earlier segments end. Of a group's
    reflections, the first one's begin with the context's, and the others' after it."""

    @property
    def sampled(self) -> bool:
        """Whether vLLM sampled these tokens."""
        return self.version >= 0


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Segments in the order a model sees them."""

    segments: tuple[Segment, ...] = ()

    @property
    def ids(self) -> list[int]:
        """[length] all token ids, in order."""
        return [token for segment in self.segments for token in segment.ids]

    def then(self, *segments: Segment) -> Trajectory:
        """This trajectory with more segments at its end."""
        return Trajectory(self.segments + segments)

    def __len__(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Answer:
    """A sampled turn with its text and how it ended."""

    segment: Segment  # its tokens, including the end-of-turn token that ended it, if one did
    text: str  # decoded without special tokens
    finish_reason: str  # "stop" (the model ended its turn), "length" (cut at the token limit) or NO_ROOM

    @property
    def truncated(self) -> bool:
        """Whether it was cut at its token limit."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A first answer and its verdict: a failure to reflect on, and a row of the failure bank, if it is rejected."""

    problem: Problem
    sample: int  # which of the samples drawn for this problem it is
    context: Trajectory  # [task][attempt]
    answer: Answer  # the answer (its segment is the context's last)
    passed: bool  # whether the verifier accepts it

    @property
    def is_failure(self) -> bool:
        """Whether the verifier rejected it and it has tokens to reflect on."""
        return not self.passed and bool(self.answer.segment.ids)

    @property
    def id(self) -> str:
        """Unique in a bank: the problem and the sample."""
        return f"{self.problem.id}/{self.sample}"


@dataclass(frozen=True, slots=True)
class Reflection:
    """One self-reflection with the retry it led to."""

    sample: int  # its index in the group
    trajectory: Trajectory  # [task][attempt][request][reflection][request][retry]
    answer: Answer  # the reflection
    retry: Answer  # the answer sampled with the reflection in context
    passed: bool  # whether the verifier accepts the retry
    solves: bool = False  # whether the verifier accepts the reflection itself, which then gives the answer away


@dataclass(frozen=True, slots=True)
class Group:
    """The G reflections drawn for one failure (arXiv 2505.24726; GRPO's group)."""

    failure: Attempt
    reflections: tuple[Reflection, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: a trajectory with what the loss needs at each of its tokens.

    All lists are [length] and aligned with `ids`: entry t is about token t as a target.
    """

    ids: Sequence[int]
    phases: Sequence[Phase]
    sampled: Sequence[bool]  # whether vLLM sampled the token
    advantages: Sequence[float]  # group advantage of the token's reflection; 0 for tokens that are not trained
    loss_weights: Sequence[float]
    """The token's share in its update's loss; 0 for tokens that are not trained. They carry the loss's denominators, so
    any split into microbatches and ranks adds up to the same loss."""
    rollout_logprobs: Sequence[float]  # vLLM's log-probability of the token; 0 if it was not sampled
    group: int = 0  # number of the row's group
    shared: int = 0  # leading, untrained tokens that all rows of the group share
    update: int = 0  # which of the step's optimizer steps trains on it and its whole group; never decreasing
    routed_experts: Sequence[NDArray[Any]] = field(default=(), compare=False, repr=False)
    """With `actor.routing_replay`, laid end to end: [length - 1, layers, top_k], to which experts vLLM sent each token
    but the last. Pieces, as a group's rows share their context's."""

    @property
    def trained(self) -> int:
        """How many tokens carry loss; the first is never a target."""
        return len(self.loss_weights) - 1 - self.loss_weights[1:].count(0.0)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class UpdateBatch:
    """Everything one training step trains on, the same on every rank."""

    rows: tuple[Row, ...] = ()  # the training sequences
    advantages: tuple[tuple[float, ...], ...] = ()  # per group, per reflection; 0 in a dropped group
    groups_used: int = 0  # groups that have mixed rewards and at least one row
    groups_dropped: int = 0  # the others; they have no rows, unless `algo.keep_equal_groups`
    rewards: tuple[tuple[float, ...], ...] = ()
    """Per group, per reflection; as they were earned, even if `algo.shuffle_rewards` deals them out anew."""

    @property
    def updates(self) -> list[list[Row]]:
        """The rows of each optimizer step, in order."""
        return [list(rows) for _, rows in groupby(self.rows, key=attrgetter("update"))]
