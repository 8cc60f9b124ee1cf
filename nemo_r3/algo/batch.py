"""Groups -> `UpdateBatch`: advantages, which groups are dropped, and which tokens carry the loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import compress, takewhile
from typing import Any

from numpy.typing import NDArray

from nemo_r3.algo.advantages import Advantage, group_advantages, is_mixed, shuffled
from nemo_r3.algo.aggregation import Aggregation, token_weights
from nemo_r3.algo.losses import loss_named
from nemo_r3.algo.rewards import reward
from nemo_r3.config import AlgoConfig, Config
from nemo_r3.types import Group, Phase, Row, Segment, Trajectory, UpdateBatch


def build_update(groups: Sequence[Group], config: Config, seed: int) -> UpdateBatch:
    """The rows of one training step, from its rollouts, which are the same on every rank.

    A group whose rewards are all equal has no advantages: it is dropped and counted, unless `algo.keep_equal_groups`.
    The other groups are dealt evenly over the step's updates. The rows of an update share its loss as `algo.loss`
    aggregates it (GRPO: 1 / rows each, evenly over the row's trained tokens), so the loss does not depend on how it is
    cut into microbatches and ranks. The seed is that of `algo.shuffle_rewards`.
    """
    algo, loss, updates = config.algo, loss_named(config.algo.loss), config.train.updates_per_step
    earned = [[reward(reflection, algo) for reflection in group.reflections] for group in groups]
    rewards = shuffled(earned, seed) if algo.shuffle_rewards else earned
    kind = Advantage(algo.advantage or loss.ADVANTAGE)
    mixed = [is_mixed(scores) for scores in rewards]
    advantages = [
        group_advantages(scores, kind) if teaches else [0.0] * len(scores)
        for scores, teaches in zip(rewards, mixed, strict=True)
    ]
    trained = {
        number: rows
        for number, group in enumerate(groups)
        if (mixed[number] or algo.keep_equal_groups) and (rows := _group_rows(group, advantages[number], algo))
    }
    dealt = tuple(
        replace(row, group=number, update=place * updates // len(trained))
        for place, (number, rows) in enumerate(trained.items())
        for row in rows
    )
    limit = sum(map(config.rollout.token_limit, algo.trained_phases))
    used = sum(mixed[number] for number in trained)
    return UpdateBatch(
        rows=tuple(row for rows in UpdateBatch(dealt).updates for row in _weighted(rows, loss.AGGREGATION, limit)),
        advantages=tuple(map(tuple, advantages)),
        groups_used=used,
        groups_dropped=len(groups) - used,
        rewards=tuple(map(tuple, earned)),
    )


def _group_rows(group: Group, advantages: Sequence[float], algo: AlgoConfig) -> list[Row]:
    """A group's training sequences, all of whose trained tokens have weight 1."""
    phases = frozenset(Phase(phase) for phase in algo.trained_phases)
    chosen: list[tuple[Trajectory, float]] = []
    for reflection, advantage in zip(group.reflections, advantages, strict=True):
        trajectory = _up_to_trained(reflection.trajectory, phases)
        trained = [turn for turn in (reflection.answer, reflection.retry) if turn.segment.phase in phases]
        masked = algo.mask_truncated and any(turn.truncated for turn in trained)  # arXiv 2503.14476, section 3.4
        if trajectory.segments and not masked:
            chosen.append((trajectory, advantage))
    shared = _shared_tokens([trajectory for trajectory, _ in chosen], phases) if chosen else 0
    routed = group.reflections[0].answer.segment.routed_experts
    return [_build_row(trajectory, phases, advantage, shared, routed) for trajectory, advantage in chosen]


def _weighted(rows: Sequence[Row], kind: Aggregation, limit: int) -> list[Row]:
    """An update's rows with their tokens' shares in its loss."""
    weights = token_weights([row.trained for row in rows], kind, limit)
    return [
        replace(row, loss_weights=[weight * trains for trains in row.loss_weights])
        for row, weight in zip(rows, weights, strict=True)
    ]


def _up_to_trained(trajectory: Trajectory, phases: Collection[Phase]) -> Trajectory:
    """The trajectory up to its last trained segment; nothing after that enters a row."""
    last = max((i for i, segment in enumerate(trajectory.segments) if _trained(segment, phases)), default=-1)
    return Trajectory(trajectory.segments[: last + 1])


def _shared_tokens(trajectories: Sequence[Trajectory], phases: Collection[Phase]) -> int:
    """How many leading tokens all trajectories share, up to the first segment that is trained."""
    columns = zip(*(trajectory.segments for trajectory in trajectories), strict=False)
    alike = takewhile(
        lambda column: column.count(column[0]) == len(column) and not _trained(column[0], phases), columns
    )
    shared = sum(len(column[0].ids) for column in alike)
    assert shared, "a trajectory begins with its task, which is never trained and the same for a whole group"
    return shared


def _build_row(
    trajectory: Trajectory, phases: Collection[Phase], advantage: float, shared: int, routed: NDArray[Any] | None
) -> Row:
    """One training sequence; each of its trained tokens has this advantage, and weight 1.

    `routed` are the experts of the group's first reflection, which begin with the context's.
    """
    ids: list[int] = []
    kinds: list[Phase] = []
    sampled: list[bool] = []
    advantages: list[float] = []
    weights: list[float] = []
    logprobs: list[float] = []
    for segment in trajectory.segments:
        length, trains = len(segment.ids), _trained(segment, phases)
        ids += segment.ids
        kinds += [segment.phase] * length
        sampled += [segment.sampled] * length
        advantages += [advantage if trains else 0.0] * length
        weights += [float(trains)] * length
        logprobs += segment.logprobs if segment.sampled else [0.0] * length
    assert len(logprobs) == len(ids), "every sampled token has a log-probability"
    row = Row(ids, kinds, sampled, advantages, weights, logprobs, shared=shared)
    if routed is None:
        return row
    own = [segment.routed_experts for segment in trajectory.segments if segment.routed_experts is not None]
    context = len(ids) - 1 - sum(map(len, own))  # 0 for the first reflection
    return replace(row, routed_experts=(routed[:context], *own))


def _trained(segment: Segment, phases: Collection[Phase]) -> bool:
    return segment.sampled and segment.phase in phases and len(segment.ids) > 0


def check_loss_weights(batch: UpdateBatch, config: AlgoConfig) -> None:
    """The last check before an optimizer step.

    Raises:
        RuntimeError: a token that vLLM did not sample, or of a phase that is not trained, carries loss.
    """
    phases = frozenset(Phase(phase) for phase in config.trained_phases)
    for number, row in enumerate(batch.rows):
        for position in compress(range(len(row)), row.loss_weights):
            phase, sampled = row.phases[position], row.sampled[position]
            if not (sampled and phase in phases):
                origin = "sampled" if sampled else "not sampled by vLLM"
                weight = row.loss_weights[position]
                raise RuntimeError(
                    f"row {number}, token {position}: phase {phase} ({origin}) has weight {weight:.3g} in the loss; "
                    f"algo.trained_phases={list(config.trained_phases)}"
                )
